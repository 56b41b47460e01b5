"""Int8 against bitsandbytes on CPU, torch's quantized tensors and the formulas in loops.

Inputs are such that float16 holds them exactly: bitsandbytes rounds to it before it quantizes.
"""

import re

import bitsandbytes as bnb
import bitsandbytes.functional as B
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from snippets.quantization import int8
from snippets.quantization.int8 import (
    Int8Linear,
    absmax_dequantize,
    absmax_quantize,
    blockwise_dequantize,
    blockwise_quantize,
    int8_matmul,
    outlier_columns,
    rescale,
    vectorwise_quantize,
    zero_point_dequantize,
    zero_point_quantize,
)

N, D, OUT = 7, 40, 24


def halves(*shape, outliers=()) -> torch.Tensor:
    """Float32 values that float16 has too, below 6 except in these columns."""
    x = torch.randn(*shape).clamp(-5, 5).half().float()
    for column in outliers:
        x[..., column] = (20 * torch.randn(shape[:-1])).half().float()
    return x


def linear(bias=True, dtype=torch.float32) -> nn.Linear:
    layer = nn.Linear(D, OUT, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(halves(OUT, D) * 2**-4)
    return layer.to(dtype)


def theirs(layer: nn.Linear, threshold: float) -> bnb.nn.Linear8bitLt:
    """The layer as bitsandbytes quantizes it."""
    sizes = {"bias": layer.bias is not None, "has_fp16_weights": False, "threshold": threshold}
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, **sizes)
    new.load_state_dict(layer.state_dict())
    return new.to("cpu").eval()


def away(found, right) -> float:
    return ((found - right).norm() / right.norm()).item()


# Quantizing


@pytest.mark.parametrize("threshold", [0.0, 6.0, 3.0])
@pytest.mark.parametrize("outliers", [(), (3, 11)])
@pytest.mark.parametrize("rows", [1, N])
def test_rows_equal_bitsandbytes_to_the_bit(threshold, outliers, rows):
    x = halves(rows, D, outliers=outliers)
    q, absmax, columns = vectorwise_quantize(x, threshold)
    q2, absmax2, columns2 = B.int8_vectorwise_quant(x.half(), threshold)
    if rows == 1 and columns2 is not None:
        q2[:, columns2] = 0  # where they have quantized zeros
    assert torch.equal(q, q2) and torch.equal(absmax[:, 0], absmax2)
    assert columns.nonzero()[:, 0].tolist() == ([] if columns2 is None else columns2.tolist())
    assert q.dtype == torch.int8 and absmax.dtype == torch.float32


def test_the_defaults_are_no_outliers_when_quantizing_and_six_for_columns():
    x = halves(N, D, outliers=[2])
    assert torch.equal(vectorwise_quantize(x)[0], absmax_quantize(x, -1)[0])
    x = torch.zeros(2, 4)
    x[1] = torch.tensor([5.99, 6.0, -6.0, 6.01])
    assert outlier_columns(x).tolist() == [False, True, True, True]
    assert not outlier_columns(x, 0.0).any() and outlier_columns(x, 0.0).dtype == torch.bool
    assert outlier_columns(torch.empty(2, 4, device="meta"), 0.0).device.type == "meta"
    assert vectorwise_quantize(x, 6.0)[1][1].item() == pytest.approx(5.99)


def test_an_outlier_leaves_no_trace_in_its_rows_scale():
    x = torch.tensor([[0.1, 0.4, 50.0], [0.2, -0.3, 0.0]])
    q, absmax, _ = vectorwise_quantize(x, 6.0)
    assert_close(absmax, torch.tensor([[0.4], [0.3]]))
    assert q.tolist() == [[32, 127, 0], [85, -127, 0]]


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_absmax_equals_the_formula_in_loops(dim):
    x = torch.randn(5, 8)
    q, absmax = absmax_quantize(x, dim)
    back = absmax_dequantize(q, absmax)
    for i in range(5):
        for j in range(8):
            peers = x if dim is None else x[:, j] if dim == 0 else x[i]
            largest = max(abs(v) for v in peers.flatten().tolist())
            assert q[i, j].item() == round(127 * x[i, j].item() / largest)
            assert back[i, j].item() == pytest.approx(q[i, j].item() * largest / 127, rel=1e-6)
    assert absmax.shape == {None: (1, 1), 0: (1, 8), 1: (5, 1)}[dim]
    assert ((back - x).abs() <= absmax / 254 * 1.0001).all()
    assert torch.equal(absmax_quantize(-x, dim)[0], -q) and q.abs().max() == 127


