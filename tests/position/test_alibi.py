"""ALiBi against BLOOM, MPT, flex_attention and the paper's formula.

Sizes are such that swapped axes show: no two of b t h k d s are equal, and the number of
heads is no power of two.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from transformers import BloomConfig, DynamicCache, MptConfig
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomModel, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from snippets.position.alibi import alibi_bias, alibi_key_bias, alibi_slopes, biased_attention

B, T, H, K = 2, 7, 12, 5
D, S = H * K, 11


def heads(dtype=torch.float32, t=T, s=S):
    return tuple(3 * torch.randn(B, H, n, K, dtype=dtype) for n in (t, s, s))


def padded(*lengths: int, s: int = S) -> torch.Tensor:
    """A mask of rows padded on the left."""
    mask = torch.zeros(len(lengths), s, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[s - length :] = 1
    return mask


def counted(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count tokens, not padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def causal(mask: torch.Tensor, t: int) -> torch.Tensor:
    s = mask.shape[1]
    return torch.ones(t, s, dtype=torch.bool).tril(s - t) & mask[:, None, None].bool()


# Slopes


@pytest.mark.parametrize("num_heads", [*range(1, 34), 40, 64, 71, 112])
def test_slopes_are_those_of_bloom_and_mpt(num_heads):
    ours = alibi_slopes(num_heads)
    assert ours.dtype == torch.float32 and ours.shape == (num_heads,)
    mpt = -build_mpt_alibi_tensor(num_heads, 2)[:, 0, 0]
    assert torch.equal(ours, mpt)  # to the bit
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)
    assert_close(ours, bloom[:, 0, 1])


@pytest.mark.parametrize("max_bias", [4, 8.0, 12.5])
def test_the_largest_exponent_is_mpts_alibi_bias_max(max_bias):
    for num_heads in (1, 4, 6):
        mpt = -build_mpt_alibi_tensor(num_heads, 2, alibi_bias_max=max_bias)[:, 0, 0]
        assert torch.equal(alibi_slopes(num_heads, max_bias=max_bias), mpt)


def test_slopes_equal_the_papers_examples():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-i / 2) for i in range(1, 17)]))


def test_slopes_equal_the_authors_recursion():
    def authors(n):
        if n & (n - 1):
            low = 2 ** math.floor(math.log2(n))
            return authors(low) + authors(2 * low)[0::2][: n - low]
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    for n in range(1, 40):
        assert_close(alibi_slopes(n), torch.tensor(authors(n)))


# The two forms of the bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_key_form_is_blooms(dtype):
    mask = padded(S, 6)
    mask[0, 3] = 0  # padding within
    theirs = build_alibi_tensor(mask, H, dtype).unflatten(0, (B, H))
    ours = alibi_key_bias(alibi_slopes(H), counted(mask)) * mask[:, None, None]
    assert ours.dtype == torch.float32
    assert_close(ours.to(dtype), theirs)


def test_the_last_querys_bias_is_mpts():
    ours = alibi_bias(alibi_slopes(H), torch.tensor([S - 1]), torch.arange(S))
    assert torch.equal(ours, build_mpt_alibi_tensor(H, S))


def test_the_relative_form_equals_the_papers_figure():
    q, k = torch.tensor([[3, 4, 5], [0, 1, 2]]), torch.arange(6).expand(2, 6)
    bias = alibi_bias(alibi_slopes(2), q, k)
    assert bias.shape == (2, 2, 3, 6)
    for b in range(2):
        for h, slope in enumerate((1 / 16, 1 / 256)):
            for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(6)).tolist():
                assert bias[b, h, i, j] == -slope * (q[b, i].item() - j)


def test_both_forms_differ_by_a_constant_per_row_so_softmax_sees_none():
    slopes, at = alibi_slopes(H).double(), counted(padded(S, 6))
    relative, of_keys = alibi_bias(slopes, at, at), alibi_key_bias(slopes, at)
    assert relative.dtype == of_keys.dtype == torch.float64
    constant = slopes[:, None, None] * at[:, None, :, None]
    assert_close(of_keys - relative, constant.expand(B, H, S, S), rtol=0, atol=1e-12)
    scores = torch.randn(B, H, S, S, dtype=torch.float64)
    assert_close((scores + relative).softmax(-1), (scores + of_keys).softmax(-1))
    assert ((scores + relative).softmax(-1) - scores.softmax(-1)).abs().max() > 0.1


def test_slopes_that_came_down_with_a_model_still_multiply_in_float32():
    far, slopes = torch.tensor([4001]), alibi_slopes(4).bfloat16()
    assert alibi_key_bias(slopes, far).flatten().tolist() == [4001 * 4.0**-i for i in range(1, 5)]
    bias = alibi_bias(slopes, far, torch.tensor([300]))
    assert bias.flatten().tolist() == [-3701 * 4.0**-i for i in range(1, 5)]


def test_shifting_all_positions_changes_nothing():
    at = torch.arange(S)
    bias = alibi_bias(alibi_slopes(H), at, at)
    assert torch.equal(alibi_bias(alibi_slopes(H), at + 1000, at + 1000), bias)


# Attention


def formula(q, k, v, slopes, q_at, k_at, allowed):
    """The paper's formula, query by query, in float64."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        total = 0.0
        for j in range(k.shape[2]):
            if allowed[b, 0, i, j]:
                score = (q[b, h, i].double() @ k[b, h, j].double()).item() / math.sqrt(K)
                score -= slopes[h] * (q_at[b, i] - k_at[b, j]).item()
                y[b, h, i] += math.exp(score) * v[b, h, j].double()
                total += math.exp(score)
        y[b, h, i] /= total or 1
    return y


