"""Eight-bit integers for weights and activations, and LLM.int8() (Dettmers et al. 2022).

Absmax and zero-point quantization, a scale for each tensor, row or block, products of integers,
and the layer of arXiv:2208.07339, whose outlier columns are multiplied in higher precision.

Axes: n row (token), d input feature, o output feature, m block, s value in a block.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor, nn

LEVELS = 127  # of either sign; -128 is left out, so that -x becomes -q
LOW, HIGH = -128, 127  # all of int8, for zero-point quantization
SMALLEST = 1e-30  # divisor for rows of zeros, whose own maximum would divide by 0
LONGEST = (2**31 - 1) // 128**2  # products of int8 that int32 can add up, whatever they are


def absmax_quantize(
    x: Float[Tensor, "*shape"], dim: int | None = None
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "..."]]:
    """q = round(127 x / absmax), and absmax = max |x| in float32, its reduced axes kept as 1.

    Args:
        x: what to quantize; the arithmetic is in float32.
        dim: the axis along which values share a scale; None: all values share one. For a
            weight `o d` or activations `n d` -1 is a scale for each row ("vector-wise").
    """
    x = x.float()
    absmax = x.abs().amax(() if dim is None else dim, keepdim=True)
    # Multiplied by 127 / absmax, as in bitsandbytes: x / (absmax / 127) rounds otherwise at ties.
    return (x * (LEVELS / absmax.clamp(min=SMALLEST))).round().to(torch.int8), absmax


def absmax_dequantize(
    q: Int8[Tensor, "*shape"], absmax: Float[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """q absmax / 127, in float32."""
    return q * absmax * (1 / LEVELS)


def zero_point_quantize(
    x: Float[Tensor, "*shape"], dim: int | None = None
) -> tuple[Int8[Tensor, "*shape"], Float[Tensor, "..."], Int[Tensor, "..."]]:
    """q = round(x / scale) + zero, scale = (max - min) / 255; for values on one side of 0.

    The range is widened to hold 0, which then is exactly the integer `zero`: padding and the
    zeros of a ReLU stay zero. Returns q, scale (float32) and zero (int32).
    """
    x, axes = x.float(), () if dim is None else dim
    low = x.amin(axes, keepdim=True).clamp(max=0)
    high = x.amax(axes, keepdim=True).clamp(min=0)
    scale = ((high - low) / (HIGH - LOW)).clamp(min=SMALLEST)
    zero = (LOW - (low / scale).round()).int()
    return ((x / scale).round() + zero).clamp(LOW, HIGH).to(torch.int8), scale, zero


def zero_point_dequantize(
    q: Int8[Tensor, "*shape"], scale: Float[Tensor, "..."], zero: Int[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """(q - zero) scale, in float32. The difference doesn't fit in int8."""
    return (q.int() - zero) * scale


def blockwise_quantize(
    x: Float[Tensor, "*rows ms"], block_size: int = 64
) -> tuple[Int8[Tensor, "*rows ms"], Float[Tensor, "*rows m"]]:
    """Absmax quantization with a scale for each `block_size` neighbours in a row.

    Raises:
        ValueError: rows that aren't whole blocks.
    """
    if block_size < 1 or x.shape[-1] % block_size:
        raise ValueError(f"no whole blocks: {block_size=}, rows of {x.shape[-1]}")
    q, absmax = absmax_quantize(x.unflatten(-1, (-1, block_size)), -1)  # *rows m s, *rows m 1
    return q.flatten(-2), absmax.squeeze(-1)


def blockwise_dequantize(
    q: Int8[Tensor, "*rows ms"], absmax: Float[Tensor, "*rows m"]
) -> Float[Tensor, "*rows ms"]:
    """Each block times its absmax / 127; the block size is read from the shapes.

    Raises:
        ValueError: as many values as scales don't divide.
    """
    if q.shape[-1] % absmax.shape[-1]:
        raise ValueError(f"no whole blocks: {q.shape[-1]} values, {absmax.shape[-1]} scales")
    blocks = q.unflatten(-1, (absmax.shape[-1], -1))  # *rows m s
    return absmax_dequantize(blocks, absmax[..., None]).flatten(-2)


