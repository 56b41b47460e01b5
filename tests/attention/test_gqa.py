"""Grouped-query attention against Llama, torch and the paper's formula.

Sizes are such that swapped axes show: no two of b t d h g r k are equal, h k != d.
"""

import math
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from snippets.attention.gqa import (
    GroupedQueryAttention,
    fused_grouped_attention,
    grouped_attention,
    pool_kv_heads,
)
from snippets.attention.kv_cache import LayerCache
from snippets.layers.rmsnorm import UnitOffsetRMSNorm
from snippets.position.rope import inverse_frequencies, rope_table

B, T, D, H, G, K = 2, 7, 24, 12, 4, 6
R = H // G


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**sizes: int) -> GroupedQueryAttention:
    sizes = {"hidden_size": D, "num_heads": H, "num_kv_heads": G, "head_dim": K} | sizes
    return GroupedQueryAttention(**sizes)


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(B, H, T, K, requires_grad=True)
    k = torch.randn(B, G, T, K, requires_grad=True)
    v = torch.randn(B, G, T, K, requires_grad=True)
    return q, k, v


def tiled(gqa: GroupedQueryAttention, order) -> GroupedQueryAttention:
    """Multi-head attention with the same weights, key-value heads repeated by `order`."""
    weights = gqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = order(weights[name].unflatten(0, (G, K))).flatten(0, 1)
    mha = layer(num_kv_heads=H)
    mha.load_state_dict(weights)
    return mha


def llama(gqa: GroupedQueryAttention, x: torch.Tensor, attention: str, **sizes: int):
    """The same weights in transformers' Llama, without rotation: cos = 1, sin = 0."""
    tables = sizes.pop("tables", None)
    sizes = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": K} | sizes
    config = LlamaConfig(hidden_size=x.shape[-1], attn_implementation=attention, **sizes)
    oracle = LlamaAttention(config, layer_idx=0).to(x.dtype)
    oracle.load_state_dict(gqa.state_dict())  # strict: the names and shapes are Llama's
    t = x.shape[1]
    one = torch.ones(1, t, config.head_dim, dtype=x.dtype)
    future = torch.full((1, 1, t, t), -math.inf, dtype=x.dtype).triu(1)
    return oracle(x, tables or (one, torch.zeros_like(one)), future)[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2, 3, 1, 12])
def test_equals_llama(attention, kv_heads):
    gqa, x = layer(num_kv_heads=kv_heads), torch.randn(B, T, D)
    assert_close(gqa(x), llama(gqa, x, attention, num_key_value_heads=kv_heads))


