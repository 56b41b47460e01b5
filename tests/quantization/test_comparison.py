"""The ways against the packages that store so, and the measures against transformers and torch.

Sizes differ (n, d and tokens), rows are whole blocks of 32 or 256 where a format wants it.
"""

import copy
import math

import bitsandbytes.functional as bnb
import gguf
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf.quants import dequantize as gguf_dequantize
from torch import nn
from torch.testing import assert_close

from snippets.common.grid import from_codes, unpack
from snippets.models.llama import Llama, LlamaConfig
from snippets.quantization.awq import AWQLinear, quantize_layer
from snippets.quantization.comparison import (
    Stored,
    bits_a_weight,
    dense,
    divergence,
    on_grid,
    perplexity_ratio,
    put,
    quantize_layers,
    quantize_layers_by_awq,
    run_from,
    run_to,
    to_blocks,
    to_float16,
    to_gptq,
    to_int8,
    to_llm_int8,
    to_nearest,
    to_nf4,
    token_losses,
)
from snippets.quantization.gptq import gptq, hessian, rtn
from snippets.quantization.int8 import Int8Linear

N, D = 24, 96
LINEARS = 7  # of a Llama layer


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def linear(n=N, d=D, bias=True) -> nn.Linear:
    made = nn.Linear(d, n, bias=bias)
    with torch.no_grad():
        made.weight.mul_(torch.rand(n, 1) + 0.2)
    return made


def inputs(rows=200, d=D) -> torch.Tensor:
    """Correlated features, some of them loud."""
    mix = torch.randn(8, d, generator=torch.Generator().manual_seed(7))
    x = torch.randn(rows, 8) @ mix + 0.3 * torch.randn(rows, d)
    x[:, ::17] *= 8
    return x


