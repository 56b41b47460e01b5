"""Adapters made comparable: equal numbers of trained parameters, and one training for all.

Each method gets the ranks that use up a budget. Models of other seeds or learning rates are
trained at once: one gradient for a stack of models (torch.func), so that a sweep is cheap.

Axes: m model, s step, b batch, t token, v vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from snippets.common.adapt import Adapter, Patterns, install, linear_layers
from snippets.peft.dora import DoRA
from snippets.peft.loha import LoHa
from snippets.peft.lokr import LoKr
from snippets.peft.lora import LoRA
from snippets.peft.vera import SharedProjections, VeRA

Layers, Ranks = Mapping[str, nn.Module], Mapping[str, int]
# Gives each layer, by path, its adapter of the rank that stands at this path.
Method = Callable[[Layers, Ranks], dict[str, Adapter]]


def one_by_one(kind: type[Adapter], alpha: str, **options: bool | int) -> Method:
    """A method whose layers share nothing. Alpha is r, so that alpha / r is 1 at any rank."""

    def method(layers: Layers, ranks: Ranks) -> dict[str, Adapter]:
        made = {}
        for path, layer in layers.items():
            made[path] = kind(layer, r=ranks[path], **{alpha: ranks[path]}, **options)
        return made

    return method


def with_one_pair(layers: Layers, ranks: Ranks) -> dict[str, Adapter]:
    """VeRA. All layers share the pair, so they have one rank.

    Raises:
        ValueError: ranks that differ.
    """
    if len(different := sorted(set(ranks.values()))) > 1:
        raise ValueError(f"layers that share a pair have one rank, not {different}")
    pair = SharedProjections(layers.values(), r=different[0])
    return {path: VeRA(layer, projections=pair) for path, layer in layers.items()}


METHODS: dict[str, Method] = {
    "LoRA": one_by_one(LoRA, "lora_alpha"),
    "rsLoRA": one_by_one(LoRA, "lora_alpha", use_rslora=True),
    "PiSSA": one_by_one(LoRA, "lora_alpha", pissa=True),
    "DoRA": one_by_one(DoRA, "lora_alpha"),
    "LoHa": one_by_one(LoHa, "alpha"),
    # W1 of 2 x 2: with factors near the root, a square layer can have no more numbers than
    # LoRA of rank 1.
    "LoKr": one_by_one(LoKr, "alpha", decompose_factor=2),
    "VeRA": with_one_pair,
}
ONE_RANK = {"VeRA"}


def trained_numbers(layers: Layers, method: Method, ranks: Ranks) -> int:
    """How many numbers a method trains: counted on adapters made on the meta device."""
    with torch.device("meta"):
        shapes = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
        made = method({path: nn.Linear(*shape) for path, shape in shapes.items()}, ranks)
    return sum(p.numel() for layer in made.values() for p in layer.own_parameters().values())


def ranks_for_budget(
    layers: Layers, method: Method, budget: int, *, one_rank: bool = False
) -> dict[str, int]:
    """The layers' ranks with which a method trains `budget` numbers, or as few less as can be.

    First the largest rank that all layers can have. What is left goes to the layers in their
    order, one rank more for each in which it still fits.

    Args:
        layers: linear layers by path.
        method: a value of `METHODS`, or another.
        budget: numbers to train, of all layers together.
        one_rank: leave out the second step.

    Raises:
        ValueError: rank 1 needs more numbers, or no rank needs as many.
    """

    def needed(r: int) -> int:
        return trained_numbers(layers, method, dict.fromkeys(layers, r))

    if (count := needed(1)) > budget:
        raise ValueError(f"{budget=}, but rank 1 needs {count}")
    fits, above = 1, 2
    while (more := needed(above)) <= budget:
        if more == count:  # factors that are stored whole
            raise ValueError(f"{budget=}, but no rank needs more than {count}")
        fits, above, count = above, 2 * above, more
    while above - fits > 1:
        middle = (fits + above) // 2
        fits, above = (middle, above) if needed(middle) <= budget else (fits, middle)

    ranks = dict.fromkeys(layers, fits)
    for path in () if one_rank else layers:
        raised = ranks | {path: fits + 1}
        if trained_numbers(layers, method, raised) <= budget:
            ranks = raised
    return ranks


def adapt_to_budget(
    model: nn.Module, target_modules: Patterns, method: str, budget: int
) -> dict[str, Adapter]:
    """Give layers adapters of one method that train `budget` numbers or few less; freeze the rest.

    Args:
        model: changed itself.
        target_modules: as in `adapt`.
        method: a key of `METHODS`.
        budget: as in `ranks_for_budget`.

    Returns:
        The adapters by path.

    Raises:
        ValueError: an unknown method, or what `linear_layers` and `ranks_for_budget` refuse.
    """
    if method not in METHODS:
        raise ValueError(f"{method=} isn't one of {', '.join(METHODS)}")
    layers = linear_layers(model, target_modules)
    ranks = ranks_for_budget(layers, METHODS[method], budget, one_rank=method in ONE_RANK)
    made = METHODS[method](layers, ranks)
    install(model, made)
    return made


def token_loss(logits: Float[Tensor, "b t v"], texts: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean surprisal, in nats, of the texts' tokens from the second on: n is t + 1."""
    return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, texts: Int[Tensor, "b n"]) -> float:
    """The same of a model, each token guessed from those before it in its text."""
    return token_loss(model(texts[:, :-1]), texts).item()


