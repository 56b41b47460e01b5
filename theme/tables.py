"""MkDocs hook: tables that a screen reader and a phone can do something with.

The empty corner of a table is no header, which would be announced. A table of many columns says
so: its first column stays in sight while the others scroll.
"""

import re

EMPTY = re.compile(r"<th([^>]*)>\s*</th>")
TABLE = re.compile(r"<table>(?P<head>\s*<thead>.*?</thead>)", re.DOTALL)
MANY = 6  # columns


def on_page_content(html, page, config, files):
    return TABLE.sub(with_its_width, EMPTY.sub(r"<td\1></td>", html))


def with_its_width(match: re.Match) -> str:
    columns = len(re.findall(r"<t[hd]\b", match["head"]))
    return f"<table data-wide>{match['head']}" if columns >= MANY else match[0]
