"""A page as a notebook to download: it runs in an empty folder, without this project.

Its first code cell installs the packages that the page's run imported, in their versions, and
writes the project's files that it used. Modules are written each for itself, with their shapes
as comments: as one file each they would define a shared block twice, as two different classes.
"""

import contextlib
import html
import importlib.metadata
import json
import posixpath
import re
from functools import cache, lru_cache
from pathlib import Path

from .pages import FENCE, Cell, Page
from .render import SHOW, fence, proofs_table
from .source import plain

SMALL = 200_000  # bytes; larger files are named in the notebook, not written by it
NOT_OURS = {"ipython", "ipykernel", "nbformat"}  # whoever runs the notebook brings them
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?$")
BOX = re.compile(r'(?P<kind>!!!|\?\?\?\+?|===!?\+?) *(?P<type>[\w -]*?) *("(?P<title>.*)")? *$')
CODE = r"^[> ]*(?P<ticks>`{3,}|~{3,})[\s\S]*?^[> ]*(?P=ticks)|(?P<tick>`+).*?(?P=tick)"
MATHS = r"\$\$[\s\S]+?\$\$|\$[^$\n]+\$"
REMOVED = (  # divisions, comments, attribute lists, definitions of abbreviations
    r"^</?div[^>]*>[ \t]*$|<!--[\s\S]*?-->|"
    r"(?:(?<=[)\]`*])|(?<=\s)|^)\{:? *[.#][A-Za-z][^{}\n]*\}[ \t]*$|^\*\[.+\]:.*\n?"
)
LINK = r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)[^)]*\)(?P<attributes>\{[^{}\n]*\})?"
MARKUP = re.compile(rf"(?P<kept>{CODE}|{MATHS})|(?P<removed>{REMOVED})|{LINK}", re.MULTILINE)
FIRST = """\
# Run this cell first: it installs what the page was made with, and writes the files it uses.
def prepare(packages, files, large, makers):
    import importlib.metadata
    from pathlib import Path

    def installed(name):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            return None

    missing = [f"{name}=={pin}" for name, pin in packages.items() if installed(name) != pin]
    if missing:
        print("installing", *missing)
        get_ipython().run_line_magic("pip", "install -q " + " ".join(missing))
    for name, text in files.items():
        path = Path(name)
        if path.exists() and path.read_text("utf-8") != text:
            print("your own file stays as it is:", name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    importlib.invalidate_caches()
    for maker in makers:
        importlib.import_module(maker).prepare(Path.cwd())  # quick where all is there
    for name, size in large.items():
        if not Path(name).exists():
            print(f"missing: {name} ({size}), which a cell reads: copy it to this place from")
            print("a checkout of %s, whose README says how to make it")


"""


def notebook_links(page: Page, entry: dict | None, site) -> list[str]:
    """Links to the page's notebook, which is added to the site's files.

    None for a page that has not run, or not to its end.
    """
    if not entry or entry["error"]:
        return []
    name = f"carry/{page.stem}.ipynb"
    site.files[name] = make_notebook(page, entry, site).encode()
    up = "../" * page.source.count("/")
    links = [f'[Notebook]({up}{name}){{ download="{Path(name).name}" }}']
    github, branch = GITHUB.match(site.origin.repo_url), site.origin.notebook_branch
    if github and branch:
        colab = "https://colab.research.google.com/github"
        links.append(f"[Open in Colab]({colab}/{github[1]}/blob/{branch}/{name})")
    return links


def make_notebook(page: Page, entry: dict, site) -> str:
    cells = [("markdown", about(page, site)), ("code", first_cell(page, entry, site))]
    cells += Prose(page, site).cells()
    listed = []
    for number, (kind, text, *hidden) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
            folded = number == 1 or any(hidden)
            cell["metadata"] = {"jupyter": {"source_hidden": True}} if folded else {}
        listed.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": listed, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def about(page: Page, site) -> str:
    """What this is, from where, under which licence."""
    heading = re.search(r"^# +(.+?) *(\{.*\})?$", "\n".join(map(str, page.parts)), re.MULTILINE)
    title = page.meta.get("title") or (heading[1] if heading else page.stem)
    address = site.origin.page_address(page.stem)
    of = f", {site.origin.described}," if site.origin.commit else ""
    lines = [f"**{title}**, the page [{address}]({address}){of}, as a notebook."]
    if not site.origin.site_url:
        lines = [f"**{title}**, the page {page.stem}{of}, as a notebook."]
    lines.append("Run the next cell first. The outputs are on the page.")
    if site.origin.licence:
        name, *text = site.origin.licence.splitlines()
        lines += ["", *[f"{line}. {name}." for line in text if line.startswith("Copyright")]]
        body = html.escape("\n".join(text).strip(), quote=False)
        lines += ["", f"<details><summary>{name}</summary>", "", body, "", "</details>"]
    return "\n".join(lines)


