"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): CLIP with a yes or no for each pair.

The loss asks of every image and every text, alone, whether they belong together; no softmax
over the batch. The towers differ from CLIP's in that the text isn't causal and is read off its
last position, and in that a learned query pools the patches in place of a class token.

Axes: as in `snippets/multimodal/clip.py`; one is the query of the pooling.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.attention.multi_head import allowed_pairs
from snippets.common.checkpoint import filled, read_config, read_tensors
from snippets.layers.layer_norm import LayerNorm
from snippets.multimodal.clip import (
    CLIPVisionConfig,
    Encoder,
    EncoderConfig,
    EncoderMLP,
    TextEmbeddings,
    drop_position_ids,
    refuse_images,
    resized_positions,
    unit,
)


@dataclass(frozen=True)
class SiglipVisionConfig(CLIPVisionConfig):
    """`vision_config` of config.json, with the defaults of the base model (224, patch 16)."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    patch_size: int = 16
    vision_use_head: bool = True


class SiglipVisionEmbeddings(nn.Module):
    """Patches through a linear map with a bias, and positions; no class token."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, d, p, stride=p)
        self.position_embedding = nn.Embedding(config.grid**2, d)
        nn.init.normal_(self.position_embedding.weight, std=d**-0.5)

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b n d"]:
        config, weight = self.config, self.patch_embedding.weight
        refuse_images(
            pixel_values,
            channels=config.num_channels,
            size=config.image_size,
            patch=config.patch_size,
            any_size=interpolate_pos_encoding,
        )
        patches = self.patch_embedding(pixel_values.to(weight.dtype))  # b d rows columns
        rows, columns = patches.shape[2:]
        positions = self.position_embedding.weight  # n d
        if (rows, columns) != (config.grid, config.grid):
            positions = resized_positions(positions, rows, columns)
        return patches.flatten(2).transpose(1, 2) + positions


