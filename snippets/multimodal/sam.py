"""SAM, Segment Anything (Kirillov et al. 2023, arXiv:2304.02643).

A heavy encoder reads the image once; a light decoder turns its features and a prompt (points,
boxes, a rough mask) into masks, as often as somebody asks. The encoder is ViTDet's (Li et al.
2022, arXiv:2203.16527): a ViT whose layers see windows, but for a few that see everything, with
decomposed relative positions (Li et al. 2021, arXiv:2112.01526).

Axes: b image, i colour, y and x row and column of pixels; h and w row and column of tokens, t token
(t = h·w), g window, s side of a window; d hidden size, n head, k head dim, c channel of the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snippets.common.checkpoint import (
    CheckpointError,
    is_a,
    load_weights,
    read_config,
    read_json,
    read_tensors,
)
from snippets.layers.layer_norm import LayerNorm
from snippets.layers.swiglu import ACTIVATIONS

Part = TypeVar("Part")


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


@dataclass(frozen=True)
class SamVisionConfig:
    """The keys of config.json that matter here, with ViT-B's values.

    Raises:
        ValueError: a value that this model can't honour.
    """

    hidden_size: int = 768
    output_channels: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None  # mlp_ratio · hidden_size, unless given
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    window_size: int = 14  # in tokens; 0: every layer sees everything
    global_attn_indexes: list[Any] | tuple[Any, ...] = (2, 5, 8, 11)
    num_pos_feats: int = 128  # frequencies for each coordinate of a prompt
    scale: int | float | None = None  # their spread in a fresh model of transformers'

    def __post_init__(self):
        refuse_below_one(
            self, "hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads",
            "num_channels", "image_size", "patch_size", "num_pos_feats",
        )  # fmt: skip
        refuse_activation(self)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"uneven: hidden_size={self.hidden_size}, "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"no patch: image_size={self.image_size}, patch_size={self.patch_size}"
            )
        if self.window_size < 0:
            raise ValueError(f"window_size={self.window_size} is below 0")
        if self.intermediate_size < 1:
            raise ValueError(f"mlp_dim={self.intermediate_size} is below 1")
        if not all(isinstance(i, int) for i in self.global_attn_indexes):
            raise ValueError(f"global_attn_indexes={self.global_attn_indexes} aren't whole numbers")

    @property
    def intermediate_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio) if self.mlp_dim is None else self.mlp_dim

    @property
    def grid_size(self) -> int:
        """Tokens on a side of the image."""
        return self.image_size // self.patch_size

    def window(self, number: int) -> int:
        """The side of the windows in the layer of this number, from 0; 0: it sees everything."""
        return 0 if number in self.global_attn_indexes else self.window_size


def refuse_below_one(config: Any, *names: str) -> None:
    for name in names:
        if (size := getattr(config, name)) < 1:
            raise ValueError(f"{name}={size} is below 1")


def refuse_activation(config: Any) -> None:
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"hidden_act={config.hidden_act!r} isn't supported; known: {known}")


class SamMLP(nn.Module):
    """y = act(x W1^T + b1) W2^T + b2."""

    def __init__(self, *, hidden_size: int, intermediate_size: int, hidden_act: str):
        super().__init__()
        self.activation = ACTIVATIONS[hidden_act]
        self.lin1 = nn.Linear(hidden_size, intermediate_size)
        self.lin2 = nn.Linear(intermediate_size, hidden_size)

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
            intermediate_size=config.intermediate_size,
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


class SamPatchEmbed(nn.Module):
    """Each patch of pixels to one vector; patches don't overlap."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        p = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, p, stride=p)

    def forward(self, pixel_values: Float[Tensor, "b i y x"]) -> Float[Tensor, "b h w d"]:
        return self.projection(pixel_values).movedim(1, -1)


class SamVisionEncoder(nn.Module):
    """SAM's image encoder; parameters are named as in published checkpoints."""

    def __init__(self, config: SamVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = SamPatchEmbed(config)
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
        return self.neck(self.states(pixel_values))

    def states(
        self, pixel_values: Float[Tensor, "b i y x"], layer: int = -1
    ) -> Float[Tensor, "b h w d"]:
        """The hidden state behind the layer of this number, from 0; unless given, the last.

        The neck isn't applied, and the layers behind aren't computed.

        Raises:
            ValueError: wrong channels or pixels, or no layer of this number.
        """
        last = range(self.config.num_hidden_layers)[self.number(layer)]
        x = self.embed(pixel_values)
        for block in self.layers[: last + 1]:
            x = block(x)
        return x

    def forward_with_state(
        self, pixel_values: Float[Tensor, "b i y x"], layer: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w d"]]:
        """What `forward` and `states` give, in one pass.

        Raises:
            ValueError: wrong channels or pixels, or no layer of this number.
        """
        number = self.number(layer)
        state = self.states(pixel_values, number)
        x = state
        for block in self.layers[number + 1 :]:
            x = block(x)
        return self.neck(x), state

    def number(self, layer: int) -> int:
        count = self.config.num_hidden_layers
        if not -count <= layer < count:
            raise ValueError(f"there is no layer {layer} among {count}")
        return layer % count

    def embed(self, pixel_values: Float[Tensor, "b i y x"]) -> Float[Tensor, "b h w d"]:
        c, side = self.config.num_channels, self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (c, side, side):
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)}; "
                f"the config wants (b, {c}, {side}, {side})"
            )
        x = self.patch_embed(pixel_values)
        return x + self.pos_embed if self.config.use_abs_pos else x

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
            config = read_config(folder, SamConfig, model_types=("sam",)).vision
            tensors = inside
        else:
            config = read_config(folder, SamVisionConfig, model_types=("sam_vision_model",))
            if len(inside) == len(tensors):  # transformers' SamVisionModel writes this level
                tensors = inside
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, tensors, source=folder)
        return model.eval()


@dataclass(frozen=True)
class SamConfig:
    """The keys of a whole SAM's config.json: one set of settings for each part.

    Raises:
        ValueError: a value that a part can't honour.
    """

    vision_config: dict[str, Any]

    def __post_init__(self):
        assert self.vision

    @cached_property
    def vision(self) -> SamVisionConfig:
        return read_part("vision_config", self.vision_config, SamVisionConfig)


def read_part(key: str, found: Mapping[str, Any], config_class: type[Part]) -> Part:
    """One part's settings. What isn't a field is left alone.

    Files of 2023 hold in each part all keys of a language model, at their default values.

    Raises:
        ValueError: a value of the wrong type, or one that the part can't honour.
    """
    hints = get_type_hints(config_class)
    values = {f.name: found[f.name] for f in fields(config_class) if f.name in found}
    for name, value in values.items():
        if not is_a(value, hints[name]):
            raise ValueError(f"{key}: {name}={value!r} isn't of type {hints[name]}")
    try:
        return config_class(**values)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
