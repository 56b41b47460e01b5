"""MkDocs hook: in the dark scheme a figure's ink turns light, the images in it stay as they are.

The ink is turned by a CSS filter (assets/site.css). Over a figure with images lies the same file
once more, cut to their boxes, which the engine measured; no browser loads it in the light scheme.
"""

import json
import re

FIGURE = re.compile(r'<img(?P<attributes>[^>]*?) data-images="(?P<boxes>[^"]*)"[^>]*?>')


def on_page_content(html, page, config, files):
    return FIGURE.sub(layered, html)


def layered(match: re.Match) -> str:
    image = re.sub(r' data-images="[^"]*"', "", match[0])
    source, width = (re.search(rf' {name}="([^"]*)"', match[0])[1] for name in ("src", "width"))
    shape = outline(json.loads(match["boxes"]))
    return (
        f'<span class="figure-layers" style="width:{width}px">{image}<img class="figure true" '
        f'alt="" src="{source}" loading="lazy" style="clip-path:polygon({shape})"></span>'
    )


def outline(boxes: list[list[float]]) -> str:
    """One polygon around all boxes: from the corner to each and back, on lines without width."""
    corners = []
    for left, top, right, low in boxes:
        box = [(left, top), (right, top), (right, low), (left, low), (left, top)]
        corners += [(0, 0), *box, (0, 0)]
    return ",".join(f"{x:g}% {y:g}%" for x, y in corners)
