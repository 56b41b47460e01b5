"""The site's fonts: small, and there before the text is drawn.

`python -m theme.fonts` makes them from what Fontsource and KaTeX publish: the glyphs of Western
European languages, only the weights that the styles ask for, and of KaTeX's largest font only the
letters of sets. It wants Brotli, which nothing else here does: `pip install brotli==1.1.0`.

As a MkDocs hook this file has each page ask for its fonts at once. A font that still comes late is
left for the next page (`font-display: optional`): nothing moves under a reader's eyes.
"""

import json
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
KATEX = (
    "katex@0.19.1",
    "sha512-jG8uKntjSEcm2EpQOh0XturpPuuC9r3Sq5HLHdsFdWZT"
    "27E672SF19QEi+of0/YeOy15lDgRhKvr5614uRrEfA==",
)
WORDS = [*range(0x20, 0x7F), *range(0xA0, 0x100), *map(ord, "ıŒœ–—‘’‚“”„†•…′″−€™")]
# The signs of KaTeX's largest font that formulas may use: of its 28 KB the letters of sets are 4.
AMS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# file below assets: package, file in it, its glyphs (None is all), weights, features of its layout
FONTS = {
    "fonts/inter-latin-wght-normal": (
        INTER, "files", WORDS, (400, 700), ["kern", "tnum", "ccmp", "mark"],
    ),
    "fonts/jetbrains-mono-latin-wght-normal": (MONO, "files", WORDS, (400, 700), ["ccmp"]),
    "katex/fonts/KaTeX_AMS-Regular": (KATEX, "dist/fonts", [*map(ord, AMS)], None, []),
    "katex/fonts/KaTeX_Main-Regular": (KATEX, "dist/fonts", None, None, ["*"]),
    "katex/fonts/KaTeX_Math-Italic": (KATEX, "dist/fonts", None, None, ["*"]),
}  # fmt: skip

STYLE = re.compile(r'<link rel="stylesheet" href="(?P<assets>[^"]*)type\.css[^"]*">')
KATEX_FONT = "katex/fonts/KaTeX_{}-Regular.woff2"
# Fonts, and what stands in a page that shows one.
FIRST = {
    "fonts/inter-latin-wght-normal.woff2": ["<body"],
    "fonts/jetbrains-mono-latin-wght-normal.woff2": ["<code"],
    KATEX_FONT.format("Main"): ['class="katex"'],
    "katex/fonts/KaTeX_Math-Italic.woff2": ['class="mord mathnormal"'],
    KATEX_FONT.format("Size1"): ["delimsizing size1", "op-symbol small-op"],
    KATEX_FONT.format("Size2"): ["delimsizing size2", "op-symbol large-op"],
    KATEX_FONT.format("AMS"): ['class="mord mathbb"'],
    KATEX_FONT.format("Caligraphic"): ['class="mord mathcal"'],
}
# From disk a font can't be asked for before its style: the browser refuses, and says so.
ASK = """\
<script>if (location.protocol !== "file:") for (const href of %s)
document.head.append(Object.assign(document.createElement("link"),
{ rel: "preload", as: "font", type: "font/woff2", crossOrigin: "", href }))</script>"""


def on_post_page(output: str, page, config) -> str:
    style, first = STYLE.search(output), output.find('<link rel="stylesheet"')
    if not style:
        return output
    shown = [font for font, signs in FIRST.items() if any(sign in output for sign in signs)]
    fonts = [style["assets"] + font for font in shown]
    # Before all styles: a script waits for those above it.
    return f"{output[:first]}{ASK % json.dumps(fonts)}\n{output[first:]}"


def smaller(font: bytes, glyphs: list[int] | None, weights, features: list[str]) -> bytes:
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont
    from fontTools.varLib.instancer import instantiateVariableFont

    options = Options()
    options.layout_features, options.name_IDs = features, ["*"]
    options.hinting = False
    options.notdef_outline = True
    subsetter, file = Subsetter(options), TTFont(BytesIO(font))
    subsetter.populate(unicodes=glyphs or file.getBestCmap())
    subsetter.subset(file)
    if weights:
        file = instantiateVariableFont(file, {"wght": weights})
    file.flavor = "woff2"
    file.save(made := BytesIO())
    return made.getvalue()


def main() -> None:
    from theme import npm

    for path, (package, folder, *wanted) in FONTS.items():
        name = f"{folder}/{path.rpartition('/')[2]}.woff2"
        (font,) = npm.read(*package, [name], Path("build"))
        data = smaller(font, *wanted)
        Path(f"site_src/assets/{path}.woff2").write_bytes(data)
        print(f"{path}: {len(font):,} bytes, now {len(data):,}")


if __name__ == "__main__":
    main()
