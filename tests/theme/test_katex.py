"""Maths at build time: KaTeX's HTML, and a wrong formula fails the build by name."""

import pytest

from theme import maths
from theme.katex import TeXError, render


class Page:
    class file:
        src_uri = "topic/page.md"


def test_a_formula_becomes_html_with_mathml_beside_it():
    page = r'<p>so <span class="arithmatex">\(a &lt; \sqrt{d}\)</span>, and</p>'
    page += '<div class="arithmatex">\\[\nx^2\n\\]</div>'
    done = maths.on_post_page(page, Page, None)
    assert done.count('class="katex"') == 2 and done.count('class="katex-display"') == 1
    assert "<math" in done and "&lt;" in done and r"\(" not in done


def test_text_that_is_no_formula_stays():
    page = r"<p>\(x\) and <code>$x$</code></p>"
    assert maths.on_post_page(page, Page, None) == page


def test_a_wrong_formula_is_a_warning_with_page_and_place(caplog):
    page = r'<span class="arithmatex">\(\frac{1}\)</span>'
    assert maths.on_post_page(page, Page, None) == page
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "topic/page.md: the formula '\\\\frac{1}': " in record.getMessage()
    with pytest.raises(TeXError, match="position"):
        render(r"\nosuchcommand", False)
