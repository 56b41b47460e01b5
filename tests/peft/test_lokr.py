"""LoKr against peft, plain and factorised, on layers that aren't square, alpha != r."""

from functools import partial

import pytest
import torch
from peft import LoKrConfig
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import nn
from torch.testing import assert_close

from snippets.peft.lokr import LoKr, factorization
from tests.against_peft import TARGETS, B, D, T, pair, same_as_peft, trained

KINDS = {
    "whole factors": {"r": 5, "alpha": 12},
    "a thin second factor": {"r": 2, "alpha": 7},
    "both thin": {"r": 1, "alpha": 7, "decompose_both": True},
    "both may be thin, one is": {"r": 2, "alpha": 7, "decompose_both": True, "decompose_factor": 2},
    "a first factor too small to be thin": {
        "r": 3,
        "alpha": 7,
        "decompose_both": True,
        "decompose_factor": 4,
    },
    "a factor of 4": {"r": 2, "alpha": 7, "decompose_factor": 4},
    "a factor that divides nothing": {"r": 2, "alpha": 7, "decompose_factor": 5},
    "a large factor": {"r": 2, "alpha": 7, "decompose_both": True, "decompose_factor": 12},
}


def config(**kind) -> LoKrConfig:
    return LoKrConfig(target_modules=TARGETS, **kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_peft(kind):
    same_as_peft(partial(LoKr, **kind), config(**kind))


def test_the_kinds_have_whole_and_thin_factors():
    names = set()
    for kind in KINDS.values():
        names |= {tuple(LoKr(nn.Linear(20, 36), **kind).own_parameters())}
    thin = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
    assert names == {("lokr_w1", "lokr_w2"), ("lokr_w1", *thin[2:]), thin}


def test_sizes_are_factored_like_peft():
    for size in range(1, 200):
        for factor in (-1, *range(1, 40)):
            assert factorization(size, factor) == peft_factorization(size, factor)


def test_equals_the_formula_number_by_number():
    lokr = LoKr(nn.Linear(6, 8), r=2, alpha=3)
    nn.init.normal_(lokr.lokr_w1)
    (o1, i1), (o2, i2) = lokr.lokr_w1.shape, lokr.lokr_w2.shape
    assert (o1 * o2, i1 * i2) == (8, 6) and o1 != o2 and i1 != i2
    for o in range(8):
        for i in range(6):
            product = lokr.lokr_w1[o // o2, i // i2] * lokr.lokr_w2[o % o2, i % i2]
            assert_close(lokr.delta_weight()[o, i], 3 / 2 * product)
    x = torch.randn(B, 6)
    base = lokr.base_layer
    assert_close(lokr(x), x @ (base.weight + lokr.delta_weight()).T + base.bias)


def test_ranks_multiply():
    lokr = LoKr(nn.Linear(48, 60), r=2, alpha=3)
    nn.init.normal_(lokr.lokr_w1)
    rank = torch.linalg.matrix_rank
    assert rank(lokr.delta_weight()) == rank(lokr.lokr_w1) * 2 == 12


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nothing_changes_before_the_first_step(kind):
    linear, x = nn.Linear(20, 36), torch.randn(B, 20)
    lokr = LoKr(linear, **kind)
    assert torch.equal(lokr(x), linear(x))
    lokr(x).sum().backward()
    first, *others = lokr.own_parameters().values()
    assert first.abs().max() == 0 < first.grad.abs().max()
    for weight in others:  # kaiming's with a = sqrt(5): 1 / sqrt(columns)
        assert 0.3 * weight.shape[1] ** -0.5 < weight.abs().max() <= weight.shape[1] ** -0.5


def test_half_precision():
    kind = KINDS["both thin"]
    _, ours, _ = pair(partial(LoKr, **kind), config(**kind))
    x = torch.randn(B, T, D)
    expected = ours(x)
    found = ours.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    mixed = LoKr(nn.Linear(20, 36).bfloat16(), **kind)
    assert mixed.lokr_w1_a.dtype == torch.float32
    assert mixed(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_compiles_whole(kind, unchecked):
    _, ours, _ = pair(partial(LoKr, **kind), config(**kind))
    x = torch.randn(B, T, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in trained(ours).values())


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"r": 0}, "r=0 is below 1"),
        ({"decompose_factor": 0}, "decompose_factor=0 is neither -1 nor above 0"),
        ({"decompose_factor": -2}, "decompose_factor=-2 is neither"),
        ({"base_layer": nn.Embedding(9, 4)}, "Embedding is no linear layer"),
    ],
)
def test_refuses(wrong, said, unchecked):
    given = {"base_layer": nn.Linear(9, 4), "r": 2, "alpha": 1} | wrong
    with pytest.raises(ValueError, match=said):
        LoKr(given.pop("base_layer"), **given)


def test_smallest_sizes():
    assert LoKr(nn.Linear(9, 4), r=1, alpha=1, decompose_factor=1).lokr_w1.shape == (1, 1)
    assert LoKr(nn.Linear(9, 4, device="meta"), r=2, alpha=1).lokr_w1.is_meta
