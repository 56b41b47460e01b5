"""DeepSeek's mixture of experts (Dai et al. 2024, arXiv:2401.06066).

Many small experts, and a shared one that every token uses. Tokens choose within few groups of
experts, as in DeepSeek-V2 (2024, arXiv:2405.04434) and V3 (2024, arXiv:2412.19437). A bias
on the choice keeps the load even without a loss (Wang et al. 2024, arXiv:2408.15664).

Axes: n token (of all sequences), k choice of a token, e expert, g group of experts,
d hidden size.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.layers.swiglu import GatedMLP
from snippets.moe.mixture_of_experts import Experts, refuse_top_k

SCORING = ("softmax", "sigmoid")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def group_limited_top_k(
    scores: Float[Tensor, "n e"], top_k: int, *, n_group: int, topk_group: int, best: int
) -> Int[Tensor, "n k"]:
    """Each token's k best experts out of its `topk_group` best groups, best first.

    Groups are neighbours in the order of the experts. A group counts as much as the sum of
    its `best` highest scores: 1 in V2, 2 in V3. One group is no limit.

    Raises:
        ValueError: groups of unequal size, no group or more than there are, groups smaller
            than `best`, or fewer experts in the groups than choices.
    """
    refuse_groups(scores.shape[-1], top_k, n_group, topk_group, best)
    grouped = scores.unflatten(-1, (n_group, -1))  # n g e/g
    kept = grouped.topk(best).values.sum(dim=-1).topk(topk_group).indices  # n topk_group
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)  # n g
    # Not 0: below a negative bias, experts that are out would win.
    allowed = grouped.masked_fill(outside[..., None], -torch.inf)
    return allowed.flatten(-2).topk(top_k).indices


def refuse_groups(num_experts: int, top_k: int, n_group: int, topk_group: int, best: int) -> None:
    if n_group < 1 or num_experts % n_group:
        raise ValueError(f"{num_experts} experts don't make {n_group} equal groups")
    size = num_experts // n_group
    if not 1 <= topk_group <= n_group:
        raise ValueError(f"a token can't choose {topk_group} of {n_group} groups")
    if not 1 <= best <= size:
        raise ValueError(f"groups of {size} experts have no {best} best ones")
    refuse_top_k(top_k, topk_group * size)


def expert_load(chosen: Int[Tensor, "n k"], num_experts: int) -> Float[Tensor, " e"]:
    """How many tokens chose each expert, divided by the even share n k / e."""
    return F.one_hot(chosen.flatten(), num_experts).float().mean(dim=0) * num_experts


def max_violation(load: Float[Tensor, "*layers e"]) -> Float[Tensor, "*layers"]:
    """MaxVio: by how much the busiest expert exceeds the even share, in even shares."""
    return load.amax(dim=-1) / load.mean(dim=-1) - 1


def balanced_bias(
    bias: Float[Tensor, " e"], load: Float[Tensor, " e"], *, rate: float = 0.001
) -> Float[Tensor, " e"]:
    """The bias for the next step: up by `rate` for each expert below the mean load, else down.

    b_i + rate · sign(mean load - load_i), algorithm 1 of arXiv:2408.15664. No gradient: the
    loads are counted over a whole batch, on all devices, after its forward pass.
    """
    return bias + rate * (load.mean() - load).sign()


class DeepseekRouter(nn.Module):
    """Which experts each token takes, and what each one's output weighs; in float32.

    scores = softmax or sigmoid of x W^T; the choice is by scores + bias, in the best groups;
    weights = scores[chosen] (/ their sum) · routed_scaling_factor, without the bias.

    Parameters are named as in DeepSeek's checkpoints: `weight`, and under "noaux_tc" the
    buffer `e_score_correction_bias`. See `DeepseekMoE` for the arguments and refusals.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_group: int = 1,
        topk_group: int = 1,
        scoring_func: str = "softmax",
        topk_method: str = "greedy",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
    ):
        super().__init__()
        if scoring_func not in SCORING:
            raise ValueError(f"unknown {scoring_func=}; known: {', '.join(SCORING)}")
        if topk_method not in TOPK_METHODS:
            raise ValueError(f"unknown {topk_method=}; known: {', '.join(TOPK_METHODS)}")
        self.scoring_func = scoring_func
        self.top_k = num_experts_per_tok
        limited = topk_method != "greedy"
        self.groups = {
            "n_group": n_group if limited else 1,
            "topk_group": topk_group if limited else 1,
            "best": 2 if topk_method == "noaux_tc" else 1,
        }
        refuse_groups(n_routed_experts, num_experts_per_tok, **self.groups)
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(n_routed_experts, hidden_size))
        bound = hidden_size**-0.5  # as nn.Linear does
        nn.init.uniform_(self.weight, -bound, bound)
        bias = torch.zeros(n_routed_experts) if topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        scores = self.scores(x)
        choice = scores
        if self.e_score_correction_bias is not None:
            choice = scores + self.e_score_correction_bias
        chosen = group_limited_top_k(choice, self.top_k, **self.groups)
        weights = scores.gather(-1, chosen)
        if self.norm_topk_prob:
            # Sigmoids of very negative logits may all be 0, and so is their sum.
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, chosen

    def scores(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """How well each expert suits each token, in float32 whatever the layer's dtype."""
        logits = F.linear(x.float(), self.weight.float())
        return logits.softmax(dim=-1) if self.scoring_func == "softmax" else logits.sigmoid()

    def _apply(self, fn, recurse=True):
        """Moves the bias with the layer, and leaves it in float32.

        In V3 it is above 2, where bfloat16 has steps of 1/64: many steps of training, and
        more than what tells two experts' scores apart.
        """
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.e_score_correction_bias
            self.e_score_correction_bias = (moved if bias.is_meta else bias).to(
                moved.device, torch.float32
            )
        return self


class DeepseekMoE(nn.Module):
    """y = shared(x) + sum over a token's k experts of weight · expert(x).

    Parameters are named as in DeepSeek-V2's and V3's checkpoints below `mlp`: `gate.weight`,
    `gate.e_score_correction_bias`, `experts.N.gate_proj.weight` (up, down) for expert N,
    `shared_experts.gate_proj.weight` (up, down). `gate(rows)` gives weights and choices; in a
    model, a forward hook on `gate` hands them out.

    Args:
        hidden_size: d.
        moe_intermediate_size: of one expert.
        n_routed_experts: e.
        num_experts_per_tok: k.
        n_shared_experts: whose work one wide network does; 0 for none.
        n_group: groups of experts; "greedy" takes no notice of them.
        topk_group: groups in which a token may choose.
        scoring_func: "softmax" (V2) or "sigmoid" (V3).
        topk_method: "greedy" (V2-Lite), "group_limited_greedy" (V2), or "noaux_tc" (V3),
            which has a bias, and judges a group by its two best experts.
        norm_topk_prob: divide the k weights by their sum, before they are scaled.
        routed_scaling_factor: multiplies the weights.
        hidden_act: a key of `ACTIVATIONS`.

    Raises:
        ValueError: an unknown name, groups of unequal size or smaller than the method
            needs, no group or more than there are, fewer experts in a token's groups than
            it chooses, shared experts below 0, or a size below 1.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_shared_experts: int = 0,
        n_group: int = 1,
        topk_group: int = 1,
        scoring_func: str = "softmax",
        topk_method: str = "greedy",
        norm_topk_prob: bool = False,
        routed_scaling_factor: float = 1.0,
        hidden_act: str = "silu",
    ):
        super().__init__()
        if n_shared_experts < 0:
            raise ValueError(f"fewer than none: {n_shared_experts=}")
        self.experts = Experts(
            num_experts=n_routed_experts,
            hidden_size=hidden_size,
            intermediate_size=moe_intermediate_size,
            hidden_act=hidden_act,
        )
        self.gate = DeepseekRouter(
            hidden_size=hidden_size,
            n_routed_experts=n_routed_experts,
            num_experts_per_tok=num_experts_per_tok,
            n_group=n_group,
            topk_group=topk_group,
            scoring_func=scoring_func,
            topk_method=topk_method,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        )
        self.shared_experts = None
        if n_shared_experts:
            self.shared_experts = GatedMLP(
                hidden_size=hidden_size,
                intermediate_size=n_shared_experts * moe_intermediate_size,
                hidden_act=hidden_act,
            )

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        rows = x.reshape(-1, x.shape[-1])  # n d
        y = self.experts(rows, *self.gate(rows)).view(x.shape)
        return y if self.shared_experts is None else y + self.shared_experts(x)
