"""Softmax and cross-entropy, in forms that neither overflow nor need the whole row at once.

The subtraction of the maximum is folklore; the one-pass form is by Milakov and Gimelshein
2018 (arXiv:1805.02867), label smoothing by Szegedy et al. 2015 (arXiv:1512.00567), the
z-loss as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311).

Axes: v vocabulary, n labels; *rows are whatever comes before (batch, token).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def widen(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """float32 for 16 bits; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summary(
    logits: Float[Tensor, "*rows v"],
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Maximum m and sum of exp(x - m) of each row: all that softmax needs to know of it."""
    x = widen(logits)
    peak = x.amax(-1)
    return peak, (x - finite(peak)[..., None]).exp().sum(-1)


def merge(
    a: tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]],
    b: tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]],
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """The summary of two blocks together, from the summaries of each.

    Each sum is relative to its own maximum, so both are rescaled to the common one.
    """
    peak = torch.maximum(a[0], b[0])
    base = finite(peak)
    return peak, a[1] * (a[0] - base).exp() + b[1] * (b[0] - base).exp()


def finite(peak: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Where all is masked the maximum is -inf, and -inf - (-inf) would be NaN."""
    return peak.masked_fill(peak.isinf(), 0.0)


def logsumexp(logits: Float[Tensor, "*rows v"]) -> Float[Tensor, "*rows"]:
    """log of the sum of exp(x), without overflow: m + log(sum of exp(x - m))."""
    peak, total = summary(logits)
    return (finite(peak) + total.log()).to(logits.dtype)


def softmax(logits: Float[Tensor, "*rows v"], temperature: float = 1.0) -> Float[Tensor, "*rows v"]:
    """exp(x / T) / sum of exp(x / T), computed in float32, returned in the input's dtype.

    Raises:
        ValueError: a temperature that isn't positive (0 would be argmax).
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive: {temperature}")
    x = widen(logits) / temperature
    peak, total = summary(x)
    return ((x - peak[..., None]).exp() / total[..., None]).to(logits.dtype)


def online_softmax(logits: Float[Tensor, "*rows v"], block_size: int) -> Float[Tensor, "*rows v"]:
    """The same with one pass for the summary, block by block, and one for the division.

    Raises:
        ValueError: a block size below 1.
    """
    if block_size < 1:
        raise ValueError(f"empty blocks: {block_size=}")
    blocks = logits.split(block_size, dim=-1)
    peak, total = summary(blocks[0])
    for block in blocks[1:]:
        peak, total = merge((peak, total), summary(block))
    parts = [(widen(x) - peak[..., None]).exp() / total[..., None] for x in blocks]
    return torch.cat(parts, -1).to(logits.dtype)


def cross_entropy(
    logits: Float[Tensor, "*rows v"],
    labels: Int[Tensor, "*rows"],
    *,
    weight: Float[Tensor, " v"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: int | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean of logsumexp(x) - x[label] over the labels that count, in float32 at least.

    Args:
        logits: one row a prediction; 16-bit ones are widened first, as transformers does.
        labels: the right column of each row.
        weight: of each class; the mean is then divided by the labels' weights.
        ignore_index: the label of rows that don't count.
        label_smoothing: this share of the target is spread over all v classes, the right
            one included, as in torch.
        z_loss: times the square of logsumexp, which pulls it to 0; PaLM has 1e-4.
        num_items: what to divide the sum by, instead of what counts in this call: the
            labels of the whole batch, when this is a part of it.

    Raises:
        ValueError: labels or weights of another shape, a smoothing outside 0 to 1.
        RuntimeError: by torch, a label that is no column.
    """
    v = logits.shape[-1]
    refuse_unfit(logits, labels, label_smoothing)
    if weight is not None and weight.shape != (v,):
        raise ValueError(f"weight of shape {tuple(weight.shape)} for {v} classes")
    x = widen(logits)
    counts = labels != ignore_index
    safe = labels.masked_fill(~counts, 0)  # *rows; any column, its loss is dropped below
    scale = x.new_ones(v) if weight is None else weight.to(x.dtype)
    lse, right = logsumexp(x), x.gather(-1, safe[..., None])[..., 0]  # *rows
    loss = scale[safe] * (lse - right)
    if label_smoothing:  # else a logit of -inf would make it 0 · inf
        surprise = (scale * (lse[..., None] - x)).mean(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * surprise
    loss = loss + z_loss * scale[safe] * lse.square()
    if num_items is None:
        num_items = scale[safe].masked_fill(~counts, 0.0).sum()
    return loss.masked_fill(~counts, 0.0).sum() / num_items


def cross_entropy_gradient(
    logits: Float[Tensor, "*rows v"],
    labels: Int[Tensor, "*rows"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, "*rows v"]:
    """The gradient of `cross_entropy` by formula: (p - y) / n, in the logits' dtype.

    y is 1 in the column of the label, or smoothed; the z-loss stretches p by
    1 + 2 z logsumexp. Rows that don't count get 0.

    Raises:
        ValueError: labels of another shape, a smoothing outside 0 to 1.
    """
    refuse_unfit(logits, labels, label_smoothing)
    counts = labels != ignore_index
    safe = labels.masked_fill(~counts, 0)
    x = widen(logits)
    target = torch.full_like(x, label_smoothing / x.shape[-1])
    right = torch.full_like(x[..., :1], 1 - label_smoothing)
    target = target.scatter_add(-1, safe[..., None], right)
    stretch = 1 + 2 * z_loss * logsumexp(x)[..., None]
    gradient = stretch * softmax(x) - target
    return (gradient.masked_fill(~counts[..., None], 0.0) / counts.sum()).to(logits.dtype)


def refuse_unfit(logits: Tensor, labels: Tensor, label_smoothing: float) -> None:
    """Labels of another shape could broadcast, and mean something else."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"a share must be from 0 to 1: {label_smoothing=}")
