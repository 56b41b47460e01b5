"""A page as a notebook: prose that any notebook shows, cells as they are, the files they use."""

import json
import sys

import nbformat
import pytest

from site_build.engine import Engine
from site_build.facts import Origin
from site_build.notebook import Prose
from site_build.options import Options
from site_build.pages import read_markdown
from site_build.render import Site

NUMPY = "import numpy as np\nfrom snippets.value import value\nassert np.ones(1).sum() == value()"
GITHUB = {"repo_url": "https://github.com/some/repo.git", "notebook_branch": "notebooks"}


def read(project, stem: str = "a"):
    notebook = nbformat.reads((project.root / f"build/pages/carry/{stem}.ipynb").read_text(), 4)
    nbformat.validate(notebook)
    return notebook


def prose(root, text: str, source: str = "a.md", **options) -> list[tuple]:
    """The cells of a page: kind, text, and for code whether it is folded."""
    site = Site(root, [], {}, [], [], [], Origin(**options))
    return Prose(read_markdown(source, text), site).cells()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("---\ntitle: T\n---\n# H { #id .x }\n\nText.", "# H\n\nText."),
        ("# H <!-- not\nshown --> a", "# H  a"),
        ("<div class=x markdown>\nIn.\n</div>", "In."),
        ("<!-- show: topics -->", "(On the page.)"),
        ("*[KV]: key and value\nThe KV.", "The KV."),
        ("Maths $a_{.x}$ and\n\n$$\n{.b}[c](d)\n$$", "Maths $a_{.x}$ and\n\n$$\n{.b}[c](d)\n$$"),
        ("`[a](b.md)` and [`c`](#h)", "`[a](b.md)` and `c`"),
        ("```text\n[a](b.md) { .x }\n\n\n=== \"T\"\n```", "```text\n[a](b.md) { .x }\n\n\n=== \"T\"\n```"),
        ("[a](index.md#x) [b](https://x.org/a) ![c](d.png)", "a [b](https://x.org/a) *c*"),
        ("[the file](data/x.txt){ download=x }\n{ .caption }", "the file"),
        ("[a](https://x.org){ .b } $x${.c}", "[a](https://x.org) $x${.c}"),
        (
            '!!! note "Look"\n\n    One.\n\n    - two\n\nAfter.',
            "> **Look**\n>\n>\n> One.\n>\n> - two\n\nAfter.",
        ),
        ("!!! warning\n    One.\n\nAfter.", "> **Warning**\n>\n> One.\n\nAfter."),
        (
            '??? tip "A < B"\n\n    One.\n\n        code\n\nAfter.',
            "<details><summary>A &lt; B</summary>\n\n\nOne.\n\n    code\n\n</details>\n\nAfter.",
        ),
        ('=== "Left"\n\n    One.\n\n=== "Right"\n\n    Two.\n', "**Left**\n\n\nOne.\n\n\n**Right**\n\n\nTwo."),
        (
            '!!! note "Out"\n\n    ??? tip "In"\n\n        Deep.\n\n    Out.\n\nAfter.',
            "> **Out**\n>\n>\n>\n> <details><summary>In</summary>\n>\n>\n> Deep.\n>\n> </details>\n>\n> Out.\n\nAfter.",
        ),
        ("> quoted\n>\n> text\n\nAfter.", "> quoted\n>\n> text\n\nAfter."),
        ("```python no-run\nx = 1\n```", "```python\nx = 1\n```"),
    ],
)  # fmt: skip
def test_prose_becomes_plain_markdown(tmp_path, text, expected):
    ((kind, source),) = prose(tmp_path, text)
    assert (kind, squeezed(source)) == ("markdown", squeezed(expected))


def squeezed(text: str) -> list[str]:
    """Lines without runs of empty ones; those of a quotation count apart."""
    lines = text.split("\n")
    return [line for k, line in enumerate(lines) if line.strip("> ") or line != lines[k - 1]]


def test_cells_in_boxes_stay_cells_and_solutions_are_folded(tmp_path):
    text = (
        '!!! note "Box"\n\n    Before.\n\n    ```python\n    x = 1\n    ```\n\n    After.\n\n'
        '??? success "Solution"\n\n    So:\n\n    ```python\n    y = 2\n    ```\n\n'
        "Then.\n\n```python hide=all\nz = 3\n```\n\n"
        "<details markdown>\n<summary>Raw</summary>\n\n```python\nw = 4\n```\n\n</details>\n\n"
        '```python caption="A caption"\nv = 5\n```'
    )
    cells = prose(tmp_path, text)
    assert [c for c in cells if c[0] == "code"] == [
        ("code", "x = 1", False),
        ("code", "y = 2", True),
        ("code", "z = 3", True),
        ("code", "w = 4", True),
        ("code", "v = 5", False),
    ]
    words = [squeezed(source) for kind, source, *_ in cells if kind == "markdown"]
    assert words[0] == ["> **Box**", ">", "> Before."]
    assert words[1] == ["> After.", "", "**Solution**", "", "So:"]
    assert words[2:] == [["Then."], ["**Raw**"], ["*A caption*"]]


