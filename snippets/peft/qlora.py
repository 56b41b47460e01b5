"""QLoRA: a frozen model in 4 bits under adapters (Dettmers et al. 2023, arXiv:2305.14314).

NF4, a table of 16 values from the normal distribution's quantiles; a scale for each block of
weights; double quantization, 8-bit scales; and a linear layer that unpacks its weights where it
uses them. Bytes are as bitsandbytes has them on a CPU.

Axes: o output features, i input features, n weights, p packed bytes, s blocks of weights,
m blocks of scales, c codebook; *rows are batch, token.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

# Probability of the outermost quantile: halfway between 1 - 1/30 and 1 - 1/32, in the seven
# digits that the authors' code has.
OFFSET = 0.9677083
SCALES = 256  # scales to a block, when they are quantized themselves
STEPS = 65535  # of the grid on which bitsandbytes looks up 8-bit codes


def normal_float() -> Float[Tensor, "16"]:
    """NF4: quantiles of the standard normal distribution, divided by the largest.

    Eight positive ones at even steps of probability from 1/2 (left out) to `OFFSET`, seven
    negative ones likewise, and zero: 16 values, not symmetric.
    """

    def quantiles(count: int) -> Float[Tensor, " count"]:
        # Steps in float32 and quantiles in float64, rounded before the division: so to the bit.
        probability = torch.linspace(OFFSET, 0.5, count + 1)[:-1].double()
        return (math.sqrt(2) * torch.erfinv(2 * probability - 1)).float()  # falling

    values = torch.cat((-quantiles(7), torch.zeros(1), quantiles(8).flip(0)))
    # The largest positive and negative quantile are the same: both ends become exactly 1.
    return values / values[-1]


def dynamic_map() -> Float[Tensor, "256"]:
    """8-bit dynamic values (Dettmers 2015, arXiv:1511.04561): fine near 0, coarse near 1.

    2^e values between 10^(e - 7) and 10^(e - 6) for e from 0 to 6, both signs, with 0 and 1.
    """
    decades = []
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2**e + 1)
        decades.append(10.0 ** (e - 6) * (edges[:-1] + edges[1:]) / 2)
    values = torch.cat(decades)
    return torch.cat((values, -values, torch.tensor([0.0, 1.0]))).sort().values


def nearest(x: Float[Tensor, "..."], codebook: Float[Tensor, " c"]) -> Int[Tensor, "..."]:
    """The index of the nearest entry of a sorted codebook; halfway, the lower."""
    return torch.bucketize(x, (codebook[1:] + codebook[:-1]) / 2)


def scaled_blocks(
    x: Float[Tensor, "..."], block_size: int
) -> tuple[Float[Tensor, "s block"], Float[Tensor, " s"]]:
    """Blocks divided by their largest absolute value, and these; the last filled with zeros."""
    flat = x.flatten().float()
    blocks = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    # A block of zeros stays one, and times 1 / absmax rounds as bitsandbytes does.
    return blocks * (1 / absmax.clamp(min=1e-38))[:, None], absmax


def quantize_4bit(
    weight: Float[Tensor, "..."],
    *,
    codebook: Float[Tensor, "16"] | None = None,
    block_size: int = 64,
) -> tuple[UInt8[Tensor, " p"], Float[Tensor, " s"]]:
    """Two 4-bit codes a byte, the first in the high nibble, and a scale for each block.

    Args:
        weight: in rows; where its size is no multiple of the block, the last block is shorter.
        codebook: 16 rising values from -1 to 1; NF4 unless given.
        block_size: consecutive weights that share a scale.

    Raises:
        ValueError: an empty weight, an odd block, or a codebook not of 16 rising values.
    """
    if codebook is None:
        codebook = normal_float()
    elif len(codebook) != 16 or not (codebook.diff() > 0).all():
        raise ValueError(f"a 4-bit codebook has 16 rising values, this one {codebook.tolist()}")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"{block_size=}: bytes hold two codes of one block")
    if weight.numel() == 0:
        raise ValueError(f"nothing to quantize in shape {tuple(weight.shape)}")
    blocks, absmax = scaled_blocks(weight, block_size)
    codes = nearest(blocks, codebook.to(blocks.device)).to(torch.uint8).view(-1, 2)
    packed = codes[:, 0] << 4 | codes[:, 1]
    return packed[: (weight.numel() + 1) // 2], absmax


def dequantize_4bit(
    packed: UInt8[Tensor, " p"],
    absmax: Float[Tensor, " s"],
    *,
    shape: tuple[int, ...],
    codebook: Float[Tensor, "16"] | None = None,
    block_size: int = 64,
) -> Float[Tensor, "..."]:
    """Entries of the codebook times their block's scale, in float32.

    Raises:
        ValueError: packed bytes or scales that aren't those of this shape.
    """
    codebook = (normal_float() if codebook is None else codebook).to(packed.device)
    size = math.prod(shape)
    if len(packed) != (size + 1) // 2 or len(absmax) != -(-size // block_size):
        sizes = f"{len(packed)} bytes and {len(absmax)} scales, {block_size=}"
        raise ValueError(f"shape {tuple(shape)} isn't that of {sizes}")
    # Row 16 h + l of all pairs is (h, l): one lookup gives both weights of a byte.
    pairs = torch.cartesian_prod(codebook, codebook)
    values = pairs.index_select(0, packed.int()).flatten()  # n, and one more if n is odd
    values = F.pad(values[:size], (0, -size % block_size)).view(-1, block_size)
    return (values * absmax[:, None]).flatten()[:size].view(shape)


def quantize_scales(
    absmax: Float[Tensor, " s"],
) -> tuple[UInt8[Tensor, " s"], Float[Tensor, " m"], Float[Tensor, ""]]:
    """Double quantization: 8-bit codes of the scales minus their mean, in blocks of 256.

    Returns:
        Codes of `dynamic_map`, the blocks' own scales, and the mean.
    """
    offset = absmax.mean()
    blocks, nested = scaled_blocks(absmax - offset, SCALES)
    # On a CPU bitsandbytes rounds to 65,536 points of [-1, 1] first and looks up what is nearest to
    # them, so that about one code in a thousand isn't the nearest, but its neighbour.
    grid = ((blocks + 1) * 0.5 * STEPS + 0.5).int()
    codes = nearest(-1 + 2 * grid / STEPS, dynamic_map().to(absmax.device))
    codes = codes.masked_fill(nested[:, None] == 0, 0)  # as there, for a block without spread
    return codes.flatten()[: len(absmax)].to(torch.uint8), nested, offset


def dequantize_scales(
    codes: UInt8[Tensor, " s"],
    nested: Float[Tensor, " m"],
    offset: Float[Tensor, ""],
    codebook: Float[Tensor, "256"] | None = None,
) -> Float[Tensor, " s"]:
    """The scales again: value of the code times its block's scale, plus the mean."""
    codebook = (dynamic_map() if codebook is None else codebook).to(codes.device)
    return codebook[codes.int()] * nested.repeat_interleave(SCALES)[: len(codes)] + offset


