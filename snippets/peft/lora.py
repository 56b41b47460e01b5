"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

A frozen matrix is changed by a product of two thin ones, and only these are trained. rsLoRA
(Kalajdzievski 2023, arXiv:2312.03732) scales by the root of the rank; PiSSA (Meng et al. 2024,
arXiv:2404.02948) starts from the matrix's own largest singular vectors.

Axes: o output features, i input features, r rank; those before (batch, token) are all rows.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.adapt import Adapter, dense_weight, device_of


class LoRA(Adapter):
    """y = x W^T + b + (alpha / r) dropout(x) A^T B^T, where only A and B are trained.

    B starts at zero, so that nothing changes before the first step. Parameters are named and
    shaped as in peft's folders: `lora_A.weight` r x i, `lora_B.weight` o x r.

    Args:
        base_layer: the linear layer, frozen here.
        r: the rank of the change.
        lora_alpha: the change is scaled by alpha / r, so that it keeps its size at another r.
        lora_dropout: on the input of A, while training.
        use_rslora: scale by alpha / sqrt(r) instead.
        pissa: start A and B as the principal part of W, which keeps the residual.
        name: by which `switch` finds the adapter.

    Raises:
        ValueError: a rank below 1, a module that isn't linear, PiSSA of a quantized W or of
            a rank above that of W.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        lora_alpha: int | float,
        lora_dropout: int | float = 0.0,
        use_rslora: bool = False,
        pissa: bool = False,
        name: str = "default",
    ):
        super().__init__(base_layer, name=name)
        if r < 1:
            raise ValueError(f"{r=} is below 1")
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        device = device_of(base_layer)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.pissa = False
        if pissa:
            self.start_from_principal_part()

    def change(
        self, x: Float[Tensor, "*rows i"], y: Float[Tensor, "*rows o"]
    ) -> Float[Tensor, "*rows o"]:
        a = self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype)))  # *rows r
        # Scaled at its narrowest: r numbers a row, not o.
        return self.lora_B(self.scaling * a)

    def delta_weight(self) -> Float[Tensor, "o i"]:
        """(alpha / r) B A."""
        return self.scaling * self.lora_B.weight @ self.lora_A.weight

    @torch.no_grad()
    def start_from_principal_part(self) -> None:
        """PiSSA: (alpha / r) B A = U_r S_r V_r^T of W = U S V^T, which keeps the rest.

        The outputs are as before, but W isn't: a saved adapter of this kind needs the
        original W, of which this is done again.
        """
        self.refuse_no_principal_part()
        linear = self.base_layer
        u, s, vh = torch.linalg.svd(dense_weight(linear).float(), full_matrices=False)
        root = (s[: self.r] / self.scaling).sqrt()  # r
        self.lora_A.weight.copy_(root[:, None] * vh[: self.r])
        self.lora_B.weight.copy_(u[:, : self.r] * root)
        linear.weight.copy_(linear.weight.float() - self.delta_weight().float())
        self.pissa = True

    def refuse_no_principal_part(self) -> None:
        """PiSSA takes r singular vectors out of a plain W.

        Raises:
            ValueError: W isn't stored as a plain matrix, or has fewer than r.
        """
        linear = self.base_layer
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"PiSSA changes W: {type(linear).__name__} has no plain matrix")
        if self.r > min(linear.weight.shape):
            o, i = linear.weight.shape
            raise ValueError(f"PiSSA: r={self.r} is above the rank of W, {o} x {i}")
