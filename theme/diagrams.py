"""Mermaid diagrams as inline SVG: rendered once, committed, found by the hash of their source.

`python -m theme.diagrams` (or `make diagrams`) renders what is missing, with Chromium, and
deletes what no page uses. As a MkDocs hook this file puts the SVGs into finished pages,
without browser or script; the search index has taken their descriptions by then.
"""

import hashlib
import html
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mkdocs.plugins import event_priority, get_plugin_logger

from site_build.options import read_mkdocs_yml
from site_build.pages import FENCE

log = get_plugin_logger("diagrams")
HERE = Path(__file__).parent
FOLDER = "assets/diagrams"  # below the pages, so that `mkdocs serve` watches it
COMMAND = "make diagrams"
SHRINK = 0.6  # below this part of its natural width a diagram scrolls instead
NARROWEST = 288  # the room that a page has on a phone of 320 pixels
# What a node is, and what its colour says below the diagram.
KINDS = {
    "tokens": "input",
    "hidden": "activations",
    "weights": "weights",
    "cache": "kept: cache, files",
    "logits": "output: logits, loss",
    "op": "function without weights",
}
CLASS = re.compile(r":::([\w-]+)")
# Tensors are round, layers and functions square, sums and products of two a circle.
OTHER_SHAPES = re.compile(r"\w(\{\{|\(\[|\[\(|\[/|\{)")
MARK = re.compile(r'<p class="diagram" data-name="(?P<name>\w+)">(?P<text>.*?)</p>', re.DOTALL)


@dataclass(frozen=True)
class Diagram:
    place: str  # page and line
    source: str

    @property
    def name(self) -> str:
        return name_of(self.source)

    @property
    def title(self) -> str:
        return accessible(self.source, "accTitle")

    @property
    def description(self) -> str:
        return accessible(self.source, "accDescr")

    @property
    def problem(self) -> str | None:
        missing = [key for key in ("accTitle", "accDescr") if not accessible(self.source, key)]
        if missing:
            return f"a diagram without {' and '.join(missing)}: they say what it shows"
        if unknown := [kind for kind in CLASS.findall(self.source) if kind not in KINDS]:
            return f"a diagram with the kind {unknown[0]}; there are {', '.join(KINDS)}"
        if self.source.startswith("flowchart") and (
            found := OTHER_SHAPES.search(drawn(self.source))
        ):
            return f"a diagram with a node {found[1]}; there are ( ), [ ] and (( ))"
        return None

    @property
    def kinds(self) -> list[str]:
        """Those it has, in the legend's order."""
        found = CLASS.findall(self.source)
        return [kind for kind in KINDS if kind in found]


@cache
def renderer() -> str:
    """What the look of all diagrams depends on besides their source."""
    return "".join(path.read_text("utf-8") for path in sorted(HERE.glob("mermaid.*")))


def name_of(source: str) -> str:
    return hashlib.sha256((renderer() + plain(source)).encode()).hexdigest()[:12]


def plain(source: str) -> str:
    return textwrap.dedent(source.expandtabs(4)).strip()


def accessible(source: str, key: str) -> str:
    """The text of `accTitle: ...`, or of `accDescr { ... }` over several lines."""
    match = re.search(rf"^\s*{key}\s*(?::(.*)|\{{([^}}]*)\}})", source, re.MULTILINE)
    return " ".join((match[1] or match[2] or "").split()) if match else ""


def drawn(source: str) -> str:
    """The source without its description and without quoted words, which may hold any sign."""
    bare = re.sub(r"^\s*acc(Title|Descr)\s*(:.*|\{[^}]*\})", "", source, flags=re.MULTILINE)
    return re.sub(r'"[^"]*"|\|[^|]*\|', "", bare)


def diagrams(folder: Path) -> Iterator[Diagram]:
    """All diagrams of the pages, in Markdown files and in notebooks' Markdown cells."""
    for path in sorted([*folder.rglob("*.md"), *folder.rglob("*.ipynb")]):
        page = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in page.split("/")):
            yield from diagrams_of(path, page)


def diagrams_of(path: Path, page: str) -> Iterator[Diagram]:
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        yield from (Diagram(f"{page}:{line}", source) for line, source in fences(text))
        return
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        if cell["cell_type"] == "markdown":
            for line, source in fences("".join(cell["source"])):
                yield Diagram(f"{page}: cell {number}, line {line}", source)


