/* What the theme leaves out for keyboards and screen readers. */
const SCROLLING = {
  ".md-typeset__scrollwrap": "Table",
  ".output.table": "Table",
  "div.arithmatex": "Formula",
  "div.diagram": null, // the build has named it
  ".highlight code": null, // text, and no group
}
/* Those whose edge fades while there is more behind it; of code one sees that a line is cut. */
const FADING = ".md-typeset__scrollwrap, .output.table, div.arithmatex, div.diagram"
const more = (box) => box.scrollLeft + box.clientWidth < box.scrollWidth - 1
const fade = ({ target: box }) => box.toggleAttribute("data-more", more(box))

/* A box that scrolls can be reached by keyboard, one that doesn't is no stop on the way. All are
   measured before one is changed: a page with forty boxes would be laid out eighty times. What is
   folded waits until it is opened, or it would be laid out for nobody. */
const folded = (box) => box.closest("details:not([open])")
function reach() {
  const found = []
  for (const [boxes, label] of Object.entries(SCROLLING)) {
    for (const box of document.querySelectorAll(boxes)) {
      if (folded(box)) continue
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight
      found.push({ box, label, scrolls, goesOn: more(box) })
    }
  }
  for (const { box, label, scrolls, goesOn } of found) {
    box.toggleAttribute("data-scrolls", scrolls)
    if (scrolls) {
      box.tabIndex = 0
      if (label) {
        box.setAttribute("role", "group")
        box.setAttribute("aria-label", label)
      }
    } else {
      box.removeAttribute("tabindex")
    }
    if (box.matches(FADING)) {
      box.toggleAttribute("data-more", goesOn)
      box.addEventListener("scroll", fade, { passive: true })
    }
  }
}

/* The theme leaves a section with a page of its own without a name, and gives two sections of one
   name, as Attention and the API's Attention, nothing to tell them apart. */
const nameOf = (label) => label.parentElement.querySelector(".md-ellipsis").textContent.trim()
for (const nav of document.querySelectorAll(".md-nav .md-nav[aria-labelledby]")) {
  const label = document.getElementById(nav.getAttribute("aria-labelledby"))
  if (!label) continue
  const outer = nav.parentElement.closest(".md-nav[aria-labelledby]")
  const above = outer && document.getElementById(outer.getAttribute("aria-labelledby"))
  const unseen = document.createElement("span")
  unseen.className = "fp-unseen"
  unseen.textContent = label.querySelector(".md-ellipsis") ? "" : nameOf(label)
  if (above) unseen.textContent += ` in ${nameOf(above)}`
  label.append(unseen)
}
document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
addEventListener("load", reach)
addEventListener("resize", reach)
addEventListener("toggle", reach, true)
