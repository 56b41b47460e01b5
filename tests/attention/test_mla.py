"""Multi-head latent attention against DeepSeek-V2 and V3, loops over the paper, and itself.

Sizes are such that swapped axes show: no two of b t d h n p e c a are equal.
"""

import math
import re

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from snippets.attention.kv_cache import LayerCache, places
from snippets.attention.mla import (
    MultiHeadLatentAttention,
    absorbed_attention,
    expanded_attention,
)
from snippets.position.context_extension import scaled_frequencies, yarn_mscale
from snippets.position.rope import interleaved_from_half, inverse_frequencies, rope_table

B, T, D, H, N, P, E, C, A = 2, 9, 40, 5, 10, 6, 7, 16, 12
EPS = 0.02  # large, to show
SIZES = {
    "hidden_size": D,
    "q_lora_rank": A,
    "kv_lora_rank": C,
    "qk_nope_head_dim": N,
    "qk_rope_head_dim": P,
    "v_head_dim": E,
}
# The rotation of DeepSeek's configs, with a cos and sin factor that isn't 1 either.
YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.5,
    "mscale_all_dim": 1.2,
}
FAR = torch.tensor([0, 1, 5, 20, 31, 33, 50, 200, 1000])  # distances beyond the trained length


def layer(dtype=torch.float32, **sizes) -> MultiHeadLatentAttention:
    """One whose weights show all: sharp scores, gains that aren't 1, biases that aren't 0."""
    new = MultiHeadLatentAttention(**({"num_heads": H, "rms_norm_eps": EPS} | SIZES | sizes))
    for weight in new.parameters():
        spread = 1.5 / math.sqrt(weight.shape[1]) if weight.ndim == 2 else 0.5
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=spread)
    return new.to(dtype).requires_grad_(False)


def tables(positions=None, dtype=torch.float32, scaling=None):
    positions = torch.arange(T) if positions is None else positions
    frequencies, factor = scaled_frequencies(
        head_dim=P, rope_theta=100.0, rope_scaling=scaling, max_position_embeddings=1280
    )
    return tuple(factor * table for table in rope_table(frequencies, positions, dtype))


def oracle(ours, version=3, scaling=None, attention="eager", **settings):
    """The same weights in transformers, as a function of tokens, positions, mask and cache."""
    code, kind = (v2, DeepseekV2Config) if version == 2 else (v3, DeepseekV3Config)
    rope = {"rope_type": "default", "rope_theta": 100.0} | (scaling or {})
    heads = {"num_attention_heads": H, "num_key_value_heads": H, "max_position_embeddings": 1280}
    config = kind(rope_parameters=rope, attn_implementation=attention, **SIZES | heads | settings)
    name = f"DeepseekV{version}"
    theirs = getattr(code, f"{name}Attention")(config, layer_idx=0).to(ours.o_proj.weight.dtype)
    theirs.load_state_dict(ours.state_dict())  # strict: names and shapes are the checkpoints'
    for module in theirs.modules():
        if isinstance(module, getattr(code, f"{name}RMSNorm")):
            module.variance_epsilon = EPS
    rotary = getattr(code, f"{name}RotaryEmbedding")(config)

    def run(x, positions, allowed=None, cache=None):
        if allowed is None:
            past = 0 if cache is None else cache.get_seq_length()
            allowed = torch.ones(x.shape[1], past + x.shape[1]).tril(past).bool()[None, None]
        mask = torch.zeros(allowed.shape, dtype=x.dtype).masked_fill(~allowed, -math.inf)
        positions = positions.expand(len(x), -1)
        embeddings = rotary(x, positions)
        return theirs(
            hidden_states=x,
            position_embeddings=embeddings,
            attention_mask=mask,
            past_key_values=cache,
        )[0]

    run.config, run.attention = config, theirs
    return run


def parts_of(ours, x, rotation):
    w_kv = ours.kv_b_proj.weight.unflatten(0, (H, -1))
    return *ours.queries(x, rotation), ours.latents(x, rotation), w_kv


