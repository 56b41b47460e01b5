"""GGUF: weights in blocks of a few bits, in one file that llama.cpp runs.

The blocks are those of llama.cpp's ggml (Gerganov and others, 2023; the 4-bit
super-blocks by Kawrakow, github.com/ggml-org/llama.cpp/pull/1684). A row is cut
into blocks; each holds small integers q and what turns them back into weights:

    Q8_0   32 weights, 34 bytes    x ≈ d q             q in -127 ... 127
    Q4_0   32 weights, 18 bytes    x ≈ d (q - 8)       q in 0 ... 15
    Q4_K  256 weights, 144 bytes   x ≈ d s q - e m     q in 0 ... 15; s, m in 0 ... 63

d and e are float16; Q4_K has a scale s and a minimum m for each 32 weights. All
numbers are little-endian, as in memory here.

Axes: r rows, c columns, n bytes of a row in blocks, k block, s sub-block of 32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from snippets.position.rope import interleaved_from_half

# 32 weights, 8 bits


def quantize_q8_0(x: Float[Tensor, "*r c"]) -> UInt8[Tensor, "*r n"]:
    """d = max |x| / 127, q = x / d rounded: per block 2 bytes d, 32 bytes q.

    Raises:
        ValueError: the columns aren't a multiple of 32.
    """
    x = in_blocks(x, 32)  # *r k 32
    d = x.abs().amax(-1, keepdim=True) / 127
    q = x * inverse(d)
    # Halves away from zero, as C's roundf; torch.round takes them to the even side, and
    # floor(q + 0.5) takes 0.49999997 to 1, since that sum is rounded too.
    q = q.trunc() + (2 * (q - q.trunc())).trunc()
    return joined(as_bytes(d.half()), as_bytes(q.to(torch.int8)))


def dequantize_q8_0(blocks: UInt8[Tensor, "*r n"]) -> Float[Tensor, "*r c"]:
    """The weights d q that such blocks stand for, in float32."""
    d, q = parts(blocks, 2, 32)
    return (halves(d) * q.view(torch.int8).float()).flatten(-2)


# 32 weights, 4 bits


def quantize_q4_0(x: Float[Tensor, "*r c"]) -> UInt8[Tensor, "*r n"]:
    """d = -x[the largest in magnitude] / 8, q = x / d + 8 rounded, at most 15.

    So the largest gets q = 0, the one value without a negative. Per block 2 bytes
    d, 16 bytes q; byte i holds weight i in its low half, weight i + 16 above.

    Raises:
        ValueError: the columns aren't a multiple of 32.
    """
    x = in_blocks(x, 32)  # *r k 32
    d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8
    q = (x * inverse(d) + 8.5).floor().clamp(max=15)
    return joined(as_bytes(d.half()), nibbles(q))


def dequantize_q4_0(blocks: UInt8[Tensor, "*r n"]) -> Float[Tensor, "*r c"]:
    """The weights d (q - 8) that such blocks stand for, in float32."""
    d, q = parts(blocks, 2, 16)
    return (halves(d) * (unpacked(q) - 8)).flatten(-2)


# 256 weights, 4 bits


def quantize_q4_k(x: Float[Tensor, "*r c"]) -> UInt8[Tensor, "*r n"]:
    """Super-blocks of 8 sub-blocks with a scale and a minimum in 6 bits each.

    Per block 2 bytes d, 2 bytes e, 12 bytes s and m (`pack_scales`), 128 bytes q;
    32 bytes at a time hold a sub-block in their low halves, the next one above.

    The float scales and minima come from a search (`fit_sub_blocks`). Rounded to 6
    bits they are others, so q is then chosen anew, and last d and e by least squares.

    Raises:
        ValueError: the columns aren't a multiple of 256.
    """
    x = in_blocks(x, 256).unflatten(-1, (8, 32))  # *r k s 32
    weight = importance(x)
    scale, minimum = fit_sub_blocks(x, weight)  # *r k s 1
    d = to_half(scale.amax(-2, keepdim=True) / 63)  # *r k 1 1
    e = to_half(minimum.amax(-2, keepdim=True) / 63)
    s = (scale * inverse(d)).round().clamp(max=63)
    m = (minimum * inverse(e)).round().clamp(max=63)
    q = nearest(x, d * s, e * m)
    d, e = refit(x, weight, q, s, m, d, e)
    q = nearest(x, d * s, e * m)
    pairs = q.unflatten(-2, (4, 2)).flatten(-2)  # *r k 4 64
    scales = pack_scales(s[..., 0].to(torch.uint8), m[..., 0].to(torch.uint8))
    d, e = (as_bytes(number[..., 0].half()) for number in (d, e))  # *r k 2
    return joined(d, e, scales, nibbles(pairs).flatten(-2))


def dequantize_q4_k(blocks: UInt8[Tensor, "*r n"]) -> Float[Tensor, "*r c"]:
    """The weights d s q - e m that such blocks stand for, in float32."""
    d, e, scales, q = parts(blocks, 2, 2, 12, 128)
    s, m = unpack_scales(scales)  # *r k s
    q = unpacked(q.unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # *r k s 32
    d, e = (halves(d) * s)[..., None], (halves(e) * m)[..., None]
    return (d * q - e).flatten(-3)


def importance(x: Float[Tensor, "*r k s 32"]) -> Float[Tensor, "*r k s 32"]:
    """What an error costs in each weight: |x| plus the sub-block's root mean square.

    A large weight moves the output more, the rms keeps the small ones in the sum.
    """
    return x.abs() + x.square().mean(-1, keepdim=True).sqrt()


def fit_sub_blocks(
    x: Float[Tensor, "*r k s 32"], weight: Float[Tensor, "*r k s 32"]
) -> tuple[Float[Tensor, "*r k s 1"], Float[Tensor, "*r k s 1"]]:
    """Scale a >= 0 and minimum b >= 0, for x ≈ a q - b with the least weighted error found.

    Eight grids over the range of x and 0, from 1.1 down to 0.925 times as wide as it: a
    narrower one serves the many at the cost of the outermost. Each is improved twice:
    with its q fixed, the best a and b are a least squares fit.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    width = (x.amax(-1, keepdim=True) - low) / 15
    least = torch.full_like(low, torch.inf)
    scale, minimum = torch.zeros_like(low), torch.zeros_like(low)
    for grid in range(8):
        a, b = width * (1.1 - 0.025 * grid), -low
        for _ in range(2):
            a, b = fit_line(x, nearest(x, a, b), weight)
        error = cost(x, weight, a, b).sum(-1, keepdim=True)
        scale, minimum = (
            torch.where(error < least, new, old) for new, old in ((a, scale), (b, minimum))
        )
        least = least.minimum(error)
    return scale, minimum


