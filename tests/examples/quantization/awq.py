import torch
from torch import nn


def calls(m):
    x = torch.randn(2, 7, 24)
    x[..., 3::10] *= 20
    linear = nn.Linear(24, 10, bias=False)

    def search(x):
        linear.to(x.dtype)
        return m.search_scales(linear, ["weight"], x, bits=3, group_size=8, steps=8)

    def clip(weight, x):
        return m.search_clip(weight, x, bits=3, group_size=8)

    return [
        (m.channel_magnitudes, x),
        (lambda magnitudes: m.scales_of(magnitudes, 0.5), torch.rand(24)),
        (clip, torch.randn(10, 24), x),
        (search, x),
        (m.AWQLinear(linear, bits=3, group_size=8), x),
        (m.AWQLinear(linear, bits=4), x),
    ]
