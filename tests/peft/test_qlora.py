"""QLoRA: to the bit with bitsandbytes on a CPU, one training step with peft on its 4-bit layer."""

import copy
import math
import re
from fractions import Fraction
from functools import partial
from statistics import NormalDist

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapt
from snippets.common.memory import peak_bytes
from snippets.peft import qlora
from snippets.peft.lora import LoRA
from snippets.peft.qlora import (
    NF4Linear,
    as_floats,
    dequantize_4bit,
    dequantize_scales,
    dynamic_map,
    nearest,
    normal_float,
    quantize_4bit,
    quantize_linears,
    quantize_scales,
)

O, I = 64, 192  # noqa: E741  # whole blocks in a row
INT4 = torch.cat((torch.arange(-7, 0), torch.arange(9))) / 8


def matrix(*shape: int) -> torch.Tensor:
    """Rows of many sizes, one of zeros."""
    weight = torch.randn(*shape) * torch.linspace(0.2, 3, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )
    if len(shape) > 1:
        weight[1] = 0
    return weight


def theirs_4bit(linear: nn.Linear, double: bool = True) -> Linear4bit:
    """bitsandbytes' layer of the same weights, quantized, in training mode.

    In eval mode it repacks its weights on some CPUs, and then computes in bfloat16.
    """
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compress_statistics=double,
        quant_type="nf4",
    )
    layer.weight = Params4bit(
        linear.weight.detach().clone(),
        requires_grad=False,
        compress_statistics=double,
        quant_type="nf4",
    )
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer.to("cpu").train()


# The tables


def test_the_codebook_is_bitsandbytes_to_the_bit():
    assert torch.equal(normal_float(), bnb.get_4bit_type("nf4", device="cpu"))


def test_the_codebook_is_the_formula_of_normal_quantiles():
    quantile = NormalDist().inv_cdf
    offset = 1 - Fraction(1, 2) * (Fraction(1, 30) + Fraction(1, 32))
    assert abs(float(offset) - qlora.OFFSET) < 5e-8

    def step(k, count):
        return quantile(float(offset) - k * (float(offset) - 0.5) / count)

    values = [-step(k, 7) for k in range(7)] + [0.0] + [step(k, 8) for k in reversed(range(8))]
    expected = torch.tensor([value / values[-1] for value in values])
    assert_close(normal_float(), expected, rtol=0, atol=1e-6)


def test_the_codebook_is_asymmetric_with_an_exact_zero_and_ends():
    table = normal_float()
    assert table.dtype == torch.float32 and len(table.unique()) == 16
    assert table[0] == -1 and table[7] == 0 and table[15] == 1
    assert (table < 0).sum() == 7 and (table > 0).sum() == 8
    assert not torch.isin(-table[1:7], table).any()


def test_the_8_bit_table_is_bitsandbytes_to_the_bit():
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


def test_nearest_is_the_nearest_and_halfway_the_lower():
    table = normal_float()
    x = torch.rand(1000) * 2.4 - 1.2
    assert torch.equal(nearest(x, table), (x[:, None] - table).abs().argmin(1))
    assert nearest((table[1:] + table[:-1]) / 2, table).tolist() == list(range(15))


# Packing and scales, to the bit


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(
    "shape", [(300, 128), (48, 192), (48, 160), (3, 130), (7, 129), (100,), (5, 7), (3,)]
)
def test_bytes_and_scales_are_bitsandbytes(shape, block_size):
    weight = matrix(*shape)
    theirs, state = bnb.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
    )
    packed, absmax = quantize_4bit(weight, block_size=block_size)
    assert torch.equal(packed, theirs[:, 0])
    codes, nested, offset = quantize_scales(absmax)
    assert torch.equal(codes, state.absmax)
    assert torch.equal(nested, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    assert torch.equal(dynamic_map(), state.state2.code)
    scales = dequantize_scales(codes, nested, offset)
    dense = dequantize_4bit(packed, scales, shape=shape, block_size=block_size)
    assert dense.shape == shape
    # Its AVX-512 kernel takes other scales where a row isn't a multiple of the block.
    if len(shape) > 1 and shape[1] % block_size == 0:
        assert torch.equal(dense, bnb.dequantize_4bit(theirs, state))


def test_scales_without_double_quantization_are_bitsandbytes():
    weight = matrix(O, I)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = quantize_4bit(weight)
    assert torch.equal(absmax, state.absmax) and absmax.dtype == torch.float32
    assert torch.equal(
        dequantize_4bit(packed, absmax, shape=(O, I)), bnb.dequantize_4bit(theirs, state)
    )


def test_many_scales_are_bitsandbytes_to_the_bit():
    """More than a thousand blocks of scales: every point of the grid gets its turn."""
    absmax = torch.rand(300_001) * 3
    offset = absmax.mean()
    theirs, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    codes, nested, mean = quantize_scales(absmax)
    assert torch.equal(codes, theirs) and torch.equal(nested, state.absmax)
    assert torch.equal(mean, offset) and mean.shape == ()
    # The true nearest is an entry further here and there.
    centred = F_pad(absmax - offset)
    exact = nearest(centred / nested[:, None], dynamic_map()).flatten()[: len(codes)]
    away = (exact - codes.long()).abs()
    assert 0 < (away > 0).float().mean() < 0.005


def F_pad(x):
    return nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)