def in_chunks(ours, x, chunks, rotation, cache, mask=None):
    outputs = []
    for part in torch.arange(x.shape[1]).split(chunks):
        seen = None if mask is None else mask[:, : part[-1] + 1]
        now = tuple(table[..., part, :] for table in rotation)
        outputs.append(ours(x[:, part], now, seen, cache))
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    "version, rank, bias", [(2, A, False), (2, None, True), (3, A, True), (3, None, False)]
)
def test_equals_deepseek_with_yarn_beyond_the_trained_length(version, rank, bias):
    scale = yarn_mscale(40.0, 1.2) ** 2 * (N + P) ** -0.5
    sizes = {"q_lora_rank": rank, "attention_bias": bias}
    ours, x = layer(**sizes, softmax_scale=scale), torch.randn(B, T, D)
    biased = {name for name in ours.state_dict() if name.endswith(".bias")}
    q_bias = {"q_a_proj.bias"} if rank else set()
    assert biased == (q_bias | {"kv_a_proj_with_mqa.bias", "o_proj.bias"} if bias else set())
    theirs = oracle(ours, version, YARN, **sizes)(x, FAR)
    assert_close(ours(x, tables(FAR, scaling=YARN)), theirs)
    assert_close(ours(x, tables(FAR + 7, scaling=YARN)), theirs)  # only distances count
    assert (ours(x, tables(scaling=YARN)) - theirs).abs().max() > 0.01
    assert (ours(x, tables(FAR)) - theirs).abs().max() > 0.01
    ours.softmax_scale = (N + P) ** -0.5
    assert (ours(x, tables(FAR, scaling=YARN)) - theirs).abs().max() > 0.01


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_deepseek_without_scaling(version, attention):
    ours, x = layer(), torch.randn(B, T, D)
    assert_close(ours(x, tables()), oracle(ours, version, attention=attention)(x, torch.arange(T)))
    assert (ours(x, tables()) - ours(x)).abs().max() > 0.1
    assert ours.softmax_scale == (N + P) ** -0.5


