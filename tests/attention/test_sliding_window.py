"""Sliding-window attention against Mistral, Gemma 3 and a loop over tokens.

No two sizes are equal; the sequence is longer than the window.
"""

import math
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, Gemma3TextConfig, MistralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.mistral.modeling_mistral import MistralAttention

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import LayerCache
from snippets.attention.sliding_window import (
    RollingCache,
    SlidingWindowAttention,
    attention_with_window,
    window_mask,
    within_window,
)
from snippets.layers.rmsnorm import UnitOffsetRMSNorm
from snippets.position.rope import inverse_frequencies, rope_table

B, T, D, H, G, K, W = 2, 13, 42, 6, 3, 8, 5


def layer(window: int = W, **changes) -> SlidingWindowAttention:
    sizes = {"hidden_size": D, "num_heads": H, "num_kv_heads": G, "head_dim": K} | changes
    return SlidingWindowAttention(window=window, **sizes)


def tables(t: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_table(inverse_frequencies(head_dim=K), torch.arange(t))


def float_mask(window: int, t: int = T) -> torch.Tensor:
    """The additive mask that transformers' layers are given."""
    i, j = torch.arange(t)[:, None], torch.arange(t)
    return torch.zeros(1, 1, t, t).masked_fill((j > i) | (j <= i - window), -math.inf)


def by_loop(ours: GroupedQueryAttention, x: torch.Tensor, window: int) -> torch.Tensor:
    """Each token by itself, with the keys of its window only."""
    q, k, v = (ours.split(p(x)) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(H):
            for t in range(q.shape[2]):
                seen = range(max(0, t - window + 1), t + 1)
                group = h // (H // G)
                scores = torch.stack([q[b, h, t] @ k[b, group, s] for s in seen]) / K**0.5
                weights = scores.exp() / scores.exp().sum()
                y[b, h, t] = sum(w * v[b, group, s] for w, s in zip(weights, seen, strict=True))
    return ours.o_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("window", [1, 2, W, T - 1, T, T + 3])
def test_equals_a_loop_over_windows(window):
    ours, x = layer(window), torch.randn(B, T, D)
    assert_close(ours(x), by_loop(ours, x, window))


@pytest.mark.parametrize("window", [1, W, T + 3])
def test_equals_mistral(window):
    ours, x = layer(window), torch.randn(B, T, D)
    config = MistralConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        attn_implementation="eager",
    )
    theirs = MistralAttention(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    cos, sin = (torch.cat((table, table), -1)[None] for table in tables())
    assert_close(ours(x, tables()), theirs(x, (cos, sin), float_mask(window))[0])


def test_equals_gemma_3s_layers_of_both_kinds():
    """Scaled by a size of its own, heads normed; one layer sees everything, one its window."""
    config = Gemma3TextConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        query_pre_attn_scalar=11,
        sliding_window=W,
        num_hidden_layers=6,
        attn_implementation="eager",
    )
    x, outputs = torch.randn(B, T, D), []
    for number, window in ((0, W), (5, T)):
        norms = {n: UnitOffsetRMSNorm(hidden_size=K, eps=1e-6) for n in ("q_norm", "k_norm")}
        torch.manual_seed(3)
        ours = layer(window, scale=11**-0.5, **norms)
        for norm in norms.values():
            torch.nn.init.normal_(norm.weight)
        theirs = Gemma3Attention(config, layer_idx=number)
        theirs.load_state_dict(ours.state_dict())
        cos, sin = (torch.cat((table, table), -1)[None] for table in tables())
        outputs.append(theirs(x, (cos, sin), float_mask(window))[0])
        assert_close(ours(x, tables()), outputs[-1])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


# The mask


@pytest.mark.parametrize("window", [1, 2, W, T, T + 3])
def test_a_row_has_min_of_place_and_window_keys(window):
    mask = window_mask(T, T, window)
    assert mask.sum(-1).tolist() == [min(i + 1, window) for i in range(T)]
    assert mask.diagonal().all() and mask.dtype == torch.bool
    assert not mask.triu(1).any()


@pytest.mark.parametrize("t, s", [(1, 9), (4, 9), (9, 9)])
def test_queries_are_the_last_of_the_tokens(t, s):
    assert torch.equal(window_mask(t, s, W), window_mask(s, s, W)[-t:])


def test_a_mask_is_left_out_where_causal_is_enough():
    device = torch.device("cpu")
    assert within_window(None, 4, W, W, device) is None
    assert torch.equal(within_window(None, 4, W + 1, W, device), window_mask(4, W + 1, W))
    wide = torch.rand(B, 1, 4, 9) > 0.3
    ahead = ~torch.ones(4, 7, dtype=torch.bool).tril(3)  # the mask's own business
    expected = (window_mask(4, 7, W) | ahead) & wide[..., 2:]
    assert torch.equal(within_window(wide, 4, 7, W, device), expected)
    assert (expected & ahead).any() and (wide[..., 2:] & ~expected).any()
    assert within_window(None, 4, 7, W, torch.device("meta")).is_meta


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_the_token_is_refused(window):
    with pytest.raises(ValueError, match=re.escape(f"{window=}")):
        window_mask(3, 3, window)
    with pytest.raises(ValueError, match=re.escape(f"{window=}")):
        layer(window)
    with pytest.raises(ValueError, match=re.escape(f"{window=}")):
        RollingCache(window)


def test_the_other_sizes_are_refused_as_ever():
    with pytest.raises(ValueError, match="num_heads=6, num_kv_heads=4"):
        layer(num_kv_heads=4)
    with pytest.raises(ValueError, match=r"more queries than keys: t=4, s=3"):
        window_mask(4, 3, W)


# The cache

CHUNKS = [[1] * T, [W] * 2 + [3], [W + 1] * 2 + [1], [T], [2 * W, 3], [2 * W + 1, 2], [3, 1, 9]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("window", [1, 2, W, T + 3])
@pytest.mark.parametrize("rolling", [True, False])
@torch.no_grad()
def test_every_chunking_equals_the_whole(chunks, window, rolling):
    ours, x = layer(window), torch.randn(B, T, D)
    cache = ours.new_cache() if rolling else LayerCache()
    outputs = []
    for part in torch.arange(T).split(chunks):
        cos, sin = tables()
        outputs.append(ours(x[:, part], (cos[part], sin[part]), cache=cache))
    assert_close(torch.cat(outputs, 1), ours(x, tables()))
    assert cache.length == T
    kept = min(T, window - 1) if rolling else T
    assert cache.nbytes == 2 * B * G * kept * K * 4


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("padding", [2, W + 1])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(chunks, padding):
    ours, x = layer(), torch.randn(B, T, D)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :padding] = 0
    cache, outputs = ours.new_cache(), []
    for part in torch.arange(T).split(chunks):
        outputs.append(ours(x[:, part], None, mask[:, : part[-1] + 1], cache))
    found = torch.cat(outputs, 1)
    assert_close(found[0], ours(x)[0])
    assert_close(found[1, padding:], ours(x[1:, padding:])[0])
    assert found.isfinite().all()


@torch.no_grad()
def test_pairs_may_be_masked_one_by_one():
    ours, x = layer(), torch.randn(B, T, D)
    pairs = (torch.rand(B, 1, T, T) > 0.4).tril() | torch.eye(T, dtype=torch.bool)
    whole = ours(x, None, pairs)
    assert_close(whole, GroupedQueryAttention.forward(ours, x, None, pairs & window_mask(T, T, W)))
    cache = ours.new_cache()
    first = ours(x[:, :8], None, pairs[..., :8, :8], cache)
    assert_close(torch.cat((first, ours(x[:, 8:], None, pairs[..., 8:, :], cache)), 1), whole)


@torch.no_grad()
def test_tokens_that_see_ahead_do_so_beyond_the_window_too():
    ours, x = layer(), torch.randn(B, T, D)
    pairs = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    pairs[..., 2:10, 2:10] = True  # eight tokens that see each other, more than the window
    i, j = torch.arange(T)[:, None], torch.arange(T)
    expected = GroupedQueryAttention.forward(ours, x, None, pairs & (j > i - W))
    assert_close(ours(x, None, pairs), expected)
    cache = ours.new_cache()
    first = ours(x[:, :10], None, pairs[..., :10, :10], cache)
    assert_close(torch.cat((first, ours(x[:, 10:], None, pairs[..., 10:, :], cache)), 1), expected)


def test_a_mask_must_be_over_all_tokens_seen():
    ours, cache = layer(), RollingCache(W)
    ours(torch.randn(B, T, D), cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 6\), for 2 sequences of 13 cached and 2 new"):
        ours(torch.randn(B, 2, D), None, torch.ones(B, 6, dtype=torch.long), cache)


@torch.no_grad()
def test_what_is_stored_is_bounded_however_long_the_text():
    ours, cache = layer(), RollingCache(W)
    most = 0
    for t in (40, 1, 3, *[1] * 50, 7, 2 * W, 1):
        ours(torch.randn(B, t, D), cache=cache)
        most = max(most, sum(held.untyped_storage().nbytes() for held in cache.store))
        assert cache.nbytes == 2 * B * G * (W - 1) * K * 4
    assert most <= 2 * B * G * 2 * W * K * 4
    assert cache.length == 40 + 1 + 3 + 50 + 7 + 2 * W + 1


@torch.no_grad()
def test_a_short_text_takes_little_room():
    ours, cache = layer(window=1000), RollingCache(1000)
    ours(torch.randn(B, 3, D), cache=cache)
    assert cache.store[0].shape == (B, G, 6, K)
    ours(torch.randn(B, 4, D), cache=cache)
    assert cache.store[0].shape == (B, G, 14, K) and cache.kept == 7


@torch.no_grad()
def test_tokens_are_copied_once_more_on_average():
    """The store is made anew once in W + 1 tokens, not at each."""
    cache, stores = RollingCache(W), []
    for _ in range(20 * (W + 1)):
        cache.append(torch.randn(1, 1, 1, K))
        if not any(cache.store[0] is store for store in stores):
            stores.append(cache.store[0])
    assert len(stores) <= 20 + 3


@torch.no_grad()
def test_two_prompts_in_sequence_need_two_caches():
    ours = layer()
    first, second = torch.randn(B, T, D), torch.randn(B, T, D)
    for x in (first, second):
        cache = ours.new_cache()
        parts = [ours(x[:, part], cache=cache) for part in torch.arange(T).split([9, 4])]
        assert_close(torch.cat(parts, 1), ours(x))


@pytest.mark.parametrize(
    "shape", [(B + 1, G, 2, K), (B, G + 1, 2, K), (B, G, 2, K + 1)], ids=["b", "g", "k"]
)
def test_another_batch_is_refused_and_nothing_is_lost(shape, unchecked):
    cache = RollingCache(W)
    new = torch.randn(B, G, 7, K)
    cache.append(new, new + 1)
    with pytest.raises(ValueError, match=re.escape(f"{shape}")) as refused:
        cache.append(torch.randn(shape), torch.randn(shape))
    assert f"{(B, G, W - 1, K)}" in str(refused.value)
    with pytest.raises(ValueError, match="can't be continued"):
        cache.append(torch.randn(B, G, 2, K), torch.randn(B, G, 3, K))
    with pytest.raises(ValueError, match="can't be continued"):
        cache.append(torch.randn(B, G, 2, K))
    assert cache.length == 7
    k, v = cache.append(new[..., :1, :], new[..., :1, :])
    assert_close(k, torch.cat((new[..., 3:, :], new[..., :1, :]), -2))
    assert_close(v[..., :-1, :], new[..., 3:, :] + 1)


@torch.no_grad()
def test_agrees_with_transformers_cache_step_by_step():
    config = MistralConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=K,
        sliding_window=W,
        num_hidden_layers=1,
    )
    theirs, ours = DynamicCache(config=config), RollingCache(W)
    for t in (7, 1, 1, 3, 9, 1):
        k, v = torch.randn(2, B, G, t, K)
        for found, expected in zip(ours.append(k, v), theirs.update(k, v, 0), strict=True):
            assert_close(found, expected)