def test_the_first_weight_is_in_the_high_nibble_and_rows_follow_each_other():
    weight = torch.tensor([[1.0, -1.0, 0.0], [0.5626, -0.0911, 0.0]])
    packed, absmax = quantize_4bit(weight)
    assert packed.tolist() == [0xF0, 0x7D, 0x67] and absmax.tolist() == [1]
    odd, _ = quantize_4bit(weight.flatten()[:5])
    assert odd.tolist() == [0xF0, 0x7D, 0x67]  # filled up with a zero


def test_brute_force_each_weight_is_its_nearest_entry():
    weight = matrix(3, 50)
    packed, absmax = quantize_4bit(weight, block_size=32)
    dense = dequantize_4bit(packed, absmax, shape=(3, 50), block_size=32).flatten()
    table = normal_float().tolist()
    for n, value in enumerate(weight.flatten().tolist()):
        block = weight.flatten()[n // 32 * 32 : n // 32 * 32 + 32].abs().max().item()
        best = min((abs(entry * block - value) for entry in table), default=0)
        assert abs(abs(dense[n].item() - value) - best) < 1e-6


def test_zeros_stay_zeros():
    weight = torch.zeros(4, 64)
    packed, absmax = quantize_4bit(weight)
    assert not dequantize_4bit(packed, absmax, shape=(4, 64)).any()
    codes, nested, offset = quantize_scales(absmax)
    assert not dequantize_scales(codes, nested, offset).any()
    # Scales without spread come back as they were.
    same = torch.full((300,), 0.25)
    assert_close(dequantize_scales(*quantize_scales(same)), same)
    theirs, _ = bnb.quantize_blockwise(same - same.mean(), blocksize=256)
    assert torch.equal(quantize_scales(same)[0], theirs)


def test_half_precision_weights_are_quantized_in_float32():
    weight = matrix(O, I).bfloat16()
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed, absmax = quantize_4bit(weight)
    assert torch.equal(packed, theirs[:, 0]) and torch.equal(absmax, state.absmax)


def test_nf4_is_nearer_to_normal_weights_than_evenly_spaced_values():
    weight = torch.randn(256, 256)

    def error(codebook, block_size=64):
        state = quantize_4bit(weight, codebook=codebook, block_size=block_size)
        again = dequantize_4bit(*state, shape=(256, 256), codebook=codebook, block_size=block_size)
        return (again - weight).square().mean()

    assert error(normal_float()) < 0.9 * error(INT4)
    assert error(None) == error(normal_float()) and error(None, 16) < error(None)


# The layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_forward_and_gradient_are_linear4bits(double, bias):
    linear = nn.Linear(I, O, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(matrix(O, I))
    ours, theirs = NF4Linear(linear, double_quantization=double), theirs_4bit(linear, double)
    assert torch.equal(ours.weight, theirs.weight.flatten())
    x = torch.randn(2, 5, I, requires_grad=True)
    y, expected = ours(x), theirs(x)
    assert_close(y, expected)
    assert (y - linear(x)).abs().max() > 0.01
    upstream = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream))
    assert_close(y, x @ ours.dequantize().T + (0 if linear.bias is None else linear.bias))


def test_double_quantization_is_on_unless_switched_off():
    linear = nn.Linear(I, O)
    on, off = NF4Linear(linear), NF4Linear(linear, double_quantization=False)
    assert on.absmax.dtype == torch.uint8 and off.absmax.dtype == torch.int32
    assert (on.dequantize() - off.dequantize()).abs().max() > 0
    blocks = I * O // 64
    assert off.nbytes == I * O // 2 + 4 * blocks + 64 + 4 * O
    assert on.nbytes == I * O // 2 + blocks + 4 + 4 + 64 + 1024 + 4 * O
    assert NF4Linear(linear, block_size=32).absmax.numel() == 2 * blocks


