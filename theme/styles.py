"""MkDocs hook: the styles of `extra_css` as one file: a page waits for one answer, not for ten.

Two changes to the theme's. One rule goes, which holds for all elements while the colours change:
the theme's script says that they do at each load, and the page would be styled twice more before
it can be used. And what is said of tables without a class holds for ours too (theme/tables.py).
"""

import re
from pathlib import Path, PurePosixPath

from mkdocs.plugins import event_priority

JOINED = "assets/all.css"
LINK = re.compile(r'[ \t]*<link rel="stylesheet" href="(?P<href>[^"]*)">\n?')
COMMENT = re.compile(r"/\*.*?\*/\s*", re.DOTALL)
SWITCHING = re.compile(r"\[data-md-color-switching\] \*[^{}]*\{[^{}]*\}")
PLAIN, OURS_TOO = "table:not([class])", "table:is(:not([class]),.fp-table)"
URL = re.compile(r"""url\((?P<quote>["']?)(?!data:)(?P<path>[^)"']+)(?P=quote)\)""")


@event_priority(-50)  # after the hooks that look for a link
def on_post_page(output: str, page, config) -> str:
    names = tuple(str(style) for style in config.extra_css)
    ours = [link for link in LINK.finditer(output) if link["href"].endswith(names)]
    if not ours:
        return output
    hrefs = [link["href"] for link in ours]
    name = next(name for name in names if hrefs[0].endswith(name))
    joined = f'<link rel="stylesheet" href="{hrefs[0].removesuffix(name)}{JOINED}">\n'
    start = ours[0].start()
    rest = LINK.sub(lambda link: "" if link["href"] in hrefs else link[0], output[start:])
    return output[:start] + joined + rest


@event_priority(-50)
def on_post_build(config):
    site = Path(config.site_dir)
    texts = [
        moved((site / str(style)).read_text("utf-8"), str(style)) for style in config.extra_css
    ]
    (site / JOINED).write_text("\n".join(texts), "utf-8")
    for theirs in site.glob("assets/stylesheets/*.css"):
        text = SWITCHING.sub("", theirs.read_text("utf-8"))
        theirs.write_text(text.replace(PLAIN, OURS_TOO), "utf-8")


def moved(text: str, name: str) -> str:
    """The style as it reads from the place of the joined one."""
    folder = PurePosixPath(name).parent.relative_to(PurePosixPath(JOINED).parent)
    return URL.sub(lambda m: f"url({folder / m['path']})", COMMENT.sub("", text))
