"""Dense and sparse models made comparable: by active or by total parameters.

A Mixtral (Jiang et al. 2024, arXiv:2401.04088) has two sizes: what a token goes through, and what
is stored. So it has two dense counterparts, and one training for all of them.

Axes: b batch, t token, n token (of all sequences), e expert, d hidden size,
f intermediate size of one expert, v vocabulary.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.models.mistral import Mistral, MistralConfig
from snippets.models.mixtral import Mixtral, MixtralConfig
from snippets.moe.mixture_of_experts import (
    MixtureOfExperts,
    load_balancing_loss,
    top_k_routing,
)

COUNTS = ("active", "total")


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The model's mixtures, in the order of its layers; none in a dense one."""
    return [part for part in model.modules() if isinstance(part, MixtureOfExperts)]


def total_parameters(model: nn.Module) -> int:
    """All that is stored, each parameter once. Works on the meta device."""
    return sum(p.numel() for p in model.parameters())


def active_parameters(model: nn.Module) -> int:
    """Those that one token uses: of every mixture's experts k in e, and all else.

    The table of token embeddings counts whole, as in the 13B of Mixtral's paper.
    """
    idle = 0
    for mixture in mixtures(model):
        e = len(mixture.gate.weight)
        experts = sum(p.numel() for p in mixture.experts.parameters())
        idle += experts // e * (e - mixture.top_k)
    return total_parameters(model) - idle


def dense_counterpart(config: MixtralConfig, equal: str) -> MistralConfig:
    """The Mistral of the same sizes, with an MLP that makes one of the two counts equal.

    A layer of Mixtral has 3 d f weights for each of its experts and d e in its router; an MLP
    of width w has 3 d w. So w = n f + e / 3, with n = k for the active parameters and n = e for
    the total, rounded: the counts differ by d weights a layer at most.

    Raises:
        ValueError: `equal` is neither "active" nor "total".
    """
    if equal not in COUNTS:
        raise ValueError(f"{equal=} isn't one of {', '.join(COUNTS)}")
    e, k = config.num_local_experts, config.num_experts_per_tok
    width = (k if equal == "active" else e) * config.intermediate_size + round(e / 3)
    same = {field.name: getattr(config, field.name) for field in fields(MistralConfig)}
    return MistralConfig(**(same | {"intermediate_size": width}))


def flops_per_token(model: Mistral, context: int) -> int:
    """Of one more token that attends to `context` tokens, itself counted.

    Two for each active weight of a matrix, which is all but norms and the table of embeddings;
    and four for each key in sight and feature of the queries. A window shortens the sight.
    """
    config = model.config
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    # The head costs its product also where it is the table itself.
    table = 0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    seen = sum(
        min(context, config.window(number) or context) for number in range(config.num_hidden_layers)
    )
    keys = seen * config.num_attention_heads * config.size_of_head
    return 2 * (active_parameters(model) - vectors - table) + 4 * keys


def as_one_network(mixture: MixtureOfExperts, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The mixture's output, from one gated network as wide as all experts together.

    y = down((silu(gate(x)) * up(x)) * s), where s has for each of the e f features how much
    its expert weighs for this token: 0 for those that weren't chosen. Without s it would be
    the dense network of the same total size.
    """
    experts = mixture.experts
    weights, chosen = top_k_routing(
        mixture.gate(x), mixture.top_k, norm_topk_prob=mixture.norm_topk_prob
    )
    shares = weights.new_zeros(len(x), len(mixture.gate.weight))
    shares = shares.scatter(1, chosen, weights)  # n e
    gate, up = experts.gate_proj.flatten(0, 1), experts.up_proj.flatten(0, 1)  # ef d
    features = experts.activation(F.linear(x, gate)) * F.linear(x, up)  # n ef
    features = features.unflatten(1, (shares.shape[1], -1)) * shares[:, :, None]  # n e f
    # Experts side by side: column i f + j of `down` is feature j of expert i.
    down = experts.down_proj.transpose(0, 1).flatten(1)  # d ef
    return F.linear(features.flatten(1).to(x.dtype), down)


def with_routers(
    model: nn.Module, input_ids: Int[Tensor, "b t"]
) -> tuple[Float[Tensor, "b t v"], list[Float[Tensor, "n e"]]]:
    """The model's logits, and those of its routers, one tensor a layer; a dense model has none."""
    seen: list[Tensor] = []
    keep = [
        mixture.gate.register_forward_hook(lambda gate, given, output: seen.append(output))
        for mixture in mixtures(model)
    ]
    try:
        return model(input_ids), seen
    finally:
        for hook in keep:
            hook.remove()


def loads(router_logits: Float[Tensor, "n e"], top_k: int) -> Float[Tensor, " e"]:
    """Tokens of each expert, as a multiple of the even share n k / e."""
    chosen = router_logits.topk(top_k).indices
    count = chosen.flatten().bincount(minlength=router_logits.shape[1])
    return count * (router_logits.shape[1] / chosen.numel())


def start(config: MistralConfig, seed: int) -> Mistral:
    """A new model, a Mixtral for its config; at the same seed counterparts start alike.

    Embeddings, attention and head, which all have in the same shapes, get the same values.
    """
    dense = {field.name: getattr(config, field.name) for field in fields(MistralConfig)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        common = Mistral(MistralConfig(**(dense | {"intermediate_size": 1}))).state_dict()
        model = (Mixtral if isinstance(config, MixtralConfig) else Mistral)(config)
    common = {name: w for name, w in common.items() if ".mlp." not in name}
    model.load_state_dict(common, strict=False)
    return model


def train(
    model: Mistral,
    batches: Int[Tensor, "steps b t"],
    *,
    learning_rate: float,
    balance: float = 0.0,
) -> tuple[list[float], list[list[Tensor]]]:
    """Train in place, on each batch once; all models alike but for the balance loss.

    AdamW, gradients clipped to a norm of 1; a tenth of the steps for the rise to the learning
    rate and a cosine down, while the first beta goes from 0.95 to 0.85 and back. The balance
    loss is the mean of the layers', divided by k.

    Args:
        batches: each text's tokens, of which the last is only a target.
        learning_rate: the highest.
        balance: coefficient of the balance loss; 0: none.

    Returns:
        The loss on the text at each step, and the loads of each layer's experts there.

    Raises:
        ValueError: a balance loss for a model without experts.
    """
    layers = mixtures(model)
    if balance and not layers:
        raise ValueError(f"{balance=} for a model without experts")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, len(batches), pct_start=0.1
    )
    losses, history = [], []
    for batch in batches:
        logits, router_logits = with_routers(model, batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.item())
        pairs = [(z, m.top_k) for z, m in zip(router_logits, layers, strict=True)]
        history.append([loads(z.detach(), k) for z, k in pairs])
        if balance:
            uneven = sum(load_balancing_loss(z, k) / k for z, k in pairs) / len(pairs)
            loss = loss + balance * uneven
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return losses, history


@torch.no_grad()
def held_out_loss(model: Mistral, texts: Int[Tensor, "b t"]) -> float:
    """The mean loss a token, in nats."""
    logits = model(texts[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()).item()