def test_equals_llama_at_the_default_head_dim():
    gqa = GroupedQueryAttention(hidden_size=60, num_heads=15, num_kv_heads=5)
    x = torch.randn(B, T, 60)
    sizes = {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 4}
    assert_close(gqa(x), llama(gqa, x, "eager", **sizes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_llama_in_half_precision(dtype):
    gqa, x = layer().to(dtype), torch.randn(B, T, D, dtype=dtype)
    assert_close(gqa(x), llama(gqa, x, "sdpa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_plain_formula_equals_llamas(dtype):
    q, k, v = (x.detach().to(dtype) for x in heads())
    module = types.SimpleNamespace(num_key_value_groups=R, training=False)
    future = torch.full((1, 1, T, T), -math.inf, dtype=dtype).triu(1)
    theirs, _ = eager_attention_forward(module, q, k, v, future, scaling=K**-0.5)
    assert_close(grouped_attention(q, k, v), theirs.transpose(1, 2))


@pytest.mark.parametrize("t", [1, 3, T])
@pytest.mark.parametrize("mask", ["causal", "random", "per sequence"])
def test_the_fused_form_equals_the_plain_one(t, mask):
    q, k, v = heads()
    q = q[:, :, -t:]
    masks = {"causal": None, "random": torch.rand(t, T) < 0.5}
    masks["per sequence"] = torch.rand(B, 1, t, T) < 0.5
    if mask != "causal":
        masks[mask][..., 0, :] = False  # a query that may attend to nothing
    plain = grouped_attention(q, k, v, masks[mask])
    assert_close(fused_grouped_attention(q, k, v, masks[mask]), plain)
    if mask != "causal":
        assert (plain[:, :, 0] == 0).all()


def test_rotates_queries_and_keys_as_llama_does():
    gqa, x = layer(), torch.randn(B, T, D)
    inv_freq = inverse_frequencies(head_dim=K, rope_theta=100.0)
    cos, sin = rope_table(inv_freq, torch.arange(3, 3 + T))
    twice = [torch.cat((table, table), -1)[None] for table in (cos, sin)]
    assert_close(gqa(x, (cos, sin)), llama(gqa, x, "eager", tables=twice))
    assert (gqa(x, (cos, sin)) - gqa(x)).abs().max() > 0.01


def test_every_projection_has_its_bias():
    gqa, x = layer(bias=True), torch.randn(B, T, D)
    assert sum(name.endswith("bias") for name in gqa.state_dict()) == 4
    assert_close(gqa(x), llama(gqa, x, "eager", attention_bias=True))


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 4], [4, 1, 2]])
def test_chunks_through_a_cache_equal_the_whole(chunks):
    gqa, x = layer(), torch.randn(B, T, D)
    tables = rope_table(inverse_frequencies(head_dim=K), torch.arange(T))
    cache, outputs = LayerCache(), []
    with torch.no_grad():
        for part in torch.arange(T).split(chunks):
            rotation = tuple(table[part] for table in tables)
            outputs.append(gqa(x[:, part], rotation, cache=cache))
        assert_close(torch.cat(outputs, 1), gqa(x, tables))
    assert cache.length == T


def test_equals_the_papers_formula_in_loops():
    gqa, x = layer(), torch.randn(B, T, D)
    wq = gqa.q_proj.weight.unflatten(0, (H, K))
    wk = gqa.k_proj.weight.unflatten(0, (G, K))
    wv = gqa.v_proj.weight.unflatten(0, (G, K))
    wo = gqa.o_proj.weight.unflatten(1, (H, K))
    expected = torch.zeros(B, T, D)
    for b in range(B):
        for group in range(G):
            for i in range(group * R, (group + 1) * R):  # the group's query heads
                for t in range(T):
                    q = wq[i] @ x[b, t]
                    scores = [q @ (wk[group] @ x[b, s]) / math.sqrt(K) for s in range(t + 1)]
                    total = sum(score.exp() for score in scores)
                    for s, score in enumerate(scores):
                        value = wv[group] @ x[b, s]
                        expected[b, t] += wo[:, i] @ (score.exp() / total * value)
    assert_close(gqa(x), expected)


def test_equals_torch_multihead_attention_when_each_head_has_its_own():
    mha = layer(num_heads=4, num_kv_heads=4)  # nn.MultiheadAttention knows only h k = d
    x = torch.randn(B, T, D)
    oracle = nn.MultiheadAttention(D, 4, bias=False, batch_first=True)
    weights = {
        "in_proj_weight": torch.cat([p.weight for p in (mha.q_proj, mha.k_proj, mha.v_proj)]),
        "out_proj.weight": mha.o_proj.weight,
    }
    oracle.load_state_dict(weights)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_close(mha(x), oracle(x, x, x, attn_mask=future, need_weights=False)[0])


def test_equals_sdpa_with_gqa_and_so_do_the_gradients():
    inputs = heads()
    ours = grouped_attention(*inputs)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    )


def test_is_multi_head_attention_with_tied_heads():
    gqa, x = layer(), torch.randn(B, T, D)
    mha = tiled(gqa, lambda w: w.repeat_interleave(R, 0))
    assert_close(gqa(x), mha(x))
    gqa(x).square().sum().backward()
    mha(x).square().sum().backward()
    for ours, theirs in ((gqa.k_proj, mha.k_proj), (gqa.v_proj, mha.v_proj)):
        summed = theirs.weight.grad.unflatten(0, (G, R, K)).sum(1).flatten(0, 1)
        assert_close(ours.weight.grad, summed)


