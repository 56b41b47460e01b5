"""DeepSeek-VL (Lu et al. 2024, arXiv:2403.05525): a language model with one eye or two.

The small model reads an image with SigLIP. The large one reads it twice, with SigLIP at low
resolution and with SAM's encoder at high resolution, and lays the two side by side: as many
tokens as from SigLIP alone, each with what both saw in its place.

Axes: b batch, t token, s cached and new tokens, d hidden size of the language model, v
vocabulary; i image, c colour, y x pixel at low and Y X at high resolution, n token of an image,
e features of SigLIP, f features of SAM, h w row and column of its tokens, r row and column of the
image's tokens (n = r²), m features behind the convolutions (4 f).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache
from snippets.common.checkpoint import (
    drop_head_if_tied,
    filled,
    read_config,
    read_tensors,
)
from snippets.models.llama import LlamaConfig, LlamaModel
from snippets.multimodal.clip import layout
from snippets.multimodal.llava import merge_images
from snippets.multimodal.sam import SamVisionConfig, SamVisionEncoder, SamVisionNeck
from snippets.multimodal.siglip import SiglipVisionConfig, SiglipVisionTransformer

HEAD, TABLE = "lm_head.weight", "model.language_model.embed_tokens.weight"


def refuse_type(found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"model_type={found!r} isn't supported here, only {wanted!r}")


@dataclass(frozen=True)
class TextConfig(LlamaConfig):
    """`text_config`: DeepSeek LLM, which is built as Llama."""

    model_type: str = "llama"

    def __post_init__(self):
        refuse_type(self.model_type, "llama")
        super().__post_init__()


@dataclass(frozen=True)
class VisionConfig(SiglipVisionConfig):
    """`vision_config`, with the defaults of SigLIP."""

    model_type: str = "siglip_vision_model"

    def __post_init__(self):
        refuse_type(self.model_type, "siglip_vision_model")
        super().__post_init__()


@dataclass(frozen=True)
class HighResVisionConfig(SamVisionConfig):
    """`high_res_vision_config`, with the defaults of SAM-B."""

    model_type: str = "sam_vision_model"

    # Published, and what `mlp_ratio` says too; not read by the reference.
    INERT: ClassVar[set[str]] = {"intermediate_size", "tie_word_embeddings"}

    def __post_init__(self):
        refuse_type(self.model_type, "sam_vision_model")
        super().__post_init__()
        first, layers = [*self.global_attn_indexes, None][0], self.num_hidden_layers
        if first is None or not 0 <= first < layers:
            raise ValueError(
                f"global_attn_indexes={self.global_attn_indexes}: the first names the state that "
                f"is read besides the output, one of {layers} layers"
            )


@dataclass(frozen=True)
class DeepseekVLConfig:
    """The keys of config.json that matter here; the parts refuse what they can't honour."""

    text_config: TextConfig
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    image_token_id: int = 100015
    tie_word_embeddings: bool | None = None  # as the files are; see `from_pretrained`

    @property
    def num_image_tokens(self) -> int:
        """Placeholders that an image needs among the tokens."""
        return self.vision_config.grid**2


@dataclass(frozen=True)
class DeepseekVLHybridConfig(DeepseekVLConfig):
    """The same with a second encoder.

    Raises:
        ValueError: a language model of odd width, of which each encoder gets a half.
    """

    high_res_vision_config: HighResVisionConfig = field(default_factory=HighResVisionConfig)

    def __post_init__(self):
        if self.text_config.hidden_size % 2:
            raise ValueError(f"hidden_size={self.text_config.hidden_size} has no two halves")


class Aligner(nn.Module):
    """From an image's features to tokens: y = GELU(x W1^T + b1) W2^T + b2."""

    def __init__(self, config: DeepseekVLConfig):
        super().__init__()
        d = config.text_config.hidden_size
        self.linear1 = nn.Linear(config.vision_config.hidden_size, d)
        self.linear2 = nn.Linear(d, d)

    def forward(self, low: Float[Tensor, "i n e"]) -> Float[Tensor, "i n d"]:
        return self.linear2(F.gelu(self.linear1(low)))


