"""Scenes of glyphs: what a caption says is what is drawn, and no caption is there twice."""

import itertools
from collections import Counter

import pytest
import torch
from matplotlib import font_manager

from snippets.common.scenes import (
    COLOURS,
    FORMS,
    LETTERS,
    Glyph,
    Scene,
    Words,
    caption,
    draw,
    random_scenes,
    render,
    reversed_scene,
    same,
    swapped,
)

A, K, T = Glyph("red", "A"), Glyph("blue", "K"), Glyph("green", "T")
DEJAVU = font_manager.findfont("DejaVu Serif")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_captions():
    row = [caption(Scene((A, K)), form) for form in range(FORMS)]
    assert row == [
        "a red A left of a blue K",
        "a blue K right of a red A",
        "a red A , right of it a blue K",
        "a blue K , left of it a red A",
        "from left to right a red A , a blue K",
        "from right to left a blue K , a red A",
    ]
    column = [caption(Scene((A, K, T), "column"), form) for form in range(FORMS)]
    assert column == [
        "a red A above a blue K above a green T",
        "a green T below a blue K below a red A",
        "a red A , below it a blue K , below it a green T",
        "a green T , above it a blue K , above it a red A",
        "from top to bottom a red A , a blue K , a green T",
        "from bottom to top a green T , a blue K , a red A",
    ]
    assert {caption(Scene((A,)), form) for form in range(FORMS)} == {"a red A"}
    for form in (-1, FORMS):
        with pytest.raises(ValueError, match=f"{form=} isn't one of 6"):
            caption(Scene((A,)), form)


def test_no_caption_says_two_scenes():
    scenes = random_scenes(
        2 * (3 * 2) * (4 * 3), generator=seeded(), letters="AKT", colours=[*COLOURS][:4]
    )
    every = [caption(scene, form) for scene in scenes for form in range(FORMS)]
    assert len(set(every)) == len(every) == 144 * FORMS
    assert same(scenes, scenes).equal(torch.eye(144, dtype=torch.bool))


@pytest.mark.parametrize("glyphs", [1, 2, 3])
def test_scenes_differ_and_neither_letter_nor_colour_comes_twice_in_one(glyphs):
    scenes = random_scenes(100, generator=seeded(), glyphs=glyphs)
    assert len(set(scenes)) == 100
    for scene in scenes:
        for part in ("letter", "colour"):
            assert len({getattr(glyph, part) for glyph in scene.glyphs}) == glyphs
    first = Counter(scene.glyphs[0].letter for scene in scenes)
    assert len(first) > len(LETTERS) / 2 and max(first.values()) < 20
    layouts = Counter(scene.layout for scene in scenes)
    assert set(layouts) == ({"row"} if glyphs == 1 else {"row", "column"})
    assert scenes == random_scenes(100, generator=seeded(), glyphs=glyphs)
    assert scenes != random_scenes(100, generator=seeded(1), glyphs=glyphs)


def test_what_there_is_not_is_refused():
    few = dict(generator=seeded(), letters="AK", colours=["red", "blue", "green"])
    assert len(random_scenes(24, **few)) == 24
    with pytest.raises(ValueError, match="25 scenes of 2 glyphs wanted, there are 24"):
        random_scenes(25, **few)
    with pytest.raises(ValueError, match="7 scenes of 1 glyphs wanted, there are 6"):
        random_scenes(7, glyphs=1, **few)
    with pytest.raises(ValueError, match="0 glyphs in layout='row'"):
        Scene(())
    with pytest.raises(ValueError, match="2 glyphs in layout='ring'"):
        Scene((A, K), "ring")


def test_changes():
    scene = Scene((A, K, T), "column")
    assert caption(swapped(scene)) == "a green A above a blue K above a red T"
    assert caption(reversed_scene(scene)) == "a green T above a blue K above a red A"
    assert swapped(swapped(scene)) == scene == reversed_scene(reversed_scene(scene))
    others = [swapped(scene), scene, Scene(scene.glyphs)]
    assert same([scene, others[0]], others).tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("font, side, size", [(None, 32, 16), (DEJAVU, 41, 19), (None, 20, 10)])
