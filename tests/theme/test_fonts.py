"""Fonts: asked for before they are needed, never swapped in, with all signs that pages use."""

import html
import json
import re
from pathlib import Path

from theme import fonts

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "site_src/assets"
STYLE = '<link rel="stylesheet" href="../assets/type.css">'


def test_a_page_asks_at_once_for_the_fonts_that_it_shows():
    def asked(body: str) -> list[str]:
        page = fonts.on_post_page(f"{STYLE}<body>{body}", None, None)
        (links,) = re.findall(r"<script>.* of (\[.*\])\)\n", page)
        assert 'rel: "preload"' in page and "file:" in page
        return [link.rpartition("/")[2].removesuffix(".woff2") for link in json.loads(links)]

    words, code = "inter-latin-wght-normal", "jetbrains-mono-latin-wght-normal"
    assert asked("") == [words]
    assert asked("<code>x</code>") == [words, code]
    formula = '<span class="katex"><span class="mord mathnormal">x</span></span>'
    assert asked(formula) == [words, "KaTeX_Main-Regular", "KaTeX_Math-Italic"]
    assert all((ASSETS / font).is_file() for font in fonts.FIRST)


def test_no_word_changes_its_face_under_the_eyes():
    rules = re.findall(r"@font-face {.*?}", (ASSETS / "type.css").read_text(), re.DOTALL)
    assert len(rules) == 2 and all("font-display: optional" in rule for rule in rules)


def test_the_fonts_of_words_are_small():
    sizes = [
        (ASSETS / f"{path}.woff2").stat().st_size for path in fonts.FONTS if "katex" not in path
    ]
    assert len(sizes) == 2 and sum(sizes) < 40_000


def test_the_font_of_sets_has_the_signs_that_formulas_use(site):
    sign = re.compile(r'<span class="[^"]*\b(?:mathbb|textbb|amsrm)\b[^"]*"[^>]*>([^<]*)<')
    used = {
        letter
        for path in site.rglob("*.html")
        for text in sign.findall(path.read_text("utf-8"))
        for letter in html.unescape(text)
    }
    assert "R" in used and used <= set(fonts.AMS), "add them to theme/fonts.py and run it"
