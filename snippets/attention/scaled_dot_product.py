"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

Every query compares itself with all keys and gets the mean of their values,
weighted by how well each key fits.

Axes: t query token, s key token, k features of queries and keys, e features of
values; the axes before them (batch, head) are all independent lookups.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def causal_mask(
    t: int,
    s: int,
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "t s"]:
    """True where query i of t may attend to key j of s: where j <= s - t + i.

    The queries are the last t of the s tokens, as in decoding with a cache: the
    last query sees every key. torch's `is_causal=True` aligns the first ones
    instead; the two are the same for t = s only.

    Raises:
        ValueError: t > s, the first queries would have no key.
    """
    if t > s:
        raise ValueError(f"more queries than keys: {t=}, {s=}")
    return torch.ones(t, s, dtype=torch.bool, device=device).tril(s - t)


def attend(
    q: Float[Tensor, "*b t k"],
    k: Float[Tensor, "*b s k"],
    v: Float[Tensor, "*b s e"],
    mask: Bool[Tensor, "*#b #t s"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "*b t e"]:
    """softmax(scale q k^T) v over the keys that the mask allows: True = attend.

    scale is 1 / sqrt(k) unless given. The mask broadcasts: t s, b 1 t s, or
    b 1 1 s for padding. A query without any allowed key gets zeros, and hands
    back zero gradients. It holds all t s scores of every lookup at once.

    Raises:
        TypeError: the mask isn't boolean. Floats that are added to the scores
            are another convention, and in `nn.MultiheadAttention` True = ignore.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = q @ k.transpose(-1, -2) * scale  # *b t s
    # As in Llama: scores and weights in the inputs' dtype, float32 in between.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        weights = scores.softmax(-1)
    else:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask of {mask.dtype}: needs booleans, True = attend")
        # A row of -inf would be 0 / 0: NaN, also in the gradients. float32's least
        # number is below any score of half precision, and leaves weights only in
        # rows where nothing is allowed; those are cleared.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).masked_fill(~mask, 0.0)
    return weights.to(q.dtype) @ v
