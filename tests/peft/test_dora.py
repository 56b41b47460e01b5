"""DoRA against peft's `use_dora`, on layers that aren't square, alpha != r, B != 0."""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapters, merge
from snippets.peft.dora import DoRA
from snippets.peft.lora import LoRA
from tests.against_peft import (
    TARGETS,
    B,
    D,
    Stack,
    T,
    pair,
    same_as_peft,
    same_with_dropout,
    trained,
)

KINDS = {
    "DoRA": {"r": 4, "lora_alpha": 10},
    "rsLoRA's scale": {"r": 4, "lora_alpha": 10, "use_rslora": True},
}


def config(**changes) -> LoraConfig:
    return LoraConfig(target_modules=TARGETS, use_dora=True, **changes)


def layer(**changes) -> DoRA:
    dora = DoRA(nn.Linear(20, 36), **{"r": 4, "lora_alpha": 10} | changes)
    nn.init.normal_(dora.lora_B.weight)
    nn.init.uniform_(dora.lora_magnitude_vector, 0.5, 2)
    return dora


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_peft(kind):
    same_as_peft(partial(DoRA, **kind), config(**kind))


def test_equals_peft_with_dropout():
    kind = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.4}
    same_with_dropout(partial(DoRA, **kind), config(**kind))


def test_equals_the_papers_formula_and_rows_have_the_trained_lengths():
    dora, x = layer(), torch.randn(B, T, 20)
    v = dora.base_layer.weight + 2.5 * dora.lora_B.weight @ dora.lora_A.weight
    rows = [m * row / row.norm() for m, row in zip(dora.lora_magnitude_vector, v, strict=True)]
    weight = torch.stack(rows)
    assert_close(dora(x), x @ weight.T + dora.base_layer.bias)
    assert_close(dora.weight, weight)
    assert_close(dora.weight.norm(dim=1), dora.lora_magnitude_vector.detach())


def test_the_norm_gets_no_gradient():
    dora, x = layer(), torch.randn(B, 20)
    dora(x).square().sum().backward()
    found = dora.lora_B.weight.grad.clone()
    gradients = []
    for detached in (True, False):
        v = dora.base_layer.weight + 2.5 * dora.lora_B.weight @ dora.lora_A.weight
        length = v.norm(dim=1, keepdim=True)
        length = length.detach() if detached else length
        weight = dora.lora_magnitude_vector[:, None] * v / length
        y = x @ weight.T + dora.base_layer.bias
        gradients.append(torch.autograd.grad(y.square().sum(), dora.lora_B.weight)[0])
    assert_close(found, gradients[0])
    assert (found - gradients[1]).abs().max() > 0.1
    assert not dora.length().requires_grad


def test_nothing_changes_before_the_first_step():
    linear, x = nn.Linear(20, 36), torch.randn(B, 20)
    dora = DoRA(linear, r=4, lora_alpha=10)
    assert_close(dora(x), linear(x))
    assert torch.equal(dora.lora_magnitude_vector, linear.weight.norm(dim=1))
    names = ["lora_magnitude_vector", "lora_A.weight", "lora_B.weight"]
    assert list(dora.own_parameters()) == names


def test_without_magnitudes_it_would_be_lora():
    dora = layer()
    lora = LoRA(dora.base_layer, r=4, lora_alpha=10)
    lora.lora_A, lora.lora_B = dora.lora_A, dora.lora_B
    with torch.no_grad():
        dora.lora_magnitude_vector.copy_(dora.length())
    x = torch.randn(B, 20)
    assert_close(dora(x), lora(x))


def test_half_precision():
    kind = KINDS["DoRA"]
    _, ours, _ = pair(partial(DoRA, **kind), config(**kind))
    x = torch.randn(B, T, D)
    expected = ours(x)
    found = ours.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    merge(ours)
    assert_close(ours(x.bfloat16()).float(), expected, atol=0.1, rtol=0.1)


def test_parameters_in_float32_beside_a_half_precision_layer():
    linear, x = nn.Linear(20, 36).bfloat16(), torch.randn(B, 20).bfloat16()
    dora = DoRA(linear, r=4, lora_alpha=10)
    assert {p.dtype for p in dora.own_parameters().values()} == {torch.float32}
    assert_close(dora(x), linear(x), atol=2e-2, rtol=2e-2)
    dora = DoRA(linear, r=4, lora_alpha=10, lora_dropout=0.5, name="second").train()
    assert dora(x).dtype == torch.bfloat16


def test_compiles_whole(unchecked):
    kind = KINDS["DoRA"]
    _, ours, _ = pair(partial(DoRA, **kind), config(**kind))
    x = torch.randn(B, T, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))
    torch.compile(ours, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in trained(ours).values())


def test_stands_on_a_quantized_layer_and_on_another_adapter():
    from tests.peft.test_lora import Quantized

    base, x = Quantized(nn.Linear(20, 36)), torch.randn(B, 20)
    dora = DoRA(base, r=4, lora_alpha=10)
    assert_close(dora(x), base(x))
    with pytest.raises(ValueError, match="can't merge into Quantized"):
        dora.merge()
    below = LoRA(nn.Linear(20, 36), r=3, lora_alpha=7)
    nn.init.normal_(below.lora_B.weight)
    above = DoRA(below, r=4, lora_alpha=10, name="second")
    nn.init.normal_(above.lora_B.weight)
    before = above(x)
    assert_close(above(x), x @ above.weight.T + above.bias)
    above.merge()
    assert below.merged
    assert_close(above(x), before)
    above.unmerge()
    assert not below.merged and torch.equal(above(x), before)


def test_refuses(unchecked):
    with pytest.raises(ValueError, match="r=0 is below 1"):
        DoRA(nn.Linear(9, 4), r=0, lora_alpha=1)
    with pytest.raises(ValueError, match="Embedding is no linear layer"):
        DoRA(nn.Embedding(9, 4), r=2, lora_alpha=1)

    class Codes(nn.Module):
        in_features, out_features, weight = 9, 4, torch.zeros(4, 9, dtype=torch.uint8)

    with pytest.raises(ValueError, match="Codes gives no weight"):
        DoRA(Codes(), r=2, lora_alpha=1)


def test_a_model_lists_what_was_adapted():
    _, ours, _ = pair(partial(DoRA, **KINDS["DoRA"]), config(**KINDS["DoRA"]), Stack())
    assert list(adapters(ours)) == TARGETS
