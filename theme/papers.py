"""MkDocs hook: papers, cited in prose as `[^2305.13245]`, from one file of data.

What pages cite has to be what their metadata lists, and what the file knows. Each page ends with
its papers; Reference > Papers shows all of them (theme/paper_index.py).
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.utils import meta

from site_build.options import read_mkdocs_yml
from site_build.pages import FENCE
from theme import paper_index
from theme.paper_index import plain, section

log = get_plugin_logger("papers")
DATA = "papers.yml"  # among the pages, so that `mkdocs serve` watches it
ARXIV = re.compile(r"(?P<year>\d\d)(?P<month>\d\d)\.\d{4,5}|[a-z-]+/(?P<old>\d{4})\d{3}")
KEY = re.compile(r"^(?P<quote>[\"']?)(?P<key>[^\s\"'#][^:\"']*)(?P=quote):", re.MULTILINE)
CITATION = re.compile(r"\[\^(?P<key>[\w./-]+)\]")
NOT_PROSE = re.compile(r"(?P<ticks>`+).+?(?P=ticks)|<!--.*?-->", re.DOTALL)
FOOT = '\n<div class="fp-foot"'  # what the build says below the text of a page
LINKS = "\n{ .fp-links }"  # the end of the links in a page's head
REFERENCE = re.compile(r'<a class="footnote-ref" href="#fn:(?P<key>[^"]+)">(?P<number>\d+)</a>')
BACK = re.compile(
    r'<a class="footnote-backref" href="#fnref(?P<place>\d*):(?P<key>[^"]+)" title="[^"]*">'
)
PLACES = "///Footnotes Go Here///"  # Python-Markdown's mark


@dataclass(frozen=True)
class Paper:
    key: str
    name: str
    authors: str
    title: str
    year: int
    month: int | None
    url: str
    where: str

    @property
    def reference(self) -> str:
        """As Markdown: authors, title, year and the link to read it."""
        return f"{plain(self.authors)}, *{plain(self.title)}*, {self.year}, {self.link}"

    @property
    def link(self) -> str:
        return f"[{plain(self.where)}]({self.url})"

    @property
    def anchor(self) -> str:
        """Where it stands on the page of all papers."""
        return "paper-" + re.sub(r"[^\w-]", "-", self.key)


@dataclass
class Citing:
    """A page, as far as papers are concerned."""

    source: str  # its path below the pages' folder, as published
    title: str
    topic: str
    has_module: bool
    place: int  # in the order of the navigation
    listed: list[str] = field(default_factory=list)
    cited: list[str] = field(default_factory=list)  # in the order of the text
    sections: dict[str, str] = field(default_factory=dict)  # paper: what of it the page builds
    problems: list[str] = field(default_factory=list)


@dataclass
class Library:
    papers: dict[str, Paper]
    pages: dict[str, Citing]  # in the order of the navigation


library = Library({}, {})


# The data


def read(text: str) -> tuple[dict[str, Paper], list[str]]:
    """The papers, and what is wrong with the file."""
    keys = [match["key"] for match in KEY.finditer(text)]
    problems = [f"{key} stands there twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    papers = {}
    for key, entry in (yaml.safe_load(text) or {}).items():
        try:
            papers[key] = paper_of(key, entry)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    names = [paper.name for paper in papers.values()]
    problems += [f"two are called {n}" for n in dict.fromkeys(names) if names.count(n) > 1]
    return papers, problems


def paper_of(key: str, entry: dict) -> Paper:
    """Raises ValueError with what is missing, too much or no date."""
    if not isinstance(key, str):
        raise ValueError("an arXiv id is a text: put it in quotes")
    arxiv = ARXIV.fullmatch(key)
    needed = {"name", "authors", "title"} | (set() if arxiv else {"year", "where", "url"})
    found = set(entry) if isinstance(entry, dict) else set()
    if missing := needed - found:
        raise ValueError(f"has no {', '.join(sorted(missing))}")
    if more := found - needed - (set() if arxiv else {"month"}):
        raise ValueError(f"{', '.join(sorted(more))} can't stand there")
    about = dict(entry)
    if arxiv:
        digits = arxiv["old"] or arxiv["year"] + arxiv["month"]
        year, about["month"] = int(digits[:2]), int(digits[2:])
        about |= {"year": year + (1900 if year > 90 else 2000)}  # arXiv began in 1991
        about |= {"url": f"https://arxiv.org/abs/{key}", "where": f"arXiv:{key}"}
    about.setdefault("month", None)
    for name, value in about.items():
        kind = int if name in ("year", "month") else str
        if not (isinstance(value, kind) or (name == "month" and value is None)):
            raise ValueError(f"{name} can't be {value!r}")
    if about["month"] is not None and not 1 <= about["month"] <= 12:
        raise ValueError(f"there is no month {about['month']}")
    return Paper(key, **about)


# The pages


def prose(text: str) -> str:
    """What of a page can cite: no code, no comments."""
    kept, closing = [], None
    for line in text.splitlines():
        opening = FENCE.match(line)
        if closing:
            closing = None if re.match(closing, line) else closing
        elif opening:
            ticks = opening["ticks"]
            closing = rf"[ \t]*{ticks[0]}{{{len(ticks)},}}[ \t]*$"
        else:
            kept.append(line)
    return NOT_PROSE.sub(" ", "\n".join(kept))


def cited(text: str) -> list[str]:
    """The papers of a page in the order of their first citation."""
    return list(dict.fromkeys(match["key"] for match in CITATION.finditer(prose(text))))


def check(page: Citing, entries: object, papers: dict[str, Paper]) -> None:
    """Takes what the metadata lists, and notes where it isn't what the page cites."""
    for entry in entries if isinstance(entries, list) else [entries]:
        part = isinstance(entry, dict) and set(entry) == {"id", "section"}
        key = entry["id"] if part else entry
        if not isinstance(key, str) or (part and not isinstance(entry["section"], str)):
            page.problems.append(
                f"papers: {entry!r} is neither a key in quotes nor {{id: …, section: …}}"
            )
            continue
        if key in page.listed:
            page.problems.append(f"papers: {key} is listed twice")
        page.listed.append(key)
        if part:
            page.sections[key] = section(entry["section"])
    for key in dict.fromkeys([*page.listed, *page.cited]):
        if key not in papers:
            page.problems.append(f"there is no paper {key} in {DATA}")
        elif key not in page.cited:
            page.problems.append(f"papers: {key} is listed and never cited, as [^{key}]")
        elif key not in page.listed:
            page.problems.append(f"[^{key}] is cited and not listed in papers:")