def test_is_not_the_other_pairing():
    gqa, x = layer(), torch.randn(B, T, D)
    other = tiled(gqa, lambda w: w.repeat(R, 1, 1))
    assert (gqa(x) - other(x)).abs().max() > 0.01


def test_each_key_value_head_reaches_its_group_only():
    q, k, v = heads()
    before = grouped_attention(q, k, v)
    for j in range(G):
        with torch.no_grad():
            new_k, new_v = k.clone(), v.clone()
            new_k[:, j] += torch.randn(B, T, K)
            new_v[:, j] += torch.randn(B, T, K)
        changed = (grouped_attention(q, new_k, new_v) != before).flatten(2).any(2).all(0)
        assert changed.tolist() == [i // R == j for i in range(H)]


def test_is_causal():
    gqa, x = layer(), torch.randn(B, T, D)
    before = gqa(x)
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        after = gqa(changed)
        assert_close(after[:, :t], before[:, :t])
        assert ((after - before)[:, t:].abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("chunks", [[T], [3, 1, T - 4]])
def test_padding_counts_for_nothing_with_a_cache_and_without(chunks):
    gqa, x, padding = layer(), torch.randn(B, T, D), 2
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :padding] = 0
    cache, parts = LayerCache(), []
    for part in torch.arange(T).split(chunks):
        seen = mask[:, : part[-1] + 1]
        parts.append(gqa(x[:, part], attention_mask=seen, cache=cache))
    y = torch.cat(parts, 1)
    assert_close(y, gqa(x, attention_mask=mask))
    assert_close(y[0], gqa(x[:1])[0])
    assert_close(y[1, padding:], gqa(x[1:, padding:])[0])
    assert_close(gqa(x, attention_mask=mask.bool()), y)


@pytest.mark.parametrize("shape", [(T, B), (B, T - 1), (B + 1, T), (B, 1, T - 1, T)])
def test_refuses_a_mask_of_other_sizes_and_keeps_nothing(unchecked, shape):
    cache = LayerCache()
    with pytest.raises(ValueError, match=f"shape {re.escape(str(shape))}"):
        layer()(torch.randn(B, T, D), None, torch.ones(shape, dtype=torch.bool), cache)
    assert cache.length == 0 and not cache.store


@pytest.mark.parametrize("t", [1, T])
def test_a_prefix_alone_gives_the_same(t):
    gqa, x = layer(), torch.randn(B, T, D)
    assert_close(gqa(x[:, :t]), gqa(x)[:, :t])


def test_shapes_at_full_size():
    with torch.device("meta"):  # Llama 3 8B, and Qwen3 4B with h k != d
        llama3 = GroupedQueryAttention(hidden_size=4096, num_heads=32, num_kv_heads=8)
        qwen3 = layer(hidden_size=2560, num_heads=32, num_kv_heads=8, head_dim=128)
    shapes = {name: tuple(w.shape) for name, w in llama3.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (4096, 4096),
        "k_proj.weight": (1024, 4096),
        "v_proj.weight": (1024, 4096),
        "o_proj.weight": (4096, 4096),
    }
    assert qwen3.q_proj.weight.shape == (4096, 2560)
    assert qwen3.o_proj.weight.shape == (2560, 4096)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"num_heads": 12, "num_kv_heads": 5}, "num_heads=12, num_kv_heads=5"),
        ({"num_heads": 4, "num_kv_heads": 12}, "num_heads=4, num_kv_heads=12"),
        ({"num_heads": 12, "num_kv_heads": 0}, "num_heads=12, num_kv_heads=0"),
        ({"num_heads": 5, "num_kv_heads": 1, "head_dim": None}, "hidden_size=24, num_heads=5"),
    ],
)
def test_refuses_sizes_that_do_not_fit(sizes, said):
    with pytest.raises(ValueError, match=said):
        layer(**sizes)


def test_refuses_another_layers_weights():
    with pytest.raises(RuntimeError, match=r"size mismatch for k_proj\.weight"):
        layer().load_state_dict(layer(num_kv_heads=2).state_dict())