def fences(text: str) -> Iterator[tuple[int, str]]:
    """Line and source of each mermaid fence that isn't inside another fence."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening:
            ticks, start = opening["ticks"], at
            closing = re.compile(rf"^[ \t]*{ticks[0]}{{{len(ticks)},}}[ \t]*$")
            at = next((i for i in range(at + 1, len(lines)) if closing.match(lines[i])), at)
            if at > start and opening["info"].strip() == "mermaid":
                yield start + 1, "\n".join(lines[start + 1 : at])
        at += 1


# In a build


def fence(source, language, css_class, options, md, **kwargs) -> str:
    """For superfences: the diagram's words, to be replaced by its picture."""
    words = ". ".join(accessible(source, key) for key in ("accTitle", "accDescr"))
    return f'<p class="diagram" data-name="{name_of(source)}">{html.escape(words)}</p>'


class Pages:
    folder: Path  # of the sources


@event_priority(100)  # before the engine puts the folder of what it made there
def on_config(config):
    Pages.folder = Path(config.docs_dir)


def on_post_page(output: str, page, config) -> str:
    if not MARK.search(output):
        return output
    folder = Pages.folder
    stem = page.file.src_uri.rpartition(".")[0]
    paths = [path for path in folder.glob(f"{stem}.*") if path.suffix in (".md", ".ipynb")]
    found = {
        diagram.name: diagram
        for path in paths
        for diagram in diagrams_of(path, path.relative_to(folder).as_posix())
    }
    numbers = iter(range(1, sys.maxsize))

    def picture(match: re.Match) -> str:
        diagram = found.get(match["name"])
        place = diagram.place if diagram else page.file.src_uri
        if diagram and diagram.problem:
            log.warning(f"{place}: {diagram.problem}")
        path = folder / FOLDER / f"{match['name']}.svg"
        if not path.is_file():
            log.warning(f"{place}: this diagram is not rendered; run `{COMMAND}` and commit it")
            return f'<p class="diagram">{match["text"]}</p>'
        svg = inline(path.read_text("utf-8").strip(), match["name"], next(numbers))
        return svg + legend(diagram.kinds if diagram else [])

    return MARK.sub(picture, output)


def inline(svg: str, name: str, number: int) -> str:
    """The SVG in its wrapper, with ids that no other diagram of the page has."""
    opening = svg.partition(">")[0]
    least = round(SHRINK * float(re.search(r' width="([\d.]+)"', opening)[1]))
    title = re.search(r' aria-label="([^"]*)"', opening)[1]
    svg = svg.replace("<svg ", f'<svg style="min-width:{least}px" ', 1)
    svg = svg.replace(f"m{name}", f"diagram-{number}")
    scrolls = f' tabindex="0" role="group" aria-label="{title}"' if least > NARROWEST else ""
    return f'<div class="diagram"{scrolls}>{svg}</div>'


def legend(kinds: list[str]) -> str:
    """What the colours of a diagram mean; what is heard instead says so in words."""
    if not kinds:
        return ""
    items = "".join(f'<span class="{kind}">{KINDS[kind]}</span>' for kind in kinds)
    return f'<p class="diagram-legend" aria-hidden="true">{items}</p>'


# On the author's machine


def main() -> None:
    folder, *_ = read_mkdocs_yml(Path("mkdocs.yml").resolve())
    kept = folder / FOLDER
    wanted = {diagram.name: diagram for diagram in diagrams(folder)}
    refused = [f"{d.place}: {d.problem}" for d in wanted.values() if d.problem]
    described = [d for d in wanted.values() if not d.problem]
    missing = [d for d in described if not (kept / f"{d.name}.svg").is_file()]
    if missing:
        from theme.mermaid import RenderFailed, browser

        kept.mkdir(parents=True, exist_ok=True)
        with browser(folder, Path("build")) as render:
            for diagram in missing:
                try:
                    svg = render(
                        f"m{diagram.name}",
                        plain(diagram.source),
                        diagram.title,
                        diagram.description,
                    )
                except RenderFailed as error:
                    refused.append(f"{diagram.place}: {error}")
                    continue
                (kept / f"{diagram.name}.svg").write_text(svg + "\n", "utf-8")
                print(f"{diagram.place}: rendered, {len(svg):,} bytes")
    for path in kept.glob("*.svg"):
        if path.stem not in wanted:
            path.unlink()
            print(f"{path.name}: no page uses it; deleted")
    if refused:
        sys.exit("\n".join(refused))


if __name__ == "__main__":
    main()
