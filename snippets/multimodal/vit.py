"""The vision transformer, ViT (Dosovitskiy et al. 2020, arXiv:2010.11929).

An image is cut in square patches, each patch becomes a token by one linear map, and a
transformer without a causal mask reads them together with one more token, [CLS], from whose
last state the class is told.

Axes: b image, c channel (in: colour; in logits: class), h row of pixels, w column of pixels,
n patch, t token (n + 1, [CLS] first), i flattened patch, d hidden size, a head, k head dim.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.checkpoint import filled, read_config, read_tensors
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.swiglu import ACTIVATIONS


def to_patches(
    images: Float[Tensor, "b c h w"], patch_size: tuple[int, int]
) -> Float[Tensor, "b n i"]:
    """The patches of p x q pixels, row by row, each flattened as c p q.

    Rows and columns of pixels that fill no patch at the end are left out.
    """
    p, q = patch_size
    cut = images.unfold(2, p, p).unfold(3, q, q)  # b c rows columns p q
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def from_patches(
    patches: Float[Tensor, "b n i"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Float[Tensor, "b c h w"]:
    """The image again, from `to_patches`.

    Raises:
        ValueError: not as many patches as the grid has places.
    """
    if patches.shape[1] != math.prod(grid):
        raise ValueError(f"{patches.shape[1]} patches, {grid[0]}x{grid[1]} places")
    cut = patches.unflatten(2, (-1, *patch_size)).unflatten(1, grid)  # b rows columns c p q
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def resample_positions(
    table: Float[Tensor, "1 t d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 s d"]:
    """The vectors of a grid of positions read at another grid's places; [CLS] keeps its own.

    Bicubic, on a plane in which the corners of patches lie at whole numbers, and without a
    smoothing filter when the new grid is the coarser one, as transformers does it.
    """
    if old == new:
        return table
    plane = table[:, 1:].transpose(1, 2).unflatten(2, old)  # 1 d rows columns
    plane = F.interpolate(plane, size=new, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], plane.flatten(2).transpose(1, 2)), dim=1)


def pair(size: int | list | tuple) -> tuple[int, int]:
    """Height and width of a size that can be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class ViTConfig:
    """The keys of config.json that matter here, with the defaults of ViT-B/16.

    Raises:
        ValueError: a value that this model can't honour.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int | list | tuple = 224  # one number, or height and width
    patch_size: int | list | tuple = 16
    num_channels: int = 3
    qkv_bias: bool = True
    id2label: dict[str, Any] | None = None  # one class for each
    num_labels: int | None = None  # as many, where the names aren't given; else two

    def __post_init__(self):
        for name in (
            "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "num_channels", "classes",
        ):  # fmt: skip
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name}={size} is below 1")
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name}={size} isn't one number, or height and width")
            sides = [size] if isinstance(size, int) else size
            if not all(isinstance(side, int) and side > 0 for side in sides):
                raise ValueError(f"{name}={size} isn't in whole numbers above 0")
        if 0 in self.grid:
            raise ValueError(f"image_size={self.image_size} is below patch_size={self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"uneven: hidden_size={self.hidden_size}, "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act={self.hidden_act!r} isn't supported; known: {known}")
        if self.num_labels not in (None, self.classes):
            raise ValueError(f"num_labels={self.num_labels}, and {self.classes} in id2label")

    @property
    def classes(self) -> int:
        if self.id2label is not None:
            return len(self.id2label)
        return 2 if self.num_labels is None else self.num_labels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; what is left at the end of an image isn't read."""
        (h, w), (p, q) = pair(self.image_size), pair(self.patch_size)
        return h // p, w // q


