"""MkDocs hook: what the search knows about a page.

Outputs are numbers and tables: they would drown the words, so they stay out. A name is one word
to the search, so that `q_proj` does not find everything with a q. It is found by its later parts
too: behind GroupedQueryAttention stand `queryattention` and `attention`, unseen.
"""

import json
import re
from pathlib import Path

from mkdocs.plugins import event_priority

OUTPUT = re.compile(r'<(div|img) (?=class="[^"]*\b(output|figure)\b)')
NAME = re.compile(r"\b[A-Za-z]\w*(_|[A-Z][a-z])\w*")
PART = re.compile(r"(?<=_)[A-Za-z]|(?<=[^\W_])[A-Z](?=[a-z])|(?<=[a-z])[A-Z]")
SHORTEST = 3  # letters of a part


def on_page_content(html, page, config, files):
    return OUTPUT.sub(r'<\1 data-search-exclude="" ', html)


@event_priority(-50)  # after the index is written, before `offline` copies it
def on_post_build(config):
    path = Path(config.site_dir, "search/search_index.json")
    index = json.loads(path.read_text("utf-8"))
    for section in index["docs"]:
        for field in ("title", "text"):
            section[field] = with_parts(section[field])
    path.write_text(json.dumps(index, separators=(",", ":")), "utf-8")


def with_parts(text: str) -> str:
    """Each name, at its first place, followed by its later parts with all that comes after."""
    known = set()

    def parts(match: re.Match) -> str:
        name = match[0]
        tails = [name[part.start() :].lower() for part in PART.finditer(name)]
        new = [tail for tail in tails if len(tail) >= SHORTEST and tail not in known]
        known.update(new)
        return f"{name}<i hidden> {' '.join(new)}</i>" if new else name

    return NAME.sub(parts, text)