def fit_line(x: Tensor, q: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """a >= 0 and b >= 0 for the least weighted squared error of a q - b to x.

    The fit is over the last axis. With both free it solves two linear equations; where
    they want b < 0, which can't be stored, the line goes through 0.
    """
    a, b = solve_two(x, q, torch.ones_like(q), weight, (-1,))
    through_zero = (weight * q * x).sum(-1, keepdim=True)
    through_zero = through_zero * inverse((weight * q * q).sum(-1, keepdim=True))
    return torch.where(b < 0, through_zero, a).clamp(min=0), b.clamp(min=0)


def solve_two(
    x: Tensor, u: Tensor, v: Tensor, weight: Tensor, axes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """a and b for the least weighted squared error of a u - b v to x; 0 where u, v are parallel."""
    pairs = ((u, u), (u, v), (v, v), (u, x), (v, x))
    uu, uv, vv, ux, vx = ((weight * y * z).sum(axes, keepdim=True) for y, z in pairs)
    factor = inverse(uu * vv - uv * uv)
    return (vv * ux - uv * vx) * factor, (uv * ux - uu * vx) * factor


def refit(
    x: Float[Tensor, "*r k s 32"],
    weight: Float[Tensor, "*r k s 32"],
    q: Float[Tensor, "*r k s 32"],
    s: Float[Tensor, "*r k s 1"],
    m: Float[Tensor, "*r k s 1"],
    d: Float[Tensor, "*r k 1 1"],
    e: Float[Tensor, "*r k 1 1"],
) -> tuple[Float[Tensor, "*r k 1 1"], Float[Tensor, "*r k 1 1"]]:
    """The super-block's d and e, fitted anew to the integers; the old ones if better."""
    new = solve_two(x, s * q, m.expand_as(q), weight, (-2, -1))
    new = tuple(to_half(number.clamp(min=0)) for number in new)
    errors = (cost(x, weight, c * s, f * m).sum((-2, -1), keepdim=True) for c, f in (new, (d, e)))
    better = torch.lt(*errors)
    return torch.where(better, new[0], d), torch.where(better, new[1], e)


def nearest(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The q in 0 ... 15 for which a q - b is nearest to x."""
    return ((x + b) * inverse(a)).round().clamp(0, 15)


def cost(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The weighted squared error of each x, on the grid a q - b."""
    return weight * (a * nearest(x, a, b) - b - x).square()


def pack_scales(s: UInt8[Tensor, "*k 8"], m: UInt8[Tensor, "*k 8"]) -> UInt8[Tensor, "*k 12"]:
    """Sixteen numbers of 6 bits in 12 bytes.

    Bytes 0-3 hold s0-s3 in 6 bits, 4-7 m0-m3; their free upper 2 bits hold the upper 2 of
    s4-s7 and m4-m7, whose lower 4 are in bytes 8-11, those of s below those of m.
    """
    (s, s_late), (m, m_late) = s.split(4, -1), m.split(4, -1)
    rest = s_late & 15 | (m_late & 15) << 4
    return torch.cat((s | s_late >> 4 << 6, m | m_late >> 4 << 6, rest), -1)


def unpack_scales(
    packed: UInt8[Tensor, "*k 12"],
) -> tuple[UInt8[Tensor, "*k 8"], UInt8[Tensor, "*k 8"]]:
    """The inverse of `pack_scales`."""
    s, m, rest = packed.split(4, -1)
    s_late, m_late = rest & 15 | s >> 6 << 4, rest >> 4 | m >> 6 << 4
    return torch.cat((s & 63, s_late), -1), torch.cat((m & 63, m_late), -1)


# Bytes


def in_blocks(x: Float[Tensor, "*r c"], size: int) -> Float[Tensor, "*r k size"]:
    """Cut each row into blocks, in float32."""
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % size:
        raise ValueError(f"rows of shape {tuple(x.shape)} don't divide into blocks of {size}")
    return x.float().unflatten(-1, (-1, size))


def parts(blocks: UInt8[Tensor, "*r n"], *sizes: int) -> tuple[UInt8[Tensor, "*r k _"], ...]:
    """Cut each row of bytes into blocks, and these into parts of so many bytes."""
    if blocks.ndim == 0 or blocks.shape[-1] == 0 or blocks.shape[-1] % sum(sizes):
        raise ValueError(f"bytes of shape {tuple(blocks.shape)} aren't blocks of {sum(sizes)}")
    return blocks.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)


def joined(*parts: UInt8[Tensor, "*r k _"]) -> UInt8[Tensor, "*r n"]:
    return torch.cat(parts, dim=-1).flatten(-2)


def as_bytes(x: Tensor) -> UInt8[Tensor, "..."]:
    return x.contiguous().view(torch.uint8)


def halves(x: UInt8[Tensor, "*r k 2"]) -> Float[Tensor, "*r k 1"]:
    """The float16 in two bytes."""
    return x.contiguous().view(torch.float16).float()


def to_half(x: Tensor) -> Tensor:
    """As it will be stored: rounded to float16."""
    return x.half().float()


def nibbles(q: Float[Tensor, "*k c"]) -> UInt8[Tensor, "*k n"]:
    """Two numbers of 4 bits a byte: the first half of the axis below, the second above."""
    low, high = q.to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def unpacked(packed: UInt8[Tensor, "*k n"]) -> Float[Tensor, "*k c"]:
    """The inverse of `nibbles`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()


def inverse(d: Tensor) -> Tensor:
    """1 / d; 0 where that isn't finite: a block of zeros has d = 0 and q = 0."""
    return (1 / d).where((1 / d).isfinite(), 0)


# Formats by name


@dataclass(frozen=True)
class Format:
    """How one kind of block is made, read, and called in files."""

    number: int  # ggml's, of a tensor
    file_type: int  # llama.cpp's, of a file in which most matrices are of this kind
    columns: int  # weights a block
    nbytes: int  # bytes a block
    quantize: Callable[[Tensor], Tensor]
    dequantize: Callable[[Tensor], Tensor]

    @property
    def bits(self) -> float:
        """Bits a weight, with all that a block holds."""
        return 8 * self.nbytes / self.columns


FORMATS = {
    "Q8_0": Format(8, 7, 32, 34, quantize_q8_0, dequantize_q8_0),
    "Q4_0": Format(2, 2, 32, 18, quantize_q4_0, dequantize_q4_0),
    "Q4_K": Format(12, 14, 256, 144, quantize_q4_k, dequantize_q4_k),
}
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # ggml's numbers


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks of one kind."""

    kind: str
    data: UInt8[Tensor, "*r n"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights: rows and columns."""
        *rows, nbytes = self.data.shape
        return *rows, nbytes // format_of(self.kind).nbytes * format_of(self.kind).columns


def format_of(kind: str) -> Format:
    if kind not in FORMATS:
        raise ValueError(f"{kind!r} isn't a kind of blocks; known: {', '.join(FORMATS)}")
    return FORMATS[kind]


def quantize(x: Float[Tensor, "*r c"], kind: str) -> Blocks:
    """The rows in blocks of a kind: Q8_0, Q4_0 or Q4_K.

    Raises:
        ValueError: an unknown kind, columns that don't divide into its blocks, or a weight
            beyond ±65504 or NaN, which would spoil a whole block.
    """
    data = format_of(kind).quantize(x)
    if not (largest := x.abs().max().item()) <= 65504:
        raise ValueError(f"{kind} has no scale for weights up to {largest}")
    return Blocks(kind, data)


def dequantize(blocks: Blocks) -> Float[Tensor, "*r c"]:
    """The weights that the blocks stand for, in float32."""
    return format_of(blocks.kind).dequantize(blocks.data)


# The file


def write_gguf(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor | Blocks]
) -> None:
    """Write a GGUF file, version 3: the magic, metadata, where each tensor is, the tensors.

    Written under another name and renamed when it is whole: what stood at the path before
    stays there if anything fails.

    Args:
        path: of the file; `path` with `.part` behind it is overwritten.
        metadata: bool, int, float or str by key, or lists of one of these. Integers are
            stored as unsigned 32 bits, in lists as signed, in 64 bits where they don't
            fit; floats in 32. `general.alignment` (default 32) is honoured.
        tensors: by name; float32, float16, bfloat16, or in blocks.

    Raises:
        ValueError: what the format can't hold, with its key or name.
    """
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment={alignment!r} isn't a power of 2 from 8 on")
    head = b"GGUF" + integer(3, 4) + integer(len(tensors), 8) + integer(len(metadata), 8)
    head += b"".join(string(key) + typed(key, value) for key, value in metadata.items())
    offset = 0
    for name, tensor in tensors.items():
        info, nbytes = described(name, tensor)
        head += info + integer(offset, 8)
        offset += nbytes + -nbytes % alignment
    part = Path(f"{path}.part")
    try:
        with part.open("wb") as file:
            file.write(head + bytes(-len(head) % alignment))
            for tensor in tensors.values():
                data = tensor.data if isinstance(tensor, Blocks) else tensor.detach()
                data = as_bytes(data.cpu().flatten())
                file.write(data.numpy())
                file.write(bytes(-len(data) % alignment))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def described(name: str, tensor: Tensor | Blocks) -> tuple[bytes, int]:
    """A tensor's entry but for its place: name, axes last to first, type; and its bytes."""
    if not 0 < len(name.encode()) < 64:
        raise ValueError(f"{name!r}: {len(name.encode())} bytes of name, 1 to 63 fit")
    if not 0 < len(tensor.shape) < 5 or 0 in tensor.shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, 1 to 4 axes fit, none empty")
    if isinstance(tensor, Blocks):
        number, nbytes = format_of(tensor.kind).number, tensor.data.nbytes
        parts(tensor.data, format_of(tensor.kind).nbytes)  # refuses a piece of a block
    elif tensor.dtype in DTYPES:
        number, nbytes = DTYPES[tensor.dtype], tensor.nbytes
    else:
        raise ValueError(f"{name}: {tensor.dtype} has no number here")
    axes = b"".join(integer(size, 8) for size in reversed(tensor.shape))
    return string(name) + integer(len(tensor.shape), 4) + axes + integer(number, 4), nbytes


def integer(value: int, size: int, signed: bool = False) -> bytes:
    return value.to_bytes(size, "little", signed=signed)


def string(text: str) -> bytes:
    return integer(len(text.encode()), 8) + text.encode()


def typed(key: str, value: Any) -> bytes:
    """A value of the metadata, its type before it."""
    if isinstance(value, list | tuple):
        number, items = encoded(key, value, integers=((5, 4, True), (11, 8, True)))
        array = integer(9, 4) + integer(number, 4) + integer(len(value), 8)
        return array + b"".join(items)
    integers = ((4, 4, False), (5, 4, True), (10, 8, False), (11, 8, True))
    number, (item,) = encoded(key, [value], integers=integers)
    return integer(number, 4) + item


def encoded(key: str, values: Any, integers: tuple) -> tuple[int, list[bytes]]:
    """The number of the values' common type, and each in bytes."""
    kinds = {type(value) for value in values}  # bool is an int, but not by `type`
    if kinds == {bool}:
        return 7, [integer(value, 1) for value in values]
    if kinds == {str}:
        return 8, [string(value) for value in values]
    if kinds == {float}:
        return 6, [bytes(as_bytes(torch.tensor([v], dtype=torch.float32)).tolist()) for v in values]
    if kinds == {int}:
        for number, size, signed in integers:
            low = -(2 ** (8 * size - 1)) if signed else 0
            if low <= min(values) and max(values) < low + 2 ** (8 * size):
                return number, [integer(value, size, signed) for value in values]
        raise ValueError(f"{key}: {min(values)} to {max(values)} don't fit into 64 bits")
    found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise ValueError(f"{key}: wants bool, int, float or str, all of one type; holds {found}")


# A Llama as llama.cpp reads it

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama_metadata(config: Any, kind: str | None = None) -> dict[str, Any]:
    """What llama.cpp wants to know of a Llama, without its tokenizer.

    Args:
        config: a LlamaConfig, of models/llama.
        kind: of most matrices, for the record.

    Raises:
        ValueError: a config for which this writer has no keys.
    """
    if config.rope_scaling or config.attention_bias or config.mlp_bias:
        raise ValueError(
            f"no keys for rope_scaling={config.rope_scaling}, "
            f"attention_bias={config.attention_bias}, mlp_bias={config.mlp_bias}"
        )
    about = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads or config.num_attention_heads,
        "attention.key_length": config.size_of_head,
        "attention.value_length": config.size_of_head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.size_of_head,
        "rope.freq_base": float(config.rope_theta),
    }
    general = {"general.architecture": "llama"}
    if kind is not None:
        general["general.file_type"] = format_of(kind).file_type
        general["general.quantization_version"] = 2
    return general | {f"llama.{key}": value for key, value in about.items()}


