"""Pictures whose captions say all that is in them: coloured letters in a row or a column.

Real glyphs of a real typeface, drawn by Pillow, at places that differ each time. No two scenes
of a list have the same caption, so that finding a picture by its caption has one right answer.

Axes: b scene, c channel, y x pixel, t word.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from snippets.common.images import pixels

COLOURS = {
    "red": (200, 30, 30),
    "green": (20, 130, 40),
    "blue": (30, 60, 200),
    "pink": (240, 90, 170),
    "purple": (130, 30, 150),
    "brown": (110, 65, 25),
    "black": (0, 0, 0),
    "grey": (130, 130, 130),
}
LETTERS = "ABCDEFGHJKLMNPRTUXYZ"  # without those that look like another
# How a glyph stands to the next one and to the one before; where the layout starts and ends.
PLACES = {
    "row": ("left of", "right of", "left", "right"),
    "column": ("above", "below", "top", "bottom"),
}
FORMS = 6
PAD, END = "<pad>", "<end>"


@dataclass(frozen=True)
class Glyph:
    """A letter, and a colour of `COLOURS`."""

    colour: str
    letter: str

    def __str__(self) -> str:
        return f"{self.colour} {self.letter}"


@dataclass(frozen=True)
class Scene:
    """Glyphs from left to right ("row") or from top to bottom ("column").

    Raises:
        ValueError: no glyph, or another layout.
    """

    glyphs: tuple[Glyph, ...]
    layout: str = "row"

    def __post_init__(self):
        if not self.glyphs or self.layout not in PLACES:
            raise ValueError(f"{len(self.glyphs)} glyphs in layout={self.layout!r}")


def random_scenes(
    count: int,
    *,
    generator: torch.Generator,
    glyphs: int = 2,
    letters: Sequence[str] = LETTERS,
    colours: Sequence[str] = tuple(COLOURS),
    layouts: Sequence[str] = ("row", "column"),
) -> list[Scene]:
    """Scenes that all differ, with as many glyphs each, drawn evenly.

    Within a scene neither a letter nor a colour comes twice, so that glyphs can exchange their
    colours, or places, and be another scene. A single glyph stands in a "row", as its caption
    names no place.

    Raises:
        ValueError: there aren't so many.
    """
    layouts = layouts if glyphs > 1 else ("row",)
    most = math.perm(len(letters), glyphs) * math.perm(len(colours), glyphs) * len(layouts)
    if count > most:
        raise ValueError(f"{count} scenes of {glyphs} glyphs wanted, there are {most}")

    def some(values: Sequence[str], n: int) -> list[str]:
        return [values[i] for i in torch.randperm(len(values), generator=generator)[:n]]

    found: dict[Scene, None] = {}  # in the order of drawing, which a set forgets
    while len(found) < count:
        pairs = zip(some(colours, glyphs), some(letters, glyphs), strict=True)
        found[Scene(tuple(Glyph(*pair) for pair in pairs), *some(layouts, 1))] = None
    return list(found)


def caption(scene: Scene, form: int = 0) -> str:
    """One of `FORMS` ways to say a scene; all words are set apart by spaces.

    0: a red A left of a blue K; 1: a blue K right of a red A; 2: a red A , right of it a blue K;
    3: a blue K , left of it a red A; 4: from left to right a red A , a blue K; 5: from right to
    left a blue K , a red A. A single glyph is "a red A" in each.

    Raises:
        ValueError: another form.
    """
    if not 0 <= form < FORMS:
        raise ValueError(f"{form=} isn't one of {FORMS}")
    before, behind, start, end = PLACES[scene.layout]
    names = [f"a {glyph}" for glyph in scene.glyphs]
    if form % 2:
        names, before, behind, start, end = names[::-1], behind, before, end, start
    between = (f" {before} ", f" , {behind} it ", " , ")[form // 2]
    head = f"from {start} to {end} " if form // 2 == 2 and len(names) > 1 else ""
    return head + between.join(names)


def swapped(scene: Scene) -> Scene:
    """The same letters at the same places, with the colours in reverse."""
    colours = [glyph.colour for glyph in scene.glyphs][::-1]
    pairs = zip(colours, scene.glyphs, strict=True)
    return Scene(tuple(Glyph(colour, glyph.letter) for colour, glyph in pairs), scene.layout)


def reversed_scene(scene: Scene) -> Scene:
    """The same glyphs in the reverse order of places."""
    return Scene(scene.glyphs[::-1], scene.layout)


def same(scenes: Sequence[Scene], others: Sequence[Scene]) -> Bool[Tensor, "i j"]:
    """Which scenes say the same, in whatever form: all of these are right answers."""
    return torch.tensor([[one == other for other in others] for one in scenes])


def draw(
    scene: Scene,
    *,
    generator: torch.Generator,
    side: int = 32,
    size: int = 16,
    font: str | Path | None = None,
) -> Image.Image:
    """A scene on light grey, each glyph somewhere in its share of a row or column somewhere.

    Args:
        side: pixels of the square.
        size: of the type in pixels; a capital letter is about 0.7 of it high.
        font: a file of a typeface; None is the one that comes with Pillow.

    Raises:
        ValueError: a glyph is larger than its share.
    """
    shade = 225 + int(31 * torch.rand((), generator=generator))
    image = Image.new("RGB", (side, side), (shade,) * 3)
    pen, type_ = ImageDraw.Draw(image), typeface(font, size)
    share = side // len(scene.glyphs)
    # Across, all stand near one line: a row whose glyphs fell as well could be a column.
    line, row = torch.rand((), generator=generator).item(), scene.layout == "row"
    for number, glyph in enumerate(scene.glyphs):
        left, top, right, bottom = pen.textbbox((0, 0), glyph.letter, font=type_)
        ink = (math.ceil(right - left), math.ceil(bottom - top))
        room = (share, side) if row else (side, share)
        if ink[0] > room[0] or ink[1] > room[1]:
            raise ValueError(f"a glyph of {ink} pixels has no place in {room}: {size=}, {side=}")
        along, off = torch.rand(2, generator=generator).tolist()
        across = min(max(line + 0.2 * (off - 0.5), 0.0), 1.0)
        place = (along, across) if row else (across, along)
        x, y = (round(p * (r - i)) for p, r, i in zip(place, room, ink, strict=True))
        x, y = (x + number * share, y) if row else (x, y + number * share)
        pen.text((x - left, y - top), glyph.letter, fill=COLOURS[glyph.colour], font=type_)
    return image


@cache
def typeface(font: str | Path | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if font is None else ImageFont.truetype(str(font), size)


def render(
    scenes: Sequence[Scene],
    *,
    generator: torch.Generator,
    side: int = 32,
    size: int = 16,
    fonts: Sequence[str | Path | None] = (None,),
) -> Float[Tensor, "b 3 y x"]:
    """The scenes drawn, each in one of the typefaces, from -1 for black to 1 for white."""
    drawn = []
    for scene in scenes:
        font = fonts[int(len(fonts) * torch.rand((), generator=generator))]
        image = draw(scene, generator=generator, side=side, size=size, font=font)
        drawn.append(pixels(image) / 127.5 - 1)
    return torch.stack(drawn)


class Words:
    """Captions as numbers, a word each; the end has the largest number, padding is 0."""

    def __init__(self, letters: Sequence[str] = LETTERS, colours: Sequence[str] = tuple(COLOURS)):
        said = {word for ways in PLACES.values() for way in ways for word in way.split()}
        words = sorted(said | {"a", ",", "it", "from", "to"})
        self.words = [PAD, *words, *colours, *letters, END]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    @property
    def end(self) -> int:
        """The number of the end."""
        return len(self.words) - 1

    def encode(self, captions: Sequence[str], length: int | None = None) -> Int[Tensor, "b t"]:
        """Each caption, its end, and padding up to `length` or the longest.

        Raises:
            ValueError: a word that isn't known, or a caption longer than `length`.
        """
        split = [text.split() for text in captions]
        if unknown := sorted({w for words in split for w in words} - self.numbers.keys()):
            raise ValueError(f"unknown words: {', '.join(unknown)}")
        longest = max(map(len, split)) + 1
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a caption of {longest} tokens with its end, {length=}")
        rows = [[self.numbers[w] for w in words] + [self.end] for words in split]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def decode(self, ids: Int[Tensor, " t"]) -> str:
        """The words up to the end."""
        words = [self.words[i] for i in ids.tolist()]
        return " ".join(words[: words.index(END)] if END in words else words)