@pytest.mark.parametrize("double", [False, True])
def test_another_codebook_and_block_are_the_layers(double):
    linear = nn.Linear(I, O)
    ours = NF4Linear(linear, codebook=INT4, block_size=32, double_quantization=double)
    assert torch.equal(as_floats(ours.quant_map), INT4)
    blocks = linear.weight.detach().view(-1, 32)
    absmax = blocks.abs().amax(1, keepdim=True)
    codes = (blocks[..., None] / absmax[..., None] - INT4).abs().argmin(-1)
    bound = {"rtol": 0.01, "atol": 1e-3} if double else {}  # 8 bits of the scales
    assert_close(ours.dequantize(), (INT4[codes] * absmax).view(O, I), **bound)


def test_the_tables_are_part_of_what_is_loaded():
    ours = NF4Linear(nn.Linear(I, O))
    weights = ours.state_dict()
    half = as_floats(weights["nested_quant_map"]) / 2
    whole = ours.dequantize()
    ours.load_state_dict(weights | {"nested_quant_map": half.view(torch.int32)})
    assert (ours.dequantize() - whole).abs().max() > 1e-4


def test_a_state_dict_has_bitsandbytes_names_and_comes_back():
    ours = NF4Linear(nn.Linear(I, O))
    saved = theirs_4bit(nn.Linear(I, O)).state_dict()
    names = {name.removeprefix("weight.") for name in saved}
    kinds = {name for name in ours.state_dict()} - {"nested_offset"}  # theirs is in a packed dict
    assert kinds <= names
    other = NF4Linear(nn.Linear(I, O))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.dequantize(), ours.dequantize())


def test_weights_have_no_gradient_and_nothing_is_trained():
    ours = NF4Linear(nn.Linear(I, O))
    assert not any(p.requires_grad for p in ours.parameters())
    x = torch.randn(3, I, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None and ours.bias.grad is None and ours.weight.grad is None


def test_the_scales_survive_bfloat16():
    ours = NF4Linear(nn.Linear(I, O))
    before, x = ours.dequantize(), torch.randn(3, I)
    y = ours(x)
    ours.bfloat16()
    assert torch.equal(ours.dequantize(), before)
    low = ours(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), y, rtol=0.02, atol=0.02)


def test_inputs_in_bfloat16_meet_a_layer_in_float32():
    ours, x = NF4Linear(nn.Linear(I, O)), torch.randn(3, I, requires_grad=True)
    low = ours(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), ours(x), rtol=0.02, atol=0.02)
    half = x.detach().bfloat16().requires_grad_()
    upstream = torch.randn(3, O).bfloat16()
    (found,) = torch.autograd.grad(ours(half), half, upstream)
    assert found.dtype == torch.bfloat16
    expected = upstream.float() @ ours.dequantize()
    assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_the_unpacked_weight_is_not_kept_for_the_backward_pass():
    layers = nn.Sequential(*[NF4Linear(nn.Linear(256, 256)) for _ in range(8)])
    x = torch.randn(1, 256, requires_grad=True)
    dense = 256 * 256 * 4
    assert peak_bytes(layers, x) < 5 * dense  # not 8
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers(x)
    assert not any(t.numel() == 256 * 256 for t in kept)


