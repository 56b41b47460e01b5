"""Shifted sparse attention against brute force over all pairs of tokens; LoRA+ against peft."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config as TheirGPT2Config
from transformers import GPT2LMHeadModel, LlamaForCausalLM
from transformers import LlamaConfig as TheirLlamaConfig

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import LayerCache
from snippets.layers.rmsnorm import RMSNorm
from snippets.models.llama import Llama, LlamaConfig
from snippets.peft.longlora import (
    ShiftedSparseAttention,
    attend_in_groups,
    shifted_sparse_attention,
    train_norms_and_embeddings,
)
from snippets.position.rope import inverse_frequencies, rope_table, rotate

B, T, D, H, G, K, W = 2, 24, 22, 12, 4, 5, 6
EXACT = {"rtol": 0, "atol": 1e-10}


def layer(**sizes) -> ShiftedSparseAttention:
    sizes = {"hidden_size": D, "num_heads": H, "num_kv_heads": G, "head_dim": K} | sizes
    return ShiftedSparseAttention(**{"group_size": W} | sizes)


def heads(h=H, g=G, t=T, dtype=torch.float64):
    return tuple(torch.randn(B, n, t, K, dtype=dtype, requires_grad=True) for n in (h, g, g))


def pairs(h: int, t: int, w: int) -> torch.Tensor:
    """Who sees whom, pair by pair, by moving the tokens as the paper does, without the leak."""
    seen = torch.zeros(h, t, t, dtype=torch.bool)
    for head in range(h):
        shift = 0 if head < h // 2 else w // 2
        order = [(place + shift) % t for place in range(t)]  # the rolled text
        for i, query in enumerate(order):
            for j, key in enumerate(order):
                causal = j <= i and key <= query
                seen[head, query, key] = i // w == j // w and causal
    return seen


def dense(q, k, v, seen, scale=None):
    """Attention head by head over all pairs that are allowed; nothing allowed gives zeros."""
    r, y = q.shape[1] // k.shape[1], torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            key, value = k[b, head // r], v[b, head // r]
            for i in range(q.shape[2]):
                past = seen[b, head, i].nonzero()[:, 0]
                if len(past):
                    scores = key[past] @ q[b, head, i] * (scale or 1 / math.sqrt(K))
                    y[b, head, i] = scores.softmax(0) @ value[past]
    return y


def everywhere(seen):
    return seen.expand(B, -1, -1, -1)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("h, g", [(12, 4), (12, 3), (6, 6), (2, 1), (6, 1), (4, 2), (12, 6)])
@pytest.mark.parametrize("t, w", [(24, 6), (24, 2), (20, 10), (8, 8)])
def test_equals_brute_force_and_so_do_the_gradients(h, g, t, w, scale):
    inputs = heads(h, g, t)
    ours = shifted_sparse_attention(*inputs, group_size=w, scale=scale)
    theirs = dense(*inputs, everywhere(pairs(h, t, w)), scale)
    assert_close(ours, theirs, **EXACT)
    upstream = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        **EXACT,
    )


@pytest.mark.parametrize("g, w", [(4, W), (3, W), (4, T)])
@pytest.mark.parametrize("batch", [1, B])
def test_equals_torch_and_brute_force_with_any_mask(g, w, batch):
    q, k, v = (x.detach() for x in heads(g=g))
    mask = torch.rand(batch, 1, T, T) < 0.6
    mask[:, :, 7] = False  # may attend to nothing
    apart = everywhere(pairs(H, T, w) | pairs(H, T, w).mT) & mask
    ours = shifted_sparse_attention(q, k, v, mask, group_size=w)
    assert_close(ours, dense(q, k, v, apart), **EXACT)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=apart, enable_gqa=True)
    assert_close(ours, theirs, **EXACT)
    assert (ours[:, :, 7] == 0).all()


@pytest.mark.parametrize("w", [1, 3, T])
def test_groups_alone_equal_attention_to_each(w):
    q, k, v = (x.detach() for x in heads())
    parts = [
        F.scaled_dot_product_attention(*some, is_causal=True, enable_gqa=True)
        for some in zip(*(x.split(w, dim=2) for x in (q, k, v)), strict=True)
    ]
    y = attend_in_groups(q, k, v, group_size=w)
    assert_close(y, torch.cat(parts, dim=2), **EXACT)
    scaled = attend_in_groups(q, k, v, group_size=w, scale=2 / math.sqrt(K))
    assert_close(scaled, attend_in_groups(2 * q, k, v, group_size=w), **EXACT)


def influence(y, x):
    """Whether output token i depends on input token j, by gradients."""
    rows = [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0] for i in range(T)]
    return torch.stack([row.abs().sum(-1) > 0 for row in rows])


@pytest.mark.parametrize("depth", [1, 2, 4, 7])
def test_each_layer_reaches_half_a_group_further_and_never_ahead(depth):
    x = torch.randn(1, T, D, dtype=torch.float64, requires_grad=True)
    shifted, grouped = x, x
    for _ in range(depth):
        attention = layer().double()
        shifted = shifted + attention(shifted)
        q, k, v = (
            attention.split(p(grouped))
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        y = attend_in_groups(q, k, v, group_size=W)
        grouped = grouped + attention.o_proj(y.transpose(1, 2).flatten(2))
    token = torch.arange(T)
    past, block = token[:, None] >= token, token // (W // 2)
    assert torch.equal(influence(shifted, x), past & (block[:, None] - block <= depth))
    assert torch.equal(influence(grouped, x), past & (token[:, None] // W == token // W))


def test_a_rolled_text_leaks_and_ours_differs_only_there():
    q, k, v = (x.detach() for x in heads(h=4, g=4))

    def rolled(q, k, v):
        q, k, v = (torch.cat((x[:, :2], x[:, 2:].roll(-W // 2, 2)), 1) for x in (q, k, v))
        y = attend_in_groups(q, k, v, group_size=W)
        return torch.cat((y[:, :2], y[:, 2:].roll(W // 2, 2)), 1)

    ours, theirs = shifted_sparse_attention(q, k, v, group_size=W), rolled(q, k, v)
    differs = (ours - theirs).abs().amax((0, 3)) > 1e-6
    expected = torch.zeros(4, T, dtype=torch.bool)
    expected[2:, : W // 2] = True
    assert torch.equal(differs, expected)
    changed = v.clone()
    changed[:, :, -1] += 1
    assert (rolled(q, k, changed) != theirs)[:, :, : W // 2].any()
    same = shifted_sparse_attention(q, k, changed, group_size=W)
    assert torch.equal(same[:, :, :-1], ours[:, :, :-1])


@pytest.mark.parametrize("g", [4, 3])
@pytest.mark.parametrize("options", [{}, {"bias": True, "scale": 0.3}])
def test_the_layer_trains_sparse_and_reads_in_full(g, options):
    ours, x = layer(num_kv_heads=g, **options), torch.randn(B, T, D)
    full = GroupedQueryAttention(hidden_size=D, num_heads=H, num_kv_heads=g, head_dim=K, **options)
    full.load_state_dict(ours.state_dict())  # strict
    assert ours.training
    q, k, v = (ours.split(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    y = dense(q, k, v, everywhere(pairs(H, T, W)), options.get("scale"))
    assert_close(ours(x), ours.o_proj(y.transpose(1, 2).flatten(2)))
    assert (ours(x) - full(x)).abs().max() > 0.01
    assert_close(ours.eval()(x), full(x))


def test_rotates_and_norms_as_the_full_layer():
    norms = {name: RMSNorm(hidden_size=6) for name in ("q_norm", "k_norm")}
    for norm in norms.values():
        nn.init.normal_(norm.weight)
    ours, x = layer(head_dim=6, **norms), torch.randn(B, T, D)
    tables = rope_table(inverse_frequencies(head_dim=6), torch.arange(T))
    q, k, v = (ours.split(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    q, k = (rotate(norms[name](x), *tables) for name, x in (("q_norm", q), ("k_norm", k)))
    y = dense(q, k, v, everywhere(pairs(H, T, W)), 6**-0.5)
    assert_close(ours(x, tables), ours.o_proj(y.transpose(1, 2).flatten(2)))
    assert (ours(x, tables) - ours(x)).abs().max() > 1e-3


@pytest.mark.parametrize("form", [torch.long, torch.bool])
def test_padding_counts_for_nothing(form):
    ours, x = layer(), torch.randn(B, T, D)
    mask = torch.ones(B, T, dtype=form)
    mask[1, :4] = 0
    y = ours(x, attention_mask=mask)
    assert_close(y[0], ours(x[:1])[0])
    other = x.clone()
    other[1, :4] += 1
    assert_close(ours(other, attention_mask=mask)[1, 4:], y[1, 4:])
    assert (ours(other)[1, 4:] - ours(x)[1, 4:]).abs().max() > 1e-3
    q, k, v = (ours.split(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    seen = everywhere(pairs(H, T, W)) & mask[:, None, None].bool()
    full = dense(q, k, v, seen).transpose(1, 2).flatten(2)
    assert_close(y, ours.o_proj(full))
    assert_close(ours(x, None, seen[:, :1] | seen[:, -1:]), y)


def test_reads_through_a_cache_in_evaluation_only():
    ours, x = layer().eval(), torch.randn(B, T + 1, D)
    cache, parts = ours.new_cache(), []
    with torch.no_grad():
        for part in torch.arange(T + 1).split([5, 1, T - 5]):
            parts.append(ours(x[:, part], cache=cache))
        assert_close(torch.cat(parts, 1), ours(x))
    with pytest.raises(ValueError, match=rf"^a cache, of {T + 1} tokens, while training"):
        ours.train()(x[:, :1], cache=cache)
    empty = LayerCache()
    with pytest.raises(ValueError, match="of 0 tokens"):
        ours(x[:, :T], cache=empty)
    assert cache.length == T + 1 and empty.length == 0 and not empty.store


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_works_in_half_precision(dtype):
    q, k, v = (x.detach().to(dtype) for x in heads())
    ours = shifted_sparse_attention(q, k, v, group_size=W)
    assert ours.dtype == dtype
    exact = shifted_sparse_attention(q.double(), k.double(), v.double(), group_size=W)
    assert_close(ours.double(), exact, rtol=0, atol=2e-2)


def test_trains_under_compile(unchecked):
    ours, x = layer(), torch.randn(B, T, D)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), ours(x))
    wanted = torch.autograd.grad(ours(x).square().sum(), ours.v_proj.weight)
    assert_close(torch.autograd.grad(compiled(x).square().sum(), ours.v_proj.weight), wanted)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"num_heads": 9, "num_kv_heads": 3}, "num_heads=9, group_size=6"),
        ({"group_size": 5}, "num_heads=12, group_size=5"),
        ({"group_size": 0}, "num_heads=12, group_size=0"),
        ({"group_size": -2}, "num_heads=12, group_size=-2"),
        ({"num_kv_heads": 5}, "num_heads=12, num_kv_heads=5"),
    ],
)
def test_refuses_what_has_no_halves(sizes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        layer(**sizes)


@pytest.mark.parametrize(
    "t, s, h, w, said",
    [
        (T, T, H, 10, "not whole groups: t=24 queries, s=24 keys, group_size=10"),
        (T, T, H, 48, "not whole groups: t=24 queries, s=24 keys, group_size=48"),
        (1, T, H, W, "not whole groups: t=1 queries, s=24 keys, group_size=6"),
        (W, T, H, W, "not whole groups: t=6 queries, s=24 keys, group_size=6"),
        (T, W, H, W, "not whole groups: t=24 queries, s=6 keys, group_size=6"),
        (T, T, 3, W, "can't be halved: num_heads=3, group_size=6"),
        (T, T, H, 3, "can't be halved: num_heads=12, group_size=3"),
    ],
)
def test_refuses_tokens_that_are_no_groups(unchecked, t, s, h, w, said):
    q, k = torch.randn(B, h, t, K), torch.randn(B, 1, s, K)
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        shifted_sparse_attention(q, k, k, group_size=w)


def test_a_text_that_does_not_divide_is_refused_in_training_and_read_afterwards():
    ours, x = layer(), torch.randn(B, T + 1, D)
    with pytest.raises(ValueError, match="t=25 queries, s=25 keys, group_size=6"):
        ours(x)
    assert ours.eval()(x).shape == x.shape


@pytest.mark.parametrize("shape", [(T, B), (B, T - 1), (B + 1, T), (B, 1, T - 1, T)])
def test_refuses_a_mask_of_other_sizes(unchecked, shape):
    with pytest.raises(ValueError, match=f"shape {re.escape(str(shape))}"):
        layer()(torch.randn(B, T, D), None, torch.ones(shape, dtype=torch.bool))


# LoRA+


def tiny_llama(**more):
    sizes = {"hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 2, "vocab_size": 11}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **more}
    return LlamaForCausalLM(TheirLlamaConfig(**sizes)), LlamaConfig(**sizes)


def test_trains_what_the_released_rule_trains_beside_peft_adapters():
    """There: parameters whose names contain "embed" or "norm"."""
    model = get_peft_model(tiny_llama()[0], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    names = train_norms_and_embeddings(model)
    by_name = [n for n, _ in model.named_parameters() if "embed" in n or "norm" in n]
    assert names == by_name and len(names) == 6
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == adapters | set(names)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # the adapters' A gets a gradient from the second step on
        model.zero_grad()
        model(torch.arange(11)[None]).logits.square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable


def test_the_same_names_in_a_model_of_ours():
    theirs, config = tiny_llama()
    ours = Llama(config).requires_grad_(False)
    names = train_norms_and_embeddings(ours)
    assert names == train_norms_and_embeddings(theirs)
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == names
    assert all(p.requires_grad for p in theirs.parameters())  # what was trainable stays


def test_finds_norms_by_class_where_names_do_not_tell():
    model = GPT2LMHeadModel(TheirGPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=1))
    model.requires_grad_(False)
    assert not [n for n, _ in model.named_parameters() if "embed" in n or "norm" in n]
    names = train_norms_and_embeddings(model)
    layers = ["h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.ln_2.weight", "h.0.ln_2.bias"]
    ends = ["wte.weight", "wpe.weight", *layers, "ln_f.weight", "ln_f.bias"]
    assert names == [f"transformer.{end}" for end in ends]
    assert model.lm_head.weight.requires_grad  # it is the embedding


def test_a_tied_head_is_listed_once_and_a_head_of_its_own_not_at_all():
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)[0].requires_grad_(False)
        names = train_norms_and_embeddings(model)
        assert names[0] == "model.embed_tokens.weight" and len(names) == 6
        assert model.lm_head.weight.requires_grad == tied


def test_only_a_norms_own_parameters():
    class NormedHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    model = NormedHead().requires_grad_(False)
    assert train_norms_and_embeddings(model) == ["gain"]
    assert not model.inner.weight.requires_grad and model.gain.requires_grad


def test_refuses_a_model_without():
    with pytest.raises(ValueError, match=r"^no norm or embedding with parameters in Linear"):
        train_norms_and_embeddings(nn.Linear(2, 3))