def model(layers=3, **sizes) -> Llama:
    config = {
        "vocab_size": 31,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    made = Llama(LlamaConfig(**(config | sizes))).eval().requires_grad_(False)
    for p in made.parameters():
        p.normal_(std=0.3) if p.ndim == 2 else p.uniform_(0.5, 1.5)
    return made


def in_transformers(ours: Llama) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=len(ours.model.layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs


def proj(layers) -> dict[str, torch.Tensor]:
    return {n: p.clone() for n, p in layers.named_parameters() if "proj" in n}


# Ways

GROUPED = {"bits": 4, "group_size": 32}
WAYS = {
    "float16": lambda part, x: to_float16(part, x),
    "int8, tensor": lambda part, x: to_int8(part, x, per_row=False),
    "int8, rows": lambda part, x: to_int8(part, x),
    "nearest": lambda part, x: to_nearest(part, x, **GROUPED),
    "gptq": lambda part, x: to_gptq(part, x, **GROUPED, act_order=True),
    "nf4": lambda part, x: to_nf4(part, x),
    "Q8_0": lambda part, x: to_blocks(part, x, kind="Q8_0"),
    "Q4_0": lambda part, x: to_blocks(part, x, kind="Q4_0"),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_way_gives_a_frozen_layer_near_the_old_one(name, bias):
    part, x = linear(bias=bias), inputs()
    before = copy.deepcopy(part.state_dict())
    tensors, made = WAYS[name](part, x)
    assert type(made) is nn.Linear and not any(p.requires_grad for p in made.parameters())
    assert (made.in_features, made.out_features) == (D, N)
    values = made.weight
    off = ((values - part.weight).norm() / part.weight.norm()).item()
    assert 0 < off < (0.3 if name == "gptq" else 0.12)
    assert_close(made(x), F.linear(x, values, part.bias))
    assert not any(tensor.requires_grad for tensor in tensors)
    for key, tensor in part.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", WAYS)
def test_a_way_keeps_the_dtype(name):
    part, x = linear().bfloat16(), inputs().bfloat16()
    made = WAYS[name](part, x).layer
    assert made.weight.dtype == made(x).dtype == torch.bfloat16
    exact = WAYS[name](linear_of(part.weight.float()), x.float()).layer
    assert_close(made.weight.float(), exact.weight, rtol=0.01, atol=0.01)


def linear_of(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def test_float16_is_what_checkpoints_hold():
    part = linear()
    (half,), made = to_float16(part)
    assert half.dtype == torch.float16 and half.nbytes == 2 * N * D
    assert torch.equal(made.weight, part.weight.half().float())


def test_int8_rows_are_those_of_bitsandbytes():
    part = linear()
    (q, absmax), made = to_int8(part)
    theirs, scale, _ = bnb.int8_vectorwise_quant(part.weight.detach().half())
    assert (q.int() - theirs.int()).abs().max() <= 1  # theirs rounds the weights to half first
    assert_close(absmax[:, 0], scale, rtol=1e-3, atol=1e-5)
    assert_close(made.weight, q * absmax / 127)
    assert q.nbytes + absmax.nbytes == N * D + 4 * N


def test_int8_with_one_scale():
    part = linear()
    (q, absmax), made = to_int8(part, per_row=False)
    most = part.weight.abs().max()
    assert absmax.numel() == 1 and absmax.item() == most
    assert torch.equal(q, (part.weight * (127 / most)).round().to(torch.int8))
    assert_close(made.weight, q * most / 127)


def test_llm_int8_is_its_layer_with_weights_and_scales():
    part, x = linear(), inputs()
    (q, absmax), made = to_llm_int8(part, x)
    assert isinstance(made, Int8Linear)
    assert_close(made(x), Int8Linear.from_linear(part)(x))
    assert q.dtype == torch.int8 and q.shape == (N, D)
    assert torch.equal(absmax, part.weight.abs().amax(1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rounding_is_torchs_with_a_step_in_float16(bits, group_size):
    part, size = linear(), group_size or D
    (packed, step, zero), made = to_nearest(part, bits=bits, group_size=group_size)
    assert step.dtype == torch.float16 and zero.dtype == packed.dtype == torch.uint8
    assert packed.shape == (N, D * bits // 8) and step.shape == zero.shape == (N, D // size)
    w = part.weight.detach().unflatten(1, (-1, size)).flatten(0, 1)
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    exact = (high - low) / (2**bits - 1)
    zeros = (-low / exact).round()
    theirs = torch.fake_quantize_per_channel_affine(w, exact, zeros.int(), 0, 0, 2**bits - 1)
    theirs = theirs / exact[:, None] * exact.half().float()[:, None]
    assert_close(made.weight, theirs.view(N, D), rtol=1e-5, atol=1e-6)
    rebuilt = from_codes(unpack(packed, bits=bits), step.float(), zero)
    assert torch.equal(made.weight, rebuilt)
    assert (made.weight - rtn(part.weight, bits=bits, group_size=group_size).values()).any()


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_its_modules_and_needs_no_list_of_groups(act_order):
    part, x = linear(), inputs()
    options = {"bits": 3, "group_size": 16, "act_order": act_order}
    expected = gptq(part.weight, hessian(x), **options, static_groups=act_order)
    (packed, step, zero), made = to_gptq(part, x, **options)
    assert torch.equal(unpack(packed, bits=3), expected.codes)
    assert torch.equal(step, expected.step.half()) and torch.equal(zero, expected.zero)
    assert expected.groups.tolist() == [j // 16 for j in range(D)]
    assert torch.equal(made.weight, from_codes(expected.codes, step.float(), zero))
    other = to_gptq(part, x, **(options | {"act_order": not act_order})).layer
    assert (other.weight - made.weight).abs().max() > 1e-3
    assert torch.equal(
        to_gptq(part, x, bits=3, group_size=16).layer.weight,
        made.weight if not act_order else other.weight,
    )
    whole = to_gptq(part, x, bits=3)
    assert whole.tensors[1].shape == (N, 1)


def test_gptq_beats_rounding_on_new_inputs_and_ties_without_correlation():
    for _ in range(5):
        part, x, new = linear(), inputs(), inputs()
        options = {"bits": 3, "group_size": 16}
        ours, base = to_gptq(part, x, **options).layer, to_nearest(part, **options).layer
        errors = [(new @ (made.weight - part.weight).T).norm() for made in (ours, base)]
        assert errors[0] < 0.8 * errors[1]
        alone = to_gptq(part, torch.eye(D), **options).layer
        assert torch.equal(alone.weight, base.weight)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [64, 128])
def test_nf4_is_bitsandbytes_in_values_and_bytes(double, block_size):
    part = linear(N, 128)
    made = to_nf4(part, block_size=block_size, double_quantization=double)
    packed, state = bnb.quantize_4bit(
        part.weight.detach(),
        blocksize=block_size,
        compress_statistics=double,
        quant_type="nf4",
    )
    assert torch.equal(made.layer.weight, bnb.dequantize_4bit(packed, state))
    held = [packed, state.absmax]
    held += [state.state2.absmax, state.offset] if double else []
    assert sum(t.nbytes for t in made.tensors) == sum(t.nbytes for t in held)
    assert torch.equal(made.tensors[0].flatten(), packed.flatten())


def test_nf4_has_blocks_of_64_and_double_quantization_unless_told():
    part = linear(N, 128)
    expected = to_nf4(part, block_size=64, double_quantization=True).tensors
    for ours, other in zip(to_nf4(part).tensors, expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_blocks_are_those_of_gguf(kind):
    part = linear(N, 512)
    (data,), made = to_blocks(part, kind=kind)
    number = gguf.GGMLQuantizationType[kind]
    assert torch.equal(made.weight, torch.tensor(gguf_dequantize(data.numpy(), number)))
    columns, nbytes = gguf.constants.GGML_QUANT_SIZES[number]
    assert data.nbytes == N * 512 // columns * nbytes


def test_blocks_of_the_fallback_where_rows_do_not_divide():
    narrow, wide = linear(), linear(N, 512)
    expected = to_blocks(narrow, kind="Q4_0")
    found = to_blocks(narrow, kind="Q4_K", fallback="Q4_0")
    assert torch.equal(found.tensors[0], expected.tensors[0])
    assert torch.equal(found.layer.weight, expected.layer.weight)
    found = to_blocks(wide, kind="Q4_K", fallback="Q4_0")
    assert torch.equal(found.tensors[0], to_blocks(wide, kind="Q4_K").tensors[0])
    with pytest.raises(ValueError, match=r"\(24, 96\) don't divide into blocks of 256"):
        to_blocks(narrow, kind="Q4_K")


def test_a_dense_layer_has_no_bias_unless_it_gets_one():
    values = torch.randn(N, D)
    plain, biased = dense(values, None, torch.float32), dense(values, torch.ones(N), torch.float64)
    assert plain.bias is None and torch.equal(plain.weight, values)
    assert biased.weight.dtype == torch.float64 and torch.equal(biased.bias, torch.ones(N))
    kept = nn.Parameter(torch.ones(N))
    assert not dense(values, kept, torch.float32).bias.requires_grad and kept.requires_grad


def test_on_a_grid_of_half_steps():
    q = rtn(torch.randn(N, D), bits=3, group_size=8)
    made = on_grid(q.codes, q.step, q.zero, None, torch.float64, bits=3)
    assert isinstance(made, Stored) and made.layer.weight.dtype == torch.float64
    assert_close(made.layer.weight.float(), q._replace(step=q.step.half().float()).values())


# Layers


def test_all_linear_layers_of_all_layers_are_replaced():
    ours = model()
    layers = copy.deepcopy(ours.model.layers)
    before = proj(layers)
    kept = quantize_layers(layers, lambda part, x: to_nearest(part, x, bits=3, group_size=16))
    assert len(kept) == 3 * LINEARS * 3
    for name, w in proj(layers).items():
        assert 0 < (w - before[name]).norm() < 0.3 * before[name].norm()
    bits = bits_a_weight(kept, sum(w.numel() for w in before.values()))
    assert bits == 3 + 24 / 16
    assert all(torch.equal(w, before[n]) for n, w in proj(ours.model.layers).items())


def test_each_layer_is_calibrated_on_the_output_of_the_quantized_ones():
    ours, ids = model(), torch.randint(31, (2, 7))
    x, rotation = run_to(ours, ids, 0)
    layers, got = copy.deepcopy(ours.model.layers), []

    def way(part, x):
        assert not torch.is_grad_enabled()
        got.append(x)
        return to_nearest(part, x, bits=2)

    quantize_layers(layers, way, x, rotation)
    assert len(got) == 3 * LINEARS and got[0] is got[1] is got[2]
    for number, layer in enumerate(ours.model.layers):
        assert_close(got[LINEARS * number], layer.input_layernorm(x))
        attention = layer.self_attn(layer.input_layernorm(x), rotation)
        normed = layer.post_attention_layernorm(x + attention)
        assert_close(got[LINEARS * number + 4], normed)
        x = layers[number](x, rotation)
    assert (x - run_to(ours, ids, 3)[0]).norm() > 0.1


def test_nothing_is_run_for_ways_that_want_no_inputs():
    layers, got = model().model.layers, []

    def way(part, x):
        got.append(x)
        return to_int8(part, x)

    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    quantize_layers(layers, way)
    assert got == [None] * 3 * LINEARS


def test_gptq_of_layers_is_that_of_each_linear_layer():
    ours, ids = model(1), torch.randint(31, (4, 50))
    given = run_to(ours, ids, 0)
    layers = copy.deepcopy(ours.model.layers)
    options = {"bits": 3, "group_size": 16}
    quantize_layers(layers, lambda part, x: to_gptq(part, x, **options), *given)
    old, new = ours.model.layers[0], layers[0]
    x = old.input_layernorm(given[0])
    expected = to_gptq(old.self_attn.v_proj, x, **options).layer.weight
    assert torch.equal(new.self_attn.v_proj.weight, expected)


def test_awq_of_layers_is_its_modules_with_steps_in_float16():
    ours, ids = model(2), torch.randint(31, (4, 20))
    given = run_to(ours, ids, 0)
    options = {"bits": 3, "group_size": 16, "steps": 6, "clip": False}
    for more in ({}, {"clip": True}, {"steps": 3}, {"bits": 4}, {"group_size": 8}):
        layers, theirs = (copy.deepcopy(ours.model.layers) for _ in range(2))
        kept = quantize_layers_by_awq(layers, *given, **(options | more))
        x = given[0]
        for layer, own in zip(theirs, layers, strict=True):
            quantize_layer(layer, x, given[1], **(options | more))
            for name, part in layer.named_modules():
                if isinstance(part, AWQLinear):
                    found, step = own.get_submodule(name), part.step.half()
                    codes = unpack(part.packed, bits=part.bits)
                    expected = from_codes(codes, step.float(), part.zero)
                    assert type(found) is nn.Linear
                    assert_close(found.weight, expected, rtol=1e-3, atol=1e-4)
                    tensors, kept = kept[:3], kept[3:]
                    assert [t.shape for t in tensors] == [
                        part.packed.shape,
                        step.shape,
                        part.zero.shape,
                    ]
            assert torch.equal(own.input_layernorm.weight, layer.input_layernorm.weight)
            x = own(x, given[1])
            break  # later layers see inputs that half steps have changed
        assert len(kept) == LINEARS * 3


def test_awqs_later_layers_see_what_the_quantized_ones_give():
    ours, ids = model(2), torch.randint(31, (4, 20))
    given = run_to(ours, ids, 0)
    options = {"bits": 2, "group_size": 16, "steps": 4}
    layers, enabled = copy.deepcopy(ours.model.layers), []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    quantize_layers_by_awq(layers, *given, **options)
    assert len(enabled) == 4 and not any(enabled)
    alone = copy.deepcopy(ours.model.layers)
    x = layers[0](*given)
    quantize_layers_by_awq(alone[1:], x, given[1], **options)
    for name, w in alone[1].state_dict().items():
        assert torch.equal(layers[1].state_dict()[name], w)
    exact = copy.deepcopy(ours.model.layers)
    quantize_layers_by_awq(exact[1:], ours.model.layers[0](*given), given[1], **options)
    states = exact[1].state_dict(), layers[1].state_dict()
    assert any((states[0][name] != states[1][name]).any() for name in states[0])


def test_awq_has_twenty_steps_and_clips_unless_told():
    ours, ids = model(1), torch.randint(31, (4, 20))
    given = run_to(ours, ids, 0)
    found = []
    for options in ({}, {"steps": 20, "clip": True}):
        layers = copy.deepcopy(ours.model.layers)
        quantize_layers_by_awq(layers, *given, bits=3, **options)
        found.append(layers.state_dict())
    for name, w in found[0].items():
        assert torch.equal(w, found[1][name])


def test_a_part_is_put_under_a_dotted_name_and_at_the_top():
    layer, new = model(1).model.layers[0], nn.Linear(3, 3)
    put(layer, "mlp.up_proj", new)
    put(layer, "mlp", layer.mlp)
    assert layer.mlp.up_proj is new
    put(layer, "self_attn", new)
    assert layer.self_attn is new


def test_bits_count_all_tensors_by_their_bytes():
    kept = [torch.zeros(10, dtype=torch.uint8), torch.zeros(3, dtype=torch.float16)]
    assert bits_a_weight(kept, 20) == 8 * 16 / 20


def test_refuses_layers_with_nothing_to_quantize(unchecked):
    with pytest.raises(ValueError, match="nothing to quantize in 0 layers"):
        quantize_layers([], to_int8)
    layers = model(2).model.layers
    quantize_layers(layers, to_llm_int8)
    with pytest.raises(ValueError, match="nothing to quantize in 2 layers"):
        quantize_layers(layers, to_llm_int8)


# Measures


def test_losses_are_those_of_transformers():
    ours, ids = model(), torch.randint(31, (3, 11))
    theirs = in_transformers(ours)
    losses = token_losses(ours(ids).log_softmax(-1), ids)
    assert losses.shape == (3, 10)
    with torch.no_grad():
        for row, piece in zip(losses, ids, strict=True):
            assert_close(row.mean(), theirs(piece[None], labels=piece[None]).loss)
    expected = F.cross_entropy(ours(ids)[:, :-1].mT, ids[:, 1:], reduction="none")
    assert_close(losses, expected)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_two_parts_of_the_model_are_the_model(first):
    ours, ids = model(), torch.randint(31, (2, 9))
    x, rotation = run_to(ours, ids, first)
    with torch.no_grad():
        theirs = in_transformers(ours)(ids, output_hidden_states=True)
    if first < 3:  # the last one is behind the norm there
        assert_close(x, theirs.hidden_states[first], rtol=1e-4, atol=1e-4)
    logits = run_from(ours, ours.model.layers[first:], x, rotation)
    assert_close(logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert_close(logits, ours(ids))


def test_nothing_is_kept_for_gradients():
    ours, ids = model().requires_grad_(True), torch.randint(31, (2, 9))
    x, rotation = run_to(ours, ids, 1)
    assert not x.requires_grad
    layers = copy.deepcopy(ours.model.layers[1:])
    assert not run_from(ours, layers, x, rotation).requires_grad
    for kept in (
        quantize_layers(layers, lambda part, x: to_nearest(part, x, bits=4), x, rotation),
        quantize_layers_by_awq(layers, x, rotation, bits=4, steps=2),
    ):
        assert not any(tensor.requires_grad for tensor in kept)
    projections = [p for n, p in layers.named_parameters() if "proj" in n]
    assert len(projections) == 2 * LINEARS and not any(p.requires_grad for p in projections)


def test_the_ratio_is_that_of_two_perplexities():
    old, new = torch.rand(5, 40) * 3, torch.rand(5, 40) * 3
    ratio, error = perplexity_ratio(new, old)
    assert math.isclose(ratio, (new.mean().exp() / old.mean().exp()).item(), rel_tol=1e-5)
    change = (new - old).flatten().tolist()
    mean = sum(change) / 200
    variance = sum((c - mean) ** 2 for c in change) / 199
    assert math.isclose(error, ratio * math.sqrt(variance / 200), rel_tol=1e-4)
    assert perplexity_ratio(old, old) == (1, 0)
    assert perplexity_ratio(old + math.log(2), old)[0] == pytest.approx(2, rel=1e-6)
    assert isinstance(ratio, float) and isinstance(error, float)


def test_the_error_of_the_ratio_is_its_spread():
    old = torch.rand(400) * 3
    ratios, errors = zip(
        *(perplexity_ratio(old + 0.3 * torch.randn(400), old) for _ in range(800)), strict=True
    )
    spread = torch.tensor(ratios).std().item()
    assert sum(errors) / 800 == pytest.approx(spread, rel=0.1)


def test_refuses_losses_of_other_tokens(unchecked):
    with pytest.raises(ValueError, match=r"losses of \(2, 3\) against \(3, 2\)"):
        perplexity_ratio(torch.rand(2, 3), torch.rand(3, 2))
    with pytest.raises(ValueError, match=r"losses of \(1,\) against \(1,\)"):
        perplexity_ratio(torch.rand(1), torch.rand(1))
    assert perplexity_ratio(torch.ones(2), torch.zeros(2))[0] == pytest.approx(math.e)


def test_the_divergence_is_torchs():
    q, p = torch.randn(2, 3, 5, 31).log_softmax(-1)
    pairs = [torch.distributions.Categorical(logits=y) for y in (p, q)]
    assert_close(divergence(q, p), torch.distributions.kl_divergence(*pairs))
    assert (divergence(q, p) - divergence(p, q)).abs().max() > 0.1
    assert divergence(q, p).shape == (3, 5) and divergence(p, p).abs().max() < 1e-6


def test_the_divergence_is_what_the_loss_gains_on_text_of_the_reference():
    q, p = torch.randn(2, 1, 1, 9).log_softmax(-1)
    tokens = torch.multinomial(p[0, 0].exp(), 40000, replacement=True)
    gained = (p[0, 0, tokens] - q[0, 0, tokens]).mean()
    assert divergence(q, p).item() == pytest.approx(gained.item(), abs=0.03)


def test_quantized_layers_compile_whole(unchecked):
    ours, ids = model(2), torch.randint(31, (2, 7))
    quantize_layers(ours.model.layers, to_nf4)
    torch.compiler.reset()
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(ids), ours(ids))


def test_quantized_layers_in_bfloat16():
    ours, ids = model(2).bfloat16(), torch.randint(31, (2, 7))
    given = run_to(ours, ids, 0)
    for way in (to_llm_int8, to_nf4, lambda part, x: to_gptq(part, x, bits=8)):
        layers = copy.deepcopy(ours.model.layers)
        quantize_layers(layers, way, *given)
        y = run_from(ours, layers, *given)
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
        assert divergence(y.float().log_softmax(-1), ours(ids).float().log_softmax(-1)).mean() < 0.5