def test_equals_deepseek_in_bfloat16():
    ours, x = layer(torch.bfloat16), torch.randn(B, T, D, dtype=torch.bfloat16)
    y = ours(x, tables(dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    theirs = oracle(ours, attention="sdpa")(x, torch.arange(T))
    assert_close(y, theirs, rtol=0.016, atol=0.02)  # a last bit of outputs near 3
    rotation, cache = tables(dtype=torch.bfloat16), LayerCache()
    cached = in_chunks(ours, x, [4] + [1] * 5, rotation, cache)  # rounds in other places
    assert cached.dtype == torch.bfloat16 and (cached - y).abs().max() < 0.1


def test_the_half_layout_is_a_permutation_of_rows():
    half, x = layer(), torch.randn(B, T, D)
    theirs = oracle(half, rope_interleave=False)(x, torch.arange(T))
    weights = half.state_dict()
    q = weights["q_b_proj.weight"].unflatten(0, (H, N + P))
    turning = interleaved_from_half(q[:, N:].flatten(0, 1), head_dim=P).unflatten(0, (H, P))
    weights["q_b_proj.weight"] = torch.cat((q[:, :N], turning), 1).flatten(0, 1)
    kv = weights["kv_a_proj_with_mqa.weight"]
    turning = interleaved_from_half(kv[C:], head_dim=P)
    weights["kv_a_proj_with_mqa.weight"] = torch.cat((kv[:C], turning))
    ours = layer()
    ours.load_state_dict(weights)
    assert_close(ours(x, tables()), theirs)
    assert (half(x, tables()) - theirs).abs().max() > 0.1


def test_equals_the_papers_formula_in_loops():
    ours, x = layer(torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    w = {name.removesuffix(".weight"): p for name, p in ours.state_dict().items()}
    turn = torch.polar(
        torch.ones(T, P // 2).double(),
        (torch.arange(T)[:, None] * inverse_frequencies(head_dim=P, rope_theta=100.0)).double(),
    )

    def rope(vector, t):
        pairs = torch.view_as_complex(vector.reshape(-1, 2)) * turn[t]
        return torch.view_as_real(pairs).reshape(-1)

    def norm(vector, gain):
        return gain * vector / (vector.square().mean() + EPS).sqrt()

    expected = torch.zeros(B, T, D, dtype=torch.float64)
    for b in range(B):
        down = [w["kv_a_proj_with_mqa"] @ x[b, j] for j in range(T)]
        latents = [norm(both[:C], w["kv_a_layernorm"]) for both in down]
        turned = [rope(both[C:], j) for j, both in enumerate(down)]
        for t in range(T):
            q_latent = norm(w["q_a_proj"] @ x[b, t], w["q_a_layernorm"])
            heads = []
            for i in range(H):
                q = (w["q_b_proj"] @ q_latent)[i * (N + P) : (i + 1) * (N + P)]
                q = torch.cat((q[:N], rope(q[N:], t)))
                up = w["kv_b_proj"][i * (N + E) : (i + 1) * (N + E)]
                keys = [torch.cat((up[:N] @ latents[j], turned[j])) for j in range(t + 1)]
                scores = torch.stack([q @ key for key in keys]) / math.sqrt(N + P)
                values = torch.stack([up[N:] @ latents[j] for j in range(t + 1)])
                heads.append(scores.softmax(0) @ values)
            expected[b, t] = w["o_proj"] @ torch.cat(heads)
    assert_close(
        ours(x, tables(dtype=torch.float64)), expected, rtol=0, atol=1e-6
    )  # float32 angles


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("t", [1, 2, T - 1, T])
@pytest.mark.parametrize("kind", ["causal", "pairs", "per sequence"])
def test_absorbed_equals_expanded_and_so_do_the_gradients(dtype, bound, t, kind):
    ours, x = layer(dtype), torch.randn(B, T, D, dtype=dtype)
    *q, kept, w_kv = parts_of(ours, x, tables(dtype=dtype))
    q = [part[:, :, -t:] for part in q]
    inputs = [tensor.clone().requires_grad_() for tensor in (*q, kept, w_kv / 4)]  # near 1
    mask = {"causal": None, "pairs": torch.rand(t, T) < 0.5}.get(kind, torch.rand(B, 1, t, T) < 0.5)
    if mask is not None:
        mask[..., 0, :] = False  # a query that may attend to nothing
    forms = expanded_attention, absorbed_attention
    masked = () if mask is None else (mask,)
    plain, other = (form(*inputs, *masked, scale=0.3) for form in forms)
    assert plain.shape == (B, H, t, E)
    assert_close(other, plain, rtol=0, atol=bound)
    upstream = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, inputs, upstream) for y in (plain, other)]
    assert_close(grads[1], grads[0], rtol=0, atol=10 * bound)  # of sums over tokens
    if mask is not None:
        assert (plain[:, :, 0] == 0).all() and (other[:, :, 0] == 0).all()


@pytest.mark.parametrize("chunks", [[T], [1] * T, [3, 1, 5], [5, 4]])
def test_chunks_through_a_cache_equal_the_whole_and_deepseeks(chunks):
    ours, x = layer(), torch.randn(B, T, D)
    run, cache, dynamic = oracle(ours), LayerCache(), None
    dynamic = DynamicCache(config=run.config)
    y = in_chunks(ours, x, chunks, tables(), cache)
    assert_close(y, ours(x, tables()))
    positions = torch.arange(T).split(chunks)
    theirs = [run(x[:, part], part, cache=dynamic) for part in positions]
    assert_close(y, torch.cat(theirs, dim=1))


def test_keeps_the_latent_and_the_turning_key_and_nothing_else():
    ours, x, cache = layer(), torch.randn(B, T, D), LayerCache()
    ours(x, tables(FAR), cache=cache)
    kept = [tensor[..., : cache.length, :] for tensor in cache.store]
    assert sum(tensor.numel() for tensor in kept) == B * T * (C + P)
    assert cache.nbytes == 4 * B * T * (C + P)
    dynamic = DynamicCache(config=(run := oracle(ours)).config)
    run(x, FAR, cache=dynamic)
    theirs = dynamic.layers[0]
    assert_close(kept[0][..., :C], theirs.keys.squeeze(1))
    # transformers leaves turned pairs in the half layout, which scores don't see.
    turned = theirs.values.squeeze(1).unflatten(-1, (2, -1)).mT.flatten(-2)
    assert_close(kept[0][..., C:], turned)


@pytest.mark.parametrize("chunks", [[T], [3, 1, 1, T - 5]])
def test_padding_on_the_left_counts_for_nothing(chunks):
    ours, x, padding = layer(), torch.randn(B, T, D), 4
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :padding] = 0
    positions, allowed = places(mask, mask, 0)
    y = in_chunks(ours, x, chunks, tables(positions), LayerCache(), mask)
    assert_close(y[0], ours(x[:1], tables())[0])
    alone = ours(x[1:, padding:], tables(torch.arange(T - padding)))
    assert_close(y[1, padding:], alone[0])
    assert_close(ours(x, tables(positions), mask.bool()), y)
    assert_close(ours(x, tables(positions), allowed), y)
    assert (y[1, :padding] == 0).all()  # no key, and no bias in o_proj
    theirs = oracle(ours)(x, positions, allowed | torch.eye(T).bool())
    assert_close(y[0], theirs[0])
    assert_close(y[1, padding:], theirs[1, padding:])


def test_is_causal():
    ours, x = layer(), torch.randn(B, T, D)
    before = ours(x, tables())
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        after = ours(changed, tables())
        assert_close(after[:, :t], before[:, :t])
        assert ((after - before)[:, t:].abs().amax(dim=(0, 2)) > 1e-4).all()


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("c, e", [(C, E), (5, E), (3, 13), (5, 6)])  # 2 c + p is n + e in the last
def test_takes_the_form_with_fewer_operations(c, e):
    with torch.device("meta"):
        ours = MultiHeadLatentAttention(**SIZES | {"kv_lora_rank": c, "v_head_dim": e}, num_heads=H)
        chosen = set()
        for t in (1, 5, 11):
            for past in (0, 1, 4, 300):
                x, cache, s = torch.empty(1, t, D), LayerCache(), past + t
                q_nope, q_rope = torch.empty(1, H, t, N), torch.empty(1, H, t, P)
                kept, w_kv = torch.empty(1, s, c + P), torch.empty(H, N + e, c)
                ask = q_nope, q_rope, kept, w_kv, torch.ones(t, s).bool()
                expanded = counted(lambda: expanded_attention(*ask, scale=1.0))  # noqa: B023
                absorbed = counted(lambda: absorbed_attention(*ask, scale=1.0))  # noqa: B023
                assert expanded == 2 * H * (s * c * (N + e) + t * s * (N + P + e))
                assert absorbed == 2 * H * (t * c * (N + e) + t * s * 2 * (c + P))
                assert ours.absorbs(t, s) == (absorbed < expanded)
                chosen.add(ours.absorbs(t, s))
                if past:
                    cache.append(torch.empty(1, past, c + P))
                whole = counted(lambda: ours(x, cache=cache))  # noqa: B023
                linears = [p.numel() for p in ours.parameters() if p.ndim == 2]
                around = 2 * t * (sum(linears) - ours.kv_b_proj.weight.numel())
                assert whole - around == min(absorbed, expanded)
    assert chosen == ({True} if 2 * c + P < N + e else {True, False})


def test_runs_compiled(unchecked):
    ours, x = layer(), torch.randn(B, T, D)
    compiled = torch.compile(ours, fullgraph=True, backend="eager", dynamic=False)
    assert_close(compiled(x, tables()), ours(x, tables()))
    filled = [LayerCache(), LayerCache()]
    for cache in filled:
        ours(x[:, :-1], tables(torch.arange(T - 1)), cache=cache)
    last = tables(torch.tensor([T - 1]))
    decode = torch.compile(ours, fullgraph=True, backend="eager", dynamic=False)
    y = decode(x[:, -1:], last, cache=filled[0])
    assert_close(y, ours(x[:, -1:], last, cache=filled[1]))


def test_shapes_at_full_size():
    sizes = {"hidden_size": 7168, "num_heads": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
    sizes |= {"qk_rope_head_dim": 64, "v_head_dim": 128}
    with torch.device("meta"):
        big = MultiHeadLatentAttention(**sizes, q_lora_rank=1536)
        lite = MultiHeadLatentAttention(
            **sizes | {"hidden_size": 2048, "num_heads": 16}, q_lora_rank=None
        )
    assert {name: tuple(w.shape) for name, w in big.state_dict().items()} == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }
    assert big.kv_a_layernorm.eps == big.q_a_layernorm.eps == 1e-6
    assert lite.q_proj.weight.shape == (16 * 192, 2048)
    assert big.absorbs(1, 4096) and not big.absorbs(4096, 4096)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"hidden_size": 0}, "below 1: hidden_size=0, num_heads=5, q_lora_rank=12"),
        ({"num_heads": 0}, "below 1: hidden_size=40, num_heads=0"),
        ({"q_lora_rank": 0}, "q_lora_rank=0, kv_lora_rank=16"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim=0"),
        ({"v_head_dim": 0}, "qk_nope_head_dim=10, v_head_dim=0"),
        ({"qk_rope_head_dim": 5}, "pair up: qk_rope_head_dim=5"),
        ({"qk_rope_head_dim": 0}, "pair up: qk_rope_head_dim=0"),
        ({"softmax_scale": 0.0}, "not positive: softmax_scale=0.0"),
        ({"softmax_scale": math.nan}, "not positive: softmax_scale=nan"),
    ],
)
def test_refuses_sizes_that_do_not_fit(sizes, said):
    with pytest.raises(ValueError, match=said):
        layer(**sizes)


