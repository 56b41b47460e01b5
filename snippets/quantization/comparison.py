"""Quantizers on equal terms: the same layers, the same text, and every stored byte counted.

A way takes a linear layer, and its inputs on some text if it wants them. It gives the tensors
that a file would hold, and a layer that computes with what they stand for.

Axes: b text, t token, d input column or hidden size, n output row, g group,
f frequency, v vocabulary; *rows are batch, token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from snippets.common.grid import from_codes, pack, unpack
from snippets.models.llama import Llama, LlamaLayer
from snippets.peft.qlora import NF4Linear
from snippets.quantization.awq import AWQLinear, quantize_layer, record_inputs
from snippets.quantization.gguf import dequantize, format_of, quantize
from snippets.quantization.gptq import gptq, hessian, rtn
from snippets.quantization.int8 import Int8Linear, absmax_dequantize, absmax_quantize


class Stored(NamedTuple):
    """A quantized layer: the tensors that a file would hold, and what computes with them."""

    tensors: tuple[Tensor, ...]
    layer: nn.Module


Inputs = Float[Tensor, "*rows d"] | None
Way = Callable[[nn.Linear, Inputs], Stored]
Layers = nn.ModuleList | Sequence[LlamaLayer]

# Ways. What computes is a plain layer of the values, since unpacking them at each call would
# cost more than all the rest here and change nothing.


def dense(
    values: Float[Tensor, "n d"], bias: Float[Tensor, " n"] | None, dtype: torch.dtype
) -> nn.Linear:
    """A frozen layer of these weights."""
    n, d = values.shape
    layer = nn.Linear(d, n, bias=False, device="meta")
    layer.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def to_float16(linear: nn.Linear, x: Inputs = None) -> Stored:
    """Not quantized: what checkpoints hold."""
    half = linear.weight.detach().half()
    return Stored((half,), dense(half, linear.bias, linear.weight.dtype))


def to_int8(linear: nn.Linear, x: Inputs = None, *, per_row: bool = True) -> Stored:
    """Absmax in 8 bits: a scale in float32 for each row, or one for the whole matrix."""
    q, absmax = absmax_quantize(linear.weight.detach(), -1 if per_row else None)
    values = absmax_dequantize(q, absmax)
    return Stored((q, absmax), dense(values, linear.bias, linear.weight.dtype))


def to_llm_int8(linear: nn.Linear, x: Inputs = None) -> Stored:
    """Rows of weights and of activations in 8 bits, outlier columns of activations not."""
    layer = Int8Linear.from_linear(linear)
    return Stored((layer.weight, layer.SCB), layer)


def on_grid(
    codes: UInt8[Tensor, "n d"],
    step: Float[Tensor, "n g"],
    zero: UInt8[Tensor, "n g"],
    bias: Float[Tensor, " n"] | None,
    dtype: torch.dtype,
    *,
    bits: int,
) -> Stored:
    """Codes, packed, with a step in float16 and a zero for each group of neighbours."""
    half = step.half()
    values = from_codes(codes, half.float(), zero)
    return Stored((pack(codes, bits=bits), half, zero), dense(values, bias, dtype))


def to_nearest(
    linear: nn.Linear, x: Inputs = None, *, bits: int, group_size: int | None = None
) -> Stored:
    """Round to nearest on the grids of `fit_grid`."""
    codes, step, zero, _ = rtn(linear.weight.detach(), bits=bits, group_size=group_size)
    return on_grid(codes, step, zero, linear.bias, linear.weight.dtype, bits=bits)


def to_gptq(
    linear: nn.Linear,
    x: Float[Tensor, "*rows d"],
    *,
    bits: int,
    group_size: int | None = None,
    act_order: bool = False,
) -> Stored:
    """GPTQ; with act_order the groups stay neighbours, so that no list of groups is stored."""
    codes, step, zero, _ = gptq(
        linear.weight,
        hessian(x),
        bits=bits,
        group_size=group_size,
        act_order=act_order,
        static_groups=act_order,
    )
    return on_grid(codes, step, zero, linear.bias, linear.weight.dtype, bits=bits)


def to_nf4(
    linear: nn.Linear,
    x: Inputs = None,
    *,
    block_size: int = 64,
    double_quantization: bool = True,
) -> Stored:
    """NF4 as bitsandbytes stores it; the tables, which never change, aren't counted."""
    layer = NF4Linear(linear, block_size=block_size, double_quantization=double_quantization)
    kept = {name: buffer for name, buffer in layer.named_buffers() if "quant_map" not in name}
    values = layer.dequantize()
    return Stored(tuple(kept.values()), dense(values, linear.bias, linear.weight.dtype))


def to_blocks(
    linear: nn.Linear, x: Inputs = None, *, kind: str, fallback: str | None = None
) -> Stored:
    """GGUF's blocks of a kind; of the fallback's where rows don't divide into them."""
    if fallback is not None and linear.in_features % format_of(kind).columns:
        kind = fallback
    blocks = quantize(linear.weight.detach(), kind)
    return Stored((blocks.data,), dense(dequantize(blocks), linear.bias, linear.weight.dtype))


