"""What becomes of a figure: where it shows images, and fewer bytes where it shows none.

Photographs and maps keep their colours in the dark scheme. Everything else of a figure is ink on a
transparent ground, which a theme may turn light.
"""

import base64
from io import BytesIO

from IPython.core import pylabtools

draw = pylabtools.print_figure


def print_figure(figure, fmt="png", **how):
    """As IPython's, which asks for it by this name: the file, and in its metadata the images."""
    data = draw(figure, fmt, **how)
    boxes = image_boxes(figure) if data else []
    if boxes:
        return data, {"images": boxes}
    if data and fmt == "png":
        small = with_palette(base64.b64decode(data) if how.get("base64") else data)
        return base64.b64encode(small).decode() if how.get("base64") else small
    return data


def image_boxes(figure) -> list[list[float]]:
    """Left, top, right and bottom of each drawn image, as percentages of the drawn figure."""
    from matplotlib.collections import QuadMesh
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Bbox

    images, boxes = (AxesImage, QuadMesh), []
    for axes in figure.axes:
        bar = getattr(axes, "_colorbar", None)
        if bar and not isinstance(bar.mappable, images):
            continue  # it explains the colours of points or lines, which don't stay
        for artist in axes.get_children():
            if isinstance(artist, images) and artist.get_visible():
                extent = artist.get_window_extent() if isinstance(artist, AxesImage) else axes.bbox
                seen = Bbox.intersection(extent, axes.bbox)
                if seen:
                    (left, low), (right, high) = figure.transFigure.inverted().transform(seen)
                    sides = (left, 1 - high, right, 1 - low)
                    boxes.append([round(100 * float(side), 2) for side in sides])
    return boxes


EXACT = 160  # of a palette's 256 colours: the commonest, the others stand for shades between them


def with_palette(png: bytes) -> bytes:
    """The picture with one byte a pixel, a third of its size: lines and areas keep their colours,
    of the thousands of shades at their edges each becomes the nearest of some."""
    import numpy
    from PIL import Image

    image = Image.open(BytesIO(png))
    pixels = numpy.array(image.convert("RGBA")).view(numpy.uint32).ravel()
    packed, where, counts = numpy.unique(pixels, return_inverse=True, return_counts=True)
    colours = packed.view(numpy.uint8).reshape(-1, 4).astype(numpy.int32)
    order = numpy.argsort(-counts, kind="stable")
    exact, rest = order[:EXACT], order[EXACT:]
    cells = (colours[rest] >> 5) @ (1, 8, 64, 512)  # of a coarse grid: the commonest in each
    _, first = numpy.unique(cells, return_index=True)
    chosen = numpy.concatenate([exact, rest[numpy.sort(first)]])[:256]

    solid = colours[:, 3:] * colours // 255  # as they are seen
    solid[:, 3] = colours[:, 3]
    nearest = numpy.empty(len(solid), numpy.uint8)
    for at in range(0, len(solid), 4096):
        apart = solid[at : at + 4096, None] - solid[chosen]
        nearest[at : at + 4096] = (apart**2).sum(-1).argmin(1)

    small = Image.fromarray(nearest[where].reshape(image.height, image.width), "P")
    small.putpalette(packed[chosen].tobytes(), "RGBA")
    small.save(made := BytesIO(), "PNG", dpi=image.info["dpi"])
    return made.getvalue()
