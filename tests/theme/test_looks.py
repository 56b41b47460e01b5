"""What readers see and load: light pages that stand still, figures in both schemes, wide tables."""

import json
import re
import time
from pathlib import Path

import pytest

from tests.browser import Quiet, Zipped, served, watched
from theme import figures, tables

ROOT = Path(__file__).parents[2]
HEAVIEST = 250_000  # bytes that a page transfers, with all that it loads before somebody acts
SIZES = {"desk": (1440, 900), "phone": (390, 844)}
# Notes what moves without being asked to.
WATCH = """
window.moved = []
new PerformanceObserver(list => {
  for (const { value, sources } of list.getEntries())
    moved.push([value, ...sources.map(s => s.node?.className || s.node?.nodeName)])
}).observe({ type: "layout-shift", buffered: true })"""
TRANSFERRED = """["resource", "navigation"].flatMap(kind => performance.getEntriesByType(kind)
  .map(entry => [entry.name, entry.transferSize]))"""


def kinds(site: Path) -> dict[str, str]:
    """The heaviest page of each kind."""
    notebooks = {p.relative_to(ROOT / "site_src") for p in (ROOT / "site_src").rglob("*.ipynb")}

    def heaviest(pages) -> str:
        return max(pages, key=lambda p: p.stat().st_size).relative_to(site).as_posix()

    pages = [p for p in site.glob("*/*.html") if p.stem != "index"]
    shown = [p for p in pages if p.relative_to(site).with_suffix(".ipynb") in notebooks]
    return {
        "landing": "index.html",
        "formulas": heaviest([p for p in pages if 'class="katex"' in p.read_text("utf-8")]),
        "notebook": heaviest(shown),
        "API": heaviest((site / "reference/api").glob("*.html")),
        "index": heaviest(site.glob("*/index.html")),
    }


@pytest.fixture(scope="module")
def loaded(browser, site):
    """What each kind of page transferred, and what moved in it, on a desk and on a phone."""
    found = {}
    with served(site, Zipped) as base:
        for kind, page in kinds(site).items():
            for size, (width, height) in SIZES.items():
                context = browser.new_context(viewport={"width": width, "height": height})
                tab = context.new_page()
                tab.add_init_script(WATCH)
                tab.goto(base + page, wait_until="networkidle")
                transferred = dict(tab.evaluate(TRANSFERRED))
                found[kind, size] = page, transferred, tab.evaluate("moved")
                context.close()
    return found


def test_no_page_is_heavy(loaded):
    heavy = {
        (kind, page): sorted(parts.items(), key=lambda part: -part[1])[:8]
        for (kind, size), (page, parts, _) in loaded.items()
        if sum(parts.values()) > HEAVIEST
    }
    assert min(sum(parts.values()) for _, parts, _ in loaded.values()) > 50_000  # it is measured
    assert not heavy, json.dumps([f"{k}: {v}" for k, v in heavy.items()], indent=1)


def test_nothing_moves_while_a_page_loads(loaded):
    moved = {(page, size): shifts for (_, size), (page, _, shifts) in loaded.items() if shifts}
    assert not moved


class Slow(Quiet):
    """Sends a page's first table in two parts."""

    def copyfile(self, source, outputfile):
        data = source.read()
        cut = data.find(b"</tr>", data.find(b"<tbody")) if b"<tbody" in data else len(data)
        outputfile.write(data[:cut])
        outputfile.flush()
        time.sleep(0.5)
        outputfile.write(data[cut:])


def test_a_table_that_comes_in_parts_doesnt_move(browser, site):
    """It is shown when it is whole, as every table that something follows."""
    with served(site, Slow) as base:
        for width, height in SIZES.values():
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.add_init_script(WATCH)
            tab.goto(base + "models/index.html", wait_until="networkidle")
            assert tab.locator(".md-typeset__scrollwrap").first.is_visible()
            assert tab.evaluate("moved") == []
            tab.close()


def test_a_move_would_be_seen(browser, tmp_path):
    soon = "requestAnimationFrame(() => setTimeout(() => p.before('late'), 200))"  # it was painted
    late = f"<p id=p>text</p><script>onload = () => requestAnimationFrame(() => {soon})</script>"
    (tmp_path / "a.html").write_text(f"<!doctype html>{late}")
    with served(tmp_path, Zipped) as base:
        tab = browser.new_page()
        tab.add_init_script(WATCH)
        tab.goto(base + "a.html", wait_until="networkidle")
        assert len(tab.evaluate("moved")) == 1
        tab.close()


