"""SAM, Segment Anything (Kirillov et al. 2023, arXiv:2304.02643).

A heavy encoder reads the image once; a light decoder turns its features and a prompt (points,
boxes, a rough mask) into masks, as often as somebody asks. The encoder is ViTDet's (Li et al.
2022, arXiv:2203.16527): a ViT whose layers see windows, but for a few that see everything, with
decomposed relative positions (Li et al. 2021, arXiv:2112.01526).

Axes: b image, i colour, y and x row and column of pixels; h and w row and column of tokens, t token
(t = h·w), g window, s side of a window; d hidden size, n head, k head dim, c channel of the output;
p prompt, q token of a prompt, m mask, my and mx row and column of a mask.
"""

from dataclasses import dataclass, fields
from math import pi
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.common.checkpoint import (
    CheckpointError,
    filled,
    read_config,
    read_json,
    read_tensors,
)
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.swiglu import ACTIVATIONS

# Settings


@dataclass(frozen=True)
class SamPartConfig:
    """What the settings of all three parts have.

    Raises:
        ValueError: a size below 1, or an unknown activation.
    """

    hidden_size: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        for size in fields(self):
            if size.type is int and size.name != "window_size" and getattr(self, size.name) < 1:
                raise ValueError(f"{size.name}={getattr(self, size.name)} is below 1")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act={self.hidden_act!r} isn't supported; known: {known}")


@dataclass(frozen=True)
class SamVisionConfig(SamPartConfig):
    """The keys of the image encoder's settings, with ViT-B's values.

    Raises:
        ValueError: a value that the encoder can't honour.
    """

    # Files of 2023 hold these too; they never did anything.
    INERT: ClassVar[set[str]] = {"dropout", "intermediate_size", "projection_dim"}

    hidden_size: int = 768
    output_channels: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    qkv_bias: bool = True
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None  # mlp_ratio · hidden_size, unless given
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    window_size: int = 14  # in tokens; 0: every layer sees everything
    global_attn_indexes: list | tuple = (2, 5, 8, 11)  # of the layers that see everything
    num_pos_feats: int = 128  # frequencies for the places of prompts
    scale: int | float | None = None  # how far transformers spreads them in a fresh model

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"uneven: hidden_size={self.hidden_size}, "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.grid_size < 1:
            raise ValueError(
                f"no patch: image_size={self.image_size}, patch_size={self.patch_size}"
            )
        if self.window_size < 0:
            raise ValueError(f"window_size={self.window_size} is below 0")
        if self.inner_size < 1:
            raise ValueError(f"mlp_dim={self.inner_size} is below 1")
        if not all(isinstance(number, int) for number in self.global_attn_indexes):
            raise ValueError(f"global_attn_indexes={self.global_attn_indexes} aren't whole numbers")

    @property
    def inner_size(self) -> int:
        """Of the network behind attention."""
        return int(self.hidden_size * self.mlp_ratio) if self.mlp_dim is None else self.mlp_dim

    @property
    def grid_size(self) -> int:
        """Patches on a side of the image; what is left over of the pixels isn't seen."""
        return self.image_size // self.patch_size

    def window(self, number: int) -> int:
        """The side of the windows in the layer of this number, from 0; 0: it sees everything."""
        return 0 if number in self.global_attn_indexes else self.window_size


@dataclass(frozen=True)
class SamPromptEncoderConfig(SamPartConfig):
    """The keys of `prompt_encoder_config`, with the values of all published SAMs.

    Raises:
        ValueError: a value that the prompt encoder can't honour.
    """

    image_size: int = 1024  # in whose pixels prompts are given
    patch_size: int = 16
    image_embedding_size: int | None = None  # image_size // patch_size
    mask_input_channels: int = 16
    num_point_embeddings: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.mask_input_channels % 4:
            raise ValueError(f"mask_input_channels={self.mask_input_channels} isn't 4, 8, 12, …")
        if self.num_point_embeddings < 4:
            raise ValueError(
                f"num_point_embeddings={self.num_point_embeddings} is below 4: outside, inside, "
                "two corners of a box"
            )
        if self.image_embedding_size not in (None, self.grid_size):
            raise ValueError(
                f"image_embedding_size={self.image_embedding_size} isn't {self.image_size} // "
                f"{self.patch_size}"
            )

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size


