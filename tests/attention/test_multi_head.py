"""Multi-head attention against torch's, a loop over heads, and itself in pieces.

No two of b t s d m h k are equal, and h k != d, unless torch's layer wants h k = d.
"""

import math
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import LayerCache
from snippets.attention.multi_head import MultiHeadAttention, allowed_pairs, unpack_torch

B, T, S, D, M, H, K = 2, 5, 9, 24, 10, 4, 7


def layer(**sizes) -> MultiHeadAttention:
    sizes = {"hidden_size": D, "num_heads": H, "head_dim": K, "bias": True} | sizes
    return MultiHeadAttention(**sizes)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, T, D), torch.randn(B, S, M)


def padding(s: int) -> torch.Tensor:
    mask = torch.ones(B, s, dtype=torch.bool)
    mask[0, s - 1 :] = mask[1, s - 3 :] = False
    return mask


def torch_pair(dtype=torch.float32, **sizes) -> tuple[MultiHeadAttention, nn.MultiheadAttention]:
    """torch's layer with biases that aren't its zeros, and ours with the same weights."""
    theirs = nn.MultiheadAttention(
        D, H, kdim=sizes.get("memory_size"), batch_first=True, vdim=sizes.get("memory_size")
    )
    for name, weight in theirs.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    ours = layer(head_dim=None, **sizes)
    ours.load_state_dict(unpack_torch(theirs.state_dict()))
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("mask", [None, "padding", "pairs"])
@pytest.mark.parametrize("memory_size", [None, M, D])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch(memory_size, mask, dtype):
    """Packed where the widths agree, three matrices where they don't; True = ignore there."""
    ours, theirs = torch_pair(dtype, memory_size=memory_size)
    x = torch.randn(B, T, D, dtype=dtype)
    memory = None if memory_size is None else torch.randn(B, S, memory_size, dtype=dtype)
    source = x if memory is None else memory
    s, allowed, ignore = source.shape[1], None, {}
    if mask == "padding":
        allowed = padding(s)
        ignore = {"key_padding_mask": ~allowed}
    elif mask == "pairs":
        allowed = torch.rand(B, H, T, s) < 0.6
        allowed[..., 0] = True
        ignore = {"attn_mask": ~allowed.flatten(0, 1)}
    bounds = {} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 2e-2}  # two kernels
    expected, weights = theirs(x, source, source, average_attn_weights=False, **ignore)
    assert_close(ours(x, memory, allowed), expected, **bounds)
    assert_close(ours.maps(x, memory, allowed), weights, **bounds)
    parts = ours.contributions(x, memory, allowed)
    assert parts.shape == (B, H, T, D)
    assert_close(parts.sum(1) + ours.o_proj.bias, expected, **bounds)
    if mask == "padding":  # also as numbers, and with 1 for all sequences
        assert_close(ours(x, memory, allowed.long()), expected, **bounds)
        same = allowed[:, None, None].expand(B, 1, T, s)
        assert_close(ours(x, memory, same), expected, **bounds)
    if mask == "pairs":
        one = theirs(x[:1], source[:1], source[:1], attn_mask=~allowed[0])[0]
        assert_close(ours(x, memory, allowed[:1])[:1], one, **bounds)


def test_gradients_equal_torchs():
    ours, theirs = torch_pair(memory_size=M)
    x, memory = tokens()
    upstream, allowed = torch.randn(B, T, D), padding(S)
    ours(x, memory, allowed).backward(upstream)
    theirs(x, memory, memory, key_padding_mask=~allowed)[0].backward(upstream)
    expected = unpack_torch({n: p.grad for n, p in theirs.named_parameters()})
    assert_close({n: p.grad for n, p in ours.named_parameters()}, expected)