def height(step: int, steps: int) -> float:
    """Share of the learning rate at step 1, 2, …: up in a line for a tenth, down along a cosine."""
    rise = max(1, steps // 10)
    if step <= rise:
        return step / rise
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def train_together(
    models: Sequence[nn.Module],
    batches: Int[Tensor, "s m b n"],
    *,
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Float[Tensor, "s m"]:
    """Train models that have the same frozen weights, in place: Adam, each with its own rate.

    It is what training them one after another gives, for less time: a frozen layer multiplies
    the tokens of all models at once. Without weight decay, which would pull an adapter
    towards the frozen model, but a full fine-tune away from it. Without dropout.

    Args:
        models: alike but for the values of what is trained.
        batches: the texts of each step, for each model; a text's last token is only a target.
        learning_rates: of each model, the highest; see `height`.
        betas: of Adam.
        eps: of Adam.

    Returns:
        The losses, each before its step.

    Raises:
        ValueError: as many models as rates and batches there aren't, or frozen weights differ.
    """
    steps, count = batches.shape[:2]
    if not len(models) == len(learning_rates) == count:
        found = f"{len(models)} models, {len(learning_rates)} rates, batches for {count}"
        raise ValueError(f"not one of each: {found}")
    first, states = models[0], [model.state_dict() for model in models]
    names = [name for name, p in first.named_parameters() if p.requires_grad]
    for name, frozen in states[0].items():
        if name not in names and not all(torch.equal(frozen, state[name]) for state in states):
            raise ValueError(f"{name} is frozen, but differs in {count} models")

    def loss(weights: dict[str, Tensor], texts: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        return token_loss(functional_call(first, weights, (texts[:, :-1],)), texts)

    gradients = vmap(grad_and_value(loss))
    weights = {name: torch.stack([state[name] for state in states]) for name in names}  # m …
    mean = {name: torch.zeros_like(w) for name, w in weights.items()}
    square = {name: torch.zeros_like(w) for name, w in weights.items()}
    rates, losses = torch.tensor(learning_rates), []
    for step, texts in enumerate(batches, start=1):
        # Attention in its plain form: the fused ones aren't made for a stack of models.
        with sdpa_kernel(SDPBackend.MATH):
            grads, values = gradients(weights, texts)
        losses.append(values)
        for name, g in grads.items():
            m = mean[name].lerp_(g, 1 - betas[0]) / (1 - betas[0] ** step)
            v = square[name].lerp_(g * g, 1 - betas[1]) / (1 - betas[1] ** step)
            rate = height(step, steps) * rates.view(-1, *[1] * (g.ndim - 1))
            weights[name] -= rate * m / (v.sqrt() + eps)
    with torch.no_grad():
        for name, stack in weights.items():
            for model, trained in zip(models, stack, strict=True):
                model.get_parameter(name).copy_(trained)
    return torch.stack(losses)
