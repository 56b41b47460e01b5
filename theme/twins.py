"""MkDocs hook: each page as plain Markdown beside it, and llms.txt (llmstxt.org) of all of them.

A twin has the page's name (`gqa.md` beside `gqa.html`), and its text a second time in a script
(`gqa.js`), which the copy button loads when it is wanted: a page opened from disk can't fetch.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import yaml

from site_build.options import PLUGIN
from site_build.render import carrier
from theme.api import FOLDER
from theme.plain import plain

ELSEWHERE = re.compile(r"\w[\w+.-]*:|//|#")
LINKS = re.compile(r'(<p class="fp-links">.*?)(</p>)', re.DOTALL)
FULL = "llms-full.txt"


def on_env(env, config, files):
    """All pages have their Markdown by now, their addresses too, and none is written yet."""
    pages = in_order([f.page for f in files.documentation_pages() if has_twin(f)])
    site, origin = Path(config.site_dir), config.plugins[PLUGIN].engine.origin
    lessons = []
    for page in pages:
        name = page.file.src_uri
        text = with_tags(page.markdown, name, config.plugins["material/tags"].listings)
        if "minutes" in page.meta:
            lesson = plain(text, leads(name, FULL, origin.site_url))
            lessons.append(f"---\n\nPage: {address(page)}\n\n{lesson}")
        twin = f"{front_matter(page, origin)}\n{plain(text, leads(name, name, origin.site_url))}"
        write(site / name, twin)
        write(site / script(name), carrier(twin))
    write(site / "llms.txt", contents(config, pages, origin))
    head = f"# {config.site_name}\n\n> {config.site_description}\n\n"
    write(site / FULL, head + "\n\n".join(lessons))
    return env


def has_twin(file) -> bool:
    """All but notebooks in the classic look, which come as HTML."""
    return file.src_uri.endswith(".md") and file.inclusion.is_included()


def script(name: str) -> str:
    return f"{name.removesuffix('.md')}.js"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8", newline="\n")


def in_order(pages: list) -> list:
    """As the navigation has them; what isn't in it comes last."""
    ordered, first = [], [page for page in pages if not page.previous_page]
    for page in sorted(first, key=lambda page: not page.next_page):
        while page:
            ordered.append(page)
            page = page.next_page
    known = {page.file.src_uri for page in pages}
    return [page for page in ordered if page.file.src_uri in known]


def title(page) -> str:
    return str(page.meta.get("title") or page.title)


def address(page) -> str:
    """On the web; the name of the file where that isn't known."""
    return page.canonical_url or page.file.dest_uri


def front_matter(page, origin) -> str:
    facts = {"title": title(page), "description": page.meta.get("description")}
    facts |= {"address": address(page)}
    facts |= {"commit": f"{origin.commit} of {origin.date}" if origin.commit else None}
    known = {key: value for key, value in facts.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def leads(name: str, place: str, site_url: str) -> Callable[[str], str]:
    """Where a link of the page `name` leads from the file `place`: by the site's address, else
    relative."""

    def link(target: str) -> str:
        if target.startswith("#") and place != name:
            target = posixpath.basename(name) + target
        if ELSEWHERE.match(target):
            return target
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        return (site_url + path if site_url else relative(path, place)) + mark + anchor

    return link


def with_tags(text: str, name: str, listings) -> str:
    """The text with the pages of each tag, where the tags plugin left a place for them."""
    for listing in listings:
        parts = []
        for tree in listing:
            pages = sorted((mapping.item for mapping in tree.mappings), key=title)
            lines = [f"- [{title(page)}]({relative(page.file.src_uri, name)})" for page in pages]
            parts.append("\n".join([f"## {tree.tag.name}\n", *lines]))
        place = f"###### {listing.id}/name {{ #{listing.id}/slug }}"
        text = text.replace(place, "\n\n".join(parts))
    return text


def relative(name: str, place: str) -> str:
    return posixpath.relpath(name, posixpath.dirname(place) or ".")


def contents(config, pages: list, origin) -> str:
    """llms.txt: the twins of all pages with their descriptions, in the navigation's sections."""
    parts = [f"# {config.site_name}", f"> {config.site_description}"]
    parts.append(
        "Each page is linked as plain Markdown, with the outputs of the code that ran when it was "
        f"built. [All lessons in one file]({origin.site_url}{FULL})."
    )
    sections: dict[str, list[str]] = {}
    for page in pages:
        names = [section.title for section in reversed(page.ancestors)]
        optional = page.file.src_uri.startswith(FOLDER)  # the API
        section = "Optional" if optional else ": ".join(names) or "Start"
        about = page.meta.get("description")
        link = f"- [{title(page)}]({origin.site_url}{page.file.src_uri})"
        sections.setdefault(section, []).append(f"{link}: {about}" if about else link)
    optional = sections.pop("Optional", None)  # the format has it last
    for section, links in [*sections.items(), *([("Optional", optional)] if optional else [])]:
        parts.append(f"## {section}\n\n" + "\n".join(links))
    return "\n\n".join(parts) + "\n"


def on_post_page(output, page, config):
    """A link to the twin: in the page's head, below its title, or last on the first page."""
    if not has_twin(page.file):
        return output
    name = posixpath.basename(page.file.src_uri)
    link = f'<a class="twin" href="{name}" type="text/markdown">Markdown</a>'
    if LINKS.search(output):
        return LINKS.sub(lambda m: f"{m[1]} · {link}{m[2]}", output, count=1)
    line = f'<p class="fp-links fp-page">{link}</p>'
    mark = "</article>" if page.is_homepage else "</h1>"
    before, found, after = output.partition(mark)
    return f"{before}{line}{found}{after}" if page.is_homepage else f"{before}{found}{line}{after}"