@pytest.mark.parametrize("mask", [None, "padding"])
def test_causal_equals_torch_and_grouped_query_attention(mask):
    ours, theirs = torch_pair(causal=True)
    x, allowed = torch.randn(B, T, D), padding(T) if mask else None
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    ignore = {"attn_mask": future, "key_padding_mask": None if mask is None else ~allowed}
    assert_close(ours(x, attention_mask=allowed), theirs(x, x, x, **ignore)[0])
    gqa = GroupedQueryAttention(hidden_size=D, num_heads=H, num_kv_heads=H, bias=True)
    gqa.load_state_dict(ours.state_dict())
    assert_close(ours(x, attention_mask=allowed), gqa(x, attention_mask=allowed))
    free = torch.ones(1, 1, T, T, dtype=torch.bool)  # pairs are taken as they are
    assert_close(ours(x, attention_mask=free), theirs(x, x, x)[0])


def test_equals_the_papers_formula_in_loops():
    mha, (x, memory) = layer(memory_size=M), tokens()
    allowed, expected, maps = padding(S), torch.zeros(B, T, D), torch.zeros(B, H, T, S)
    for b in range(B):
        for t in range(T):
            for i in range(H):
                rows = slice(i * K, (i + 1) * K)
                q = mha.q_proj.weight[rows] @ x[b, t] + mha.q_proj.bias[rows]
                keys = [s for s in range(S) if allowed[b, s]]
                exps = {}
                for s in keys:
                    key = mha.k_proj.weight[rows] @ memory[b, s] + mha.k_proj.bias[rows]
                    exps[s] = (q @ key / math.sqrt(K)).exp()
                for s in keys:
                    weight = maps[b, i, t, s] = exps[s] / sum(exps.values())
                    value = mha.v_proj.weight[rows] @ memory[b, s] + mha.v_proj.bias[rows]
                    expected[b, t] += mha.o_proj.weight[:, rows] @ (weight * value)
    assert_close(mha(x, memory, allowed), expected + mha.o_proj.bias)
    assert_close(mha.maps(x, memory, allowed), maps)


def test_each_head_writes_into_its_own_subspace():
    mha, (x, memory) = layer(memory_size=M).double(), tokens()
    parts = mha.contributions(x.double(), memory.double())
    for i in range(H):
        rows = parts[:, i].flatten(0, 1)  # b t of them: more than k
        assert torch.linalg.matrix_rank(rows) == K < len(rows)
        basis = torch.linalg.qr(mha.o_proj.weight[:, i * K : (i + 1) * K]).Q
        assert_close(rows @ basis @ basis.T, rows)


def test_a_head_without_output_columns_is_gone():
    mha, (x, memory) = layer(memory_size=M), tokens()
    before, parts = mha(x, memory), mha.contributions(x, memory)
    with torch.no_grad():
        mha.o_proj.weight[:, K : 2 * K] = 0
    assert_close(before - mha(x, memory), parts[:, 1])


def test_what_stands_in_padding_counts_for_nothing():
    mha, (x, memory) = layer(memory_size=M), tokens()
    other = torch.where(padding(S)[..., None], memory, 9.0)
    assert_close(mha(x, memory, padding(S)), mha(x, other, padding(S)))
    assert_close(mha(x, memory, padding(S))[1:], mha(x[1:], memory[1:, : S - 3]))