@pytest.mark.parametrize("groups", [1, 2, G, H])
def test_pools_the_mean_of_each_group_and_leaves_the_rest(groups):
    weights = layer(num_kv_heads=H, bias=True).state_dict()
    before = {name: weight.clone() for name, weight in weights.items()}
    pooled = pool_kv_heads(weights, num_kv_heads=groups, head_dim=K)
    assert list(pooled) == list(weights)
    r = H // groups
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        if name[0] in "qo":
            assert pooled[name] is weight
            continue
        assert pooled[name].shape == (groups * K, *weight.shape[1:])
        for j in range(groups):
            for k in range(K):
                rows = [weight[i * K + k] for i in range(j * r, (j + 1) * r)]
                assert_close(pooled[name][j * K + k], sum(rows) / r)
    layer(num_kv_heads=groups, bias=True).load_state_dict(pooled)


def test_pooled_weights_attend_with_the_mean_keys_and_values():
    """Pooling commutes with the projection and with RoPE: torch averages what comes out."""
    mha, x = layer(num_kv_heads=H, bias=True), torch.randn(B, T, D)
    gqa = layer(bias=True)
    gqa.load_state_dict(pool_kv_heads(mha.state_dict(), num_kv_heads=G, head_dim=K))
    cos, sin = rope_table(inverse_frequencies(head_dim=K), torch.arange(T))
    q, k, v = (mha.split(p(x)) for p in (mha.q_proj, mha.k_proj, mha.v_proj))
    turned = [torch.view_as_complex(torch.stack(y.chunk(2, -1), -1)) for y in (q, k)]
    turned = [torch.view_as_real(y * torch.complex(cos, sin)) for y in turned]
    q, k = (torch.cat(y.unbind(-1), -1) for y in turned)
    k, v = (y.unflatten(1, (G, R)).mean(2) for y in (k, v))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(gqa(x, (cos, sin)), mha.o_proj(theirs.transpose(1, 2).flatten(2)))
    assert (gqa(x, (cos, sin)) - mha(x, (cos, sin))).abs().max() > 0.01


def test_pools_heads_of_one_feature():
    pooled = pool_kv_heads(
        {"v_proj.bias": torch.tensor([1.0, 3, 4, 8])}, num_kv_heads=2, head_dim=1
    )
    assert pooled["v_proj.bias"].tolist() == [2, 6]


def test_pooling_undoes_tying():
    gqa = layer(bias=True)
    weights = gqa.state_dict()
    tied = dict(weights)
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        tied[name] = weights[name].unflatten(0, (G, K)).repeat_interleave(R, 0).flatten(0, 1)
    assert_close(pool_kv_heads(tied, num_kv_heads=G, head_dim=K), dict(weights))


def test_pools_a_whole_model_as_transformers_reads_it():
    sizes = {"hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 2, "vocab_size": 11}
    sizes |= {"num_attention_heads": H, "head_dim": K, "attention_bias": True}
    many = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=H)).eval()
    few = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=G)).eval()
    for weight in many.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    few.load_state_dict(pool_kv_heads(many.state_dict(), num_kv_heads=G, head_dim=K))  # strict
    ids = torch.randint(11, (B, T))
    before = many(ids).logits

    def mean(module, inputs, y):  # in each group, then the same for all its heads
        heads = y.unflatten(-1, (G, R, K))
        return heads.mean(-2, keepdim=True).expand_as(heads).flatten(2)

    for block in many.model.layers:
        block.self_attn.k_proj.register_forward_hook(mean)
        block.self_attn.v_proj.register_forward_hook(mean)
    assert_close(few(ids).logits, many(ids).logits)
    assert (many(ids).logits - before).abs().max() > 0.1


