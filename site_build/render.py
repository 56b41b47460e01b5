"""Turns a page's parts and the outputs of its cells into Markdown and image files."""

import base64
import hashlib
import html
import json
import posixpath
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from . import facts
from .flatten import carried
from .pages import Cell, Page, fence_info
from .source import FlattenError

SHOW = re.compile(r"^(?P<indent>[ \t]*)<!-- show: *(?P<what>.*?) *-->[ \t]*$", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)\.(ipynb|md)(?=[)#\s])")


class RenderError(ValueError):
    """A page that can't be shown as it is: a figure without alt text, say."""

    def __init__(self, cell: int, message: str):
        super().__init__(message)
        self.cell = cell


@dataclass
class Site:
    """What a page may show besides its own cells."""

    root: Path
    pages: list[Page]  # in the order of the navigation
    suffixes: dict[str, str]  # page without suffix: the one it is published with
    proofs: list[dict]
    studies: list[dict]  # models that pages counted
    problems: list[str]  # shown at the head of their pages
    origin: facts.Origin
    build: str = "build"  # the folder of what is made, and the modules that make it
    makers: list[str] = field(default_factory=list)
    packages: dict[str, dict[str, str]] = field(default_factory=dict)  # page: what it is made with
    links: dict[str, list[str]] = field(default_factory=dict)  # page: what can be carried away
    files: dict[str, bytes] = field(default_factory=dict)  # to be written beside the pages


def render(page: Page, entry: dict | None, site: Site) -> str:
    """The page's Markdown. `entry` is its run; None while it has not run."""
    outputs, error = (entry["outputs"], entry["error"]) if entry else ([], None)
    text = [page.front_matter]
    if page.cells and entry is None:
        text.append(box('info "Not executed yet"', "Outputs appear here when the cells ran."))
    for problem in site.problems:
        if problem.startswith(f"{page.source}:"):
            message = problem.removeprefix(f"{page.source}:").strip()
            text.append(box('failure "This page would fail the build"', message))
    for part in page.parts:
        if isinstance(part, str):
            text.append(render_prose(part, page, site))
            continue
        shown = outputs[part.number - 1] if part.number <= len(outputs) else []
        blocks = render_cell(part, shown, page, site)
        if error and error["cell"] == part.number:
            trace = fence(error.get("traceback") or error["message"], "pytb")
            blocks.append(box('failure "This cell failed"', trace))
        text.append("\n\n" + indent("\n\n".join(blocks), part.indent) + "\n\n")
    text = "".join(text)
    if page.cells:
        text = re.sub(r"\n{3,}", "\n\n", text)
    headed = "minutes" in page.meta
    above = ""
    if headed:
        above = facts.head(page, entry, site.proofs, needed(page, site), parts(page, site))
    links = [] if headed else site.links.get(page.source, [])
    packages = site.packages.get(page.source)
    below = facts.foot(page, packages, site.origin, links) if packages is not None else ""
    return facts.with_head_and_foot(text, above, below) if above or below else text


def box(kind: str, text: str) -> str:
    return f"\n!!! {kind}\n\n{indent(text, '    ')}\n\n"


def render_cell(cell: Cell, outputs: list[dict], page: Page, site: Site) -> list[str]:
    hide = cell.options.get("hide", "")
    blocks = []
    if hide not in ("source", "all"):
        blocks.append(fence(cell.code, fence_info("python", cell.options), bare=True))
    figures = [output for output in outputs if output["kind"] in ("png", "svg")]
    if hide in ("output", "all"):
        return blocks
    if figures and "alt" not in cell.options:
        raise RenderError(cell.number, 'a figure without alt text: add alt="…"')
    if len(figures) > 1:
        raise RenderError(cell.number, f"{len(figures)} figures, one alt text: split the cell")
    for output in outputs:
        blocks += render_output(output, cell, page, site)
    return blocks


def render_output(output: dict, cell: Cell, page: Page, site: Site) -> list[str]:
    kind, data = output["kind"], output["data"]
    if (kind == "stderr" and "stderr" not in cell.options) or not data.strip():
        return []
    if kind in ("png", "svg"):
        return render_figure(output, cell, page, site)
    if kind == "markdown":
        return [data.strip()]
    if kind == "html":
        data = re.sub(r"<style.*?</style>", "", data, flags=re.DOTALL)
        data = re.sub(r"\n\s*", "", data)  # one line: Markdown must not look inside
        return [
            f'<div class="output table" tabindex="0" role="region" aria-label="Table">{data}</div>'
        ]
    return [fence(data.rstrip(), "proof" if kind == "proof" else "text")]


def render_figure(output: dict, cell: Cell, page: Page, site: Site) -> list[str]:
    kind = output["kind"]
    raw = base64.b64decode(output["data"]) if kind == "png" else output["data"].encode()
    name = f"{Path(page.stem).name}-{cell.number}-{hashlib.sha256(raw).hexdigest()[:10]}.{kind}"
    site.files[str(Path(page.source).with_name(name))] = raw
    width, height = (output.get(side) for side in ("width", "height"))
    if not width:
        width, height = png_size(raw) if kind == "png" else svg_size(output["data"])
    alt = re.sub(r'[\[\]"]', "", cell.options["alt"])
    size = f'width="{width}" height="{height}"'
    if boxes := output.get("images"):  # for a theme that changes the colours around them
        size += f' data-images="{json.dumps(boxes)}"'
    image = f"![{alt}]({name}){{ .output .figure {size} loading=lazy }}"
    caption = cell.options.get("caption")
    return [image, f"{caption}\n{{ .caption }}"] if caption else [image]


def png_size(raw: bytes) -> tuple[int, int]:
    """In CSS pixels: a file that states its dots an inch is shown at 100 of them."""
    width, height = struct.unpack(">II", raw[16:24])
    stated = raw.find(b"pHYs", 0, raw.find(b"IDAT"))
    dots_a_metre = struct.unpack(">I", raw[stated + 4 : stated + 8])[0] if stated > 0 else 0
    scale = max(1, dots_a_metre * 0.0254 / 100)
    return round(width / scale), round(height / scale)


def svg_size(text: str) -> tuple[str, str]:
    opening = text[text.index("<svg") :].partition(">")[0]
    sides = (re.search(rf'\b{side}="([\d.]+)', opening) for side in ("width", "height"))
    return tuple(side[1] if side else "auto" for side in sides)


def fence(text: str, kind: str, bare: bool = False) -> str:
    """A fenced block with more ticks than any run of them in it; an output's unless `bare`."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    if not bare:
        extra = " .proof" if kind == "proof" else ""
        kind = f" {{ .{'text' if extra else kind} .output{extra} .no-copy }}"
    return f"{ticks}{kind}\n{text}\n{ticks}"


def indent(text: str, by: str) -> str:
    return "\n".join(by + line if line.strip() else "" for line in text.split("\n"))


def render_prose(text: str, page: Page, site: Site) -> str:
    def link(match: re.Match) -> str:
        """Links name sources; a notebook may be published as Markdown."""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page.source), match[2]))
        published = site.suffixes.get(target, match[3])
        return f"{match[1]}{match[2]}.{published}"

    def show(match: re.Match) -> str:
        return indent(render_show(match["what"], page, site), match["indent"])

    return SHOW.sub(show, LINK.sub(link, text))


def render_show(what: str, page: Page, site: Site) -> str:
    """A module by its path, or `proofs`, `cards`, `topics`, `studies TOPIC`."""
    word, _, topic = what.partition(" ")
    if word == "proofs":
        return proofs_table(page, site)
    if word == "cards":  # of the pages beside this one
        here = page.source.rpartition("/")[0]
        beside = [p for p in site.pages if p.source.rpartition("/")[0] == here and p is not page]
        return facts.cards(page, beside, site.suffixes)
    if word == "topics":
        return facts.topics(page, site.pages, site.suffixes)
    if word == "studies":
        return facts.studies(page, topic, site)
    path = site.root / what
    if not path.is_file() or path.suffix != ".py":
        raise RenderError(0, f"show: there is no module {what}")
    links = module_links(page, what, site, button=".one-file ")
    code = path.read_text("utf-8").rstrip()
    return (
        fence(code, f'python title="{what}"', bare=True)
        + f"\n\n{' · '.join(links)}\n{{ .module-links }}"
    )


def needed(page: Page, site: Site) -> list[str]:
    """Links to the pages that should be read before."""
    titles = {other.stem: facts.title(other) for other in site.pages}
    stems = page.meta.get("prerequisites", [])
    if unknown := [stem for stem in stems if stem not in titles]:
        raise RenderError(0, f"prerequisites: there is no page {', '.join(unknown)}")
    return [f"[{titles[stem]}]({facts.to(page, stem, site.suffixes)})" for stem in stems]


def parts(page: Page, site: Site) -> list[str]:
    """Links to what belongs to a page: its module, test, one file, notebook."""
    module = f"snippets/{page.stem}.py"
    links = module_links(page, module, site) if (site.root / module).is_file() else []
    return links + site.links.get(page.source, [])


def module_links(page: Page, module: str, site: Site, button: str = "") -> list[str]:
    up = "../" * page.source.count("/")
    links = []
    for label, path in (("Module", module), ("Test", test_of(module))):
        if (site.root / path).is_file():
            site.files[path] = (site.root / path).read_bytes()
            links.append(f"[{label}]({up}{path})")
    if module.startswith("snippets/"):
        name = module.rpartition("/")[2]
        links.append(f"[One file]({up}{one_file(module, site)}){{ {button}download={name} }}")
    return links


def one_file(module: str, site: Site) -> str:
    """Adds the flattened module to the site's files, and a script that brings its text to a
    page's copy button, which can't fetch where there is no server."""
    name = "carry/" + module.removeprefix("snippets/")
    if name in site.files:  # several pages show it, or one of them twice
        return name
    try:
        text = carried(site, module)
    except FlattenError as error:
        raise RenderError(0, f"one file of {module}: {error}") from None
    site.files[name] = text.encode()
    site.files[name.removesuffix(".py") + ".js"] = carrier(text).encode()
    return name


def carrier(text: str) -> str:
    """A script that brings a text to the page that loads it."""
    return f"document.currentScript.carried = {json.dumps(text)};\n"


def test_of(module: str) -> str:
    folder, _, name = module.removeprefix("snippets/").rpartition("/")
    return "/".join(filter(None, ["tests", folder, f"test_{name}"]))


def proofs_table(page: Page, site: Site) -> str:
    """The numbers stand first: a phone shows them without scrolling."""
    up = "../" * page.source.count("/")
    titles = {other.source: facts.title(other) for other in site.pages}
    rows = ["| Page | Difference | Tolerance | Effect | Oracle | Configuration | Module |"]
    rows.append("|---|--:|--:|--:|---|---|---|")
    for proof in site.proofs:
        stem = proof["page"].rpartition(".")[0]
        config = ", ".join(f"{key}={value}" for key, value in proof["config"].items())
        cells = [
            f"[{titles[proof['page']]}]({up}{stem}.{site.suffixes[stem]})",
            *(f"{proof[key]:.2g}" for key in ("difference", "tolerance", "effect")),
            f"{proof['oracle']} {proof['version']}",
            html.escape(config).replace("|", "\\|"),
            f"`{proof['module']}`" if proof["module"] else "–",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def executed_notebook(page: Page, entry: dict, site: Site) -> str:
    """The notebook with the outputs of this run, for mkdocs-jupyter."""
    runs = iter(entry["outputs"])
    for number, cell in enumerate(page.notebook["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            ran = source.strip() and "#| no-run" not in source
            outputs = [notebook_output(o) for o in (next(runs) if ran else [])]
            cell.setdefault("id", f"cell-{number}")
            cell |= {"execution_count": None, "outputs": outputs}
    return json.dumps(page.notebook, indent=1, ensure_ascii=False)


def notebook_output(output: dict) -> dict:
    if output["kind"] in ("stdout", "stderr"):
        return {"output_type": "stream", "name": output["kind"], "text": output["data"]}
    data = {output.get("mime", "text/plain"): output["data"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}
