"""MkDocs hook: what the search knows about a page.

Outputs are numbers and tables: they would drown the words, so they stay out. Names are found by
their parts (the separator in mkdocs.yml), and those in camel case as one lower-case word too,
as people type them: `rmsnorm` finds RMSNorm.
"""

import json
import re
from pathlib import Path

from mkdocs.plugins import event_priority

OUTPUT = re.compile(r'<(div|img|figure) class="([^"]*\b(output|figure)\b[^"]*)"')
CAMEL = re.compile(r"\b[A-Za-z0-9]+[A-Z][a-z][A-Za-z0-9]*\b")


def on_page_content(html, page, config, files):
    return OUTPUT.sub(r'<\1 data-search-exclude="" class="\2"', html)


@event_priority(-50)  # after the index is written, before `offline` copies it
def on_post_build(config):
    path = Path(config.site_dir, "search/search_index.json")
    index = json.loads(path.read_text("utf-8"))
    for section in index["docs"]:
        for field in ("title", "text"):
            section[field] = with_plain_names(section[field])
    path.write_text(json.dumps(index, separators=(",", ":")), "utf-8")


def with_plain_names(text: str) -> str:
    """Each camel-case name, at its first place, followed by itself in lower case, unseen."""
    known = set()

    def plain(match: re.Match) -> str:
        name = match[0].lower()
        if name in known:
            return match[0]
        known.add(name)
        return f"{match[0]}<i hidden> {name}</i>"

    return CAMEL.sub(plain, text)
