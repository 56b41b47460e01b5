"""VeRA against peft: one frozen pair for layers of different sizes, sliced."""

import copy
from functools import partial

import pytest
import torch
from peft import VeraConfig
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapt, adapters, linear_layers
from snippets.peft.vera import SharedProjections, VeRA
from tests.against_peft import (
    TARGETS,
    B,
    D,
    Stack,
    T,
    pair,
    peft_model,
    same_as_peft,
    same_with_dropout,
    trained,
)


def maker(r: int = 6, key: int = 0, **options):
    pair = SharedProjections(linear_layers(Stack(), TARGETS).values(), r=r, projection_prng_key=key)
    return partial(VeRA, projections=pair, **options)


def config(r: int = 6, key: int = 0, **changes) -> VeraConfig:
    return VeraConfig(target_modules=TARGETS, r=r, projection_prng_key=key, **changes)


@pytest.mark.parametrize("sizes", [{}, {"r": 50, "key": 3}])
def test_equals_peft(sizes):
    same_as_peft(maker(**sizes), config(**sizes))


def test_equals_peft_with_dropout_from_its_start():
    same_with_dropout(maker(vera_dropout=0.4), config(vera_dropout=0.4))


def test_starts_like_peft_to_the_bit():
    base = Stack()
    theirs = peft_model(copy.deepcopy(base), config(key=7, d_initial=0.3))
    adapt(base, TARGETS, make := maker(key=7, d_initial=0.3))
    his = trained(theirs)
    for name, weight in trained(base).items():
        assert torch.equal(weight, his[name])
    drawn = make.keywords["projections"]
    assert torch.equal(drawn.vera_A, theirs.base_model.vera_A["default"])
    assert torch.equal(drawn.vera_B, theirs.base_model.vera_B["default"])
    assert drawn.vera_A.shape == (6, 36) and drawn.vera_B.shape == (36, 6)
    layer = base.fc1
    assert_close(layer.vera_lambda_d, nn.Parameter(torch.full((6,), 0.3)))
    default = VeRA(nn.Linear(9, 4), projections=drawn).vera_lambda_d
    assert_close(default, nn.Parameter(torch.full((6,), 0.1)))
    assert not torch.equal(drawn.vera_A, maker().keywords["projections"].vera_A)


def test_equals_the_papers_formula():
    make = maker()
    linear, x = nn.Linear(20, 30), torch.randn(B, T, 20)
    vera = make(linear)
    nn.init.normal_(vera.vera_lambda_b)
    nn.init.normal_(vera.vera_lambda_d)
    shared = make.keywords["projections"]
    a, b = shared.vera_A[:, :20], shared.vera_B[:30]
    delta = torch.diag(vera.vera_lambda_b) @ b @ torch.diag(vera.vera_lambda_d) @ a
    assert_close(vera.delta_weight(), delta)
    assert_close(vera(x), x @ (linear.weight + delta).T + linear.bias)


def test_all_layers_share_one_frozen_pair():
    model = Stack()
    layers = adapt(model, TARGETS, maker())
    first, *others = [layer.projections for layer in layers.values()]
    assert all(other is first for other in others)
    assert list(trained(model)) == [f"{path}.vera_lambda_{v}" for path in TARGETS for v in "bd"]
    assert not list(first.parameters())
    model(torch.randn(B, D)).sum().backward()
    assert first.vera_A.grad is None and first.vera_B.grad is None
    # Moved once for all: `.double()` doesn't give each layer a pair of its own.
    model.double()
    kept = {layer.projections.vera_A.data_ptr() for layer in adapters(model).values()}
    assert len(kept) == 1 and first.vera_A.dtype == torch.float64


def test_nothing_changes_before_the_first_step():
    base, x = Stack(), torch.randn(B, D)
    model = copy.deepcopy(base)
    adapt(model, TARGETS, maker())
    assert torch.equal(model(x), base(x))


def test_half_precision():
    _, ours, _ = pair(maker(), config())
    x = torch.randn(B, T, D)
    expected = ours(x)
    found = ours.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.2, rtol=0.1)
    mixed = maker()(nn.Linear(20, 36).bfloat16())
    assert mixed.vera_lambda_b.dtype == torch.float32
    assert mixed(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_whole(unchecked):
    _, ours, _ = pair(maker(), config())
    x = torch.randn(B, T, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in trained(ours).values())


def test_refuses(unchecked):
    shared = SharedProjections([nn.Linear(9, 4), nn.Linear(5, 7)], r=2)
    assert VeRA(nn.Linear(9, 7), projections=shared).r == 2
    said = "projections of 7 x 9 are too small for a layer of {}"
    with pytest.raises(ValueError, match=said.format("7 x 10")):
        VeRA(nn.Linear(10, 7), projections=shared)
    with pytest.raises(ValueError, match=said.format("8 x 9")):
        VeRA(nn.Linear(9, 8), projections=shared)
    with pytest.raises(ValueError, match="r=0 for 1 layers"):
        SharedProjections([nn.Linear(9, 4)], r=0)
    with pytest.raises(ValueError, match="r=3 for 0 layers"):
        SharedProjections([], r=3)
    with pytest.raises(ValueError, match="Embedding is no linear layer"):
        VeRA(nn.Embedding(9, 4), projections=shared)
    assert SharedProjections([nn.Linear(9, 4, device="meta")], r=2).vera_A.is_meta
