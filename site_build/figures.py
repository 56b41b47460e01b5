"""Where a figure shows images: photographs and maps keep their colours in the dark scheme.

Everything else of a figure is ink on a transparent ground, which a theme may turn light.
"""

from IPython.core import pylabtools

draw = pylabtools.print_figure


def print_figure(figure, fmt="png", **how):
    """As IPython's, which asks for it by this name: the file, and in its metadata the images."""
    data = draw(figure, fmt, **how)
    boxes = image_boxes(figure) if data else []
    return (data, {"images": boxes}) if boxes else data


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
