import torch
from torch import nn


class Constant:
    """Makes an adapter class of the module's base: adds a trained matrix."""

    def __new__(cls, m):
        class Whole(m.Adapter):
            def __init__(self, base_layer):
                super().__init__(base_layer)
                size = base_layer.out_features, base_layer.in_features
                self.delta = nn.Parameter(torch.randn(size))

            def delta_weight(self):
                return self.delta

        return Whole


def calls(m):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    m.adapt(model, ["0"], Constant(m), modules_to_save=["2"])
    merged = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    m.adapt(merged, "all-linear", Constant(m))
    return [(model, torch.randn(3, 6)), (m.merge_and_unload(merged), torch.randn(3, 6))]
