"""AWQ against loops over the paper's equations, against transformers, and against rounding."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from snippets.common.grid import from_codes, unpack
from snippets.layers.rmsnorm import RMSNorm, UnitOffsetRMSNorm
from snippets.layers.swiglu import GatedMLP
from snippets.models.llama import LlamaConfig, LlamaLayer
from snippets.position.rope import inverse_frequencies, rope_table
from snippets.quantization.awq import (
    AWQLinear,
    channel_magnitudes,
    fold_into_linear,
    fold_into_norm,
    quantize_layer,
    record_inputs,
    rounded,
    scales_of,
    search_clip,
    search_scales,
)

B, T, D, N, S = 2, 7, 24, 10, 8  # batch, tokens, input channels, output rows, group size
OUTLIERS = (3, 13)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def data(seed=0, *, b=B, t=T, d=D, gain=20.0, dtype=torch.float32):
    """Inputs with outlier channels; those of other seeds have the same ones."""
    new = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, d, generator=new)
    x[..., list(OUTLIERS)] *= gain
    return x.to(dtype)


def linear(seed=0, n=N, d=D, bias=False, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(d, n, bias=bias, dtype=dtype)


def error(module, weight, x):
    """Mean squared error of the output."""
    return (x @ (weight - module.weight.detach()).T).square().mean().item()


def awq_weight(module, x, bits=3, group_size=S, **options):
    """The weight that AWQ leaves, scales divided out again."""
    s, _ = search_scales(module, ["weight"], x, bits=bits, group_size=group_size, **options)
    return rounded(module.weight.detach() * s, bits=bits, group_size=group_size) / s


# The paper's equations in loops (numpy, float64)


def reference_round(w, bits, group_size):
    """Q(w), equation 1 with a zero point, a group at a time."""
    out, levels = np.zeros_like(w), 2**bits - 1
    for n, start in itertools.product(range(w.shape[0]), range(0, w.shape[1], group_size)):
        part = w[n, start : start + group_size]
        low, high = min(part.min(), 0), max(part.max(), 0)
        step = (high - low) / levels or 1.0
        zero = np.round(-low / step)
        for i, value in enumerate(part):
            code = min(max(np.round(value / step) + zero, 0), levels)
            out[n, start + i] = (code - zero) * step
    return out


def reference_scales(x, alpha):
    """Equation 5: s = s_x^alpha, with the released code's divisor."""
    s = np.array([np.mean([abs(v) for v in column]) ** alpha for column in x.T])
    s = np.maximum(s, 1e-4)
    return s / np.sqrt(max(s) * min(s))


def reference_loss(w, x, s, bits, group_size):
    """Equation 4: the mean square of Q(W diag(s)) diag(s)^-1 X - W X."""
    q = reference_round(w * s, bits, group_size) / s
    total = 0.0
    for row in x:
        for n in range(len(w)):
            total += (q[n] @ row - w[n] @ row) ** 2
    return total / (len(x) * len(w))


@pytest.mark.parametrize("bits, group_size, steps", [(3, 8, 20), (4, 24, 7), (2, 4, 1)])
def test_equals_the_papers_search_in_loops(bits, group_size, steps):
    module, x = linear(dtype=torch.float64), data(dtype=torch.float64)
    options = {} if steps == 20 else {"steps": steps}
    s, losses = search_scales(module, ["weight"], x, bits=bits, group_size=group_size, **options)
    w, rows = module.weight.detach().numpy(), x.flatten(0, 1).numpy()
    tried = [reference_scales(rows, i / steps) for i in range(steps)]
    expected = [reference_loss(w, rows, scale, bits, group_size) for scale in tried]
    assert_close(losses, torch.tensor(expected), rtol=1e-9, atol=1e-12)
    assert_close(s, torch.tensor(tried[int(np.argmin(expected))]), rtol=1e-10, atol=0)
    assert steps < 20 or 0 < np.argmin(expected) < steps - 1  # something to find


