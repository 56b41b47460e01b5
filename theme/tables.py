"""MkDocs hook: tables that a screen reader and a phone can do something with.

The empty corner of a table is no header, which would be announced. A table of many columns says
so: its first column stays in sight while the others scroll. Each stands in the boxes in which the
theme's script would put it at each load, when all the text had to be laid out again; it looks for
tables without a class. theme/styles.py lets the theme's rules hold for these. One that something
follows is not shown before that has come: with each row that a browser gets, its columns move.
"""

import re

EMPTY = re.compile(r"<th([^>]*)>\s*</th>")
TABLE = re.compile(r"<table>(?P<head>\s*<thead>.*?</thead>)", re.DOTALL)
WHOLE = re.compile(r"<table(?![^>]*\bclass=)(?P<rest>[^>]*>.*?</table>)", re.DOTALL)
FOLLOWED = re.compile(r"\s*<\w")
BOX = (
    '<div class="md-typeset__scrollwrap{}"><div class="md-typeset__table">'
    '<table class="fp-table"{}</div></div>'
)
MANY = 6  # columns


def on_page_content(html, page, config, files):
    html = TABLE.sub(with_its_width, EMPTY.sub(r"<td\1></td>", html))
    return boxed(html)


def boxed(html: str) -> str:
    return WHOLE.sub(in_its_box, html)


def in_its_box(match: re.Match) -> str:
    followed = FOLLOWED.match(match.string, match.end())
    return BOX.format(" fp-followed" if followed else "", match["rest"])


def with_its_width(match: re.Match) -> str:
    columns = len(re.findall(r"<t[hd]\b", match["head"]))
    return f"<table data-wide>{match['head']}" if columns >= MANY else match[0]