class ViTEmbeddings(nn.Module):
    """[CLS] and the patches as tokens, each with its position's vector added, [CLS] too."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, d = config, config.hidden_size
        patch = pair(config.patch_size)
        # With the stride of its own size this convolution is a linear map of each patch.
        projection = nn.Conv2d(config.num_channels, d, kernel_size=patch, stride=patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        tokens = math.prod(config.grid) + 1
        self.position_embeddings = nn.Parameter(0.02 * torch.randn(1, tokens, d))

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b t d"]:
        _, c, h, w = pixel_values.shape
        if c != self.config.num_channels:
            raise ValueError(f"{c} channels, num_channels={self.config.num_channels}")
        size, (p, q) = pair(self.config.image_size), pair(self.config.patch_size)
        if not interpolate_pos_encoding and (h, w) != size:
            raise ValueError(
                f"{h}x{w} pixels, image_size={size[0]}x{size[1]}: resize the image, or set "
                "interpolate_pos_encoding"
            )
        if h < p or w < q:
            raise ValueError(f"{h}x{w} pixels are less than one patch of {p}x{q}")
        projection = self.patch_embeddings["projection"]
        x = projection(pixel_values.to(projection.weight.dtype))  # b d rows columns
        positions = resample_positions(
            self.position_embeddings, self.config.grid, (x.shape[2], x.shape[3])
        )
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT), dim=1)  # b t d
        return x + positions


class ViTSelfAttention(nn.Module):
    """Every token looks at every other: no mask, and no order but that in the tokens."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d, self.num_heads = config.hidden_size, config.num_attention_heads
        self.query = nn.Linear(d, d, bias=config.qkv_bias)
        self.key = nn.Linear(d, d, bias=config.qkv_bias)
        self.value = nn.Linear(d, d, bias=config.qkv_bias)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q, k, v = (self.split(of(x)) for of in (self.query, self.key, self.value))  # b a t k
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def maps(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b a t t"]:
        """How much each token looks at each."""
        q, k = self.split(self.query(x)), self.split(self.key(x))
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)

    def split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b a t k"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ViTLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)). Its shells are those of the files."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.layernorm_before = LayerNorm(hidden_size=d, eps=config.layer_norm_eps)
        self.attention = nn.ModuleDict(
            {
                "attention": ViTSelfAttention(config),
                "output": nn.ModuleDict({"dense": nn.Linear(d, d)}),
            }
        )
        self.layernorm_after = LayerNorm(hidden_size=d, eps=config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, f)})
        self.activation = ACTIVATIONS[config.hidden_act]
        self.output = nn.ModuleDict({"dense": nn.Linear(f, d)})

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        y = self.attention["attention"](self.layernorm_before(x))
        x = x + self.attention["output"]["dense"](y)
        y = self.activation(self.intermediate["dense"](self.layernorm_after(x)))  # b t f
        return x + self.output["dense"](y)


class ViTModel(nn.Module):
    """Embeddings, layers, the last norm: everything below the classes."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = ViTEmbeddings(config)
        layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.layernorm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b t d"]:
        x = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.layernorm(x)


class ViT(nn.Module):
    """A ViT that gives a logit for each class; parameters are named as in published files."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.vit = ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.classes)

    def forward(
        self, pixel_values: Float[Tensor, "b c h w"], interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b classes"]:
        """Logits of the classes.

        Args:
            pixel_values: normalised as the checkpoint's preprocessor_config.json says.
            interpolate_pos_encoding: take images of any size, and read the table of positions
                at theirs; without it, only images of the config's size.

        Raises:
            ValueError: other channels or another size than the config's, or less than a patch.
        """
        return self.classifier(self.vit(pixel_values, interpolate_pos_encoding)[:, 0])

    def maps(
        self, pixel_values: Float[Tensor, "b c h w"], interpolate_pos_encoding: bool = False
    ) -> list[Float[Tensor, "b a t t"]]:
        """Of each layer, how much each token looks at each; [CLS] is token 0."""
        x, found = self.vit.embeddings(pixel_values, interpolate_pos_encoding), []
        for layer in self.vit.encoder["layer"]:
            found.append(layer.attention["attention"].maps(layer.layernorm_before(x)))
            x = layer(x)
        return found

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "ViT":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published, with a classifier; a pooler beside it is left out.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, ViTConfig, model_types=("vit",))
        tensors = read_tensors(folder, dtype)
        # A map behind [CLS] that some files keep beside a classifier, which doesn't read it.
        pooler = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in pooler}
        return filled(cls, config, tensors, source=folder)