@pytest.mark.parametrize("seed", range(4))
def test_a_ten_times_finer_search_finds_little_more(seed):
    module, x = linear(seed, n=40, dtype=torch.float64), data(seed, t=60, dtype=torch.float64)
    _, coarse = search_scales(module, ["weight"], x, bits=3, group_size=S)
    w, rows = module.weight.detach().numpy(), x.flatten(0, 1).numpy()[:40]
    w_, x_ = torch.tensor(w), torch.tensor(rows)
    _, coarse = search_scales(linear_of(w_), ["weight"], x_, bits=3, group_size=S)
    fine = []
    for i in range(200):
        s = torch.tensor(reference_scales(rows, i / 200))
        fine.append(error(linear_of(w_), rounded(w_ * s, bits=3, group_size=S) / s, x_))
    assert_close(torch.tensor(fine[::10], dtype=torch.float64), coarse, rtol=1e-9, atol=1e-12)
    assert min(fine) <= coarse.min() <= 1.25 * min(fine)
    assert coarse.min() < 0.5 * coarse[0]


def linear_of(weight):
    module = nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def test_the_group_size_of_none_is_one_group():
    module, x = linear(), data()
    for function in (
        lambda s: search_scales(module, ["weight"], x, bits=3, **s)[1],
        lambda s: rounded(module.weight, bits=3, **s),
        lambda s: search_clip(module.weight, x, bits=3, **s),
        lambda s: AWQLinear(module, bits=3, **s).weight(),
    ):
        assert torch.equal(function({}), function({"group_size": D}))
        assert not torch.equal(function({}).sum(), function({"group_size": S}).sum())


def test_magnitudes_and_scales_by_hand():
    x = torch.tensor([[[1.0, -8.0, 0.0], [3.0, 8.0, 0.0]]])
    assert channel_magnitudes(x).tolist() == [2, 8, 0]
    assert channel_magnitudes(x.bfloat16()).dtype == torch.float32
    assert channel_magnitudes(x.double()).dtype == torch.float64
    m = torch.tensor([1.0, 4, 16])
    assert_close(scales_of(m, 0.5), torch.tensor([0.5, 1, 2]))
    assert_close(scales_of(m, 1.0), torch.tensor([0.25, 1, 4]))
    assert scales_of(m, 0.0).tolist() == [1, 1, 1]
    dead = torch.tensor([0.0, 1.0])  # 1e-4 and 1, over their mean 1e-2
    assert_close(scales_of(dead, 0.5), torch.tensor([0.01, 100.0]))
    assert scales_of(dead, 0.0).tolist() == [1, 1]


# It beats what it should, and ties where there is nothing to gain


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_beats_rounding_on_other_inputs_with_the_same_outliers(seed, bits):
    module, x, held_out = linear(seed, n=48), data(seed, t=100), data(seed + 100, t=100)
    w = module.weight.detach()
    plain = error(module, rounded(w, bits=bits, group_size=S), held_out)
    found = error(module, awq_weight(module, x, bits), held_out)
    assert found < 0.5 * plain

    # Keeping the columns of largest norm in full precision (the paper's table 1): of 24, one.
    kept = rounded(w, bits=bits, group_size=S)
    largest = w.norm(dim=0).argmax()
    kept[:, largest] = w[:, largest]
    assert largest not in OUTLIERS and found < 0.6 * error(module, kept, held_out)

    # Scaling the same channels down.
    s, _ = search_scales(module, ["weight"], x, bits=bits, group_size=S)
    down = rounded(w / s, bits=bits, group_size=S) * s
    assert error(module, down, held_out) > 1.5 * plain
    assert s.topk(2).indices.sort().values.tolist() == list(OUTLIERS)
    assert s.max() > 1 > s.min()


def test_ties_with_rounding_where_all_channels_are_alike():
    module = linear()
    x = torch.randn(B, T, D).sign()
    s, losses = search_scales(module, ["weight"], x, bits=3, group_size=S)
    assert s.tolist() == [1] * D
    assert losses.tolist() == [losses[0].item()] * 20
    assert torch.equal(awq_weight(module, x), rounded(module.weight.detach(), bits=3, group_size=S))


