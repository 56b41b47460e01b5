"""Counts against transformers' models, the wide network against its mixture, one step by hand.

Sizes are such that swapped axes show: no two of d f e k are equal, 2 layers.
"""

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from snippets.models.dense_and_moe import (
    active_parameters,
    as_one_network,
    dense_counterpart,
    flops_per_token,
    held_out_loss,
    loads,
    mixtures,
    start,
    total_parameters,
    train,
    with_routers,
)
from snippets.models.mistral import Mistral, MistralConfig
from snippets.models.mixtral import Mixtral, MixtralConfig
from snippets.moe.mixture_of_experts import MixtureOfExperts, load_balancing_loss

D, W, E, K, V, L = 24, 12, 6, 2, 31, 2
SIZES = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=W,
    num_hidden_layers=L,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=E,
    num_experts_per_tok=K,
)
CONFIG = MixtralConfig(**SIZES)


def changed(**changes) -> MixtralConfig:
    return MixtralConfig(**(SIZES | changes))


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def mixture(**changes) -> MixtureOfExperts:
    sizes = dict(hidden_size=D, intermediate_size=W, num_experts=E, num_experts_per_tok=3)
    return MixtureOfExperts(**(sizes | changes))


# Counting


def test_counts_of_mixtral_8x7b_are_the_published_ones():
    """46.7 and 12.9 billion; transformers counts the same, with all experts and with two."""
    sizes = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336)
    sizes |= dict(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    model = on_meta(Mixtral, MixtralConfig(**sizes))
    with torch.device("meta"):
        config = transformers.MixtralConfig()
        whole = transformers.MixtralForCausalLM(config).num_parameters()
        config.num_local_experts = 2
        two = transformers.MixtralForCausalLM(config).num_parameters()
    assert total_parameters(model) == whole == 46_702_792_704
    router = 32 * 4096 * (8 - 2)  # it has scores for all eight
    assert active_parameters(model) == two + router == 12_879_925_248


def test_a_dense_model_is_active_whole():
    model = on_meta(Mistral, dense_counterpart(CONFIG, "total"))
    assert not mixtures(model)
    assert active_parameters(model) == total_parameters(model)


def test_mixtures_are_in_the_order_of_the_layers():
    model = on_meta(Mixtral, CONFIG)
    assert mixtures(model) == [layer.block_sparse_moe for layer in model.model.layers]


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_active_by_brute_force(k):
    """The parameters that get a gradient, when there is one token."""
    model = Mixtral(changed(num_experts_per_tok=k, tie_word_embeddings=True))
    model(torch.tensor([[3]])).square().sum().backward()
    used = 0
    for name, p in model.named_parameters():
        if ".experts." in name:
            used += sum(w.numel() for w, g in zip(p, p.grad, strict=True) if g.any())
        else:
            used += p.numel()
    assert active_parameters(model) == used


@pytest.mark.parametrize("equal", ["active", "total"])
@pytest.mark.parametrize("e, k", [(6, 2), (9, 4), (8, 2), (7, 3)])
def test_counterparts_have_the_same_count(equal, e, k):
    config = changed(num_local_experts=e, num_experts_per_tok=k)
    count = active_parameters if equal == "active" else total_parameters
    sparse = count(on_meta(Mixtral, config))
    dense = dense_counterpart(config, equal)
    assert type(dense) is MistralConfig
    found = count(on_meta(Mistral, dense))
    assert abs(found - sparse) <= L * D
    assert (found == sparse) == (e % 3 == 0)
    for change in (1, -1):  # no other width comes closer
        other = MistralConfig(
            **vars(dense) | {"intermediate_size": dense.intermediate_size + change}
        )
        assert abs(count(on_meta(Mistral, other)) - sparse) > abs(found - sparse)


def test_a_counterpart_keeps_all_else():
    config = changed(
        sliding_window=5,
        rms_norm_eps=0.01,
        rope_theta=77.0,
        tie_word_embeddings=True,
        attention_bias=True,
        head_dim=10,
        hidden_act="gelu",
    )
    dense = dense_counterpart(config, "active")
    same = {k: v for k, v in vars(config).items() if k in vars(dense)}
    assert vars(dense) | {"intermediate_size": W} == same
    assert dense.intermediate_size == K * W + E // 3
    assert dense_counterpart(config, "total").intermediate_size == E * W + E // 3


def test_refuses_other_counts(unchecked):
    text = "equal='both' isn't one of active, total"
    with pytest.raises(ValueError, match=re.escape(text)):
        dense_counterpart(CONFIG, "both")


# Operations


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window, context", [(None, 9), (4, 9), (9, 9), (None, 1), (4, 3)])
def test_flops_equal_what_torch_counts(window, context, tied):
    config = changed(sliding_window=window, tie_word_embeddings=tied, head_dim=10)
    dense = on_meta(Mistral, dense_counterpart(config, "active"))
    assert flops_per_token(dense, context) == counted(dense, context)
    # In float64 every expert runs on every token, so that all of them are counted.
    sparse = on_meta(Mixtral, config).double()
    idle = L * 2 * 3 * D * W * (E - K)
    assert flops_per_token(sparse, context) == counted(sparse, context) - idle


@torch.no_grad()
def counted(model, context: int) -> int:
    cache, ids = model.new_cache(), torch.zeros(1, context, dtype=torch.long, device="meta")
    if context > 1:
        model(ids[:, 1:], cache=cache)
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :1], cache=cache)
    return counter.get_total_flops()


