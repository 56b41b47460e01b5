"""Which layers get an adapter, after peft's rules; freezing, switching, merging."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import (
    Adapter,
    Retrained,
    adapt,
    adapters,
    dense_weight,
    exact_patterns,
    innermost,
    install,
    layer_number,
    linear_layers,
    matches,
    merge,
    merge_and_unload,
    pattern_value,
    put,
    slots,
    switch,
    switched,
    unmerge,
)
from tests.against_peft import TARGETS, B, D, Stack, peft_model, trained


class Whole(Adapter):
    """Adds a trained matrix."""

    def __init__(self, base_layer: nn.Module, name: str = "default"):
        super().__init__(base_layer, name=name)
        self.delta = nn.Parameter(torch.randn(self.out_features, self.in_features))

    def delta_weight(self):
        return self.delta


class Deep(nn.Module):
    """Two lists of layers, linear layers of one name in both."""

    def __init__(self):
        super().__init__()

        def layer():
            return nn.ModuleDict({"q_proj": nn.Linear(4, 6), "out_proj": nn.Linear(6, 4)})

        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.h = nn.ModuleList(layer() for _ in range(12))
        self.experts = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(layer() for _ in range(2))}) for _ in range(2)
        )
        self.xq_proj = nn.Linear(4, 6)
        self.lm_head = nn.Linear(4, 7)


PATTERNS = {
    "an end": {"target_modules": ["q_proj"]},
    "two": {"target_modules": ["q_proj", "out_proj"]},
    "a path": {"target_modules": ["layers.1.q_proj"]},
    "an expression": {"target_modules": r"layers\.\d\.(q|out)_proj"},
    "half an expression": {"target_modules": r".*q_proj"},
    "all": {"target_modules": "all-linear"},
    "all, otherwise written": {"target_modules": "ALL-linear"},
    "without": {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.q_proj", "xq_proj"]},
    "without, an expression": {"target_modules": ["q_proj"], "exclude_modules": r"h\..*"},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.q_proj", "xq_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layer 0": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 11]},
    "no numbers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "of a list": {
        "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
    },
    "of two lists": {
        "target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["layers", "h"],
    },
    "a path's number is not asked": {
        "target_modules": ["layers.1.q_proj", "out_proj"], "layers_to_transform": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize("given", PATTERNS.values(), ids=PATTERNS)
def test_finds_the_layers_that_peft_adapts(given):
    config = peft.LoraConfig(r=2, **given)
    theirs = peft_model(nn.ModuleDict({"a": Deep()})["a"], config)
    lora = peft.tuners.lora.LoraLayer
    wanted = [
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, lora)
    ]
    # Of a module that is no transformers model, peft doesn't know the head.
    if isinstance(config.target_modules, set) and "lm_head" in config.target_modules:
        wanted.remove("lm_head")
    assert list(linear_layers(Deep(), **given)) == wanted != []


def test_all_linear_leaves_the_head():
    assert "lm_head" not in linear_layers(Deep(), "all-linear")
    assert list(linear_layers(Deep(), ["lm_head"])) == ["lm_head"]


def test_an_adapted_layer_is_one_slot():
    model = Stack()
    before = [path for path, _ in slots(model)]
    assert before == ["fc1", "inner", "inner.0", "inner.1", "fc2", "lm_head"]
    adapt(model, TARGETS, Whole, modules_to_save=["inner.1"])
    assert [path for path, _ in slots(model)] == before
    assert [(p, type(m)) for p, m in switched(model)] == [
        ("fc1", Whole), ("inner.0", Whole), ("inner.1", Retrained), ("fc2", Whole),
    ]  # fmt: skip
    adapt(model, "all-linear", lambda layer: Whole(layer, "second"))
    assert list(adapters(model, "second")) == TARGETS == list(adapters(model))
    assert isinstance(innermost(model.fc1), nn.Linear)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"target_modules": ["fc1", "fc"]}, "target_modules: 'fc' matches none of 6 modules"),
        ({"target_modules": "c1"}, "target_modules: 'c1' matches none of 6 modules"),
        ({"target_modules": []}, r"no layer of 6 modules is left of \[\]"),
        ({"target_modules": ["1"]}, "inner.1 is a LayerNorm, not nn.Linear"),
        ({"target_modules": ["inner"]}, "inner is a Sequential, not nn.Linear"),
        ({"target_modules": ["fc1"], "exclude_modules": ["fc1"]}, r"is left of \['fc1'\]"),
        ({"target_modules": "fc1", "layers_to_transform": 1}, "layers_to_transform=1 with the exp"),
    ],
)
def test_refuses_patterns(given, said, unchecked):
    with pytest.raises(ValueError, match=said):
        linear_layers(Stack(), **given)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"modules_to_save": ["nothing"]}, "modules_to_save: 'nothing' matches nothing"),
        ({"modules_to_save": ["c1"]}, "fc1: adapted and trained whole at once"),
        ({"bias": "some"}, "bias='some' isn't one of 'none', 'all', 'lora_only'"),
    ],
)
def test_refuses_before_the_model_is_changed(options, said, unchecked):
    model = Stack()
    with pytest.raises(ValueError, match=said):
        adapt(model, TARGETS, Whole, **options)
    assert not switched(model)


def test_matching():
    assert matches("a.fc", ["fc"]) and matches("fc", ["fc"]) and matches("a.fc", ["a.fc"])
    assert not matches("a.xfc", ["fc"]) and not matches("fc.a", ["fc"])
    assert matches("a.fc", r".*fc") and not matches("a.fc", "fc") and not matches("a.fcs", ".*fc")
    assert not matches("a.fc", ()) and not matches("a.fc", "")
    assert layer_number("model.layers.3.q", None) == layer_number("layers.3.q", "layers") == 3
    assert layer_number("m.layers.3.experts.5.q", None) == 3
    assert layer_number("layers.3.q", None) is None is layer_number("m.h.3.q", ["layers"])
    assert layer_number("m.h.13.q", ["layers", "h"]) == 13
    assert layer_number("m.h.3.q", []) == 3


def test_pattern_values():
    assert pattern_value({"fc": 2, "a.fc": 3}, "a.fc", 8) == 2
    assert pattern_value({"^fc": 2}, "a.fc", 8) == 8 and pattern_value({"c": 2}, "a.fc", 8) == 8
    assert pattern_value({r"a\.\d+": 2}, "x.a.12", 8) == 2 and pattern_value({}, "fc", 8.5) == 8.5
    assert pattern_value({"a": 2}, "a.fc", 8) == 8


def test_exact_patterns():
    assert exact_patterns(Deep(), ["xq_proj", "lm_head"]) == ["xq_proj", "lm_head"]
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    assert exact_patterns(model, ["fc"]) == "fc"
    assert exact_patterns(model, ["a.fc"]) == ["a.fc"]
    assert exact_patterns(model, ["a.fc", "fc"]) == ["a.fc", "fc"]
    model["b"] = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert exact_patterns(model, ["fc", "a.fc"]) == r"fc|a\.fc"


# Training, switching


def test_only_the_adapters_are_trained():
    model = Stack()
    layers = adapt(model, TARGETS, Whole)
    assert list(layers) == TARGETS and all(layers[p] is model.get_submodule(p) for p in TARGETS)
    assert list(trained(model)) == [f"{path}.delta" for path in TARGETS]
    adapt(model, ["fc1"], lambda layer: Whole(layer, "second"))
    assert list(trained(model)) == ["fc1.delta"]
    assert [p for p, a in switched(model) if a.enabled] == ["fc1"]


@pytest.mark.parametrize(
    "bias, wanted",
    [
        ("none", set()),
        ("all", {"fc1.base_layer", "fc2.base_layer", "inner.1", "lm_head"}),
        ("any_only", {"fc1.base_layer", "fc2.base_layer"}),
    ],
)
def test_biases_in_place(bias, wanted):
    model = Stack()
    adapt(model, TARGETS, Whole, bias=bias)
    assert {n for n in trained(model) if "bias" in n} == {f"{path}.bias" for path in wanted}


def test_a_module_trained_whole_is_a_copy():
    model, x = Stack(), torch.randn(B, D)
    before = model(x)
    adapt(model, ["fc1"], Whole, modules_to_save=["lm_head"], bias="all")
    with torch.no_grad():
        model.lm_head.retrained.weight.add_(1)
        model.lm_head.retrained.bias.add_(1)
    head = model.lm_head
    assert {n for n in trained(model) if "head" in n} == {
        "lm_head.retrained.weight", "lm_head.retrained.bias",
    }  # fmt: skip
    assert head.weight is head.retrained.weight and head.bias is head.retrained.bias
    assert_close(head.weight, head.base_layer.weight + 1)
    switch(model)
    assert torch.equal(model(x), before) and head.weight is head.base_layer.weight
    adapt(model, ["fc2"], lambda m: Whole(m, "second"), modules_to_save=["lm_head"])
    second = model.lm_head
    assert torch.equal(second.retrained.weight, head.base_layer.weight)
    assert second.current is second.retrained
    switch(model, "default")
    assert second.current is head.retrained
    switch(model)
    assert second.current is head.base_layer


def test_new_parts_take_the_models_mode():
    model = Stack().eval()
    adapt(model, ["fc1"], Whole, modules_to_save=["lm_head"])
    assert not any(module.training for module in model.modules())
    adapt(model.train(), ["fc2"], Whole)
    assert all(module.training for module in model.modules())


def test_switching_refuses_unknown_names():
    model = Stack()
    adapt(model, ["fc1"], Whole)
    with pytest.raises(ValueError, match="no adapter a, b; there are: default"):
        switch(model, "a", "default", "b")
    with pytest.raises(ValueError, match="there is an adapter 'default' on this layer"):
        adapt(model, ["fc1"], Whole)


def test_a_layer_at_two_places_keeps_one_adapter():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
    model["c"] = model["a"]
    layers = adapt(model, "all-linear", Whole)
    assert list(layers) == ["a", "b", "c"]
    assert model["a"] is model["c"] is not model["b"]


# Merging


def two() -> tuple[Stack, torch.Tensor, dict]:
    model = Stack()
    adapt(model, TARGETS, Whole)
    adapt(model, ["fc1"], lambda layer: Whole(layer, "second"))
    switch(model, "default", "second")
    return model, torch.randn(B, D), {n: w.clone() for n, w in model.named_parameters()}


def test_merges_all_that_is_on_and_back():
    model, x, before = two()
    expected = model(x)
    merge(model)
    merge(model)  # no second time
    assert_close(model(x), expected)
    base = innermost(model.fc1).weight
    w = before["fc1.base_layer.base_layer.weight"]
    assert_close(base, w + before["fc1.delta"] + before["fc1.base_layer.delta"])
    assert torch.equal(model.fc1.weight, base)
    with pytest.raises(ValueError, match="W changed since 'default' was merged"):
        model.fc1.base_layer.unmerge()
    unmerge(model)
    unmerge(model)
    assert all(torch.equal(w, before[n]) for n, w in model.named_parameters())
    assert torch.equal(model(x), expected)


def test_what_is_off_is_not_merged():
    model, x, _ = two()
    switch(model, "default")
    expected = model(x)
    merge(model)
    assert_close(model(x), expected)
    assert not model.fc1.merged and model.fc1.base_layer.merged
    assert_close(model.fc1.weight, innermost(model.fc1).weight)
    unmerge(model)
    switch(model)
    base = {n: w.clone() for n, w in model.named_parameters()}
    merge(model)
    assert all(torch.equal(w, base[n]) for n, w in model.named_parameters())


def test_unloading_leaves_a_plain_model():
    model, x, _ = two()
    adapt(model, ["fc2"], lambda m: Whole(m, "third"), modules_to_save=["lm_head"])
    nn.init.normal_(model.lm_head.retrained.weight)
    switch(model, "default", "second", "third")
    expected = model(x)
    assert merge_and_unload(model) is model
    assert_close(model(x), expected)
    assert model.state_dict().keys() == Stack().state_dict().keys()
    assert not switched(model)


def test_a_merge_that_would_change_another_module_is_refused():
    model = Stack()
    model.lm_head = nn.Linear(20, 36)
    model.lm_head.weight = model.fc1.weight
    adapt(model, TARGETS, Whole)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"fc1: its weight is shared: fc1\.base_layer, lm_head"):
        merge(model)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


class Codes(nn.Module):
    """Linear, but without a plain matrix."""

    in_features, out_features = 28, 12

    def forward(self, x):
        return x[..., :12]


def test_a_merge_into_a_quantized_layer_is_refused_before_any():
    model = Stack()
    model.fc2 = Codes()
    adapt(model, TARGETS, Whole)
    assert model(torch.randn(B, D)).shape == (B, 7)
    with pytest.raises(ValueError, match="fc2: can't merge into Codes: its weight is no plain"):
        merge(model)
    assert not model.fc1.merged
    with pytest.raises(ValueError, match=r"Codes \(in_features=28, out_features=12\)"):
        model.fc2.merge()
    with pytest.raises(ValueError, match="Codes gives no weight: it needs a dequantize"):
        dense_weight(Codes())


def test_half_precision_is_rounded_once():
    linear = nn.Linear(20, 36).bfloat16()
    whole, x = Whole(linear), torch.randn(B, 20).bfloat16()
    exact = linear.weight.float() + whole.delta
    assert whole(x).dtype == whole.weight.dtype == torch.bfloat16
    whole.merge()
    assert torch.equal(linear.weight, exact.bfloat16())


def test_base_methods_say_what_they_lack():
    with pytest.raises(NotImplementedError):
        Adapter(nn.Linear(2, 3)).delta_weight()
    with pytest.raises(ValueError, match="LayerNorm is no linear layer"):
        Adapter(nn.LayerNorm(3))


def test_install_and_put():
    model = Stack()
    install(model, {"inner.0": Whole(model.inner[0])})
    assert isinstance(model.inner[0], Whole)
    put(model, "fc1", nn.Identity())
    assert isinstance(model.fc1, nn.Identity)


def test_compiles_whole(unchecked):
    model, x, _ = two()
    assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
