"""LoRA against peft, on layers that aren't square, alpha != r, B != 0."""

import copy
import math
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapt, adapters, device_of, merge, switch
from snippets.peft.lora import LoRA
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

KINDS = {
    "LoRA": {"r": 4, "lora_alpha": 10},
    "rank 1": {"r": 1, "lora_alpha": 0.5},
    "rsLoRA": {"r": 4, "lora_alpha": 10, "use_rslora": True},
    "a rank above the sizes": {"r": 40, "lora_alpha": 3},
}


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"target_modules": TARGETS} | changes)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_peft(kind):
    same_as_peft(partial(LoRA, **kind), config(**kind))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_equals_peft_with_biases(bias):
    kind = KINDS["LoRA"]
    same_as_peft(partial(LoRA, **kind), config(**kind, bias=bias), bias=bias)


def test_equals_peft_with_modules_trained_whole():
    kind, also = KINDS["LoRA"], ["lm_head", "inner.1"]
    same_as_peft(partial(LoRA, **kind), config(**kind, modules_to_save=also), modules_to_save=also)


def test_equals_peft_with_dropout():
    kind = {"r": 4, "lora_alpha": 10, "lora_dropout": 0.4}
    same_with_dropout(partial(LoRA, **kind), config(**kind))


def test_equals_the_papers_formula():
    linear, x = nn.Linear(20, 36), torch.randn(B, T, 20)
    lora = LoRA(linear, r=4, lora_alpha=10)
    nn.init.normal_(lora.lora_B.weight)
    w, b, a = linear.weight, linear.bias, lora.lora_A.weight
    up = lora.lora_B.weight
    expected = torch.zeros(B, T, 36)
    for row in range(B):
        for t in range(T):
            h = w @ x[row, t] + b
            for k in range(4):
                h = h + 10 / 4 * up[:, k] * (a[k] @ x[row, t])
            expected[row, t] = h
    assert_close(lora(x), expected)
    assert_close(lora.weight, w + 2.5 * up @ a)
    assert torch.equal(lora.bias, b)


def test_nothing_changes_before_the_first_step():
    linear, x = nn.Linear(20, 36), torch.randn(B, 20)
    lora = LoRA(linear, r=4, lora_alpha=10)
    assert torch.equal(lora(x), linear(x))
    lora(x).sum().backward()
    assert lora.lora_A.weight.grad.abs().max() == 0 < lora.lora_B.weight.grad.abs().max()
    bound = 1 / math.sqrt(20)  # kaiming's with a = sqrt(5)
    assert 0.9 * bound < lora.lora_A.weight.abs().max() <= bound


def test_starts_where_peft_does_from_the_same_seed():
    base = Stack()
    torch.manual_seed(5)
    theirs = peft_model(copy.deepcopy(base), config(r=4, lora_alpha=10))
    torch.manual_seed(5)
    adapt(base, TARGETS, partial(LoRA, r=4, lora_alpha=10))
    his = trained(theirs)
    # Both draw A twice, peft for the layer's own start too: the first layer is the same.
    for name in ("fc1.lora_A.weight", "fc1.lora_B.weight"):
        assert trained(base)[name].shape == his[name].shape
        assert_close(trained(base)[name].std(), his[name].std(), atol=0.05, rtol=0)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_pissa_equals_peft(more):
    kind = {"r": 5, "lora_alpha": 12} | more
    base = Stack()
    ours = copy.deepcopy(base)
    adapt(ours, TARGETS, partial(LoRA, **kind, pissa=True))
    theirs = peft_model(copy.deepcopy(base), config(**kind, init_lora_weights="pissa"))
    mine, his = trained(ours), trained(theirs)
    for path in TARGETS:
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        assert_close(mine[b] @ mine[a], his[b] @ his[a])
        left = ours.get_submodule(path).base_layer.weight
        assert_close(left, theirs.base_model.model.get_submodule(path).base_layer.weight)
    x = torch.randn(B, T, D)
    assert_close(ours(x), base(x))
    for name in mine:  # an SVD's signs are free
        assert_close(mine[name].abs(), his[name].abs())


def test_pissa_takes_the_largest_singular_values():
    linear = nn.Linear(20, 36)
    values = torch.linalg.svdvals(linear.weight)
    lora = LoRA(linear, r=5, lora_alpha=12, pissa=True)
    assert lora.pissa and not LoRA(nn.Linear(3, 4), r=1, lora_alpha=1).pissa
    assert_close(torch.linalg.svdvals(lora.delta_weight())[:5], values[:5])
    assert_close(torch.linalg.svdvals(linear.weight)[:15], values[5:])
    # Root of the values on both sides: A's and B's rows are equally long.
    assert_close(lora.lora_A.weight.norm(dim=1), lora.lora_B.weight.norm(dim=0))
    # At the full rank nothing is left of W.
    linear = nn.Linear(20, 36)
    LoRA(linear, r=20, lora_alpha=12, pissa=True)
    assert_close(linear.weight, torch.zeros_like(linear.weight))
    half = nn.Linear(20, 36).bfloat16()
    assert LoRA(half, r=5, lora_alpha=12, pissa=True).lora_A.weight.dtype == torch.float32
    assert half.weight.dtype == torch.bfloat16


def test_alpha_over_r_keeps_the_size_of_the_change():
    x = torch.randn(64, 400)

    def spread(**kind) -> float:
        lora = LoRA(nn.Linear(400, 300), lora_alpha=8, **kind)
        nn.init.normal_(lora.lora_B.weight)
        return lora.delta_weight().std().item()

    # Columns that don't agree add up as their root: with alpha / r it shrinks as 1 / sqrt(r).
    assert spread(r=64) < 0.5 * spread(r=4)
    assert 0.8 < spread(r=64, use_rslora=True) / spread(r=4, use_rslora=True) < 1.25
    assert x.shape == (64, 400)


