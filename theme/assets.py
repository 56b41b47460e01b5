"""MkDocs hook: Material's own files, without addresses of other hosts and without dead weight.

Its script fetches mermaid and a polyfill from a CDN and asks GitHub about the repository; here
diagrams are drawn at build time, and nothing is asked. What it names must be there exactly as
often as expected: after an update somebody has to look.
"""

import re
from fnmatch import fnmatch

from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("assets")

SCRIPT = "assets/javascripts/bundle.*.min.js"
WORKER = "assets/javascripts/workers/search.*.min.js"
NOWHERE = "about:blank#"
# file, what stands there, how often, what shall stand there
CHANGES = [
    (SCRIPT, "https://unpkg.com/mermaid@11/dist/mermaid.min.js", 1, NOWHERE),
    (SCRIPT, "https://unpkg.com/resize-observer-polyfill", 1, NOWHERE),
    (SCRIPT, "https://api.github.com/", 2, NOWHERE),
    # Languages, of which it asks for a sitemap; a page's Markdown is an alternate too.
    (SCRIPT, '"link[rel=alternate]"', 1, '"link[rel=alternate][hreflang]"'),
    *((file, "# sourceMappingURL=", 1, " no source map: ") for file in (SCRIPT, WORKER)),
]
# Source maps, and search in languages other than English: 2.3 MB that no page loads.
UNUSED = re.compile(r"assets/(.*\.map|javascripts/lunr/.*)")


def on_files(files, config):
    for file in list(files):
        if UNUSED.fullmatch(file.src_uri) and file.src_dir != config.docs_dir:
            files.remove(file)
    change(files, CHANGES)
    return files


def change(files, changes) -> None:
    for pattern, old, count, new in changes:
        for file in matching(files, pattern):
            text = file.content_string
            if text.count(old) != count:
                log.warning(f"{file.src_uri} has {old!r} {text.count(old)} times, not {count}")
            file.content_string = text.replace(old, new)


def matching(files, pattern: str) -> list:
    found = [file for file in files if fnmatch(file.src_uri, pattern)]
    if not found:
        log.warning(f"the theme has no {pattern}")
    return found


def on_page_content(html, page, config, files):
    if 'class="mermaid"' in html:
        log.warning(f"{page.file.src_uri}: no script draws mermaid fences here; draw them before")
    return html
