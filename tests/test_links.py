"""Every link and anchor of the built site, followed by linkchecker over a local server."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import served


def check(site: Path) -> list[str]:
    """What linkchecker finds in the site; a bad anchor is a warning to it."""
    with served(site) as base:
        config = site.parent / "linkcheckerrc"
        config.write_text("[AnchorCheck]\n[filtering]\ncheckextern=0\n")
        command = [sys.executable, "-m", "linkcheck", "-f", str(config), "--no-status", "-o", "csv"]
        names = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
        done = subprocess.run(
            [*command, *(base + name for name in names)],
            capture_output=True,
            text=True,
            check=False,
        )
    rows = [row for row in done.stdout.splitlines() if row and not row.startswith("#")]
    assert rows and rows[0].startswith("urlname;"), done.stdout + done.stderr
    assert done.returncode in (0, 1), done.stderr
    return rows[1:]


def test_every_link_and_anchor_leads_somewhere(site):
    assert check(site) == []


@pytest.mark.parametrize("link", ["nowhere.html", "b.html#nowhere", "#nowhere", "x.png"])
def test_a_broken_link_is_seen(tmp_path, link):
    site = tmp_path / "site"
    site.mkdir()
    kind = f'<img src="{link}">' if link.endswith("png") else f'<a href="{link}">a</a>'
    (site / "a.html").write_text(f'<p>{kind}<a href="b.html#here">b</a>')
    (site / "b.html").write_text('<p id="here">')
    (found,) = check(site)
    assert link in found
