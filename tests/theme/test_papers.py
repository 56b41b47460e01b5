"""Papers: the file of data, what pages cite and list, footnotes, and the page of all papers."""

import html
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import yaml
from mkdocs.config import load_config
from playwright.sync_api import expect

from tests.browser import watched
from tests.test_browser import AXE, RULES, RUN_AXE
from theme import paper_index, papers

ROOT = Path(__file__).parents[2]
DATA = ROOT / "site_src/papers.yml"

GOOD = """
"2305.13245":
  name: GQA
  authors: Joshua Ainslie et al.
  title: "GQA: Training *Generalized* Models"
"1706.03762":
  name: Transformer
  authors: Ashish Vaswani et al.
  title: Attention Is All You Need
radford2019:
  name: GPT-2
  authors: Alec Radford et al.
  title: Language Models
  year: 2019
  month: 2
  where: OpenAI
  url: https://example.org/gpt2.pdf
"""


def entry(**changes) -> dict:
    given = {"name": "A", "authors": "B", "title": "C"} | changes
    return {key: value for key, value in given.items() if value is not None}


# The data


@pytest.mark.parametrize(
    ("key", "year", "month"),
    [("2305.13245", 2023, 5), ("0909.4061", 2009, 9), ("cmp-lg/9606011", 1996, 6)],
)
def test_the_date_follows_from_the_arxiv_id(key, year, month):
    paper = papers.paper_of(key, entry())
    assert (paper.year, paper.month) == (year, month)
    assert paper.url == f"https://arxiv.org/abs/{key}" and paper.where == f"arXiv:{key}"


