"""Gated feed-forward layers (Dauphin et al. 2016, arXiv:1612.08083).

One linear map decides, through an activation, how much of another one passes. Shazeer
2020 (arXiv:2002.05202) put the gate into transformers and named the variants by
activation: GLU (sigmoid), ReGLU (relu), GEGLU (gelu) and SwiGLU (silu). Llama takes
silu, Gemma the tanh form of gelu.

Axes: b batch, t token, d hidden size, f intermediate size.
"""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# By the values of `hidden_act` in published configs. The two gelus differ by up to
# about 5e-4, enough to change what a model writes.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


class GatedMLP(nn.Module):
    """y = (act(x W_gate^T) * (x W_up^T)) W_down^T, for each token alone.

    Without the gate, y = act(x W_up^T) W_down^T, a layer has two matrices and not three:
    at equal parameters the gated one has 2/3 of the intermediate size.
    Parameters are named and shaped as in Llama checkpoints.

    Raises:
        ValueError: an activation that is not in `ACTIVATIONS`.
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
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"unknown {hidden_act=}; known: {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[hidden_act]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        gate = self.activation(self.gate_proj(x))  # b t f
        return self.down_proj(gate * self.up_proj(x))