# Layers


@torch.no_grad()
def quantize_layers(
    layers: Layers,
    way: Way,
    x: Float[Tensor, "b t d"] | None = None,
    *inputs: Tensor | tuple[Tensor, Tensor],
) -> list[Tensor]:
    """Replace the linear layers of all, in place; the tensors that a file would hold.

    Each layer is calibrated on what the quantized layers before it make of x.

    Args:
        layers: one after another, as in the model.
        way: of a single linear layer.
        x: calibration input of the first; None: nothing is run, for ways that look at
            weights only.
        inputs: what else the layers are called with, rotation first.

    Raises:
        ValueError: no linear layer is there, or none is left.
    """
    kept = []
    for layer in layers:
        if x is None:
            seen = {n: None for n, part in layer.named_modules() if isinstance(part, nn.Linear)}
        else:
            seen = record_inputs(layer, x, *inputs)
        for name, got in seen.items():
            made = way(layer.get_submodule(name), got)
            put(layer, name, made.layer)
            kept += made.tensors
        if x is not None:
            x = layer(x, *inputs)
    if not kept:
        raise ValueError(f"nothing to quantize in {len(layers)} layers")
    return kept


@torch.no_grad()
def quantize_layers_by_awq(
    layers: Layers,
    x: Float[Tensor, "b t d"],
    *inputs: Tensor | tuple[Tensor, Tensor],
    bits: int,
    group_size: int | None = None,
    steps: int = 20,
    clip: bool = True,
) -> list[Tensor]:
    """The same by AWQ, which works on whole layers: its scales go into norms and neighbours."""
    kept = []
    for layer in layers:
        quantize_layer(layer, x, *inputs, bits=bits, group_size=group_size, steps=steps, clip=clip)
        found = {n: part for n, part in layer.named_modules() if isinstance(part, AWQLinear)}
        for name, part in found.items():
            codes = unpack(part.packed, bits=bits)
            made = on_grid(codes, part.step, part.zero, part.bias, part.step.dtype, bits=bits)
            put(layer, name, made.layer)
            kept += made.tensors
        x = layer(x, *inputs)
    return kept


def put(layer: nn.Module, name: str, part: nn.Module) -> None:
    """Make `part` what `layer` has under a dotted name."""
    owner, _, last = name.rpartition(".")
    setattr(layer.get_submodule(owner), last, part)


def bits_a_weight(kept: Sequence[Tensor], weights: int) -> float:
    """All that is stored, scales and zeros too, for so many weights."""
    return 8 * sum(tensor.nbytes for tensor in kept) / weights


# Measures


@torch.no_grad()
def run_to(
    model: Llama, input_ids: Int[Tensor, "b t"], first: int
) -> tuple[Float[Tensor, "b t d"], tuple[Float[Tensor, "t f"], Float[Tensor, "t f"]]]:
    """The input of layer `first`, and the rotation: what all ways share is computed once."""
    x = model.model.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    rotation = model.model.rotation(positions, x.dtype)
    for layer in model.model.layers[:first]:
        x = layer(x, rotation)
    return x, rotation


@torch.no_grad()
def run_from(
    model: Llama,
    layers: Layers,
    x: Float[Tensor, "b t d"],
    rotation: tuple[Float[Tensor, "t f"], Float[Tensor, "t f"]],
) -> Float[Tensor, "b t v"]:
    """Logits, with these as the model's last layers."""
    for layer in layers:
        x = layer(x, rotation)
    return model.head(model.model.norm(x))


def token_losses(
    log_probs: Float[Tensor, "b t v"], input_ids: Int[Tensor, "b t"]
) -> Float[Tensor, "b t-1"]:
    """-log p of each token but the first, in nats; exp of their mean is the perplexity."""
    return -log_probs[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]


def perplexity_ratio(
    losses: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]
) -> tuple[float, float]:
    """Perplexity over the reference's, exp(mean(losses - reference)), and its standard error.

    Token by token, so that what makes a token hard for both drops out. The error takes the
    differences for independent.

    Raises:
        ValueError: losses of other tokens, or fewer than two.
    """
    if losses.shape != reference.shape or losses.numel() < 2:
        raise ValueError(f"losses of {tuple(losses.shape)} against {tuple(reference.shape)}")
    change = (losses - reference).double()
    ratio = change.mean().exp().item()
    return ratio, ratio * change.std().item() / change.numel() ** 0.5


def divergence(
    log_probs: Float[Tensor, "b t v"], reference: Float[Tensor, "b t v"]
) -> Float[Tensor, "b t"]:
    """KL(p || q) = sum_v p log(p / q) at each token, in nats; p is the reference's.

    By how much the loss would rise on text for which the reference's predictions are the truth.
    """
    return torch.einsum("btv,btv->bt", reference.exp(), reference - log_probs)
