"""Softmax and cross-entropy against torch.nn.functional, autograd and the definitions.

Sizes differ (2, 5, 11), some labels are ignored, and no row's block sizes divide it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from snippets.foundations.softmax_and_cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    logsumexp,
    merge,
    online_softmax,
    softmax,
    summary,
    widen,
)

B, T, V = 2, 5, 11


def logits(dtype=torch.float32, scale=3.0) -> torch.Tensor:
    return (scale * torch.randn(B, T, V)).to(dtype)


def labels(ignored=3, ignore_index=-100) -> torch.Tensor:
    y = torch.randint(0, V, (B, T))
    y.view(-1)[torch.randperm(B * T)[:ignored]] = ignore_index
    return y


# Softmax and logsumexp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_softmax_equals_torch(dtype, temperature):
    x = logits(dtype)
    expected = (x.to(torch.promote_types(dtype, torch.float32)) / temperature).softmax(-1)
    assert_close(softmax(x, temperature), expected.to(dtype))
    if temperature == 1:
        assert_close(softmax(x), x.softmax(-1))
        assert_close(logsumexp(x), x.logsumexp(-1))


def test_widens_16_bits_only():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert widen(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert widen(torch.ones(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("shift", [-1e4, 90.0, 1e4, 3e38])
def test_neither_overflows_nor_underflows(shift):
    x = torch.tensor([[0.0, -1.0, 2.0]]) + shift
    for function in (softmax, lambda x: online_softmax(x, 2)):
        assert_close(function(x), x.softmax(-1))
    assert_close(logsumexp(x), x.logsumexp(-1))
    half = torch.tensor([60000.0, 59968.0, -60000.0], dtype=torch.float16)
    assert_close(softmax(half), half.softmax(-1))


def test_equals_the_definition_in_loops():
    x = logits(torch.float64)
    for row, p, total in zip(
        x.view(-1, V), softmax(x).view(-1, V), logsumexp(x).view(-1), strict=True
    ):
        weights = [math.exp(value) for value in row.tolist()]
        assert_close(p, torch.tensor(weights, dtype=x.dtype) / sum(weights))
        assert math.isclose(total, math.log(sum(weights)))


def test_masked_columns_get_nothing_and_masked_rows_minus_infinity():
    x = logits()
    x[..., :3] = -math.inf
    p = softmax(x)
    assert (p[..., :3] == 0).all()
    assert_close(p, x.softmax(-1))
    x[0, 0] = -math.inf
    assert_close(logsumexp(x), x.logsumexp(-1))
    assert logsumexp(x)[0, 0] == -math.inf
    x[0, 0, 0] = math.inf
    assert logsumexp(x)[0, 0] == math.inf


# One pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 3, 10, V, 20])
def test_online_equals_torch_for_every_block_size(dtype, block):
    x = logits(dtype, scale=30.0)
    assert_close(online_softmax(x, block), x.softmax(-1))


def test_summaries_merge_in_any_order_and_grouping():
    a, b, c = logits(torch.float64).split([2, 5, 4], -1)
    whole = summary(torch.cat([a, b, c], -1))
    a, b, c = (summary(part) for part in (a, b, c))
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(a, b))):
        assert_close(merged, whole)
    peak, total = whole
    assert_close(peak + total.log(), whole[0] + whole[1].log())


def test_a_block_of_masked_columns_is_neutral():
    x = logits()
    masked = torch.full((B, T, 3), -math.inf)
    nothing, something = summary(masked), summary(x)
    assert_close(nothing, (torch.full((B, T), -math.inf), torch.zeros(B, T)))
    assert_close(merge(nothing, something), something)
    assert_close(merge(something, nothing), something)
    assert_close(merge(nothing, nothing), nothing)
    both = torch.cat([masked, x], -1)
    assert_close(online_softmax(both, 3), both.softmax(-1))


def test_summary_is_in_float32_for_16_bits():
    peak, total = summary(torch.zeros(1, 300, dtype=torch.bfloat16))
    assert peak.dtype == total.dtype == torch.float32
    assert total == 300  # bfloat16 has no 257


# Cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_cross_entropy_equals_torch_and_so_does_its_gradient(smoothing, weighted, ignore_index):
    x, y = logits().requires_grad_(), labels(ignore_index=ignore_index)
    weight = torch.rand(V) + 0.1 if weighted else None
    settings = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": smoothing}
    ours = cross_entropy(x, y, **settings)
    theirs = F.cross_entropy(x.flatten(0, 1), y.flatten(), **settings)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))
    ours = cross_entropy(x, y, num_items=7, **settings)
    theirs = F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum", **settings) / 7
    assert_close(ours, theirs)


def test_defaults_are_torchs():
    x, y = logits(), labels()
    assert_close(cross_entropy(x, y), F.cross_entropy(x.flatten(0, 1), y.flatten()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_widened_as_transformers_does(dtype):
    x, y = logits(dtype), labels()
    ours = cross_entropy(x, y)
    assert ours.dtype == torch.float32
    assert_close(ours, F.cross_entropy(x.float().flatten(0, 1), y.flatten()))
    assert cross_entropy(x.double(), y).dtype == torch.float64


def test_equals_the_definition_in_loops_with_all_that_it_has():
    x, y, w = logits(torch.float64), labels(), torch.rand(V, dtype=torch.float64)
    total = divisor = 0.0
    for row, label in zip(x.view(-1, V).tolist(), y.view(-1).tolist(), strict=True):
        if label == -100:
            continue
        lse = math.log(sum(math.exp(value) for value in row))
        target = [0.2 / V + 0.8 * (c == label) for c in range(V)]
        total += sum(t * w[c].item() * (lse - row[c]) for c, t in enumerate(target))
        total += 0.03 * w[label].item() * lse**2
        divisor += w[label].item()
    ours = cross_entropy(x, y, weight=w, label_smoothing=0.2, z_loss=0.03)
    assert math.isclose(ours, total / divisor)


def test_a_masked_column_that_is_no_label_costs_nothing():
    x, y = logits(), labels()
    y[y == 0] = 1
    x[..., 0] = -math.inf
    theirs = F.cross_entropy(x.flatten(0, 1), y.flatten())
    assert_close(cross_entropy(x, y), theirs)
    assert theirs.isfinite()


def test_ignored_rows_may_hold_anything():
    x, y = logits(), labels()
    expected = cross_entropy(x, y)
    x[y == -100] = math.nan
    assert_close(cross_entropy(x, y), expected)


def test_nothing_to_count_is_nan_as_in_torch_unless_divided_by_the_batchs():
    x, y = logits(), torch.full((B, T), -100)
    assert cross_entropy(x, y).isnan()
    assert F.cross_entropy(x.flatten(0, 1), y.flatten()).isnan()
    assert cross_entropy(x, y, num_items=4) == 0


def test_parts_of_a_batch_add_up_whatever_their_lengths():
    x, y = logits(torch.float64).requires_grad_(), labels()
    y[0, 1:] = -100  # ragged
    whole = torch.autograd.grad(cross_entropy(x, y, z_loss=0.01), x)[0]
    n = (y != -100).sum()
    parts = [cross_entropy(x[i], y[i], z_loss=0.01, num_items=n) for i in range(B)]
    assert_close(torch.autograd.grad(sum(parts), x)[0], whole)
    means = [cross_entropy(x[i], y[i], z_loss=0.01) / B for i in range(B)]
    assert (torch.autograd.grad(sum(means), x)[0] - whole).abs().max() > 0.01


@pytest.mark.parametrize("smoothing, z", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.05), (0.3, 0.02)])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_the_gradients_formula_equals_autograd(smoothing, z, ignore_index):
    x, y = logits(torch.float64).requires_grad_(), labels(ignore_index=ignore_index)
    settings = {"label_smoothing": smoothing, "z_loss": z, "ignore_index": ignore_index}
    expected = torch.autograd.grad(cross_entropy(x, y, **settings), x)[0]
    assert_close(cross_entropy_gradient(x, y, **settings), expected)


def test_the_gradients_defaults_and_dtype():
    x, y = logits(torch.bfloat16), labels()
    wide = x.float().requires_grad_()
    loss = F.cross_entropy(wide.flatten(0, 1), y.flatten())
    ours = cross_entropy_gradient(x, y)
    assert ours.dtype == torch.bfloat16
    assert_close(ours, torch.autograd.grad(loss, wide)[0].bfloat16())


def test_gradcheck_with_everything_on():
    x, y, w = logits(torch.float64), labels(), torch.rand(V, dtype=torch.float64)

    def loss(x):
        return cross_entropy(x, y, weight=w, label_smoothing=0.1, z_loss=0.01)

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: online_softmax(x, 4), x)


# Refusals


@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_gradient])
def test_refuses_labels_that_do_not_fit(unchecked, function):
    with pytest.raises(ValueError, match=r"^labels \(5,\) for logits \(2, 5, 11\)"):
        function(logits(), labels()[0])
    for share in (-0.1, 1.1):
        with pytest.raises(
            ValueError, match=f"^a share must be from 0 to 1: label_smoothing={share}"
        ):
            function(logits(), labels(), label_smoothing=share)
    for wrong in (V, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            function(logits(), torch.full((B, T), wrong))
    function(logits(), labels(), label_smoothing=1.0)


def test_refuses_weights_of_another_vocabulary(unchecked):
    for shape in ((V + 1,), (1,), (V, 1)):
        with pytest.raises(
            ValueError, match=rf"^weight of shape \({shape[0]},[^f]*\) for 11 classes"
        ):
            cross_entropy(logits(), labels(), weight=torch.ones(shape))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match=f"^temperature must be positive: {temperature}"):
        softmax(logits(), temperature)


@pytest.mark.parametrize("block", [0, -2])
def test_refuses_empty_blocks(block):
    with pytest.raises(ValueError, match=f"^empty blocks: block_size={block}"):
        online_softmax(logits(), block)