def llama_tensors(
    config: Any,
    tensors: Mapping[str, Tensor],
    kind: str | None = None,
    fallback: str | None = None,
) -> dict[str, Tensor | Blocks]:
    """A checkpoint's tensors with GGUF's names, matrices in blocks, norms in float32.

    The rows of queries and keys are put into the order of interleaved rotary pairs,
    which is how llama.cpp turns them.

    Args:
        config: the checkpoint's LlamaConfig.
        tensors: by the names of the published checkpoint.
        kind: of the matrices; as they are unless given.
        fallback: the kind of matrices whose columns don't divide into blocks of `kind`.

    Raises:
        ValueError: a tensor of another name, or columns that don't divide.
    """
    named = {}
    for name, tensor in tensors.items():
        new = gguf_name(name)
        if new.endswith(("attn_q.weight", "attn_k.weight")):
            tensor = interleaved_from_half(tensor, head_dim=config.size_of_head)
        if tensor.ndim == 1:
            named[new] = tensor.float()
        elif kind is None:
            named[new] = tensor
        elif fallback is not None and tensor.shape[-1] % format_of(kind).columns:
            named[new] = quantize(tensor, fallback)
        else:
            named[new] = quantize(tensor, kind)
    return named


def gguf_name(name: str) -> str:
    """model.layers.7.mlp.up_proj.weight becomes blk.7.ffn_up.weight, and so on."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "weight" and stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.weight"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    if suffix == "weight" and number.isdecimal() and inner in NAMES:
        return f"blk.{number}.{NAMES[inner]}.weight"
    raise ValueError(f"{name} has no name in GGUF here")


def tokenizer_metadata(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], *, pre: str
) -> dict[str, Any]:
    """A tokenizer, byte-level BPE, as llama.cpp reads it.

    Args:
        tokenizer: what tokenizer.json of a checkpoint folder holds.
        config: what its tokenizer_config.json holds.
        pre: llama.cpp's name for the pattern that splits text before the merges. It
            can't be read off the file, and a wrong one splits otherwise in silence.

    Raises:
        ValueError: another kind of tokenizer, or numbers with gaps.
    """
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']!r}, this wants BPE")
    numbers = model["vocab"] | {token["content"]: token["id"] for token in added}
    tokens = sorted(numbers, key=numbers.get)
    if [numbers[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{len(tokens)} tokens, numbered up to {max(numbers.values())}")
    kinds = [1] * len(tokens)  # normal; 3: control, in no text; 4: defined by the user
    for token in added:
        kinds[token["id"]] = 3 if token["special"] else 4
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    about = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := config.get(f"{name}_token")) is not None:
            about[f"{key}_token_id"] = numbers[token]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in about.items()}
    if "chat_template" in config:
        metadata["tokenizer.chat_template"] = config["chat_template"]
    return metadata
