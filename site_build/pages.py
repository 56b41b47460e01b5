"""Reads a page's source, Markdown or notebook, into prose and cells."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
QUOTED = re.compile(r"^[ \t]*>.*(`{3,}|~{3,})\s*\{?\s*\.?python")
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)
PYTHON = ("python", "py", "python3")
FLAGS = ("no-run", "stderr")
KEYED = ("hide", "alt", "caption", "title", "hl_lines")


def are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


META = {  # the metadata that the engine reads, and what is right there
    "study": lambda value: isinstance(value, bool),
    "cpu_seconds": lambda value: type(value) in (int, float) and value > 0,
    "threads": lambda value: type(value) is int and value > 0,
    "notebook": lambda value: value in ("native", "classic"),
    "minutes": lambda value: type(value) is int and value > 0,
    "year": lambda value: type(value) is int,
    "prerequisites": are_texts,
    "assumes": are_texts,
    "able": are_texts,
    "proves": are_texts,
    "key_points": are_texts,
}


class SourceError(ValueError):
    """Something is wrong in a page's source, at a line of it."""

    def __init__(self, page: str, line: int, message: str):
        super().__init__(f"{page}:{line}: {message}")
        self.page, self.line, self.message = page, line, message


@dataclass
class Cell:
    number: int
    code: str
    line: int  # of the code's first line: in the file, or in a notebook's cell
    indent: str = ""
    options: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    source: str  # the path below the pages' folder
    meta: dict
    front_matter: str
    parts: list  # str for prose and Cell, in order
    notebook: dict | None = None  # the parsed .ipynb

    @property
    def cells(self) -> list[Cell]:
        return [part for part in self.parts if isinstance(part, Cell)]

    @property
    def stem(self) -> str:
        return self.source.rpartition(".")[0]


def read_page(folder: Path, source: str) -> Page:
    """Raises SourceError with the line."""
    try:
        text = (folder / source).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(source, 1, f"not UTF-8: {error}") from None
    return read_notebook(source, text) if source.endswith(".ipynb") else read_markdown(source, text)


def read_markdown(source: str, text: str) -> Page:
    match = FRONT_MATTER.match(text)
    front = match[0] if match else ""
    page = Page(source, read_meta(source, match[1] if match else ""), front, [])
    prose: list[str] = []
    lines = text[len(front) :].splitlines()
    first = front.count("\n") + 1  # the file's number of lines[0]
    at, comment = 0, False
    while at < len(lines):
        line = lines[at]
        if "<!--" in line or comment:  # what is commented out doesn't run
            comment = "-->" not in line.rpartition("<!--")[2]
        if QUOTED.match(line):
            raise SourceError(source, first + at, "a cell can't stand in a block quote")
        opening = None if comment else FENCE.match(line)
        if not opening:
            prose.append(line)
            at += 1
            continue
        ticks = opening["ticks"]
        closing = re.compile(rf"^[ \t]*{ticks[0]}{{{len(ticks)},}}[ \t]*$")
        end = next((i for i in range(at + 1, len(lines)) if closing.match(lines[i])), None)
        if end is None:
            raise SourceError(source, first + at, "this fence is never closed")
        language, options = read_info(source, first + at, opening["info"])
        if language not in PYTHON:
            prose += lines[at : end + 1]
        elif "no-run" in options:
            del options["no-run"]
            prose += [opening["indent"] + ticks + fence_info("python", options)]
            prose += lines[at + 1 : end + 1]
        else:
            page.parts.append("\n".join(prose))
            prose = []
            indent = opening["indent"]
            code = "\n".join(
                x.removeprefix(indent) if x.startswith(indent) else x.lstrip()
                for x in lines[at + 1 : end]
            )
            page.parts.append(Cell(len(page.cells) + 1, code, first + at + 1, indent, options))
        at = end + 1
    page.parts.append("\n".join(prose))
    return page


def read_notebook(source: str, text: str) -> Page:
    try:
        notebook = json.loads(text)
        cells = notebook["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(source, 1, f"not a notebook (nbformat 4): {error!r}") from None
    page = Page(source, {}, "", [], notebook)
    for position, cell in enumerate(cells):
        body = "".join(cell.get("source", ""))
        if position == 0 and cell["cell_type"] != "code" and (match := FRONT_MATTER.match(body)):
            page.meta, page.front_matter = read_meta(source, match[1]), match[0].rstrip() + "\n"
            body = body[match.end() :]
        if cell["cell_type"] == "markdown":
            page.parts.append(body + "\n")
        if cell["cell_type"] != "code" or not body.strip():
            continue
        number, lines, options = len(page.cells) + 1, body.splitlines(), {}
        while lines and lines[0].startswith("#|"):
            name, _, value = (x.strip() for x in lines.pop(0)[2:].partition(":"))
            options[name] = value.strip("\"'")
            check_option(source, number, name, options[name])
        code = "\n".join(lines)
        if "no-run" in options:
            page.parts.append(f"```python\n{code}\n```\n")
        else:
            first = body.count("\n") - code.count("\n") + 1
            page.parts.append(Cell(number, code, first, options=options))
    return page


def read_meta(source: str, text: str) -> dict:
    try:
        meta = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise SourceError(source, 1, f"the metadata is not YAML: {error}") from None
    for key, right in META.items():
        if key in meta and not right(meta[key]):
            raise SourceError(source, 1, f"metadata: {key} can't be {meta[key]!r}")
    return meta


def read_info(source: str, line: int, info: str) -> tuple[str, dict[str, str]]:
    """A fence's language and options: `python hide=output alt="A plot" stderr`."""
    info = info.strip().removeprefix("{").removesuffix("}").strip()
    language, _, rest = info.partition(" ")
    language = language.removeprefix(".").lower()
    if language not in PYTHON:
        return language, {}
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise SourceError(source, line, f"the fence's options: {error}") from None
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.removeprefix(".")
        check_option(source, line, name, value if equals else "")
        options[name] = value
    return language, options


def check_option(source: str, line: int, name: str, value: str) -> None:
    if name not in FLAGS + KEYED:
        known = ", ".join(FLAGS + KEYED)
        raise SourceError(source, line, f"unknown cell option {name!r}; known: {known}")
    if name == "hide" and value not in ("source", "output", "all"):
        raise SourceError(source, line, f"hide is source, output or all, not {value!r}")
    if name in KEYED and not value.strip():
        raise SourceError(source, line, f"cell option {name} needs a value")


def fence_info(language: str, options: dict[str, str]) -> str:
    kept = [f'{key}="{options[key]}"' for key in ("title", "hl_lines") if key in options]
    return " ".join([language, *kept])
