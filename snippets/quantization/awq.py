"""AWQ, activation-aware weight quantization (Lin et al. 2023, arXiv:2306.00978).

Input channels with large activations matter most, so their weights are scaled up before they
are rounded, and their inputs scaled down; the operation before takes over the second half.
No gradients: one exponent is searched on a grid, then a clipping range for each group.
As in the released code (mit-han-lab/llm-awq), except that a grid always holds 0.

Axes: d input channel, n output row, t token, g group, s channel in a group, a exponent tried.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from snippets.common.grid import at_least_float32, fit_grid, from_codes, pack, to_codes, unpack
from snippets.layers.rmsnorm import RMSNorm
from snippets.models.llama import LlamaLayer

SMALLEST = 1e-4  # of a channel's scale before normalising: a channel may be all zeros


def channel_magnitudes(x: Float[Tensor, "*t d"]) -> Float[Tensor, " d"]:
    """Mean |x| of each channel over all tokens; at least in float32."""
    return x.to(at_least_float32(x)).abs().flatten(0, -2).mean(0)


def scales_of(magnitudes: Float[Tensor, " d"], alpha: float) -> Float[Tensor, " d"]:
    """s = m^alpha / sqrt(max m^alpha · min m^alpha): large where activations are.

    alpha = 0 is plain rounding. The divisor makes the largest scale the inverse of the
    smallest; without it all scales together would carry the size of the activations.
    """
    s = magnitudes.pow(alpha).clamp(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def rounded(
    weight: Float[Tensor, "n d"], *, bits: int, group_size: int | None = None
) -> Float[Tensor, "n d"]:
    """The weight that is left after rounding to the nearest of each group's grid."""
    step, zero = fit_grid(weight, bits=bits, group_size=group_size)
    return from_codes(to_codes(weight, step, zero, bits=bits), step, zero).to(weight.dtype)


@torch.no_grad()
def search_scales(
    module: nn.Module,
    names: Sequence[str],
    x: Float[Tensor, "*t d"],
    *inputs: Any,
    bits: int,
    group_size: int | None = None,
    steps: int = 20,
) -> tuple[Float[Tensor, " d"], Float[Tensor, " a"]]:
    """The scales that change the module's output least, and the error at each exponent.

    Tries alpha = 0, 1/steps, ... below 1; the error is the mean of
    (module with Q(W diag(s)) diag(s)^-1 - module)².

    Args:
        module: what is compared: the linear layer, or all that its output runs through.
        names: of the module's weights that get x as input, such as "gate_proj.weight".
        x: calibration input of the module and of these weights.
        inputs: what else the module is called with.
        bits: of a code.
        group_size: of neighbouring input channels with a grid of their own; None: all.
        steps: exponents tried.

    Raises:
        ValueError: nothing to search, or a weight that can't have x as its input.
    """
    weights = {name: module.get_parameter(name) for name in names}
    if steps < 1 or not weights:
        raise ValueError(f"nothing to search: {steps=}, {len(weights)} weights")
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} of {tuple(weight.shape)} for x of {tuple(x.shape)}")
    magnitudes, target = channel_magnitudes(x), module(x, *inputs)
    tried, errors = [], []
    for step in range(steps):
        s = scales_of(magnitudes, step / steps)
        changed = {
            name: (rounded(w * s, bits=bits, group_size=group_size) / s).to(w.dtype)
            for name, w in weights.items()
        }
        y = functional_call(module, changed, (x, *inputs))
        tried.append(s)
        errors.append((y - target).to(s.dtype).square().mean())
    losses = torch.stack(errors)
    # The first of equal errors: where nothing is to be gained, nothing is scaled.
    return torch.stack(tried).index_select(0, losses.argmin())[0], losses


@torch.no_grad()
def fold_into_norm(norm: RMSNorm, linears: Sequence[nn.Linear], s: Float[Tensor, " d"]) -> None:
    """Multiply the layers' input channels by s, divide the norm's gains by it; in place.

    Raises:
        ValueError: s isn't of their size, or the norm isn't one whose weight is its gain.
    """
    if not isinstance(norm, RMSNorm):
        raise ValueError(f"no fold into {type(norm).__name__}, only into RMSNorm")
    refuse_unfit(len(norm.weight), linears, s)
    norm.weight.div_(s)
    for linear in linears:
        linear.weight.mul_(s)


