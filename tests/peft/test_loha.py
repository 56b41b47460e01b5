"""LoHa against peft, on layers that aren't square, alpha != r, B2 != 0."""

from functools import partial

import pytest
import torch
from peft import LoHaConfig
from torch import nn
from torch.testing import assert_close

from snippets.peft.loha import LoHa
from tests.against_peft import TARGETS, B, D, T, pair, same_as_peft, trained


@pytest.mark.parametrize("kind", [{"r": 4, "alpha": 10}, {"r": 1, "alpha": 3}])
def test_equals_peft(kind):
    same_as_peft(partial(LoHa, **kind), LoHaConfig(target_modules=TARGETS, **kind))


def both():
    kind = {"r": 4, "alpha": 10}
    return pair(partial(LoHa, **kind), LoHaConfig(target_modules=TARGETS, **kind))


def test_equals_the_formula_number_by_number():
    loha = LoHa(nn.Linear(6, 9), r=2, alpha=3)
    nn.init.normal_(loha.hada_w2_b)
    a1, b1, a2, b2 = loha.own_parameters().values()
    for o in range(9):
        for i in range(6):
            first = sum(a1[o, k] * b1[k, i] for k in range(2))
            second = sum(a2[o, k] * b2[k, i] for k in range(2))
            assert_close(loha.delta_weight()[o, i], 3 / 2 * first * second)
    x = torch.randn(B, 6)
    base = loha.base_layer
    assert_close(loha(x), x @ (base.weight + loha.delta_weight()).T + base.bias)


def test_the_rank_is_up_to_r_squared():
    loha = LoHa(nn.Linear(40, 50), r=3, alpha=3)
    nn.init.normal_(loha.hada_w2_b)
    assert torch.linalg.matrix_rank(loha.delta_weight()) == 9
    assert sum(p.numel() for p in loha.own_parameters().values()) == 2 * 3 * (40 + 50)


def test_nothing_changes_before_the_first_step():
    linear, x = nn.Linear(20, 36), torch.randn(B, 20)
    loha = LoHa(linear, r=4, alpha=10)
    assert torch.equal(loha(x), linear(x))
    names = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
    assert list(loha.own_parameters()) == names
    loha(x).sum().backward()
    assert loha.hada_w2_b.grad.abs().max() > 0
    # kaiming's with a = sqrt(5): 1 / sqrt(columns)
    for weight, columns in ((loha.hada_w1_a, 4), (loha.hada_w1_b, 20), (loha.hada_w2_a, 4)):
        assert 0.8 * columns**-0.5 < weight.abs().max() <= columns**-0.5


def test_half_precision():
    _, ours, _ = both()
    x = torch.randn(B, T, D)
    expected = ours(x)
    found = ours.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    mixed = LoHa(nn.Linear(20, 36).bfloat16(), r=4, alpha=10)
    assert mixed.hada_w1_a.dtype == torch.float32
    assert mixed(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_whole(unchecked):
    _, ours, _ = both()
    x = torch.randn(B, T, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in trained(ours).values())


def test_refuses(unchecked):
    with pytest.raises(ValueError, match="r=0 is below 1"):
        LoHa(nn.Linear(9, 4), r=0, alpha=1)
    with pytest.raises(ValueError, match="Embedding is no linear layer"):
        LoHa(nn.Embedding(9, 4), r=2, alpha=1)
    assert LoHa(nn.Linear(9, 4, device="meta"), r=2, alpha=1).hada_w2_b.is_meta