def first_cell(page: Page, entry: dict, site) -> str:
    written, large = files_of(entry, site)
    made = any(name.startswith(f"{site.build}/") for name in large)
    makers = site.makers if made else []
    for maker in makers:
        written |= sources_of(maker, site)
    files = "".join(f"        {name!r}: {literal(text)},\n" for name, text in written.items())
    code = FIRST % (site.origin.repo_url or "the project")
    code += f"prepare(\n    packages={packages_of(page, entry, site, makers)!r},\n"
    code += f"    files={{\n{files}    }},\n    large={large!r},\n    makers={makers!r},\n)"
    if "torch" in entry["versions"]:
        threads = page.meta.get("threads", 1)
        code += f"\n\nimport torch\n\ntorch.set_num_threads({threads})  # as on the page"
    return code


def literal(text: str) -> str:
    """As Python source that can be read."""
    fits = text and "'''" not in text and text[-1] not in "\\'" and "\r" not in text
    return f"r'''{text}'''" if fits else repr(text)


def files_of(entry: dict, site) -> tuple[dict[str, str], dict[str, str]]:
    """The project's files that the run used: texts to be written, and sizes of large ones."""
    written, large = {}, {}
    for name, state in entry["uses"].items():
        path = site.root / name
        if not state.startswith("file:") or not path.is_file():
            continue
        size, text = path.stat().st_size, None
        if size <= SMALL and not name.startswith(f"{site.build}/"):
            with contextlib.suppress(UnicodeDecodeError):
                text = path.read_bytes().decode()
        if text is None:
            large[name] = f"{size / 1e6:.1f} MB"
        else:
            written[name] = plain(name, text) if name.endswith(".py") else text
    return written, large


def sources_of(module: str, site) -> dict[str, str]:
    """A module of the project and the packages that it is in."""
    parts = module.split(".")
    names = ["/".join(parts[:n]) + "/__init__.py" for n in range(1, len(parts))]
    names.append("/".join(parts) + ".py")
    return {n: (site.root / n).read_text("utf-8") for n in names if (site.root / n).is_file()}


@cache
def top_level() -> dict[str, list[str]]:
    return importlib.metadata.packages_distributions()


def packages_of(page: Page, entry: dict, site, makers: list[str]) -> dict[str, str]:
    """What the page's cells and modules import themselves; pip finds what that needs."""
    codes = [cell.code for cell in page.cells]
    codes += [text for name, text in files_of(entry, site)[0].items() if name.endswith(".py")]
    oracles = {o["proof"].get("oracle") for cell in entry["outputs"] for o in cell if "proof" in o}
    # Only what did run: a line of a docstring can look like an import.
    needed = (named_in_imports(codes, site) | oracles) & entry["versions"].keys()
    made = [text for maker in makers for text in sources_of(maker, site).values()]
    needed = sorted((needed | named_in_imports(made, site)) - NOT_OURS)
    versions = [entry["versions"].get(name) or importlib.metadata.version(name) for name in needed]
    return {name: version.partition("+")[0] for name, version in zip(needed, versions, strict=True)}


def named_in_imports(codes: list[str], site) -> set[str]:
    """The distributions that these import, without the project's own."""
    names = {name for code in codes for name in imported_by(code)}
    names = {name for name in names if not (site.root / name).is_dir()}
    return {distribution for name in names for distribution in top_level().get(name, [])}


@lru_cache(1024)  # a module is used by many pages
def imported_by(code: str) -> frozenset[str]:
    lines = re.findall(r"^\s*(?:from\s+(\w+)|import\s+([\w., ]+))", code, re.MULTILINE)
    names = [name.strip() for line in lines for name in "".join(line).split(",")]
    return frozenset(re.split(r"[. ]", name)[0] for name in names)


