"""GGUF against the gguf package, llama.cpp's own quantizers, its server, and transformers."""

import ctypes
import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize as their_dequantize
from gguf.quants import quantize as their_quantize
from torch.testing import assert_close

from snippets.common.checkpoint import read_config, read_json, read_tensors
from snippets.common.generate import generate
from snippets.models.llama import Llama, LlamaConfig
from snippets.quantization.gguf import (
    FORMATS,
    Blocks,
    dequantize,
    fit_line,
    fit_sub_blocks,
    gguf_name,
    importance,
    llama_metadata,
    llama_tensors,
    pack_scales,
    quantize,
    quantize_q4_0,
    quantize_q4_k,
    quantize_q8_0,
    refit,
    tokenizer_metadata,
    unpack_scales,
    write_gguf,
)
from weights import smollm2

ROOT = Path(__file__).parents[2]
LIBRARY = ctypes.CDLL(xllamacpp.xllamacpp.__file__)  # llama.cpp's C functions are in it
SIMPLE = ("Q8_0", "Q4_0")


def number(kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[kind]


def llama_cpp(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The bytes that llama.cpp's own quantizer makes of rows."""
    x, form = x.contiguous(), FORMATS[kind]
    rows, columns = x.shape
    made = torch.zeros(rows, columns // form.columns * form.nbytes, dtype=torch.uint8)
    wide = ctypes.c_int64
    LIBRARY.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = LIBRARY.ggml_quantize_chunk(
        ctypes.c_int(int(number(kind))), ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(made.data_ptr()), wide(0), wide(rows), wide(columns), None,
    )  # fmt: skip
    assert written == made.numel()
    return made


def theirs(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(their_dequantize(blocks.numpy(), number(kind)))


def weights(*shape: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of several temperaments."""
    torch.manual_seed(seed)
    heavy = torch.distributions.StudentT(3.0).sample(shape)
    return {
        "normal": torch.randn(shape),
        "heavy tails": heavy,
        "one sign": torch.rand(shape) + 0.5,
        "other sign": -torch.rand(shape) - 0.5,
        "tiny": 1e-6 * torch.randn(shape),
        "sparse": torch.randn(shape) * (torch.rand(shape) < 0.05),
        "large": 1e4 * torch.randn(shape).clamp(-4, 4),
    }


TEMPERAMENTS = list(weights(1, 32))


# Blocks


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("temperament", TEMPERAMENTS)
def test_bytes_are_those_of_gguf_and_of_llama_cpp(kind, temperament):
    x = weights(5, 96)[temperament]
    data = quantize(x, kind).data
    assert data.dtype == torch.uint8 and data.shape == (5, 3 * FORMATS[kind].nbytes)
    assert np.array_equal(data.numpy(), their_quantize(x.numpy(), number(kind)))
    assert torch.equal(data, llama_cpp(x, kind))
    assert torch.equal(dequantize(Blocks(kind, data)), theirs(data, kind))


@pytest.mark.parametrize("kind", SIMPLE)
def test_bytes_at_ties_zeros_and_halves(kind):
    eighths = torch.arange(-16, 16) / 8.0  # in Q8_0 below: exact halves of a step
    eighths[0] = 127 / 8 * 2
    tied = torch.tensor([3.0, -3.0] * 16)
    rows = torch.stack((eighths, tied, -tied, torch.zeros(32), torch.full((32,), -2.0)))
    almost = torch.full((32,), 0.49999997)  # + 0.5 is 1 in float32
    almost[0] = 127
    halves = torch.arange(32) - 15.5
    halves[3] = -127
    rows = torch.cat((rows, almost[None], -almost[None], halves[None]))
    data = quantize(rows, kind).data
    assert np.array_equal(data.numpy(), their_quantize(rows.numpy(), number(kind)))
    assert torch.equal(data, llama_cpp(rows, kind))
    assert not dequantize(quantize(rows[3], kind)).any()


def test_a_step_below_the_smallest_numbers_is_zero():
    x = torch.full((2, 256), 1e-39)
    for kind in FORMATS:
        assert not dequantize(quantize(x, kind)).any()


@pytest.mark.parametrize("sign, size", [(1, 5.4e-5), (-1, 3.6e-6)])
def test_steps_rounded_down_by_a_third_leave_six_bits_at_their_most(sign, size):
    """The steps of scales and minima are near 8.5e-8 here, which float16 stores as 6e-8."""
    torch.manual_seed(0)
    x = sign * size * (torch.rand(4, 256) + 0.5)
    assert (dequantize(quantize(x, "Q4_K")) - x).norm() < 0.6 * x.norm()


def test_q8_0_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64)
    data = quantize_q8_0(x)
    assert data.shape == (2, 3, 68)
    for block in range(2):
        ours = data[1, 2, 34 * block : 34 * block + 34]
        row = x[1, 2, 32 * block : 32 * block + 32]
        d = row.abs().max() / 127
        assert bytes(ours[:2].tolist()) == d.half().numpy().tobytes()
        q = [(byte + 128) % 256 - 128 for byte in ours[2:].tolist()]
        assert q == [round(value) for value in (row / d).tolist()]


def test_q4_0_by_hand():
    x = torch.zeros(32)
    x[2], x[3], x[18], x[31] = -8.0, 1.0, 3.0, 7.0
    data = quantize_q4_0(x)
    assert data[:2].tolist() == [0x00, 0x3C]  # 1.0 in float16
    assert data[2:].tolist() == [0x88] * 2 + [0xB0, 0x89] + [0x88] * 11 + [0xF8]
    assert dequantize(Blocks("Q4_0", data)).tolist() == x.tolist()
    assert quantize_q4_0(-x)[:2].tolist() == [0x00, 0xBC]  # the largest decides the sign


@pytest.mark.parametrize("temperament", TEMPERAMENTS)
def test_gguf_reads_our_q4_k_as_we_do_and_it_errs_less(temperament):
    x = weights(12, 768)[temperament]
    if temperament == "tiny":  # d is 63 times smaller than a step: float16 has none for these
        assert not dequantize(quantize(x, "Q4_K")).any()
        x = 1000 * x
    data = quantize_q4_k(x)
    assert data.shape == (12, 3 * 144)
    ours = dequantize(Blocks("Q4_K", data))
    assert torch.equal(ours, theirs(data, "Q4_K"))
    q4_0 = theirs(quantize_q4_0(x), "Q4_0")
    if temperament != "sparse":  # where Q4_0, which has an exact 0, is as good
        assert (ours - x).norm() < (q4_0 - x).norm()
    # Not the plain error: the search minimizes one in which large weights count more.
    weight = importance(x.unflatten(-1, (-1, 32))).flatten(-2)
    llamas = theirs(llama_cpp(x, "Q4_K"), "Q4_K")
    error = [(weight * (made - x).square()).sum() for made in (ours, llamas, q4_0)]
    assert error[0] < error[1] and error[0] < error[2]


def test_any_bytes_of_q4_k_are_read_as_gguf_reads_them():
    data = torch.randint(256, (40, 288), dtype=torch.uint8)
    for start in (0, 144):  # d and e finite
        data[:, start + 1] &= 0xBB
        data[:, start + 3] &= 0xBB
    assert_close(dequantize(Blocks("Q4_K", data)), theirs(data, "Q4_K"), rtol=0, atol=0)


def test_sixteen_numbers_of_six_bits():
    s, m = torch.randint(64, (2, 7, 8), dtype=torch.uint8)
    packed = pack_scales(s, m)
    assert packed.shape == (7, 12) and packed.dtype == torch.uint8
    assert all(map(torch.equal, unpack_scales(packed), (s, m)))
    one = torch.zeros(8, dtype=torch.uint8)
    for i in range(8):
        for value, place in ((s, 0), (m, 4)):
            new = [one.clone(), one.clone()]
            new[value is m][i] = 0b110101
            bits = pack_scales(*new).tolist()
            wanted = [0] * 12
            if i < 4:
                wanted[place + i] = 0b110101
            else:
                wanted[place + i - 4] = 0b11 << 6
                wanted[4 + i] = 0b0101 << place
            assert bits == wanted


def scalar_fit(x: list[float], q: list[int], w: list[float]) -> tuple[float, float]:
    """By numpy: a q - b nearest to x with b >= 0."""
    root = np.sqrt(w)
    system = np.stack([q, -np.ones(len(q))], 1) * root[:, None]
    (a, b), _, rank, _ = np.linalg.lstsq(system, np.array(x) * root, rcond=1e-9)
    if rank < 2:
        a, b = 0, 0
    elif b < 0:
        a, b = np.dot(w, np.multiply(q, x)) / np.dot(w, np.square(q)), 0
    return max(float(a), 0.0), max(float(b), 0.0)


@pytest.mark.parametrize("shift", [0.0, -1.5, 1.5])
def test_a_line_is_fitted_as_numpy_does(shift):
    torch.manual_seed(0)
    x, w = (torch.randn(6, 32) + shift).double(), torch.rand(6, 32).double() + 0.1
    q = ((x - x.amin(-1, keepdim=True)) * 4).round().clamp(0, 15)
    a, b = fit_line(x, q, w)
    for i in range(6):
        assert_close(
            (a[i].item(), b[i].item()), scalar_fit(x[i].tolist(), q[i].tolist(), w[i].numpy())
        )


@pytest.mark.parametrize("temperament", ["normal", "heavy tails", "one sign", "other sign"])
def test_the_search_is_the_documented_one(temperament):
    x = weights(1, 1, 6, 32)[temperament].double()
    weight = importance(x)
    a, b = fit_sub_blocks(x, weight)
    for i in range(6):
        row, w = x[0, 0, i].tolist(), weight[0, 0, i].numpy()
        rms = math.sqrt(sum(v * v for v in row) / 32)
        assert_close(w, np.array([abs(v) + rms for v in row]))
        low = min(min(row), 0)
        tried = []
        for grid in range(8):
            at, bt = (max(row) - low) / 15 * (1.1 - 0.025 * grid), -low
            for _ in range(2):
                q = [min(max(round((v + bt) / at), 0), 15) for v in row]
                at, bt = scalar_fit(row, q, w)
            q = [min(max(round((v + bt) / at), 0), 15) for v in row]
            fitted = zip(w, q, row, strict=True)
            tried.append((sum(wt * (at * k - bt - v) ** 2 for wt, k, v in fitted), at, bt))
        _, at, bt = min(tried)
        assert_close((a[0, 0, i].item(), b[0, 0, i].item()), (at, bt))


def test_the_last_fit_is_numpys_and_is_taken_only_where_it_is_better():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 32)
    weight = torch.rand(3, 1, 8, 32) + 0.1
    s = torch.randint(30, 64, (3, 1, 8, 1)).float()
    m = torch.randint(30, 64, (3, 1, 8, 1)).float()
    d, e = torch.full((2, 3, 1, 1, 1), 0.006)
    e = 5 * e
    d[2] *= 50  # no fit could be worse than the second row's, none better than the first's
    q = ((x + e * m) / (d * s)).round().clamp(0, 15)
    new_d, new_e = refit(x, weight, q, s, m, d, e)

    def error(i, d, e):
        near = ((x[i] + e * m[i]) / (d * s[i])).round().clamp(0, 15)
        return (weight[i] * (d * s[i] * near - e * m[i] - x[i]).square()).sum()

    for i in range(3):
        root = weight[i].flatten().sqrt().numpy()
        columns = [(s[i] * q[i]).flatten().numpy(), -m[i].expand(1, 8, 32).flatten().numpy()]
        solved, *_ = np.linalg.lstsq(
            np.stack(columns, 1) * root[:, None], x[i].flatten().numpy() * root, rcond=None
        )
        candidate = torch.tensor(solved).clamp(min=0).half().float()
        took = error(i, *candidate) < error(i, d[i], e[i])
        wanted = candidate if took else torch.stack((d[i].flatten(), e[i].flatten()))
        assert_close(torch.stack((new_d[i].flatten(), new_e[i].flatten())).flatten(),
                     wanted.flatten(), rtol=1e-3, atol=1e-7)  # fmt: skip
        assert error(i, new_d[i], new_e[i]) <= error(i, d[i], e[i])


def test_q4_k_is_what_its_parts_say():
    """By hand from the search's result to the bytes, with nothing of the packing."""
    x = weights(2, 512, seed=3)["normal"]
    data = quantize_q4_k(x)
    ours = dequantize(Blocks("Q4_K", data)).view(2, 2, 8, 32)
    blocks = x.view(2, 2, 8, 32)
    weight = importance(blocks)
    a, b = fit_sub_blocks(blocks, weight)
    half = lambda t: t.half().float()  # noqa: E731
    d, e = half(a.amax(2, True) / 63), half(b.amax(2, True) / 63)
    s, m = (a / d).round().clamp(max=63), (b / e).round().clamp(max=63)
    q = ((blocks + e * m) / (d * s)).round().clamp(0, 15)
    d, e = refit(blocks, weight, q, s, m, d, e)
    q = ((blocks + e * m) / (d * s)).round().clamp(0, 15)
    assert_close(ours, d * s * q - e * m)
    assert (s.amax(2) == 63).all() and (m.amax(2) == 63).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_in_half_precision_and_with_more_axes(kind):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 512).bfloat16()
    data = FORMATS[kind].quantize(x)
    assert torch.equal(data, FORMATS[kind].quantize(x.float()))
    values = dequantize(Blocks(kind, data))
    assert values.dtype == torch.float32 and values.shape == x.shape
    assert torch.equal(values[1, 2], dequantize(quantize(x[1, 2], kind)))
    assert Blocks(kind, data).shape == (2, 3, 512)


@pytest.mark.parametrize("kind", FORMATS)
def test_compiles(unchecked, kind):
    torch.manual_seed(0)
    x, form = torch.randn(3, 512), FORMATS[kind]
    # The search is long to compile to machine code; as a graph, it takes seconds.
    backend = "inductor" if kind in SIMPLE else "aot_eager"
    data = torch.compile(form.quantize, fullgraph=True, backend=backend)(x)
    values = torch.compile(form.dequantize, fullgraph=True)(data)
    if kind in SIMPLE:
        assert torch.equal(data, form.quantize(x))
    # The search's sums are taken in another order, so a near-tie may fall the other way.
    assert_close(
        (values - x).norm(), (form.dequantize(form.quantize(x)) - x).norm(), rtol=1e-3, atol=0
    )
    assert torch.equal(values, form.dequantize(data))


@pytest.mark.parametrize("kind, bits", [("Q8_0", 8.5), ("Q4_0", 4.5), ("Q4_K", 4.5)])
def test_bits_are_counted_from_the_bytes(kind, bits):
    data = quantize(torch.randn(3, 512), kind).data
    assert FORMATS[kind].bits == 8 * data.numel() / (3 * 512) == bits
    assert FORMATS[kind].number == number(kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_refuses_columns_and_bytes_that_do_not_divide(unchecked, kind):
    form = FORMATS[kind]
    for columns in (form.columns + 1, form.columns // 2, 0):
        said = re.escape(f"({2}, {columns}) don't divide into blocks of {form.columns}")
        with pytest.raises(ValueError, match=said):
            quantize(torch.ones(2, columns), kind)
    for nbytes in (form.nbytes + 1, form.nbytes // 2, 0):
        said = re.escape(f"(3, {nbytes}) aren't blocks of {form.nbytes}")
        with pytest.raises(ValueError, match=said):
            dequantize(Blocks(kind, torch.ones(3, nbytes, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"shape \(\) don't divide"):
        quantize(torch.ones(()), kind)
    with pytest.raises(ValueError, match=r"shape \(\) aren't blocks"):
        dequantize(Blocks(kind, torch.ones((), dtype=torch.uint8)))


def test_blocks_and_formats_are_not_edited():
    for thing, name in ((quantize(torch.ones(32), "Q8_0"), "kind"), (FORMATS["Q8_0"], "nbytes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


def test_refuses_unknown_kinds_and_values_without_a_scale():
    with pytest.raises(ValueError, match="'Q3_K' isn't a kind of blocks; known: Q8_0, Q4_0, Q4_K"):
        quantize(torch.ones(32), "Q3_K")
    with pytest.raises(ValueError, match="'Q3_K' isn't a kind"):
        dequantize(Blocks("Q3_K", torch.ones(34, dtype=torch.uint8)))
    for bad in (float("nan"), float("inf"), 65505.0, -65505.0):
        x = torch.ones(64)
        x[40] = bad
        with pytest.raises(ValueError, match=f"Q8_0 has no scale for weights up to {abs(bad)}"):
            quantize(x, "Q8_0")
    assert dequantize(quantize(torch.full((32,), 65504.0), "Q8_0")).isfinite().all()


# The file

METADATA = {
    "general.architecture": "none",
    "a.true": True,
    "a.false": False,
    "a.zero": 0,
    "a.u32": 2**32 - 1,
    "a.i32": -(2**31),
    "a.u64": 2**32,
    "a.u64.last": 2**64 - 1,
    "a.i64": -(2**31) - 1,
    "a.float": 0.1,
    "a.text": "grüße ✓",
    "a.texts": ["", "eins", "Ġzwei"],
    "a.ints": [3, 2**31 - 1, -(2**31)],
    "a.longs": [3, 2**31],
    "a.floats": (0.5, -1e-5),
    "a.bools": [True, False, True],
}
TYPES = {
    "a.true": "BOOL", "a.zero": "UINT32", "a.u32": "UINT32", "a.i32": "INT32", "a.u64": "UINT64",
    "a.u64.last": "UINT64", "a.i64": "INT64", "a.float": "FLOAT32", "a.text": "STRING",
    "a.texts": "ARRAY STRING", "a.ints": "ARRAY INT32", "a.longs": "ARRAY INT64",
    "a.floats": "ARRAY FLOAT32", "a.bools": "ARRAY BOOL",
}  # fmt: skip


def some_tensors() -> dict:
    torch.manual_seed(0)
    return {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(2, 3, 4, 7).half(),
        "bf16": torch.randn(11).bfloat16(),
        "turned": torch.randn(4, 6).T,
        "q8": quantize(torch.randn(3, 64), "Q8_0"),
        "q4": quantize(torch.randn(2, 3, 32), "Q4_0"),
        "qk": quantize(torch.randn(5, 256), "Q4_K"),
        "n" * 63: torch.randn(1),
    }


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_gguf_reads_the_file_back(tmp_path, alignment):
    metadata = METADATA | ({} if alignment is None else {"general.alignment": alignment})
    tensors, path = some_tensors(), tmp_path / "all.gguf"
    write_gguf(path, metadata, tensors)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes()[:8] == b"GGUF\3\0\0\0"
    reader = GGUFReader(path)
    read = {name: f.contents() for name, f in reader.fields.items() if name[:5] != "GGUF."}
    assert list(read) == list(metadata)
    for name, value in metadata.items():
        if isinstance(value, float | tuple):
            value = np.array(value, dtype=np.float32).tolist()
        assert read[name] == value
    for name, kinds in TYPES.items():
        assert [t.name for t in reader.fields[name].types] == kinds.split()
    assert [t.name for t in reader.tensors] == list(tensors)
    for found, given in zip(reader.tensors, tensors.values(), strict=True):
        assert found.shape.tolist() == list(reversed(given.shape))
        assert found.data_offset % (alignment or 32) == 0
        if isinstance(given, Blocks):
            assert found.tensor_type.name == given.kind
            assert np.array_equal(found.data, given.data.numpy())
            read_back = torch.tensor(their_dequantize(found.data, found.tensor_type))
            assert torch.equal(read_back.view(given.shape), dequantize(given))
        else:
            bytes_of = given.contiguous().view(torch.uint8).flatten().numpy()
            assert np.array_equal(found.data.view(np.uint8).flatten(), bytes_of)
            name = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
            assert found.tensor_type.name == name[given.dtype]
    last = reader.tensors[-1]
    whole = last.data_offset + last.n_bytes
    assert path.stat().st_size == whole + -whole % (alignment or 32)


def test_gguf_writes_the_same_bytes(tmp_path):
    """Theirs, with the same content: a second opinion on every byte of the head."""
    from gguf import GGUFWriter

    torch.manual_seed(0)
    x, y = torch.randn(3, 5), quantize(torch.randn(4, 64), "Q8_0")
    write_gguf(
        tmp_path / "ours.gguf",
        {"general.architecture": "llama", "a.n": 7, "a.x": 0.3, "a.t": ["p", "q"], "a.k": [1, 3]},
        {"x": x, "y": y},
    )
    writer = GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_uint32("a.n", 7)
    writer.add_float32("a.x", 0.3)
    writer.add_array("a.t", ["p", "q"])
    writer.add_array("a.k", [1, 3])
    writer.add_tensor("x", x.numpy())
    writer.add_tensor("y", y.data.numpy(), raw_dtype=number("Q8_0"))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_parameter_that_trains_can_be_written(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "none"}, {"w": weight})
    found = GGUFReader(tmp_path / "a.gguf").tensors[0]
    assert np.array_equal(found.data, weight.detach().numpy())


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "a.gguf"
    (tmp_path / "a.gguf.part").write_text("left by a process that was killed")
    write_gguf(str(path), {"general.architecture": "none"}, {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [path]
    before = path.read_bytes()
    fails_late = {"x": torch.ones(5), "y": torch.ones(3, device="meta")}
    with pytest.raises(NotImplementedError):
        write_gguf(path, {"general.architecture": "none"}, fails_late)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError):
        write_gguf(path, {"a": None}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(NotImplementedError):
        write_gguf(tmp_path / "b.gguf", {}, fails_late)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "metadata, said",
    [
        ({"a.b": None}, "a.b: wants bool, int, float or str, all of one type; holds NoneType"),
        ({"a.b": []}, "a.b: .* holds nothing"),
        ({"a.b": [1, "x"]}, "a.b: .* holds int, str"),
        ({"a.b": [1, True]}, "a.b: .* holds bool, int"),
        ({"a.b": [[1]]}, "a.b: .* holds list"),
        ({"a.b": 2**64}, f"a.b: {2**64} to {2**64} don't fit into 64 bits"),
        ({"a.b": -(2**63) - 1}, "a.b: .* don't fit into 64 bits"),
        ({"a.b": [0, 2**63]}, f"a.b: 0 to {2**63} don't fit"),
        ({"general.alignment": 48}, "general.alignment=48 isn't a power of 2 from 8 on"),
        ({"general.alignment": 4}, "general.alignment=4 "),
        ({"general.alignment": 0}, "general.alignment=0 "),
        ({"general.alignment": -8}, "general.alignment=-8 "),
        ({"general.alignment": 32.0}, "general.alignment=32.0 "),
    ],
)
def test_refuses_metadata_it_cannot_hold(tmp_path, metadata, said):
    with pytest.raises(ValueError, match=said):
        write_gguf(tmp_path / "a.gguf", metadata, {"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        ("", torch.ones(3), "'': 0 bytes of name, 1 to 63 fit"),
        ("n" * 64, torch.ones(3), "64 bytes of name"),
        ("ü" * 32, torch.ones(3), "64 bytes of name"),
        ("x", torch.ones(()), r"x: shape \(\), 1 to 4 axes fit"),
        ("x", torch.ones(1, 1, 1, 1, 1), r"x: shape \(1, 1, 1, 1, 1\)"),
        ("x", torch.ones(3, 0), r"x: shape \(3, 0\), 1 to 4 axes fit, none empty"),
        ("x", torch.ones(3).double(), "x: torch.float64 has no number here"),
        ("x", Blocks("Q8_0", torch.ones(2, 35).byte()), r"\(2, 35\) aren't blocks of 34"),
    ],
)  # fmt: skip
def test_refuses_tensors_it_cannot_hold(tmp_path, name, tensor, said):
    with pytest.raises(ValueError, match=said):
        write_gguf(tmp_path / "a.gguf", {}, {"fine": torch.ones(3), name: tensor})
    assert not list(tmp_path.iterdir())


def test_64_bits_hold_what_they_can(tmp_path):
    values = {"a.low": -(2**63), "a.longs": [-(2**63), 2**63 - 1], "a.u": [2**31 - 1, 0]}
    write_gguf(tmp_path / "a.gguf", values, {"x": torch.ones(3)})
    fields = GGUFReader(tmp_path / "a.gguf").fields
    assert {name: fields[name].contents() for name in values} == values
    assert fields["a.u"].types[-1] == GGUFValueType.INT32


# A Llama


def small(**changes) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=77)
    config = LlamaConfig(**sizes | dict(rms_norm_eps=1e-4, rope_theta=777.0) | changes)
    torch.manual_seed(0)
    model = Llama(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.3)
    return config, {name: weight.detach() for name, weight in model.state_dict().items()}


def words(size: int) -> dict:
    """A tokenizer that transformers can make something of; its file has no use for it."""
    letters = [chr(0x100 + i) for i in range(size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": letters,
        "tokenizer.ggml.token_type": [1] * size,
        "tokenizer.ggml.merges": [f"{letters[0]} {letters[1]}"],
        "tokenizer.ggml.eos_token_id": 0,
    }


@pytest.mark.parametrize(
    "kind, changes",
    [
        (None, {}),
        (None, {"tie_word_embeddings": True, "num_key_value_heads": None}),
        ("Q8_0", {}),
        ("Q4_0", {"num_key_value_heads": 1}),
    ],
)
def test_transformers_reads_the_model_as_ours(tmp_path, kind, changes):
    config, tensors = small(**changes)
    packed = llama_tensors(config, tensors, kind)
    metadata = llama_metadata(config, kind) | words(config.vocab_size)
    write_gguf(tmp_path / "small.gguf", metadata, packed)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", dtype=torch.float32
    )
    assert theirs.config.max_position_embeddings == 77
    if kind is not None:
        round_trip = lambda w: w if w.ndim == 1 else dequantize(quantize(w, kind))  # noqa: E731
        tensors = {name: round_trip(weight) for name, weight in tensors.items()}
    ours = Llama.from_tensors(config, dict(tensors), source="test")
    ids = torch.randint(config.vocab_size, (2, 13))
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)


def test_metadata_is_the_configs():
    config, _ = small(num_key_value_heads=None, head_dim=24)
    assert llama_metadata(config, "Q4_K") == {
        "general.architecture": "llama",
        "general.file_type": 14,
        "general.quantization_version": 2,
        "llama.vocab_size": 96,
        "llama.context_length": 77,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.attention.layer_norm_rms_epsilon": 1e-4,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 777.0,
    }
    assert llama_metadata(small()[0])["llama.attention.head_count_kv"] == 2
    assert "general.file_type" not in llama_metadata(small()[0])
    assert [FORMATS[kind].file_type for kind in FORMATS] == [7, 2, 14]  # llama.h's


def test_floats_that_came_as_integers_stay_floats(unchecked):
    config = LlamaConfig(**vars(small()[0]) | {"rope_theta": 10000, "rms_norm_eps": 0})
    found = llama_metadata(config)
    assert type(found["llama.rope.freq_base"]) is float
    assert type(found["llama.attention.layer_norm_rms_epsilon"]) is float


@pytest.mark.parametrize("changes, said", [
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling={'rope_type'"),
    ({"attention_bias": True}, "rope_scaling=None, attention_bias=True, mlp_bias=False"),
    ({"mlp_bias": True}, "attention_bias=False, mlp_bias=True"),
])  # fmt: skip
def test_refuses_a_config_without_keys(changes, said):
    with pytest.raises(ValueError, match=f"^no keys for .*{said}"):
        llama_metadata(small(**changes)[0])


def test_a_fallback_takes_what_does_not_divide():
    config, tensors = small(intermediate_size=256)
    with pytest.raises(ValueError, match=r"\(96, 64\) don't divide into blocks of 256"):
        llama_tensors(config, tensors, "Q4_K")
    packed = llama_tensors(config, tensors, "Q4_K", fallback="Q4_0")
    for name, tensor in packed.items():
        if "norm" in name:
            assert tensor.dtype == torch.float32
        else:
            assert tensor.kind == ("Q4_K" if "ffn_down" in name else "Q4_0")
    half = {name: tensor.half() for name, tensor in tensors.items()}
    for name, tensor in llama_tensors(config, half).items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.float16)


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.mlp.up_proj.bias", "model.layers.x.mlp.up_proj.weight", "model.norm.bias",
     "model.layers.3.mlp.router.weight", "up_proj.weight", "weight", "lm_head"],
)  # fmt: skip
def test_refuses_a_name_it_does_not_know(name):
    with pytest.raises(ValueError, match=re.escape(f"{name} has no name in GGUF here")):
        gguf_name(name)


# Its tokenizer


def test_the_tokenizers_files_become_metadata():
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"b": 1, "a": 0, "ab": 2}, "merges": []},
        "added_tokens": [
            {"content": "<end>", "id": 4, "special": True},
            {"content": "tab", "id": 3, "special": False},
        ],
    }  # fmt: skip
    tokenizer["model"]["merges"] = ["a b", ["ab", "a"]]
    config = {"eos_token": "<end>", "unk_token": "a", "pad_token": "b", "chat_template": "{{ x }}"}
    assert tokenizer_metadata(tokenizer, config, pre="some") == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "some",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "tab", "<end>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 4, 3],
        "tokenizer.ggml.merges": ["a b", "ab a"],
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": "{{ x }}",
    }
    about = tokenizer_metadata(tokenizer, {"bos_token": "tab"}, pre="p")
    assert about["tokenizer.ggml.bos_token_id"] == 3 and "tokenizer.chat_template" not in about
    tokenizer["model"]["vocab"]["far"] = 7
    with pytest.raises(ValueError, match="6 tokens, numbered up to 7"):
        tokenizer_metadata(tokenizer, config, pre="p")
    tokenizer["model"]["type"] = "Unigram"
    with pytest.raises(ValueError, match="of type 'Unigram', this wants BPE"):
        tokenizer_metadata(tokenizer, config, pre="p")


# llama.cpp


def serve(path: Path) -> xllamacpp.Server:
    """llama.cpp in this process, with nothing in 16 bits but what the file has so."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.verbosity, params.warmup = -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def written(server, ids: list[int] | str, new: int = 32) -> tuple[torch.Tensor, torch.Tensor, int]:
    """llama.cpp's greedy tokens after a prompt, their log-probabilities; the prompt's length."""
    said = server.handle_completions(
        {"prompt": ids, "max_tokens": new, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    )
    content = said["choices"][0]["logprobs"]["content"]
    tokens, logs = zip(*[(t["id"], t["logprob"]) for t in content], strict=True)
    assert len(tokens) == new
    return torch.tensor(tokens), torch.tensor(logs), said["usage"]["prompt_tokens"]


@torch.no_grad()
def beside(ours: Llama, server, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each token of llama.cpp's: is it our best too, by how much our best leads; log ratio."""
    tokens, logs, _ = written(server, ids)
    logits = ours(torch.tensor([ids + tokens[:-1].tolist()]))[0, len(ids) - 1 :]
    own = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    logits[:, 2] = -math.inf  # the end of text: `ignore_eos` takes it out of the choice
    best = logits.topk(2).values
    return logits.argmax(-1) == tokens, best[:, 0] - best[:, 1], own - logs


@pytest.fixture(scope="module")
def real() -> tuple[Path, LlamaConfig, transformers.PreTrainedTokenizerFast]:
    folder = smollm2.prepare(ROOT)
    config = read_config(folder, LlamaConfig, model_types=("llama",))
    return folder, config, transformers.AutoTokenizer.from_pretrained(folder)


def words_of(folder: Path) -> dict:
    files = (read_json(folder / f"tokenizer{end}.json") for end in ("", "_config"))
    return tokenizer_metadata(*files, pre="smollm")


def asked(tokenizer, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text).input_ids


def rounded(tensors: dict, kind: str) -> dict[str, torch.Tensor]:
    """What `llama_tensors` with Q8_0 to fall back on leaves of the weights."""
    after = {}
    for name, tensor in tensors.items():
        fits = tensor.shape[-1] % FORMATS[kind].columns == 0
        block = kind if fits else "Q8_0"
        after[name] = dequantize(quantize(tensor, block)) if tensor.ndim == 2 else tensor.float()
    return after


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_llama_cpp_says_what_ours_says(tmp_path, real, kind):
    folder, config, tokenizer = real
    tensors = read_tensors(folder)
    packed = llama_tensors(config, tensors, kind, fallback="Q8_0")
    metadata = llama_metadata(config, kind) | words_of(folder)
    write_gguf(tmp_path / "smollm2.gguf", metadata, packed)
    server = serve(tmp_path / "smollm2.gguf")
    ours = Llama.from_tensors(config, rounded(tensors, kind), source=folder)
    ids = asked(tokenizer, "Count from 1 to 12.")
    same, lead, ratio = beside(ours, server, ids)
    assert (lead > 0.1).sum() > 25 and same[lead > 0.1].all()
    assert same.all()
    alone = generate(ours, torch.tensor([ids]), max_new_tokens=32)[0, len(ids) :]
    assert torch.equal(alone, written(server, ids)[0])
    # llama.cpp rounds activations to 8 bits as well, so a lead of 0.1 can turn elsewhere.
    for question in ("Why is the sky blue?", "Explain gravity to a child."):
        same, lead, ratio = beside(ours, server, asked(tokenizer, question))
        assert (lead > 0.5).sum() > 15 and same[lead > 0.5].all()
        assert ratio.abs().mean() < 0.15


def test_llama_cpp_has_our_numbers_where_it_rounds_nothing(tmp_path, real):
    """The weights that blocks stand for, in float32: names, rows, rotation, norms, tokenizer."""
    folder, config, tokenizer = real
    tensors = rounded(read_tensors(folder), "Q8_0")
    metadata = llama_metadata(config) | words_of(folder)
    write_gguf(tmp_path / "smollm2.gguf", metadata, llama_tensors(config, tensors))
    server = serve(tmp_path / "smollm2.gguf")
    ours = Llama.from_tensors(config, tensors, source=folder)
    for question in ("What is the capital of France?", "Write a haiku about the sea."):
        same, lead, ratio = beside(ours, server, asked(tokenizer, question))
        assert same[lead > 0.01].all() and (lead > 0.01).sum() > 28
        assert ratio.abs().max() < 2e-3  # its sums and softmax are float32 in another order
    prompt = "Déjà vu: 12345 naïve\n\n  cats, isn't it? 日本 🙂"
    ids = tokenizer(prompt).input_ids
    text, numbers = written(server, prompt, new=4), written(server, ids, new=4)
    assert text[2] == len(ids) and torch.equal(text[0], numbers[0])
    assert_close(text[1], numbers[1], atol=1e-3, rtol=0)