@torch.no_grad()
def fold_into_linear(previous: nn.Linear, linear: nn.Linear, s: Float[Tensor, " d"]) -> None:
    """Multiply the layer's input channels by s, divide the previous one's rows; in place.

    Exact where what lies between them is linear in each channel by itself, as between
    v_proj and o_proj (a weighted sum) or up_proj and down_proj (a product with the gate).

    Raises:
        ValueError: s isn't of their size.
    """
    refuse_unfit(previous.out_features, [linear], s)
    previous.weight.div_(s[:, None])
    if previous.bias is not None:
        previous.bias.div_(s)
    linear.weight.mul_(s)


def refuse_unfit(channels: int, linears: Sequence[nn.Linear], s: Tensor) -> None:
    """Broadcasting would take a scale of size 1 for all channels."""
    sizes = [channels, *(linear.in_features for linear in linears)]
    if s.shape != (channels,) or set(sizes) != {channels}:
        raise ValueError(f"scales of {tuple(s.shape)} between layers of {sizes} channels")


@torch.no_grad()
def search_clip(
    weight: Float[Tensor, "n d"],
    x: Float[Tensor, "*t d"],
    *,
    bits: int,
    group_size: int | None = None,
    steps: int = 20,
    max_shrink: float = 0.5,
) -> Float[Tensor, "n g"]:
    """For each group of a row the largest |w| to keep, by the group's own output error.

    Tries (1 - i / steps) max|w| for i = 0 ... max_shrink · steps, the last left out: values
    beyond are cut off, so that the others get a finer grid.

    Raises:
        ValueError: x isn't the weight's input, groups don't divide, or nothing to search.
    """
    d = weight.shape[1]
    group_size = d if group_size is None else group_size
    if x.shape[-1] != d or group_size < 1 or d % group_size:
        raise ValueError(f"{d} columns, x of {tuple(x.shape)}, {group_size=}")
    if int(max_shrink * steps) < 1 or max_shrink > 1:
        raise ValueError(f"nothing to search: {steps=}, {max_shrink=}")
    w = weight.to(at_least_float32(weight)).unflatten(1, (-1, group_size))  # n g s
    parts = x.to(w.dtype).flatten(0, -2).unflatten(1, (-1, group_size))  # t g s
    # The squared error of t outputs is a quadratic form of the weights' error.
    gram = torch.einsum("tgs,tgz->gsz", parts, parts)
    most = w.abs().amax(-1)  # n g
    best, least = most.clone(), torch.full_like(most, torch.inf)
    for i in range(int(max_shrink * steps)):
        limit = most * (1 - i / steps)
        cut = torch.clamp(w, -limit[..., None], limit[..., None])
        left = rounded(cut.flatten(1), bits=bits, group_size=group_size)
        error = left.unflatten(1, (-1, group_size)) - w  # n g s
        error = torch.einsum("ngs,gsz,ngz->ng", error, gram, error)
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return best.to(weight.dtype)


