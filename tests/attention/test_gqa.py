"""Grouped-query attention against Llama, torch and the paper's formula.

Sizes are such that swapped axes show: no two of b t d h g r k are equal, h k != d.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from snippets.attention.gqa import GroupedQueryAttention, grouped_attention

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
    sizes = {"num_attention_heads": H, "num_key_value_heads": G, "head_dim": K} | sizes
    config = LlamaConfig(hidden_size=x.shape[-1], attn_implementation=attention, **sizes)
    oracle = LlamaAttention(config, layer_idx=0).to(x.dtype)
    oracle.load_state_dict(gqa.state_dict())  # strict: the names and shapes are Llama's
    t = x.shape[1]
    one = torch.ones(1, t, config.head_dim, dtype=x.dtype)
    future = torch.full((1, 1, t, t), -math.inf, dtype=x.dtype).triu(1)
    return oracle(x, (one, torch.zeros_like(one)), future)[0]


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
    assert_close(gqa(x), llama(gqa, x, "eager"))


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
