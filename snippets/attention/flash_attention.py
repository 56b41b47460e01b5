"""FlashAttention (Dao et al. 2022, arXiv:2205.14135; the order of loops: 2023, arXiv:2307.08691).

Exact attention that never holds all scores: tile after tile is computed, used and dropped. The
softmax is carried along as a running maximum and sum (Milakov & Gimelshein 2018,
arXiv:1805.02867), and the backward pass computes the tiles again.

Axes: b batch, h query head, g key-value head, r query head within its group (h = g r), t query
token, s key token, k head dim, e features of values; m and n tokens of one tile.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import FunctionCtx


def flash_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b g s e"],
    mask: Bool[Tensor, "#b #h t s"] | Bool[Tensor, "t s"] | None = None,
    *,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> Float[Tensor, "b h t e"]:
    """softmax(scale q k^T) v over the keys that the mask allows (True = attend), tile by tile.

    Query head i reads key-value head i // (h / g). Without a mask it is causal, the queries
    being the last t of the s tokens, and tiles in the future are left out. A query without any
    allowed key gets zeros, and hands back zero gradients. Scores and sums are in float32.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        mask: a whole mask takes t s bytes itself; it isn't the point of this function.
        scale: 1 / sqrt(k) unless given.
        block_q: queries of a tile.
        block_k: keys of a tile.

    Raises:
        ValueError: heads that don't divide, more queries than keys without a mask, a mask of
            other sizes, or a tile without a token.
        TypeError: the mask isn't boolean.
    """
    h, g, t, s = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    if h % g:
        raise ValueError(f"uneven groups: {h} query heads, {g} key-value heads")
    if min(block_q, block_k) < 1:
        raise ValueError(f"tiles without a token: {block_q=}, {block_k=}")
    if mask is None and t > s:
        raise ValueError(f"more queries than keys: {t=}, {s=}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask of {mask.dtype}: needs booleans, True = attend")
        if mask.shape[-2:] != (t, s):
            raise ValueError(f"mask of {tuple(mask.shape)} for {t=} {s=}")
        mask = mask.expand(q.shape[0], h, t, s).unflatten(1, (g, -1))  # b g r t s, a view
    grouped = q.unflatten(1, (g, -1))  # b g r t k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y, _ = Flash.apply(grouped, k, v, mask, scale, block_q, block_k)
    return y.flatten(1, 2)


class Flash(torch.autograd.Function):
    """The tiles. Kept for the backward pass: the inputs, the output, and one number a query."""

    @staticmethod
    def forward(
        q: Float[Tensor, "b g r t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s e"],
        mask: Bool[Tensor, "b g r t s"] | None,
        scale: float,
        block_q: int,
        block_k: int,
    ) -> tuple[Float[Tensor, "b g r t e"], Float[Tensor, "b g r t"]]:
        y = q.new_empty(*q.shape[:-1], v.shape[-1])  # b g r t e
        lse = q.new_empty(q.shape[:-1], dtype=wide(q))  # b g r t
        for rows in blocks(q.shape[-2], block_q):
            top = torch.full_like(lse[..., rows], -torch.inf)  # b g r m
            total, mean = torch.zeros_like(top), 0.0
            for columns in tiles(rows, q.shape[-2], k.shape[-2], block_k, mask is None):
                x = scores(q, k, mask, scale, rows, columns)  # b g r m n
                higher = torch.maximum(top, x.amax(dim=-1))
                # Nothing allowed so far: -inf - -inf would be NaN.
                base = higher.masked_fill(higher == -torch.inf, 0.0)
                weights = (x - base[..., None]).exp()
                # What was summed under the old maximum shrinks to the new one.
                shrink = (top - base).exp()
                total = total * shrink + weights.sum(dim=-1)
                values = weights @ v[:, :, None, columns].to(x.dtype)  # b g r m e
                mean = mean * shrink[..., None] + values
                top = higher
            empty = total == 0
            divisor = total.masked_fill(empty, 1.0)
            y[..., rows, :] = mean / divisor[..., None]
            lse[..., rows] = (top + divisor.log()).masked_fill(empty, torch.inf)
        return y, lse

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        q, k, v, mask, *ctx.numbers = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(
        ctx: FunctionCtx, dy: Float[Tensor, "b g r t e"], _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, y, lse = ctx.saved_tensors
        scale, block_q, block_k = ctx.numbers
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        dy = dy.to(lse.dtype)
        # sum_j dP_ij P_ij of a row, without its P: the row's output already holds it.
        mean = (dy * y.to(lse.dtype)).sum(dim=-1)  # b g r t
        for rows in blocks(q.shape[-2], block_q):
            for columns in tiles(rows, q.shape[-2], k.shape[-2], block_k, mask is None):
                x = scores(q, k, mask, scale, rows, columns)
                # Rows without a key have lse = inf, so that all their weights are 0.
                weights = (x - lse[..., rows, None]).exp()  # b g r m n
                upstream = dy[..., rows, :]  # b g r m e
                values, keys = (z[:, :, None, columns].to(x.dtype) for z in (v, k))
                dx = weights * (upstream @ values.mT - mean[..., rows, None]) * scale
                dq[..., rows, :] += dx @ keys
                # Keys and values serve all r heads of their group.
                dk[:, :, columns] += (dx.mT @ q[..., rows, :].to(x.dtype)).sum(dim=2)
                dv[:, :, columns] += (weights.mT @ upstream).sum(dim=2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def blocks(length: int, size: int) -> Iterator[slice]:
    """The tokens in pieces of `size`; the last may be shorter."""
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))


def tiles(rows: slice, t: int, s: int, size: int, causal: bool) -> Iterator[slice]:
    """The columns of a row of tiles, without those whose keys all lie in the future."""
    last = s - t + rows.stop - 1  # the last key that the last of these queries may see
    for columns in blocks(s, size):
        if not causal or columns.start <= last:
            yield columns


def scores(
    q: Float[Tensor, "b g r t k"],
    k: Float[Tensor, "b g s k"],
    mask: Bool[Tensor, "b g r t s"] | None,
    scale: float,
    rows: slice,
    columns: slice,
) -> Float[Tensor, "b g r m n"]:
    """One tile, in float32 or wider; -inf where a query may not look."""
    x = q[..., rows, :].to(wide(q)) @ k[:, :, None, columns].to(wide(k)).mT * scale
    if mask is not None:
        return x.masked_fill(~mask[..., rows, columns], -torch.inf)
    shift = k.shape[-2] - q.shape[-2]  # key j is the token of query j - shift
    if columns.stop - 1 <= rows.start + shift:
        return x  # all in the past
    i = torch.arange(rows.start, rows.stop, device=x.device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=x.device)
    return x.masked_fill(j > i + shift, -torch.inf)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
