"""Diagrams: committed and current, in the site's colours, alone with their ids, described."""

import json
import re
import subprocess
from pathlib import Path

import markdown
import pytest

from site_build.options import read_mkdocs_yml
from theme import diagrams
from theme.diagrams import KINDS
from theme.mermaid import NAMES, RenderFailed, browser

ROOT = Path(__file__).parents[2]
PAGES, *_ = read_mkdocs_yml(ROOT / "mkdocs.yml")
CSS = (PAGES / "assets/diagrams.css").read_text()
SOURCE = """flowchart LR
  accTitle: Two steps
  accDescr: From tokens to logits.
  a(ids):::tokens -->|b t| b(scores):::logits"""
FENCE = f"```mermaid\n{SOURCE}\n```\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one page, and what MkDocs would do with it."""
    (tmp_path / "mkdocs.yml").write_text("docs_dir: pages\n")
    (tmp_path / "pages/topic").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def build(text: str) -> str:
        (tmp_path / "pages/topic/page.md").write_text(text)

        class Page:
            class file:
                src_uri = "topic/page.md"

        class Config:
            docs_dir = str(tmp_path / "pages")

        diagrams.on_config(Config)
        return diagrams.on_post_page(to_html(text), Page, Config)

    build.kept = tmp_path / "pages" / diagrams.FOLDER
    build.kept.mkdir(parents=True)
    build.root = tmp_path
    return build


def to_html(text: str) -> str:
    fence = {"name": "mermaid", "class": "diagram", "format": diagrams.fence}
    names = ["admonition", "pymdownx.superfences"]
    settings = {"pymdownx.superfences": {"custom_fences": [fence]}}
    return markdown.markdown(text, extensions=names, extension_configs=settings)


def svg(source: str = SOURCE, width: int = 200) -> str:
    """As the renderer writes it, as far as ids and sizes go."""
    name = f"m{diagrams.name_of(source)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="50" role="img" '
        f'aria-label="Two steps" aria-describedby="{name}-about"><desc id="{name}-about">x</desc>'
        f'<marker id="{name}-end"/><path d="M0 0" marker-end="url(#{name}-end)"/></svg>'
    )


# The diagrams of the site


def test_every_diagram_is_rendered_and_current():
    wanted = {diagram.name: diagram for diagram in diagrams.diagrams(PAGES)}
    assert wanted
    assert {d.place: d.problem for d in wanted.values() if d.problem} == {}
    kept = {path.stem for path in (PAGES / diagrams.FOLDER).iterdir()}
    assert kept == set(wanted), f"run `{diagrams.COMMAND}`"


@pytest.mark.parametrize("name", sorted(p.name for p in (PAGES / diagrams.FOLDER).iterdir()))
def test_a_committed_diagram_is_small_and_follows_the_scheme(name):
    assert_clean((PAGES / diagrams.FOLDER / name).read_text())


def assert_clean(text: str) -> None:
    assert len(text) < 16_000
    assert not re.search(r"<(script|foreignObject|style|image|a)\b|\sstyle=|\son\w+=", text)
    assert not re.search(
        r"#[0-9a-fA-F]{3,8}\b(?!-)|\b(rgb|hsl)a?\(|http(?!://www.w3.org/2000)", text
    )
    used = {value for value in re.findall(r'(?:fill|stroke)="([^"]*)"', text) if value != "none"}
    assert used <= {f"var(--diagram-{name})" for name in NAMES}


def test_no_page_of_the_site_draws_a_diagram_with_a_script(site):
    pages = [path.read_text() for path in site.rglob("*.html")]
    assert sum(page.count('<div class="diagram"') for page in pages) == len(
        list(diagrams.diagrams(PAGES))
    )
    assert not [page for page in pages if 'class="mermaid"' in page or "data-name=" in page]
    assert not (site / diagrams.FOLDER).exists()


# Colours


def scheme(name: str) -> dict[str, str]:
    block = re.search(rf'\[data-md-color-scheme="{name}"\] {{(.*?)}}', CSS, re.DOTALL)[1]
    return dict(re.findall(r"--diagram-([\w-]+): (#\w{6});", block))