# transformers has `attention_downsample_rate` in the last attention alone, and this elsewhere.
BLOCK_RATE = 2


@dataclass(frozen=True)
class SamMaskDecoderConfig(SamPartConfig):
    """The keys of `mask_decoder_config`, with the values of all published SAMs.

    Raises:
        ValueError: a value that the decoder can't honour.
    """

    hidden_act: str = "relu"
    mlp_dim: int = 2048
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256

    def __post_init__(self):
        super().__post_init__()
        d, n = self.hidden_size, self.num_attention_heads
        if self.iou_head_depth < 2:
            raise ValueError(f"iou_head_depth={self.iou_head_depth} is below 2")
        if d % 8:  # masks are made of an eighth of the channels
            raise ValueError(f"hidden_size={d} isn't a multiple of 8")
        for rate in (1, BLOCK_RATE, self.attention_downsample_rate):
            if d % rate or d // rate % n:
                raise ValueError(f"uneven: hidden_size={d} / {rate}, num_attention_heads={n}")


@dataclass(frozen=True)
class SamConfig:
    """The keys of a whole SAM's config.json: one set of settings for each part.

    Raises:
        ValueError: parts that don't fit each other.
    """

    vision_config: SamVisionConfig = SamVisionConfig()
    prompt_encoder_config: SamPromptEncoderConfig = SamPromptEncoderConfig()
    mask_decoder_config: SamMaskDecoderConfig = SamMaskDecoderConfig()
    tie_word_embeddings: bool = True  # there are none; what is shared are frequencies

    def __post_init__(self):
        vision, prompt, decoder = (
            self.vision_config, self.prompt_encoder_config, self.mask_decoder_config,
        )  # fmt: skip
        sizes = {
            "vision_config's output_channels": vision.output_channels,
            "2 · vision_config's num_pos_feats": 2 * vision.num_pos_feats,
            "prompt_encoder_config's hidden_size": prompt.hidden_size,
            "mask_decoder_config's hidden_size": decoder.hidden_size,
        }
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name}={size}" for name, size in sizes.items())
            raise ValueError(f"these have to be one number: {listed}")
        if vision.grid_size != prompt.grid_size:
            raise ValueError(
                f"vision_config has {vision.grid_size} patches on a side, "
                f"prompt_encoder_config {prompt.grid_size}"
            )


# The image encoder


