"""Optimizers: what to do with a gradient, as functions of one parameter, and a loop over all.

Momentum: Polyak 1964, in Nesterov's form as Sutskever et al. 2013 have it; Adam: Kingma and
Ba 2014 (arXiv:1412.6980); AdamW: Loshchilov and Hutter 2017 (arXiv:1711.05101), the cosine
schedule theirs too (arXiv:1608.03983); Muon: Jordan et al. 2024, scaled up by Liu et al.
2025 (arXiv:2502.16982).

Axes: parameters have any shape, except Muon's: o outputs, i inputs of a matrix.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

State = dict[str, Tensor | int]


def sgd(
    p: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    state: State,
    lr: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """p - lr · b with the decaying sum b = momentum · b + g; returns the new parameter.

    Nesterov's form steps along g + momentum · b, as if the gradient had been taken where the
    momentum leads. The decay is L2's, a part of the gradient.
    """
    g = g + weight_decay * p
    if momentum:
        state["momentum"] = momentum * state.get("momentum", torch.zeros_like(p)) + g
        g = g + momentum * state["momentum"] if nesterov else state["momentum"]
    return p - lr * g


def adam(
    p: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    state: State,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Float[Tensor, "*shape"]:
    """p - lr · m / (√v + eps), with means of g and g²; the decay is a part of g."""
    g = g + weight_decay * p
    start = torch.zeros_like(p)
    state["step"] = t = state.get("step", 0) + 1
    state["mean"] = m = torch.lerp(state.get("mean", start), g, 1 - betas[0])
    state["square"] = v = torch.lerp(state.get("square", start), g * g, 1 - betas[1])
    # Both started at 0. Divided by the weight that real gradients have in them by now, they
    # are averages of gradients only.
    m = m / (1 - betas[0] ** t)
    v = v / (1 - betas[1] ** t)
    return p - lr * m / (v.sqrt() + eps)


def adamw(
    p: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    state: State,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Float[Tensor, "*shape"]:
    """Adam whose decay stays out of the gradient: first p shrinks by lr · weight_decay."""
    return adam(p * (1 - lr * weight_decay), g, state, lr, betas=betas, eps=eps)


def muon(
    p: Float[Tensor, "o i"],
    g: Float[Tensor, "o i"],
    state: State,
    lr: float,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    ns_steps: int = 5,
    adjust_lr: str = "original",
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "o i"]:
    """p - lr · c · O, where O is the momentum with all singular values brought near 1.

    For matrices inside a network; embeddings, heads, norms and biases are left to AdamW.
    The decay is decoupled, and by lr, not by lr · c.

    Args:
        p: the matrix.
        g: its gradient.
        state: of this parameter; empty at the start.
        lr: the learning rate.
        momentum: of the running mean. The paper has a sum; the scale makes no difference.
        nesterov: mix the newest gradient in once more.
        weight_decay: decoupled.
        ns_steps: steps of `orthogonalize`.
        adjust_lr: c, "original" √max(1, o / i), or "match_rms_adamw" 0.2 √max(o, i), with
            which the step is about as large as AdamW's at the same learning rate.
        dtype: that `orthogonalize` computes in; torch has bfloat16 whatever p has.

    Raises:
        ValueError: p is no matrix; an unknown `adjust_lr`.
    """
    if p.ndim != 2:
        raise ValueError(f"Muon wants a matrix, not shape {tuple(p.shape)}")
    if adjust_lr not in ("original", "match_rms_adamw"):
        raise ValueError(f"unknown {adjust_lr=}")
    o, i = p.shape
    c = math.sqrt(max(1, o / i)) if adjust_lr == "original" else 0.2 * math.sqrt(max(o, i))
    b = torch.lerp(state.get("momentum", torch.zeros_like(g)), g, 1 - momentum)
    state["momentum"] = b
    update = torch.lerp(g, b, momentum) if nesterov else b
    direction = orthogonalize(update, ns_steps, dtype=dtype).to(p.dtype)
    return p * (1 - lr * weight_decay) - lr * c * direction


def orthogonalize(
    g: Float[Tensor, "o i"],
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "o i"]:
    """About U Vᵀ of g = U S Vᵀ, without an SVD: an odd polynomial applied to the matrix.

    a X + b (X Xᵀ) X + c (X Xᵀ)² X leaves U and V alone and takes each singular value s to
    a s + b s³ + c s⁵. These coefficients (Jordan 2024) lift small ones fast, and land
    between 0.7 and 1.2 rather than at 1.
    """
    a, b, c = coefficients
    x = g.to(dtype)
    x = x.mT if x.shape[0] > x.shape[1] else x  # the smaller X Xᵀ
    x = x / x.norm().clamp(min=eps)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        # One rounding each in bfloat16, as torch has it.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g.shape[0] > g.shape[1] else x


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """Share of the learning rate: up in a line from 0, down along a cosine to `final`.

    Raises:
        ValueError: no steps left after the warm-up.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"no room: {warmup_steps=}, {total_steps=}")
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """Applies a rule, such as `partial(adamw, weight_decay=0.1)`, to every parameter.

    `lr` may be set before each step. Parameters without a gradient stay, without any decay.

    Raises:
        ValueError: no parameters.
    """

    def __init__(self, params: Iterable[nn.Parameter], rule: Callable[..., Tensor], lr: float):
        self.params = list(params)
        if not self.params:
            raise ValueError("no parameters (an iterator that was used up?)")
        self.rule = rule
        self.lr = lr
        self.state = [{} for _ in self.params]

    @torch.no_grad()
    def step(self) -> None:
        for p, state in zip(self.params, self.state, strict=True):
            if p.grad is not None:
                p.copy_(self.rule(p, p.grad, state, self.lr))

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_bytes(self) -> int:
        """Of all tensors kept from step to step."""
        values = [value for state in self.state for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, Tensor))