# Several by name


def test_several_adapters_equal_peft_and_switch():
    kinds = {"default": {"r": 4, "lora_alpha": 10}, "second": {"r": 3, "lora_alpha": 7}}
    _, ours, theirs = pair(partial(LoRA, **kinds["default"]), config(**kinds["default"]))
    theirs.add_adapter("second", config(**kinds["second"], bias="none"))
    adapt(ours, TARGETS, partial(LoRA, **kinds["second"], name="second"))
    with torch.no_grad():
        for path, layer in adapters(ours, "second").items():
            his = theirs.base_model.model.get_submodule(path)
            for part in ("lora_A", "lora_B"):
                getattr(layer, part).weight.normal_()
                getattr(his, part)["second"].weight.copy_(getattr(layer, part).weight)
    x = torch.randn(B, T, D)
    outputs = {}
    for name in kinds:
        switch(ours, name)
        theirs.set_adapter(name)
        outputs[name] = ours(x)
        assert_close(outputs[name], theirs(x))
        wanted = [n for n, p in theirs.named_parameters() if p.requires_grad]
        assert len(trained(ours)) == len(wanted) == 6
        assert all(name == "second" or "base_layer.lora_" in n for n in trained(ours))
    assert (outputs["default"] - outputs["second"]).abs().max() > 0.1
    switch(ours, *kinds)
    theirs.base_model.set_adapter(list(kinds))
    both = ours(x)
    assert_close(both, theirs(x))
    merge(ours)
    assert_close(ours(x), both)
    with pytest.raises(ValueError, match="merged: unmerge before you switch"):
        switch(ours)


def test_switched_off_is_the_model_as_it_was():
    kind = KINDS["LoRA"]
    base, ours, _ = pair(partial(LoRA, **kind), config(**kind))
    x = torch.randn(B, T, D)
    switch(ours)
    assert torch.equal(ours(x), base(x)) and not trained(ours)
    switch(ours, "default")
    assert len(trained(ours)) == 6


# Half precision, compiled


def test_parameters_in_float32_beside_a_half_precision_layer_as_peft_has_them():
    kind = KINDS["LoRA"]
    _, ours, theirs = pair(partial(LoRA, **kind), config(**kind), Stack().bfloat16())
    x = torch.randn(B, T, D).bfloat16()
    assert {p.dtype for p in trained(ours).values()} == {torch.float32}
    assert ours(x).dtype == torch.bfloat16
    assert_close(ours(x), theirs(x))
    before = ours(x)
    merge(ours)
    assert_close(ours(x), before, atol=0.05, rtol=0.05)  # W is rounded once more


def test_all_in_bfloat16():
    kind = KINDS["LoRA"]
    _, ours, _ = pair(partial(LoRA, **kind), config(**kind))
    x = torch.randn(B, T, D)
    expected = ours(x)
    found = ours.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_compiles_whole(unchecked):
    kind = KINDS["LoRA"]
    _, ours, _ = pair(partial(LoRA, **kind), config(**kind))
    x = torch.randn(B, T, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert all(p.grad is not None for p in trained(ours).values())


# Refused


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"r": 0}, "r=0 is below 1"),
        ({"r": -2}, "r=-2 is below 1"),
        ({"base_layer": nn.Embedding(3, 4)}, "Embedding is no linear layer"),
        ({"base_layer": nn.Bilinear(3, 4, 5)}, "Bilinear is no linear layer"),
        ({"pissa": True, "r": 5}, "PiSSA: r=5 is above the rank of W, 4 x 9"),
    ],
)
def test_refuses(wrong, said, unchecked):
    given = {"base_layer": nn.Linear(9, 4), "r": 4, "lora_alpha": 1} | wrong
    with pytest.raises(ValueError, match=said):
        LoRA(given.pop("base_layer"), **given)


def test_refuses_a_name_twice():
    lora = LoRA(nn.Linear(9, 4), r=4, lora_alpha=1)
    with pytest.raises(ValueError, match="there is an adapter 'default' on this layer already"):
        LoRA(lora, r=4, lora_alpha=1)


class Quantized(nn.Module):
    """A layer that stores no plain matrix."""

    def __init__(self, source: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("codes", (source.weight.detach() * 64).round().to(torch.int8))

    def dequantize(self):
        return self.codes.float() / 64

    def forward(self, x):
        return x @ self.dequantize().T


def test_stands_on_a_quantized_layer():
    base = Quantized(nn.Linear(20, 36))
    lora, x = LoRA(base, r=4, lora_alpha=10), torch.randn(B, 20)
    nn.init.normal_(lora.lora_B.weight)
    w = base.dequantize()
    assert_close(lora(x), x @ (w + 2.5 * lora.lora_B.weight @ lora.lora_A.weight).T)
    assert_close(lora.weight, w + lora.delta_weight())
    assert lora.bias is None and list(lora.own_parameters()) == ["lora_A.weight", "lora_B.weight"]
    with pytest.raises(ValueError, match=r"Quantized \(in_features=20, out_features=36\)"):
        lora.merge()
    with pytest.raises(ValueError, match="PiSSA changes W: Quantized has no plain matrix"):
        LoRA(base, r=4, lora_alpha=10, pissa=True)


def test_parameters_are_where_the_layer_is():
    assert LoRA(nn.Linear(9, 4, device="meta"), r=2, lora_alpha=1).lora_A.weight.is_meta
    base = Quantized(nn.Linear(9, 4)).to("meta")
    assert device_of(base).type == "meta"
    assert device_of(nn.Identity()).type == "cpu"