@pytest.mark.parametrize("gain", [1.0, 3.0, 100.0])
def test_is_never_worse_than_rounding_on_its_own_inputs(gain):
    module, x = linear(n=30), data(gain=gain)
    plain = error(module, rounded(module.weight.detach(), bits=3, group_size=S), x)
    assert error(module, awq_weight(module, x), x) <= plain * (1 + 1e-5)


def test_compares_what_the_weights_run_through():
    torch.manual_seed(0)
    mlp = GatedMLP(hidden_size=D, intermediate_size=16).double()
    x = data(dtype=torch.float64, gain=6)
    names = ["gate_proj.weight", "up_proj.weight"]
    before = {name: w.clone() for name, w in mlp.state_dict().items()}
    s, losses = search_scales(mlp, names, x, bits=3, group_size=S, steps=5)
    assert all(torch.equal(w, before[name]) for name, w in mlp.state_dict().items())
    for i in range(5):
        scale = torch.tensor(reference_scales(x.flatten(0, 1).numpy(), i / 5))
        other = copy.deepcopy(mlp)
        with torch.no_grad():
            for w in (other.gate_proj.weight, other.up_proj.weight):
                new = reference_round((w * scale).numpy(), 3, S)
                w.copy_(torch.tensor(new) / scale)
            assert_close(losses[i], (other(x) - mlp(x)).square().mean())
            if i == losses.argmin():
                assert_close(s, scale)


# Folding changes nothing before rounding


def config(kv_heads):
    return {
        "hidden_size": D,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 16,
        "vocab_size": 11,
        "num_hidden_layers": 1,
    }


