"""Every link of the built site, followed by linkchecker over a local server, and every anchor."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urljoin

from tests.browser import served

# linkchecker reads a page again for each anchor that leads to it. So anchors are compared here,
# and it gets links without them, and pages without the colours of code and the glyphs of
# formulas, which are nine tenths of them and link nowhere: seconds for minutes.
NO_LINKS = re.compile(
    r"<math.*?</math>|<span(?![^>]*\sid=)[^>]*>|</span>|<script>.*?</script>", re.S
)
ANCHORED = re.compile(r'\bhref="([^"#]*)#([^"]+)"')
ID = re.compile(r'\bid="([^"]+)"')
HERE = "http://here/"
CONFIG = """\
[checking]
maxrequestspersecond=1000
[filtering]
checkextern=0
[output]
log=csv
status=0
"""  # the server is ours; see also its header in tests/browser.py


def check(site: Path, folder: Path) -> list[str]:
    """What leads nowhere: linkchecker's lines, with its warnings, and our anchors."""
    light, config = folder / "light", folder / "linkcheckerrc"
    config.write_text(CONFIG)
    ids, anchors = {}, set()
    for path in sorted(p for p in site.rglob("*") if p.is_file()):
        copy = light / path.relative_to(site)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".html":
            copy.symlink_to(path)
            continue
        page = NO_LINKS.sub("", path.read_text("utf-8"))
        here = urljoin(HERE, path.relative_to(site).as_posix())
        ids[here] = {*ID.findall(page)}
        anchors |= {(here, *link) for link in ANCHORED.findall(page)}
        copy.write_text(ANCHORED.sub(r'href="\1"', page))
    found = []
    for here, address, anchor in sorted(anchors):
        there = urljoin(here, address)
        if there.startswith(HERE) and anchor not in ids.get(there, ()):
            found.append(f"{here.removeprefix(HERE)}: {address}#{anchor}")
    with served(light) as base:
        pages = [base + p.relative_to(light).as_posix() for p in sorted(light.rglob("*.html"))]
        command = [sys.executable, "-m", "linkcheck", "-f", str(config), *pages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [row for row in done.stdout.splitlines() if row and not row.startswith("#")]
    assert done.returncode in (0, 1) and rows[:1] and rows[0].startswith("urlname;"), done
    return found + rows[1:]


def test_every_link_and_anchor_leads_somewhere(site, tmp_path):
    assert check(site, tmp_path) == []


BROKEN = {
    "page": '<a href="nowhere.html">a</a>',
    "anchor of another page": '<a href="b.html#nowhere">a</a>',
    "anchor of the same page": '<a href="#nowhere">a</a>',
    "image": '<img src="nowhere.png" alt="a">',
    "script": '<script src="nowhere.js"></script>',
}


def test_what_leads_nowhere_is_seen(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "a.html").write_text(f'<p><a href="b.html#here">b</a>{"".join(BROKEN.values())}')
    (site / "b.html").write_text('<p><span id="here">here</span>')
    found = check(site, tmp_path)
    assert len(found) == len(BROKEN) and all("nowhere" in line for line in found), found
