"""MkDocs hook: every page says in its metadata what it is, in words that fit a list of results.

Title and description are what a reader sees of a page in a search engine, in llms.txt and on the
cards of this site. Two pages with the same ones can't be told apart there.
"""

from mkdocs.plugins import get_plugin_logger

log = get_plugin_logger("descriptions")
SHORTEST, LONGEST = 50, 160  # characters; search engines cut off what is longer


def on_env(env, config, files):
    pages = [file.page for file in files.documentation_pages()]
    for problem in problems({page.file.src_uri: page.meta for page in pages}):
        log.warning(problem)
    return env


def problems(pages: dict[str, dict]) -> list[str]:
    """What is wrong with the metadata of pages, each with its page's name."""
    found = []
    seen: dict[tuple[str, str], str] = {}
    for name, meta in pages.items():
        for key in ("title", "description"):
            text = str(meta.get(key) or "")
            first = seen.setdefault((key, text), name)
            if not text:
                found.append(f"{name}: its metadata has no {key}")
            elif first != name:
                found.append(f"{name}: its {key} is that of {first}: {text!r}")
            if any(mark in text for mark in '"<>'):  # it stands in an attribute
                found.append(f"{name}: its {key} has a quotation mark or a tag in it: {text!r}")
        length = len(str(meta.get("description") or ""))
        if length and not SHORTEST <= length <= LONGEST:
            found.append(
                f"{name}: its description has {length} characters, not {SHORTEST} to {LONGEST}"
            )
    return found
