"""What readers carry away: each module as one file, each page as a notebook.

Notebooks of studies run for their first seconds only, since what comes then is known: their cells
are the page's, which the build ran, and their modules the project's but for annotations. With
WHOLE_NOTEBOOKS=1 in the environment they run to their end.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import nbformat
import pytest
import torch
from filelock import FileLock
from nbclient import NotebookClient
from playwright.sync_api import expect

from site_build.flatten import flatten
from site_build.forkserver import ForkServer
from site_build.pages import read_page
from tests.carry_alone import same
from tests.conftest import shared
from tests.examples import NAMES
from tests.test_layout import MODULES

ROOT = Path(__file__).parents[1]
# They show through IPython; notebooks get them as they are.
NOT_ONE_FILE = {"common/proof", "common/study", "common/table"}
CARRIED = [module for module in MODULES if module not in NOT_ONE_FILE]
# Kernels need a GPU, or Triton's interpreter, in which their own tests run them.
KERNELS = {"attention/flash_attention_triton"}
PAGES = [
    path.relative_to(ROOT / "site_src").as_posix()
    for path in sorted((ROOT / "site_src").rglob("*"))
    if path.suffix in (".md", ".ipynb")
]
KINDS = ("original", "one file")
EXECUTED = [source for source in PAGES if read_page(ROOT / "site_src", source).cells]


# One file


@pytest.fixture(scope="session")
def results(tmp_path_factory, worker_id) -> dict[str, dict]:
    """What the examples give, of the originals and of the one files; once for all workers."""
    folder = shared(tmp_path_factory, worker_id) / "alone"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = Path(f"{folder}.making")
            run_examples(making)
            making.rename(folder)
    return {kind: torch.load(folder / f"{kind}.pt", weights_only=False) for kind in KINDS}


def run_examples(folder: Path) -> None:
    """Write one-file modules into a folder, and what they and the originals give."""
    for name in NAMES:
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(flatten(ROOT, f"snippets/{name}.py"))
    original, one = (folder / f"{kind}.pt" for kind in KINDS)
    for source, target, beside in ((folder, one, ()), (ROOT, original, (one,))):
        command = [sys.executable, "-I", ROOT / "tests/carry_alone.py", source, target, *beside]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [module for module in CARRIED if module not in KERNELS])
def test_one_file_alone_gives_the_same_to_the_bit(module, results):
    assert module in NAMES, f"no tests/examples/{module}.py"
    original, one = results["original"][module], results["one file"][module]
    assert isinstance(one, dict), one
    assert original.keys() == one.keys() >= {"float32", "bfloat16", "eager"}
    for way in original:
        assert len(original[way]) == len(one[way]) > 0
        for ours, theirs in zip(one[way], original[way], strict=True):
            if not same(ours, theirs):  # not by `assert`, which prints all their numbers
                pytest.fail(f"{way}: {str(ours)[:200]} is not {str(theirs)[:200]}")
    tensors = [v for outputs in one["float32"] for v in outputs if isinstance(v, torch.Tensor)]
    assert tensors and all(t.double().std() > 0 for t in tensors if t.numel() > 1)


def test_most_examples_work_in_every_way(results):
    """Else the comparison would be one of errors."""
    for module, ways in results["original"].items():
        for way, outputs in ways.items():
            assert any(isinstance(output, list) for output in outputs), f"{module}: {way}"


@pytest.mark.parametrize("module", CARRIED)
def test_one_file_reads_well(module, tmp_path):
    text = flatten(ROOT, f"snippets/{module}.py")
    assert "jaxtyping" not in text and "snippets." not in re.sub(r"#.*", "", text)
    path = tmp_path / "one.py"
    path.write_text(text)
    rules = ["--select=E1,E2,E3,E4,E7,E9,F,I,W,PLC0414", "--preview", "--isolated"]
    command = [sys.executable, "-m", "ruff", "check", *rules, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert max(map(len, text.splitlines())) <= 110


def test_the_published_file_has_a_header_and_the_licence(site, report):
    shown = [path for path in (site / "carry").rglob("*.py")]
    assert {p.relative_to(site / "carry").with_suffix("").as_posix() for p in shown} >= {
        proof["module"].removeprefix("snippets/").removesuffix(".py")
        for proof in report["proofs"]
        if proof["module"]
    }
    licence = (ROOT / "LICENSE").read_text().splitlines()
    for path in shown:
        text = path.read_text()
        module = f"snippets/{path.relative_to(site / 'carry')}"
        head = text[: text.index("\n\n")]
        assert module in head and licence[2] in head
        for proof in report["proofs"]:
            oracle = f"# Equal to {proof['oracle']} {proof['version']} with "
            assert (oracle in head) or proof["module"] != module
        assert text.rstrip().endswith(f"# {licence[-1]}")
        script = path.with_suffix(".js").read_text()
        twin = re.fullmatch(r"document\.currentScript\.carried = (.*);\n", script, re.DOTALL)
        assert json.loads(twin[1]) == text
        body = flatten(ROOT, module)
        assert body.rstrip() in text


@pytest.mark.parametrize("way", ["server", "file", "without a clipboard"])
def test_a_button_copies_the_one_file(site, browser, address, way):
    page = min(p for p in site.rglob("*.html") if "one-file" in p.read_text())
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = context.new_page()
    if way == "without a clipboard":
        tab.add_init_script("navigator.clipboard.writeText = () => Promise.reject()")
    tab.goto(f"{f'file://{site}/' if way == 'file' else address}{page.relative_to(site)}")
    link, button = tab.locator("a.one-file").first, tab.locator("button.copy-file").first
    assert link.get_attribute("download") == f"{page.stem}.py"
    file = (page.parent / link.get_attribute("href")).resolve()
    button.focus()
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("status").filter(has_text="Copied")).to_have_text("Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == file.read_text()
    assert button.evaluate("button => button === document.activeElement")
    context.close()


# The notebook

# What site-packages or the environment put on the path for this project goes again.
LEAVE = """\
import os, sys
sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p or ".", "snippets"))]
os.environ.pop("PYTHONPATH", None)
"""
WHERE = "import snippets\nprint('snippets from', snippets.__path__[0])"
# Raised between two steps of Python, again and again where a cell catches it.
ENOUGH = """
import signal
class Enough(Exception):
    pass
