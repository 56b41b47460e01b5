import torch
from torch import nn


def calls(m):
    def layer(**options):
        made = m.LoHa(nn.Linear(12, 20), r=2, alpha=7, **options)
        for weight in made.own_parameters().values():
            nn.init.normal_(weight)
        return made

    return [
        (layer(), torch.randn(2, 5, 12)),
        (layer(), torch.randn(12)),
    ]
