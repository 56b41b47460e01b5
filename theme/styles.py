"""MkDocs hook: the styles of `extra_css` as one file: a page waits for one answer, not for ten."""

import re
from pathlib import Path, PurePosixPath

from mkdocs.plugins import event_priority

JOINED = "assets/all.css"
LINK = re.compile(r'[ \t]*<link rel="stylesheet" href="(?P<href>[^"]*)">\n?')
COMMENT = re.compile(r"/\*.*?\*/\s*", re.DOTALL)
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


def moved(text: str, name: str) -> str:
    """The style as it reads from the place of the joined one."""
    folder = PurePosixPath(name).parent.relative_to(PurePosixPath(JOINED).parent)
    return URL.sub(lambda m: f"url({folder / m['path']})", COMMENT.sub("", text))