@pytest.mark.parametrize("form", ["relative", "key"])
def test_attention_equals_the_papers_formula_in_loops(form):
    q, k, v = heads()
    mask = padded(S, 5)  # the second row's first queries have no key
    k_at, allowed = counted(mask), causal(mask, T)
    q_at, slopes = k_at[:, -T:], alibi_slopes(H)
    bias = alibi_bias(slopes, q_at, k_at)
    if form == "key":
        bias = alibi_key_bias(slopes, k_at)
    expected = formula(q, k, v, slopes.tolist(), q_at, k_at, allowed)
    y = biased_attention(q, k, v, bias, allowed)
    assert_close(y, expected.float())
    assert (y[1, :, : T - 5] == 0).all()


def test_without_a_mask_it_is_causal_for_the_last_queries():
    q, k, v = heads()
    at = torch.arange(S)
    bias = alibi_bias(alibi_slopes(H), at[-T:], at)
    everyone = causal(torch.ones(B, S, dtype=torch.long), T)
    y = biased_attention(q, k, v, bias)
    assert_close(y, biased_attention(q, k, v, bias, everyone))
    assert_close(y, biased_attention(q, k, v, bias, everyone[:1]))
    assert_close(y, biased_attention(q, k, v, bias[None], everyone))
    assert_close(y, biased_attention(q, k, v, bias.expand(B, -1, -1, -1), everyone))
    later = k.clone()
    later[:, :, -1] += 1
    changed = (biased_attention(q, later, v, bias) != y).any(-1)
    assert changed.any(1)[:, -1].all() and not changed[:, :, :-1].any()


def test_attention_equals_flex_attention_uncompiled():
    q, k, v = heads(t=S)
    slopes, at = alibi_slopes(H), torch.arange(S)

    def score_mod(score, b, h, i, j):
        return torch.where(i >= j, score - slopes[h] * (i - j), -math.inf)

    with pytest.warns(UserWarning, match="without torch.compile"):
        theirs = flex_attention(q, k, v, score_mod=score_mod)
    assert_close(biased_attention(q, k, v, alibi_bias(slopes, at, at)), theirs)


@pytest.mark.parametrize("chunks", [[S], [1] * S, [4, 1, 6]])
def test_chunks_behind_a_cache_equal_the_whole(chunks):
    q, k, v = heads(t=S)
    slopes, at = alibi_slopes(H), torch.arange(S)
    whole = biased_attention(q, k, v, alibi_bias(slopes, at, at))
    parts = []
    for part in at.split(chunks):
        seen = part[-1] + 1
        bias = alibi_bias(slopes, part, at[:seen])
        parts.append(biased_attention(q[:, :, part], k[:, :, :seen], v[:, :, :seen], bias))
    assert_close(torch.cat(parts, 2), whole)


def test_gradients_reach_all_inputs_and_none_is_nan():
    q, k, v = (x.requires_grad_() for x in heads())
    at = counted(padded(S, 5))
    bias = alibi_bias(alibi_slopes(H), at[:, -T:], at)
    y = biased_attention(q, k, v, bias, causal(padded(S, 5), T))
    for gradient in torch.autograd.grad(y.square().sum(), (q, k, v)):
        assert gradient.isfinite().all() and gradient.abs().max() > 0.1


# Whole layers


def bloom():
    config = BloomConfig(hidden_size=D, n_head=H, n_layer=2, vocab_size=64)
    config._attn_implementation = "eager"
    return config