# Figures


def test_every_figure_follows_the_scheme(site):
    """Ink on the page's ground, or the second layer of those with images."""
    plain = layered = 0
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        assert "data-images" not in page, path
        plain += page.count('class="output figure"')
        layered += page.count('class="figure true"')
    assert plain > layered > 10


def test_images_in_a_figure_lie_over_it_once_more():
    image = (
        '<img alt="A map" class="output figure" data-images="[[10.0, 20.0, 50.5, 90.0]]" '
        'height="360" loading="lazy" src="a.png" width="680" />'
    )
    page = figures.on_page_content(f"<p>{image}</p>", None, None, None)
    first, second = re.findall(r"<img[^>]*>", page)
    assert first == image.replace(' data-images="[[10.0, 20.0, 50.5, 90.0]]"', "")
    assert 'alt=""' in second and 'src="a.png"' in second and 'class="figure true"' in second
    corners = "0% 0%,10% 20%,50.5% 20%,50.5% 90%,10% 90%,10% 20%,0% 0%"
    assert f"clip-path:polygon({corners})" in second and 'style="width:680px"' in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_turns_and_images_stay(browser, tmp_path, scheme):
    """The colours that a reader sees, of a figure with black ink and a green image."""
    from PIL import Image

    figure = Image.new("RGBA", (200, 100))
    figure.paste((0, 0, 0, 255), (0, 0, 40, 100))
    figure.paste((0, 128, 0, 255), (100, 0, 200, 100))
    figure.save(tmp_path / "a.png")
    image = (
        '<img class="figure" data-images="[[50.0, 0.0, 100.0, 100.0]]" src="a.png" width="200" '
        'height="100">'
    )
    body = figures.on_page_content(image, None, None, None)
    css = [(ROOT / f"site_src/assets/{name}.css").read_text() for name in ("palette", "site")]
    name = {"light": "default", "dark": "slate"}[scheme]
    (tmp_path / "a.html").write_text(
        f"<!doctype html><style>{''.join(css)} body {{margin: 0; background: "
        f"var(--md-default-bg-color)}}</style>"
        f'<body data-md-color-scheme="{name}"><div class="md-typeset">{body}</div>'
    )
    with served(tmp_path) as base:
        tab = browser.new_page(viewport={"width": 200, "height": 100})
        tab.goto(base + "a.html")
        tab.screenshot(path=tmp_path / "shot.png")
        tab.close()
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    ink, ground, shown = (shot.getpixel((x, 50)) for x in (20, 70, 150))
    assert shown == {"light": (0, 128, 0), "dark": (0, round(0.88 * 128), 0)}[scheme]
    assert (min(ink) > 220 and max(ground) < 40) == (scheme == "dark")
    assert (max(ink) < 10 and min(ground) > 245) == (scheme == "light")


# Tables


def test_a_table_of_many_columns_says_so():
    def marked(columns: int) -> bool:
        head = f"<thead><tr>{'<th>a</th>' * columns}</tr></thead>"
        page = tables.on_page_content(f"<table>{head}<tbody></tbody></table>", None, None, None)
        return "data-wide" in page

    assert [marked(columns) for columns in (2, 5, 6, 14)] == [False, False, True, True]


def test_the_theme_finds_no_table_to_move(site, browser, address):
    """It would lay out the page again; ours are where it puts them, in its look."""
    for path in site.rglob("*.html"):
        assert not re.search(r"<table(?![^>]*class=)", path.read_text("utf-8")), path
    tab = browser.new_page()
    tab.goto(address + "attention/gqa.html")
    assert tab.locator(".md-typeset__table > .fp-table").count() > 3
    assert tab.locator(".md-typeset__scrollwrap .md-typeset__scrollwrap").count() == 0
    row = tab.locator(".fp-table tbody tr").nth(1)
    assert (
        row.evaluate("r => getComputedStyle(r).borderTopWidth") != "0px"
        or row.evaluate("r => getComputedStyle(r.cells[0]).borderTopWidth") != "0px"
    )
    tab.close()


