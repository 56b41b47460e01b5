"""The real site: every page notices a wrong module, and every address works in a browser."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.browser import FLAGS, executable

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
    page = (site / "reference/verification/index.html").read_text()
    assert page.count("<tr>") == len(report["proofs"]) + 1


def test_no_formula_is_left_as_tex(site):
    left = [p for p in site.rglob("*.html") if 'class="arithmatex">\\' in p.read_text()]
    assert left == []


def test_no_page_or_asset_of_ours_asks_another_host(site):
    """What Material ships names some hosts; the browser test sees that it asks none."""
    for path in (site / "assets").glob("*.css"):
        assert "http" not in path.read_text(), path
    for path in (site / "assets/katex").rglob("*.css"):
        assert "http" not in path.read_text(), path


def test_every_page_fails_when_its_module_is_one_percent_off(tmp_path):
    """A hidden first cell scales all that the page's module computes."""
    for name in ("site_src", "snippets", "tests", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
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


# In the browser


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): ...


@pytest.fixture(scope="session")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_address_in_chromium(site, address, width, scheme, tmp_path):
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    assert "index.html" in pages
    troubles = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda m: m.type == "error" and troubles.append((name, m.text)))
        tab.on("pageerror", lambda e: troubles.append((name, str(e))))
        tab.on(
            "request",
            lambda r: r.url.startswith((address, "data:")) or troubles.append((name, r.url)),
        )
        tab.on("response", lambda r: r.status >= 400 and troubles.append((name, r.url)))
        for name in pages:
            tab.goto(address + name.removesuffix("index.html"))
            wide = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            if wide > 0:
                troubles.append((name, f"scrolls sideways by {wide} px"))
            shown = tab.evaluate("document.body.getAttribute('data-md-color-scheme')")
            if shown != {"light": "default", "dark": "slate"}[scheme]:
                troubles.append((name, f"colour scheme {shown}"))
        browser.close()
    assert troubles == []
