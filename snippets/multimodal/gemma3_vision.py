"""Gemma 3 that sees (Gemma Team 2025, arXiv:2503.19786).

A SigLIP tower reads an image of one fixed size; its patches are averaged down to a fixed number
of tokens, 256 in the published models, which stand in the text. The tokens of one image see each
other, also those behind them, in every layer; all else is causal.

Axes: as in `snippets/models/gemma3.py`, and n image, c channel, y x pixel, p patch, m token of
an image, e features of a patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache, allowed_keys
from snippets.common.checkpoint import drop_tied_head, filled, read_config, read_tensors
from snippets.layers.rmsnorm import UnitOffsetRMSNorm
from snippets.models.gemma3 import Gemma3, Gemma3Config
from snippets.multimodal.clip import layout
from snippets.multimodal.llava import merge_images
from snippets.multimodal.siglip import SiglipVisionConfig, SiglipVisionTransformer


@dataclass(frozen=True)
class Gemma3VisionConfig:
    """The keys of config.json that matter here; the parts have defaults of their own.

    Raises:
        ValueError: a number of tokens that isn't a square, or doesn't divide the patches.
    """

    text_config: Gemma3Config
    vision_config: SiglipVisionConfig
    mm_tokens_per_image: int = 256
    boi_token_index: int = 255999  # stands before an image's tokens
    eoi_token_index: int = 256000  # and behind them
    image_token_index: int = 262144  # holds the place of each
    tie_word_embeddings: bool = True  # counts, whatever text_config says

    def __post_init__(self):
        tokens, grid = self.mm_tokens_per_image, self.vision_config.grid
        if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(f"mm_tokens_per_image={tokens} isn't the square of a side")
        if grid % self.side:
            raise ValueError(f"uneven: {grid} patches a side, {self.side} tokens a side")

    @property
    def side(self) -> int:
        """Tokens along a side of an image."""
        return math.isqrt(self.mm_tokens_per_image)


class Gemma3Projector(nn.Module):
    """From patches to tokens: norm(mean of a square of patches) M, with M as e d."""

    def __init__(self, config: Gemma3VisionConfig):
        super().__init__()
        vision, d = config.vision_config, config.text_config.hidden_size
        self.side, self.square = config.side, vision.grid // config.side
        self.mm_soft_emb_norm = UnitOffsetRMSNorm(
            hidden_size=vision.hidden_size, eps=vision.layer_norm_eps
        )
        weight = torch.randn(vision.hidden_size, d) * vision.hidden_size**-0.5
        self.mm_input_projection_weight = nn.Parameter(weight)

    def forward(self, patches: Float[Tensor, "n p e"]) -> Float[Tensor, "n m d"]:
        squares = patches.unflatten(1, (self.side, self.square, self.side, self.square))
        pooled = squares.mean((2, 4)).flatten(1, 2)  # n m e
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


class Gemma3Vision(nn.Module):
    """A Gemma 3 that reads text with images; named as in published checkpoints."""

    def __init__(self, config: Gemma3VisionConfig):
        super().__init__()
        self.config = config
        text = replace(config.text_config, tie_word_embeddings=config.tie_word_embeddings)
        self.vision_tower = SiglipVisionTransformer(config.vision_config)
        self.multi_modal_projector = Gemma3Projector(config)
        self.language_model = Gemma3(text)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "n c y x"] | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache; where an image stands,
                `image_token_index`, m times.
            pixel_values: the images, normalised, in the order of their tokens, row by row; a row
                may have several, or none. Those of earlier calls are in the cache.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: images of another size, more or fewer image tokens than they have, or a
                part of an image's tokens, as where a prompt is cut into chunks.
        """
        past = 0 if cache is None else cache.length
        if pixel_values is None and past > 0 and input_ids.shape[1] == 1:
            # A lone token that the model wrote: a word, even if it is the image token.
            return self.language_model(input_ids, attention_mask, cache)
        model, image_token = self.language_model.model, self.config.image_token_index
        is_image = input_ids == image_token  # b t
        refuse_parts(is_image, self.config.mm_tokens_per_image)
        features = None if pixel_values is None else self.encode_images(pixel_values)
        # The placeholder needs no row in the table. Words are scaled by sqrt(d), images not.
        words = model.embed(input_ids.masked_fill(is_image, 0))
        x = merge_images(input_ids, words, features, image_token)
        pairs = None if features is None else image_pairs(is_image, attention_mask, past)
        return self.language_model.head(model.decode(x, attention_mask, cache, pairs))

    def encode_images(self, pixel_values: Float[Tensor, "n c y x"]) -> Float[Tensor, "n m d"]:
        """The tokens of each image, as the first layer reads them."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts; layers with a window keep no more than it."""
        return self.language_model.new_cache()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None
    ) -> "Gemma3Vision":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index. The tower may have the
                level `vision_model` in its names, or not.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, Gemma3VisionConfig, model_types=("gemma3",))
        tensors = layout(read_tensors(folder, dtype), "vision_tower.")
        if config.tie_word_embeddings:
            head, table = (
                f"language_model.{name}.weight" for name in ("lm_head", "model.embed_tokens")
            )
            drop_tied_head(tensors, head, table, source=folder)
        return filled(cls, config, tensors, source=folder)


