/* The theme's menus without a pointer. They are labels of hidden checkboxes: here they become stops
   of the tab key, with names, and the drawer takes the focus that opened it. Enter works already. */
const drawer = document.getElementById("__drawer")
const opener = document.querySelector(".md-header__button[for=__drawer]")
const stops = {
  ".md-header__button[for=__drawer]": "Menu",
  ".md-header__button[for=__search]": "Search",
}
for (const [label, name] of Object.entries(stops)) {
  const stop = document.querySelector(label)
  const unseen = document.createElement("span")
  unseen.className = "fp-unseen"
  unseen.textContent = name
  stop?.append(unseen)
}
const menus = document.querySelectorAll(
  [...Object.keys(stops), ".md-nav__title[for]", ".md-nav__link[for]"].join(),
)
const before = new Map([...menus].map((label) => [label, label.getAttribute("tabindex")]))
const small = matchMedia("(max-width: 76.2344em)") // the theme's: below it there is a drawer
function arrange() {
  for (const [label, was] of before) {
    if (small.matches) label.tabIndex = 0
    else if (was === null) label.removeAttribute("tabindex")
    else label.setAttribute("tabindex", was)
  }
}
arrange()
small.addEventListener("change", arrange)
for (const label of menus) {
  label.addEventListener("keydown", (event) => {
    if (event.key !== " ") return
    event.preventDefault() // it would scroll
    label.click()
  })
}
// Into a level and back: the focus goes along, or it would stay where nothing is seen any more.
for (const level of document.querySelectorAll(".md-nav__toggle")) {
  level.addEventListener("change", () => {
    const kind = level.checked ? "md-nav__title" : "md-nav__link"
    if (small.matches) document.querySelector(`.${kind}[for="${level.id}"]`)?.focus()
  })
}
drawer.addEventListener("change", () => {
  if (!drawer.checked) return
  const seen = (link) => link.offsetWidth && getComputedStyle(link).visibility === "visible"
  const inside = document.querySelectorAll(".md-sidebar--primary :is(a, label[tabindex='0'])")
  requestAnimationFrame(() => [...inside].find(seen)?.focus())
})
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !drawer.checked) return
  drawer.checked = false
  opener.focus()
})