def test_a_pooled_half_precision_head_is_rounded_once():
    weight = torch.randn(H * K, D)
    half = weight.bfloat16()
    pooled = pool_kv_heads({"a.k_proj.weight": half}, num_kv_heads=G, head_dim=K)
    exact = half.double().unflatten(0, (G, R, K)).mean(1).flatten(0, 1)
    assert pooled["a.k_proj.weight"].dtype == torch.bfloat16
    assert_close(pooled["a.k_proj.weight"].double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "name, sizes, said",
    [
        (
            "k_proj.weight",
            {"num_kv_heads": 5},
            r"k_proj\.weight: 72 rows, num_kv_heads=5, head_dim=6",
        ),
        ("v_proj.bias", {"head_dim": 5}, r"v_proj\.bias: 72 rows, num_kv_heads=4, head_dim=5"),
        ("k_proj.weight", {"num_kv_heads": 0}, "below 1: num_kv_heads=0, head_dim=6"),
        ("k_proj.weight", {"head_dim": 0}, "below 1: num_kv_heads=4, head_dim=0"),
        ("qkv_proj.weight", {}, "no k_proj or v_proj among 1 tensors"),
        ("k_proj", {}, "no k_proj or v_proj among 1 tensors"),
    ],
)
def test_refuses_to_pool_what_does_not_fit(name, sizes, said):
    with pytest.raises(ValueError, match=said):
        pool_kv_heads({name: torch.ones(H * K)}, **{"num_kv_heads": G, "head_dim": K} | sizes)


# What other models change


def test_equals_qwen2_with_biases_on_three_of_four():
    gqa, x = layer(bias=True, o_bias=False), torch.randn(B, T, D)
    config = Qwen2Config(hidden_size=D, num_attention_heads=H, num_key_value_heads=G)
    config.head_dim = K
    theirs = Qwen2Attention(config, layer_idx=0)
    theirs.load_state_dict(gqa.state_dict())
    assert gqa.o_proj.bias is None and gqa.v_proj.bias.std() > 0
    cos, sin = rope_table(inverse_frequencies(head_dim=K), torch.arange(T))
    both = tuple(torch.cat((table, table), -1)[None] for table in (cos, sin))
    future = torch.full((1, 1, T, T), -math.inf).triu(1)
    assert_close(gqa(x, (cos, sin)), theirs(x, both, future)[0])
    assert layer(bias=True).o_proj.bias is not None and layer(o_bias=True).q_proj.bias is None
    assert layer(o_bias=True).o_proj.bias is not None


@pytest.mark.parametrize("scale", [None, 11**-0.5])
def test_equals_gemma_3_with_norms_and_a_scale(scale):
    norms = {name: UnitOffsetRMSNorm(hidden_size=K, eps=1e-3) for name in ("q_norm", "k_norm")}
    for norm in norms.values():
        torch.nn.init.normal_(norm.weight)
    gqa, x = layer(scale=scale, **norms), torch.randn(B, T, D)
    config = Gemma3TextConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        rms_norm_eps=1e-3,
        query_pre_attn_scalar=K if scale is None else 11,
        attn_implementation="eager",
    )
    theirs = Gemma3Attention(config, layer_idx=5)
    theirs.load_state_dict(gqa.state_dict())
    cos, sin = rope_table(inverse_frequencies(head_dim=K), torch.arange(T))
    both = tuple(torch.cat((table, table), -1)[None] for table in (cos, sin))
    future = torch.full((1, 1, T, T), -math.inf).triu(1)
    assert_close(gqa(x, (cos, sin)), theirs(x, both, future)[0])


def test_one_norm_alone_is_applied():
    torch.manual_seed(0)
    plain, x = layer(), torch.randn(B, T, D)
    for name in ("q_norm", "k_norm"):
        normed = layer(**{name: UnitOffsetRMSNorm(hidden_size=K)})
        normed.load_state_dict(plain.state_dict(), strict=False)
        assert (normed(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("t", [1, 3, T])
def test_a_scale_of_ones_own_in_the_fused_form(t):
    q, k, v = heads()
    q = q[:, :, -t:]
    plain = fused_grouped_attention(q, k, v, scale=0.7)
    assert_close(plain, grouped_attention(q * 0.7 * K**0.5, k, v))


def test_a_new_cache_is_empty_and_its_own():
    gqa = layer()
    first, second = gqa.new_cache(), gqa.new_cache()
    assert type(first) is LayerCache and first.length == 0
    gqa(torch.randn(B, T, D), cache=first)
    assert first.length == T and second.length == 0
