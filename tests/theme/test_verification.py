"""The table of proofs, sorted and filtered; without JavaScript it is a plain table."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.browser import watched
from tests.test_browser import AXE, RULES, RUN_AXE

NAME = "reference/verification.html"
NUMBERS = ["Difference", "Tolerance", "Effect"]


@pytest.fixture
def tab(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, troubles = watched(context, address)
    tab.goto(address + NAME)
    yield tab
    context.close()
    assert not troubles, "\n".join(troubles)


def column(tab, head: str) -> list[str]:
    """The texts of the rows that are seen."""
    return tab.evaluate(
        """head => {
          const table = document.querySelector("table")
          const heads = [...table.tHead.rows[0].cells].map(cell => cell.innerText.trim())
          const rows = [...table.tBodies[0].rows].filter(row => row.checkVisibility())
          return rows.map(row => row.cells[heads.indexOf(head)].innerText.trim())
        }""",
        head,
    )


def sort(tab, head: str) -> str | None:
    """By keyboard; what the head says of its order."""
    button = tab.get_by_role("columnheader", name=head).get_by_role("button")
    button.focus()
    tab.keyboard.press("Enter")
    return tab.get_by_role("columnheader", name=head).get_attribute("aria-sort")


def test_the_numbers_are_seen_on_a_phone(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    tab = context.new_page()
    tab.goto(address + NAME)
    for head in NUMBERS[:2]:
        box = tab.get_by_role("columnheader", name=head).bounding_box()
        assert box["x"] + box["width"] <= 390, head
    context.close()


@pytest.mark.parametrize("head", NUMBERS)
def test_numbers_sort_as_numbers(tab, head):
    before = [float(text) for text in column(tab, head)]
    assert before != sorted(before)
    assert sort(tab, head) == "ascending"
    assert [float(text) for text in column(tab, head)] == sorted(before)
    assert sort(tab, head) == "descending"
    assert [float(text) for text in column(tab, head)] == sorted(before, reverse=True)


def test_words_sort_and_one_column_leads(tab, report):
    pages = column(tab, "Page")
    assert len(pages) == len(report["proofs"])
    sort(tab, "Effect")
    assert sort(tab, "Page") == "ascending"
    assert column(tab, "Page") == sorted(pages, key=str.casefold)
    assert tab.locator("th[aria-sort]").count() == 1
    assert sort(tab, "Page") == "descending"
    assert column(tab, "Page") == sorted(pages, key=str.casefold, reverse=True)
    # What was sorted before keeps its order within a page.
    effects = [
        float(effect)
        for page, effect in zip(column(tab, "Page"), column(tab, "Effect"), strict=True)
        if page == pages[0]
    ]
    assert len(effects) > 1 and sort(tab, "Page") == "ascending"


def test_empty_cells_come_last(tab):
    modules = column(tab, "Module")
    empty = modules.count("–")
    assert 0 < empty < len(modules)
    for _ in range(2):
        sort(tab, "Module")
        assert column(tab, "Module")[-empty:] == ["–"] * empty


def test_words_filter_the_rows(tab, report):
    field, total = tab.get_by_label("Show rows with these words"), len(report["proofs"])
    said = tab.get_by_role("status").filter(has_text="rows")
    expect(said).to_have_text(f"{total} of {total} rows")
    field.fill("GQA torch")
    shown = column(tab, "Page")
    assert 0 < len(shown) < total
    expect(said).to_have_text(f"{len(shown)} of {total} rows")
    oracles = column(tab, "Oracle")
    rows = zip(shown, column(tab, "Module"), oracles, column(tab, "Configuration"), strict=True)
    assert all("gqa" in " ".join(row).lower() and "torch" in " ".join(row) for row in rows)
    sort(tab, "Effect")
    assert len(column(tab, "Page")) == len(shown), "sorting shows what was filtered out"
    field.fill("nowhere at all")
    expect(said).to_have_text(f"0 of {total} rows")
    field.fill("")
    assert len(column(tab, "Page")) == total


def test_versions_and_commit_stand_above(site, report):
    page = (site / NAME).read_text("utf-8")
    above = page.partition("<table")[0]
    for proof in report["proofs"]:
        assert f"{proof['oracle']}\N{NO-BREAK SPACE}{proof['version']}" in above
    assert re.search(r"commit [0-9a-f]{10} of \d{4}-\d\d-\d\d", above)
    assert f"{len(report['proofs']):,} proofs" in above


def test_without_javascript_it_is_a_plain_table(browser, address, report):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address + NAME)
    assert tab.locator("tbody tr").count() == len(report["proofs"])
    assert tab.locator("article :is(button, input):visible").count() == 0
    context.close()


def test_only_this_page_loads_the_script(site):
    loading = [
        path.relative_to(site).as_posix()
        for path in site.rglob("*.html")
        if "assets/tables.js" in path.read_text("utf-8")
    ]
    assert loading == [NAME]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_it_is_accessible_when_sorted_and_filtered(browser, address, scheme, width):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    tab, troubles = watched(context, address)
    tab.goto(address + NAME)
    sort(tab, "Effect")
    tab.get_by_label("Show rows with these words").fill("lora")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate(AXE)
    assert tab.evaluate(RUN_AXE, [RULES, []]) == []
    context.close()
    assert not troubles, "\n".join(troubles)


def test_the_table_agrees_with_the_report(tab, report):
    addresses = tab.locator("tbody tr > :first-child a").evaluate_all(
        "links => links.map(link => new URL(link.href).pathname.slice(1))"
    )
    columns = [column(tab, head) for head in ("Effect", "Module", "Oracle")]
    shown = sorted(zip(addresses, *columns, strict=True))
    proofs = sorted(
        (
            f"{p['page'].rpartition('.')[0]}.html",
            f"{p['effect']:.2g}",
            p["module"] or "–",
            f"{p['oracle']} {p['version']}",
        )
        for p in report["proofs"]
    )
    assert shown == proofs, json.dumps(shown[:3])
