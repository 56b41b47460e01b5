"""A page runs again exactly when its code or something that it used changed."""

import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from site_build import cache

VALUE = "from snippets.value import value\nprint('value', value())\nassert value() > 0"
OTHER = "import math\nassert math.pi > 3"


def check(project, change, *ran: str) -> None:
    """Both pages are cached; after the change these run, and afterwards none."""
    assert project.ran() == ["a.md", "b.md"]
    assert project.ran() == []
    change()
    assert project.ran() == list(ran)
    assert project.ran() == []


def test_an_edited_cell_runs_its_page(project):
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)
    check(project, lambda: project.edit("site_src/a.md", "'value'", "'worth'"), "a.md")
    assert "worth 1" in project.text("a.md")


def test_prose_captions_and_options_run_nothing(project):
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)

    def change():
        project.edit("site_src/a.md", "# Page", "# Another title\n\nProse, and more of it.")
        project.edit("site_src/a.md", "```python ", "```python hide=source")

    check(project, change)
    assert "Another title" in project.text("a.md") and "value 1" in project.text("a.md")
    assert "assert" not in project.text("a.md")


def test_an_edited_module_runs_the_pages_that_used_it(project):
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)
    check(project, lambda: project.edit("snippets/value.py", "1", "2"), "a.md")
    assert "value 2" in project.text("a.md")


def test_a_module_imported_indirectly_or_by_importlib(project):
    project.write("snippets/inner.py", "number = 1\n")
    project.write("snippets/outer.py", "from .inner import number\n")
    project.page("a.md", "from snippets.outer import number\nprint(number)\nassert number")
    dynamic = "import importlib\nm = importlib.import_module('snippets.inner')\nprint(m.number)"
    project.page("b.md", dynamic + "\nassert m.number")
    check(project, lambda: project.edit("snippets/inner.py", "1", "7"), "a.md", "b.md")
    assert "\n7\n" in project.text("a.md") and "\n7\n" in project.text("b.md")


def test_a_module_loaded_from_its_file(project):
    project.write("tools/extra.py", "number = 1\n")
    project.page(
        "a.md",
        "import importlib.util as u\n"
        "spec = u.spec_from_file_location('extra', 'tools/extra.py')\n"
        "m = u.module_from_spec(spec)\nspec.loader.exec_module(m)\nassert m.number",
    )
    project.page("b.md", OTHER)
    check(project, lambda: project.edit("tools/extra.py", "1", "2"), "a.md")


def test_an_edit_within_one_second_that_keeps_the_size(project):
    """A .pyc knows its source by whole seconds and size only."""
    path = project.root / "snippets/value.py"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    import py_compile

    py_compile.compile(str(path), doraise=True)
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)

    def change():
        project.edit("snippets/value.py", "1", "5")
        os.utime(path, (1_000_000_000, 1_000_000_000))

    check(project, change, "a.md")
    assert "value 5" in project.text("a.md")


def test_a_data_file(project):
    project.write("data/numbers.txt", "1 2 3")
    project.page("a.md", "text = open('data/numbers.txt').read()\nassert text.split()")
    project.page("b.md", "from pathlib import Path\nassert Path('data').exists()")
    check(project, lambda: project.write("data/numbers.txt", "4 5 6"), "a.md")
    assert "data/numbers.txt" in project.about("a.md")["files"]


def test_a_safetensors_file_that_only_native_code_opens(project):
    weights = project.root / "data/w.safetensors"
    weights.parent.mkdir()
    save_file({"w": torch.ones(2)}, weights)
    project.page(
        "a.md",
        "from safetensors.torch import load_file\n"
        "w = load_file('data/w.safetensors')['w']\nprint(w.sum().item())\nassert w.sum() > 0",
        "from safetensors import safe_open\n"
        "with safe_open('data/w.safetensors', 'pt') as f:\n    assert f.get_tensor('w').sum() > 0",
    )
    project.page("b.md", OTHER)
    check(project, lambda: save_file({"w": torch.ones(2) * 3}, weights), "a.md")
    assert "6.0" in project.text("a.md")


def test_a_tokenizer_file_that_only_native_code_opens(project):
    def save(words):
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
        tokenizer.save(str(project.root / "data/tokenizer.json"))

    (project.root / "data").mkdir()
    save(["?", "a"])
    project.page(
        "a.md",
        "from tokenizers import Tokenizer\nt = Tokenizer.from_file('data/tokenizer.json')\n"
        "print('size', t.get_vocab_size())\nassert isinstance(t, Tokenizer) and t.get_vocab()",
    )
    project.page("b.md", OTHER)
    check(project, lambda: save(["?", "a", "b"]), "a.md")
    assert "size 3" in project.text("a.md")