def to_windows(x: Float[Tensor, "b h w d"], side: int) -> Float[Tensor, "g s s d"]:
    """Cut into windows, row by row, image by image; zeros fill those at the right and bottom."""
    b, h, w, d = x.shape
    rows, columns = -(-h // side), -(-w // side)  # rounded up
    x = F.pad(x, (0, 0, 0, columns * side - w, 0, rows * side - h))
    x = x.view(b, rows, side, columns, side, d).transpose(2, 3)  # b rows columns s s d
    return x.reshape(-1, side, side, d)


def from_windows(windows: Float[Tensor, "g s s d"], h: int, w: int) -> Float[Tensor, "b h w d"]:
    """The inverse of `to_windows`: put together, and what was filled in is cut off."""
    side, d = windows.shape[-2:]
    rows, columns = -(-h // side), -(-w // side)
    x = windows.view(-1, rows, columns, side, side, d).transpose(2, 3)  # b rows s columns s d
    return x.reshape(-1, rows * side, columns * side, d)[:, :h, :w]


def relative_vectors(table: Float[Tensor, "l k"], size: int) -> Float[Tensor, "i j k"]:
    """For each query i and key j on one axis, the table's row of number i - j + size - 1.

    A table for another size, whose rows aren't 2 size - 1, is stretched linearly.
    """
    rows = 2 * size - 1
    if len(table) != rows:
        table = F.interpolate(table.T[None], size=rows, mode="linear")[0].T
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


class SamMLP(nn.Module):
    """y = act(x W1^T + b1) W2^T + b2."""

    def __init__(self, *, hidden_size: int, inner_size: int, hidden_act: str):
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.lin1 = nn.Linear(hidden_size, inner_size)
        self.lin2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.lin2(self.activation(self.lin1(x)))


class SamVisionAttention(nn.Module):
    """Attention within a grid, with relative positions decomposed into rows and columns.

    score(i, j) = q_i · k_j / sqrt(k) + q_i · R^h[row_i - row_j] + q_i · R^w[col_i - col_j]

    The query isn't divided by the root where it meets the tables. Two tables of 2 s - 1 rows
    do the work of one of (2 s - 1)² for pairs of offsets. Fresh tables are 0: no effect.
    """

    def __init__(self, config: SamVisionConfig, side: int):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(d, 3 * d, bias=config.qkv_bias)
        self.proj = nn.Linear(d, d)
        self.use_rel_pos = config.use_rel_pos
        if self.use_rel_pos:
            table = torch.zeros(2 * side - 1, d // self.num_heads)
            self.rel_pos_h = nn.Parameter(table)
            self.rel_pos_w = nn.Parameter(table.clone())

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        h, w = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # b t 3 n k
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each b n t k
        bias = self.position_bias(q, h, w) if self.use_rel_pos else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # b n t k
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (h, w)))

    def position_bias(
        self, q: Float[Tensor, "b n t k"], h: int, w: int
    ) -> Float[Tensor, "b n t t"]:
        """What is added to the score of each query (third axis) with each key (last axis)."""
        q = q.unflatten(2, (h, w))  # b n h w k
        rows = torch.einsum("bnhwk,hik->bnhwi", q, relative_vectors(self.rel_pos_h, h))
        columns = torch.einsum("bnhwk,wjk->bnhwj", q, relative_vectors(self.rel_pos_w, w))
        bias = rows[..., :, None] + columns[..., None, :]  # b n h w h w
        return bias.flatten(4).flatten(2, 3)


class SamVisionLayer(nn.Module):
    """h = x + attention(norm(x)), in windows or over everything; y = h + mlp(norm(h))."""

    def __init__(self, config: SamVisionConfig, number: int):
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.layer_norm_eps}
        self.window = config.window(number)
        self.layer_norm1 = LayerNorm(**norm)
        self.attn = SamVisionAttention(config, self.window or config.grid_size)
        self.layer_norm2 = LayerNorm(**norm)
        self.mlp = SamMLP(
            hidden_size=config.hidden_size,
            inner_size=config.inner_size,
            hidden_act=config.hidden_act,
        )

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        y = self.layer_norm1(x)
        if self.window:
            # Filled up after the norm, so these tokens aren't masked: their key is the bias of
            # `qkv`, and takes its share of the softmax. Published weights are trained so.
            h, w = x.shape[1:3]
            y = from_windows(self.attn(to_windows(y, self.window)), h, w)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.layer_norm2(x))


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels of a picture, for each of its places alone."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class SamVisionNeck(nn.Module):
    """From hidden size to output channels, then one look at the neighbours."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        c = config.output_channels
        # The config's eps is that of the layers; here it is 1e-6 in every model.
        self.conv1 = nn.Conv2d(config.hidden_size, c, kernel_size=1, bias=False)
        self.layer_norm1 = ChannelNorm(hidden_size=c, eps=1e-6)
        self.conv2 = nn.Conv2d(c, c, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = ChannelNorm(hidden_size=c, eps=1e-6)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b c h w"]:
        x = self.layer_norm1(self.conv1(x.movedim(-1, 1)))
        return self.layer_norm2(self.conv2(x))


class SamVisionEncoder(nn.Module):
    """SAM's image encoder; parameters are named as in published checkpoints."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        self.config = config
        p = config.patch_size
        conv = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=p, stride=p)
        self.patch_embed = nn.ModuleDict({"projection": conv})
        if config.use_abs_pos:
            grid = torch.zeros(1, config.grid_size, config.grid_size, config.hidden_size)
            self.pos_embed = nn.Parameter(grid)
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SamVisionLayer(config, number) for number in numbers)
        self.neck = SamVisionNeck(config)

    def forward(self, pixel_values: Float[Tensor, "b i y x"]) -> Float[Tensor, "b c h w"]:
        """Features of a square image, `image_size` on a side: one vector for each patch.

        Raises:
            ValueError: another number of channels or pixels than the config's.
        """
        return self.neck(self.states(pixel_values, len(self.layers) - 1))

    def states(
        self, pixel_values: Float[Tensor, "b i y x"], layer: int
    ) -> Float[Tensor, "b h w d"]:
        """The hidden state behind the layer of this number, from 0, and before the neck.

        Raises:
            ValueError: wrong channels or pixels, or no layer of this number.
        """
        c, side = self.config.num_channels, self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (c, side, side):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}; "
                f"the config wants (b, {c}, {side}, {side})"
            )
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"there is no layer {layer} of {len(self.layers)}, from 0")
        x = self.patch_embed["projection"](pixel_values).movedim(1, -1)  # b h w d
        if self.config.use_abs_pos:
            x = x + self.pos_embed
        for block in self.layers[: layer + 1]:
            x = block(x)
        return x

    def forward_with_state(
        self, pixel_values: Float[Tensor, "b i y x"], layer: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w d"]]:
        """What `forward` and `states` give, in one pass."""
        x = state = self.states(pixel_values, layer)
        for block in self.layers[layer + 1 :]:
            x = block(x)
        return self.neck(x), state

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None
    ) -> "SamVisionEncoder":
        """Read a checkpoint folder of an encoder alone, or the encoder of a whole SAM.

        Args:
            folder: as published: config.json and *.safetensors, several with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        tensors = read_tensors(folder, dtype)
        inside = {
            name.removeprefix("vision_encoder."): tensor
            for name, tensor in tensors.items()
            if name.startswith("vision_encoder.")
        }
        if read_json(Path(folder) / "config.json").get("model_type") == "sam":
            config = read_config(folder, SamConfig, model_types=("sam",)).vision_config
            tensors = inside
        else:
            config = read_config(folder, SamVisionConfig, model_types=("sam_vision_model",))
            if len(inside) == len(tensors):  # transformers' SamVisionModel writes this level
                tensors = inside
        return filled(cls, config, tensors, source=folder)


# Prompts


class FourierFeatures(nn.Module):
    """Sines and cosines of a place along random directions, with as many random frequencies.

    For x and y in [0, 1]: [sin(2 pi z), cos(2 pi z)], z = (2 x - 1, 2 y - 1) G, with G drawn once
    from a normal distribution and never trained (Tancik et al. 2020, arXiv:2006.10739).
    """

    def __init__(self, num_pos_feats: int):
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, num_pos_feats))

    def forward(self, places: Float[Tensor, "*rows 2"]) -> Float[Tensor, "*rows c"]:
        z = (2 * places - 1).to(self.positional_embedding.dtype) @ self.positional_embedding
        z = 2 * pi * z
        return torch.cat((z.sin(), z.cos()), dim=-1)

    def grid(self, size: int) -> Float[Tensor, "c h w"]:
        """The features of the middle of each patch."""
        middle = (torch.arange(size, device=self.positional_embedding.device) + 0.5) / size
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        return self(torch.stack((x, y), dim=-1)).movedim(-1, 0)


class SamMaskEmbed(nn.Module):
    """A rough mask, four pixels on a patch's side, as features that are added to the image's."""

    def __init__(self, config: SamPromptEncoderConfig):
        super().__init__()
        c = config.mask_input_channels
        self.activation = ACTIVATIONS[config.hidden_act]
        self.conv1 = nn.Conv2d(1, c // 4, kernel_size=2, stride=2)
        self.layer_norm1 = ChannelNorm(hidden_size=c // 4, eps=config.layer_norm_eps)
        self.conv2 = nn.Conv2d(c // 4, c, kernel_size=2, stride=2)
        self.layer_norm2 = ChannelNorm(hidden_size=c, eps=config.layer_norm_eps)
        self.conv3 = nn.Conv2d(c, config.hidden_size, kernel_size=1)

    def forward(self, masks: Float[Tensor, "b 1 my mx"]) -> Float[Tensor, "b c h w"]:
        x = self.activation(self.layer_norm1(self.conv1(masks)))
        x = self.activation(self.layer_norm2(self.conv2(x)))
        return self.conv3(x)


class SamPromptEncoder(nn.Module):
    """Points and boxes as tokens, a mask as a picture.

    A token is the Fourier features of its place plus a learned vector that says what it is:
    outside (label 0), inside (1), or a corner of a box. Label -1 has a vector of its own and no
    place: a point that isn't one. Label -10, for lists of unequal length, gives a token of zeros.
    """

    def __init__(self, config: SamPromptEncoderConfig):
        super().__init__()
        self.config = config
        kinds = range(config.num_point_embeddings)
        self.mask_embed = SamMaskEmbed(config)
        self.no_mask_embed = nn.Embedding(1, config.hidden_size)
        self.point_embed = nn.ModuleList(nn.Embedding(1, config.hidden_size) for _ in kinds)
        self.not_a_point_embed = nn.Embedding(1, config.hidden_size)

    def points(
        self,
        input_points: Float[Tensor, "b p q 2"],
        input_labels: Int[Tensor, "b p q"],
        features: FourierFeatures,
    ) -> Float[Tensor, "b p q c"]:
        label = input_labels[..., None]
        x = self.place(input_points, features)
        x = torch.where(label == -1, self.not_a_point_embed.weight, x)
        x = torch.where(label == -10, torch.zeros_like(x), x)
        x = torch.where(label == 0, x + self.point_embed[0].weight, x)
        return torch.where(label == 1, x + self.point_embed[1].weight, x)

    def boxes(
        self, input_boxes: Float[Tensor, "b p 4"], features: FourierFeatures
    ) -> Float[Tensor, "b p 2 c"]:
        corners = input_boxes.unflatten(-1, (2, 2))  # (left, top), (right, bottom)
        kinds = torch.cat((self.point_embed[2].weight, self.point_embed[3].weight))
        return self.place(corners, features) + kinds

    def place(
        self, pixels: Float[Tensor, "b p q 2"], features: FourierFeatures
    ) -> Float[Tensor, "b p q c"]:
        """A pixel's number points to its corner, and half a pixel on is its middle."""
        return features((pixels + 0.5) / self.config.image_size)

    def forward(
        self,
        features: FourierFeatures,
        input_points: Float[Tensor, "b p q 2"] | None = None,
        input_labels: Int[Tensor, "b p q"] | None = None,
        input_boxes: Float[Tensor, "b p 4"] | None = None,
        input_masks: Float[Tensor, "a 1 my mx"] | None = None,
    ) -> tuple[Float[Tensor, "b p _ c"] | None, Float[Tensor, "a c _ _"]]:
        """The tokens of each prompt, None if there are none, and what is added to the image."""
        tokens = []
        if input_points is not None:
            if input_boxes is None:
                # Training always gave two tokens or more: with a box there are.
                input_points = F.pad(input_points, (0, 0, 0, 1))
                input_labels = F.pad(input_labels, (0, 1), value=-1)
            tokens.append(self.points(input_points, input_labels, features))
        if input_boxes is not None:
            tokens.append(self.boxes(input_boxes, features))
        if input_masks is None:
            dense = self.no_mask_embed.weight[:, :, None, None]  # 1 c 1 1
        else:
            dense = self.mask_embed(input_masks)
        return (torch.cat(tokens, dim=2) if tokens else None), dense


