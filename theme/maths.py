"""MkDocs hook: the formulas that arithmatex marked become KaTeX's HTML.

It works on finished pages, after the search index took the TeX.
"""

import html
import re

from mkdocs.plugins import get_plugin_logger

from theme.katex import TeXError, render

log = get_plugin_logger("maths")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>',
    re.DOTALL,
)


def on_post_page(output: str, page, config) -> str:
    def formula(match: re.Match) -> str:
        tex, display = html.unescape(match["tex"]).strip(), match["open"] == "["
        try:
            maths = render(tex, display)
        except TeXError as error:
            log.warning(f"{page.file.src_uri}: the formula {tex!r}: {error}")
            return match[0]
        return f'<{match["tag"]} class="arithmatex">{maths}</{match["tag"]}>'

    return FORMULA.sub(formula, output)