class HybridAligner(nn.Module):
    """y = GELU([high W_h^T + b_h, low W_l^T + b_l]) W^T + b; each gives one half of the width."""

    def __init__(self, config: DeepseekVLHybridConfig):
        super().__init__()
        d = config.text_config.hidden_size
        high = 4 * config.high_res_vision_config.output_channels
        self.vision_proj = nn.Linear(config.vision_config.hidden_size, d // 2)
        self.high_res_vision_proj = nn.Linear(high, d // 2)
        self.proj = nn.Linear(d, d)

    def forward(
        self, low: Float[Tensor, "i n e"], high: Float[Tensor, "i n m"]
    ) -> Float[Tensor, "i n d"]:
        both = torch.cat((self.high_res_vision_proj(high), self.vision_proj(low)), -1)
        return self.proj(F.gelu(both))


class HighResProjection(nn.Module):
    """SAM's grid brought to SigLIP's: stretched to four times its side, then halved twice.

    Each convolution doubles the features, of a quarter of the places.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.side = side
        halving = {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}
        self.conv1 = nn.Conv2d(channels, 2 * channels, **halving)
        self.conv2 = nn.Conv2d(2 * channels, 4 * channels, **halving)

    def forward(self, x: Float[Tensor, "i f h w"]) -> Float[Tensor, "i m r r"]:
        size = (4 * self.side, 4 * self.side)
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return self.conv2(self.conv1(x))


class DeepseekVLModel(nn.Module):
    """Everything below the logits: the eye, the aligner, the layers."""

    def __init__(self, config: DeepseekVLConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config.vision_config)
        self.aligner = Aligner(config)
        self.language_model = LlamaModel(config.text_config)

    def see(self, pixel_values: Float[Tensor, "i c y x"]) -> Float[Tensor, "i n d"]:
        """What takes the place of an image's placeholders."""
        return self.aligner(self.vision_model(pixel_values))

    def read(
        self,
        input_ids: Int[Tensor, "b t"],
        images: Float[Tensor, "i n d"] | None,
        attention_mask: Int[Tensor, "b s"] | None,
        cache: KVCache | None,
    ) -> Float[Tensor, "b t d"]:
        """The stream behind the last norm, with images where their placeholders stand."""
        x = self.language_model.embed_tokens(input_ids)  # b t d
        past = 0 if cache is None else cache.length
        x = merge_images(input_ids, x, images, self.config.image_token_id, past)
        return self.language_model.decode(x, attention_mask, cache)


class DeepseekVLHybridModel(DeepseekVLModel):
    """The same with two eyes."""

    def __init__(self, config: DeepseekVLHybridConfig):
        super().__init__(config)
        sam = config.high_res_vision_config
        self.aligner = HybridAligner(config)
        self.high_res_vision_model = nn.ModuleDict({"vision_encoder": SamVisionEncoder(sam)})
        self.high_res_vision_neck = SamVisionNeck(sam)  # of the state inside
        self.high_res_vision_proj = HighResProjection(
            sam.output_channels, config.vision_config.grid
        )
        self.high_res_vision_alpha = nn.Parameter(torch.zeros(1))  # training begins with SAM's own

    def see_in_detail(self, pixel_values: Float[Tensor, "i c Y X"]) -> Float[Tensor, "i n m"]:
        """SAM's output, and alpha times its state behind the first layer that sees everything.

        Both go through the same convolutions; SAM's output has been through its own neck, the
        state goes through another. They follow each other row by row, as SigLIP's patches.
        """
        sam = self.high_res_vision_model["vision_encoder"]
        pixel_values = pixel_values.to(self.high_res_vision_alpha.dtype)
        output, state = sam.forward_with_state(pixel_values, sam.config.global_attn_indexes[0])
        early = self.high_res_vision_proj(self.high_res_vision_neck(state))
        x = self.high_res_vision_proj(output) + self.high_res_vision_alpha * early  # i m r r
        return x.flatten(2).transpose(1, 2)

    def see(
        self,
        pixel_values: Float[Tensor, "i c y x"],
        high_res_pixel_values: Float[Tensor, "j c Y X"],
    ) -> Float[Tensor, "i n d"]:
        """What takes the place of an image's placeholders.

        Raises:
            ValueError: not each image is there in both resolutions.
        """
        if len(pixel_values) != len(high_res_pixel_values):
            raise ValueError(
                f"{len(pixel_values)} images at low resolution, {len(high_res_pixel_values)} at "
                "high: each is needed in both"
            )
        low = self.vision_model(pixel_values)
        return self.aligner(low, self.see_in_detail(high_res_pixel_values))


class DeepseekVL(nn.Module):
    """A DeepSeek-VL that gives logits, with SigLIP alone; named as in published checkpoints."""

    config_class: type[DeepseekVLConfig] = DeepseekVLConfig
    model_class: type[DeepseekVLModel] = DeepseekVLModel
    model_types: tuple[str, ...] = ("deepseek_vl",)

    def __init__(self, config: DeepseekVLConfig):
        super().__init__()
        self.config = config
        self.model = self.model_class(config)
        if not config.tie_word_embeddings:
            text = config.text_config
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "i c y x"] | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache; for each image as many of
                `image_token_id` as `config.num_image_tokens` says.
            pixel_values: the images of the whole batch, in the order of their placeholders.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: images of another shape than the config's, another number of place
                holders than the images need, or an attention mask of another length.
        """
        images = None if pixel_values is None else self.model.see(pixel_values)
        return self.head(self.model.read(input_ids, images, attention_mask, cache))

    def head(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits of hidden states behind the last norm."""
        tied = self.config.tie_word_embeddings
        return F.linear(
            x, (self.model.language_model.embed_tokens if tied else self.lm_head).weight
        )

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts."""
        return KVCache([layer.self_attn.new_cache() for layer in self.model.language_model.layers])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "DeepseekVL":
        """Read a checkpoint folder: config.json and *.safetensors.

        The layout is that of transformers (deepseek-community); the one of the release
        (deepseek-ai, `model_type` "multi_modality") has other names and isn't read. The head is
        the embedding's matrix where the files hold no other, whatever the config says: configs
        that nobody asked say that the two are tied, of models in which they differ.

        Args:
            folder: as published; several files come with their index. SigLIP may have the level
                `vision_model` in its names, or not.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, cls.config_class, model_types=cls.model_types)
        tensors = layout(read_tensors(folder, dtype), "model.vision_model.")
        tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
        said = config.tie_word_embeddings
        tied = drop_head_if_tied(said, tensors, HEAD, TABLE, source=folder)
        config = replace(config, tie_word_embeddings=tied)
        return filled(cls, config, tensors, source=folder)


class DeepseekVLHybrid(DeepseekVL):
    """A DeepSeek-VL with SigLIP and SAM; named as in published checkpoints."""

    config_class = DeepseekVLHybridConfig
    model_class = DeepseekVLHybridModel
    model_types = ("deepseek_vl_hybrid",)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "i c y x"] | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
        high_res_pixel_values: Float[Tensor, "j c Y X"] | None = None,
    ) -> Float[Tensor, "b t v"]:
        """As `DeepseekVL`, with each image in two resolutions.

        Args:
            high_res_pixel_values: the same images as `pixel_values`, for SAM.

        Raises:
            ValueError: as there, and images that aren't there in both resolutions.
        """
        if (pixel_values is None) != (high_res_pixel_values is None):
            given = "pixel_values" if high_res_pixel_values is None else "high_res_pixel_values"
            raise ValueError(f"{given} alone: an image is needed in both resolutions")
        images = None
        if pixel_values is not None:
            images = self.model.see(pixel_values, high_res_pixel_values)
        return self.head(self.model.read(input_ids, images, attention_mask, cache))