@pytest.mark.parametrize("layout", ["row", "column"])
def test_a_glyph_stands_where_the_caption_says_in_its_colour(layout, font, side, size):
    drawn = seeded()
    for left, right in itertools.pairwise("AKTZX"):
        scene = Scene((Glyph("red", left), Glyph("blue", right)), layout)
        image = draw(scene, generator=drawn, side=side, size=size, font=font)
        assert image.size == (side, side)
        x = torch.tensor(list(image.convert("RGB").tobytes())).view(side, side, 3).float()
        red, blue = x[..., 0] - x[..., 2] > 60, x[..., 2] - x[..., 0] > 60
        assert min(red.sum(), blue.sum()) > size / 2
        axis = 1 if layout == "row" else 0
        first, second = red.nonzero()[:, axis], blue.nonzero()[:, axis]
        assert first.max() < side // 2 <= second.min()
        # Near one line, so that the other layout can't be meant.
        across = [c.nonzero()[:, 1 - axis].float().mean() for c in (red, blue)]
        assert abs(across[0] - across[1]) < 0.25 * side
        assert x[0, 0].min() >= 225 or red[0, 0] or blue[0, 0]


def test_each_letter_of_each_typeface_fits():
    for font in (None, DEJAVU, font_manager.findfont("DejaVu Sans Mono")):
        for letter in LETTERS:
            draw(Scene((Glyph("red", letter), K), "row"), generator=seeded(), side=36, font=font)
    with pytest.raises(
        ValueError, match=r"a glyph of \(\d+, \d+\) pixels has no place in \(10, 20\)"
    ):
        draw(Scene((A, K)), generator=seeded(), side=20, size=19)


def test_rendered_scenes():
    scenes = random_scenes(40, generator=seeded())
    images = render(scenes, generator=seeded(), fonts=(None, DEJAVU), side=36)
    assert images.shape == (40, 3, 36, 36) and images.dtype == torch.float32
    assert images.amin() >= -1 and images.amax() <= 1 and images.amax() > 0.9
    again = render(scenes, generator=seeded(), fonts=(None, DEJAVU), side=36)
    assert torch.equal(images, again)
    other = render(scenes, generator=seeded(1), fonts=(None, DEJAVU), side=36)
    assert (images != other).flatten(1).any(1).all()
    fixed = [render([Scene((A,))] * 60, generator=seeded(), fonts=f) for f in [(None,), (DEJAVU,)]]
    mixed = render([Scene((A,))] * 60, generator=seeded(), fonts=(None, DEJAVU))
    is_first, is_second = ((mixed == one).flatten(1).all(1) for one in fixed)
    assert 15 < is_first.sum() < 45 and (is_first ^ is_second).all()


def test_words():
    words = Words()
    texts = [caption(Scene((A, K)), 0), caption(Scene((A,))), caption(Scene((A, K, T)), 4)]
    ids = words.encode(texts)
    assert ids.shape == (3, 16) and ids.max() == words.end == len(words.words) - 1
    ends = (ids == words.end).int()
    assert ends.sum(1).tolist() == [1, 1, 1]
    assert ends.argmax(1).tolist() == [len(text.split()) for text in texts]
    assert (ids == 0).sum(1).tolist() == [16 - 1 - len(text.split()) for text in texts]
    assert [words.decode(row) for row in ids] == texts
    assert words.encode(texts[:1], 20).shape == (1, 20)
    assert len(set(words.words)) == len(words.words)
    with pytest.raises(ValueError, match="a caption of 9 tokens with its end, length=8"):
        words.encode(texts[:1], 8)
    with pytest.raises(ValueError, match="unknown words: Q, ultramarine"):
        words.encode(["a ultramarine Q"])


def test_all_captions_are_known():
    words = Words("AKTZ", ["red", "blue", "green"])
    scenes = random_scenes(60, generator=seeded(), letters="AKTZ", colours=["red", "blue", "green"])
    for form in range(FORMS):
        words.encode([caption(scene, form) for scene in scenes])