# What it reaches


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stack_reaches_back_w_minus_1_a_layer(depth):
    stack = [layer(window=3) for _ in range(depth)]
    x = torch.randn(1, T, D, requires_grad=True)
    y = x
    for attention in stack:
        y = y + attention(y)
    y[0, -1].sum().backward()
    reached = (x.grad[0].abs().sum(-1) > 0).tolist()
    assert reached == [t >= T - 1 - depth * 2 for t in range(T)]


def test_works_in_half_precision():
    ours, x = layer().bfloat16(), torch.randn(B, T, D, dtype=torch.bfloat16)
    y = ours(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer_in_float(ours)(x.float()).bfloat16(), atol=3e-2, rtol=3e-2)


def layer_in_float(ours: SlidingWindowAttention) -> SlidingWindowAttention:
    wide = layer()
    wide.load_state_dict(ours.state_dict())
    return wide


def test_compiles_whole(unchecked):
    ours, x = layer(), torch.randn(B, T, D)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    mask = torch.ones(B, T, dtype=torch.long)
    assert_close(compiled(x, tables(), mask), ours(x, tables(), mask))


def test_a_window_is_optional():
    sizes = {"hidden_size": D, "num_heads": H, "num_kv_heads": G}
    assert type(attention_with_window(None, **sizes)) is GroupedQueryAttention
    narrow = attention_with_window(3, **sizes)
    assert type(narrow) is SlidingWindowAttention and narrow.window == 3
    assert narrow.k_proj.weight.shape == (G * D // H, D)
