"""DoRA: weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353).

Each output's row of weights is a length times a direction. LoRA turns the directions; the
lengths are trained by themselves.

Axes: o output features, i input features, r rank; those before (batch, token) are all rows.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.adapt import dense_weight
from snippets.peft.lora import LoRA


class DoRA(LoRA):
    """y = x W'^T + b with W' = m V / ||V||, V = W + (alpha / r) B A; trained are m, A, B.

    ||V|| is the length of each output's row (the paper's columns, as it writes W transposed). It
    follows V but gets no gradient (section 4.3), which would cost memory for little. m starts as
    ||W||, so that nothing changes before the first step. Parameters are named as in peft's folders:
    those of LoRA, and `lora_magnitude_vector` of o numbers.

    Args:
        base_layer: the linear layer, frozen here; a quantized one gives W by `dequantize()`.
        r: the rank of the change of direction.
        lora_alpha: that change is scaled by alpha / r.
        lora_dropout: on the input, while training.
        use_rslora: scale by alpha / sqrt(r) instead.
        name: by which `switch` finds the adapter.

    Raises:
        ValueError: a rank below 1, or a module that isn't linear.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        lora_alpha: int | float,
        lora_dropout: int | float = 0.0,
        use_rslora: bool = False,
        name: str = "default",
    ):
        kept = {"lora_dropout": lora_dropout, "use_rslora": use_rslora, "name": name}
        super().__init__(base_layer, r=r, lora_alpha=lora_alpha, **kept)
        lengths = dense_weight(base_layer).detach().to(self.lora_A.weight.dtype).norm(dim=1)
        self.lora_magnitude_vector = nn.Parameter(lengths)

    def change(
        self, x: Float[Tensor, "*rows i"], y: Float[Tensor, "*rows o"]
    ) -> Float[Tensor, "*rows o"]:
        dropped = self.lora_dropout(x.to(self.lora_A.weight.dtype))  # *rows i
        factor = self.lora_magnitude_vector / self.length()  # o
        if dropped is x:  # x W^T is there already
            y = y if self.bias is None else y - self.bias
        else:  # W' has no part that sees all of x, so W sees what is left of x too
            weight = dense_weight(self.base_layer)
            y = F.linear(dropped, weight.to(dropped.dtype))
        turned = self.lora_B(self.scaling * self.lora_A(dropped))  # *rows o
        return (factor - 1) * y + factor * turned

    def length(self) -> Float[Tensor, " o"]:
        """||V|| of each row, without a gradient."""
        with torch.no_grad():
            low_rank = super().delta_weight()
            weight = dense_weight(self.base_layer).to(low_rank.dtype)
            return (weight + low_rank).norm(dim=1)

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """W' - W."""
        low_rank = super().delta_weight()
        weight = dense_weight(self.base_layer).to(low_rank.dtype)
        factor = self.lora_magnitude_vector / self.length()  # o
        return factor[:, None] * (weight + low_rank) - weight