@pytest.mark.parametrize("double", [False, True])
def test_compile_gives_the_same(unchecked, double):
    ours = NF4Linear(nn.Linear(70, 30), double_quantization=double)
    x = torch.randn(2, 5, 70, requires_grad=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert_close(y, ours(x))
    upstream = torch.randn_like(y)
    assert_close(torch.autograd.grad(y, x, upstream), torch.autograd.grad(ours(x), x, upstream))


# The whole: LoRA on a 4-bit base


class Two(nn.Module):
    """Two layers of other sizes than each other's."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(I, O, bias=False), nn.Linear(O, 128)
        self.lm_head = nn.Linear(128, 9)

    def forward(self, x):
        return self.lm_head(self.down(self.up(x).tanh()))


def test_a_training_step_is_pefts_on_bitsandbytes():
    base = Two()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    assert quantize_linears(ours) == ["up", "down"]
    adapters = adapt(ours, ["up", "down"], partial(LoRA, r=3, lora_alpha=5))
    for name in ("up", "down"):
        setattr(theirs, name, theirs_4bit(getattr(theirs, name)))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"], bias="none")
    theirs = peft.get_peft_model(theirs, config).train()
    for name, adapter in adapters.items():
        their = getattr(theirs.base_model.model, name)
        nn.init.normal_(adapter.lora_B.weight)
        their.lora_A.default.weight.data.copy_(adapter.lora_A.weight)
        their.lora_B.default.weight.data.copy_(adapter.lora_B.weight)
    x, target = torch.randn(4, 6, I), torch.randint(9, (24,))
    frozen = {name: t.clone() for name, t in ours.state_dict().items() if "lora" not in name}
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 3 * (I + O + O + 128)
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        for _ in range(2):
            nn.functional.cross_entropy(model(x).flatten(0, 1), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(ours(x), theirs(x))
    for name, adapter in adapters.items():
        their = getattr(theirs.base_model.model, name)
        assert_close(adapter.lora_A.weight, their.lora_A.default.weight)
        assert_close(adapter.lora_B.weight, their.lora_B.default.weight)
    after = ours.state_dict()
    assert all(torch.equal(after[name], before) for name, before in frozen.items())


def test_gradients_of_the_adapters_are_those_on_the_unpacked_base():
    linear = nn.Linear(I, O)
    packed = NF4Linear(linear)
    with torch.no_grad():
        linear.weight.copy_(packed.dequantize())
    on_4bit, on_dense = LoRA(packed, r=3, lora_alpha=5), LoRA(linear, r=3, lora_alpha=5)
    nn.init.normal_(on_4bit.lora_B.weight)
    on_dense.lora_A.load_state_dict(on_4bit.lora_A.state_dict())
    on_dense.lora_B.load_state_dict(on_4bit.lora_B.state_dict())
    x = torch.randn(2, 5, I)
    for layer in (on_4bit, on_dense):
        layer(x).square().sum().backward()
    assert_close(on_4bit.lora_A.weight.grad, on_dense.lora_A.weight.grad)
    assert_close(on_4bit.lora_B.weight.grad, on_dense.lora_B.weight.grad)


def test_quantizes_all_linear_layers_but_the_head():
    model = nn.ModuleDict({"a": Two(), "lm_head": nn.Linear(3, 4), "norm": nn.LayerNorm(3)})
    assert quantize_linears(model, block_size=32, double_quantization=False) == [
        "a.up",
        "a.down",
    ]
    assert isinstance(model["a"].lm_head, nn.Linear) and isinstance(model["lm_head"], nn.Linear)
    assert model["a"].down.block_size == 32 and not model["a"].down.double_quantization
    assert not any(p.requires_grad for p in model.parameters())
    other = Two()
    assert quantize_linears(other, exclude=("up",)) == ["down", "lm_head"]
    assert other.down.block_size == 64 and other.down.double_quantization


# What is refused


def test_refuses_what_does_not_fit(unchecked):
    weight = torch.randn(6, 64)
    packed, absmax = quantize_4bit(weight)
    for block_size in (0, 1, 33, -2):
        with pytest.raises(ValueError, match=f"block_size={block_size}:"):
            quantize_4bit(weight, block_size=block_size)
    assert quantize_4bit(weight, block_size=2)[1].numel() == 192
    with pytest.raises(ValueError, match=r"nothing to quantize in shape \(0, 4\)"):
        quantize_4bit(torch.empty(0, 4))
    for table in (torch.linspace(-1, 1, 15), torch.zeros(16), torch.linspace(1, -1, 16)):
        with pytest.raises(ValueError, match=re.escape(f"this one {table.tolist()}")):
            quantize_4bit(weight, codebook=table)
    said = r"shape \(6, 66\) isn't that of 192 bytes and 6 scales, block_size=64"
    with pytest.raises(ValueError, match=said):
        dequantize_4bit(packed, absmax, shape=(6, 66))
    with pytest.raises(ValueError, match="192 bytes and 6 scales, block_size=32"):
        dequantize_4bit(packed, absmax, shape=(6, 64), block_size=32)
    with pytest.raises(ValueError, match=r"63 features, in_features=64"):
        NF4Linear(nn.Linear(64, 6))(torch.randn(2, 5, 63))
    with pytest.raises(ValueError, match=r"beside \('0',\)"):
        quantize_linears(nn.Sequential(nn.Linear(3, 4)), exclude=("0",))


def test_full_size_on_meta_counts_bytes():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 11008, bias=False))
    quantize_linears(model)
    blocks = 4096 * 11008 // 64
    assert model[0].weight.is_meta and model[0].nbytes == 33 * blocks + blocks // 64 + 4 + 64 + 1024


def test_constants_cost_an_eighth_of_a_bit():
    ours = NF4Linear(nn.Linear(4096, 1024, bias=False))
    n = 4096 * 1024
    bits = 8 * (ours.absmax.nbytes + ours.nested_absmax.nbytes) / n
    assert bits == 8 / 64 + 32 / (64 * 256) and math.isclose(bits, 0.127, abs_tol=1e-3)
    single = NF4Linear(nn.Linear(4096, 1024, bias=False), double_quantization=False)
    assert 8 * single.absmax.nbytes / n == 0.5
