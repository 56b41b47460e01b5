"""Rotary position embedding, RoPE (Su et al. 2021, arXiv:2104.09864).

Queries and keys are cut into pairs of features, and pair i of the token at
position p is turned by the angle p θ^(-2i/k). A score then depends on positions
only through their difference. Values are not turned.

Which features are a pair is a convention. `rotate` has the half layout of Llama
checkpoints on Hugging Face, `rotate_interleaved` the paper's; weights go from
one to the other by a permutation of rows.

Axes: b batch, h head, t token, k head dim, f frequency (k = 2 f), d hidden size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def inverse_frequencies(*, head_dim: int, rope_theta: float = 10000.0) -> Float[Tensor, " f"]:
    """θ^(-2i/k) for i = 0 ... k/2 - 1, in float32: radians per position.

    Keep the result in float32: a buffer goes down with its model in `.bfloat16()`.

    Raises:
        ValueError: head_dim isn't a positive even number.
    """
    refuse_odd(head_dim)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # 1 / θ^x and θ^-x differ in the last bit; Llama's code divides.
    return 1.0 / rope_theta**exponents


def rope_table(
    inv_freq: Float[Tensor, " f"],
    positions: Int[Tensor, "*b t"],
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "*b t f"], Float[Tensor, "*b t f"]]:
    """cos and sin of p times each inverse frequency, for each position p.

    Positions are those of the tokens in their sequences: behind a cache they
    start at its length.
    """
    # In bfloat16 position 257 is 256, and angles near 1000 are 4 radians apart.
    # So only cosine and sine, which can bear it, are rounded.
    angles = positions[..., None].float() * inv_freq.float()  # *b t f
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "b h t k"],
    cos: Float[Tensor, "*#b t f"],
    sin: Float[Tensor, "*#b t f"],
) -> Float[Tensor, "b h t k"]:
    """Turn queries or keys in the half layout: feature i pairs with i + k/2.

    The tables are (t f), the same positions for all sequences, or (b t f), in
    the dtype of x: wider ones would widen the result.

    Raises:
        ValueError: the tables aren't for these tokens or this head dim.
    """
    cos, sin = over_heads(x, cos, sin)
    u, v = x.chunk(2, dim=-1)  # b h t f
    return torch.cat((u * cos - v * sin, v * cos + u * sin), dim=-1)


def rotate_interleaved(
    x: Float[Tensor, "b h t k"],
    cos: Float[Tensor, "*#b t f"],
    sin: Float[Tensor, "*#b t f"],
) -> Float[Tensor, "b h t k"]:
    """Turn queries or keys in the paper's layout: feature 2i pairs with 2i + 1.

    Raises:
        ValueError: the tables aren't for these tokens or this head dim.
    """
    cos, sin = over_heads(x, cos, sin)
    u, v = x.unflatten(-1, (-1, 2)).unbind(dim=-1)  # b h t f
    return torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1).flatten(-2)


def half_from_interleaved(
    weight: Float[Tensor, "hk ..."], *, head_dim: int
) -> Float[Tensor, "hk ..."]:
    """Reorder the rows of a query or key projection, or its bias, for `rotate`.

    In each head, row 2i + j becomes row i + j k/2. With both projections
    reordered, `rotate` gives the scores that `rotate_interleaved` gave before.

    Raises:
        ValueError: the rows don't divide into heads of an even head_dim.
    """
    refuse_uneven(weight, head_dim)
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def interleaved_from_half(
    weight: Float[Tensor, "hk ..."], *, head_dim: int
) -> Float[Tensor, "hk ..."]:
    """The inverse of `half_from_interleaved`: row i + j k/2 becomes row 2i + j."""
    refuse_uneven(weight, head_dim)
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def over_heads(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Give the tables an axis for the heads, after refusing what would only broadcast.

    Without the refusal one token meets a table of many positions and becomes many.
    """
    b, _, t, k = x.shape
    refuse_odd(k)
    for table in (cos, sin):
        sequences, sizes = table.shape[:-2], table.shape[-2:]
        if sizes != (t, k // 2) or sequences not in ((), (1,), (b,)):
            shapes = f"{tuple(x.shape)}, table {tuple(table.shape)}"
            raise ValueError(f"x of shape {shapes}")
    return cos.unsqueeze(-3), sin.unsqueeze(-3)  # 1 t f, or b 1 t f


def refuse_odd(head_dim: int) -> None:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"features don't pair up: {head_dim=}")


def refuse_uneven(weight: Tensor, head_dim: int) -> None:
    refuse_odd(head_dim)
    if len(weight) % head_dim:
        raise ValueError(f"{len(weight)} rows aren't whole heads: {head_dim=}")