class FrozenProduct(torch.autograd.Function):
    """x W^T of a packed W, which is unpacked again for the gradient of x.

    Kept for the backward pass are bytes that exist anyway. `F.linear` alone would keep the
    unpacked W of every layer of the model at once.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layer_state: tuple, *tensors: Tensor) -> Tensor:
        ctx.layer_state = layer_state
        ctx.save_for_backward(*tensors)
        return F.linear(x, unpacked(layer_state, *tensors).to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        weight = unpacked(ctx.layer_state, *ctx.saved_tensors)
        return grad @ weight.to(grad.dtype), None, *[None] * len(ctx.saved_tensors)


def unpacked(
    layer_state: tuple[tuple[int, int], int],
    packed: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    *double: Tensor,
) -> Float[Tensor, "o i"]:
    """W of a layer's shape, block size and buffers."""
    shape, block_size = layer_state
    if double:
        nested, offset, nested_map = map(as_floats, double)
        absmax = dequantize_scales(absmax, nested, offset, nested_map)
    else:
        absmax = as_floats(absmax)
    return dequantize_4bit(
        packed, absmax, shape=shape, codebook=as_floats(quant_map), block_size=block_size
    )


def as_bits(x: Tensor) -> Tensor:
    # `.bfloat16()` of a model would round buffers of floats, and with them every weight.
    return x.contiguous().view(torch.int32)


def as_floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


class NF4Linear(nn.Module):
    """y = x W^T + b with W in 4 bits, frozen: gradients go through to x and to nothing else.

    Buffers are named as in bitsandbytes' files: `weight` (bytes), `quant_map`, `absmax`, and with
    double quantization `nested_absmax`, `nested_offset`, `nested_quant_map`. Those of float32
    are stored as their bits. W takes the dtype of x.

    Args:
        linear: gives W and b.
        block_size: weights that share a scale.
        double_quantization: 8-bit scales.
        codebook: 16 rising values, NF4 unless given.

    Raises:
        ValueError: a block size or a codebook that 4 bits can't have.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quantization: bool = True,
        codebook: Float[Tensor, "16"] | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block_size, self.double_quantization = block_size, double_quantization
        device = linear.weight.device
        codebook = normal_float() if codebook is None else codebook
        packed, absmax = quantize_4bit(
            linear.weight.detach(), codebook=codebook, block_size=block_size
        )
        self.register_buffer("weight", packed)
        self.register_buffer("quant_map", as_bits(codebook.to(device)))
        if double_quantization:
            codes, nested, offset = quantize_scales(absmax)
            self.register_buffer("absmax", codes)
            self.register_buffer("nested_absmax", as_bits(nested))
            self.register_buffer("nested_offset", as_bits(offset))
            self.register_buffer("nested_quant_map", as_bits(dynamic_map().to(device)))
        else:
            self.register_buffer("absmax", as_bits(absmax))
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    def state(self) -> tuple:
        """What `unpacked` takes."""
        tensors = (self.weight, self.quant_map, self.absmax)
        if self.double_quantization:
            tensors += (self.nested_absmax, self.nested_offset, self.nested_quant_map)
        return ((self.out_features, self.in_features), self.block_size), *tensors

    def dequantize(self) -> Float[Tensor, "o i"]:
        """W, rounded as it is, in float32."""
        return unpacked(*self.state())

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape[-1]} features, in_features={self.in_features}")
        y = FrozenProduct.apply(x, *self.state())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        tensors = [*self.buffers(), *self.parameters()]
        return sum(tensor.nbytes for tensor in tensors)


def quantize_linears(
    model: nn.Module,
    *,
    exclude: tuple[str, ...] = ("lm_head",),
    block_size: int = 64,
    double_quantization: bool = True,
) -> list[str]:
    """Replace the linear layers of a model by 4-bit ones and freeze the rest; in place.

    Args:
        exclude: last parts of paths that stay as they are: the head, by custom.

    Returns:
        The paths of the replaced layers.

    Raises:
        ValueError: there are none.
    """
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path and path.rpartition(".")[2] not in exclude
    }
    if not found:
        raise ValueError(f"no linear layer to quantize beside {exclude}")
    for path, linear in found.items():
        parent, _, name = path.rpartition(".")
        small = NF4Linear(linear, block_size=block_size, double_quantization=double_quantization)
        setattr(model.get_submodule(parent), name, small)
    model.requires_grad_(False)
    return list(found)