# Masks


class SamAttention(nn.Module):
    """Attention of one set of tokens to another, in fewer features than they have."""

    def __init__(self, *, hidden_size: int, num_heads: int, downsample_rate: int):
        super().__init__()
        inner = hidden_size // downsample_rate
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, inner)
        self.k_proj = nn.Linear(hidden_size, inner)
        self.v_proj = nn.Linear(hidden_size, inner)
        self.out_proj = nn.Linear(inner, hidden_size)

    def forward(
        self, q: Float[Tensor, "r i d"], k: Float[Tensor, "r j d"], v: Float[Tensor, "r j d"]
    ) -> Float[Tensor, "r i d"]:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # r n i k
            for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class SamTwoWayBlock(nn.Module):
    """Tokens look at each other, then at the image; then the image looks at the tokens.

    Every look adds the places anew to queries and keys, not to values: tokens would lose
    theirs on the way. The norm is behind each step (post-norm). In the first block tokens have
    nothing but their places, so nothing is added, and the result replaces them.
    """

    def __init__(self, config: SamMaskDecoderConfig, *, first: bool):
        super().__init__()
        self.first = first
        heads = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads}
        norm = {"hidden_size": config.hidden_size, "eps": config.layer_norm_eps}
        self.self_attn = SamAttention(**heads, downsample_rate=1)
        self.layer_norm1 = LayerNorm(**norm)
        self.cross_attn_token_to_image = SamAttention(**heads, downsample_rate=BLOCK_RATE)
        self.layer_norm2 = LayerNorm(**norm)
        self.mlp = SamMLP(
            hidden_size=config.hidden_size,
            inner_size=config.mlp_dim,
            hidden_act=config.hidden_act,
        )
        self.layer_norm3 = LayerNorm(**norm)
        self.layer_norm4 = LayerNorm(**norm)
        self.cross_attn_image_to_token = SamAttention(**heads, downsample_rate=BLOCK_RATE)

    def forward(
        self,
        tokens: Float[Tensor, "r q c"],
        image: Float[Tensor, "r t c"],
        token_places: Float[Tensor, "r q c"],
        image_places: Float[Tensor, "t c"],
    ) -> tuple[Float[Tensor, "r q c"], Float[Tensor, "r t c"]]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_places
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.layer_norm1(tokens)
        keys = image + image_places
        y = self.cross_attn_token_to_image(tokens + token_places, keys, image)
        tokens = self.layer_norm2(tokens + y)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        y = self.cross_attn_image_to_token(keys, tokens + token_places, tokens)
        return tokens, self.layer_norm4(image + y)


