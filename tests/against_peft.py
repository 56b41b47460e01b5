"""What every adapter has to do like peft's: outputs, gradients, steps, merging, what is trained."""

import copy
import warnings

import peft
import torch
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapt, adapters, innermost, merge, merge_and_unload, unmerge

B, T, D = 2, 5, 20


class Stack(nn.Module):
    """Layers of different sizes, none square; one without a bias."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(D, 36)
        self.inner = nn.Sequential(nn.Linear(36, 28, bias=False), nn.LayerNorm(28))
        self.fc2 = nn.Linear(28, 12)
        self.lm_head = nn.Linear(12, 7)

    def forward(self, x):
        x = self.inner(torch.tanh(self.fc1(x)))
        return self.lm_head(torch.tanh(self.fc2(x)))


TARGETS = ["fc1", "inner.0", "fc2"]


def plain(name: str) -> str:
    """A parameter's name without what peft puts around it."""
    parts = name.removeprefix("base_model.model.").replace("modules_to_save", "retrained")
    kept = [part for part in parts.split(".") if part != "default"]
    name = ".".join(kept)
    return name.removesuffix(".weight") if "magnitude" in name else name


def peft_model(model: nn.Module, config) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {plain(n): p for n, p in model.named_parameters() if p.requires_grad}


def pair(make, config, base: nn.Module | None = None, redraw: bool = True, **options):
    """Our adapted model and peft's, with the same random values for all that is trained."""
    base = Stack() if base is None else base
    ours, theirs = copy.deepcopy(base), peft_model(copy.deepcopy(base), config)
    adapt(ours, config.target_modules, make, **options)
    mine, his = trained(ours), trained(theirs)
    assert mine.keys() == his.keys()
    with torch.no_grad():
        for name, weight in his.items():
            if redraw:
                weight.copy_(torch.randn(weight.shape) * 0.3)
                if "magnitude" in name:
                    weight.abs_().add_(0.5)
            assert mine[name].shape == weight.shape
            mine[name].copy_(weight)
    return base, ours, theirs


def frozen_is_untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    for name, weight in frozen.items():
        assert weight.grad is None and torch.equal(weight, before[name])
    assert frozen


def same_training(ours, theirs, x: torch.Tensor, steps: int = 2) -> None:
    """Outputs and gradients, through steps of an optimizer; frozen weights stay to the bit."""
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    mine, his = trained(ours), trained(theirs)
    optimizers = [torch.optim.SGD(params.values(), lr=0.05) for params in (mine, his)]
    for _ in range(steps):
        outputs = [model(x) for model in (ours, theirs)]
        assert_close(*outputs)
        for optimizer, y in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (y.square() + y).mean().backward()
        for name, weight in mine.items():
            assert_close(weight.grad, his[name].grad)
            assert weight.grad.abs().max() > 0
        for optimizer in optimizers:
            optimizer.step()
    moved = [not torch.equal(p, before[n]) for n, p in ours.named_parameters() if p.requires_grad]
    assert all(moved)
    frozen_is_untouched(ours, before)
    assert_close(ours(x), theirs(x))


@torch.no_grad()
def same_merged(ours, theirs, x: torch.Tensor) -> None:
    """Merged is unmerged; the merged weights are peft's; unmerging gives back every bit."""
    before, weights = ours(x), {n: p.clone() for n, p in ours.named_parameters()}
    merge(ours)
    assert_close(ours(x), before)
    changed = {p: innermost(a).weight.clone() for p, a in adapters(ours).items()}
    assert all(not torch.equal(w, weights[f"{p}.base_layer.weight"]) for p, w in changed.items())
    unmerge(ours)
    assert torch.equal(ours(x), before)
    for name, weight in ours.named_parameters():
        assert torch.equal(weight, weights[name])
    mine, his = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert mine.keys() == his.keys()
    for name, weight in mine.items():
        assert_close(weight, his[name])
    assert_close(ours(x), before)


def same_as_peft(make, config, base: nn.Module | None = None, **options) -> None:
    """All of it, from random values of everything trained."""
    base, ours, theirs = pair(make, config, base, **options)
    x = torch.randn(B, T, D)
    assert (ours(x) - base(x)).abs().max() > 1e-2
    same_training(ours, theirs, x)
    same_merged(ours, theirs, x)


def same_with_dropout(make, config) -> None:
    """The same numbers are dropped from the same seed, and none in evaluation mode."""
    _, ours, theirs = pair(make, config)
    x, outputs = torch.randn(B, T, D), []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    assert_close(*outputs)
    assert (outputs[0] - ours.eval()(x)).abs().max() > 0.01
    assert_close(ours(x), theirs.eval()(x))
