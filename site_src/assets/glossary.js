/* Shows what a marked term means: at the pointer, at the keyboard, or at the first tap. The second
   tap, as a click and Enter, follows the link to the glossary. */
{
  const says = document.createElement("div")
  says.id = "fp-says"
  says.className = "fp-says"
  says.setAttribute("role", "tooltip")
  const WAIT = 200 // ms: a pointer that passes by opens nothing, one on its way to the note keeps it
  let shown = null
  let timer = 0

  function show(term) {
    hide()
    shown = term
    says.textContent = term.dataset.says
    term.setAttribute("aria-describedby", says.id)
    document.querySelector("main").append(says)
    const [line] = term.getClientRects() // of a term on two lines the first
    const { width, height } = says.getBoundingClientRect()
    const edge = document.documentElement.clientWidth - width - 8
    const below = line.bottom + 4 + height < innerHeight
    const origin = says.offsetParent.getBoundingClientRect()
    const top = below ? line.bottom + 4 : line.top - 4 - height
    says.style.left = `${Math.max(8, Math.min(line.left, edge)) - origin.left}px`
    says.style.top = `${top - origin.top}px`
  }

  function hide() {
    clearTimeout(timer)
    shown?.removeAttribute("aria-describedby")
    shown = null
    says.remove()
  }

  function later(act) {
    clearTimeout(timer)
    timer = setTimeout(act, WAIT)
  }

  for (const term of document.querySelectorAll(".fp-term")) {
    let tapped = false
    term.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "touch") later(() => show(term))
    })
    term.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") later(hide)
    })
    term.addEventListener("pointerdown", (event) => {
      tapped = event.pointerType === "touch" && shown !== term
    })
    term.addEventListener("click", (event) => {
      if (!tapped) return
      event.preventDefault()
      show(term)
    })
    term.addEventListener("focus", () => {
      if (term.matches(":focus-visible")) show(term)
    })
    term.addEventListener("blur", hide)
  }
  says.addEventListener("pointerenter", () => clearTimeout(timer))
  says.addEventListener("pointerleave", () => later(hide))
  says.addEventListener("click", hide)
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide()
  })
  addEventListener("pointerdown", (event) => {
    if (!event.target.closest?.(".fp-term, .fp-says")) hide()
  })
}
