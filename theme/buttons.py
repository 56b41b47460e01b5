"""MkDocs hook: a button beside each link to a one-file module and to a page's Markdown.

assets/carry.js has it copy that file. The button stands in the page from the start, so that no
text moves when the script comes; where no script runs, it isn't shown.
"""

import re

LABELS = {
    "one-file": ("copy-file", "Copy one file"),
    "twin": ("copy-page", "Copy page as Markdown"),
}
LINK = re.compile(r'<a (?=[^>]*\bclass="(?P<kind>one-file|twin)")[^>]*>[^<]*</a>')


def on_post_page(output: str, page, config) -> str:
    def with_button(link: re.Match) -> str:
        name, label = LABELS[link["kind"]]
        button = f'<button type="button" class="{name}">{label}</button>'
        return f'{link[0]} {button} <span role="status"></span>'

    return LINK.sub(with_button, output)
