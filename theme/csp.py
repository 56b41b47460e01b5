"""MkDocs hook: a content security policy in every page, which allows the site's files only.

The theme's inline scripts are allowed by their hashes. One of them holds the way to the site's
root, so the hashes differ from folder to folder and are taken page by page.
"""

import base64
import hashlib
import re
from pathlib import Path

import click
from mkdocs.plugins import event_priority, get_plugin_logger

log = get_plugin_logger("csp")
SCRIPT = re.compile(r"<script\b(?P<attributes>[^>]*)>(?P<code>.*?)</script>", re.DOTALL | re.I)
DATA = re.compile(r"\bsrc\s*=|type\s*=\s*[\"']?application/(ld\+)?json", re.I)
FIRST = '<meta charset="utf-8">'


def policy(page: str, *, inline: bool = False) -> str:
    codes = [m["code"] for m in SCRIPT.finditer(page) if not DATA.search(m["attributes"])]
    digests = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in codes}
    allowed = ["'unsafe-inline'"] if inline else [f"'sha256-{d}'" for d in sorted(digests)]
    return "; ".join(
        [
            "default-src 'self'",
            " ".join(["script-src 'self'", *allowed]),
            "style-src 'self' 'unsafe-inline'",  # KaTeX places its glyphs by style attributes
            "img-src 'self' data:",  # the theme's icons stand in its styles
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'self'",
        ]
    )


@event_priority(-200)  # after all that still writes pages
def on_post_build(config):
    context = click.get_current_context(silent=True)
    # The reload script of `mkdocs serve` is added on the way out, with a number that changes.
    serving = bool(context and context.info_name == "serve")
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        page = path.read_text("utf-8")
        if page.count(FIRST) != 1:
            log.warning(f"{path.relative_to(config.site_dir)} has no place for its policy: {FIRST}")
        meta = (
            f'<meta http-equiv="Content-Security-Policy" content="{policy(page, inline=serving)}">'
        )
        path.write_text(page.replace(FIRST, f"{FIRST}\n      {meta}", 1), "utf-8", newline="\n")
