"""One commit, one site: whatever the folder, the number of workers, the day."""

import os
import subprocess

import pytest

FIGURE = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 3, 2])\nassert ax.lines;"
TEXT = "from pathlib import Path\nprint(Path.cwd(), object())\nprint({'a', 'b', 'c'})\nassert Path.cwd().is_dir()"
TORCH = "import torch\ntorch.manual_seed(0)\nx = torch.randn(300, 300)\nprint(x @ x)\nassert (x @ x).std() > 1"


def git(project, *arguments: str) -> None:
    who = {
        f"GIT_{role}_{what}": "a@b.c"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    when = {"GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000"}
    subprocess.run(["git", *arguments], cwd=project.root, check=True, env=os.environ | who | when, capture_output=True)  # fmt: skip


def test_two_cold_builds_from_two_folders_with_one_and_two_workers(project, tmp_path):
    for number in range(3):
        project.page(f"page{number}.md", FIGURE, TEXT, TORCH, info='alt="A line"')
    project.write("LICENSE", "MIT License\n\nCopyright (c) 2026 someone\n")
    project.write("site_src/shown.md", "# Shown\n\n<!-- show: snippets/value.py -->\n")
    project.page("value.md", "from snippets.value import value\nassert value()")
    project.write(".gitignore", "build/\nsite/\n")
    git(project, "init")
    git(project, "add", ".")
    git(project, "commit", "-m", "all")
    other = project.copy(tmp_path / "somewhere/else/entirely")
    other.edit("mkdocs.yml", '"workers": 2', '"workers": 1')
    for each in (project, other):
        code, output = each.mkdocs("build", SITE_URL="https://example.org/")
        assert code == 0, output
    first, second = project.site(), other.site()
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert b"2023-11-14" in first["sitemap.xml"] or b"<lastmod>" not in first["sitemap.xml"]
    assert (
        b"# Commit " in first["carry/value.py"] and b" of 2023-11-14\n" in first["carry/value.py"]
    )
    assert b", commit " in first["carry/value.ipynb"] and "carry/value.js" in first
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_pages_run_with_one_thread_unless_their_metadata_says_otherwise(project):
    code = "import torch\nprint('threads', torch.get_num_threads())\nassert torch.get_num_threads()"
    project.page("one.md", code)
    project.page("two.md", code, meta="threads: 2")
    project.build()
    assert "threads 1" in project.text("one.md")
    assert "threads 2" in project.text("two.md")


def test_another_number_of_threads_is_another_run(project):
    project.page("a.md", "import math\nassert math.pi > 3")
    assert project.ran() == ["a.md"]
    project.page("a.md", "import math\nassert math.pi > 3", meta="threads: 2")
    assert project.ran() == ["a.md"]


def test_dates_are_the_commits(quick):
    quick.write(".gitignore", "build/\nsite/\n")
    git(quick, "init")
    git(quick, "add", ".")
    git(quick, "commit", "-m", "all")
    quick.edit("mkdocs.yml", "site_name: Test", "site_name: Test\nsite_url: https://example.org/")
    environment = dict(os.environ)
    environment.pop("SOURCE_DATE_EPOCH", None)
    code, output = quick.mkdocs("build")
    assert code == 0, output
    assert b"<lastmod>2023-11-14</lastmod>" in quick.site()["sitemap.xml"]


@pytest.mark.parametrize("key", ["seconds", "cpu_seconds", "peak_memory_mb"])
def test_what_was_measured_is_in_the_report(project, key):
    project.page("a.md", "import math\nx = sum(range(10**6))\nassert x > math.pi")
    project.build()
    assert project.about("a.md")[key] > 0
