import torch
from torch import nn


def calls(m):
    layer = nn.Linear(7, 5)

    def inside(x):
        with m.onednn_products(layer) as found, torch.no_grad():
            return layer(x), len(found)

    @torch.no_grad()
    def product(x, weight, bias):
        return m.product(x, weight, bias)

    return [
        (inside, torch.randn(2, 3, 7)),
        (product, torch.randn(2, 7), torch.randn(5, 7), torch.randn(5)),
    ]