def test_dequantizes_as_bitsandbytes():
    q, absmax = absmax_quantize(halves(N, D), -1)
    assert_close(absmax_dequantize(q, absmax), B.int8_vectorwise_dequant(q, absmax[:, 0]))


@pytest.mark.parametrize("quantize", [absmax_quantize, zero_point_quantize])
def test_zeros_stay_zeros(quantize):
    x = torch.randn(3, 8)
    x[1] = 0
    q, *scales = quantize(x, -1)
    dequantize = absmax_dequantize if len(scales) == 1 else zero_point_dequantize
    assert torch.equal(dequantize(q, *scales)[1], torch.zeros(8))
    assert quantize(torch.zeros(2, 2))[0].float().std() == 0
    tiny = torch.tensor([1e-29, -0.5e-29])  # above the smallest divisor
    back = dequantize(*quantize(tiny))
    assert_close(back, tiny, rtol=0.01, atol=0)


@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 0.7, 9.0])
@pytest.mark.parametrize("dim", [None, -1])
def test_zero_point_equals_torch(shift, dim):
    x = torch.randn(5, 8) + shift
    x[2, 3] = 0
    q, scale, zero = zero_point_quantize(x, dim)
    for i in range(5):
        row = x if dim is None else x[i : i + 1]
        s, z = (t if dim is None else t[i : i + 1] for t in (scale, zero))
        low, high = min(row.min().item(), 0), max(row.max().item(), 0)
        assert s.item() == pytest.approx((high - low) / 255)
        assert z.item() == -128 - round(low / s.item()) and z.dtype == torch.int32
        found = torch.fake_quantize_per_tensor_affine(row, s.item(), z.item(), -128, 127)
        own = zero_point_dequantize(q if dim is None else q[i : i + 1], s, z)
        assert_close(own, found)
        assert ((own - row).abs() <= s * 0.51).all()
    assert zero_point_dequantize(q, scale, zero)[2, 3] == 0


def test_zero_point_pays_for_values_of_one_sign_only():
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(999)
        for sample, pays in ((x.relu(), True), (torch.cat([x, -x]), False)):
            one = away(absmax_dequantize(*absmax_quantize(sample)), sample)
            other = away(zero_point_dequantize(*zero_point_quantize(sample)), sample)
            assert (1.8 < one / other < 2.2) if pays else (0.95 < one / other < 1.05)


@pytest.mark.parametrize("block_size", [64, 128])
def test_blocks_equal_bitsandbytes_with_a_linear_codebook(block_size):
    x = torch.randn(3, 256)
    q, absmax = blockwise_quantize(x, block_size)
    code = B.create_linear_map()
    found, state = B.quantize_blockwise(x, code=code, blocksize=block_size)
    assert torch.equal(state.absmax.view_as(absmax), absmax)
    assert_close(code[found.int()] * 127, q.float())
    assert_close(blockwise_dequantize(q, absmax), B.dequantize_blockwise(found, state))
    assert q.shape == x.shape and absmax.shape == (3, 256 // block_size)


def test_blocks_of_64_unless_asked():
    assert blockwise_quantize(torch.randn(2, 128))[1].shape == (2, 2)
    assert blockwise_quantize(torch.randn(2, 3), 1)[1].shape == (2, 3)


def test_blocks_lie_in_the_last_axis():
    x = torch.randn(2, 3, 8)
    q, absmax = blockwise_quantize(x, 4)
    assert q.shape == x.shape and absmax.shape == (2, 3, 2)
    assert torch.equal(absmax[1, 2, 1], x[1, 2, 4:].abs().max())
    assert_close(blockwise_dequantize(q, absmax), x, rtol=0, atol=absmax.max().item() / 250)


def test_an_outlier_spoils_its_block_only():
    x = torch.randn(4, 256)
    x[1, 70] = 100
    error = (blockwise_dequantize(*blockwise_quantize(x)) - x).abs()
    assert error[1, 64:128].max() > 0.2 > 10 * error[0].max()
    assert error[1, :64].max() < 0.02 and error[1, 128:].max() < 0.02


# Products


@pytest.mark.parametrize("n, d, o", [(1, 7, 3), (N, D, OUT), (3, 2049, 5)])
def test_products_are_exact(n, d, o):
    a = torch.randint(-128, 128, (n, d), dtype=torch.int8)
    b = torch.randint(-128, 128, (o, d), dtype=torch.int8)
    sums = int8_matmul(a, b)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.double(), a.double() @ b.double().T)
    assert torch.equal(sums, B.int8_linear_matmul(a, b))
    assert torch.equal(sums, torch._int_mm(a, b.T))  # what other devices run
    rows, columns = torch.rand(n, 1), torch.rand(o, 1)
    expected = absmax_dequantize(a, rows).double() @ absmax_dequantize(b, columns).double().T
    assert_close(rescale(sums, rows, columns).double(), expected, rtol=1e-5, atol=1e-4)