def contrast(one: str, other: str) -> float:
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    low, high = sorted([light(one), light(other)])
    return high / low


@pytest.mark.parametrize("name", ["default", "slate"])
def test_text_and_outlines_stand_out(name):
    colours = scheme(name)
    assert set(colours) == set(NAMES)
    fills = ("paper", "node", "group", *KINDS)
    assert {f: c for f in fills if (c := contrast(colours["ink"], colours[f])) < 4.5} == {}
    lines = [n for n in NAMES if n.endswith("line")]
    assert {n: c for n in lines if (c := contrast(colours[n], colours["paper"])) < 3} == {}
    for kind in KINDS:
        assert contrast(colours[f"{kind}-line"], colours[kind]) >= 3, kind


def test_the_paper_is_the_pages():
    """Labels hide the line behind them with it."""
    site = (PAGES / "assets/palette.css").read_text()
    for name in ("default", "slate"):
        blocks = re.findall(rf'\[data-md-color-scheme="{name}"\] {{(.*?)}}', site, re.DOTALL)
        assert f"--md-default-bg-color: {scheme(name)['paper']};" in "".join(blocks)


# In a build


def test_a_diagram_that_is_not_rendered_is_a_warning_with_page_and_line(project, caplog):
    page = project(f"# Title\n\n{FENCE}")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "topic/page.md:3: " in record.getMessage() and "make diagrams" in record.getMessage()
    assert "Two steps. From tokens to logits." in page and "<svg" not in page


def test_a_diagram_that_nobody_could_hear_is_a_warning(project, caplog):
    source = SOURCE.replace("accDescr", "%% accDescr")
    (project.kept / f"{diagrams.name_of(source)}.svg").write_text(svg(source))
    project(f"```mermaid\n{source}\n```\n")
    (record,) = caplog.records
    assert "topic/page.md:1: a diagram without accDescr" in record.getMessage()


def test_ids_are_unique_when_a_page_shows_a_diagram_twice(project, caplog):
    (project.kept / f"{diagrams.name_of(SOURCE)}.svg").write_text(svg())
    page = project(f"{FENCE}\n!!! note\n\n{indented(FENCE, 4)}\n- item\n\n{indented(FENCE, 4)}")
    assert not caplog.records and page.count("<svg") == 3
    found = diagrams.diagrams(project.root / "pages")
    assert [d.name for d in found] == [diagrams.name_of(SOURCE)] * 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) == 6
    named = re.findall(r'(?:url\(#|aria-describedby=")([^")]+)', page)
    assert sorted(named) == sorted(ids)


def indented(text: str, by: int) -> str:
    return "".join(" " * by + line for line in text.splitlines(keepends=True))


def test_only_a_diagram_that_may_scroll_is_a_stop_of_the_tab_key():
    narrow = diagrams.inline(svg(width=480), diagrams.name_of(SOURCE), 1)
    wide = diagrams.inline(svg(width=900), diagrams.name_of(SOURCE), 1)
    assert "tabindex" not in narrow and 'style="min-width:288px"' in narrow
    assert '<div class="diagram" tabindex="0" role="group" aria-label="Two steps">' in wide
    assert 'style="min-width:540px"' in wide


def test_notebooks_and_longer_fences(project):
    cells = [{"cell_type": "code", "source": "1"}]
    cells += [{"cell_type": "markdown", "source": f"Text\n\n{FENCE}".splitlines(keepends=True)}]
    (project.root / "pages/book.ipynb").write_text(json.dumps({"cells": cells}))
    (project.root / "pages/page.md").write_text(f"````md\n{FENCE}````\n\n{FENCE}")
    found = [diagram.place for diagram in diagrams.diagrams(project.root / "pages")]
    assert found == ["book.ipynb: cell 2, line 3", "page.md:10"]


# Rendering


