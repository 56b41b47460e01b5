"""Every address of the site in Chromium: on a desk and a phone, light and dark, from disk too."""

from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.browser import served, watched

ROOT = Path(__file__).parents[1]
SHOTS = ROOT / "build/screenshots"
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text("utf-8")
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
COLOURS = ["color-contrast", "link-in-text-block"]  # all that another scheme can change
# What a phone can change of a page; the rest, such as the drawer's, is the same on all of a folder.
NARROW = ["scrollable-region-focusable", "target-size"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = {"light": "default", "dark": "slate"}
# A page has thousands of coloured words and of pieces of formulas, which take axe ten seconds.
# Of words that look the same one stays marked; a formula, which is hidden from screen readers and
# has the colour of the text around it, becomes a box of its width.
THIN = """() => {
  const seen = new Set()
  for (const word of document.querySelectorAll(".highlight code span")) {
    const kind = word.className + " in " + word.closest(".highlight").className
    if (seen.has(kind)) word.replaceWith(...word.childNodes)
    seen.add(kind)
  }
  const formulas = [...document.querySelectorAll(".katex")]
  const widths = formulas.map(formula => {
    const boxes = [...formula.querySelectorAll(".base")].map(b => b.getBoundingClientRect())
    return Math.max(...boxes.map(b => b.right)) - Math.min(...boxes.map(b => b.left))
  })
  formulas.forEach((formula, at) => {
    const box = document.createElement("span")
    Object.assign(box.style, { display: "inline-block", width: `${widths[at]}px` })
    formula.replaceChildren(box)
  })
}"""
# For colours, three places of each look (the text's own, that of all it stands on, and of links
# that of the text around them too), since axe doesn't judge what something else covers.
PLACES = """() => {
  const styles = new Map(), places = new Map()
  const style = (box) => styles.get(box) ?? styles.set(box, look(box)).get(box)
  const look = (box) => {
    const own = getComputedStyle(box)
    const behind = box.parentElement ? style(box.parentElement).behind : ""
    const ground = `${own.backgroundColor} ${own.backgroundImage} ${own.opacity} ${own.filter}`
    const text = [own.color, own.fontSize, own.fontWeight, own.textDecorationLine, own.visibility]
    const clear = "rgba(0, 0, 0, 0) none 1 none"
    return { behind: ground === clear ? behind : behind + "|" + ground, text: text.join(" ") }
  }
  for (const box of document.querySelectorAll("body *")) {
    const words = [...box.childNodes].some(node => node.nodeType === 3 && node.data.trim())
    if (!(words || box.matches("input, select, textarea")) || !box.getClientRects().length)
      continue
    const around = box.matches("a") ? style(box.parentElement).text : ""
    const { behind, text } = style(box)
    const key = [behind, text, around].join(" on ")
    if (!places.has(key)) places.set(key, [])
    if (places.get(key).length < 3) places.get(key).push(box)
  }
  for (const box of [...places.values()].flat()) box.dataset.place = ""
}"""
# A table is hidden until what follows it has come; were that taken away, it would stay so.
UNSEEN = """[...document.querySelectorAll(".fp-table")]
  .filter(table => getComputedStyle(table).visibility === "hidden").length"""
# All rules in one run, whose first half goes into reading the page, whatever it then looks at.
RUN_AXE = """async ([rules, without]) => {
  axe.configure({ rules: [
    { id: "color-contrast", selector: "[data-place]" },
    { id: "link-in-text-block", selector: "a[href][data-place]" },
  ] })
  const options = {
    runOnly: rules,
    rules: Object.fromEntries(without.map(rule => [rule, { enabled: false }])),
    resultTypes: ["violations"],
  }
  const { violations } = await axe.run({ exclude: [".katex"] }, options)
  return violations.map(v => [v.id, v.nodes.map(n => n.target.join(" ")).slice(0, 3)])
}"""


@pytest.fixture(scope="session")
def pages(site) -> list[str]:
    found = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    assert "index.html" in found and "404.html" in found
    return found


@pytest.fixture
def tab(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab, troubles = watched(context, address)
    yield tab
    context.close()
    assert not troubles, "\n".join(troubles)


@pytest.fixture(scope="session")
def lesson(site) -> str:
    """A page with code, formulas and tables."""
    pages = [p for p in site.rglob("*.html") if "api" not in p.relative_to(site).parts]
    return max(pages, key=lambda p: p.stat().st_size).relative_to(site).as_posix()


def look(
    browser, base: str, pages: list[str], scheme: str, shots: Path, site: Path | None = None
) -> list[str]:
    """What is wrong with the pages in each of `SIZES`; a picture of its top goes into `shots`.

    With `site`, the folder behind `base`, the pages that links lead to are looked at too, and
    stand in `pages` then.
    """
    context = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    tab, troubles = watched(context, base)
    folders = set()
    for name in pages:
        folder = name.rpartition("/")[0]
        for size, (width, height) in SIZES.items():
            tab.set_viewport_size({"width": width, "height": height})
            if size == "desktop":
                tab.goto(base + name)
                if site:
                    inside = linked(tab, base)
                    troubles += [f"{name}: no {n}" for n in inside if not (site / n).exists()]
                    pages += sorted(n for n in inside - {*pages} if n.endswith(".html"))
            wide = tab.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                troubles.append(f"{name}: scrolls sideways by {wide - width} px, {size}")
            if unseen := tab.evaluate(UNSEEN):
                troubles.append(f"{name}: {unseen} tables stay hidden, {size}")
            tab.screenshot(path=shots / picture(name, size, scheme), quality=80)
            # A phone has a desk's colours, the dark the light's boxes.
            run = None
            if size == "desktop":
                tab.evaluate(AXE)
                tab.evaluate(THIN)
                tab.evaluate(PLACES)
                run = (RULES, []) if scheme == "light" else (COLOURS, [])
            elif scheme == "light":
                run = (NARROW if folder in folders else RULES, COLOURS)
            found = tab.evaluate(RUN_AXE, run) if run else []
            troubles += [f"{name}: axe {rule}: {places}" for rule, places in found]
        folders.add(folder)
        shown = tab.evaluate("document.body.getAttribute('data-md-color-scheme')")
        if shown != SCHEMES[scheme]:
            troubles.append(f"{name}: colour scheme {shown}")
    context.close()
    return troubles


def linked(tab, base: str) -> set[str]:
    """What a page leads to below `base`."""
    # By the attribute: of a link in a drawing, `href` is an object.
    links = tab.evaluate(
        "[...document.querySelectorAll('a[href]')]"
        ".map(a => new URL(a.getAttribute('href'), location).href)"
    )
    return {a.removeprefix(base).partition("#")[0] for a in links if a.startswith(base)}


def picture(name: str, size: str, scheme: str) -> str:
    return f"{name.removesuffix('.html').replace('/', '-')}-{size}-{scheme}.jpg"


@pytest.fixture(scope="session")
def shots(pages) -> Path:
    SHOTS.mkdir(parents=True, exist_ok=True)
    rows = [f"{p} " + " ".join(picture(p, z, s) for z in SIZES for s in SCHEMES) for p in pages]
    (SHOTS / "index.txt").write_text("\n".join(rows) + "\n")
    return SHOTS


def test_every_address(browser, address, pages, shots):
    troubles = look(browser, address, pages, "light", shots)
    assert not troubles, "\n".join(troubles)


def test_every_address_in_the_dark_as_links_lead_there_from_disk(
    browser, address, site, pages, shots
):
    """At once, since it takes a visit to each page either way."""
    reached = ["index.html"]
    troubles = look(browser, f"{site.as_uri()}/", reached, "dark", shots, site)
    troubles += look(browser, address, ["404.html"], "dark", shots)  # its links are absolute
    assert not troubles, "\n".join(troubles)
    assert sorted([*reached, "404.html"]) == pages


def test_the_look_sees_what_is_wrong(browser, tmp_path):
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>Wrong</title>"
    policy = "<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\">"
    wrong = {
        "asks http://127.0.0.1:9/": "<img alt=x src=http://127.0.0.1:9/x.png>",
        "404": "<script src=nowhere.js></script>",
        "is not a function": "<script>document.nothing()</script>",
        "refused by policy script-src": f"{policy}<script>1</script>",
        "scrolls sideways": "<div style='width:2000px'>wide</div>",
        "axe image-alt": "<img src=data:,>",
        "axe color-contrast": "<p style='color:#bbb'>pale</p>",
        "1 tables stay hidden": "<table class=fp-table style='visibility:hidden'></table>",
        "colour scheme": "<p>no theme</p>",
    }
    for number, body in enumerate(wrong.values()):
        (tmp_path / f"{number}.html").write_text(f"{head}{body}")
    with served(tmp_path) as base:
        names = [f"{number}.html" for number in range(len(wrong))]
        troubles = look(browser, base, names, "light", tmp_path)
    for number, words in enumerate(wrong):
        mine = [t for t in troubles if t.startswith(f"{number}.html")]
        assert any(words in t for t in mine), (words, mine)
    assert len(list(tmp_path.glob("*.jpg"))) == len(wrong) * len(SIZES)


def test_the_copy_button_copies_the_code(tab, address, lesson):
    tab.goto(address + lesson)
    block = tab.locator(".highlight:not(.output)").filter(has_text="import").first
    block.scroll_into_view_if_needed()
    block.locator("button[data-md-type=copy], button.md-clipboard").click()
    expect(tab.locator(".md-dialog--active")).to_be_visible()
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == block.locator("code").inner_text().strip() and "import" in copied


def test_the_dark_mode_stays(tab, address, lesson):
    def scheme():
        return tab.evaluate("document.body.getAttribute('data-md-color-scheme')")

    tab.goto(address + lesson)
    before = scheme()
    tab.locator("label[for^=__palette]:visible").click()
    after = scheme()
    assert {before, after} == set(SCHEMES.values())
    tab.reload()
    assert scheme() == after
    tab.goto(address + "index.html")
    assert scheme() == after


def test_the_keyboard_shows_where_it_is(tab, address, lesson):
    tab.goto(address + lesson)
    unseen, stops = [], set()
    for _ in range(40):
        tab.keyboard.press("Tab")
        place, outline = tab.evaluate(
            """() => {
              const box = document.activeElement
              const seen = box.matches(".md-option") ? box.nextElementSibling : box
              const style = getComputedStyle(seen)
              return [box.outerHTML.slice(0, 90), style.outlineStyle + style.outlineWidth]
            }"""
        )
        stops.add(place)
        if outline != "solid2px":
            unseen.append((place, outline))
    assert len(stops) > 30 and not unseen


def test_what_scrolls_is_reached_by_keyboard(tab, address, lesson):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.goto(address + lesson)
    boxes = tab.locator("[data-scrolls]")
    assert boxes.count() > 3
    assert {box.get_attribute("tabindex") for box in boxes.all()} == {"0"}


def test_nothing_moves_for_those_who_ask(browser, address):
    moving = """[...document.querySelectorAll("*")].filter(e =>
      getComputedStyle(e).transitionDuration.split(", ").some(d => parseFloat(d) > 0)).length"""
    counts = {}
    for motion in ("reduce", "no-preference"):
        tab = browser.new_page(reduced_motion=motion)
        tab.goto(address)
        counts[motion] = tab.evaluate(moving)
        tab.close()
    assert counts["reduce"] == 0 < counts["no-preference"]


def test_eighty_columns_fit_beside_both_sidebars(tab, address, lesson):
    tab.goto(address + lesson)
    columns = tab.evaluate(
        """() => {
          const code = document.querySelector(".highlight:not(.output) code")
          const ruler = document.createElement("span")
          ruler.textContent = "0".repeat(100)
          code.append(ruler)
          const style = getComputedStyle(code)
          const inside = code.clientWidth - 2 * parseFloat(style.paddingLeft)
          return 100 * inside / ruler.getBoundingClientRect().width
        }"""
    )
    assert columns >= 80
    assert tab.locator(".md-sidebar--primary").is_visible()
    assert tab.locator(".md-sidebar--secondary").is_visible()
