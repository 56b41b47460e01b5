"""Layer normalisation (Ba, Kiros & Hinton 2016, arXiv:1607.06450), before or after a sublayer.

`LayerNorm` is the layer of GPT-2 and BERT. `pre_norm` and `post_norm` are their two ways to
place it beside the residual stream (Xiong et al. 2020, arXiv:2002.04745).

Axes: d hidden size; the axes before it (batch, token) are all rows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Sublayer = Callable[[Tensor], Tensor]  # attention or MLP: keeps the shape of its input


def standardize(x: Float[Tensor, "*rows d"], eps: float) -> Float[Tensor, "*rows d"]:
    """(x - mean(x)) / sqrt(var(x) + eps) over the last axis, in float32 or float64.

    The result is not rounded back to the dtype of x: gain and bias come first.
    """
    # In float16 a square overflows from 256 on, and an eps of 1e-12 is zero.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # The mean goes before anything is squared: mean(x²) - mean(x)² is the same number on
    # paper, but cancels to noise, or below zero, when the mean is large.
    centred = x - x.mean(-1, keepdim=True)
    # Divided by d, as in the paper. `Tensor.var` divides by d - 1 unless told otherwise.
    variance = centred.square().mean(-1, keepdim=True)  # *rows 1
    return centred * torch.rsqrt(variance + eps)


class LayerNorm(nn.Module):
    """w · (x - mean(x)) / sqrt(var(x) + eps) + b, rounded to the dtype of x once, at the end.

    Parameters are named as in GPT-2 and BERT checkpoints (the first BERT files say gamma and
    beta). Take eps from the configuration: `layer_norm_epsilon` in GPT-2's is 1e-5,
    `layer_norm_eps` in BERT's is 1e-12.

    Raises:
        ValueError: hidden_size is below 1, or x's last axis has another size.
    """

    def __init__(self, *, hidden_size: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"nothing to normalise: {hidden_size=}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size)) if bias else None

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if x.shape[-1] != len(self.weight):  # broadcasting would take a 1 for any size
            raise ValueError(f"x of shape {tuple(x.shape)} with hidden_size={len(self.weight)}")
        y = standardize(x, self.eps)
        y = y * self.weight.to(y.dtype)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)


def pre_norm(
    x: Float[Tensor, "*rows d"], norm: nn.Module, sublayer: Sublayer
) -> Float[Tensor, "*rows d"]:
    """x + sublayer(norm(x)), as in GPT-2: no norm on the way from block to block.

    The stream grows with depth, so a stack of these ends with one more norm.
    """
    return x + sublayer(norm(x))


def post_norm(
    x: Float[Tensor, "*rows d"], norm: nn.Module, sublayer: Sublayer
) -> Float[Tensor, "*rows d"]:
    """norm(x + sublayer(x)), as in BERT and the first transformer: the norm is on the way."""
    return norm(x + sublayer(x))