class AWQLinear(nn.Module):
    """y = x (step · (code - zero))^T + bias, from packed codes, for inputs already scaled.

    Holds what a checkpoint would: `packed` codes, `step` and `zero` of each group.

    Args:
        linear: whose weight is rounded; scale it before.
        bits: of a code.
        group_size: of input channels that share a step and a zero; None: all.
        clip: of each group, from `search_clip`; None: nothing is cut off.

    Raises:
        ValueError: groups that don't divide, rows that aren't whole bytes, not 2 to 8 bits,
            a clip for other groups.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        bits: int,
        group_size: int | None = None,
        clip: Float[Tensor, "n g"] | None = None,
    ):
        super().__init__()
        weight = linear.weight.detach()  # n d
        if clip is not None:
            if len(clip) != len(weight) or weight.shape[1] % clip.shape[1]:
                raise ValueError(f"clip of {tuple(clip.shape)} for {tuple(weight.shape)}")
            limit = clip.repeat_interleave(weight.shape[1] // clip.shape[1], 1)
            weight = torch.clamp(weight, -limit, limit)
        step, zero = fit_grid(weight, bits=bits, group_size=group_size)
        # The step as it will be stored, so that the codes are the nearest for that one.
        step = step.to(weight.dtype)
        codes = to_codes(weight.to(at_least_float32(weight)), step, zero, bits=bits)
        self.bits = bits
        self.register_buffer("packed", pack(codes, bits=bits))
        self.register_buffer("step", step)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def weight(self) -> Float[Tensor, "n d"]:
        """What the codes stand for, in the dtype of step."""
        return from_codes(unpack(self.packed, bits=self.bits), self.step, self.zero)

    def forward(self, x: Float[Tensor, "*t d"]) -> Float[Tensor, "*t n"]:
        return F.linear(x, self.weight(), self.bias)


def record_inputs(layer: LlamaLayer, *inputs: Any) -> dict[str, Tensor]:
    """Runs the layer; what each of its linear layers got, by name."""
    seen, hooks = {}, []
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):

            def keep(module, args, name=name):
                seen[name] = args[0]

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            layer(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def quantize_layer(
    layer: LlamaLayer,
    x: Float[Tensor, "b t d"],
    *inputs: Any,
    bits: int,
    group_size: int | None = None,
    steps: int = 20,
    clip: bool = True,
) -> dict[str, Tensor]:
    """Scale, clip and round all linear layers of a Llama layer, in place.

    q, k, v share scales, folded into the norm before them, and so do gate and up. down_proj
    gets its scales from up_proj, o_proj from v_proj, unless query heads share values.
    q_proj and k_proj are not clipped: their product would be what to compare.

    Args:
        layer: its linear layers become `AWQLinear`.
        x: calibration input of the layer, in full precision.
        inputs: what else the layer is called with, rotation first.
        bits: of a code.
        group_size: of neighbouring input channels; None: all.
        steps: exponents and clipping ranges tried.
        clip: search clipping ranges too.

    Returns:
        For each place, named by its first layer, the scales.

    Raises:
        ValueError: the layer hasn't a Llama layer's seven linear layers, or they don't fit.
    """
    attn, mlp = layer.self_attn, layer.mlp
    seen, grid = record_inputs(layer, x, *inputs), {"bits": bits, "group_size": group_size}
    if len(seen) != 7:
        raise ValueError(f"{len(seen)} linear layers, not 7: no Llama layer, or quantized before")
    places = {  # what comes before, what to compare, which of its weights, what else it gets
        "self_attn.q_proj": (layer.input_layernorm, attn, ("q_proj", "k_proj", "v_proj"), inputs),
        "mlp.gate_proj": (layer.post_attention_layernorm, mlp, ("gate_proj", "up_proj"), ()),
        "mlp.down_proj": (mlp.up_proj, mlp.down_proj, (), ()),
    }
    if attn.v_proj.out_features == attn.o_proj.in_features:
        places["self_attn.o_proj"] = (attn.v_proj, attn.o_proj, (), ())
    scales = {}
    for place, (_, module, names, others) in places.items():
        weights = [f"{name}.weight" for name in names] or ["weight"]
        scales[place], _ = search_scales(module, weights, seen[place], *others, steps=steps, **grid)
    for place, (before, module, names, _) in places.items():
        if names:
            fold_into_norm(before, [getattr(module, name) for name in names], scales[place])
        else:
            fold_into_linear(before, module, scales[place])
        owner = place.rpartition(".")[0]
        for name in [f"{owner}.{name}" for name in names] or [place]:
            seen[name] = seen[name] / scales[place]
    for name, got in seen.items():
        linear, limits = layer.get_submodule(name), None
        if clip and not name.endswith(("q_proj", "k_proj")):
            limits = search_clip(linear.weight, got, steps=steps, **grid)
        owner, _, last = name.rpartition(".")
        setattr(layer.get_submodule(owner), last, AWQLinear(linear, clip=limits, **grid))
    return scales
