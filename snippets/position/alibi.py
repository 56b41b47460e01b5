"""Attention with linear biases, ALiBi (Press et al. 2021, arXiv:2108.12409).

Nothing is added to tokens and nothing is turned. Each score is lowered by the
distance of its query and key times a slope, fixed per head: -m (i - j). The
paper gives slopes for a power of two of heads; for others see `alibi_slopes`.

Axes: b batch, h head, t query token, s key token, k head dim.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def alibi_slopes(num_heads: int, *, max_bias: float | int = 8) -> Float[Tensor, " h"]:
    """2^(-M i / n) for i = 1 ... n, with M = max_bias and n = h, in float32.

    If h isn't a power of two, n is the one below it, and every second slope of
    2 n heads follows, from the first, until there are h. That is the order of
    the authors' code, BLOOM and MPT; it isn't sorted.

    Raises:
        ValueError: no head.
    """
    if num_heads < 1:
        raise ValueError(f"no heads to give slopes to: {num_heads=}")
    n = 2 ** (num_heads.bit_length() - 1)
    exponents = torch.arange(1, 2 * n + 1) * (max_bias / (2 * n))  # of 2 n heads
    slopes = 1.0 / 2.0**exponents
    return torch.cat([slopes[1::2], slopes[::2]])[:num_heads]


def alibi_bias(
    slopes: Float[Tensor, " h"],
    query_positions: Int[Tensor, "*b t"],
    key_positions: Int[Tensor, "*b s"],
) -> Float[Tensor, "*b h t s"]:
    """-m (i - j) for a query at position i and a key at j, in float32 or wider.

    Positions are those of the tokens in their sequences. Only differences
    count, so they may start anywhere, and behind a cache the queries are the
    last of the keys. A key ahead of its query gets a bonus: mask it.

    Raises:
        ValueError: the positions are of different batches.
    """
    if query_positions.shape[:-1] != key_positions.shape[:-1]:
        shapes = f"{tuple(query_positions.shape)}, of keys {tuple(key_positions.shape)}"
        raise ValueError(f"positions of queries {shapes}")
    distance = query_positions[..., :, None] - key_positions[..., None, :]  # *b t s
    return -upright(slopes) * distance[..., None, :, :]


def alibi_key_bias(
    slopes: Float[Tensor, " h"], key_positions: Int[Tensor, "*b s"]
) -> Float[Tensor, "*b h 1 s"]:
    """m j: what BLOOM adds. In each row it is `alibi_bias` plus a constant, m i.

    Softmax doesn't see the constant, and one row serves all queries. But the
    numbers grow with the position instead of the distance, and so does rounding.
    """
    return upright(slopes) * key_positions[..., None, None, :]


def biased_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b h s k"],
    v: Float[Tensor, "b h s k"],
    bias: Float[Tensor, "*#b h #t s"],
    allowed: Bool[Tensor, "#b 1 t s"] | None = None,
) -> Float[Tensor, "b h t k"]:
    """softmax(q k^T / sqrt(k) + bias) v over the keys that are allowed: True = attend.

    None is causal, with the queries as the last t of the s tokens. A query that
    may attend to nothing gets zeros. The bias is added after scaling, in the
    dtype of q.

    Raises:
        ValueError: a bias or a mask that isn't over these heads and tokens.
    """
    b, h, t, _ = q.shape
    s = k.shape[-2]
    # A bias for one key would broadcast over a cache of them: equal, so none.
    shape = tuple(bias.shape)
    if shape[-3:] not in ((h, t, s), (h, 1, s)) or shape[:-3] not in ((), (1,), (b,)):
        raise ValueError(f"bias of shape {shape}, for {b=} {h=} {t=} {s=}")
    if allowed is None:
        if t > s:
            raise ValueError(f"more queries than keys: {t=}, {s=}")
        allowed = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    elif tuple(allowed.shape) not in ((b, 1, t, s), (1, 1, t, s)):
        raise ValueError(f"mask of shape {tuple(allowed.shape)}, for {b=} {t=} {s=}")
    mask = bias.to(q.dtype).masked_fill(~allowed, -math.inf)  # *b h t s
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def upright(slopes: Float[Tensor, " h"]) -> Float[Tensor, "h 1 1"]:
    """Slopes above their heads' scores, in float32 or wider.

    In bfloat16 the products would be rounded, and position 257 already is 256.
    """
    return slopes.to(torch.promote_types(slopes.dtype, torch.float32))[:, None, None]