def test_a_wide_table_on_a_phone_shows_that_it_goes_on(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    tab = context.new_page()
    tab.goto(address + "models/index.html")
    box = tab.locator(".md-typeset__scrollwrap").first
    assert box.evaluate("b => b.matches('[data-more]') && b.tabIndex === 0")
    name = box.locator("tbody td").first
    before = name.bounding_box()["x"]
    box.evaluate("b => b.scrollLeft = 200")
    assert name.bounding_box()["x"] - before < 1 and box.locator("[data-more]").count() == 0
    box.evaluate("b => b.scrollLeft = b.scrollWidth")
    tab.locator(".md-typeset__scrollwrap:not([data-more])").first.wait_for()
    context.close()


# Keyboard

WHERE = """() => {
  const box = document.activeElement
  const seen = box.matches(".md-option") ? box.nextElementSibling : box
  const { x, y, width, height } = seen.getBoundingClientRect()
  const at = document.elementFromPoint(x + Math.min(width, 40) / 2, y + height / 2)
  return { what: box.textContent.trim(), shown: seen === at || seen.contains(at) || !at,
           inside: Boolean(box.closest(".md-sidebar--primary")), tag: box.tagName }
}"""


@pytest.fixture
def phone(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    tab, troubles = watched(context, address)
    yield tab
    context.close()
    assert not troubles, "\n".join(troubles)


def stops(tab, count: int) -> list[dict]:
    found = []
    for _ in range(count):
        tab.keyboard.press("Tab")
        found.append(tab.evaluate(WHERE))
    return found


def test_a_closed_drawer_is_no_stop_and_an_open_one_is_walked(phone, address):
    phone.goto(address + "attention/gqa.html")
    walked = stops(phone, 12)
    assert [s["what"] for s in walked[:2]] == ["Skip to content", "Menu"]
    assert "Search" in [s["what"] for s in walked] and not any(s["inside"] for s in walked)
    phone.goto(address + "attention/gqa.html")
    stops(phone, 2)
    phone.keyboard.press("Enter")
    phone.wait_for_timeout(100)
    walked = [phone.evaluate(WHERE), *stops(phone, 6)]
    assert all(s["inside"] and s["shown"] for s in walked), walked
    names = [s["what"] for s in walked]
    assert names[0].startswith("Attention") and "Multi-head attention" in names
    phone.keyboard.press("Escape")
    assert phone.evaluate(WHERE)["what"] == "Menu"
    assert not any(s["inside"] for s in stops(phone, 8))


def test_the_drawers_levels_are_left_and_entered_by_keyboard(phone, address):
    phone.goto(address + "attention/gqa.html")
    stops(phone, 2)
    phone.keyboard.press("Space")
    phone.wait_for_timeout(100)
    phone.keyboard.press("Enter")  # the title of the level leads back
    here = phone.evaluate(WHERE)
    assert here["tag"] == "LABEL" and here["what"].startswith("Attention") and here["shown"]
    assert "Multi-head attention" not in [s["what"] for s in stops(phone, 4)]
    for _ in range(4):
        phone.keyboard.press("Shift+Tab")
    phone.keyboard.press("Enter")  # and in again
    assert [s["what"] for s in stops(phone, 2)] == [
        "Scaled dot-product attention",
        "Multi-head attention",
    ]


def test_what_is_unfolded_is_reached_by_keyboard(phone, address):
    phone.goto(address + "attention/gqa.html")
    fold = phone.locator("details:has(pre > code)").first
    code = fold.locator("pre > code").first
    assert code.get_attribute("tabindex") is None
    fold.locator("summary").first.click()
    phone.locator("details[open] code[data-scrolls]").first.wait_for()
    assert code.evaluate("c => c.tabIndex") == 0


def test_results_and_signatures_have_no_button_to_copy(site):
    for page in ("attention/gqa.html", "reference/api/attention.html"):
        found = re.findall(r"<div[^>]*>\s*<pre>.*?<code", (site / page).read_text(), re.DOTALL)
        assert len(found) > 20
        for pre in found:
            code = "no-copy" not in pre and "doc-signature" not in pre
            assert ("data-clipboard-target" in pre) == code, pre


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_folds_and_copy_buttons_are_reached_by_keyboard(browser, address, scheme):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(address + "attention/gqa.html")
    fold, copy = tab.locator("details > summary").first, tab.locator(".copy-file").first
    for box in (
        fold,
        copy,
        tab.locator(".md-tabs__link").last,
        tab.locator(".md-code__button").first,
    ):
        box.focus()
        assert box.evaluate("b => b === document.activeElement && b.tabIndex === 0")
    fold.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("details[open]").count() == 1
    context.close()
