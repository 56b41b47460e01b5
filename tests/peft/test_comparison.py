"""Equal budgets against peft's counts, and training together against one model after another.

Sizes are such that swapped axes show: layers aren't square, and no two numbers are alike.
"""

import copy
import math
import re
from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapters, innermost, linear_layers
from snippets.peft.comparison import (
    METHODS,
    ONE_RANK,
    adapt_to_budget,
    height,
    held_out_loss,
    one_by_one,
    ranks_for_budget,
    token_loss,
    train_together,
    trained_numbers,
    with_one_pair,
)
from snippets.peft.dora import DoRA
from snippets.peft.loha import LoHa
from snippets.peft.lokr import LoKr
from snippets.peft.lora import LoRA
from snippets.peft.vera import VeRA
from tests.against_peft import TARGETS, B, Stack, peft_model, trained

V, D, T, STEPS = 19, 12, 5, 20
RATES = [0.03, 0.003, 0.1]


def text_model() -> nn.Sequential:
    """A model of bigrams, which is enough to be trained."""
    return nn.Sequential(
        nn.Embedding(V, D), nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, 16), nn.Linear(16, V)
    )


def config(method: str, ranks: dict[str, int]) -> peft.PeftConfig:
    """peft's, with these ranks and alpha = r."""
    options = {"target_modules": list(ranks)}
    if method == "VeRA":
        return peft.VeraConfig(r=next(iter(ranks.values())), **options)
    options |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    if method == "LoHa":
        return peft.LoHaConfig(**options)
    if method == "LoKr":
        return peft.LoKrConfig(decompose_factor=2, **options)
    start = "pissa" if method == "PiSSA" else True
    options |= {"use_rslora": method == "rsLoRA", "use_dora": method == "DoRA"}
    return peft.LoraConfig(init_lora_weights=start, **options)


def by_formula(method: str, o: int, i: int, r: int) -> int:
    if method == "LoKr":  # W2 of o / 2 x i / 2, in two parts if that is less than half
        o2, i2 = o // 2, i // 2
        return 4 + (r * (o2 + i2) if r < max(o2, i2) / 2 else o2 * i2)
    return {"VeRA": o + r, "DoRA": o + r * (o + i), "LoHa": 2 * r * (o + i)}.get(
        method, r * (o + i)
    )


# Budgets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [700, 770])
def test_equals_peft_with_the_same_ranks(method, budget):
    """Trained set, its count, and outputs with the same values, alpha among them."""
    base = Stack()
    ours = copy.deepcopy(base)
    budget -= 250 * (method == "LoKr")  # which can't have as many
    made = adapt_to_budget(ours, TARGETS, method, budget)
    ranks = {path: layer.r for path, layer in made.items()}
    theirs = peft_model(copy.deepcopy(base), config(method, ranks))
    mine, his = trained(ours), trained(theirs)
    assert mine.keys() == his.keys()
    count = sum(p.numel() for p in his.values())
    assert count == trained_numbers(linear_layers(base, TARGETS), METHODS[method], ranks)
    assert 0.9 * budget < count <= budget
    x = torch.randn(B, T, 20)
    if method == "PiSSA":  # before the redraw: there W is changed by the start
        assert_close(ours(x), base(x))
        assert_close(ours.fc1.base_layer.weight, theirs.base_model.fc1.base_layer.weight)
    with torch.no_grad():
        for name, weight in his.items():
            weight.copy_(torch.randn(weight.shape) * 0.3)
            mine[name].copy_(weight)
    assert_close(ours(x), theirs(x))
    assert (ours(x) - base(x)).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_numbers_are_those_of_the_formula(method):
    layers = linear_layers(Stack(), TARGETS)
    sizes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    assert sizes == {"fc1": (36, 20), "inner.0": (28, 36), "fc2": (12, 28)}
    for r in (1, 2, 3, 11):
        expected = sum(by_formula(method, o, i, r) for o, i in sizes.values())
        assert trained_numbers(layers, METHODS[method], dict.fromkeys(layers, r)) == expected
    if method not in ONE_RANK:
        ranks = {"fc1": 2, "inner.0": 5, "fc2": 3}
        expected = sum(by_formula(method, *sizes[path], r) for path, r in ranks.items())
        assert trained_numbers(layers, METHODS[method], ranks) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", [0, 1, 100])
def test_ranks_by_brute_force(method, extra):
    """The largest common rank of all up to 200, then one more where it fits, in order."""
    layers = linear_layers(Stack(), TARGETS)
    sizes = [(layer.out_features, layer.in_features) for layer in layers.values()]

    def count(ranks):
        return sum(by_formula(method, *size, r) for size, r in zip(sizes, ranks, strict=True))

    budget = count([3] * 3) + extra
    common = max(r for r in range(1, 200) if count([r] * 3) <= budget)
    ranks = [common] * 3
    for k in range(3):
        more = [*ranks[:k], common + 1, *ranks[k + 1 :]]
        if count(more) <= budget and method not in ONE_RANK:
            ranks = more
    found = ranks_for_budget(layers, METHODS[method], budget, one_rank=method in ONE_RANK)
    assert found == dict(zip(layers, ranks, strict=True))
    plain = ranks_for_budget(layers, METHODS[method], budget, one_rank=True)
    assert plain == dict.fromkeys(layers, common)


