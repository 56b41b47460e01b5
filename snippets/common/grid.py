"""Uniform grids: weights as small integers with a step and a zero for each group of them.

A row's input columns are cut into groups, and each group has a grid of 2^bits evenly
spaced values: step · (code - zero), for code = 0 ... 2^bits - 1. What is stored are the
codes, packed, and for each group its step and its zero.

Axes: n output row, d input column, g group, p byte.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


def fit_grid(
    weight: Float[Tensor, "n d"],
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
) -> tuple[Float[Tensor, "n g"], UInt8[Tensor, "n g"]]:
    """Step and zero of each group of group_size neighbouring columns; all, unless given.

    Asymmetric, from smallest to largest weight: step = (max - min) / (2^bits - 1),
    zero = round(-min / step), where min <= 0 <= max, so that 0 is on the grid.
    Symmetric: step = 2 max|w| / (2^bits - 1), zero = 2^(bits - 1).
    A group that is all zeros has step 1. Below float32 it is computed in float32.

    Raises:
        ValueError: not 2 to 8 bits, or groups that don't divide the columns.
    """
    refuse_bits(bits)
    d = weight.shape[1]
    group_size = d if group_size is None else group_size
    if group_size < 1 or d % group_size:
        raise ValueError(f"{d} columns aren't groups of {group_size=}")
    groups = weight.detach().to(at_least_float32(weight)).unflatten(1, (-1, group_size))  # n g s
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # n g
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    span = high - low
    step = torch.where(span > 0, span / (2**bits - 1), 1.0)
    # Of a symmetric grid, -low / step would be (2^bits - 1) / 2, between two codes.
    zero = torch.full_like(step, 2 ** (bits - 1)) if symmetric else (-low / step).round()
    return step, zero.to(torch.uint8)


def to_codes(
    weight: Float[Tensor, "n d"],
    step: Float[Tensor, "n g"],
    zero: UInt8[Tensor, "n g"],
    *,
    bits: int,
    groups: Int[Tensor, " d"] | None = None,
) -> UInt8[Tensor, "n d"]:
    """The nearest code of each weight: round(w / step) + zero, from 0 to 2^bits - 1.

    Args:
        weight: what is to be rounded.
        step: of each group, from `fit_grid`.
        zero: of each group, from `fit_grid`.
        bits: of a code.
        groups: each column's group; neighbours, d / g at a time, unless given.
    """
    refuse_bits(bits)
    step, zero = columns(step, weight, groups), columns(zero, weight, groups)  # n d
    codes = (weight / step).round() + zero
    return codes.clamp(0, 2**bits - 1).to(torch.uint8)


def from_codes(
    codes: UInt8[Tensor, "n d"],
    step: Float[Tensor, "n g"],
    zero: UInt8[Tensor, "n g"],
    *,
    groups: Int[Tensor, " d"] | None = None,
) -> Float[Tensor, "n d"]:
    """The weights that codes stand for: step · (code - zero), in the dtype of step."""
    step, zero = columns(step, codes, groups), columns(zero, codes, groups)  # n d
    # As bytes, a code below its zero would wrap to 255.
    return step * (codes.to(step.dtype) - zero)


def columns(
    values: Float[Tensor, "n g"] | UInt8[Tensor, "n g"],
    like: Float[Tensor, "n d"] | UInt8[Tensor, "n d"],
    groups: Int[Tensor, " d"] | None,
) -> Float[Tensor, "n d"] | UInt8[Tensor, "n d"]:
    """For each column the value of its group.

    Raises:
        ValueError: the groups aren't those of these columns.
    """
    n, d = like.shape
    if values.shape[0] != n or values.shape[1] < 1 or d % values.shape[1]:
        raise ValueError(f"groups of shape {tuple(values.shape)} for {n} rows, {d} columns")
    if groups is None:
        return values.repeat_interleave(d // values.shape[1], 1)
    if groups.shape != (d,):
        raise ValueError(f"groups of {tuple(groups.shape)} columns for {d}")
    return values[:, groups]


def pack(codes: UInt8[Tensor, "n d"], *, bits: int) -> UInt8[Tensor, "n p"]:
    """A row's codes as one string of bits, lowest first, cut into p = d bits / 8 bytes.

    With 4 bits, code 0 is the low half of byte 0 and code 1 its high half.

    Raises:
        ValueError: a row isn't whole bytes, or not 2 to 8 bits.
    """
    refuse_bits(bits)
    if codes.shape[1] * bits % 8:
        raise ValueError(f"{codes.shape[1]} codes of {bits=} aren't whole bytes")
    return regroup(codes, bits, 8)


def unpack(packed: UInt8[Tensor, "n p"], *, bits: int) -> UInt8[Tensor, "n d"]:
    """The codes that `pack` packed.

    Raises:
        ValueError: the bytes aren't whole codes, or not 2 to 8 bits.
    """
    refuse_bits(bits)
    if packed.shape[1] * 8 % bits:
        raise ValueError(f"{packed.shape[1]} bytes aren't whole codes of {bits=}")
    return regroup(packed, 8, bits)


def regroup(numbers: UInt8[Tensor, "n a"], old: int, new: int) -> UInt8[Tensor, "n c"]:
    """Numbers of `old` bits, lowest bit first, read again as numbers of `new` bits."""
    old_places = torch.arange(old, dtype=torch.uint8, device=numbers.device)
    new_places = torch.arange(new, dtype=torch.uint8, device=numbers.device)
    string = (numbers.unsqueeze(-1) >> old_places & 1).flatten(1)  # n, a times old
    return (string.unflatten(1, (-1, new)) << new_places).sum(-1, dtype=torch.uint8)


def refuse_bits(bits: int) -> None:
    """A code is a byte at most, and one bit has no zero with values on both sides."""
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits=} aren't 2 to 8")


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """float32 for half precision, else the tensor's own dtype."""
    return torch.promote_types(tensor.dtype, torch.float32)
