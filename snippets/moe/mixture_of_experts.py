"""Sparse mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538).

A layer has many feed-forward networks, and each token goes through a few of them. Routing
is that of Mixtral (Jiang et al. 2024, arXiv:2401.04088), capacity that of GShard (Lepikhin
et al. 2020, arXiv:2006.16668), the loss that keeps experts in use that of Switch (Fedus et
al. 2021, arXiv:2101.03961), the z-loss that of ST-MoE (Zoph et al. 2022, arXiv:2202.08906).

Axes: n token (of all sequences), k choice of a token, e expert, d hidden size,
f intermediate size of one expert.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.layers.swiglu import ACTIVATIONS


def top_k_routing(
    logits: Float[Tensor, "n e"], top_k: int, *, norm_topk_prob: bool = True
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Each token's k most probable experts, best first, and what each one's output weighs.

    weights = p[chosen] / sum p[chosen] with p = softmax(logits) over all experts, in
    float32. That is the softmax of the chosen logits alone. Not normalised
    (`norm_topk_prob=False`, as in OLMoE), the weights are p[chosen].

    Raises:
        ValueError: fewer experts than choices, or no choice.
    """
    refuse_top_k(top_k, logits.shape[-1])
    weights, chosen = logits.softmax(dim=-1, dtype=torch.float32).topk(top_k)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def refuse_top_k(top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"a token can't choose {top_k} of {num_experts} experts")


def within_capacity(
    chosen: Int[Tensor, "n k"],
    *,
    num_experts: int,
    capacity: int,
    mask: Int[Tensor, " n"] | Bool[Tensor, " n"] | None = None,
) -> Bool[Tensor, "n k"]:
    """Which choices find room, when an expert takes `capacity` tokens at most.

    First come, first served: all tokens' first choices in the order of the tokens, then
    all second choices, as in GShard. Padding (0 in the mask) takes no room and gets none.
    """
    queue = F.one_hot(chosen.T.flatten(), num_experts)  # kn e
    if mask is not None:
        queue = queue * mask.repeat(chosen.shape[1])[:, None]
    place = (queue.cumsum(dim=0) * queue).sum(dim=-1)  # kn; from 1, and 0 for padding
    return ((place > 0) & (place <= capacity)).unflatten(0, chosen.T.shape).T


