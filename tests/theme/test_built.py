"""What pages say of the build is counted, and how to cite stands in one place."""

import re
import tomllib
from pathlib import Path

import yaml

from theme import built
from theme.api import modules

ROOT = Path(__file__).parents[2]


def test_the_counts_are_those_of_the_report(site, report):
    twin = (site / "reference/about.md").read_text("utf-8")
    said = dict(re.findall(r"^\| (\w+) \| ([\d,]+) \|", twin, re.MULTILINE))
    counts = {name: int(count.replace(",", "")) for name, count in said.items()}
    executed = [page for page in report["pages"] if page["cells"]]
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert counts.pop("mistakes") == twin_mistakes(site) > 100
    assert counts.pop("tests") > 1000
    assert counts == {
        "pages": len(pages),
        "cells": sum(page["cells"] for page in executed),
        "assertions": sum(page["assertions"] for page in executed),
        "proofs": len(report["proofs"]),
        "modules": sum(map(len, modules(ROOT).values())),
    }
    assert f"of them {len(executed)} hold code that was executed" in twin


def twin_mistakes(site: Path) -> int:
    """As pages show them."""
    lessons = [p for p in site.rglob("*.md") if "api" not in p.relative_to(site).parts]
    return sum(len(re.findall(r"^caught: ", p.read_text("utf-8"), re.M)) for p in lessons)


def test_a_test_with_parameters_counts_once(tmp_path):
    path = tmp_path / "tests/topic/test_a.py"
    path.parent.mkdir(parents=True)
    path.write_text("def test_one(): ...\ndef helper(): ...\nclass A:\n    def test_two(s): ...\n")
    (tmp_path / "tests/other.py").write_text("def test_three(): ...\n")
    assert built.count_tests(tmp_path) == 2


def test_an_unknown_fact_fails_the_build(shell):
    shell.page("a.md", "# A\n\nThere are <!-- built: pagse --> pages.")
    (shell.root / "tests").mkdir()
    (shell.root / "CITATION.cff").write_text((ROOT / "CITATION.cff").read_text())
    code, output = shell.build()
    assert code == 1 and "a.md: built: 'pagse' is not one of pages, " in output
    shell.page("a.md", "# A\n\nThere are <!-- built: pages --> pages.\n\n- <!-- built: bibtex -->")
    shell.page("b.md", '# B\n\n!!! note "N"\n\n    <!-- built: bibtex -->\n\nAfter')
    web = {"SITE_URL": "https://example.org/book", "REPO_URL": "https://github.com/example/book"}
    code, output = shell.build(**web)
    assert code == 0, output
    assert "There are 5 pages" in shell.html("a.html")
    inside = shell.html("b.html").partition('class="admonition')[2].partition("After")[0]
    assert "<pre>" in inside and "```" not in inside
    assert "  url = {https://example.org/book/}," in shell.html("b.md")


def test_how_to_cite_has_one_source(site):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["version"] == project["version"] and cited["license"] == project["license"]
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"site_name: {cited['title']}\nsite_description: {cited['abstract']}\n" in config
    entry = re.search(r"```bibtex\n(.*?)\n```", (site / "reference/about.md").read_text(), re.S)[1]
    assert entry.startswith("@software{forward_pass,\n  title = {{Forward Pass}},\n")
    assert "author = {{the Forward Pass maintainers}}" in entry
    assert re.search(r"note = \{commit [0-9a-f]{10} of \d{4}-\d\d-\d\d\},\n\}$", entry)
    assert entry.count("{") == entry.count("}")


def test_about_holds_licence_and_leads_to_proofs(site):
    page = (site / "reference/about.html").read_text("utf-8")
    box = page.partition("<details")[2].partition("</details>")[0]
    assert "THE SOFTWARE IS PROVIDED" in box and "<pre>" in box
    assert 'href="verification.html"' in page and (ROOT / "SECURITY.md").is_file()


def test_authors_of_a_citation():
    assert built.author({"name": "the makers"}) == "{the makers}"
    assert built.author({"family-names": "Curie", "given-names": "Marie"}) == "Curie, Marie"