class SamTwoWayTransformer(nn.Module):
    """The blocks, then one more look of the tokens at the image."""

    def __init__(self, config: SamMaskDecoderConfig):
        super().__init__()
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SamTwoWayBlock(config, first=number == 0) for number in numbers)
        self.final_attn_token_to_image = SamAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            downsample_rate=config.attention_downsample_rate,
        )
        # The one norm whose eps is 1e-5, in every model.
        self.layer_norm_final_attn = LayerNorm(hidden_size=config.hidden_size, eps=1e-5)

    def forward(
        self,
        tokens: Float[Tensor, "r q c"],
        image: Float[Tensor, "r t c"],
        image_places: Float[Tensor, "t c"],
    ) -> tuple[Float[Tensor, "r q c"], Float[Tensor, "r t c"]]:
        token_places = tokens  # the whole token as it came: place, kind, learned vector
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_places, image_places)
        y = self.final_attn_token_to_image(tokens + token_places, image + image_places, image)
        return self.layer_norm_final_attn(tokens + y), image


class SamFeedForward(nn.Module):
    """Linear maps with relu between them."""

    def __init__(self, *, sizes: tuple[int, int, int], depth: int):
        super().__init__()
        first, inner, last = sizes
        self.proj_in = nn.Linear(first, inner)
        self.layers = nn.ModuleList(nn.Linear(inner, inner) for _ in range(depth - 2))
        self.proj_out = nn.Linear(inner, last)

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        for layer in (self.proj_in, *self.layers):
            x = layer(x).relu()
        return self.proj_out(x)