def run_bloom_weights(layer, x, mask, bias_of):
    """BLOOM's layer by our functions: its q, k and v are interleaved per head."""
    fused = layer.query_key_value(x).unflatten(-1, (H, 3, K))
    q, k, v = (part.transpose(1, 2) for part in fused.unbind(-2))
    y = biased_attention(q, k, v, bias_of(counted(mask)), causal(mask, x.shape[1]))
    return layer.dense(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("form", ["relative", "key"])
def test_a_layer_equals_blooms_with_padding(form):
    layer, x, mask = BloomAttention(bloom(), 0).eval(), torch.randn(B, S, D), padded(S, 6)
    layer.query_key_value.weight.data *= 5  # larger scores: uneven weights
    slopes = alibi_slopes(H)
    bias_of = {
        "relative": lambda at: alibi_bias(slopes, at, at),
        "key": lambda at: alibi_key_bias(slopes, at),
    }[form]
    future = torch.where(causal(mask, S), 0.0, torch.finfo(torch.float32).min)
    theirs, _ = layer(x, 0 * x, build_alibi_tensor(mask, H, x.dtype), future)
    real = mask.bool()
    ours = run_bloom_weights(layer, x, mask, bias_of)
    assert_close(ours[real], theirs[real])
    nothing = run_bloom_weights(layer, x, mask, lambda at: torch.zeros(B, H, 1, S))
    assert (nothing - theirs)[real].abs().max() > 0.01


def test_a_layer_equals_mpts():
    config = MptConfig(d_model=D, n_heads=H, n_layers=1, max_seq_len=32)
    layer, x = MptAttention(config, 0).eval(), torch.randn(B, S, D)
    layer.Wqkv.weight.data *= 5
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    theirs, _ = layer(x, build_mpt_alibi_tensor(H, 32), attention_mask=future)
    q, k, v = (p.unflatten(-1, (H, K)).transpose(1, 2) for p in layer.Wqkv(x).chunk(3, -1))
    at = torch.arange(S)
    y = biased_attention(q, k, v, alibi_bias(alibi_slopes(H), at, at))
    assert_close(layer.out_proj(y.transpose(1, 2).flatten(2)), theirs)


def test_decoding_equals_bloom_with_its_cache():
    """BLOOM builds the bias over cached and new keys: so must we for a single query."""
    model, ids, mask = BloomModel(bloom()).eval(), torch.randint(64, (B, S)), padded(S, 6)
    for block in model.h:
        block.self_attention.query_key_value.weight.data *= 20
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        before = [part.clone() for part in (cache.layers[0].keys, cache.layers[0].values)]
        block, seen = model.h[0].self_attention, []
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        x, theirs = seen[0]
        fused = block.query_key_value(x).unflatten(-1, (H, 3, K))
        q, k, v = (part.transpose(1, 2) for part in fused.unbind(-2))
        k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        at = counted(mask)
        bias = alibi_bias(alibi_slopes(H), at[:, -1:], at)
        y = biased_attention(q, k, v, bias, causal(mask, 1))
        ours = block.dense(y.transpose(1, 2).flatten(2))
        residual = model.word_embeddings_layernorm(model.word_embeddings(ids[:, -1:]))
    assert_close(ours + residual, theirs)


# Other dtypes, compiled, refused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_finished_bias(dtype):
    q, k, v = heads(dtype)
    at = torch.arange(S)
    bias = alibi_bias(alibi_slopes(H), at[-T:], at)
    y = biased_attention(q, k, v, bias)
    future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    theirs = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.to(dtype).masked_fill(future, -math.inf)
    )
    assert y.dtype == dtype
    assert_close(y, theirs)


def test_compiles_whole_also_for_one_query(unchecked):
    def attend(q, k, v, q_at, k_at):
        return biased_attention(q, k, v, alibi_bias(alibi_slopes(H), q_at, k_at))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    q, k, v = heads()
    for t in (T, 1):
        inputs = q[:, :, -t:], k, v, torch.arange(S - t, S), torch.arange(S)
        assert_close(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize("num_heads", [0, -3])
def test_refuses_no_heads(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads}$"):
        alibi_slopes(num_heads)


def test_refuses_positions_of_another_batch(unchecked):
    slopes = alibi_slopes(H)
    for q_shape, k_shape in (((2, 7), (3, 9)), ((7,), (2, 9)), ((1, 7), (2, 9))):
        q_at, k_at = (torch.zeros(n, dtype=torch.long) for n in (q_shape, k_shape))
        said = re.escape(f"queries {q_shape}, of keys {k_shape}")
        with pytest.raises(ValueError, match=said):
            alibi_bias(slopes, q_at, k_at)


@pytest.mark.parametrize(
    "shape", [(H, 1, 1), (H, T, 1), (1, 1, S), (H, S, S), (3, H, T, S), (1, 1, H, T, S), (T, S)]
)
def test_refuses_a_bias_that_would_broadcast_or_belongs_elsewhere(unchecked, shape):
    said = re.escape(f"bias of shape {shape}, for b=2 h=12 t=7 s=11")
    with pytest.raises(ValueError, match=said):
        biased_attention(*heads(), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(T, S), (B, 1, 1, S), (3, 1, T, S), (B, H, T, S)])
def test_refuses_a_mask_of_other_sizes(unchecked, shape):
    said = re.escape(f"mask of shape {shape}, for b=2 t=7 s=11")
    with pytest.raises(ValueError, match=said):
        biased_attention(*heads(), torch.zeros(H, T, S), torch.ones(shape, dtype=torch.bool))


def test_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="t=11, s=7"):
        biased_attention(*heads(t=S, s=T), torch.zeros(H, S, T))


def test_the_causal_mask_lies_where_the_queries_do():
    q, k, v = (x.to("meta") for x in heads())
    y = biased_attention(q, k, v, torch.zeros(H, T, S, device="meta"))
    assert y.is_meta and y.shape == q.shape