def load_balancing_loss(
    logits: Float[Tensor, "n e"],
    top_k: int,
    mask: Int[Tensor, " n"] | Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """e sum_i f_i P_i, for one layer; k when the routing is uniform (Switch, eq. 4 to 6).

    f_i is the share of tokens that choose expert i, P_i its mean probability over the
    tokens, chosen or not; gradients flow through P. The f_i sum to k, as in transformers:
    divide by k for a loss that doesn't depend on it. Several layers: the mean of theirs.

    Args:
        logits: of the router, before any softmax.
        top_k: experts for each token.
        mask: 1 for tokens, 0 for padding, which doesn't count.

    Raises:
        ValueError: fewer experts than choices, or a mask of another length.
    """
    e = logits.shape[-1]
    refuse_top_k(top_k, e)
    share = token_shares(logits, mask)
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    chosen = F.one_hot(probabilities.topk(top_k).indices, e).sum(dim=1)  # n e
    return e * ((share @ chosen.float()) @ (share @ probabilities))


def router_z_loss(
    logits: Float[Tensor, "n e"], mask: Int[Tensor, " n"] | Bool[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """The mean over tokens of logsumexp(logits)²: keeps the router's logits small (ST-MoE, eq. 5).

    Raises:
        ValueError: a mask of another length.
    """
    return token_shares(logits, mask) @ logits.float().logsumexp(dim=-1).square()


def token_shares(
    logits: Float[Tensor, "n e"], mask: Int[Tensor, " n"] | Bool[Tensor, " n"] | None
) -> Float[Tensor, " n"]:
    """1 / n for each token, or 1 / (tokens that aren't padding) and 0 for padding."""
    if mask is None:
        mask = torch.ones(len(logits), device=logits.device)
    elif len(mask) != len(logits):
        raise ValueError(f"a mask of {len(mask)} for {len(logits)} tokens")
    return mask / mask.sum().clamp(min=1)


def dense_experts(
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    gate_proj: Float[Tensor, "e f d"],
    up_proj: Float[Tensor, "e f d"],
    down_proj: Float[Tensor, "e d f"],
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Float[Tensor, "n d"]:
    """y = sum_e share_e · down_e(activation(gate_e(x)) * up_e(x)), all experts on all tokens.

    The formula as it stands: e / k times the work of `grouped_experts`, the same result.
    """
    y = torch.zeros_like(x)
    # One unbind each: w[number] would give the gradient of a whole e f d for each expert.
    for number, (gate, up, down) in enumerate(zip(gate_proj, up_proj, down_proj, strict=True)):
        share = (weights * (chosen == number)).sum(dim=-1, keepdim=True)  # n 1
        y = y + share * F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)
    return y.to(x.dtype)


def grouped_experts(
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    gate_proj: Float[Tensor, "e f d"],
    up_proj: Float[Tensor, "e f d"],
    down_proj: Float[Tensor, "e d f"],
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Float[Tensor, "n d"]:
    """The same as `dense_experts`, each expert on its own tokens only.

    Sorts the n k pairs of token and expert by expert, so that each expert's rows lie
    together, and multiplies every group with its own matrix in one call.
    """
    experts, order = chosen.flatten().sort()  # nk
    numbers = torch.arange(len(gate_proj), device=x.device)
    ends = torch.searchsorted(experts, numbers, right=True).int()  # e
    token = order // chosen.shape[1]  # nk; whose row it is
    rows = x[token]  # nk d
    gate = activation(F.grouped_mm(rows, gate_proj.mT, offs=ends))  # nk f
    out = F.grouped_mm(gate * F.grouped_mm(rows, up_proj.mT, offs=ends), down_proj.mT, offs=ends)
    out = out * weights.flatten()[order, None]  # nk d
    return torch.zeros_like(x, dtype=out.dtype).index_add(0, token, out).to(x.dtype)


def can_group(x: Float[Tensor, "n d"], intermediate_size: int) -> bool:
    """Whether torch 2.13's `grouped_mm` takes it: rows of whole 16 bytes, no float64.

    Under torch.compile it takes bfloat16 only.
    """
    if any(size * x.element_size() % 16 for size in (x.shape[-1], intermediate_size)):
        return False
    eager = (torch.float32, torch.float16) if not torch.compiler.is_compiling() else ()
    return x.dtype in (torch.bfloat16, *eager)


class Experts(nn.Module):
    """Gated feed-forward networks of one shape; each token goes through those it has chosen.

    In memory the experts' matrices are stacked. `state_dict` has them apart, as published
    checkpoints do (`N.gate_proj.weight` for expert N), and `load_state_dict` takes them so.

    Args:
        num_experts: e.
        hidden_size: d.
        intermediate_size: f, of one expert.
        hidden_act: a key of `ACTIVATIONS`.
        names: of gate, up and down in checkpoints.

    Raises:
        ValueError: an activation that is not in `ACTIVATIONS`, or a size below 1.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str = "silu",
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        super().__init__()
        if min(num_experts, hidden_size, intermediate_size) < 1:
            raise ValueError(f"no layer: {num_experts=}, {hidden_size=}, {intermediate_size=}")
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"unknown {hidden_act=}; known: {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[hidden_act]
        self.names = dict(zip(("gate_proj", "up_proj", "down_proj"), names, strict=True))
        e, f, d = num_experts, intermediate_size, hidden_size
        self.gate_proj = nn.Parameter(torch.empty(e, f, d))
        self.up_proj = nn.Parameter(torch.empty(e, f, d))
        self.down_proj = nn.Parameter(torch.empty(e, d, f))
        for stack in self.parameters():  # as nn.Linear does
            bound = stack.shape[-1] ** -0.5
            nn.init.uniform_(stack, -bound, bound)

    def forward(
        self, x: Float[Tensor, "n d"], weights: Float[Tensor, "n k"], chosen: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n d"]:
        run = grouped_experts if can_group(x, self.gate_proj.shape[1]) else dense_experts
        matrices = (self.gate_proj, self.up_proj, self.down_proj)
        return run(x, weights, chosen, *matrices, self.activation)

    # Where a checkpoint has N.w1.weight for each expert N, memory has one stack.

    def on_disk(self, prefix: str, name: str) -> list[str]:
        """Names of a stack's matrices in a checkpoint."""
        return [f"{prefix}{e}.{self.names[name]}.weight" for e in range(len(self.gate_proj))]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, stack in self.named_parameters():
            matrices = stack if keep_vars else stack.detach()
            destination.update(zip(self.on_disk(prefix, name), matrices, strict=True))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        for name, stack in self.named_parameters():
            matrices = {key: state_dict.pop(key, None) for key in self.on_disk(prefix, name)}
            absent = [key for key, matrix in matrices.items() if matrix is None]
            missing += absent
            new = stack if absent else torch.stack(list(matrices.values()))
            state_dict[prefix + name] = new
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)


class MixtureOfExperts(nn.Module):
    """y = sum over a token's k experts of weight · expert(x): Mixtral's layer.

    Parameters are named as in Mixtral's checkpoints below `block_sparse_moe`:
    `gate.weight`, the router, and `experts.N.w1.weight`, `w3` and `w2` (gate, up, down).
    The losses take `gate(x)`; in a model, a forward hook on `gate` hands it out.

    Args:
        hidden_size: d.
        intermediate_size: f, of one expert.
        num_experts: e.
        num_experts_per_tok: k.
        hidden_act: a key of `ACTIVATIONS`.
        norm_topk_prob: the k weights sum to 1.
        capacity_factor: an expert takes ceil(factor · n k / e) tokens at most, of which n
            counts padding too; None (as in Mixtral): as many as come.
        names: of gate, up and down in the checkpoint.

    Raises:
        ValueError: fewer experts than choices, a capacity factor of 0 or below, an
            activation that is not in `ACTIVATIONS`, a size below 1, or a mask of another
            shape than the tokens.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_act: str = "silu",
        norm_topk_prob: bool = True,
        capacity_factor: float | None = None,
        names: tuple[str, str, str] = ("w1", "w3", "w2"),
    ):
        super().__init__()
        refuse_top_k(num_experts_per_tok, num_experts)
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"no expert takes a token: {capacity_factor=}")
        self.top_k = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.capacity_factor = capacity_factor
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(
            num_experts=num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            hidden_act=hidden_act,
            names=names,
        )

    def forward(
        self,
        x: Float[Tensor, "*rows d"],
        mask: Int[Tensor, "*rows"] | Bool[Tensor, "*rows"] | None = None,
    ) -> Float[Tensor, "*rows d"]:
        """The mask, 1 for tokens and 0 for padding, matters where there is a capacity.

        A choice that finds no room weighs nothing, and the others weigh what they did: a
        token without any comes out as zeros, so that only the residual carries it on.
        """
        rows = x.reshape(-1, x.shape[-1])  # n d
        weights, chosen = top_k_routing(
            self.gate(rows), self.top_k, norm_topk_prob=self.norm_topk_prob
        )
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"a mask of {tuple(mask.shape)} for x of {tuple(x.shape)}")
        if self.capacity_factor is not None:
            num_experts = len(self.gate.weight)
            kept = within_capacity(
                chosen,
                num_experts=num_experts,
                capacity=math.ceil(self.capacity_factor * chosen.numel() / num_experts),
                mask=None if mask is None else mask.flatten(),
            )
            weights = weights * kept
        return self.experts(rows, weights, chosen).view(x.shape)