def test_what_is_left_goes_on_to_later_layers():
    """After one to which it doesn't go: fc1 needs 56 more, inner.0 64, fc2 40."""
    layers = linear_layers(Stack(), TARGETS)
    lora = METHODS["LoRA"]
    for r in (1, 2, 3, 4):  # a budget that is met to the last number
        assert ranks_for_budget(layers, lora, 160 * r, one_rank=True) == dict.fromkeys(layers, r)
    for left, more in {39: "", 40: "fc2", 55: "fc2", 56: "fc1", 96: "fc1 fc2"}.items():
        found = ranks_for_budget(layers, lora, 2 * 160 + left)
        assert found == {path: 2 + (path in more.split()) for path in layers}


def test_refuses_budgets_that_no_rank_has(unchecked):
    layers = linear_layers(Stack(), TARGETS)
    assert ranks_for_budget(layers, METHODS["LoRA"], 160) == dict.fromkeys(layers, 1)
    with pytest.raises(ValueError, match=r"^budget=159, but rank 1 needs 160$"):
        ranks_for_budget(layers, METHODS["LoRA"], 159)
    # Whole factors: 18 x 10, 14 x 18 and 6 x 14, and three of 2 x 2. A rank of 8 is below half of
    # the longer side for fc1 and inner.0.
    whole = 180 + 252 + 84 + 12
    assert trained_numbers(layers, METHODS["LoKr"], dict.fromkeys(layers, 16)) == whole
    with pytest.raises(ValueError, match=f"^budget=900, but no rank needs more than {whole}$"):
        ranks_for_budget(layers, METHODS["LoKr"], 900)
    assert ranks_for_budget(layers, METHODS["LoKr"], whole - 1)
    with pytest.raises(ValueError, match=r"^method='Lora' isn't one of LoRA, rsLoRA, PiSSA"):
        adapt_to_budget(Stack(), TARGETS, "Lora", 900)
    with pytest.raises(ValueError, match=r"^layers that share a pair have one rank, not \[2, 5\]$"):
        with_one_pair(layers, {"fc1": 5, "inner.0": 2, "fc2": 5})


def test_methods_are_what_their_names_say():
    kinds = {"DoRA": DoRA, "LoHa": LoHa, "LoKr": LoKr, "VeRA": VeRA}
    assert sorted(ONE_RANK) == ["VeRA"]
    for method in METHODS:
        model = Stack()
        made = adapt_to_budget(model, TARGETS, method, 500)
        assert made == adapters(model)
        assert [type(layer) for layer in made.values()] == 3 * [kinds.get(method, LoRA)]
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        own = {f"{path}.{n}" for path, layer in made.items() for n in layer.own_parameters()}
        assert trainable == own
    for layer in adapt_to_budget(Stack(), TARGETS, "rsLoRA", 500).values():
        assert layer.r > 1 and layer.scaling == pytest.approx(math.sqrt(layer.r))
    assert METHODS["LoKr"](dict(a=nn.Linear(8, 8)), dict(a=1))["a"].inner == (2, 4)
    doubled = one_by_one(LoRA, "lora_alpha", use_rslora=True)
    assert doubled(dict(a=nn.Linear(8, 9)), dict(a=4))["a"].scaling == 2


def test_only_the_layers_asked_for():
    model = Stack()
    made = adapt_to_budget(model, ["fc2"], "LoRA", 200)
    assert list(made) == ["fc2"] and made["fc2"].r == 5
    assert isinstance(model.fc1, nn.Linear) and not model.fc1.weight.requires_grad


# Training


def several(method: str) -> list[nn.Module]:
    """Three models with the same frozen weights and different adapters."""
    base, models = text_model(), []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(copy.deepcopy(base))
        if method == "everything":
            models[-1].requires_grad_(True)
            nn.init.normal_(models[-1][0].weight)
        else:
            adapt_to_budget(models[-1], ["1", "3"], method, 140 if method == "LoKr" else 300)
    return models


def rise_and_fall(step: int, steps: int) -> float:
    """Of 20 steps two rise; the first is half as high."""
    return step / 2 if step < 2 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / (steps - 2))