# One wide network


@pytest.mark.parametrize("options", [{}, {"norm_topk_prob": False}, {"hidden_act": "gelu"}])
def test_a_mixture_is_one_network_with_silenced_features(options):
    layer, x = mixture(**options).double(), torch.randn(7, D, dtype=torch.float64)
    assert_close(as_one_network(layer, x), layer(x), rtol=0, atol=1e-10)


def test_the_wide_network_by_hand():
    layer, x = mixture(), torch.randn(7, D)
    disk = layer.state_dict()
    rows = []
    for token in x:
        p = (disk["gate.weight"] @ token).softmax(0)
        best = p.topk(3).indices.tolist()
        y = torch.zeros(D)
        for i in best:
            w1, w2, w3 = (disk[f"experts.{i}.w{n}.weight"] for n in (1, 2, 3))
            y += p[i] / p[best].sum() * w2 @ (F.silu(w1 @ token) * (w3 @ token))
        rows.append(y)
    assert_close(as_one_network(layer, x), torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_wide_network_compiles(unchecked, dtype):
    layer, x = mixture().to(dtype), torch.randn(7, D, dtype=dtype)
    compiled = torch.compile(as_one_network, fullgraph=True, backend="eager")
    y = compiled(layer, x)
    assert y.dtype == dtype
    assert_close(y, as_one_network(layer, x))
    assert_close(y, layer(x), rtol=2**-6, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


def test_nothing_is_on_a_device_of_its_own():
    with torch.device("meta"):
        assert as_one_network(mixture(), torch.randn(7, D)).is_meta


# Routers


def test_routers_are_listened_to_and_left_alone():
    model, ids = Mixtral(CONFIG), torch.randint(V, (2, 5))
    logits, seen = with_routers(model, ids)
    assert_close(logits, model(ids))
    assert [tuple(z.shape) for z in seen] == [(10, E)] * L
    first = model.model.layers[0]
    x = model.model.embed_tokens(ids)
    # The first layer's router, computed apart.
    rotation = tuple(t.to(x.dtype) for t in rotation_of(model, 5))
    h = x + first.self_attn(first.input_layernorm(x), rotation, None, None)
    h = first.post_attention_layernorm(h).flatten(0, 1)
    assert_close(seen[0], h @ first.block_sparse_moe.gate.weight.T)
    assert not any(m.gate._forward_hooks for m in mixtures(model))
    dense = Mistral(dense_counterpart(CONFIG, "active"))
    assert with_routers(dense, ids)[1] == []


def rotation_of(model, t: int):
    from snippets.position.rope import rope_table

    return rope_table(model.config.frequencies()[0], torch.arange(t))


def test_hooks_go_when_the_model_fails(unchecked):
    model = Mixtral(CONFIG)
    with pytest.raises(IndexError):
        with_routers(model, torch.tensor([[V]]))
    assert not any(m.gate._forward_hooks for m in mixtures(model))


def test_loads():
    z = torch.tensor([[3.0, 2, 1, 0], [3, 1, 2, 0], [0, 3, 2, 1], [3, 0, 2, 1]])
    assert_close(loads(z, 1), torch.tensor([3.0, 1, 0, 0]))
    assert_close(loads(z, 2), torch.tensor([3.0, 2, 3, 0]) / 2)
    assert_close(loads(z, 4), torch.ones(4))


# Training


def test_counterparts_start_alike():
    state = torch.random.get_rng_state()
    sparse = start(CONFIG, 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(sparse, Mixtral)
    for equal in ("active", "total"):
        dense = start(dense_counterpart(CONFIG, equal), 5)
        assert type(dense) is Mistral
        both = sparse.state_dict().keys() & dense.state_dict().keys()
        assert len(both) == 3 + L * 6
        for name in both:
            assert torch.equal(sparse.state_dict()[name], dense.state_dict()[name])
    again, other = start(CONFIG, 5).state_dict(), start(CONFIG, 6).state_dict()
    for name, w in sparse.state_dict().items():
        assert torch.equal(again[name], w)
        assert "norm" in name or not torch.equal(other[name], w)


@pytest.mark.parametrize("balance", [0.0, 0.3])
def test_training_by_hand(balance):
    batches = torch.randint(V, (20, 3, 6))
    model, twin = start(CONFIG, 1), start(CONFIG, 1)
    losses, history = train(model, batches, learning_rate=0.01, balance=balance)
    adam = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    by_hand = []
    for step, batch in enumerate(batches):
        # Up from 1/25 in a tenth of the steps, then down to 1/250,000, both as cosines;
        # the first beta the other way.
        if step <= 1:
            beta = 0.95 - 0.1 * step
            rate = 0.01 * (1 / 25 + (1 - 1 / 25) * step)
        else:
            down = torch.tensor((step - 1) / 18 * torch.pi).cos().item()
            beta = 0.95 - 0.1 * (1 + down) / 2
            rate = 4e-8 + (0.01 - 4e-8) * (1 + down) / 2
        adam.param_groups[0] |= {"lr": rate, "betas": (beta, 0.95)}
        logits, seen = with_routers(twin, batch[:, :-1])
        text = F.cross_entropy(logits.mT, batch[:, 1:])
        by_hand.append(text.item())
        uneven = torch.stack([load_balancing_loss(z, K) for z in seen]).mean() / K
        loss = text + balance * uneven
        adam.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
        assert norm > 1 or step > 2  # else nothing is clipped
        for p in twin.parameters():
            p.grad *= min(1.0, 1 / (norm + 1e-6))
        for index, layer in enumerate(history[step]):
            assert_close(layer, loads(seen[index], K))
        adam.step()
    assert_close(losses, by_hand, rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_dense_models_train_too_and_have_no_loads():
    batches = torch.randint(V, (20, 3, 6))
    model = start(dense_counterpart(CONFIG, "active"), 1)
    before = held_out_loss(model, batches[0])
    losses, history = train(model, batches[:1].expand(20, -1, -1), learning_rate=0.01)
    assert abs(losses[0] - before) < 1e-5 and losses[-1] < losses[0] - 0.1
    assert history == [[]] * 20
    with pytest.raises(ValueError, match=r"balance=0.1 for a model without experts$"):
        train(model, batches, learning_rate=0.01, balance=0.1)


def test_held_out_loss_is_the_mean_of_all_tokens():
    model, texts = start(CONFIG, 2), torch.randint(V, (3, 6))
    log_p = model(texts[:, :-1]).log_softmax(-1)
    terms = [-log_p[b, t, texts[b, t + 1]] for b in range(3) for t in range(5)]
    found = held_out_loss(model, texts)
    assert isinstance(found, float)
    assert_close(torch.tensor(found), torch.stack(terms).mean())