class Prose:
    """A page's parts as cells, its boxes and tabs as what any notebook shows."""

    def __init__(self, page: Page, site):
        self.page, self.site = page, site
        self.done: list[tuple] = []
        self.text: list[str] = []
        self.boxes: list[tuple[int, str, str]] = []  # column of the content, before lines, end
        self.torn = False  # within <details> that hold a cell

    def cells(self) -> list[tuple]:
        items = []  # lines and cells
        for part in self.page.parts:
            items += [part] if isinstance(part, Cell) else part.split("\n")
        fence = None
        for item in items:
            if isinstance(item, Cell):
                self.leave(len(item.indent))
                self.flush()
                folded = item.options.get("hide") in ("source", "all")
                self.done.append(("code", item.code.strip("\n"), folded or self.torn))
                if caption := item.options.get("caption"):
                    self.text += [f"*{caption}*", ""]
                continue
            if fence is None and item.strip():
                self.leave(len(item) - len(item.lstrip()))
            column = self.boxes[-1][0] if self.boxes else 0
            line = item[column:] if not item[:column].strip() else item.lstrip()
            box = None if fence else BOX.match(line)
            if box and (box["title"] is not None or box["kind"][0] in "!?"):
                self.enter(box, column)
                continue
            opening = FENCE.match(line)
            if fence and re.match(rf"\s*{fence}+\s*$", line):
                fence = None
            elif fence is None and opening:
                fence = opening["ticks"]
            self.text += [self.before() + shown for shown in self.show(line)]
        self.leave(0)
        self.flush()
        return self.done

    def enter(self, box: re.Match, column: int) -> None:
        title = box["title"] if box["title"] is not None else box["type"].split(" ")[0].capitalize()
        self.text.append(self.before())
        quotes, end = "> " if box["kind"] == "!!!" else "", ""
        if box["kind"][0] == "?":
            end = "</details>"
            title = f"<details><summary>{html.escape(title)}</summary>"
        elif title:
            title = f"**{title}**"
        self.boxes.append((column + 4, quotes, end))
        self.text += [self.before() + title, self.before()] if title else []

    def leave(self, column: int) -> None:
        while self.boxes and column < self.boxes[-1][0]:
            _, _, end = self.boxes.pop()
            self.text += [self.before() + end, self.before()] if end else [self.before()]

    def before(self) -> str:
        return "".join(quotes for _, quotes, _ in self.boxes)

    def show(self, line: str) -> list[str]:
        """`<!-- show: module -->` shows it here too; other things stay on the page."""
        if not (match := SHOW.match(line)):
            return [line]
        what, path = match["what"], self.site.root / match["what"]
        if what == "proofs":
            return proofs_table(self.page, self.site).split("\n")
        if path.suffix != ".py" or not path.is_file():
            return [f"[(On the page.)]({Path(self.page.source).name})"]
        code = plain(what, path.read_text("utf-8")).rstrip()
        return [f"`{what}`", "", *fence(code, "python", bare=True).split("\n")]

    def flush(self) -> None:
        text = MARKUP.sub(self.carry, "\n".join(self.text))
        text = "\n".join(line.rstrip() for line in text.split("\n"))
        text = re.sub(r"\A(>?\n)+|(\n>)+(?=\n\n|\s*\Z)", "", text)
        text = self.without_torn_details(text).strip()
        if text.strip("> \n"):
            self.done.append(("markdown", text))
        self.text = []

    def without_torn_details(self, text: str) -> str:
        """HTML that is opened before a cell and closed after it: a cell ends all that it holds."""
        if text.count("</details>") > text.count("<details"):
            self.torn = False
            text = text.replace("</details>", "", 1)
        if text.count("<details") > text.count("</details>"):
            self.torn = True
            start = text.rindex("<details")
            opening = r"<details[^>]*>\s*(?:<summary>(.*?)</summary>)?"
            text = text[:start] + re.sub(opening, r"**\1**\n", text[start:])
        return text

    def carry(self, match: re.Match) -> str:
        """Links are absolute where the site has an address, else their text stays."""
        to, text = match["to"], match["text"]
        if match["removed"]:
            return ""
        if to is None or re.match(r"[a-z][a-z0-9+.-]*:|//", to):
            return match[0].removesuffix(match["attributes"] or "")
        path, hash_sign, anchor = to.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.page.source), path))
        if not to.partition("#")[0]:
            path = self.page.source
        if not self.site.origin.site_url:
            return f"*{text}*" if match["image"] else text
        stem, _, suffix = path.rpartition(".")
        is_page = suffix in ("md", "ipynb")
        address = (
            self.site.origin.page_address(stem) if is_page else self.site.origin.site_url + path
        )
        return f"{match['image']}[{text}]({address}{hash_sign}{anchor})"
