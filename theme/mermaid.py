"""Renders mermaid diagrams in headless Chromium: the pages' fonts, the pages' colours.

Colours go in as sentinels, one for each name, and come out as CSS variables that
site_src/assets/diagrams.css defines for both schemes. mermaid.js, beside this file, reduces
mermaid's SVG to what is seen. An edit of either file renders all diagrams again.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

from theme import npm
from theme.diagrams import KINDS  # authors write `x:::hidden`

PACKAGE = "mermaid@11.17.2"
INTEGRITY = (
    "sha512-V6K3C8EBdEsPFZXSKMJe6ppQOENxuHARr9GvHX4hh47l"
    "AbhMRD9qf4oEK7LoaRQxULMa80/qt5gHO73aCleBBg=="
)
NAMES = ["ink", "line", "paper", "node", "node-line", "group", "group-line"]
NAMES += [f"{kind}{part}" for kind in KINDS for part in ("", "-line")]
SENTINEL = {name: f"#aabb{number:02x}" for number, name in enumerate(NAMES, 1)}
THEME = {
    "ink": """primaryTextColor secondaryTextColor tertiaryTextColor textColor nodeTextColor
        titleColor actorTextColor signalTextColor labelTextColor loopTextColor noteTextColor
        classText labelColor transitionLabelColor stateLabelColor""",
    "line": """lineColor signalColor actorLineColor transitionColor specialStateColor
        defaultLinkColor arrowheadColor""",
    "paper": "background edgeLabelBackground sequenceNumberColor labelBackgroundColor",
    "node": """primaryColor mainBkg nodeBkg actorBkg stateBkg activationBkgColor
        labelBoxBkgColor""",
    "node-line": """primaryBorderColor nodeBorder actorBorder stateBorder activationBorderColor
        labelBoxBorderColor""",
    "group": """secondaryColor tertiaryColor clusterBkg noteBkgColor compositeBackground
        altBackground""",
    "group-line": "secondaryBorderColor tertiaryBorderColor clusterBorder noteBorderColor",
}
CONFIG = {
    "startOnLoad": False,
    "securityLevel": "strict",
    "theme": "base",
    "themeVariables": {
        variable: SENTINEL[name] for name, group in THEME.items() for variable in group.split()
    }
    | {"fontSize": "14px"},
    "fontFamily": "Inter",
    "fontSize": 14,
    "htmlLabels": False,
    "markdownAutoWrap": False,
    "flowchart": {
        "htmlLabels": False,
        "padding": 10,
        "nodeSpacing": 28,
        "rankSpacing": 30,
        "diagramPadding": 4,
        "useMaxWidth": False,
    },
    "sequence": {"height": 40, "useMaxWidth": False},
}
FONTS = {"Inter": "inter-latin", "JetBrains Mono": "jetbrains-mono-latin"}
SHAPES = ":is(rect,path,polygon,circle,ellipse)"


class RenderFailed(ValueError):
    """A diagram that can't be drawn, in mermaid's words or ours."""


def styles(fonts: Path) -> str:
    """Style of the rendering page: the site's fonts, and the kinds' sentinels."""
    rules = []
    for family, stem in FONTS.items():
        data = base64.b64encode((fonts / f"{stem}-wght-normal.woff2").read_bytes()).decode()
        rules.append(
            f"@font-face {{font-family: '{family}'; font-weight: 100 900; "
            f"src: url(data:font/woff2;base64,{data})}}"
        )
    rules.append(".edgeLabel rect {opacity: 1 !important}")
    rules.append(
        ".edgeLabel text, .edgeLabel tspan "
        "{font-family: 'JetBrains Mono' !important; font-size: 12px !important}"
    )
    for kind in KINDS:
        fill, stroke = SENTINEL[kind], SENTINEL[f"{kind}-line"]
        rules.append(
            f".node.{kind} > {SHAPES}, .node.{kind} > .outer-path > path "
            f"{{fill: {fill} !important; stroke: {stroke} !important}}"
        )
    return "\n".join(rules)


@contextmanager
def browser(pages: Path, build: Path) -> Iterator[Callable[[str, str, str, str], str]]:
    """Gives `render(name, source, title, description)`; `pages` has the site's fonts."""
    from tests.browser import FLAGS, executable  # one place knows how to find Chromium

    (code,) = npm.read(PACKAGE, INTEGRITY, ["dist/mermaid.min.js"], build)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        tab = chromium.new_page()
        tab.set_content(f"<style>{styles(pages / 'assets/fonts')}</style>")
        tab.add_script_tag(content=code.decode())
        tab.add_script_tag(path=Path(__file__).with_suffix(".js"))
        names = {sentinel: name for name, sentinel in SENTINEL.items()}
        tab.evaluate("([config, names]) => prepare(config, names)", [CONFIG, names])

        def render(*diagram: str) -> str:
            try:
                return tab.evaluate("diagram => render(...diagram)", diagram)
            except Error as error:
                said = error.message.partition("Error: ")[2] or error.message
                raise RenderFailed(said.partition("\n    at ")[0]) from None

        yield render
        chromium.close()