# Who sees whom


def run_starts(is_image: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Where a run of image tokens begins."""
    return is_image & ~F.pad(is_image, (1, 0))[:, :-1]


def image_pairs(
    is_image: Bool[Tensor, "b t"], attention_mask: Int[Tensor, "b s"] | None, past: int
) -> Bool[Tensor, "b 1 t s"]:
    """True where a token may attend: to itself and its past, and within a run of image tokens.

    Nobody attends to padding. Layers with a window cut the past, not what lies ahead: an image
    longer than the window is still seen to its end. A run is one image where the end of an image
    stands behind it, as in every prompt of the release; images that touch are one run.

    Args:
        past: cached tokens, before the t new ones.
    """
    b, t = is_image.shape
    if attention_mask is None:
        attention_mask = is_image.new_ones(b, past + t, dtype=torch.long)
    causal = allowed_keys(attention_mask, b, t, past)  # b 1 t s
    run = run_starts(is_image).cumsum(-1)  # b t
    same = (run[:, :, None] == run[:, None]) & is_image[:, :, None] & is_image[:, None]  # b t t
    same = same & attention_mask[:, None, past:].bool()
    return causal | F.pad(same, (past, 0))[:, None]


# What stands where


def run_lengths(is_image: Bool[Tensor, "b t"]) -> Int[Tensor, " runs"]:
    """Tokens of each run, row after row."""
    numbers = run_starts(is_image).flatten().cumsum(0)  # over all rows: no run crosses to the next
    return numbers[is_image.flatten()].bincount()[1:]


def refuse_parts(is_image: Bool[Tensor, "b t"], tokens: int) -> None:
    """Raise ValueError unless each run is that of whole images, of so many tokens each."""
    if torch.compiler.is_compiling():  # a graph can't look at numbers
        return
    lengths = run_lengths(is_image)
    if (lengths % tokens).any():
        raise ValueError(
            f"runs of {lengths.tolist()} image tokens, an image has {tokens}: a prompt holds whole "
            "images, and so does each chunk of it, since their tokens see each other"
        )


def place_images(
    input_ids: Sequence[int], config: Gemma3VisionConfig, around: Sequence[int] = ()
) -> list[int]:
    """A prompt as the model reads it: at each begin-of-image token the whole image.

    `around`, the begin, m image tokens, the end, `around`. The release puts its token of two
    line breaks around.
    """
    image = [config.boi_token_index]
    image += [config.image_token_index] * config.mm_tokens_per_image + [config.eoi_token_index]
    found: list[int] = []
    for token in input_ids:
        found += [*around, *image, *around] if token == config.boi_token_index else [token]
    return found


def pan_and_scan(
    height: int, width: int, *, min_size: int = 256, most: int = 4, min_ratio: float = 1.2
) -> list[tuple[int, int, int, int]]:
    """Crops of a long image that are shown besides the whole, as (left, top, right, bottom).

    Optional in the release, and off unless asked for. Along the longer side there are as many
    as its ratio to the shorter one says, from 2 to `most`; none below `min_ratio`, or where a
    crop would have a side below `min_size`.
    """
    long, short = max(height, width), min(height, width)
    if long / short < min_ratio:
        return []
    number = min(most, max(2, min(long // min_size, math.floor(long / short + 0.5))))
    step = math.ceil(long / number)
    if min(step, short) < min_size:
        return []
    spans = [(i * step, min((i + 1) * step, long)) for i in range(number)]
    if width >= height:
        return [(start, 0, end, height) for start, end in spans]
    return [(0, start, width, end) for start, end in spans]