def test_without_keys_there_is_the_bias_alone_and_no_nan():
    mha, (x, memory) = layer(memory_size=M), tokens()
    nothing = torch.zeros(B, S, dtype=torch.long)
    y = mha(x, memory, nothing)
    assert_close(y, mha.o_proj.bias.expand_as(y))
    assert (mha.maps(x, memory, nothing) == 0).all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in mha.parameters())


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 2], [1, 3, 1]])
def test_causal_chunks_through_a_cache_equal_the_whole(chunks):
    mha, x, mask = layer(causal=True), torch.randn(B, T, D), torch.ones(B, T, dtype=torch.long)
    mask[1, :2] = 0
    for seen in (None, mask):
        cache, parts = LayerCache(), []
        with torch.no_grad():
            for part in torch.arange(T).split(chunks):
                now = None if seen is None else seen[:, : part[-1] + 1]
                parts.append(mha(x[:, part], None, now, cache))
            assert_close(torch.cat(parts, 1), mha(x, attention_mask=seen))
        assert cache.length == T


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 2]])
def test_the_memory_is_projected_once(chunks):
    mha, (x, memory) = layer(memory_size=M), tokens()
    cache, parts, projected = LayerCache(), [], []
    for proj in (mha.k_proj, mha.v_proj):
        proj.register_forward_hook(lambda module, inputs, y: projected.append(y.shape[1]))
    with torch.no_grad():
        for part in x.split(chunks, 1):
            parts.append(mha(part, memory, padding(S), cache))
        assert sum(projected) == 2 * S and cache.length == S
        assert_close(torch.cat(parts, 1), mha(x, memory, padding(S)))
    assert [tuple(kept.shape[:2]) for kept in cache.store] == [(B, H), (B, H)]


def test_loads_a_whole_torch_model():
    model = nn.TransformerDecoderLayer(D, H, 30, dropout=0.0, batch_first=True, norm_first=True)
    before = model.state_dict()
    weights = unpack_torch(before)
    assert weights["linear1.weight"] is before["linear1.weight"]
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)

    def own(name):
        start = name + "."
        return {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}

    inner, cross = layer(head_dim=None, causal=True), layer(head_dim=None, memory_size=D)
    inner.load_state_dict(own("self_attn"))
    cross.load_state_dict(own("multihead_attn"))
    y = x + inner(model.norm1(x))
    y = y + cross(model.norm2(y), memory, padding(S))
    y = y + model.linear2(model.linear1(model.norm3(y)).relu())
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_close(y, model(x, memory, future, memory_key_padding_mask=~padding(S)))


def test_names_without_a_prefix_and_with_a_longer_one():
    weight = torch.randn(6, 2)
    for prefix in ("", "decoder.layers.3.self_attn."):
        got = unpack_torch(
            {
                f"{prefix}in_proj_weight": weight,
                f"{prefix}in_proj_bias": weight[:, 0],
                f"{prefix}out_proj.weight": weight,
                f"{prefix}out_proj.bias": weight,
            }
        )
        names = [f"{x}_proj.{kind}" for kind in ("weight", "bias") for x in "qkv"]
        assert list(got) == [prefix + n for n in (*names, "o_proj.weight", "o_proj.bias")]
        assert torch.equal(got[f"{prefix}k_proj.weight"], weight[2:4])
    other = {"my_out_proj.weight": weight, "out_proj": weight, "in_proj.weight": weight}
    assert list(unpack_torch(other)) == list(other)


@pytest.mark.parametrize("name", ["bias_k", "a.bias_v"])
def test_refuses_a_learned_extra_key(name):
    with pytest.raises(ValueError, match=f"^{name}: an extra .* no place here$"):
        unpack_torch({name: torch.zeros(1)})


def test_defaults():
    mha = MultiHeadAttention(hidden_size=12, num_heads=3)
    assert {n: tuple(w.shape) for n, w in mha.state_dict().items()} == {
        f"{x}_proj.weight": (12, 12) for x in "qkvo"
    }
    x = torch.randn(B, T, 12)
    assert_close(mha.maps(x), mha.maps(x, None, torch.ones(B, T, dtype=torch.long)))
    assert_close(mha.contributions(x).sum(1), mha(x))
    assert_close(mha(x), mha(x, attention_mask=torch.ones(B, 1, T, T, dtype=torch.bool)))
    wide = layer(memory_size=M).state_dict()
    assert {n: tuple(w.shape) for n, w in wide.items() if n.endswith("weight")} == {
        "q_proj.weight": (H * K, D),
        "k_proj.weight": (H * K, M),
        "v_proj.weight": (H * K, M),
        "o_proj.weight": (D, H * K),
    }
    assert layer(num_heads=1, head_dim=None).q_proj.weight.shape == (D, D)