class SamMaskDecoder(nn.Module):
    """Image features and the tokens of a prompt to masks, and a guess how good each of them is.

    One token for the guesses and one for each mask go before the prompt's. Behind the
    transformer a small network makes of each mask token a vector; its product with the image's
    features, four times as fine, is the mask's logit at each place.
    """

    def __init__(self, config: SamMaskDecoderConfig):
        super().__init__()
        c, count = config.hidden_size, config.num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, c)
        self.mask_tokens = nn.Embedding(count, c)
        self.transformer = SamTwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(c, c // 4, kernel_size=2, stride=2)
        self.upscale_layer_norm = ChannelNorm(hidden_size=c // 4, eps=1e-6)
        self.upscale_conv2 = nn.ConvTranspose2d(c // 4, c // 8, kernel_size=2, stride=2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            SamFeedForward(sizes=(c, c, c // 8), depth=3) for _ in range(count)
        )
        self.iou_prediction_head = SamFeedForward(
            sizes=(c, config.iou_head_hidden_dim, count), depth=config.iou_head_depth
        )

    def forward(
        self,
        image: Float[Tensor, "b c h w"],
        image_places: Float[Tensor, "c h w"],
        prompts: Float[Tensor, "b p q c"] | None,
        dense: Float[Tensor, "_ c _ _"],
    ) -> tuple[Float[Tensor, "b p m my mx"], Float[Tensor, "b p m"]]:
        """All masks, the one for clear prompts first, and their guessed IoU."""
        b, h, w = len(image), *image.shape[2:]
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight))  # 1+m c
        p = 1 if prompts is None else prompts.shape[1]
        tokens = own.expand(b, p, -1, -1)
        if prompts is not None:
            tokens = torch.cat((tokens, prompts.to(own.dtype)), dim=2)
        image = (image + dense).repeat_interleave(p, dim=0)  # bp c h w
        tokens, image = self.transformer(
            tokens.flatten(0, 1), image.flatten(2).mT, image_places.flatten(1).mT
        )
        image = image.mT.unflatten(-1, (h, w))  # bp c h w
        image = F.gelu(self.upscale_layer_norm(self.upscale_conv1(image)))
        image = F.gelu(self.upscale_conv2(image))  # bp c/8 4h 4w
        makers = self.output_hypernetworks_mlps
        vectors = [make(tokens[:, 1 + i]) for i, make in enumerate(makers)]  # m of bp c/8
        masks = torch.einsum("rmc,rcyx->rmyx", torch.stack(vectors, dim=1), image)
        scores = self.iou_prediction_head(tokens[:, 0])
        return masks.unflatten(0, (b, p)), scores.unflatten(0, (b, p))


