"""Gated feed-forward layers (Dauphin et al. 2016, arXiv:1612.08083).

One linear map decides, through an activation, how much of another one passes.
Shazeer 2020 (arXiv:2002.05202) put the gate into transformers and named the
variants by activation: GLU (sigmoid), Bilinear (none), ReGLU (relu), GEGLU
(gelu), SwiGLU (silu). Llama takes silu, Gemma the tanh form of gelu.

Axes: d hidden size, f intermediate size; those before (batch, token) are all rows.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def quick_gelu(x: Float[Tensor, "*rows f"]) -> Float[Tensor, "*rows f"]:
    """x · sigmoid(1.702 x), the gelu of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def identity(x: Float[Tensor, "*rows f"]) -> Float[Tensor, "*rows f"]:
    """x; with it the gated layer is a product of two linear maps."""
    return x


# By the values of `hidden_act` in published configs. The gelus aren't one function:
# the tanh form strays from the first by up to 5e-4, the quick one by up to 0.02.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "linear": identity,
}


class GatedMLP(nn.Module):
    """y = (act(x W_gate^T) * (x W_up^T)) W_down^T, for each row alone.

    The activation is on the gate, never on `up`: exchanged they fit as well, and
    give another layer. Parameters are named and shaped as in Llama checkpoints.

    Raises:
        ValueError: an activation that is not in `ACTIVATIONS`, or a size below 1.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "silu",
        bias: bool = False,
    ):
        super().__init__()
        refuse_unfit(hidden_size, intermediate_size, hidden_act)
        self.activation = ACTIVATIONS[hidden_act]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        gate = self.activation(self.gate_proj(x))  # *rows f
        return self.down_proj(gate * self.up_proj(x))


class MLP(nn.Module):
    """y = act(x W_up^T) W_down^T, the layer without a gate (Vaswani et al. 2017).

    Two matrices, not three: with as many parameters it has 3/2 of the gated
    layer's intermediate size.

    Raises:
        ValueError: an activation that is not in `ACTIVATIONS`, or a size below 1.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "relu",
        bias: bool = False,
    ):
        super().__init__()
        refuse_unfit(hidden_size, intermediate_size, hidden_act)
        self.activation = ACTIVATIONS[hidden_act]
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.down_proj(self.activation(self.up_proj(x)))


def refuse_unfit(hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
    """Either would make a layer, or fail, without saying why."""
    if min(hidden_size, intermediate_size) < 1:
        raise ValueError(f"no layer: {hidden_size=}, {intermediate_size=}")
    if hidden_act not in ACTIVATIONS:
        raise ValueError(f"unknown {hidden_act=}; known: {', '.join(ACTIVATIONS)}")


def llama_intermediate_size(
    *, hidden_size: int, multiple_of: int = 256, ffn_dim_multiplier: float = 1.0
) -> int:
    """f of a Llama, from the params.json of its release, which doesn't state it.

    2/3 of 4 d, so that three matrices weigh as much as two of 4 d; times the
    multiplier; rounded up. Truncates twice on the way, as the released code does.
    """
    f = int(2 * (4 * hidden_size) / 3)
    f = int(ffn_dim_multiplier * f)
    return -(-f // multiple_of) * multiple_of