def test_links_are_absolute_where_the_site_has_an_address(tmp_path):
    text = "[b](b.md#part) [c](../index.md) [d](#here) ![f](f.png) [g](../x.py)\n\n[h](n.ipynb)"
    address = {"site_url": "https://example.org/docs/"}
    ((_, source),) = prose(tmp_path, text, "topic/a.md", **address)
    assert source == (
        "[b](https://example.org/docs/topic/b.html#part) [c](https://example.org/docs/) "
        "[d](https://example.org/docs/topic/a.html#here) ![f](https://example.org/docs/topic/f.png) "
        "[g](https://example.org/docs/x.py)\n\n[h](https://example.org/docs/topic/n.html)"
    )


def test_a_shown_module_is_in_the_prose_with_its_shapes_as_comments(tmp_path):
    head = "from jaxtyping import Float\nfrom torch import Tensor\n\n\n"
    (tmp_path / "m.py").write_text(head + 'def f(x: Float[Tensor, "b t"]): ...\n')
    ((_, source),) = prose(tmp_path, "Look:\n\n<!-- show: m.py -->\n\nSo.")
    assert source == (
        "Look:\n\n`m.py`\n\n```python\nfrom torch import Tensor\n\n\n"
        "def f(x: Tensor): ...  # x: b t\n```\n\nSo."
    )


def test_the_first_words_say_which_page_this_is(quick):
    quick.options |= {"site_url": "https://example.org/"}
    quick.page("deep/a.md", "import math\nassert math.pi", meta="title: Its title")
    quick.build()
    address = "https://example.org/deep/a.html"
    about = read(quick, "deep/a").cells[0].source
    assert about.startswith(f"**Its title**, the page [{address}]({address}), as a notebook.")


def run_first_cell(project, tmp_path, monkeypatch, capsys) -> str:
    """In an empty folder; what it prints."""
    folder = tmp_path / "elsewhere"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    exec(read(project).cells[1].source, {})
    return capsys.readouterr().out


def test_the_first_cell_writes_what_the_run_used(quick, tmp_path, monkeypatch, capsys):
    tricky = 'a = "\\\\n"\nb = \'\'\'three\'\'\'\nc = """x"""\n'
    quick.write("snippets/value.py", f"{tricky}\n\ndef value():\n    return 1\n")
    quick.write("data/words.txt", "één\ntwo\\n\n")
    quick.write("data/weights.bin", b"\xff" * 10)
    quick.write("data/large.txt", "x" * 300_000)
    names = ("words.txt", "weights.bin", "large.txt")
    reads = "\n".join(f"assert open('data/{name}', 'rb').read()" for name in names)
    quick.page("a.md", NUMPY, reads, "import os\nassert not os.path.exists('data/absent.txt')")
    quick.build()
    said = run_first_cell(quick, tmp_path, monkeypatch, capsys)
    folder = tmp_path / "elsewhere"
    for name in ("snippets/__init__.py", "snippets/value.py", "data/words.txt"):
        assert (folder / name).read_bytes() == (quick.root / name).read_bytes(), name
    assert sorted(p.name for p in (folder / "data").iterdir()) == ["words.txt"]
    assert "missing: data/weights.bin (0.0 MB)" in said and "data/large.txt (0.3 MB)" in said
    assert "absent" not in said
    (folder / "data/words.txt").write_text("my own")
    said = run_first_cell(quick, tmp_path, monkeypatch, capsys)
    assert "your own file stays as it is: data/words.txt" in said
    assert (folder / "data/words.txt").read_text() == "my own"


def test_what_a_prepare_module_makes_is_made_not_written(quick, tmp_path, monkeypatch, capsys):
    maker = (
        "import filelock\nfrom pathlib import Path\n\n\ndef prepare(root):\n    assert filelock\n"
        "    (root / 'build/data').mkdir(parents=True, exist_ok=True)\n"
        "    (root / 'build/data/made.txt').write_text('made')\n"
    )
    quick.write("makers/__init__.py", "")
    quick.write("makers/made.py", maker)
    quick.options |= {"prepare": ["makers.made"]}
    monkeypatch.syspath_prepend(str(quick.root))
    quick.page("a.md", "assert open('build/data/made.txt').read() == 'made'")
    quick.page("b.md", "import math\nassert math.pi")
    quick.build()
    assert "makers=[]" in read(quick, "b").cells[1].source
    source = read(quick).cells[1].source
    assert "packages={'filelock': " in source
    monkeypatch.syspath_prepend("")
    for name in ("makers", "makers.made"):
        monkeypatch.delitem(sys.modules, name)
    assert "missing" not in run_first_cell(quick, tmp_path, monkeypatch, capsys)
    assert (tmp_path / "elsewhere/build/data/made.txt").read_text() == "made"


