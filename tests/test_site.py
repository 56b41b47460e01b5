"""The real site: every page notices a wrong module. In a browser: test_browser.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_proof_is_within_tolerance_and_shows_its_feature(report):
    assert report["proofs"]
    for proof in report["proofs"]:
        assert proof["difference"] <= proof["tolerance"]
        assert proof["effect"] >= 100 * proof["tolerance"] and proof["effect"] > 0
        assert proof["version"] and proof["oracle"]


def test_every_page_with_a_module_proves_it(report):
    proved = {proof["module"] for proof in report["proofs"]}
    shown = [p["source"].rpartition(".")[0] for p in report["pages"] if p["cells"]]
    lessons = [f"snippets/{stem}.py" for stem in shown if (ROOT / f"snippets/{stem}.py").is_file()]
    assert lessons and set(lessons) <= proved


def test_verification_lists_every_proof(site, report):
    page = (site / "reference/verification.html").read_text()
    assert page.count("<tr>") == len(report["proofs"]) + 1


def test_no_formula_is_left_as_tex(site):
    left = [p for p in site.rglob("*.html") if 'class="arithmatex">\\' in p.read_text()]
    assert left == []


def test_no_output_is_an_object_that_says_nothing(site):
    """A cell that ends in `axis.legend()` shows what that returns."""
    said = re.compile(r"&lt;[\w. ]+ at 0x|&lt;(function|generator|matplotlib)\b")
    bare = [p for p in site.rglob("*.html") if said.search(p.read_text())]
    assert bare == []


def test_every_page_fails_when_its_module_is_one_percent_off(tmp_path):
    """A hidden first cell scales all that the page's module computes."""
    for name in ("site_src", "snippets", "tests", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "build").mkdir()
    (tmp_path / "build/weights").symlink_to(ROOT / "build/weights")
    lessons = []
    for path in sorted((tmp_path / "site_src").rglob("*")):
        stem = path.relative_to(tmp_path / "site_src").with_suffix("").as_posix()
        if path.suffix not in (".md", ".ipynb") or not (ROOT / f"snippets/{stem}.py").is_file():
            continue
        lessons.append(path.relative_to(tmp_path / "site_src").as_posix())
        code = (
            f"import snippets.{stem.replace('/', '.')} as module\n"
            "from tests.scaling import scale\nscale(module)"
        )
        if path.suffix == ".md":
            front = re.match(r"\A(---\n.*?\n---\n)?", path.read_text(), re.DOTALL)[0]
            rest = path.read_text()[len(front) :]
            path.write_text(f"{front}\n```python hide=all\n{code}\n```\n{rest}")
        else:
            notebook = json.loads(path.read_text())
            cell = {"cell_type": "code", "id": "scale", "metadata": {}, "outputs": []}
            cell |= {"execution_count": None, "source": code}
            notebook["cells"].insert(1, cell)
            path.write_text(json.dumps(notebook))
    assert lessons
    command = [sys.executable, "-m", "site_build", "execute"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, env=environment)
    report = json.loads((tmp_path / "build/report.json").read_text())
    errors = {page["source"]: page["error"] or "passed" for page in report["pages"]}
    assert {s: errors[s] for s in lessons if "AssertionError" not in errors[s]} == {}