class Sam(nn.Module):
    """Segment Anything; parameters are named as in published checkpoints."""

    def __init__(self, config: SamConfig):
        super().__init__()
        self.config = config
        self.shared_image_embedding = FourierFeatures(config.vision_config.num_pos_feats)
        self.vision_encoder = SamVisionEncoder(config.vision_config)
        self.prompt_encoder = SamPromptEncoder(config.prompt_encoder_config)
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)

    def forward(
        self,
        pixel_values: Float[Tensor, "b i y x"] | None = None,
        input_points: Float[Tensor, "b p q 2"] | None = None,
        input_labels: Int[Tensor, "b p q"] | None = None,
        input_boxes: Float[Tensor, "b p 4"] | None = None,
        input_masks: Float[Tensor, "_ 1 my mx"] | None = None,
        image_embeddings: Float[Tensor, "b c h w"] | None = None,
        multimask_output: bool = True,
    ) -> tuple[Float[Tensor, "b p m my mx"], Float[Tensor, "b p m"]]:
        """Masks for each of p prompts to each image, and the IoU that the model expects of each.

        Args:
            pixel_values: square, `image_size` on a side; or give image_embeddings.
            input_points: x and y in pixels of the square image; q points make one prompt.
            input_labels: 1 inside, 0 outside, -1 not a point, -10 nothing; all 1 unless given.
            input_boxes: left, top, right, bottom; one for each prompt.
            input_masks: logits of a rough mask, 4 · `image_size` / `patch_size` on a side; of
                each image, or one for all; the same for all prompts.
            image_embeddings: the vision encoder's output, so that it reads an image once.
            multimask_output: three masks, for prompts that can mean several things; else the
                one of a token of its own.

        Returns:
            Logits, above 0 inside, as fine as input_masks; expected IoU, not cut to [0, 1].

        Raises:
            ValueError: no image, or two; sizes that don't fit; labels without points.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("needed is either pixel_values or image_embeddings")
        if image_embeddings is None:
            image_embeddings = self.vision_encoder(pixel_values)
        self.refuse_unfit(image_embeddings, input_points, input_labels, input_boxes, input_masks)
        if input_points is not None and input_labels is None:
            input_labels = input_points.new_ones(input_points.shape[:-1], dtype=torch.long)
        features = self.shared_image_embedding
        prompts, dense = self.prompt_encoder(
            features, input_points, input_labels, input_boxes, input_masks
        )
        places = features.grid(image_embeddings.shape[-1])
        masks, scores = self.mask_decoder(image_embeddings, places, prompts, dense)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return masks[:, :, chosen], scores[:, :, chosen]

    def refuse_unfit(
        self,
        image: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> None:
        prompt, b = self.config.prompt_encoder_config, len(image)
        side, c = prompt.grid_size, prompt.hidden_size
        wanted = {
            "image_embeddings": (image, (b, c, side, side)),
            "input_points": (points, (b, None, None, 2)),
            "input_boxes": (boxes, (b, None, 4)),
            "input_masks": (masks, (None, 1, 4 * side, 4 * side)),
        }
        if points is not None:
            wanted["input_labels"] = (labels, tuple(points.shape[:-1]))
            if boxes is not None:
                wanted["input_boxes"] = (boxes, (b, points.shape[1], 4))
        elif labels is not None:
            raise ValueError("input_labels without input_points")
        for name, (given, shape) in wanted.items():
            if given is None:
                continue
            pairs = zip(given.shape, shape, strict=False)
            if given.ndim != len(shape) or any(w not in (None, g) for g, w in pairs):
                listed = ", ".join("any" if size is None else str(size) for size in shape)
                raise ValueError(f"{name} of shape {tuple(given.shape)}; needed is ({listed})")
        if masks is not None and len(masks) not in (1, b):
            raise ValueError(f"input_masks for {len(masks)} images, and there are {b}")

    def upscale(
        self,
        masks: Float[Tensor, "p m my mx"],
        original_size: tuple[int, int],
        reshaped_size: tuple[int, int],
    ) -> Float[Tensor, "p m oy ox"]:
        """One image's mask logits at the size of the picture they were asked for.

        Enlarged to the square the encoder saw, without what filled it up at the right and
        bottom, then to the original's size; above 0 is inside.

        Args:
            masks: from `forward`, of one image.
            original_size: height and width of the picture as it came.
            reshaped_size: height and width to which it was resized, before it was filled up.

        Raises:
            ValueError: the resized picture doesn't fit into the square.
        """
        side = self.config.vision_config.image_size
        if not all(1 <= size <= side for size in reshaped_size):
            raise ValueError(f"reshaped_size={tuple(reshaped_size)} doesn't fit into {side}")
        height, width = reshaped_size
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
        masks = masks[..., :height, :width]
        return F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Sam":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, SamConfig, model_types=("sam",))
        tensors = read_tensors(folder, dtype)
        # Some files hold the frequencies under both names, some under one of them.
        twin = tensors.pop("prompt_encoder.shared_embedding.positional_embedding", None)
        if twin is not None:
            name = "shared_image_embedding.positional_embedding"
            if not torch.equal(twin, tensors.setdefault(name, twin)):
                raise CheckpointError(f"{folder}: prompts have other frequencies than {name}")
        return filled(cls, config, tensors, source=folder)
