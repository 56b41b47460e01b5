"""MkDocs hook: the buttons that copy: a block of code, a one-file module, a page's Markdown.

They stand in the page from the start, so that no text moves and nothing is laid out again when
the scripts come; where no script runs, they aren't shown. A block is copied by the theme's script,
a file by assets/carry.js.
"""

import itertools
import re

LABELS = {
    "one-file": ("copy-file", "Copy one file"),
    "twin": ("copy-page", "Copy page as Markdown"),
}
LINK = re.compile(r'<a (?=[^>]*\bclass="(?P<kind>one-file|twin)")[^>]*>[^<]*</a>')
BLOCK = re.compile(
    r'(?P<box><div [^>]*class="(?P<classes>[^"]*)"[^>]*>\s*)?'
    r"(?P<start><pre>(?:<span></span>)?)<code>"
)
# Results are no code, and of the API's signatures one types the name.
NOT_COPIED = {"no-copy", "doc-signature"}


def on_post_page(output: str, page, config) -> str:
    numbers = itertools.count()
    return BLOCK.sub(lambda block: copied(block, next(numbers)), LINK.sub(with_button, output))


def with_button(link: re.Match) -> str:
    name, label = LABELS[link["kind"]]
    button = f'<button type="button" class="{name}">{label}</button>'
    return f'{link[0]} {button} <span role="status"></span>'


def copied(block: re.Match, number: int) -> str:
    if NOT_COPIED & set((block["classes"] or "").split()):
        return block[0]
    name = f"__copy_{number}"
    button = (
        '<button type="button" class="md-code__button" title="Copy to clipboard"'
        f' data-clipboard-target="#{name}" data-md-type="copy"></button>'
    )
    shown = f'<div class="md-code__nav">{button}</div>'
    return f'{block["box"] or ""}{block["start"]}{shown}<code id="{name}">'