def test_a_listed_folder(project):
    project.write("data/one.txt", "1")
    project.page("a.md", "from pathlib import Path\nassert list(Path('data').glob('*.txt'))")
    project.page("b.md", "assert len(open('data/one.txt').read()) == 1")
    check(project, lambda: project.write("data/two.txt", "2"), "a.md")


@pytest.mark.parametrize(
    "look",
    [
        "import os\nfound = os.path.exists('data/late.txt')",
        "from pathlib import Path\nfound = Path('data/late.txt').is_file()",
        "try:\n    open('data/late.txt')\n    found = True\nexcept FileNotFoundError:\n    found = False",
        "try:\n    import snippets.late\n    found = True\nexcept ImportError:\n    found = False",
        "import importlib.util as u\nfound = u.find_spec('snippets.late') is not None",
    ],
)
def test_a_file_looked_for_and_absent(project, look):
    project.page("a.md", f"{look}\nprint('found', found)\nassert found in (True, False)")
    project.page("b.md", OTHER)

    def change():
        project.write("data/late.txt", "here")
        project.write("snippets/late.py", "")

    check(project, change, "a.md")
    assert "found True" in project.text("a.md")


def test_a_file_that_the_page_writes_itself(project):
    project.page(
        "a.md",
        "from pathlib import Path\nmade = Path('build/made.txt')\n"
        "if not made.exists():\n    made.write_text('made')\nassert made.read_text()",
    )
    project.page("b.md", OTHER)
    check(project, lambda: project.write("build/made.txt", "tampered"), "a.md")


def test_an_unrelated_file_runs_nothing(project):
    project.write("snippets/unused.py", "x = 1")
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)

    def change():
        project.edit("snippets/unused.py", "1", "2")
        project.write("data/new.txt", "")
        project.write("snippets/another.py", "")

    check(project, change)


def package(folder, name: str, version: str, code: str) -> None:
    """As installed: outside of the project."""
    for old in folder.glob(f"{name}-*"):
        shutil.rmtree(old)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/METADATA,,\n")


def test_another_version_of_a_package_that_the_page_imported(project, tmp_path, monkeypatch):
    """Directly or through another package; a page that imports neither stays."""
    folder = tmp_path / "packages"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    cache_clear()
    package(folder, "base_package", "1.0", "number = 1")
    package(folder, "user_package", "1.0", "from base_package import number")
    project.page(
        "a.md", "import user_package\nprint(user_package.number)\nassert user_package.number"
    )
    project.page("b.md", "import math\nassert math.tau > 6")
    check(project, lambda: package(folder, "base_package", "2.0", "number = 22"), "a.md")
    assert project.about("a.md")["versions"]["base_package"] == "2.0"
    assert "\n22\n" in project.text("a.md")


def cache_clear():
    from site_build.engine import distributions

    distributions.cache_clear()


def test_another_python(project, monkeypatch):
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)

    def change():
        monkeypatch.setattr(cache.platform, "python_version", lambda: "3.99.0")
        cache.environment.cache_clear()

    try:
        check(project, change, "a.md", "b.md")
    finally:
        cache.environment.cache_clear()


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_cache_entry_is_a_miss(project, damage):
    project.page("a.md", VALUE)
    project.page("b.md", OTHER)
    entry = project.root / "build/cache/a.md.json"

    def change():
        data = entry.read_bytes()
        assert b"value 1" in data
        damaged = {"cut": data[: len(data) // 2], "altered": data.replace(b"value 1", b"value 9")}
        entry.write_bytes(damaged.get(damage, b""))

    check(project, change, "a.md")
    assert "value 1" in project.text("a.md")


def test_both_back_ends_give_the_same_pages(quick):
    if not sys.platform.startswith("linux"):
        pytest.skip("there is one back end here")
    quick.page("a.md", VALUE, "import sys\nprint('out')\nprint('err', file=sys.stderr)\n{'a': 1}")
    quick.page(
        "b.md",
        "import matplotlib.pyplot as plt\nassert plt.plot([1, 2]);",
        info='alt="A line" stderr',
    )
    texts = []
    for backend in ("fork", "kernel"):
        quick.options["backend"] = backend
        (quick.root / "build/cache/a.md.json").unlink(missing_ok=True)
        (quick.root / "build/cache/b.md.json").unlink(missing_ok=True)
        assert quick.ran() == ["a.md", "b.md"]
        texts.append((quick.text("a.md"), quick.text("b.md")))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("path", ["site_src/assets/words.txt", ".github/words.txt"])
def test_a_file_in_a_folder_that_begins_like_an_ignored_one(project, path):
    project.write(path, "before")
    project.page("a.md", f"print(open('{path}').read())\nassert open('{path}').read()")
    assert project.ran() == ["a.md"]
    project.write(path, "after")
    assert project.ran() == ["a.md"] and "after" in project.text("a.md")
