"""The first use of a term on a page tells what it means: by pointer, keyboard and finger."""

import re
from html.parser import HTMLParser
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from tests.browser import watched
from theme import glossary
from theme.glossary import Entry, Finder, faults, marked

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text("utf-8")
LESSON = "attention/gqa.html"


def entry(term, *also, page="a"):
    return Entry(term, list(also), [], [], f"About {term}.", page)


class Marks(HTMLParser):
    """The marked words of a page, and the elements around each."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in glossary.VOID:
            self.open.append(tag)
        if dict(attrs).get("class") == "fp-term":
            self.found.append((dict(attrs)["href"].partition("#")[2], set(self.open[:-1])))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_terms_are_found_as_words():
    find = Finder([entry("token"), entry("attention"), entry("multi-head attention", "MHA")])

    def found(text):
        return [(match[0], entry.term) for match, entry in find(text)]

    assert found("Tokens, a token") == [("Tokens", "token"), ("token", "token")]
    assert found("multi-head\nattention") == [("multi-head\nattention", "multi-head attention")]
    assert found("MHA and attention") == [
        ("MHA", "multi-head attention"),
        ("attention", "attention"),
    ]
    for other in (
        "tokenizer",
        "TOKEN",
        "next-token",
        "mha",
        "self-attention",
        "token_id",
        "x.token",
        "token(x)",
    ):
        assert found(other) == []


def test_a_phrase_of_another_meaning_is_no_use():
    find = Finder([entry("loss")._replace(never=["loss of speed"])])
    assert [match.start() for match, _ in find("a loss of\nspeed, a loss")] == [19]


def test_the_first_use_in_prose_is_marked():
    html = (
        '<h1 id="t">token</h1><p><a href="x">token</a> <code>token</code> '
        '<span class="arithmatex">\\(token\\)</span></p><!-- <p>token -->'
        '<div class="output highlight"><p>token</p><div><p>token</p></div></div>'
        "<table><tr><td><p>token</p></td></tr></table><pre>token</pre>"
        '<p title="a > token">A <b>token</b> and a token.</p><ul><li>"Score"</li></ul>'
        '<div class="footnote"><p>key</p></div>'
    )
    done, seen = marked(html, Finder([entry("token"), entry("score"), entry("key")]), "g.html")
    link = '<a class="fp-term" href="g.html#term-{0}" data-says="About {0}.">{1}</a>'
    first = html.replace("<b>token</b>", f"<b>{link.format('token', 'token')}</b>")
    assert done == first.replace("Score", link.format("score", "Score"))
    assert seen == {"token", "score"}


def test_quotes_stay_inside_the_mark():
    quoted = entry("token")._replace(says='A "piece" <of> text.')
    done, _ = marked("<p>token</p>", Finder([quoted]), "g.html")
    assert 'data-says="A &quot;piece&quot; &lt;of&gt; text."' in done


def test_two_entries_of_one_spelling_are_a_fault():
    assert faults([entry("token"), entry("tokens")], {"a"}) == []
    assert faults([entry("token"), entry("key", "Token")], {"a"}) == [
        "'key': 'Token' stands at 'token' already"
    ]


GOOD = """
- {term: token, also: [piece], says: A piece of text., page: topic/a}
- {term: score, says: A number., page: topic/a}
"""


@pytest.fixture
def book(shell):
    shell.page("reference/glossary.md", "# Glossary\n\nWords.\n\n<!-- glossary -->")
    shell.page("topic/a.md", "---\ntitle: Topic A\n---\n# A\n\nA token has a score. A token.")
    source = shell.root / "site_src/glossary.yml"
    source.write_text(GOOD)
    shell.source = source
    return shell


def test_the_page_is_made_of_the_file(book):
    code, output = book.build()
    assert code == 0, output
    page = book.html("reference/glossary.html")
    assert page.index('<dt id="term-score">') < page.index('<dt id="term-token">')
    assert "<small>piece</small>" in page
    assert 'A number. Explained in <a href="../topic/a.html">Topic A</a>.' in page
    assert not Marks(page).found
    marks = Marks(book.html("topic/a.html")).found
    assert [anchor for anchor, _ in marks] == ["term-token", "term-score"]
    assert 'href="../reference/glossary.html#term-token"' in book.html("topic/a.html")
    assert not (book.site / "glossary.yml").exists()


def test_a_wrong_file_fails_the_build(book):
    book.source.write_text(
        GOOD
        + "- {term: Piece, says: Again., page: topic/a}\n"
        + "- {term: zebra, says: An animal., page: topic/a}\n"
        + "- {term: lion, says: An animal., page: topic/b}\n"
    )
    code, output = book.build()
    assert code == 1
    assert "glossary.yml: 'Piece': 'Piece' stands at 'token' already" in output
    assert "glossary.yml: 'zebra' is used on no page" in output
    assert "glossary.yml: 'lion': there is no page topic/b" in output
    book.source.write_text(GOOD + "- {term: lion, means: An animal., page: topic/a}\n")
    code, output = book.build()
    assert code == 1 and "glossary.yml: 'lion' has term, means, page" in output


def test_every_page_marks_a_term_once_and_in_prose(site):
    used, inside = set(), {"a", "code", "pre", "table", "summary", "svg", "h1", "h2", "h3", "h4"}
    for path in site.rglob("*.html"):
        marks = Marks(path.read_text("utf-8")).found
        anchors = [anchor for anchor, _ in marks]
        assert len(anchors) == len(set(anchors)), path
        assert not [anchor for anchor, around in marks if around & inside], path
        used |= set(anchors)
    page = (site / "reference/glossary.html").read_text("utf-8")
    assert used == set(re.findall(r'<dt id="(.*?)">', page)) and len(used) >= 120


@pytest.fixture(params=["light", "dark"])
def phone(browser, address, request):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, color_scheme=request.param
    )
    tab, troubles = watched(context, address)
    tab.goto(address + LESSON)
    yield tab
    context.close()
    assert not troubles, "\n".join(troubles)


def violations(tab) -> list:
    tab.evaluate(AXE)
    return tab.evaluate(
        """async () => {
          const { violations } = await axe.run({ exclude: [[".katex"], [".highlight"]] })
          return violations.map(v => [v.id, v.nodes.map(n => n.target.join(" ")).slice(0, 3)])
        }"""
    )


def test_a_finger_sees_the_note_and_then_follows_it(phone):
    terms = phone.locator(".fp-term").all()[:8]
    for term in terms:
        note = phone.locator("#fp-says")
        term.tap()
        expect(note).to_have_text(term.get_attribute("data-says"))
        box = note.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        if term != terms[-1]:
            note.tap()  # goes away: it lies on the next lines
            expect(note).not_to_be_attached()
    assert phone.evaluate("document.documentElement.scrollWidth") == 390
    assert violations(phone) == []
    phone.locator("h1").first.tap()
    expect(note).not_to_be_attached()
    term.tap()
    expect(note).to_be_attached()
    term.tap()
    expect(phone).to_have_url(re.compile(r"glossary\.html#term-"))
    target = phone.locator(f"#{phone.url.partition('#')[2]}")
    expect(target).to_be_in_viewport()
    assert violations(phone) == []


def test_keyboard_and_pointer_see_the_note(browser, address):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    tab, troubles = watched(context, address)
    tab.goto(address + LESSON)
    terms, note = tab.locator(".fp-term"), tab.locator("#fp-says")
    while not tab.evaluate("document.activeElement.matches('.fp-term')"):
        tab.keyboard.press("Tab")
    expect(note).to_have_text(terms.nth(0).get_attribute("data-says"))
    expect(terms.nth(0)).to_have_accessible_description(note.inner_text())
    tab.keyboard.press("Tab")
    expect(note).to_have_text(terms.nth(1).get_attribute("data-says"))
    tab.keyboard.press("Escape")
    expect(note).not_to_be_attached()

    terms.nth(2).hover()
    expect(note).to_have_text(terms.nth(2).get_attribute("data-says"))
    note.hover()  # stays, so that it can be read with a magnifier
    tab.wait_for_timeout(400)
    expect(note).to_be_attached()
    tab.mouse.move(5, 5)
    expect(note).not_to_be_attached()
    terms.nth(2).click()
    expect(tab).to_have_url(re.compile(r"glossary\.html#term-"))
    context.close()
    assert not troubles, "\n".join(troubles)


def test_the_dots_are_there_without_the_script(browser, address):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address + LESSON)
    term = tab.locator(".fp-term").first
    term.click()
    expect(tab).to_have_url(re.compile(r"glossary\.html#term-"))
    context.close()
