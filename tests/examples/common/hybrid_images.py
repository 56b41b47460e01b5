from PIL import Image


def calls(m):
    low = {"size": {"height": 16, "width": 16}, "resample": 3, "min_size": 2, "do_pad": True}
    low |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    high = low | {"size": {"height": 40, "width": 40}}
    processor = m.HybridImageProcessor(m.ImageProcessor(**low), m.ImageProcessor(**high))
    gradient = Image.linear_gradient("L").resize((50, 31))
    both = [gradient, gradient.rotate(90, expand=True)]
    return [(processor, gradient), (processor, both), (processor.high.new_size, 60, 19)]
