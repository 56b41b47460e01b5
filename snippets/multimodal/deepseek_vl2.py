"""DeepSeek-VL2 (Wu et al. 2024, arXiv:2412.10302).

An image is cut into tiles, however wide or high it is. SigLIP reads each tile and a thumbnail
of the whole; four neighbouring patches become one token; a learned vector ends each line of
tokens, another one stands between thumbnail and tiles. A language model with experts reads on.

Axes: b batch, t token, s cached and new tokens, d hidden size of the language model, v
vocabulary, n image, k view (a thumbnail or a tile), c channel, h and w pixels, p patch of a
view, q token of a view, e width of the vision tower, r side of a square of patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache
from snippets.common.checkpoint import filled, read_config, read_json, read_tensors
from snippets.models.deepseek_v2 import DeepseekV2, DeepseekV2Config, DeepseekV2Layer
from snippets.models.llama import LlamaLayer
from snippets.multimodal.llava import merge_images
from snippets.multimodal.siglip import SiglipVisionConfig, SiglipVisionTransformer

IMAGE = "<image>"  # how the placeholder is written; its number is the tokenizer's
BIAS = "e_score_correction_bias"  # stays as it is: its steps are finer than bfloat16's
# Parts of the vision tower: in the files, which follow timm, and in `SiglipVisionTransformer`.
TOWER = {
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.blocks.": "vision.encoder.layers.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.attn_pool.latent": "vision.head.probe",
    "vision.attn_pool.proj.": "vision.head.attention.out_proj.",
    "vision.attn_pool.norm.": "vision.head.layernorm.",
    "vision.attn_pool.mlp.": "vision.head.mlp.",
}


@dataclass(frozen=True)
class VisionConfig:
    """`vision_config`: SigLIP in timm's words, with the defaults of the released code."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    global_pool: str = "map"  # a head that pools; "": none
    ignore_head: bool = True  # it is there, and nobody asks it
    class_token: bool = False
    num_classes: int = 0

    INERT: ClassVar[set[str]] = {
        "deterministic", "model_name", "num_recomputing_layers", "use_checkpoint", "weight_init",
    }  # fmt: skip

    def __post_init__(self):
        if not self.ignore_head or self.class_token or self.num_classes:
            raise ValueError(
                f"ignore_head={self.ignore_head}, class_token={self.class_token}, "
                f"num_classes={self.num_classes} isn't supported: all patches are read, no other"
            )
        if self.global_pool not in ("map", ""):
            raise ValueError(f"global_pool={self.global_pool!r} isn't supported, only 'map' and ''")
        self.tower  # noqa: B018 - refuses what doesn't fit

    @property
    def tower(self) -> SiglipVisionConfig:
        """The same in SigLIP's own words."""
        return SiglipVisionConfig(
            hidden_size=self.width,
            intermediate_size=int(self.width * self.mlp_ratio),
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            vision_use_head=self.global_pool == "map",
        )


@dataclass(frozen=True)
class ProjectorConfig:
    """`projector_config`: from the tower's patches to the language model's tokens."""

    projector_type: str = "downsample_mlp_gelu"
    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2
    token_pooling: bool = False

    def __post_init__(self):
        if self.projector_type != "downsample_mlp_gelu" or self.token_pooling:
            raise ValueError(
                f"projector_type={self.projector_type!r} with token_pooling={self.token_pooling} "
                "isn't supported"
            )
        if min(self.downsample_ratio, self.mlp_ratio, self.depth - 1) < 1:
            raise ValueError(
                f"downsample_ratio={self.downsample_ratio}, mlp_ratio={self.mlp_ratio} or "
                f"depth={self.depth} is too small"
            )


@dataclass(frozen=True)
class LanguageConfig(DeepseekV2Config):
    """`language_config`: DeepSeek-V2's keys with the defaults of VL2's code, and `use_mla`.

    Tiny has plain attention, Small DeepSeek-V2's parts, and VL2 itself latent attention with
    DeepSeek-V3's router.

    Raises:
        ValueError: a value that this model can't honour.
    """

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    kv_lora_rank: int | None = 512
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    use_mla: bool = True

    INERT: ClassVar[set[str]] = {"lm_head", "rm_head"}

    def __post_init__(self):
        super().__post_init__()
        if self.use_mla and not self.kv_lora_rank:
            raise ValueError(f"use_mla=True with kv_lora_rank={self.kv_lora_rank}")

    def refuse_routing(self) -> None:
        """Both routers, V2's and V3's; unlike V2's release, weights are divided, then scaled."""
        if (self.scoring_func, self.topk_method) not in (
            ("softmax", "greedy"),
            ("softmax", "group_limited_greedy"),
            ("sigmoid", "noaux_tc"),
        ):
            raise ValueError(
                f"scoring_func={self.scoring_func!r} with topk_method={self.topk_method!r} "
                "isn't DeepSeek-VL2's"
            )
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            raise ValueError("norm_topk_prob=True has no meaning for num_experts_per_tok=1")

    @property
    def size_of_head(self) -> int:
        """The features that turn: a part of the head in latent attention, else all."""
        whole = self.hidden_size // self.num_attention_heads
        return self.qk_rope_head_dim if self.use_mla else whole


