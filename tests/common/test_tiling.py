"""Tiles against the released processor's steps, which are Pillow's `ImageOps.pad` and crops."""

import random

import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageOps
from torch.testing import assert_close

from snippets.common.images import ImageError
from snippets.common.tiling import (
    best_resolution,
    candidate_resolutions,
    effective_and_wasted,
    fit,
    tile,
    tile_images,
)

# As in the published config.json, in tiles.
PUBLISHED = [
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (4, 1), (2, 2), (1, 5), (5, 1), (1, 6), (6, 1),
    (2, 3), (3, 2), (1, 7), (7, 1), (1, 8), (8, 1), (2, 4), (4, 2), (1, 9), (9, 1), (3, 3),
]  # fmt: skip
SMALL = candidate_resolutions(24)


def photograph(width, height, mode="RGB"):
    with Image.open(get_sample_data("grace_hopper.jpg")) as opened:
        return opened.convert("RGB").resize((width, height)).convert(mode)


def released(image, resolution, side):
    """Whole image first, then row by row; 127 is the mean colour cut off."""
    grey = (127, 127, 127)
    views = [ImageOps.pad(image, (side, side), color=grey)]
    canvas = ImageOps.pad(image, resolution, color=grey)
    for y in range(resolution[1] // side):
        for x in range(resolution[0] // side):
            box = (x * side, y * side, (x + 1) * side, (y + 1) * side)
            views.append(canvas.crop(box))
    flat = [torch.tensor(list(view.tobytes())).view(side, side, 3) for view in views]
    return (torch.stack(flat).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def test_the_resolutions_are_the_published_ones():
    found = candidate_resolutions()
    assert found == [(384 * columns, 384 * rows) for columns, rows in PUBLISHED]
    # By the paper: all m, n from 1 with m n up to 9.
    assert set(PUBLISHED) == {(m, n) for m in range(1, 10) for n in range(1, 10) if m * n <= 9}
    assert candidate_resolutions(10, 2) == [(10, 10), (10, 20), (20, 10)]


def test_the_best_resolution_by_force():
    drawn = random.Random(0)
    sizes = [(drawn.randint(1, 3000), drawn.randint(1, 3000)) for _ in range(400)]
    resolutions, seen = candidate_resolutions(), set()
    for width, height in [*sizes, (384, 384), (768, 768), (1152, 384), (100, 100)]:
        best, most, least = None, 0, float("inf")
        for w, h in resolutions:
            scale = min(w / width, h / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            if shown > most or (shown == most and w * h - shown < least):
                best, most, least = (w, h), shown, w * h - shown
        assert best_resolution((width, height), resolutions) == best
        seen.add(best)
    assert len(seen) > 15
    # An image smaller than a tile isn't enlarged to more of them.
    assert best_resolution((100, 100), resolutions) == (384, 384)
    assert best_resolution((1000, 1000), resolutions) == (1152, 1152)
    assert best_resolution((4000, 400), resolutions) == (3456, 384)
    assert isinstance(best_resolution((9, 9), [[8, 8]]), tuple)  # as in config.json


def test_effective_and_wasted_pixels():
    assert effective_and_wasted((200, 100), (384, 384)) == (20000, 384 * 384 - 20000)
    assert effective_and_wasted((2000, 1000), (384, 384)) == (384 * 192, 384 * 192)
    assert effective_and_wasted((768, 384), (768, 384)) == (768 * 384, 0)
    # Each side is cut off to whole pixels: 127.87.
    assert effective_and_wasted((1000, 333), (384, 384))[0] == 384 * 127


@pytest.mark.parametrize(
    "width, height",
    [(50, 50), (73, 31), (31, 73), (24, 24), (7, 5), (150, 15), (15, 150), (1, 1), (61, 60)],
)
def test_views_are_the_released_ones(width, height):
    image = photograph(width, height)
    views, (columns, rows) = tile(image, SMALL)
    assert (columns * 24, rows * 24) == best_resolution(image.size, SMALL)
    expected = released(image, (columns * 24, rows * 24), 24)
    assert len(views) == 1 + columns * rows
    assert_close(views, expected, atol=1e-6, rtol=0)
    assert views.min() >= -1 and views.max() <= 1


def test_borders_of_every_kind():
    for width, height in [(10, 40), (11, 40), (40, 11), (41, 9), (40, 40)]:
        image = photograph(width, height)
        for size in [(24, 24), (25, 25), (48, 24)]:
            found, expected = fit(image, *size), ImageOps.pad(image, size, color=(127,) * 3)
            assert found.tobytes() == expected.tobytes()
    assert fit(photograph(10, 40), 24, 24).getpixel((0, 0)) == (127, 127, 127)


def test_a_photograph_at_full_size():
    with Image.open(get_sample_data("grace_hopper.jpg")) as image:
        views, grid = tile(image)
        assert image.size == (512, 600) and grid == (2, 2)
        assert views.shape == (5, 3, 384, 384)
        assert_close(views, released(image, (768, 768), 384), atol=1e-6, rtol=0)


def test_of_three_images_each_gets_one_tile():
    images = [photograph(70, 30), photograph(30, 70), photograph(50, 50)]
    views, grids = tile_images(images[:2], SMALL)
    assert grids.tolist() == [list(tile(image, SMALL)[1]) for image in images[:2]]
    assert_close(views, torch.cat([tile(image, SMALL)[0] for image in images[:2]]))
    views, grids = tile_images(images, SMALL)
    assert grids.tolist() == [[1, 1]] * 3 and len(views) == 6
    for thumbnail, only in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(thumbnail, only)
    with pytest.raises(ValueError, match="no image"):
        tile_images([])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_images_of_any_mode(mode):
    image = photograph(70, 31, "L" if mode == "I;16" else "RGB")
    image = image.point(lambda v: v * 257, "I").convert("I;16") if mode == "I;16" else (
        image.convert(mode)
    )  # fmt: skip
    views, grid = tile(image, SMALL)
    expected, same = tile(photograph(70, 31, "L") if mode in ("L", "LA", "I;16") else
                          photograph(70, 31).convert(mode).convert("RGB"), SMALL)  # fmt: skip
    assert grid == same and views.shape[1] == 3
    assert_close(views, expected, atol=1e-6, rtol=0)


def test_what_cannot_be_cut_is_refused():
    assert tile(photograph(120, 12), SMALL)[1] == (5, 1)
    with pytest.raises(ImageError, match="1x4000"):
        tile(Image.new("RGB", (4000, 1)), SMALL)
    with pytest.raises(ImageError, match="mode F"):
        tile(Image.new("F", (30, 30)), SMALL)
    with pytest.raises(ValueError, match="30x24 pixels don't make tiles of 24"):
        tile(photograph(30, 24), [(24, 24), (30, 24)])
    with pytest.raises(ValueError, match="24x30 pixels don't make tiles of 24"):
        tile(photograph(24, 30), [(24, 24), (24, 30)])
    with pytest.raises(ValueError, match="no best of 0 resolutions"):
        tile(photograph(30, 24), [])
    with pytest.raises(ValueError, match=r"\(0, 5\)"):
        best_resolution((0, 5), SMALL)