def definitions(page: Citing) -> str:
    """The end of a page that cites: its papers, in the order in which it comes to them.

    Only Reference > Papers is found by titles: here they would drown what pages say.
    """
    notes = []
    for key in page.cited:
        if key in library.papers:
            part = page.sections.get(key)
            built = f". Implemented here: {plain(part)}" if part else ""
            notes.append(f"[^{key}]: {library.papers[key].reference}{built}")
    if not notes:
        return ""
    return "\n".join(["\n\n## Papers { #papers data-search-exclude }\n", PLACES, "", *notes, ""])


def inline(text: str) -> str:
    """The same without footnotes: each citation becomes a link, as in `[GQA, 2023](…)`."""

    def link(match: re.Match) -> str:
        paper = library.papers.get(match["key"])
        return f" ([{plain(paper.name)}, {paper.year}]({paper.url}))" if paper else match[0]

    return CITATION.sub(link, text)


# In a build


def on_files(files: Files, config) -> Files:
    """Notebooks to download have links: Jupyter knows no footnotes."""
    root = Path(config.config_file_path).parent
    path = read_mkdocs_yml(root / "mkdocs.yml")[0] / DATA
    papers, problems = read(path.read_text("utf-8")) if path.is_file() else ({}, [])
    library.papers, library.pages = papers, {}
    for problem in problems:
        log.warning(f"{DATA}: {problem}")
    for file in files:
        if file.src_uri.startswith("carry/") and file.src_uri.endswith(".ipynb"):
            file.content_string = carried(file.content_string)
    return files


def carried(text: str) -> str:
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            lines = inline("".join(cell["source"])).splitlines(keepends=True)
            cell["source"] = lines if isinstance(cell["source"], list) else "".join(lines)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def on_nav(nav, config, files):
    root = Path(config.config_file_path).parent
    sources = [page.file for page in nav.pages if page.file.src_uri.endswith(".md")]
    texts = {file.src_uri: file.content_string for file in sources}
    topics = {
        source.removesuffix("/index.md"): str(meta.get_data(text)[1].get("title", source))
        for source, text in texts.items()
        if source.count("/") == 1 and source.endswith("/index.md")
    }
    for place, (source, text) in enumerate(texts.items()):
        body, about = meta.get_data(text)
        stem = source.removesuffix(".md")
        topic = stem.partition("/")[0]
        module = (root / f"snippets/{stem}.py").is_file()
        title = str(about.get("title") or stem)
        page = Citing(source, title, topics.get(topic, topic), module, place, cited=cited(body))
        check(page, about.get("papers", []), library.papers)
        library.pages[source] = page
        for problem in page.problems:
            log.warning(f"{source}: {problem}")
    known = {key for page in library.pages.values() for key in page.listed}
    for key in library.papers:
        if key not in known:
            log.warning(f"{DATA}: no page cites {key}")
    return nav


def on_page_markdown(markdown: str, page, config, files) -> str:
    about = library.pages.get(page.file.src_uri)
    if about is None:
        return markdown
    if about.has_module and about.listed and about.listed[0] in library.papers:
        paper = library.papers[about.listed[0]]
        link = f" · [Paper: {plain(paper.name)}]({paper.url})"
        markdown = markdown.replace(LINKS, link + LINKS, 1)
    text, foot, rest = markdown.partition(FOOT)
    markdown = text.rstrip() + definitions(about) + "\n" + foot + rest
    return paper_index.filled(markdown, about, list(shown(library)))


def shown(everything: Library) -> Iterator[paper_index.Shown]:
    """Every paper with the pages that cite and build it."""
    for key, paper in everything.papers.items():
        pages = [page for page in everything.pages.values() if key in page.listed]
        builds = [page for page in pages if key in page.sections]
        own = [page for page in pages if page.has_module and page.listed[0] == key]
        topics = Counter(page.topic for page in builds or own or pages)
        if topics:
            yield paper_index.Shown(paper, pages, builds, topics.most_common(1)[0][0])


def on_page_content(content: str, page, config, files) -> str:
    """Links that say where they lead, to those who don't see where they stand."""
    if "footnote-ref" not in content:
        return content

    def reference(match: re.Match) -> str:
        paper = library.papers.get(html.unescape(match["key"]))
        name = f"Paper {match['number']}: {paper.name}, {paper.year}" if paper else ""
        label = f' aria-label="{html.escape(name)}"' if name else ""
        return match[0].replace(' href="', f'{label} href="', 1)

    def back(match: re.Match) -> str:
        place = f", place {match['place']}" if match["place"] else ""
        label = f"Back to the text{place}"
        href = f"#fnref{match['place']}:{match['key']}"
        return f'<a class="footnote-backref" href="{href}" aria-label="{label}">'

    content = BACK.sub(back, REFERENCE.sub(reference, content))
    return content.replace('<div class="footnote">\n<hr />', '<div class="footnote">')