def llama_layer(kv_heads=4, dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    options = {"attention_bias": bias, "mlp_bias": bias}
    layer = LlamaLayer(LlamaConfig(**config(kv_heads), **options)).to(dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    rotation = rope_table(inverse_frequencies(head_dim=6), torch.arange(T))
    return layer, tuple(table.to(dtype) for table in rotation)


def random_scales(size, dtype=torch.float64):
    return torch.logspace(-1, 1, size, dtype=dtype)[torch.randperm(size)]


def fold_all(layer, dtype=torch.float64):
    attn, mlp = layer.self_attn, layer.mlp
    of = [random_scales(size, dtype) for size in (D, D, 16, D)]
    fold_into_norm(layer.input_layernorm, [attn.q_proj, attn.k_proj, attn.v_proj], of[0])
    fold_into_norm(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], of[1])
    fold_into_linear(mlp.up_proj, mlp.down_proj, of[2])
    if attn.v_proj.out_features == D:
        fold_into_linear(attn.v_proj, attn.o_proj, of[3])


@pytest.mark.parametrize("kv_heads, bias", [(4, False), (4, True), (2, False)])
def test_folded_layers_compute_the_same(kv_heads, bias):
    layer, rotation = llama_layer(kv_heads, bias=bias)
    x = torch.randn(B, T, D, dtype=torch.float64)
    before = {name: w.clone() for name, w in layer.state_dict().items()}
    y = layer(x, rotation)
    fold_all(layer)
    assert_close(layer(x, rotation), y, rtol=0, atol=1e-10)
    for name, w in layer.state_dict().items():
        shared = kv_heads < 4 and name == "self_attn.o_proj.weight"
        untouched = shared or (
            name.endswith("bias") and not (name.startswith("mlp.up") or "v_proj" in name)
        )
        assert torch.equal(w, before[name]) == untouched, name


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_transformers_computes_the_same_with_folded_weights(kv_heads):
    layer, _ = llama_layer(kv_heads)
    theirs = LlamaDecoderLayer(TheirConfig(**config(kv_heads), attn_implementation="eager"), 0)
    theirs = theirs.double()
    angles = torch.arange(T)[:, None] * inverse_frequencies(head_dim=6)
    angles = torch.cat([angles, angles], -1)[None]
    rotation = (angles.cos().double(), angles.sin().double())
    x, future = torch.randn(B, T, D).double(), torch.full((1, 1, T, T), -torch.inf).triu(1).double()

    def run():
        theirs.load_state_dict(layer.state_dict())
        with torch.no_grad():
            return theirs(x, attention_mask=future, position_embeddings=rotation)

    before = run()
    fold_all(layer)
    assert_close(run(), before, rtol=0, atol=1e-10)
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(2)
    assert (run() - before).abs().max() > 0.1


def test_folding_says_which_way():
    norm, after = RMSNorm(hidden_size=3), nn.Linear(3, 2, bias=False)
    before, w, s = nn.Linear(5, 3), after.weight.detach().clone(), torch.tensor([1.0, 2, 4])
    first = before.weight.detach().clone(), before.bias.detach().clone()
    fold_into_norm(norm, [after], s)
    assert norm.weight.tolist() == [1, 0.5, 0.25]
    assert_close(after.weight, w * s)
    fold_into_linear(before, after, s)
    assert_close(after.weight, w * s * s)
    assert_close(before.weight, first[0] / s[:, None])
    assert_close(before.bias, first[1] / s)


# Clipping


def reference_clip(w, x, bits, group_size, steps, max_shrink):
    """For each row and group the best of the limits, by the released code's error."""
    out = np.zeros((w.shape[0], w.shape[1] // group_size))
    for n, g in itertools.product(*map(range, out.shape)):
        columns = slice(g * group_size, (g + 1) * group_size)
        part, rows, least = w[n : n + 1, columns], x[:, columns], np.inf
        for i in range(int(max_shrink * steps)):
            limit = abs(part).max() * (1 - i / steps)
            q = reference_round(np.clip(part, -limit, limit), bits, group_size)
            loss = sum((row @ q[0] - row @ part[0]) ** 2 for row in rows)
            if loss < least:
                least, out[n, g] = loss, limit
    return out


def test_a_group_may_be_one_column():
    w, x = linear().weight, data()
    clip = search_clip(w, x, bits=3, group_size=1)
    assert_close(clip, w.abs())
    assert_close(AWQLinear(linear(), bits=3, group_size=1, clip=clip).weight(), w)


@pytest.mark.parametrize("options", [{}, {"steps": 10, "max_shrink": 1.0}, {"steps": 2}])
def test_clips_as_loops_do(options):
    w, x = linear(dtype=torch.float64).weight.detach(), data(dtype=torch.float64)
    found = search_clip(w, x, bits=3, group_size=S, **options)
    steps, shrink = options.get("steps", 20), options.get("max_shrink", 0.5)
    expected = reference_clip(w.numpy(), x.flatten(0, 1).numpy(), 3, S, steps, shrink)
    assert_close(found, torch.tensor(expected))
    most = w.unflatten(1, (-1, S)).abs().amax(-1)
    assert steps == 2 or 0.2 < (found < most * 0.999).float().mean() < 1
    assert steps > 2 or torch.equal(found, most)


def test_a_clip_is_applied_and_never_harms_a_group():
    module, x = linear(), data()
    clip = search_clip(module.weight, x, bits=3, group_size=S)
    cut = AWQLinear(module, bits=3, group_size=S, clip=clip).weight()
    limit = clip.repeat_interleave(S, 1)
    w = module.weight.detach()
    expected = rounded(torch.clamp(w, -limit, limit), bits=3, group_size=S)
    assert torch.equal(cut, expected)
    plain = rounded(w, bits=3, group_size=S)
    for g in range(D // S):
        part = slice(g * S, (g + 1) * S)
        errors = [((x[..., part] @ (q - w)[:, part].T) ** 2).sum((0, 1)) for q in (cut, plain)]
        assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert not torch.equal(cut, plain)


# The layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits, group_size", [(3, 8), (4, 24), (4, None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_layer_equals_torchs_fake_quantization(bits, group_size, dtype, bias):
    module, x = linear(bias=bias, dtype=dtype), data(dtype=dtype)
    layer = AWQLinear(module, bits=bits, group_size=group_size)
    assert layer.packed.shape == (N, D * bits // 8) and layer.packed.dtype == torch.uint8
    parts, size = [], group_size or D
    for part in module.weight.detach().float().split(size, 1):
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        step = (high - low) / (2**bits - 1)
        zero = (-low / step).round().int()
        parts.append(torch.fake_quantize_per_channel_affine(part, step, zero, 0, 0, 2**bits - 1))
    weight = torch.cat(parts, 1).to(dtype)
    assert_close(layer.weight(), weight, rtol=1e-5, atol=1e-6)
    assert_close(layer(x), nn.functional.linear(x, weight, module.bias), rtol=1e-5, atol=1e-5)
    assert (layer(x) - module(x)).abs().max() > 0.01
    assert set(layer.state_dict()) == {"packed", "step", "zero"} | ({"bias"} if bias else set())
    if bias:
        assert layer.bias.data_ptr() != module.bias.data_ptr()


def test_packed_nibbles_come_low_half_first():
    module = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-1.0, 14.0, 0.0, 3.0]]))
    layer = AWQLinear(module, bits=4)
    assert layer.packed.tolist() == [[0 + 15 * 16, 1 + 4 * 16]]
    assert layer.step.tolist() == [[1]] and layer.zero.tolist() == [[1]]


def test_the_layer_in_bfloat16():
    module, x = linear(bias=True, dtype=torch.bfloat16), data(dtype=torch.bfloat16, gain=1)
    layer = AWQLinear(module, bits=4, group_size=S)
    assert layer.step.dtype == torch.bfloat16 and layer(x).dtype == torch.bfloat16
    # Codes are the nearest for the step that is stored.
    w, step = module.weight.float(), layer.step.float().repeat_interleave(S, 1)
    q = from_codes(unpack(layer.packed, bits=4), layer.step.float(), layer.zero)
    inside = (w >= q.amin(1, True)) & (w <= q.amax(1, True))
    assert ((w - q).abs()[inside] <= 0.51 * step[inside]).all()
    full = AWQLinear(linear(bias=True), bits=4, group_size=S)
    assert_close(full.bfloat16()(x), layer(x), rtol=0.1, atol=0.1)


def test_the_layer_and_the_searches_compile(unchecked):
    module, x = linear(bias=True), data()
    layer = AWQLinear(module, bits=4, group_size=S)
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))

    def both(x):
        found = search_scales(module, ["weight"], x, bits=3, group_size=S, steps=3)
        return *found, search_clip(module.weight, x, bits=3, group_size=S)

    assert_close(torch.compile(both, fullgraph=True, backend="eager")(x), both(x))