@dataclass(frozen=True)
class DeepseekVL2Config:
    """The keys of config.json that matter here.

    Raises:
        ValueError: a value that this model can't honour.
    """

    language_config: LanguageConfig
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projector_config: ProjectorConfig = field(default_factory=ProjectorConfig)
    tile_tag: str = "2D"
    global_view_pos: str = "head"  # "tail": thumbnail behind the tiles
    candidate_resolutions: list | None = None  # widths and heights; for whoever cuts the images
    image_token_id: int | None = None  # not in published files; see `from_pretrained`

    def __post_init__(self):
        if self.tile_tag != "2D":
            raise ValueError(f"tile_tag={self.tile_tag!r} isn't supported, only '2D'")
        if self.global_view_pos not in ("head", "tail"):
            raise ValueError(f"global_view_pos={self.global_view_pos!r} is neither head nor tail")
        width, into = self.vision_config.width, self.projector_config.input_dim
        if width != into:
            raise ValueError(f"vision_config: width={width} isn't input_dim={into}")
        out, hidden = self.projector_config.n_embed, self.language_config.hidden_size
        if out != hidden:
            raise ValueError(f"projector_config: n_embed={out} isn't hidden_size={hidden}")

    @property
    def side(self) -> int:
        """Tokens in a line of one view."""
        return math.ceil(self.vision_config.tower.grid / self.projector_config.downsample_ratio)


def gather_patches(x: Float[Tensor, "k p e"], ratio: int) -> Float[Tensor, "k q err"]:
    """Each `ratio` x `ratio` square of patches as one, with all their features.

    What an odd side lacks is zeros, at the right and below. Feature e of the patch in row i and
    column j of its square becomes feature e ratio² + i ratio + j. The papers say pixel shuffle;
    it is the way back.
    """
    side = math.isqrt(x.shape[1])
    grid = x.transpose(1, 2).unflatten(-1, (side, side))  # k e side side
    lacking = -side % ratio
    grid = F.pad(grid, (0, lacking, 0, lacking))
    return F.pixel_unshuffle(grid, ratio).flatten(2).transpose(1, 2)


class Projector(nn.Module):
    """An MLP on `gather_patches`."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.ratio = config.downsample_ratio
        width = config.n_embed * config.mlp_ratio
        layers = [nn.Linear(config.input_dim * self.ratio**2, width)]
        for _ in range(config.depth - 2):
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers, nn.GELU(), nn.Linear(width, config.n_embed))

    def forward(self, x: Float[Tensor, "k p e"]) -> Float[Tensor, "k q d"]:
        return self.layers(gather_patches(x, self.ratio))


def num_image_tokens(columns: int, rows: int, side: int = 14) -> int:
    """Of an image cut in so many tiles, with `side` tokens in a line of one view.

    Both the thumbnail and the tiles' common grid end each line with a token; one is between.
    """
    return side * (side + 1) + 1 + rows * side * (columns * side + 1)


def in_lines(grid: Float[Tensor, "i j d"], newline: Float[Tensor, " d"]) -> Float[Tensor, "t d"]:
    """A grid of tokens row by row, each row with `newline` behind it."""
    ends = newline.expand(len(grid), 1, -1)
    return torch.cat((grid, ends), dim=1).flatten(0, 1)


class DeepseekVL2Layer(DeepseekV2Layer):
    """A DeepSeek-V2 layer, or with Llama's attention in place of the latent one."""

    def attention(self, config: LanguageConfig, number: int) -> nn.Module:
        if config.use_mla:
            return super().attention(config, number)
        return LlamaLayer.attention(self, config, number)


class DeepseekVL2Language(DeepseekV2):
    """The language model, which can also be fed with ids alone."""

    config_class = LanguageConfig
    layer_class = DeepseekVL2Layer


