"""The forward pass of FlashAttention as one GPU kernel, in Triton (Tillet et al. 2019).

The loops are those of `snippets/attention/flash_attention.py`: one program for each tile of
queries, which walks over the tiles of keys and keeps its sums in registers. Without a GPU the
same kernel runs in Triton's interpreter: set TRITON_INTERPRET=1 before this file is imported.

Axes: b batch, h query head, g key-value head, t query token, s key token, k head dim; m and n
tokens of one tile.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def forward_tile(
    q_start, k_start, v_start, y_start, t, s, scale, heads, group,
    K: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Rows of y for one tile of M queries of one head; WIDE is K up to a power of two."""
    tile, row = tl.program_id(0), tl.program_id(1)  # row = sequence · heads + head
    kv_row = row // heads * (heads // group) + row % heads // group
    i, feature = tile * M + tl.arange(0, M), tl.arange(0, WIDE)
    inside = (i[:, None] < t) & (feature[None, :] < K)
    here = (row * t + i[:, None]) * K + feature[None, :]
    q = tl.load(q_start + here, mask=inside, other=0.0).to(tl.float32)

    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mean = tl.zeros((M, WIDE), tl.float32)
    last = tl.minimum(s, s - t + (tile + 1) * M)  # behind it, all keys are in the future
    for first in range(0, last, N):
        j = first + tl.arange(0, N)
        there = (kv_row * s + j[:, None]) * K + feature[None, :]
        known = (j[:, None] < s) & (feature[None, :] < K)
        # Upcast before the products: in bfloat16 the interpreter's are wrong without a word.
        k = tl.load(k_start + there, mask=known, other=0.0).to(tl.float32)
        v = tl.load(v_start + there, mask=known, other=0.0).to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # m n
        allowed = (j[None, :] <= i[:, None] + s - t) & (j[None, :] < s)
        x = tl.where(allowed, x, float("-inf"))
        # Every query sees key 0, which is in the first tile: the maximum is a number.
        higher = tl.maximum(top, tl.max(x, 1))
        weights = tl.exp(x - higher[:, None])
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        top = higher
    y = mean / total[:, None]
    tl.store(y_start + here, y.to(y_start.dtype.element_ty), mask=inside)


def flash_attention_triton(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b g s k"],
    *,
    scale: float | None = None,
    block_q: int = 32,
    block_k: int = 32,
) -> Float[Tensor, "b h t k"]:
    """Causal attention, the queries being the last t of the s tokens. Forward only.

    Args:
        q: the queries.
        k: the keys.
        v: the values, as wide as the keys.
        scale: 1 / sqrt(k) unless given.
        block_q: queries of a tile, a power of two from 16.
        block_k: keys of a tile, likewise.

    Raises:
        ValueError: heads that don't divide, more queries than keys, or tiles of other sizes.
    """
    b, h, t, width = q.shape
    g, s = k.shape[1:3]
    if h % g:
        raise ValueError(f"uneven groups: {h} query heads, {g} key-value heads")
    if t > s:
        raise ValueError(f"more queries than keys: {t=}, {s=}")
    for size in (block_q, block_k):
        if size < 16 or size & (size - 1):
            raise ValueError(f"tiles are powers of two from 16: {block_q=}, {block_k=}")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = torch.empty_like(q)
    grid = (triton.cdiv(t, block_q), b * h)
    forward_tile[grid](
        q, k, v, y, t, s, width**-0.5 if scale is None else scale, h, h // g,
        K=width, WIDE=max(16, triton.next_power_of_2(width)), M=block_q, N=block_k,
    )  # fmt: skip
    return y