class PoolingAttention(nn.Module):
    """Multi-head attention of a query from outside; named as `nn.MultiheadAttention`."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        # The matrices of queries, keys and values in one, in this order.
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: Float[Tensor, "b one d"], x: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b one d"]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = (F.linear(y, w, c) for y, w, c in zip((query, x, x), weights, biases, strict=True))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v)  # b h one k
        return self.out_proj(y.transpose(1, 2).flatten(2))


class PoolingHead(nn.Module):
    """A learned query looks at all patches: y = attention(probe, x); y + mlp(norm(y))."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        d = config.hidden_size
        self.probe = nn.Parameter(torch.randn(1, 1, d) * d**-0.5)
        self.attention = PoolingAttention(config)
        self.layernorm = LayerNorm(hidden_size=d, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        y = self.attention(self.probe.expand(len(x), -1, -1), x)  # b one d
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class SiglipVisionTransformer(nn.Module):
    """From pixels to a vector a patch; `pool` makes one of them all."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)
        if config.vision_use_head:
            self.head = PoolingHead(config)

    def forward(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b n d"]:
        """The patches behind the last norm.

        Args:
            pixel_values: normalised images.
            interpolate_pos_encoding: take images of any size, and stretch the positions.

        Raises:
            ValueError: images of another shape than the config's.
        """
        x = self.states(pixel_values, -1, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.post_layernorm(x)

    def states(
        self,
        pixel_values: Float[Tensor, "b c y x"],
        layer: int,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> Float[Tensor, "b n d"]:
        """Hidden state number `layer`, as in CLIP's tower: without the last norm."""
        x = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return self.encoder(x, layer=layer)

    def pool(self, last_hidden_state: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """One vector an image.

        Raises:
            ValueError: the tower has no head.
        """
        if not self.config.vision_use_head:
            raise ValueError("vision_use_head=False: this tower has no head to pool with")
        return self.head(last_hidden_state)


@dataclass(frozen=True)
class SiglipTextConfig(EncoderConfig):
    """`text_config` of config.json, with the defaults of the base model."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    projection_size: int | None = None  # hidden_size

    INERT: ClassVar[set[str]] = {"tie_word_embeddings"}

    def __post_init__(self):
        super().__post_init__()
        if self.pooled_size < 1:
            raise ValueError(f"projection_size={self.pooled_size} is below 1")

    @property
    def pooled_size(self) -> int:
        return self.hidden_size if self.projection_size is None else self.projection_size


class SiglipTextTransformer(nn.Module):
    """A transformer over the text that looks both ways; its vector is the LAST position's.

    That is where padding stands: train and use it with texts padded to one length, as the
    published models are (64 tokens, and no mask).
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            hidden_size=config.hidden_size,
        )
        self.encoder = Encoder(config)
        self.final_layer_norm = LayerNorm(hidden_size=config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.pooled_size)

    def forward(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """All tokens, and the last one through the head.

        Raises:
            ValueError: more tokens than positions, or a mask of another shape.
        """
        b, t = input_ids.shape
        x = self.embeddings(input_ids)
        heads = self.config.num_attention_heads
        mask = allowed_pairs(attention_mask, b, t, t, num_heads=heads, causal=False)
        x = self.final_layer_norm(self.encoder(x, mask))  # b t d
        return x, self.head(x[:, -1])


@dataclass(frozen=True)
class SiglipConfig:
    """The keys of config.json that matter here, with the defaults of the base model.

    Raises:
        ValueError: towers that end in different sizes, or a vision tower without its head.
    """

    text_config: SiglipTextConfig = field(default_factory=SiglipTextConfig)
    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)

    INERT: ClassVar[set[str]] = {"tie_word_embeddings"}

    def __post_init__(self):
        text, image = self.text_config.pooled_size, self.vision_config.hidden_size
        if text != image:
            raise ValueError(f"no common space: texts end in {text} features, images in {image}")
        if not self.vision_config.vision_use_head:
            raise ValueError("vision_use_head=False: an image has no single vector")


class SigLIP(nn.Module):
    """Two towers that end in one space; named as in published checkpoints."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        self.config = config
        self.text_model = SiglipTextTransformer(config.text_config)
        self.vision_model = SiglipVisionTransformer(config.vision_config)
        # Where training starts, by the paper: most pairs don't belong together, and the
        # bias says so before anything is learned.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def forward(
        self,
        input_ids: Int[Tensor, "j t"],
        pixel_values: Float[Tensor, "i c y x"],
        attention_mask: Int[Tensor, "j t"] | None = None,
        *,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Float[Tensor, "i j"], Float[Tensor, "j i"]]:
        """logits_per_image and logits_per_text: their sigmoid is a pair's probability.

        exp(logit_scale) times the cosine, plus logit_bias.

        Args:
            input_ids: the texts, of whatever number, padded to one length.
            pixel_values: the images, normalised.
            attention_mask: 1 for tokens and 0 for padding; published models take none.
            interpolate_pos_encoding: take images of any size.

        Raises:
            ValueError: images, texts or a mask of a shape that doesn't fit.
        """
        texts = self.encode_text(input_ids, attention_mask)  # j p
        images = self.encode_image(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
        )  # i p
        logits_per_text = self.logit_scale.exp() * (texts @ images.T) + self.logit_bias  # j i
        return logits_per_text.T, logits_per_text

    def encode_image(
        self, pixel_values: Float[Tensor, "b c y x"], *, interpolate_pos_encoding: bool = False
    ) -> Float[Tensor, "b p"]:
        """A vector of length 1 for each image."""
        x = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return unit(self.vision_model.pool(x))

    def encode_text(
        self, input_ids: Int[Tensor, "b t"], attention_mask: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b p"]:
        """A vector of length 1 for each text."""
        _, pooled = self.text_model(input_ids, attention_mask)
        return unit(pooled)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "SigLIP":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, SiglipConfig, model_types=("siglip",))
        tensors = read_tensors(folder, dtype)
        drop_position_ids(tensors, "text_model.", "vision_model.")
        return filled(cls, config, tensors, source=folder)


def sigmoid_loss(logits: Float[Tensor, "j i"]) -> Float[Tensor, ""]:
    """Each pair alone: does this text belong to this image?

    -(1/b) sum over all b² pairs of log sigmoid(z logits), z = 1 on the diagonal, else -1.

    Raises:
        ValueError: not as many texts as images.
    """
    j, i = logits.shape
    if j != i:
        raise ValueError(f"{j} texts and {i} images are no pairs")
    z = 2 * torch.eye(j, dtype=logits.dtype, device=logits.device) - 1  # j i
    return -F.logsigmoid(z * logits).sum() / j