def test_searches_of_half_precision_are_in_single():
    module, x = linear(dtype=torch.bfloat16), data(dtype=torch.bfloat16)
    s, losses = search_scales(module, ["weight"], x, bits=3, group_size=S)
    assert s.dtype == losses.dtype == torch.float32
    assert losses.argmin() > 0 and losses.min() < losses[0]
    clip = search_clip(module.weight, x, bits=3, group_size=S)
    assert clip.dtype == torch.bfloat16
    assert AWQLinear(module, bits=3, group_size=S, clip=clip)(x).isfinite().all()


def test_a_channel_and_a_group_of_zeros():
    module, x = linear(), data()
    with torch.no_grad():
        module.weight[:, :S] = 0
    x[..., 5], x[..., 20] = 0, 0
    s, losses = search_scales(module, ["weight"], x, bits=3, group_size=S)
    assert s.isfinite().all() and losses.isfinite().all() and (s > 0).all()
    clip = search_clip(module.weight, x, bits=3, group_size=S)
    assert AWQLinear(module, bits=3, group_size=S, clip=clip)(x).isfinite().all()


# A whole layer of Llama


def by_hand(layer, x, rotation, bits, group_size, steps, clip):
    """quantize_layer from its parts, without its loops; as weights in full precision."""
    attn, mlp, seen = layer.self_attn, layer.mlp, record_inputs(layer, x, rotation)
    grid = {"bits": bits, "group_size": group_size}
    options = grid | {"steps": steps}
    qkv = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    gate_up = ["gate_proj.weight", "up_proj.weight"]
    s1 = search_scales(attn, qkv, seen["self_attn.v_proj"], rotation, **options)[0]
    s2 = search_scales(mlp, gate_up, seen["mlp.up_proj"], **options)[0]
    s3 = search_scales(mlp.down_proj, ["weight"], seen["mlp.down_proj"], **options)[0]
    s4 = torch.ones_like(s1)
    if attn.v_proj.weight.shape == attn.o_proj.weight.shape:
        s4 = search_scales(attn.o_proj, ["weight"], seen["self_attn.o_proj"], **options)[0]
    scaled_v = attn.v_proj.weight.shape == attn.o_proj.weight.shape
    rows = {"self_attn.v_proj": s4 if scaled_v else None, "mlp.up_proj": s3}
    columns = {"self_attn.q_proj": s1, "self_attn.k_proj": s1, "self_attn.v_proj": s1}
    columns |= {"self_attn.o_proj": s4}
    columns |= {"mlp.gate_proj": s2, "mlp.up_proj": s2, "mlp.down_proj": s3}
    new = copy.deepcopy(layer)
    with torch.no_grad():
        for name, s in columns.items():
            w = layer.get_submodule(name).weight.detach() * s
            w = w if rows.get(name) is None else w / rows[name][:, None]
            if clip and name[-6:] not in ("q_proj", "k_proj"):
                limit = search_clip(w, seen[name] / s, **options)
                limit = limit.repeat_interleave(group_size, 1)
                w = torch.clamp(w, -limit, limit)
            w = rounded(w, **grid) / s
            w = w if rows.get(name) is None else w * rows[name][:, None]
            new.get_submodule(name).weight.copy_(w)
    return new


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_layer_is_quantized_as_from_its_parts(kv_heads, clip):
    layer, rotation = llama_layer(kv_heads)
    x, held_out = data(dtype=torch.float64), data(1, dtype=torch.float64)
    expected = by_hand(layer, x, rotation, 3, S, 6, clip)(held_out, rotation)
    full = layer(held_out, rotation)
    options = {"bits": 3, "group_size": S, "steps": 6} | ({} if clip else {"clip": False})
    scales = quantize_layer(layer, x, rotation, **options)
    assert_close(layer(held_out, rotation), expected)
    assert (full - expected).abs().max() > 0.1
    names = {"self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert set(scales) == names | ({"self_attn.o_proj"} if kv_heads == 4 else set())
    assert sum(s.std() > 0 for s in scales.values()) >= kv_heads
    kinds = [type(module) for module in layer.modules()]
    assert kinds.count(AWQLinear) == 7 and nn.Linear not in kinds
    assert not any(module._forward_pre_hooks for module in layer.modules())


def test_a_layer_takes_the_defaults_of_its_parts():
    results = []
    for options in ({}, {"steps": 20, "clip": True, "group_size": None}):
        layer, rotation = llama_layer()
        quantize_layer(layer, data(dtype=torch.float64), rotation, bits=4, **options)
        results.append(layer(data(1, dtype=torch.float64), rotation))
    assert torch.equal(*results)
    assert layer.mlp.up_proj.step.shape == (16, 1)


def test_recording_leaves_no_hooks_behind_an_error(unchecked):
    layer, rotation = llama_layer()
    with pytest.raises(ValueError, match="hidden_size=24"):
        record_inputs(layer, torch.randn(B, T, 5), rotation)
    assert not any(module._forward_pre_hooks for module in layer.modules())
    seen = record_inputs(layer, data(dtype=torch.float64), rotation)
    assert len(seen) == 7 and seen["mlp.down_proj"].shape == (B, T, 16)
    assert not any(v.requires_grad for v in seen.values())


# What is refused


@pytest.mark.parametrize(
    "names, x, steps, said",
    [
        ([], (B, D), 20, "steps=20, 0 weights"),
        (["weight"], (B, D), 0, "steps=0, 1 weights"),
        (["weight"], (B, 5), 20, r"weight of \(10, 24\) for x of \(2, 5\)"),
        (["bias"], (B, N), 20, r"bias of \(10,\) for x of \(2, 10\)"),
    ],
)
def test_refuses_to_search_what_does_not_fit(unchecked, names, x, steps, said):
    with pytest.raises(ValueError, match=said):
        search_scales(linear(bias=True), names, torch.ones(x), bits=3, steps=steps)


@pytest.mark.parametrize(
    "options, x, said",
    [
        ({"group_size": 7}, (B, D), r"24 columns, x of \(2, 24\), group_size=7"),
        ({"group_size": 0}, (B, D), r"24 columns, x of \(2, 24\), group_size=0"),
        ({}, (B, 6), r"24 columns, x of \(2, 6\), group_size=24"),
        ({"steps": 1}, (B, D), "steps=1, max_shrink=0.5"),
        ({"max_shrink": 1.5}, (B, D), "steps=20, max_shrink=1.5"),
        ({"max_shrink": -1.0}, (B, D), "steps=20, max_shrink=-1.0"),
    ],
)
def test_refuses_to_clip_what_does_not_fit(unchecked, options, x, said):
    with pytest.raises(ValueError, match=said):
        search_clip(linear().weight, torch.ones(x), bits=3, **options)


@pytest.mark.parametrize("shape", [(1,), (N,), (D, 1), (1, D)])
def test_refuses_to_fold_scales_of_another_size(unchecked, shape):
    norm, before, after = RMSNorm(hidden_size=D), nn.Linear(5, D), linear()
    kept = [p.clone() for m in (norm, before, after) for p in m.parameters()]
    for fold in (
        lambda: fold_into_norm(norm, [after], torch.ones(shape) * 2),
        lambda: fold_into_linear(before, after, torch.ones(shape) * 2),
    ):
        with pytest.raises(ValueError, match=r"scales of \(.*of \[24, 24\] channels"):
            fold()
    now = [p for m in (norm, before, after) for p in m.parameters()]
    assert all(map(torch.equal, now, kept))


def test_refuses_to_fold_between_layers_that_do_not_meet(unchecked):
    with pytest.raises(ValueError, match=r"scales of \(5,\) between layers of \[5, 24\]"):
        fold_into_linear(nn.Linear(3, 5), linear(), torch.ones(5))
    with pytest.raises(ValueError, match="no fold into UnitOffsetRMSNorm, only into RMSNorm"):
        fold_into_norm(UnitOffsetRMSNorm(hidden_size=D), [linear()], torch.ones(D))


def test_refuses_a_layer_that_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="24 columns aren't groups of group_size=7"):
        AWQLinear(linear(), bits=4, group_size=7)
    with pytest.raises(ValueError, match="bits=9"):
        AWQLinear(linear(), bits=9)
    with pytest.raises(ValueError, match="5 codes of bits=3 aren't whole bytes"):
        AWQLinear(nn.Linear(5, 2), bits=3)
    for shape in ((N - 1, 3), (N, 5)):
        with pytest.raises(ValueError, match=rf"clip of \({shape[0]}, {shape[1]}\) for \(10, 24\)"):
            AWQLinear(linear(), bits=4, group_size=S, clip=torch.ones(shape))
    layer, rotation = llama_layer()
    quantize_layer(layer, data(dtype=torch.float64), rotation, bits=4, steps=2)
    with pytest.raises(ValueError, match="0 linear layers, not 7"):
        quantize_layer(layer, data(dtype=torch.float64), rotation, bits=4)