def test_other_devices_get_torchs_product_of_integers(monkeypatch):
    a, b = (torch.ones(k, 8, dtype=torch.int8, device="meta") for k in (3, 5))
    sums, calls = torch.empty(3, 5, dtype=torch.int32, device="meta"), []
    monkeypatch.setattr(torch, "_int_mm", lambda *given: calls.append(given) or sums)
    assert int8_matmul(a, b) is sums
    assert calls[0][0] is a and calls[0][1].shape == (8, 5)


def test_sums_are_exact_where_float32_rounds():
    a = torch.full((2, 4001), 127, dtype=torch.int8)
    b = torch.full((3, 4001), 127, dtype=torch.int8)
    b[:, ::2] = 126
    expected = 127 * (127 * 2000 + 126 * 2001)
    assert torch.tensor(expected, dtype=torch.float32).item() != expected
    assert torch.equal(int8_matmul(a, b), torch.full((2, 3), expected, dtype=torch.int32))


def test_the_longest_row_fits_into_int32():
    assert int8.LONGEST * 128**2 < 2**31 <= (int8.LONGEST + 1) * 128**2
    a = torch.full((1, int8.LONGEST), -128, dtype=torch.int8)
    assert int8_matmul(a, a).item() == int8.LONGEST * 128**2
    with pytest.raises(ValueError, match="rows of 131072 and 131072, at most 131071"):
        int8_matmul(*[torch.zeros(1, int8.LONGEST + 1, dtype=torch.int8)] * 2)


# The layer


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("outliers", [(), (3, 11)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(N,), (2, N)])
def test_the_layer_equals_bitsandbytes(threshold, outliers, bias, shape):
    layer, x = linear(bias), halves(*shape, D, outliers=outliers)
    ours, other = Int8Linear.from_linear(layer, threshold=threshold), theirs(layer, threshold)
    y = ours(x)
    found = other(x)
    assert torch.equal(ours.weight, other.weight.data)
    assert torch.equal(ours.SCB, other.state.SCB)
    # Theirs has 6.200124e-05 for 1 / 127², which is 6.2000124e-05: 2e-5 of the integer part.
    q, rows, columns = vectorwise_quantize(x.reshape(-1, D), threshold)
    whole = rescale(int8_matmul(q, ours.weight), rows, ours.SCB[:, None])
    extra = whole * (6.200124e-05 * 127**2 - 1)
    assert_close(y + extra.view_as(y), found)
    assert columns.sum() == (len(outliers) if threshold else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_layer_equals_bitsandbytes_in_half_precision(dtype):
    layer = linear(dtype=dtype)
    x = halves(2, N, D, outliers=[3]).to(dtype)
    x.copy_(x.half())  # what both formats hold
    ours, other = Int8Linear.from_linear(layer), theirs(layer, 6.0)
    y = ours(x)
    assert y.dtype == dtype
    assert_close(y, other(x), rtol=2**-6, atol=2**-5)  # theirs is rounded twice


def test_equals_the_papers_formula_in_loops():
    layer, x = linear(), halves(N, D, outliers=[3, 11])
    y = Int8Linear.from_linear(layer)(x)
    w, bias = layer.weight, layer.bias
    high = [h for h in range(D) if any(abs(x[i, h]) >= 6 for i in range(N))]
    expected = torch.zeros(N, OUT)
    for i in range(N):
        cx = max(abs(v) for v in x[i].tolist() if abs(v) < 6)
        for j in range(OUT):
            cw = w[j].abs().max().item()
            q = [round(127 * v / cw) for v in w[j].tolist()]
            low = sum(q[h] * round(127 * x[i, h].item() / cx) for h in range(D) if h not in high)
            top = sum(q[h] * x[i, h].item() for h in high)
            expected[i, j] = low * cx * cw / 127**2 + top * cw / 127 + bias[j]
    assert_close(y, expected)


def test_it_loads_what_bitsandbytes_saves():
    other = theirs(linear(), 6.0)
    saved = other.state_dict()
    saved.pop("weight_format")
    ours = Int8Linear(in_features=D, out_features=OUT)
    ours.load_state_dict(saved)
    x = halves(N, D, outliers=[3])
    assert_close(ours(x), other(x), rtol=3e-5, atol=1e-4)  # their constant, as above
    assert ours.threshold == 6 and Int8Linear.from_linear(linear()).threshold == 6


def test_gradients_equal_those_of_bitsandbytes():
    layer, x = linear(), halves(2, N, D, outliers=[3])
    upstream, grads = torch.randn(2, N, OUT), []
    for module in (Int8Linear.from_linear(layer), theirs(layer, 6.0)):
        leaf = x.clone().requires_grad_()
        module(leaf).backward(upstream)
        grads.append((leaf.grad, module.bias.grad))
    assert_close(*grads)


def test_the_bias_is_a_copy_of_its_own_and_the_only_parameter():
    layer = linear()
    ours = Int8Linear.from_linear(layer)
    assert [name for name, _ in ours.named_parameters()] == ["bias"]
    assert ours.bias.data_ptr() != layer.bias.data_ptr() and ours.bias.requires_grad
    assert Int8Linear.from_linear(linear(bias=False)).bias is None
    assert Int8Linear(in_features=3, out_features=2).bias.shape == (2,)
    assert Int8Linear(in_features=3, out_features=2, bias=False).bias is None


def test_a_cast_of_the_module_keeps_its_scales():
    layer = Int8Linear.from_linear(linear())
    before = layer.SCB.clone()
    layer.bfloat16()
    assert torch.equal(layer.SCB, before) and layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.int8
    x = halves(N, D, outliers=[3])
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x).dtype == torch.float32


