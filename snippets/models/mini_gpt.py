"""Training a small GPT on one text: batches, first weights, loss, and the step that repeats.

First weights: Radford et al. 2019 (GPT-2). Decay for matrices only, warm-up, cosine to a tenth
and clipping at 1: Brown et al. 2020 (arXiv:2005.14165); AdamW: Loshchilov and Hutter 2017
(arXiv:1711.05101); clipping: Pascanu et al. 2012 (arXiv:1211.5063). The model is GPT-2's,
unchanged.

Axes: n token of a text, b sequence, t token of a sequence.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.common.generate import next_token
from snippets.foundations.optimizers import Optimizer, adamw, warmup_cosine
from snippets.foundations.softmax_and_cross_entropy import cross_entropy


@torch.no_grad()
def first_weights(model: nn.Module, *, num_layers: int, std: float = 0.02) -> None:
    """Draw the weights anew as GPT-2 had them: all matrices from N(0, std²), biases 0, gains 1.

    Matrices that write to the stream, named c_proj, get std / √(2 layers): there are two a
    layer, and so many independent terms would add up to a stream that much wider.
    """
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            writes = name.endswith("c_proj.weight")
            p.normal_(std=std * (2 * num_layers) ** -0.5 if writes else std)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)


def random_batch(
    tokens: Int[Tensor, " n"], *, batch_size: int, context: int, generator: torch.Generator
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Windows of a text that start anywhere, and the same moved on by one token: the targets.

    Raises:
        ValueError: the text is too short for a window and the token behind it, or the window empty.
    """
    starts = len(tokens) - context  # the last token is a target only
    if starts < 1 or context < 1:
        raise ValueError(f"{len(tokens)} tokens don't fit {context=} and a target")
    start = torch.randint(starts, (batch_size, 1), generator=generator)  # b 1
    at = start + torch.arange(context)  # b t
    return tokens[at], tokens[at + 1]


def next_token_loss(
    model: nn.Module, inputs: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Mean surprisal at the targets, in nats: -log P(target | this and all earlier inputs).

    The batch has moved the targets already; moving them again would train to skip a token.
    """
    return cross_entropy(model(input_ids=inputs), targets)


@torch.no_grad()
def text_loss(
    model: nn.Module, tokens: Int[Tensor, " n"], *, context: int, batch_size: int = 64
) -> float:
    """Mean surprisal of a text from its second token on, each token guessed once.

    The text is read in windows, one after another, of which each starts without memory. The last
    is shorter.

    Raises:
        ValueError: no token to guess, or an empty window.
    """
    guessed = len(tokens) - 1
    if guessed < 1 or context < 1:
        raise ValueError(f"nothing to guess: {len(tokens)} tokens, {context=}")
    whole = guessed // context * context
    inputs, targets = tokens[:-1], tokens[1:]
    rows = (part[:whole].view(-1, context).split(batch_size) for part in (inputs, targets))
    pairs = [*zip(*rows, strict=True), (inputs[None, whole:], targets[None, whole:])]
    total = 0.0
    for x, y in pairs:  # b t
        if x.numel():  # a text may be shorter than a window, or end with one
            total += next_token_loss(model, x, y).item() * x.numel()
    return total / guessed


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters that decay and that don't: matrices and embeddings; biases and gains.

    Decay pulls to 0, where a gain of 1 has no business. A tied head is listed once.
    """
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Float[Tensor, ""]:
    """Shorten all gradients by one factor, so that together they are no longer than `limit`.

    Returns:
        The length before: √ of the sum of all squares. Infinite or NaN ones aren't mended.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    length = torch.stack([g.norm() for g in gradients]).norm()
    factor = (limit / (length + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor)
    return length


@dataclass(frozen=True)
class Plan:
    """How to train; the defaults are for a model of a few hundred thousand parameters.

    Raises:
        ValueError: a warm-up that leaves no steps, or a rate or limit that isn't positive.
    """

    steps: int
    lr: float = 4e-3
    warmup_steps: int = 100
    final: float = 0.1  # share of lr that the cosine ends at
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    limit: float = 1.0

    def __post_init__(self):
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"no room: {self.warmup_steps=}, {self.steps=}")
        if not (self.lr > 0 and self.limit > 0):
            raise ValueError(f"must be positive: {self.lr=}, {self.limit=}")


class Trainer:
    """Loss, gradients, clipping, and AdamW at the rate that the schedule has for this step.

    The very first rate of a warm-up is 0, as in transformers: that step only fills AdamW's means.
    """

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan, self.steps = model, plan, 0
        decayed, others = decay_groups(model)
        rule = partial(adamw, betas=plan.betas)
        self.optimizers = [
            Optimizer(decayed, partial(rule, weight_decay=plan.weight_decay), plan.lr),
            Optimizer(others, partial(rule, weight_decay=0.0), plan.lr),
        ]

    def rate(self) -> float:
        """The learning rate of the next step."""
        plan = self.plan
        share = warmup_cosine(
            self.steps, warmup_steps=plan.warmup_steps, total_steps=plan.steps, final=plan.final
        )
        return plan.lr * share

    def step(self, inputs: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]) -> float:
        """One step; returns the loss before it.

        Raises:
            FloatingPointError: the loss isn't finite; the weights are left as they were.
        """
        loss = next_token_loss(self.model, inputs, targets)
        if not loss.isfinite():
            raise FloatingPointError(f"loss {loss.item()} at step {self.steps}")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        clip_gradients(self.model.parameters(), self.plan.limit)
        for optimizer in self.optimizers:
            optimizer.lr = self.rate()
            optimizer.step()
        self.steps += 1
        return loss.item()


@torch.no_grad()
def write(
    model: nn.Module,
    tokens: Int[Tensor, "b t"],
    *,
    new: int,
    context: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b tn"]:
    """Continue sequences beyond the model's positions, looking back `context` tokens.

    As the window moves on, each token gets a new position, so no key or value can be kept: it is
    computed again for each new token.

    Raises:
        ValueError: nothing to look back at.
    """
    if context < 1 or tokens.shape[1] < 1:
        raise ValueError(f"nothing to look back at: {context=}, {tokens.shape[1]} tokens")
    for _ in range(new):
        logits = model(input_ids=tokens[:, -context:])[:, -1]  # b v
        token = next_token(logits, temperature, generator=generator)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    return tokens