def test_what_no_page_uses_is_deleted(project, capsys):
    project(FENCE)
    current = project.kept / f"{diagrams.name_of(SOURCE)}.svg"
    current.write_text(svg())
    (project.kept / "0123456789ab.svg").write_text(svg())
    diagrams.main()
    assert list(project.kept.iterdir()) == [current]
    assert "0123456789ab.svg: no page uses it" in capsys.readouterr().out


def test_an_undescribed_diagram_is_not_rendered(project):
    project("```mermaid\nflowchart LR\n  a --> b\n```\n")
    with pytest.raises(SystemExit, match=r"topic/page.md:1: .* without accTitle and accDescr"):
        diagrams.main()
    assert not list(project.kept.iterdir())


@pytest.fixture(scope="module")
def render():
    try:
        with browser(PAGES, ROOT / "build") as render:
            yield render
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mermaid can't be fetched: {error}")


def test_every_shape_comes_out_clean(render):
    source = """flowchart LR
      a([stadium]):::tokens --> b[(cache)]:::cache --> c{diamond}:::op --> d((x)):::hidden
      d -.->|b t d| e{{hex}}:::logits --x f[/q < k & v/]:::weights ==> g[two<br/>lines]
      subgraph A group
        g --o h
      end"""
    text = render("mabc", source, "T & t", "D")
    assert_clean(text)
    assert 'aria-label="T &amp; t"' in text and "q &lt; k &amp; v" in text
    for kind in KINDS:
        assert f'fill="var(--diagram-{kind})" stroke="var(--diagram-{kind}-line)"' in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == 4 and all(name.startswith("mabc-") for name in ids)  # three arrow ends


def test_shapes_of_tensors_are_in_the_code_font(render):
    text = render("mabc", SOURCE, "T", "D")
    look = re.search(r'<text [^>]*font-family="var\(--md-code-font\)[^>]*>([^<]*)', text)
    assert look[1] == "b t"


@pytest.mark.parametrize(
    "source, said",
    [
        ("flowchart LR\n  a --> b\n  style a fill:#f00", "rgb(255, 0, 0), which is none"),
        ('%%{init: {"themeVariables": {"mainBkg": "#f00"}}}%%\nflowchart LR\n  a', "is none of"),
        ("flowchart LR\n  a --> [", "Parse error on line 2"),
    ],
)
def test_a_diagram_that_can_not_be_shown_is_refused(render, source, said):
    with pytest.raises(RenderFailed, match=re.escape(said)):
        render("mabc", source, "T", "D")


# One language


@pytest.mark.parametrize(
    "old, new, said",
    [
        (":::tokens", ":::token", "page.md:1: a diagram with the kind token; there are tokens"),
        ("a(ids)", "a{{ids}}", "page.md:1: a diagram with a node {{; there are ( ), [ ] and (( ))"),
    ],
)
def test_a_kind_or_a_shape_of_its_own_is_a_warning(project, caplog, old, new, said):
    source = SOURCE.replace(old, new)
    (project.kept / f"{diagrams.name_of(source)}.svg").write_text(svg(source))
    project(f"```mermaid\n{source}\n```\n")
    (record,) = caplog.records
    assert said in record.getMessage()


def test_braces_in_words_are_no_shapes(project, caplog):
    source = SOURCE.replace("(ids)", '("{{ids}}")').replace("|b t|", "|f([x])|")
    (project.kept / f"{diagrams.name_of(source)}.svg").write_text(svg(source))
    project(f"```mermaid\n{source}\n```\n")
    assert not caplog.records


def test_the_legend_names_the_kinds_that_are_seen(project):
    (project.kept / f"{diagrams.name_of(SOURCE)}.svg").write_text(svg())
    (legend,) = re.findall(r'<p class="diagram-legend".*?</p>', project(FENCE))
    assert re.findall(r'<span class="(\w+)">', legend) == ["tokens", "logits"]


def test_every_kind_has_its_colour_in_the_legend():
    for kind in KINDS:
        assert f".diagram-legend .{kind}::before {{\n  --fill: var(--diagram-{kind});" in CSS
