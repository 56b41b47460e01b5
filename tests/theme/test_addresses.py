"""Where pages stand, what they are called, and where their sources are edited."""

import gzip
import html
import re
from pathlib import Path
from xml.etree import ElementTree

from theme import descriptions

ROOT = Path(__file__).parents[2]
WEB = {"SITE_URL": "https://example.org/book", "REPO_URL": "https://github.com/example/book"}
PAGE = (
    "---\ntitle: {0}\ndescription: {0} is a page of this test and fills a line of words\n---\n# {0}"
)


def test_every_page_has_a_title_and_a_description_of_its_own(site):
    titles, abouts = {}, {}
    for path in sorted(p for p in site.rglob("*.html") if p.name != "404.html"):
        page = html.unescape(path.read_text("utf-8").partition("<body")[0])
        (title,) = re.findall(r"<title>(.*?)</title>", page)
        (about,) = re.findall(r'<meta name="description" content="(.*?)">', page)
        assert titles.setdefault(title, path) == path == abouts.setdefault(about, path)
        assert 50 <= len(about) <= 160, path
        og = dict(re.findall(r'<meta property="og:(\w+)" content="(.*?)">', page))
        assert og.pop("type") == (
            "website" if path.parent == site and path.stem == "index" else "article"
        )
        assert og.pop("description") == about and og.pop("site_name") == "Forward Pass"
        assert title == f"{og.pop('title')} - Forward Pass" and not og, path
        assert '<html lang="en"' in page and 'rel="canonical"' not in page


def test_without_addresses_nothing_wrong_is_published(site):
    assert not list(site.glob("sitemap*"))
    for path in site.rglob("*.html"):
        assert 'rel="edit"' not in path.read_text("utf-8")


def test_bad_metadata_fails_the_build_by_the_pages_name(shell):
    shell.edit("mkdocs.yml", "  - theme/csp.py", "  - theme/descriptions.py\n  - theme/csp.py")
    shell.page("index.md", PAGE.format("Start"))
    shell.page("reference/tags.md", PAGE.format("Tags") + "\n\n<!-- material/tags -->")
    shell.page("a.md", PAGE.format("Good"))
    code, output = shell.build()
    assert code == 0, output
    shell.page("a.md", "---\ntitle: Start\ndescription: short\n---\n# A")
    shell.page("b.md", "# B")
    code, output = shell.build()
    assert code == 1
    assert "a.md: its title is that of index.md: 'Start'" in output
    assert "a.md: its description has 5 characters, not 50 to 160" in output
    assert "b.md: its metadata has no description" in output


def test_what_is_wrong_with_metadata():
    good = {"title": "A", "description": "b" * 50}
    assert (
        descriptions.problems({"a.md": good, "b.md": {"title": "B", "description": "c" * 160}})
        == []
    )
    assert descriptions.problems({"a.md": good | {"description": "c" * 161}}) != []
    assert descriptions.problems({"a.md": good | {"description": "c" * 49}}) != []
    assert descriptions.problems({"a.md": good | {"title": 'The "A"'}}) != []
    twice = descriptions.problems({"a.md": good, "b.md": good})
    assert len(twice) == 2 and all(problem.startswith("b.md: ") for problem in twice)


def module(shell, name: str):
    path = shell.root / f"snippets/{name}.py"
    path.parent.mkdir(parents=True)
    path.write_text('"""A module."""\n')


def test_addresses_stand_in_the_sitemap_and_on_the_pages(shell):
    shell.page("topic/index.md", "# Topic")
    shell.page("topic/a.md", "# A")
    code, output = shell.build(**WEB, SOURCE_DATE_EPOCH="1700000000")
    assert code == 0, output
    tree = ElementTree.fromstring(shell.html("sitemap.xml"))
    found = {url[0].text: url[1].text for url in tree}
    api = "https://example.org/book/reference/api/"
    base = "https://example.org/book/"
    assert found == dict.fromkeys(
        [base, f"{base}reference/tags.html", f"{base}topic/", f"{base}topic/a.html", api],
        "2023-11-14",
    )
    packed = gzip.decompress((shell.site / "sitemap.xml.gz").read_bytes()).decode()
    assert packed == shell.html("sitemap.xml")
    for name, address in {"index": base, "topic/index": f"{base}topic/"}.items():
        page = shell.html(f"{name}.html")
        assert f'<link rel="canonical" href="{address}">' in page
        assert f'<meta property="og:url" content="{address}">' in page


def test_every_page_leads_to_its_source(shell, tmp_path):
    shell.page("a.md", "# A\n\n```python\nimport math\nassert math.pi\n```")
    cells = '{"cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# N"}],'
    shell.page("n.ipynb", cells + '"metadata": {}, "nbformat": 4, "nbformat_minor": 5}')
    module(shell, "layers/rmsnorm")
    code, output = shell.build(**WEB)
    assert code == 0, output
    base = "https://github.com/example/book"
    for name, where in {
        "a": "edit/main/site_src/a.md",
        "n": "edit/main/site_src/n.ipynb",
        "index": "edit/main/site_src/index.md",
        "reference/tags": "edit/main/site_src/reference/tags.md",
        "reference/api/index": "tree/main/snippets",
        "reference/api/layers": "tree/main/snippets/layers",
    }.items():
        page = shell.html(f"{name}.html")
        assert re.findall(r'<a href="([^"]+)" rel="edit">', page) == [f"{base}/{where}"], name
    assert f'href="{base}/edit/main/snippets/layers/rmsnorm.py"' in shell.html(
        "reference/api/layers.html"
    )
    foot = shell.html("a.html").partition('class="fp-foot"')[2]
    assert re.search(r"Something wrong here\?</a> · <a [^>]*>Edit this page</a></p>", foot)
