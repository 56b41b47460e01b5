"""LoHa: a Hadamard product of two low-rank matrices (FedPara, Hyeon-Woo et al. 2021,
arXiv:2108.06098).

Multiplied number by number, two matrices of rank r give one of rank up to r², for twice
LoRA's parameters at that r. The name is LyCORIS's (Yeh et al. 2023, arXiv:2309.14859).

Axes: o output features, i input features, r rank.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.adapt import Adapter, device_of


class LoHa(Adapter):
    """y = x (W + D)^T + b, D = (alpha / r) (A1 B1) * (A2 B2), with * number by number.

    B2 starts at zero, so that nothing changes before the first step. Parameters are named and
    shaped as in peft's folders: `hada_w1_a` o x r, `hada_w1_b` r x i, `hada_w2_a`, `hada_w2_b`.

    Args:
        base_layer: the linear layer, frozen here.
        r: the rank of both factors.
        alpha: the change is scaled by alpha / r.
        name: by which `switch` finds the adapter.

    Raises:
        ValueError: a rank below 1, or a module that isn't linear.
    """

    def __init__(self, base_layer: nn.Module, *, r: int, alpha: int | float, name: str = "default"):
        super().__init__(base_layer, name=name)
        if r < 1:
            raise ValueError(f"{r=} is below 1")
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        o, i, device = self.out_features, self.in_features, device_of(base_layer)
        self.hada_w1_a = nn.Parameter(torch.empty(o, r, device=device))
        self.hada_w1_b = nn.Parameter(torch.empty(r, i, device=device))
        self.hada_w2_a = nn.Parameter(torch.empty(o, r, device=device))
        self.hada_w2_b = nn.Parameter(torch.zeros(r, i, device=device))
        for weight in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """(alpha / r) (A1 B1) * (A2 B2)."""
        first = self.hada_w1_a @ self.hada_w1_b  # o i
        second = self.hada_w2_a @ self.hada_w2_b  # o i
        return self.scaling * first * second