def enough(*_):
    raise Enough
signal.signal(signal.SIGPROF, enough)
signal.setitimer(signal.ITIMER_PROF, 6, 1)  # seconds of this process
"""
# Big packages that many pages import, loaded once for all of them.
PRELOAD = ["torch", "matplotlib.pyplot", "jaxtyping", "transformers", "peft"]
PRELOAD += ["transformers.models.llama.modeling_llama"]
# Readers have Jupyter's kernel. It takes seconds to start, and this shows that it does the same.
IN_A_KERNEL = ["attention/gqa.md"]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = ForkServer(1, PRELOAD, tmp_path_factory.mktemp("scratch"))
    yield server
    server.close()


def published(source: str, site: Path, empty: Path) -> list[str]:
    """The code cells of a page's notebook, which is whole; what it needs is in the folder."""
    notebook = nbformat.read(site / f"carry/{source.rpartition('.')[0]}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = read_page(ROOT / "site_src", source).cells
    codes = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert [code.strip("\n") for code in codes[1:]] == [cell.code.strip("\n") for cell in cells]
    empty.mkdir()
    if "makers=['weights" in codes[0]:  # their data, which would take a download and 10 s
        (empty / "build").mkdir()
        (empty / "build/weights").symlink_to(ROOT / "build/weights")
    return codes


def refuse_leftovers(first: str, where: str, codes: list[str], empty: Path) -> None:
    assert first == "", "all is installed, and nothing is missing"
    if "from snippets" in "".join(codes[1:]):
        assert where == f"snippets from {empty}/snippets\n"
    written = {p.relative_to(empty).as_posix() for p in empty.rglob("*.py")}
    assert not [p for p in written if "jaxtyping" in (empty / p).read_text().split("import")]


def imports(codes: list[str]) -> str:
    """All that the cells import, those of functions too."""
    nodes = [node for code in codes for node in ast.walk(ast.parse(code))]
    wanted = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(sorted({ast.unparse(node) for node in wanted}))


class Bare(ast.NodeTransformer):
    """Takes annotations and imports out; of an alias, `Float[Tensor, "b t"]`, it leaves Tensor."""

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Import(self, node):
        return None

    visit_ImportFrom = visit_Import

    def visit_Subscript(self, node):
        pair = isinstance(node.value, ast.Name) and isinstance(node.slice, ast.Tuple)
        shaped = pair and hasattr(jaxtyping, node.value.id)
        return node.slice.elts[0] if shaped else self.generic_visit(node)


def bare(code: str) -> str:
    return ast.dump(Bare().visit(ast.parse(code)))


@pytest.mark.parametrize("number, source", enumerate(EXECUTED), ids=EXECUTED)
def test_the_notebook_runs_in_an_empty_folder(number, source, site, report, tmp_path, forks):
    empty = tmp_path / "empty"
    codes = published(source, site, empty)
    study = read_page(ROOT / "site_src", source).meta.get("study")
    cut = study and not os.environ.get("WHOLE_NOTEBOOKS")
    first, *cells = codes
    job = {
        "id": number,
        "page": source,
        "root": str(empty),
        "ignore": [],
        "threads": 1,
        "timeout": 800,
        "cells": [LEAVE, first, WHERE, imports(cells), ENOUGH if cut else "", *cells],
    }
    done = forks.submit(job).result()
    assert "died" not in done, done
    ended = done["record"]["error"]
    assert ended is None or (cut and ended["message"].startswith("Enough")), ended
    said, where = ("".join(o.get("text", "") for o in done["outputs"][at]) for at in (1, 2))
    refuse_leftovers(said, where, codes, empty)
    (about,) = [page for page in report["pages"] if page["source"] == source]
    used = [name for name in about["files"] if not name.startswith("site_build/")]
    for name in used:
        assert (empty / name).exists(), f"the page used {name}"
        if name.endswith(".py"):
            ours, theirs = ((at / name).read_text() for at in (ROOT, empty))
            assert bare(ours) == bare(theirs), name


@pytest.mark.parametrize("source", IN_A_KERNEL)
def test_the_notebook_runs_in_a_kernel(source, site, tmp_path):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(LEAVE)
    empty = tmp_path / "empty"
    codes = published(source, site, empty)
    cells = [nbformat.v4.new_code_cell(code) for code in [*codes, WHERE]]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(tmp_path / "hook"), "PIP_NO_INDEX": "1"}
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(empty)}},
    )
    client.execute(env=environment)
    # A kernel may send what one `print` wrote in several pieces.
    first, last = ("".join(o.get("text", "") for o in cells[at].outputs) for at in (0, -1))
    refuse_leftovers(first, last, codes, empty)
