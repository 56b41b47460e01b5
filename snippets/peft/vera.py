"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2023, arXiv:2310.11454).

All layers share one pair of random frozen matrices; each trains two vectors that scale
their rows. What an adapter weighs on disk is those vectors, and the seed of the pair.

Axes: o output features, i input features, r rank; those before (batch, token) are all rows.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.adapt import Adapter, device_of


class SharedProjections(nn.Module):
    """The frozen pair A, B, as large as the largest layer: one object for all layers.

    Buffers, named as in peft's folders: `vera_A` r x i and `vera_B` o x r. The draw is peft's,
    so that the seed gives the same numbers (on the CPU, whichever device they are for).

    Args:
        layers: those that will share it.
        r: the rank.
        projection_prng_key: the seed of the draw.

    Raises:
        ValueError: a rank below 1, or no layers.
    """

    def __init__(self, layers: Iterable[nn.Module], *, r: int, projection_prng_key: int = 0):
        super().__init__()
        layers = list(layers)
        if r < 1 or not layers:
            raise ValueError(f"no projections of {r=} for {len(layers)} layers")
        self.projection_prng_key = projection_prng_key
        inputs = max(layer.in_features for layer in layers)
        outputs = max(layer.out_features for layer in layers)
        drawn = torch.Generator().manual_seed(projection_prng_key)
        for name, shape in (("vera_A", (r, inputs)), ("vera_B", (outputs, r))):
            bound = math.sqrt(6 / shape[1])  # Kaiming's uniform: a variance of 2 / columns
            matrix = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=drawn)
            self.register_buffer(name, matrix.to(device_of(layers[0])))


class VeRA(Adapter):
    """y = x W^T + b + lambda_b * (B (lambda_d * (A dropout(x)))), trained are both lambdas.

    A and B are the first columns and rows of the shared pair. lambda_b starts at zero, so that
    nothing changes before the first step. Parameters are named as in peft's folders:
    `vera_lambda_b` of o numbers, `vera_lambda_d` of r. There is no alpha.

    Args:
        base_layer: the linear layer, frozen here.
        projections: the pair that all layers of the model share.
        vera_dropout: on the input, while training.
        d_initial: where lambda_d starts.
        name: by which `switch` finds the adapter.

    Raises:
        ValueError: a module that isn't linear, or projections that are too small for it.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        projections: SharedProjections,
        vera_dropout: int | float = 0.0,
        d_initial: int | float = 0.1,
        name: str = "default",
    ):
        super().__init__(base_layer, name=name)
        (r, inputs), outputs = projections.vera_A.shape, len(projections.vera_B)
        if inputs < self.in_features or outputs < self.out_features:
            raise ValueError(
                f"projections of {outputs} x {inputs} are too small for a layer of "
                f"{self.out_features} x {self.in_features}"
            )
        self.projections, self.r, self.d_initial = projections, r, d_initial
        self.vera_dropout = nn.Dropout(vera_dropout) if vera_dropout else nn.Identity()
        device = device_of(base_layer)
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out_features, device=device))
        self.vera_lambda_d = nn.Parameter(torch.full((r,), float(d_initial), device=device))

    def sliced(self) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        """This layer's part of the shared pair."""
        a = self.projections.vera_A[:, : self.in_features]
        return a, self.projections.vera_B[: self.out_features]

    def change(
        self, x: Float[Tensor, "*rows i"], y: Float[Tensor, "*rows o"]
    ) -> Float[Tensor, "*rows o"]:
        a, b = self.sliced()
        x = self.vera_dropout(x.to(self.vera_lambda_d.dtype))
        return self.vera_lambda_b * F.linear(self.vera_lambda_d * F.linear(x, a), b)

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """diag(lambda_b) B diag(lambda_d) A."""
        a, b = self.sliced()
        return (self.vera_lambda_b[:, None] * b) @ (self.vera_lambda_d[:, None] * a)
