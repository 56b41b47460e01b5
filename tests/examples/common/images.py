from PIL import Image


def calls(m):
    numbers = {"resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    cropped = {"do_center_crop": True, "crop_size": {"height": 15, "width": 19}}
    stretched = m.ImageProcessor(size={"height": 13, "width": 17}, **numbers)
    covered = m.ImageProcessor(size={"shortest_edge": 16}, **cropped, **numbers)
    padded = m.ImageProcessor(
        size={"longest_edge": 21}, do_pad=True, pad_size={"height": 24, "width": 24}, **numbers
    )
    return [
        (stretched, [ramp(), ramp().rotate(90)]),
        (covered, ramp()),
        (padded, ramp()),
        (lambda x: m.normalise(x, [0.5], [0.25]), m.pixels(ramp().convert("L"))),
        (m.scaled_size, 1200, 1800, 1024),
    ]


def ramp():
    """A picture that is the same each time."""
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(a) for a in (0, 40, 130)])
