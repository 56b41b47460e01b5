"""GPTQ: rounding a layer so that its outputs move least (Frantar et al. 2022, arXiv:2210.17323).

Columns are rounded one after another, and each column's error is made up for, as far as
that goes, by the columns that are still to come. What the inputs have in common decides how.

Axes: n output row, d input column, g group, p byte; rows of inputs are tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from snippets.common.grid import at_least_float32, fit_grid, from_codes, pack, to_codes, unpack


class Quantized(NamedTuple):
    """Codes, and the grids that give them values: each column has a group, each group a grid."""

    codes: UInt8[Tensor, "n d"]
    step: Float[Tensor, "n g"]
    zero: UInt8[Tensor, "n g"]
    groups: Int[Tensor, " d"]

    def values(self) -> Float[Tensor, "n d"]:
        """The weights that the codes stand for."""
        return from_codes(self.codes, self.step, self.zero, groups=self.groups)


def rtn(
    weight: Float[Tensor, "n d"],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
) -> Quantized:
    """Round to nearest: each weight by itself. The baseline, on the grids of `fit_grid`."""
    step, zero = fit_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    codes = to_codes(weight, step, zero, bits=bits)
    d, g = weight.shape[1], step.shape[1]
    return Quantized(codes, step, zero, torch.arange(d, device=weight.device) // (d // g))


def hessian(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "d d"]:
    """H = 2 X^T X of a layer's inputs; those of several batches add up.

    The second derivative of ||x w^T - x q^T||^2 in a row q of the weight, the same for
    all rows. At least in float32: sums of many products.
    """
    x = x.detach().to(at_least_float32(x)).flatten(0, -2)  # rows d
    return 2 * x.T @ x


def layer_error(
    weight: Float[Tensor, "n d"], rounded: Float[Tensor, "n d"], hessian: Float[Tensor, "d d"]
) -> Float[Tensor, ""]:
    """||X W^T - X Q^T||^2 over the inputs of the Hessian: sum_i e_i H e_i^T / 2, e = w - q."""
    error = (weight - rounded).to(hessian.dtype)
    return (error @ hessian * error).sum() / 2


def inverse_factor(hessian: Float[Tensor, "d d"], *, damping: float) -> Float[Tensor, "d d"]:
    """Upper triangular U with U^T U = (H + damping · mean(diag H) · I)^-1.

    Row j of U, from j on, is what column j's error needs: divided by U_jj it is the first
    row of the inverse of the Hessian of columns j ... d - 1, divided by its first entry. So
    one factorization replaces d inversions, and the errors that those would pile up.

    An input that was always zero gives a zero on the diagonal, and becomes 1: nothing
    is known about that column, so that it is rounded to nearest. (The released code
    also makes its weights zero, though other texts may use them.)

    Raises:
        torch.linalg.LinAlgError: not positive definite; more damping helps.
    """
    diagonal = hessian.diagonal()
    damped = torch.where(diagonal == 0, 1.0, diagonal + damping * diagonal.mean())
    lower = torch.linalg.cholesky(hessian.diagonal_scatter(damped))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def gptq(
    weight: Float[Tensor, "n d"],
    hessian: Float[Tensor, "d d"],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
) -> Quantized:
    """Round column by column, feeding each error forward: w_F -= (w_j - q_j) / U_jj · U_jF.

    Args:
        weight: of a linear layer, rows are outputs.
        hessian: of the layer's inputs, from `hessian`.
        bits: of a code.
        group_size: columns with a common grid in each row; all, unless given.
        symmetric: see `fit_grid`.
        damping: added to the diagonal of H, as a part of its mean.
        block_size: columns between two updates of all those that come later. It changes
            the speed, and no result beyond rounding.
        act_order: columns with the largest inputs first (desc_act in checkpoints).
        static_groups: grids are fitted to the weights as they were, over neighbours in the
            layer. Otherwise a group's grid is fitted when its first column comes,
            to the weights as fed forward until then, and groups are neighbours in the
            order of rounding.

    Raises:
        ValueError: sizes that don't fit.
    """
    d = weight.shape[1]
    if hessian.shape != (d, d):
        raise ValueError(f"a Hessian of shape {tuple(hessian.shape)} for {d} input columns")
    if block_size < 1 or damping < 0:
        raise ValueError(f"{block_size=} is below 1, or {damping=} below 0")
    grid = {"bits": bits, "symmetric": symmetric}
    w = weight.detach().to(at_least_float32(weight))
    step, zero = fit_grid(w, group_size=group_size, **grid)
    size = d // step.shape[1]
    order = torch.arange(d, device=w.device)
    groups = order // size
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    if static_groups:
        groups = groups[order]
    w = w[:, order].clone()
    factor = inverse_factor(hessian.to(w.dtype)[order][:, order], damping=damping)

    codes = torch.empty_like(w, dtype=torch.uint8)
    start = 0
    while start < d:
        # A block ends with its group, so that the next grid sees no outdated weights.
        end = min(start + block_size, d, (start // size + 1) * size)
        if not static_groups and start % size == 0:
            g = slice(start // size, start // size + 1)
            step[:, g], zero[:, g] = fit_grid(w[:, start : start + size], **grid)
        errors = torch.empty_like(w[:, start:end])
        for j in range(start, end):
            column, g = w[:, j : j + 1], groups[j : j + 1]
            code = to_codes(column, step[:, g], zero[:, g], bits=bits)
            error = (column - from_codes(code, step[:, g], zero[:, g])) / factor[j, j]  # n 1
            w[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            codes[:, j], errors[:, j - start] = code[:, 0], error[:, 0]
        w[:, end:] -= errors @ factor[start:end, end:]
        start = end

    back = order.argsort()
    return Quantized(codes[:, back], step, zero, groups[back])


class GPTQLinear(nn.Module):
    """y = x Q^T + bias, Q computed from packed codes at each call.

    Buffers: packed codes, step, zero, and groups (g_idx in checkpoints), which
    says for each input column whose grid it has; with act_order that isn't its neighbours'.

    Raises:
        ValueError: a bias of another size, or rows of codes that aren't whole bytes.
    """

    def __init__(self, quantized: Quantized, *, bits: int, bias: Float[Tensor, " n"] | None = None):
        super().__init__()
        codes, step, zero, groups = quantized
        if bias is not None and bias.shape != codes.shape[:1]:
            raise ValueError(f"a bias of shape {tuple(bias.shape)} for {len(codes)} outputs")
        self.bits = bits
        self.register_buffer("packed", pack(codes, bits=bits))  # n p
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        self.register_buffer("groups", groups.to(torch.int32))
        self.register_buffer("bias", bias)

    def weight(self) -> Float[Tensor, "n d"]:
        """The weights that the packed codes stand for."""
        codes = unpack(self.packed, bits=self.bits)  # n d
        return from_codes(codes, self.step, self.zero, groups=self.groups)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows n"]:
        return F.linear(x, self.weight().to(x.dtype), self.bias)