def test_the_causal_mask_stands_where_the_tokens_are():
    mha = layer(causal=True).to("meta")
    assert mha(torch.randn(B, T, D, device="meta")).device.type == "meta"
    assert mha.maps(torch.randn(B, T, D, device="meta")).device.type == "meta"
    mask = mha.look_ups(torch.randn(B, T, D, device="meta"))[3]
    assert mask.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole(unchecked, dtype):
    mha, (x, memory) = layer(memory_size=M).to(dtype), (y.to(dtype) for y in tokens())
    compiled = torch.compile(mha, fullgraph=True, backend="eager")
    bounds = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    assert_close(compiled(x, memory, padding(S)), mha(x, memory, padding(S)), **bounds)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"num_heads": 5, "head_dim": None}, "hidden_size=24, num_heads=5"),
        ({"num_heads": 0}, "hidden_size=24, num_heads=0"),
        ({"causal": True, "memory_size": M}, "causal=True, memory_size=10"),
    ],
)
def test_refuses_sizes_that_do_not_fit(sizes, said):
    with pytest.raises(ValueError, match=said):
        layer(**sizes)


@pytest.mark.parametrize(
    "shape", [(S, B), (B, S - 1), (B + 1, S), (B, 1, T + 1, S), (B + 1, 1, T, S), (B, 2, T, S)]
)
def test_refuses_a_mask_of_other_sizes_and_keeps_nothing(unchecked, shape):
    mha, (x, memory), cache = layer(memory_size=M), tokens(), LayerCache()
    said = re.escape(f"mask of shape {shape}, for b=2 ") + (
        "h=4 t=5 s=9" if len(shape) == 4 else "s=9"
    )
    with pytest.raises(ValueError, match=said):
        mha(x, memory, torch.ones(shape, dtype=torch.bool), cache)
    assert cache.length == 0


def test_refuses_a_mask_of_numbers_for_pairs(unchecked):
    mha, (x, memory) = layer(memory_size=M), tokens()
    with pytest.raises(TypeError, match=r"mask of torch\.float32: needs booleans, True = attend$"):
        mha(x, memory, torch.zeros(B, 1, T, S))


def test_refuses_a_memory_that_is_not_wanted_or_missing():
    x, memory = tokens()
    with pytest.raises(ValueError, match="cross-attention is True, memory is None"):
        layer(memory_size=M)(x)
    with pytest.raises(ValueError, match=r"cross-attention is False, memory is \(2, 9, 10\)"):
        layer()(x, memory)


def test_refuses_other_batches(unchecked):
    mha, (x, memory) = layer(memory_size=M), tokens()
    with pytest.raises(ValueError, match=r"2 sequences ask, 1 memories answer$"):
        mha(x, memory[:1])
    cache = LayerCache()
    mha(x, memory, cache=cache)
    with pytest.raises(ValueError, match=r"a cache of \(2, 4, 9, 7\)"):
        mha(x[:1], memory[:1], cache=cache)
    with pytest.raises(ValueError, match="a memory of 8 tokens, in the cache are 9"):
        mha(x, memory[:, :8], cache=cache)
    own = LayerCache()
    layer()(x, cache=own)
    with pytest.raises(ValueError, match=r"a cache of \(2, 4, 5, 7\)"):
        layer()(x[:1], cache=own)


def test_allowed_pairs():
    free = {"num_heads": H, "causal": False}
    assert allowed_pairs(None, B, 2, 3, **free) is None
    earlier = allowed_pairs(None, 1, 2, 3, num_heads=H, causal=True)
    assert earlier.tolist() == [[True, True, False], [True, True, True]]
    keys = torch.tensor([[1, 0, 1]])
    assert allowed_pairs(keys, 1, 2, 3, **free).tolist() == [[[[True, False, True]]]]
    both = allowed_pairs(keys, 1, 2, 3, num_heads=H, causal=True)
    assert both.tolist() == [[[[True, False, False], [True, False, True]]]]