def test_takes_the_smallest_sizes():
    ones = dict.fromkeys(SIZES, 1) | {"qk_rope_head_dim": 2, "num_heads": 1}
    y = MultiHeadLatentAttention(**ones)(torch.randn(1, 1, 1))
    assert y.shape == (1, 1, 1)


@pytest.mark.parametrize("shape", [(T, B), (B, T - 1), (B + 1, T), (B, 1, T - 1, T)])
def test_refuses_a_mask_of_other_sizes_and_keeps_nothing(unchecked, shape):
    cache = LayerCache()
    with pytest.raises(ValueError, match=f"shape {re.escape(str(shape))}"):
        layer()(torch.randn(B, T, D), None, torch.ones(shape, dtype=torch.bool), cache)
    assert cache.length == 0 and not cache.store


def test_refuses_a_rotation_of_other_sizes_and_keeps_nothing(unchecked):
    cache = LayerCache()
    with pytest.raises(ValueError, match=rf"shape \({B}, {H}, {T}, {P}\), table \({T - 1}, 3\)"):
        layer()(torch.randn(B, T, D), tables(torch.arange(T - 1)), cache=cache)
    assert cache.length == 0 and not cache.store


def test_refuses_another_batchs_cache(unchecked):
    ours, cache = layer(), LayerCache()
    ours(torch.randn(B, T, D), tables(), cache=cache)
    with pytest.raises(ValueError, match=rf"\({B}, {T}, {C + P}\).*\({B + 1}, 1, {C + P}\)"):
        ours(torch.randn(B + 1, 1, D), tables(torch.tensor([T])), cache=cache)
    assert cache.length == T


def test_refuses_another_layers_weights():
    with pytest.raises(RuntimeError, match=r"size mismatch for kv_b_proj\.weight"):
        layer().load_state_dict(layer(v_head_dim=E + 1).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.weight"):
        layer(q_lora_rank=None).load_state_dict(layer().state_dict())
