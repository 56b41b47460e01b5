from PIL import Image


def calls(m):
    sizes = [(20, 20), (20, 40), (40, 20), (40, 40)]
    photograph = Image.linear_gradient("L").resize((70, 31))
    return [
        (m.best_resolution, (70, 31), sizes),
        (m.tile, photograph, sizes),
        (m.tile_images, [photograph, photograph.rotate(90, expand=True)], sizes),
    ]