def int8_matmul(a: Int8[Tensor, "n d"], b: Int8[Tensor, "o d"]) -> Int[Tensor, "n o"]:
    """a b^T, exact: products of int8 added up in int32.

    In int8 the sums would wrap around, in float32 they round from 2^24 on, which 1,041
    products of 127 exceed; float64 holds every one. On GPUs torch wants n above 16, and d and
    o divisible by 8.

    Raises:
        ValueError: rows of other lengths, or so long that int32 could overflow.
    """
    if a.shape[1] != b.shape[1] or a.shape[1] > LONGEST:
        raise ValueError(f"rows of {a.shape[1]} and {b.shape[1]}, at most {LONGEST}")
    if a.is_cpu:  # where _int_mm is a plain loop, unless the processor has int8 dot products
        return (a.double() @ b.double().T).int()
    return torch._int_mm(a, b.T)


def rescale(
    sums: Int[Tensor, "n o"], rows: Float[Tensor, "n 1"], columns: Float[Tensor, "o 1"]
) -> Float[Tensor, "n o"]:
    """Integer sums to float32: both scales have left the sum, since neither depends on d."""
    return sums * (rows * columns.T) * (1 / LEVELS**2)


def outlier_columns(x: Float[Tensor, "n d"], threshold: float = 6.0) -> Bool[Tensor, " d"]:
    """The features that reach the threshold in any row; none if the threshold is 0."""
    if threshold == 0:
        return torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    return (x.abs() >= threshold).any(0)


def vectorwise_quantize(
    x: Float[Tensor, "n d"], threshold: float = 0.0
) -> tuple[Int8[Tensor, "n d"], Float[Tensor, "n 1"], Bool[Tensor, " d"]]:
    """Absmax by rows, without the outlier columns: q is 0 there. Also which columns those are.

    A row's maximum is that of all its values below the threshold, small ones of outlier columns
    too, as in bitsandbytes. The paper's formula takes the other columns only: nearly the same.
    """
    outliers = outlier_columns(x, threshold)
    small = x if threshold == 0 else x.masked_fill(x.abs() >= threshold, 0)
    q, absmax = absmax_quantize(small, -1)
    return q.masked_fill(outliers, 0), absmax, outliers


class LLMInt8(torch.autograd.Function):
    """x W^T by integers; backward by the dequantized weight, for adapters on a frozen layer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, absmax: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(weight, absmax)
        q, rows, outliers = vectorwise_quantize(x, threshold)
        y = rescale(int8_matmul(q, weight), rows, absmax)  # n o
        if threshold == 0:
            return y
        if torch.compiler.is_compiling():  # a shape can't depend on values: zeros instead
            x = x.masked_fill(~outliers, 0)
        else:
            x, weight = x[:, outliers], weight[:, outliers]
        return y + F.linear(x, absmax_dequantize(weight, absmax).to(x.dtype))

    @staticmethod
    def backward(ctx, upstream: Tensor):
        weight, absmax = ctx.saved_tensors
        return upstream @ absmax_dequantize(weight, absmax).to(upstream.dtype), None, None, None


class Int8Linear(nn.Module):
    """LLM.int8(): y = x W^T + bias, W in int8, x quantized row by row at each call.

    Columns of x that hold an outlier are multiplied in x's dtype, with the same weights. Sums
    and bias are in float32, the result in x's dtype. Buffers are named as bitsandbytes saves
    them: `weight` (o d, int8), `SCB` (o, float32), the absmax of each row of the weight.

    Raises:
        ValueError: sizes below 1, a negative threshold, or an input of another width.
    """

    def __init__(
        self, *, in_features: int, out_features: int, bias: bool = True, threshold: float = 6.0
    ):
        super().__init__()
        if min(in_features, out_features) < 1 or threshold < 0:
            raise ValueError(f"no layer: {in_features=}, {out_features=}, {threshold=}")
        self.threshold = threshold
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("SCB", torch.zeros(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 6.0) -> "Int8Linear":
        """A trained layer quantized, a scale for each row of its weight."""
        o, d = linear.weight.shape
        has_bias = linear.bias is not None
        layer = cls(in_features=d, out_features=o, bias=has_bias, threshold=threshold)
        q, absmax = absmax_quantize(linear.weight.detach(), -1)
        layer.weight, layer.SCB = q, absmax[:, 0]
        if has_bias:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer

    def _apply(self, fn, recurse=True):
        """Casts of the module leave the scales in float32: in bfloat16 they would be rounded."""
        exact = self.SCB
        super()._apply(fn, recurse)
        if self.SCB.dtype != torch.float32:
            self.SCB = exact.to(self.SCB.device)
        return self

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows o"]:
        d = self.weight.shape[1]
        if x.shape[-1] != d:
            raise ValueError(f"input of {x.shape[-1]} features, the layer has {d}")
        y = LLMInt8.apply(x.reshape(-1, d), self.weight, self.SCB[:, None], self.threshold)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.ndim > 1 else y.to(x.dtype)[0]
