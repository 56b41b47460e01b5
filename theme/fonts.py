"""The site's fonts: small, and there before the text is drawn.

`python -m theme.fonts` makes them from what Fontsource publishes: the glyphs of Western European
languages, only the weights that the styles ask for. It wants Brotli, which nothing else here does:
`pip install brotli==1.1.0`.

As a MkDocs hook this file has each page ask for its fonts at once. A font that still comes late is
left for the next page (`font-display: optional`): nothing moves under a reader's eyes.
"""

import re
from io import BytesIO
from pathlib import Path

INTER = (
    "@fontsource-variable/inter@5.3.0",
    "sha512-OupL48va4JNofb97w6NYeF9S7W/kHNKM0Er8Dem5nqi4jeOLrV"
    "JDoE8tZEpnMJmtkvNbB1EIPPwHcdkF6b1oUA==",
)
MONO = (
    "@fontsource-variable/jetbrains-mono@5.3.0",
    "sha512-F32xpS2NsGYoQi2ADSkKTgpJj7ozajsGgDJ8woTnqjmIB+dxDI"
    "qImjl4pXZVEExu8UFZ2ndhmX18EBS/hdz3Lw==",
)
# file, package, weights, features of its layout
FONTS = {
    "inter-latin-wght-normal": (INTER, (400, 700), ["kern", "tnum", "ccmp", "mark"]),
    "inter-latin-wght-italic": (INTER, 400, ["kern", "ccmp", "mark"]),
    "jetbrains-mono-latin-wght-normal": (MONO, (400, 700), ["ccmp"]),
}
GLYPHS = [*range(0x20, 0x7F), *range(0xA0, 0x100)]
GLYPHS += map(ord, "ıŒœ–—‘’‚“”„†•…′″−€™")

STYLE = re.compile(r'<link rel="stylesheet" href="(?P<assets>[^"]*)type\.css[^"]*">')
# What stands at the head of a page, and what has to be there for that.
FIRST = {
    "<body": "fonts/inter-latin-wght-normal.woff2",
    "<code": "fonts/jetbrains-mono-latin-wght-normal.woff2",
    'class="katex"': "katex/fonts/KaTeX_Main-Regular.woff2",
    'class="mord mathnormal"': "katex/fonts/KaTeX_Math-Italic.woff2",
}


def on_post_page(output: str, page, config) -> str:
    def with_fonts(style: re.Match) -> str:
        links = [
            '<link rel="preload" as="font" type="font/woff2" crossorigin '
            f'href="{style["assets"]}{font}">'
            for sign, font in FIRST.items()
            if sign in output
        ]
        return "\n".join([*links, style[0]])

    return STYLE.sub(with_fonts, output, count=1)


def smaller(font: bytes, weights: int | tuple[int, int], features: list[str]) -> bytes:
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont
    from fontTools.varLib.instancer import instantiateVariableFont

    options = Options()
    options.layout_features, options.name_IDs = features, ["*"]
    options.hinting = False
    options.notdef_outline = True
    subsetter, file = Subsetter(options), TTFont(BytesIO(font))
    subsetter.populate(unicodes=GLYPHS)
    subsetter.subset(file)
    file = instantiateVariableFont(file, {"wght": weights})
    file.flavor = "woff2"
    file.save(made := BytesIO())
    return made.getvalue()


def main() -> None:
    from theme import npm

    for name, (package, weights, features) in FONTS.items():
        (font,) = npm.read(*package, [f"files/{name}.woff2"], Path("build"))
        data = smaller(font, weights, features)
        Path(f"site_src/assets/fonts/{name}.woff2").write_bytes(data)
        print(f"{name}: {len(font):,} bytes, now {len(data):,}")


if __name__ == "__main__":
    main()