def test_one_token_alone_and_none():
    layer, x = Int8Linear.from_linear(linear()), halves(D)
    assert_close(layer(x), layer(x[None])[0])
    assert layer(x).shape == (OUT,)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_compile_in_float32_and_bfloat16(unchecked, threshold):
    layer, x = Int8Linear.from_linear(linear(), threshold=threshold), halves(2, N, D, outliers=[3])
    for dtype in (torch.float32, torch.bfloat16):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert_close(compiled(x.to(dtype)), layer(x.to(dtype)))


# Which is better, where


def test_rows_beat_the_tensor_where_rows_differ_and_tie_where_they_do_not():
    for seed in range(5):
        torch.manual_seed(seed)
        w = torch.randn(OUT, D).clamp(-2, 2)
        w[:, 0] = 2  # each row's maximum
        for sizes, factor in ((torch.logspace(-1, 1, OUT)[:, None], 3), (torch.ones(OUT, 1), 1)):
            rows, whole = (
                ((absmax_dequantize(*absmax_quantize(w * sizes, dim)) / sizes - w).norm())
                for dim in (-1, None)
            )
            assert whole > factor * rows if factor > 1 else whole == rows


def test_outlier_columns_pay_where_there_are_outliers_and_tie_where_there_are_none():
    for seed in range(5):
        torch.manual_seed(seed)
        layer = linear()
        for outliers in ((), (3, 11)):
            x = halves(N, D, outliers=outliers)
            plain, split = (
                away(Int8Linear.from_linear(layer, threshold=t)(x), layer(x)) for t in (0.0, 6.0)
            )
            low, high = (1.05, 99) if outliers else (1, 1)
            assert low <= plain / split <= high


# Refusals


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: blockwise_quantize(torch.ones(2, 9), 4),
            "^no whole blocks: block_size=4, rows of 9$",
        ),
        (lambda: blockwise_quantize(torch.ones(2, 9), 0), "block_size=0, rows of 9"),
        (
            lambda: blockwise_dequantize(torch.ones(2, 9).to(torch.int8), torch.ones(2, 2)),
            "^no whole blocks: 9 values, 2 scales$",
        ),
        (
            lambda: int8_matmul(*(torch.ones(2, k).to(torch.int8) for k in (3, 4))),
            "^rows of 3 and 4, at most 131071$",
        ),
        (
            lambda: Int8Linear.from_linear(linear())(torch.ones(2, 3, D + 1)),
            "^input of 41 features, the layer has 40$",
        ),
        (
            lambda: Int8Linear(in_features=0, out_features=2),
            "^no layer: in_features=0, out_features=2, threshold=6.0$",
        ),
        (lambda: Int8Linear(in_features=1, out_features=0), "in_features=1, out_features=0"),
        (
            lambda: Int8Linear(in_features=1, out_features=1, threshold=-0.1),
            re.escape("threshold=-0.1"),
        ),
    ],
)
def test_refuses_what_does_not_fit(unchecked, call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_smallest_layer():
    assert Int8Linear(in_features=1, out_features=1, threshold=0.0)(torch.ones(1, 1)).item() == 0
