import torch


def calls(m):
    words = m.Words()

    def told(seed, glyphs, form):
        scenes = m.random_scenes(5, generator=seeded(seed), glyphs=glyphs)
        return words.encode([m.caption(scene, form) for scene in scenes]), m.same(scenes, scenes)

    def drawn(seed, glyphs, side):
        scenes = m.random_scenes(5, generator=seeded(seed), glyphs=glyphs)
        return m.render(scenes, generator=seeded(seed), side=side, size=11)

    glyphs = m.Glyph("red", "A"), m.Glyph("blue", "K")
    scenes = [m.Scene(glyphs), m.Scene(glyphs, "column"), m.Scene(glyphs[:1])]

    def alike(x):
        return x * m.same(scenes, scenes[1:])

    return [
        (alike, torch.ones(3, 2)),
        (told, 0, 2, 3),
        (told, 1, 3, 4),
        (drawn, 0, 2, 32),
        (drawn, 1, 3, 48),
    ]


def seeded(seed):
    return torch.Generator().manual_seed(seed)
