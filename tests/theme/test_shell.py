"""The built site asks no other host, allows no foreign code, and knows its families of models."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.browser import watched
from tests.site_build.test_serve import Server
from theme import assets, csp, tables

CDN = re.compile(
    r"unpkg|jsdelivr|cdnjs|cloudflare|googleapis|gstatic|googletagmanager|google-analytics"
    r"|api\.github\.com|bootstrapcdn|esm\.sh|skypack|polyfill\.io|cdn\.plot\.ly|fontawesome\.com/kit",
    re.IGNORECASE,
)
LOADED = re.compile(r"""url\(\s*["']?(https?:)?//|@import|["'](https?:)?//[^"']+\.(js|css|wasm)""")


class Loaded(HTMLParser):
    """The addresses that a page has loaded without a click."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.found += [attrs[k] for k in ("src", "srcset", "poster", "data") if attrs.get(k)]
        if tag == "link" and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(attrs["href"])


def foreign(site: Path) -> list[str]:
    """What in the site's files names a host that would be asked."""
    found = []
    for path in sorted(p for p in site.rglob("*") if p.suffix in (".html", ".js", ".css", ".svg")):
        name, text = path.relative_to(site).as_posix(), path.read_text("utf-8")
        found += [f"{name}: {match[0]}" for match in CDN.finditer(text)]
        if path.suffix == ".html":
            far = [a for a in Loaded(text).found if re.match(r"(\w+:)?//", a)]
            found += [f"{name}: {address}" for address in far]
        elif path.suffix != ".js" or "search_index" not in name:  # words of pages
            found += [f"{name}: {match[0]}" for match in LOADED.finditer(text)]
    return found


def refused(page: str) -> list[str]:
    """The inline scripts that the page's own policy refuses."""
    allowed = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script(?![^>]*(?: src=|json))[^>]*>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    return [s for s, h in zip(scripts, hashes, strict=True) if f"'sha256-{h}'" not in allowed]


def test_the_site_names_no_other_host(site):
    assert foreign(site) == []


def test_the_site_ships_no_dead_weight(site):
    assert not list(site.rglob("*.map")) and not list(site.rglob("lunr*"))
    heavy = [p for p in site.rglob("*") if p.suffix in (".js", ".css") and p.stat().st_size > 2e5]
    assert [p.name for p in heavy if "search_index" not in p.name] == []


def test_foreign_names_are_seen(tmp_path):
    for name, text in {
        "a.js": 'load("https://unpkg.com/x")',
        "b.css": "p { background: url(https://elsewhere.org/x.png) }",
        "c.html": "<img src='//elsewhere.org/x.png'><a href='https://fine.org'>",
        "d.js": "import('https://elsewhere.org/x.js')",
        "e.html": "<link rel=stylesheet href=https://elsewhere.org/x.css>",
    }.items():
        (tmp_path / name).write_text(text)
    assert [found[0] for found in foreign(tmp_path)] == ["a", "b", "c", "d", "e"]


def test_every_page_has_a_strict_policy(site):
    pages = list(site.rglob("*.html"))
    assert "404.html" in [p.name for p in pages]
    for path in pages:
        page = path.read_text("utf-8")
        (content,) = re.findall(
            r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page
        )
        rules = dict(rule.split(" ", 1) for rule in content.split("; "))
        assert rules.pop("script-src").startswith("'self' 'sha256-")
        assert rules == {
            "default-src": "'self'",
            "style-src": "'self' 'unsafe-inline'",
            "img-src": "'self' data:",
            "object-src": "'none'",
            "base-uri": "'self'",
            "form-action": "'self'",
        }
        assert page.index("Content-Security-Policy") < page.index("<script") and not refused(page)
        assert not re.search(r"<[^>]+\son\w+\s*=|href=.javascript:", page), path


def test_the_policy_is_of_the_page_itself():
    page = '<meta charset="utf-8"><script>one()</script><script type="application/json">{}</script>'
    rules = csp.policy(page)
    assert rules.count("sha256-") == 1 and "unsafe-inline'; img" in rules
    assert csp.policy(page.replace("one", "two")) != rules
    changed = f'<meta http-equiv="Content-Security-Policy" content="{rules}"><script>two()</script>'
    assert refused(changed) == ["two()"]


def test_an_address_and_a_repository_change_nothing_of_this(shell):
    shell.page("topic/page.md", "# A page\n\nWords. :smile: :material-run:")
    code, output = shell.build(
        SITE_URL="https://example.org/book/", REPO_URL="https://github.com/example/book"
    )
    assert code == 0, output
    assert foreign(shell.site) == []
    page = shell.html("topic/page.html")
    assert 'href="https://example.org/book/topic/page.html"' in page
    assert 'href="https://github.com/example/book"' in page and "md-source__facts" not in page
    assert 'data-md-component="source"' not in page
    assert not refused(page) and not refused(shell.html("404.html"))
    assert "\N{SMILING FACE WITH OPEN MOUTH AND SMILING EYES}" in page and "twemoji" in page
    assert '"/book/assets/' in shell.html("404.html")


def test_no_page_has_anything_of_the_notebook_plugin(site):
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8")
        assert "jupyter-wrapper" not in page and "MathJax" not in page and "jp-" not in page


def test_a_notebook_in_the_classic_look_obeys_the_policy(shell):
    cells = [
        {"cell_type": "raw", "id": "a", "metadata": {}, "source": "---\nnotebook: classic\n---"},
        {"cell_type": "markdown", "id": "b", "metadata": {}, "source": "# A notebook"},
        {"cell_type": "code", "id": "c", "metadata": {}, "outputs": [], "execution_count": None}
        | {"source": "import math\nassert math.pi"},
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    shell.page("n.ipynb", json.dumps(notebook))
    code, output = shell.build()
    assert code == 0, output
    page = shell.html("n.html")
    assert "jupyter-wrapper" in page and not refused(page)


def test_served_pages_reload_themselves(shell, browser):
    shell.page("a.md", "# A\n\nbefore")
    server = Server(shell)
    try:
        server.wait_for("a.html", "before")
        base = f"http://127.0.0.1:{server.port}/"
        context = browser.new_context()
        tab, troubles = watched(context, base)
        tab.goto(base + "a.html")
        shell.page("a.md", "# A\n\nafter")
        expect(tab.get_by_text("after")).to_be_visible(timeout=60_000)
        context.close()
        assert not [t for t in troubles if "failed" not in t], troubles  # the cut-off poll
    finally:
        server.process.terminate()
        server.process.wait(timeout=20)


def test_an_unknown_family_fails_the_build(shell):
    shell.page("a.md", "---\ntags: [Llama]\n---\n# A\n\nWords.")
    assert shell.build()[0] == 0
    assert 'href="reference/tags.html#tag:llama"' in shell.html("a.html")
    assert 'href="../a.html"' in shell.html("reference/tags.html")
    shell.page("a.md", "---\ntags: [Lama]\n---\n# A\n\nWords.")
    code, output = shell.build()
    assert code != 0 and "'a.md'" in output and "Lama" in output


def test_a_diagram_for_the_browser_to_draw_fails_the_build(shell):
    shell.page("a.md", '# A\n\n<pre class="mermaid">graph LR; A --> B</pre>')
    code, output = shell.build()
    assert code == 1 and "a.md: no script draws mermaid fences here" in output


class File:
    def __init__(self, name: str, text: str):
        self.src_uri, self.content_string, self.src_dir = name, text, "theme"


class Config:
    docs_dir = "pages"


def test_a_theme_that_changed_is_a_warning(caplog):
    name = "assets/javascripts/bundle.0.min.js"
    good = "".join(old * count for file, old, count, _ in assets.CHANGES if file == assets.SCRIPT)
    worker = File("assets/javascripts/workers/search.0.min.js", "# sourceMappingURL=x")
    script = File(name, good)
    assets.on_files([script, worker], Config)
    assert not caplog.records and "unpkg" not in script.content_string
    assets.on_files([File(name, good + "https://api.github.com/"), worker], Config)
    said = [record.getMessage() for record in caplog.records]
    assert f"assets: {name} has 'https://api.github.com/' 3 times, not 2" in said
    caplog.clear()
    assets.on_files([worker], Config)
    assert "the theme has no assets/javascripts/bundle.*" in caplog.records[0].getMessage()


def test_only_unused_files_of_the_theme_are_left_out():
    files = [File(f"assets/{n}", "") for n in ("x.js.map", "javascripts/lunr/min/x.js", "x.js")]
    ours = File("assets/ours.map", "")
    ours.src_dir = Config.docs_dir
    kept = assets.on_files([*files, ours], Config)
    assert [file.src_uri for file in kept] == ["assets/x.js", "assets/ours.map"]


@pytest.mark.parametrize("corner", ["<th></th>", '<th style="text-align: right;"> </th>'])
def test_the_empty_corner_of_a_table_is_no_header(corner):
    row = f"<tr>{corner}<th>name</th></tr>"
    done = tables.on_page_content(row, None, None, None)
    assert done.count("<th>") == 1 and done.count("<td") == 1 == done.count("</td>")