@pytest.mark.parametrize("method", [*METHODS, "everything"])
def test_equals_one_after_another(method):
    models = several(method)
    alone, batches = copy.deepcopy(models), torch.randint(V, (STEPS, 3, 4, T + 1))
    before = {name: w.clone() for name, w in models[0].state_dict().items()}
    losses = train_together(models, batches, learning_rates=RATES)
    assert losses.shape == (STEPS, 3) and not losses.requires_grad
    for number, model in enumerate(alone):
        own = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(own, lr=RATES[number])
        for step in range(1, STEPS + 1):
            texts = batches[step - 1, number]
            adam.param_groups[0]["lr"] = RATES[number] * rise_and_fall(step, STEPS)
            loss = F.cross_entropy(model(texts[:, :-1]).mT, texts[:, 1:])
            assert_close(losses[step - 1, number], loss.detach(), rtol=1e-3, atol=1e-4)
            adam.zero_grad()
            loss.backward()
            adam.step()
        for (name, p), q in zip(models[number].named_parameters(), own_names(model), strict=True):
            # Adam divides gradients near zero by themselves; what is rounded there shows.
            assert_close(p, q, rtol=1e-2, atol=1e-3, msg=f"{name} of {number}")
            assert p.requires_grad == q.requires_grad and p.grad is None
            if not p.requires_grad:
                assert torch.equal(p, before[name])
    moved = [
        not torch.equal(p, before[n]) for n, p in models[0].named_parameters() if p.requires_grad
    ]
    assert all(moved)


def own_names(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in model.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.8), "eps": 0.1}])
def test_adam_in_double_precision(options):
    """With its options, and to the last digits: one step less to hide behind."""
    models = [model.double() for model in several("LoRA")]
    alone, batches = copy.deepcopy(models), torch.randint(V, (7, 3, 4, T + 1))
    train_together(models, batches, learning_rates=RATES, **options)
    for number, model in enumerate(alone):
        own = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(own, **options)
        for step, texts in enumerate(batches[:, number], 1):
            # Seven steps: none to rise, but the first is the highest.
            fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / 6)
            adam.param_groups[0]["lr"] = RATES[number] * fall
            adam.zero_grad()
            F.cross_entropy(model(texts[:, :-1]).mT, texts[:, 1:]).backward()
            adam.step()
        for p, q in zip(models[number].parameters(), model.parameters(), strict=True):
            assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_losses_fall():
    models = several("LoRA")
    batches = torch.randint(V, (1, 1, 4, T + 1)).expand(40, 3, -1, -1)
    losses = train_together(models, batches, learning_rates=[0.05] * 3)
    assert (losses[-1] < losses[0] - 0.3).all()


def test_height():
    assert [height(step, 5) for step in (1, 3, 5)] == pytest.approx([1, 0.5, 0])
    assert [height(step, 40) for step in (1, 2, 4, 22, 40)] == pytest.approx([0.25, 0.5, 1, 0.5, 0])
    assert height(13, 40) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert height(1, 29) == 0.5 and height(2, 29) == 1 and height(2, 19) < 1


def test_refuses_what_it_cannot_train_together(unchecked):
    models = several("LoRA")
    batches = torch.randint(V, (2, 3, 4, T + 1))
    said = "^not one of each: {} models, {} rates, batches for {}"
    for count, rates, groups in ((2, 3, 3), (3, 2, 3), (3, 3, 2)):
        with pytest.raises(ValueError, match=said.format(count, rates, groups) + "$"):
            train_together(models[:count], batches[:, :groups], learning_rates=RATES[:rates])
    with torch.no_grad():
        innermost(models[2][3]).weight[0, 0] += 0.1
    said = re.escape("3.base_layer.weight is frozen, but differs in 3 models")
    with pytest.raises(ValueError, match=f"^{said}$"):
        train_together(models, batches, learning_rates=RATES)


# Losses


def test_losses_are_means_over_all_tokens_but_the_first():
    model, texts = text_model(), torch.randint(V, (3, T + 1))
    log_p = model(texts[:, :-1]).log_softmax(-1)
    terms = [-log_p[b, t, texts[b, t + 1]] for b in range(3) for t in range(T)]
    expected = torch.stack(terms).mean()
    assert_close(token_loss(model(texts[:, :-1]), texts), expected)
    graphs = []
    model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    found = held_out_loss(model, texts)
    assert isinstance(found, float) and found == pytest.approx(expected.item())
    assert graphs == [False], "a graph is kept, which nothing will use"


def test_half_precision():
    ours = Stack()
    adapt_to_budget(ours, TARGETS, "LoRA", 700)
    for p in trained(ours).values():
        nn.init.normal_(p, std=0.2)
    x = torch.randn(B, T, 20)
    expected = ours(x)
    assert_close(ours.bfloat16()(x.bfloat16()).float(), expected, atol=0.2, rtol=0.1)
    logits, texts = torch.randn(2, T, V), torch.randint(V, (2, T + 1))
    low = token_loss(logits.bfloat16(), texts)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), token_loss(logits, texts), atol=0.02, rtol=0.02)


def test_compiles_whole(unchecked):
    torch.compiler.reset()
    compile_ = partial(torch.compile, fullgraph=True, backend="aot_eager")
    model, texts = several("DoRA")[0], torch.randint(V, (3, T + 1))
    assert_close(compile_(model)(texts), model(texts))
    logits = model(texts[:, :-1])
    assert_close(compile_(token_loss)(logits, texts), token_loss(logits, texts))
