"""An image cut into square tiles, with a thumbnail of the whole before them (DeepSeek-VL2).

Of a list of sizes, all multiples of one tile, the best for the image is taken (Wu et al. 2024,
arXiv:2412.10302). Equal to the released processor, which uses Pillow.

Axes: v view (a thumbnail or a tile), c channel, s pixels of a tile's side, n image.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from snippets.common.images import normalise, pixels, rescale, resize, to_rgb

BICUBIC = Image.Resampling.BICUBIC
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
GREY = (127, 127, 127)  # the mean as a colour, cut off to whole numbers: not quite 0 afterwards


def candidate_resolutions(tile: int = 384, most: int = 9) -> list[tuple[int, int]]:
    """Width and height of all grids of up to `most` tiles, in the order of the published list."""
    found = []
    for tiles in range(1, most + 1):
        for columns in range(1, int(tiles**0.5) + 1):
            if tiles % columns == 0:
                rows = tiles // columns
                found += dict.fromkeys([(columns, rows), (rows, columns)])  # a square once
    return [(columns * tile, rows * tile) for columns, rows in found]


def effective_and_wasted(size: tuple[int, int], resolution: Sequence[int]) -> tuple[int, int]:
    """Of a canvas, the pixels that tell of the image, and those that don't.

    The image is scaled to fit. Enlarged it tells no more than before, so that no more than its
    own pixels count; border and surplus are wasted.

    Args:
        size: width and height of the image.
        resolution: width and height of the canvas.
    """
    width, height = size
    scale = min(resolution[0] / width, resolution[1] / height)
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, resolution[0] * resolution[1] - effective


def best_resolution(size: tuple[int, int], resolutions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The one that shows most of an image; of several, the one that wastes least; then the first.

    That is the released rule. The paper has another one: the least border.

    Args:
        size: width and height of the image.
        resolutions: widths and heights to choose from.

    Raises:
        ValueError: nothing to choose from, or an image without pixels.
    """
    if not resolutions or min(size) < 1:
        raise ValueError(f"no best of {len(resolutions)} resolutions for an image of {size}")

    def merit(resolution):
        effective, wasted = effective_and_wasted(size, resolution)
        return effective, -wasted

    return tuple(max(resolutions, key=merit))


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image, scaled, in the middle of a grey canvas of this size.

    Raises:
        ImageError: so long and narrow that nothing of the narrow side would be left.
    """
    new_width, new_height = width, height
    if image.width * height > width * image.height:
        new_height = round(image.height / image.width * width)
    else:
        new_width = round(image.width / image.height * height)
    image = resize(image, new_height, new_width, BICUBIC)
    canvas = Image.new("RGB", (width, height), GREY)
    # One of the two is 0. Python rounds halves to the even number.
    canvas.paste(image, (round((width - new_width) / 2), round((height - new_height) / 2)))
    return canvas


def tile(
    image: Image.Image, resolutions: Sequence[Sequence[int]] | None = None
) -> tuple[Float[Tensor, "v c s s"], tuple[int, int]]:
    """Views of an image, from -1 to 1, and how many columns and rows of tiles there are.

    The first view is the whole image on one tile; then come the tiles of the best resolution,
    row by row. A tile is as wide as the first resolution.

    Args:
        image: of any size and any of Pillow's modes.
        resolutions: widths and heights to choose from; all grids of up to 9 tiles of 384 pixels
            unless given.

    Raises:
        ImageError: too long and narrow, or pixels without a known range.
        ValueError: a resolution that isn't a multiple of the first one's width.
    """
    resolutions = candidate_resolutions() if resolutions is None else resolutions
    image = to_rgb(image)
    width, height = best_resolution(image.size, resolutions)
    side = resolutions[0][0]
    if width % side or height % side:
        raise ValueError(f"{width}x{height} pixels don't make tiles of {side}")
    columns, rows = width // side, height // side
    canvas = fit(image, width, height)
    views = [fit(image, side, side)]
    for y in range(0, height, side):
        views += [canvas.crop((x, y, x + side, y + side)) for x in range(0, width, side)]
    return torch.stack([to_numbers(view) for view in views]), (columns, rows)


def to_numbers(view: Image.Image) -> Float[Tensor, "c s s"]:
    return normalise(rescale(pixels(view), 1 / 255), MEAN, STD)


def tile_images(
    images: Sequence[Image.Image], resolutions: Sequence[Sequence[int]] | None = None
) -> tuple[Float[Tensor, "v c s s"], Int[Tensor, "n 2"]]:
    """All views of a conversation's images, one after the other, and the tiles of each image.

    One or two images are cut as they fit; of three or more, each gets a single tile besides its
    thumbnail, lest the context fill up.

    Raises:
        ImageError, ValueError: as `tile`; ValueError also for no image.
    """
    if not images:
        raise ValueError("no image to cut")
    resolutions = candidate_resolutions() if resolutions is None else resolutions
    side = resolutions[0][0]
    cut = [tile(image, resolutions if len(images) < 3 else [(side, side)]) for image in images]
    return torch.cat([views for views, _ in cut]), torch.tensor([grid for _, grid in cut])
