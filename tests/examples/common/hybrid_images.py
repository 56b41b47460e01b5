from PIL import Image


def calls(m):
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 3, "do_pad": True}
    low = m.ImageProcessor(size={"height": 9, "width": 9}, resample=2, **numbers)
    high = m.ImageProcessor(size={"height": 24, "width": 24}, resample=3, **numbers)
    picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(a) for a in (0, 40, 130)])
    return [(m.HybridImageProcessor(low, high), [picture, picture.resize((60, 20))])]
