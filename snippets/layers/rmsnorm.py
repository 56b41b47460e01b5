"""Root mean square layer normalisation (Zhang & Sennrich 2019, arXiv:1910.07467).

`RMSNorm` is the form of Llama checkpoints, `UnitOffsetRMSNorm` that of Gemma's.
They differ in how the gain is stored and in where half precision is rounded.

Axes: d hidden size; the axes before it (batch, token, head) are all rows.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rms_normalize(x: Float[Tensor, "*rows d"], eps: float) -> Float[Tensor, "*rows d"]:
    """x / sqrt(mean(x²) + eps) over the last axis, in float32 or float64.

    The result is not rounded back to the dtype of x: where to round is the
    caller's choice.
    """
    # Upcast before squaring: in float16 the square of 256 is infinite, and the
    # whole row would turn to zeros.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # eps stands under the root, as in Llama, Gemma and torch.nn; the authors'
    # own code adds it to the root.
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # *rows d


def refuse_other_size(x: Float[Tensor, "*rows d"], hidden_size: int) -> None:
    """Broadcasting would take a last axis of 1, or a weight of 1, for any size."""
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x of shape {tuple(x.shape)} with {hidden_size=}")


class RMSNorm(nn.Module):
    """w · round(x / rms(x)) as in Llama: rounds to x's dtype, then multiplies.

    In half precision the product is rounded again. A float32 weight makes the
    result float32 whatever the dtype of x. Differs from transformers'
    LlamaRMSNorm for float64 only, which that class takes down to float32.

    Raises:
        ValueError: hidden_size is below 1, or x's last axis has another size.
    """

    def __init__(self, *, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"nothing to normalise: {hidden_size=}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        refuse_other_size(x, len(self.weight))
        return self.weight * rms_normalize(x, self.eps).to(x.dtype)


class UnitOffsetRMSNorm(nn.Module):
    """round((1 + w) · x / rms(x)) as in Gemma: rounds once, at the end.

    The weight is the gain's distance from 1: zeros are the identity gain,
    weight decay pulls towards it, and half precision stores it in finer steps
    than a number near 1.

    Raises:
        ValueError: hidden_size is below 1, or x's last axis has another size.
    """

    def __init__(self, *, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"nothing to normalise: {hidden_size=}")
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        refuse_other_size(x, len(self.weight))
        y = rms_normalize(x, self.eps)
        # The sum needs the upcast too: in bfloat16, 1 + 0.003 is 1.
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)