@pytest.mark.parametrize(
    ("key", "about", "said"),
    [
        (2305.13245, entry(), "put it in quotes"),
        ("2305.13245", entry(title=None), "has no title"),
        ("2305.13245", entry(year=2023), "year can't stand there"),
        ("someone1999", entry(), "has no url, where, year"),
        ("someone1999", entry(year="1999", where="x", url="y"), "year can't be '1999'"),
        ("someone1999", entry(year=1999, month=13, where="x", url="y"), "there is no month 13"),
        ("2313.00001", entry(), "there is no month 13"),
        ("2305.13245", "GQA", "has no authors, name, title"),
    ],
)
def test_an_entry_that_says_too_little_or_too_much_is_refused(key, about, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        papers.paper_of(key, about)


def test_what_stands_twice_is_refused():
    found, problems = papers.read(GOOD)
    assert list(found) == ["2305.13245", "1706.03762", "radford2019"] and problems == []
    twice = GOOD + '"1706.03762":\n  name: GQA\n  authors: A\n  title: B\n'
    assert papers.read(twice)[1] == ["1706.03762 stands there twice", "two are called GQA"]


def test_the_file_of_all_papers_is_in_order():
    found, problems = papers.read(DATA.read_text("utf-8"))
    assert problems == [] and len(found) > 100


# What cites


def test_code_and_comments_cite_nothing():
    text = """A[^1706.03762], B[^b] and C[^1706.03762]: it goes on.

```python
x = "[^code]"
```

??? tip
    ~~~~text
    [^fence]
    ```
    ~~~~
    D[^cmp-lg/9606011]

Patterns like `[^a-z]` and ``[^`]`` and <!-- [^comment] --> don't.
"""
    assert papers.cited(text) == ["1706.03762", "b", "cmp-lg/9606011"]


def problems_of(entries, found) -> list[str]:
    page = papers.Citing("a.md", "A", "Topic", False, 0, cited=found)
    papers.check(page, entries, papers.read(GOOD)[0])
    return page.problems


def test_a_page_lists_what_it_cites():
    both = ["2305.13245", "1706.03762"]
    assert problems_of(both, both) == []
    assert problems_of([{"id": both[0], "section": "2.1"}, both[1]], both) == []
    assert problems_of(both, both[:1]) == [
        "papers: 1706.03762 is listed and never cited, as [^1706.03762]"
    ]
    assert problems_of(both[:1], both) == ["[^1706.03762] is cited and not listed in papers:"]
    assert problems_of(["2305.1"], ["2305.1"]) == ["there is no paper 2305.1 in papers.yml"]
    assert problems_of([both[0], both[0]], both[:1]) == ["papers: 2305.13245 is listed twice"]
    for wrong in (2305.13245, {"id": both[0]}, {"id": both[0], "section": 2.1}):
        (problem,) = problems_of([wrong], [])
        assert "is neither a key in quotes nor {id: …, section: …}" in problem


# A build


@pytest.fixture
def project(shell):
    (shell.root / "site_src/papers.yml").write_text(GOOD)
    (shell.root / "snippets/topic").mkdir(parents=True)
    for name in ("__init__", "topic/__init__", "topic/gqa"):
        (shell.root / f"snippets/{name}.py").write_text('"""A module."""\n')
    shell.page("topic/index.md", "---\ntitle: The topic\n---\n# The topic\n\nWords.")
    shell.page(
        "topic/gqa.md",
        "---\ntitle: Groups\nminutes: 5\npapers: [{id: '2305.13245', section: '2.2, groups'}, "
        "'1706.03762']\n---\n# Groups\n\nFirst[^1706.03762] and second[^2305.13245], "
        "then again[^1706.03762].",
    )
    shell.page(
        "topic/gpt2.md",
        "---\ntitle: A model\nminutes: 5\npapers: [radford2019]\n---\n"
        "# A model\n\nWords[^radford2019].",
    )
    asked = "\n\n".join(f"<!-- papers: {what} -->" for what in ("timeline", "table", "reading"))
    shell.page("reference/papers.md", f"# Papers\n\n{asked}")
    return shell


def test_a_page_ends_with_its_papers(project):
    code, output = project.build()
    assert code == 0, output
    page = project.html("topic/gqa.html")
    notes = page[page.index(' id="papers"') :]
    items = re.findall(r'<li id="fn:([^"]+)">\s*<p>(.*?)</p>', notes, re.DOTALL)
    assert [key for key, _ in items] == ["1706.03762", "2305.13245"]  # as the text comes to them
    text = html.unescape(re.sub(r"<[^>]+>", "", items[1][1]))
    assert text.startswith(
        "Joshua Ainslie et al., GQA: Training *Generalized* Models, 2023, arXiv:2305.13245. "
        "Implemented here: section 2.2, groups"
    )
    assert 'href="https://arxiv.org/abs/2305.13245"' in items[1][1]
    assert re.findall(r'href="#(fnref[^"]*)" aria-label="([^"]*)"', notes)[:2] == [
        ("fnref:1706.03762", "Back to the text"),
        ("fnref2:1706.03762", "Back to the text, place 2"),
    ]
    assert "Jump back" not in page
    labelled = '<a class="footnote-ref" aria-label="Paper 2: GQA, 2023" href="#fn:2305.13245">2</a>'
    assert labelled in page
    # The head links the first paper, where the page has a module.
    assert '<a href="https://arxiv.org/abs/2305.13245">Paper: GQA</a>' in page
    assert "Paper: GPT-2" not in project.html("topic/gpt2.html")
    assert 'href="https://example.org/gpt2.pdf">OpenAI</a>' in project.html("topic/gpt2.html")
    assert 'id="papers"' not in project.html("topic/index.html")
    assert not (project.site / "papers.yml").exists()

    found = project.html("reference/papers.html")
    table = found[found.index("<table") : found.index("</table>")]
    rows = [re.findall(r"<td>(.*?)</td>", row, re.DOTALL) for row in table.split("</tr>")]
    rows = [[re.sub(r"<[^>]+>", " ", cell) for cell in row] for row in rows if row]
    assert [row[0] for row in rows] == ["2023-05", "2019-02", "2017-06"]
    assert [" ".join(row[2].split()) for row in rows] == ["Groups : section 2.2, groups", "", ""]
    assert [row[3].strip() for row in rows] == ["", "A model", "Groups"]
    assert 'href="../topic/gqa.html"' in table
    marks = re.findall(r'<a class="(fp-mark[^"]*)" href="#([^"]+)">', found)
    assert sorted(marks) == [
        ("fp-mark", "paper-1706-03762"),
        ("fp-mark", "paper-radford2019"),
        ("fp-mark fp-built", "paper-2305-13245"),
    ]
    assert all(f'id="{anchor}"' in table for _, anchor in marks)
    assert ">The topic</text>" in found
    index = (project.site / "search/search_index.js").read_text("utf-8")
    docs = json.loads(index[index.index("{") : index.rindex("}") + 1])["docs"]
    names = {doc["location"].partition("#")[0] for doc in docs if "Ainslie" in doc["text"]}
    assert names == {"reference/papers.html"}


def test_what_is_wrong_with_papers_fails_the_build(project):
    project.edit("site_src/topic/gpt2.md", "Words[^radford2019]", "Words[^2305.13245]")
    code, output = project.build()
    assert code != 0
    assert "topic/gpt2.md: papers: radford2019 is listed and never cited" in output
    assert "topic/gpt2.md: [^2305.13245] is cited and not listed" in output
    project.edit("site_src/topic/gpt2.md", "papers: [radford2019]", "papers: ['2305.13245']")
    code, output = project.build()
    assert code != 0 and "papers.yml: no page cites radford2019" in output


# The picture


def shown(number: int, month: int, name: str) -> paper_index.Shown:
    key = f"{number // 12 % 100:02}{month:02}.{number:05}"
    paper = papers.paper_of(key, entry(name=name))
    page = papers.Citing("a.md", "A", "Topic", False, 0, [key])
    return paper_index.Shown(paper, [page], [], "Topic")


def test_no_label_lies_on_another_and_months_go_to_the_right():
    rng = random.Random(0)
    group = [
        shown(rng.randrange(16 * 12, 27 * 12), rng.randint(1, 12), "x" * rng.randint(2, 24))
        for _ in range(200)
    ]
    right = 1028  # the end of 2026
    marks = paper_index.marks(group, {}, 130, right)
    packed = paper_index.rows(marks)
    assert sorted(map(id, (m for row in packed for m in row))) == sorted(map(id, marks))
    for row in packed:
        for one, other in itertools.pairwise(row):
            assert one.left + one.width < other.left
    assert all(mark.left + mark.width <= right + paper_index.MARGIN for mark in marks)
    assert any(mark.flipped for mark in marks) and not all(mark.flipped for mark in marks)
    in_time = sorted(marks, key=lambda mark: mark.shown.when)
    assert [m.x for m in in_time] == sorted(m.x for m in marks)


# Notebooks to download, and tags


def test_a_notebook_to_download_has_links_in_place_of_footnotes(monkeypatch):
    monkeypatch.setattr(papers.library, "papers", papers.read(GOOD)[0])
    cells = [
        {"cell_type": "markdown", "source": ["Groups[^2305.13245] of heads.\n", "More."]},
        {"cell_type": "code", "source": ["x = '[^2305.13245]'"]},
    ]
    made = json.loads(papers.carried(json.dumps({"cells": cells})))["cells"]
    assert made[0]["source"] == [
        "Groups ([GQA, 2023](https://arxiv.org/abs/2305.13245)) of heads.\n",
        "More.",
    ]
    assert made[1] == cells[1]


def test_every_lesson_has_an_idea_and_all_tags_are_listed():
    tags = load_config(str(ROOT / "mkdocs.yml")).plugins["material/tags"].config
    families, ideas, allowed = (
        [str(tag) for tag in group]
        for group in (
            tags.listings_map["families"].include,
            tags.listings_map["ideas"].include,
            tags.tags_allowed,
        )
    )
    assert sorted(families + ideas) == sorted(allowed)
    used = set()
    for path in sorted([*(ROOT / "site_src").rglob("*.md"), *(ROOT / "site_src").rglob("*.ipynb")]):
        text = path.read_text("utf-8")
        if path.suffix == ".ipynb":
            text = "".join(json.loads(text)["cells"][0]["source"])
        about = next(yaml.safe_load_all(text.split("\n---")[0])) if text.startswith("---") else {}
        if "minutes" in about:
            own = about.get("tags", [])
            assert set(own) & set(ideas), path
            assert own == sorted(own, key=lambda tag: tag in ideas), f"{path}: families come first"
            used.update(own)
    assert set(ideas) <= used


# The real site


def test_every_citation_leads_to_its_paper_and_back(site):
    pages = 0
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        ids = set(re.findall(r' id="([^"]+)"', page))
        links = re.findall(r'<a class="footnote-(?:ref|backref)"[^>]* href="#([^"]+)"', page)
        assert set(links) <= ids, path
        found = re.findall(r'<a class="footnote-ref"[^>]*#fn:([^"]+)">(\d+)</a>', page)
        in_order = list(dict.fromkeys(found))
        assert [number for _, number in in_order] == [f"{n + 1}" for n in range(len(in_order))]
        assert re.findall(r'<li id="fn:([^"]+)">', page) == [key for key, _ in in_order], path
        prose = re.sub(r"<(pre|code).*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r"\[\^[\w./-]+\]", prose), path
        pages += bool(links)
    assert pages > 50


def test_the_page_of_papers_has_all_of_them(site):
    page = (site / "reference/papers.html").read_text("utf-8")
    found, _ = papers.read(DATA.read_text("utf-8"))
    table = page[page.index("<table") : page.index("</table>")]
    anchors = {paper.anchor for paper in found.values()}
    assert len(anchors) == len(found) == table.count("<tr>") - 1
    assert set(re.findall(r'<a href="[^"]+" id="(paper-[^"]+)"', table)) == anchors
    assert set(re.findall(r'class="fp-mark[^"]*" href="#([^"]+)"', page)) == anchors
    reading = page[page.index('id="in-reading-order"') :]
    assert sorted(re.findall(r'href="#(paper-[^"]+)"', reading)) == sorted(anchors)
    assert "Multi-head attention</a>: section 3.2.2" in table


def test_a_citation_shows_its_paper_and_a_phone_gets_a_list(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab, troubles = watched(context, address)
    tab.goto(address + "models/gpt2.html")
    cite = tab.get_by_role("link", name="Paper 1: GPT-2, 2019")
    cite.focus()
    box = tab.get_by_role("dialog", name="Paper")
    expect(box).to_contain_text("Language Models are Unsupervised Multitask Learners")
    tab.evaluate(AXE)
    assert tab.evaluate(RUN_AXE, [RULES, []]) == []  # with the box open
    tab.keyboard.press("Enter")
    assert tab.url.endswith("#fn:radford2019")
    tab.get_by_label("Back to the text", exact=True).first.press("Enter")
    assert tab.url.endswith("#fnref:radford2019")
    expect(tab.get_by_role("link", name="Paper: GPT-2")).to_have_attribute(
        "href", re.compile("cdn.openai.com")
    )
    tab.goto(address + "reference/papers.html")
    mark = tab.get_by_role("group", name="Timeline of papers").get_by_role("link", name="GQA")
    expect(mark).to_be_visible()
    mark.press("Enter")
    assert tab.url.endswith("#paper-2305-13245")
    expect(tab.locator("#paper-2305-13245")).to_be_in_viewport()
    tab.set_viewport_size({"width": 390, "height": 844})
    expect(tab.locator(".fp-timeline")).to_be_hidden()
    expect(tab.locator(".fp-timeline-list")).to_be_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    context.close()
    assert not troubles, "\n".join(troubles)