class DeepseekVL2(nn.Module):
    """A DeepSeek-VL2 that gives logits.

    Parameters are named as in published checkpoints; those of the tower as in SigLIP's, and
    `of_tower` translates.
    """

    def __init__(self, config: DeepseekVL2Config):
        super().__init__()
        self.config = config
        d = config.projector_config.n_embed
        self.vision = SiglipVisionTransformer(config.vision_config.tower)
        self.projector = Projector(config.projector_config)
        self.image_newline = nn.Parameter(d**-0.5 * torch.randn(d))
        self.view_seperator = nn.Parameter(d**-0.5 * torch.randn(d))  # spelt so in files
        self.language = DeepseekVL2Language(config.language_config)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "k c h w"] | None = None,
        tiles: Int[Tensor, "n 2"] | Sequence[Sequence[int]] | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache. An image has as many of
                `image_token_id` as `num_image_tokens` says.
            pixel_values: the views of all images of the batch, one after the other in the order
                of their placeholders; of each image the thumbnail, then its tiles row by row.
                Nothing is filled up: an image with less tiles has less views.
            tiles: columns and rows of each image.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: views of another size than the tower's; not as many views as the tiles
                need, or image tokens as the images give; views without tiles, or tiles without
                views; a mask that isn't as long as cached and new tokens.
        """
        if (pixel_values is None) != (tiles is None):
            raise ValueError("pixel_values and tiles come together, or neither comes")
        x = self.language.model.embed_tokens(input_ids)  # b t d
        token = self.config.image_token_id
        if pixel_values is not None and token is None:
            raise ValueError("image_token_id isn't known, which stands where an image is")
        if token is not None:
            features = None if pixel_values is None else self.image_features(pixel_values, tiles)
            x = merge_images(input_ids, x, features, token, 0 if cache is None else cache.length)
        return self.language.head(self.language.model.decode(x, attention_mask, cache))

    def image_features(
        self,
        pixel_values: Float[Tensor, "k c h w"],
        tiles: Int[Tensor, "n 2"] | Sequence[Sequence[int]],
    ) -> Float[Tensor, "t d"]:
        """What stands in the place of the image tokens, of all images one after the other."""
        tiles = [(int(columns), int(rows)) for columns, rows in tiles]
        if not tiles or any(columns < 1 or rows < 1 for columns, rows in tiles):
            raise ValueError(f"no image, or an image without tiles: {tiles}")
        counts = [1 + columns * rows for columns, rows in tiles]
        if len(pixel_values) != sum(counts):
            raise ValueError(f"{len(pixel_values)} views, {tiles} tiles need {sum(counts)}")
        views = self.projector(self.vision(pixel_values))  # k q d
        images = zip(views.split(counts), tiles, strict=True)
        return torch.cat([self.lay_out(one, *grid) for one, grid in images])

    def lay_out(
        self, views: Float[Tensor, "k q d"], columns: int, rows: int
    ) -> Float[Tensor, "t d"]:
        """The tokens of one image: the thumbnail's lines, a separator, the lines of the tiles.

        Tiles are put together before they are read: a line runs through all columns.
        """
        grids = views.unflatten(1, (self.config.side, -1))  # k side side d
        joined = grids[1:].unflatten(0, (rows, columns)).transpose(1, 2)  # rows side columns side d
        whole = in_lines(grids[0], self.image_newline)
        parts = in_lines(joined.flatten(2, 3).flatten(0, 1), self.image_newline)
        first, last = (whole, parts) if self.config.global_view_pos == "head" else (parts, whole)
        return torch.cat((first, self.view_seperator[None], last))

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts."""
        return self.language.new_cache()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, image_token_id: int | None = None
    ) -> "DeepseekVL2":
        """Read a checkpoint folder: config.json and *.safetensors.

        The published config.json doesn't say which token stands for an image. It is looked up in
        tokenizer.json, where there is one that knows it; else images are refused.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.
            image_token_id: of the placeholder, where the folder doesn't say it.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, DeepseekVL2Config, model_types=("deepseek_vl_v2",))
        if image_token_id is None and config.image_token_id is None:
            image_token_id = find_image_token(folder)
        if image_token_id is not None:
            config = replace(config, image_token_id=image_token_id)
        tensors = {
            name: tensor if dtype is None or name.endswith(BIAS) else tensor.to(dtype)
            for name, tensor in of_tower(read_tensors(folder)).items()
        }
        return filled(cls, config, tensors, source=folder)


def of_tower(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, those of the vision tower under the names that SigLIP gives them.

    Where one matrix makes queries, keys and values, it is cut in three.
    """
    renamed = {name: x for name, x in tensors.items() if not name.startswith("vision.")}
    for name in tensors.keys() - renamed.keys():
        tensor = tensors[name]
        for old, new in TOWER.items():
            name = name.replace(old, new)
        if ".attn.qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=False)
            renamed |= {name.replace(".attn.qkv.", f".self_attn.{x}_proj."): y for x, y in parts}
        elif name == "vision.pos_embed":
            renamed["vision.embeddings.position_embedding.weight"] = tensor.flatten(0, -2)
        else:
            renamed[name] = tensor
    for kind in ("weight", "bias"):  # of the head, whose query comes from elsewhere
        pool = [f"vision.attn_pool.{x}.{kind}" for x in ("q", "kv")]
        if all(name in renamed for name in pool):
            both = torch.cat([renamed.pop(name) for name in pool])
            renamed[f"vision.head.attention.in_proj_{kind}"] = both
    return renamed


def find_image_token(folder: str | Path) -> int | None:
    """The number of `<image>` in tokenizer.json; None without the file, or the token in it."""
    path = Path(folder) / "tokenizer.json"
    added = read_json(path).get("added_tokens", []) if path.is_file() else []
    return next((token["id"] for token in added if token["content"] == IMAGE), None)