def test_the_first_cell_installs_only_what_is_missing(quick, tmp_path, monkeypatch, capsys):
    words = '"""Not one:\nimport torch\nfrom matplotlib\n"""\n'
    code = f"{words}import yaml, numpy.linalg as l\nimport math\nassert l and math.pi"
    quick.page("a.md", code, NUMPY)
    versions = quick.build() and quick.about("a.md")["versions"]
    source = read(quick).cells[1].source
    assert (
        f"packages={{'PyYAML': '{versions['PyYAML']}', 'numpy': '{versions['numpy']}'}}" in source
    )
    assert "installing" not in run_first_cell(quick, tmp_path, monkeypatch, capsys)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1+cpu")
    ran = []
    shell = type("Shell", (), {"run_line_magic": lambda self, *words: ran.append(words)})
    exec(source, {"get_ipython": shell})
    assert ran == [("pip", f"install -q PyYAML=={versions['PyYAML']} numpy=={versions['numpy']}")]


def test_torch_gets_the_pages_threads(quick):
    quick.page("a.md", "import torch\nassert torch.ones(1).sum() == 1", meta="threads: 2")
    quick.page("b.md", "import math\nassert math.pi")
    quick.build()
    assert "torch.set_num_threads(2)" in read(quick).cells[1].source
    assert "torch" not in read(quick, "b").cells[1].source


def test_only_pages_that_ran_have_one(quick):
    quick.page("a.md", "import math\nassert math.pi")
    quick.write("site_src/b.md", "# B\n\n```python no-run\nx\n```\n")
    quick.build()
    assert [p.name for p in (quick.root / "build/pages/carry").rglob("*")] == ["a.ipynb"]
    assert '[Notebook](carry/a.ipynb){ download="a.ipynb" }' in quick.text("a.md")
    assert "Notebook" not in quick.text("b.md")
    quick.page("a.md", "assert False, 'not now'")
    engine = Engine(quick.root, quick.root / "site_src", Options(preload=[]), log=lambda _: None)
    engine.refresh(60)  # as under serve
    engine.close()
    assert "not now" in quick.text("a.md") and "Notebook" not in quick.text("a.md")
    assert not (quick.root / "build/pages/carry/a.ipynb").exists()


@pytest.mark.parametrize("left_out", [None, "repo_url", "notebook_branch", "elsewhere"])
def test_colab_is_linked_where_it_can_reach_the_notebook(quick, left_out):
    options = {key: value for key, value in GITHUB.items() if key != left_out}
    if left_out == "elsewhere":
        options["repo_url"] = "https://gitlab.com/some/repo"
    quick.options |= options
    quick.page("deep/a.md", "import math\nassert math.pi")
    quick.build()
    link = (
        "[Open in Colab](https://colab.research.google.com/github/some/repo/blob/notebooks/"
        "carry/deep/a.ipynb)"
    )
    assert (link in quick.text("deep/a.md")) == (left_out is None)
    assert ("Colab" in quick.text("deep/a.md")) == (left_out is None)


def test_the_licence_comes_along(quick):
    quick.write("LICENSE", "Some License\n\nCopyright (c) 2026 A & B\n\nDo what you like.\n")
    quick.write("site_src/b.md", "# B\n\n<!-- show: snippets/value.py -->\n")
    quick.page("a.md", "import math\nassert math.pi")
    quick.build()
    about = read(quick).cells[0].source
    assert "Copyright (c) 2026 A & B. Some License." in about and "Do what you like." in about
    one = quick.text("carry/value.py")
    assert "# Copyright (c) 2026 A & B\n# Some License, printed in full at the end\n" in one
    assert one.endswith("# Do what you like.\n")


def test_a_module_that_cannot_be_one_file_fails_its_page(quick):
    quick.write("snippets/value.py", "import numpy\n")
    quick.write("site_src/a.md", "# A\n\n<!-- show: snippets/value.py -->\n")
    (problem,) = quick.problems()
    assert problem.startswith(
        "a.md: one file of snippets/value.py: snippets/value.py:1: imports numpy"
    )


def test_one_file_and_its_script_are_beside_each_other(quick):
    quick.write("snippets/topic/b.py", "from snippets.value import value\n\nX = value()\n")
    quick.write("site_src/topic/b.md", "# B\n\n<!-- show: snippets/topic/b.py -->\n")
    code, output = quick.mkdocs("build")
    assert code == 0, output
    site = quick.site()
    page = site["topic/b/index.html"].decode()
    assert '<a class="one-file" download="b.py" href="../../carry/topic/b.py">' in page
    one = site["carry/topic/b.py"].decode()
    assert "# snippets/value.py ---" in one and "X = value()" in one
    script = site["carry/topic/b.js"].decode()
    assert json.loads(script.partition(" = ")[2].rstrip(";\n")) == one
