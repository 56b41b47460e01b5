"""MkDocs hook: the glossary page, and a mark at the first use of each of its terms on a page.

Marked is prose only: no code, heading, link, formula, table or output. A mark is a link to the
glossary with the entry's sentence, which `glossary.js` shows; without the script it still leads.
"""

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

import yaml
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.utils import get_relative_url

from theme.api import heading

log = get_plugin_logger("glossary")

SOURCE = "glossary.yml"
PAGE = "reference/glossary.md"
PLACE = "<!-- glossary -->"
NEEDED, ALLOWED = {"term", "says", "page"}, {"also", "forms", "never"}

TOKEN = re.compile(
    r"""<!--.*?-->|<(?P<close>/?)(?P<tag>\w+)(?:[^>"']|"[^"]*"|'[^']*')*>""", re.DOTALL
)
PROSE = {"p", "li", "dd"}
SKIPPED = {"a", "button", "code", "h1", "h2", "h3", "h4", "h5", "h6", "label", "pre", "script"}
SKIPPED |= {"style", "summary", "svg", "table"}
VOID = {"br", "hr", "img", "input", "source", "wbr"}
SKIPPED_CLASS = re.compile(  # where words are names, or said in passing
    r'class="[^"]*\b(arithmatex|admonition-title|caption|cards|diagram|doc-section-title|footnote|output|road|fp-foot|fp-head|fp-names|'
    r"md-tags|module-links|page-links)\b"
)


entries, find, used = [], None, set()  # of this build


class Entry(NamedTuple):
    term: str
    also: list[str]
    forms: list[str]
    never: list[str]  # phrases in which it means something else
    says: str
    page: str  # its stem, perhaps with a section

    @property
    def anchor(self) -> str:
        return "term-" + re.sub(r"\W+", "-", self.term.lower()).strip("-")

    @property
    def stem(self) -> str:
        return self.page.partition("#")[0]

    @property
    def spellings(self) -> list[str]:
        return [self.term, *self.also, *self.forms]


class Finder:
    """Finds terms in text: the longest, as a whole word, also in the plural or capitalized."""

    def __init__(self, entries: list[Entry]):
        self.entry = {}
        for plural in ("s", ""):  # what is spelled out comes second, and holds
            for entry in entries:
                for spelling in entry.spellings:
                    for first in {spelling[0], spelling[0].upper()}:
                        self.entry[first + spelling[1:] + plural] = entry
        self.entry |= {phrase: None for entry in entries for phrase in entry.never}
        longest_first = sorted(self.entry, key=len, reverse=True)
        words = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in longest_first)
        self.pattern = re.compile(rf"(?<![\w.-])(?:{words})(?![\w(-])")

    def __call__(self, text: str):
        for match in self.pattern.finditer(text):
            if entry := self.entry[" ".join(match[0].split())]:
                yield match, entry


def read(path: Path) -> list[Entry]:
    """The entries of the file, if it is there."""
    given = yaml.safe_load(path.read_text("utf-8")) if path.exists() else []
    for entry in given:
        if not NEEDED <= set(entry) <= NEEDED | ALLOWED:
            name = entry.get("term", entry)
            raise PluginError(f"{path.name}: {name!r} has {', '.join(entry)}")
    return [Entry(**{"also": [], "forms": [], "never": []} | entry) for entry in given]


def faults(entries: list[Entry], stems) -> list[str]:
    found, taken = [], {}
    for entry in entries:
        if entry.stem not in stems:
            found.append(f"{entry.term!r}: there is no page {entry.stem}")
        for spelling in entry.spellings:
            if spelling.casefold() in taken:
                other = taken[spelling.casefold()]
                found.append(f"{entry.term!r}: {spelling!r} stands at {other!r} already")
            taken[spelling.casefold()] = entry.term
    return found


def markdown(entries: list[Entry], titles: dict[str, str]) -> str:
    """The list for the glossary's page, under a heading for each letter."""
    lines, letter = [], ""
    for entry in sorted(entries, key=lambda entry: entry.term.casefold()):
        if entry.term[0].upper() != letter:
            letter = entry.term[0].upper()
            lines.append(f"## {letter}\n")
        also = f" <small>{', '.join(entry.also)}</small>" if entry.also else ""
        address = entry.page.replace(entry.stem, f"../{entry.stem}.md", 1)
        link = f"[{titles[entry.stem]}]({address})"
        lines.append(f"{entry.term}{also} {{ #{entry.anchor} }}")
        lines.append(f":   {entry.says} Explained in {link}.\n")
    letters = [line.removeprefix("## ").strip() for line in lines if line.startswith("## ")]
    jumps = " · ".join(f"[{letter}](#{letter.lower()})" for letter in letters)
    return "\n".join([f"{jumps}\n", *lines])


def marked(html: str, find: Finder, glossary: str) -> tuple[str, set[str]]:
    """The page with the first use of each term marked, and the terms. `glossary`: its address."""
    done, seen = [], set()
    prose, skipping, depth = 0, "", 0  # `depth`: of elements named `skipping`

    def mark(text: str) -> str:
        parts, end = [], 0
        for match, entry in find(text):
            if entry.term not in seen:
                seen.add(entry.term)
                link = f'<a class="fp-term" href="{glossary}#{entry.anchor}"'
                parts += [text[end : match.start()], f'{link} data-says="{escape(entry.says)}">']
                parts.append(f"{match[0]}</a>")
                end = match.end()
        return "".join([*parts, text[end:]])

    at = 0
    for token in TOKEN.finditer(html):
        text = html[at : token.start()]
        done += [mark(text) if prose and not skipping else text, token[0]]
        at, tag, step = token.end(), token["tag"], -1 if token["close"] else 1
        if tag is None or tag in VOID:
            continue
        if not skipping and (tag in SKIPPED or SKIPPED_CLASS.search(token[0])):
            skipping = tag
        if tag == skipping:
            depth += step
            skipping = skipping if depth else ""
        elif tag in PROSE:
            prose += step
    return "".join([*done, html[at:]]), seen


def on_files(files, config):
    global entries, find, used
    file = files.get_file_from_path(SOURCE)
    entries, used = [], set()
    if file:
        files.remove(file)
        entries = read(Path(file.abs_src_path))
        pages = {page.src_uri.rpartition(".")[0]: page for page in files.documentation_pages()}
        for fault in faults(entries, pages):
            log.warning(f"{SOURCE}: {fault}")
        entries = [entry for entry in entries if entry.stem in pages]
        page = files.get_file_from_path(PAGE)
        titles = {stem: heading(page) for stem, page in pages.items()}
        page.content_string = page.content_string.replace(PLACE, markdown(entries, titles))
    find = Finder(entries)
    return files


def on_page_content(html, page, config, files):
    if not entries or page.file.src_uri == PAGE:
        return html
    glossary = get_relative_url(files.get_file_from_path(PAGE).url, page.url)
    html, seen = marked(html, find, glossary)
    used.update(seen)
    return html


def on_post_build(config):
    for entry in entries:
        if entry.term not in used:
            log.warning(f"{SOURCE}: {entry.term!r} is used on no page")
