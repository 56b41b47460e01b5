"""LoKr: a Kronecker product (LyCORIS, Yeh et al. 2023, arXiv:2309.14859; KronA, arXiv:2212.10650).

A small matrix, each of whose numbers is replaced by a multiple of another one: ranks
multiply, so that few parameters give a change of high rank.

Axes: o = o1 o2 output features, i = i1 i2 input features, r rank of a factor that is itself a
product; those before (batch, token) are all rows.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.adapt import Adapter, device_of


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers m <= n with m n = size: as near to each other as can be, or m near `factor`.

    A factor that divides the size is taken as it is, first, also where it is the larger. Else
    m is the largest divisor that is not above the factor (-1: above the root of size).
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    largest = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = max((m for m in range(1, largest + 1) if size % m == 0), default=1)
    return m, size // m


class LoKr(Adapter):
    """y = x (W + D)^T + b, D = (alpha / r) W1 (x) W2, with (x) the Kronecker product.

    W1 is o1 x i1 and W2 o2 x i2. A factor that is large for the rank is the product of two thin
    ones: W2 always, W1 with `decompose_both`. W1 (or its first part) starts at zero, so that
    nothing changes before the first step. Parameters are named and shaped as in peft's
    folders: `lokr_w1` or `lokr_w1_a` and `lokr_w1_b`, and the same for `lokr_w2`.

    Args:
        base_layer: the linear layer, frozen here.
        r: the rank of a factor that is a product, and of the scale.
        alpha: the change is scaled by alpha / r, also where no factor has a rank.
        decompose_both: whether W1 may be a product, too.
        decompose_factor: the wanted o1 and i1; -1: near the root of o and i.
        name: by which `switch` finds the adapter.

    Raises:
        ValueError: a rank below 1, a factor that is neither -1 nor above 0, or a module that
            isn't linear.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        alpha: int | float,
        decompose_both: bool = False,
        decompose_factor: int = -1,
        name: str = "default",
    ):
        super().__init__(base_layer, name=name)
        if r < 1:
            raise ValueError(f"{r=} is below 1")
        if decompose_factor < 1 and decompose_factor != -1:
            raise ValueError(f"{decompose_factor=} is neither -1 nor above 0")
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        self.decompose_both, self.decompose_factor = decompose_both, decompose_factor
        o1, o2 = factorization(self.out_features, decompose_factor)
        i1, i2 = factorization(self.in_features, decompose_factor)
        self.inner = (i1, i2)
        self.add_factor("lokr_w1", o1, i1, thin=decompose_both and r < max(o1, i1) / 2)
        self.add_factor("lokr_w2", o2, i2, thin=r < max(o2, i2) / 2)
        first = self.lokr_w1_a if hasattr(self, "lokr_w1_a") else self.lokr_w1
        nn.init.zeros_(first)

    def add_factor(self, name: str, rows: int, columns: int, *, thin: bool) -> None:
        shapes = {name: (rows, columns)}
        if thin:
            shapes = {f"{name}_a": (rows, self.r), f"{name}_b": (self.r, columns)}
        for part, shape in shapes.items():
            weight = nn.Parameter(torch.empty(shape, device=device_of(self.base_layer)))
            self.register_parameter(part, nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))

    def factor(self, name: str) -> Float[Tensor, "rows columns"]:
        if hasattr(self, name):
            return getattr(self, name)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b")

    def change(
        self, x: Float[Tensor, "*rows i"], y: Float[Tensor, "*rows o"]
    ) -> Float[Tensor, "*rows o"]:
        # With x as an i1 x i2 matrix X, D x is W1 X W2^T read row by row: D is never made.
        w1, w2 = self.factor("lokr_w1"), self.factor("lokr_w2")
        x = x.to(w1.dtype).unflatten(-1, self.inner)  # *rows i1 i2
        return (self.scaling * (w1 @ (x @ w2.T))).flatten(-2)  # *rows o

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """(alpha / r) W1 (x) W2."""
        w1, w2 = self.factor("lokr_w1"), self.factor("lokr_w2")
        return self.scaling * torch.kron(w1, w2.contiguous())
