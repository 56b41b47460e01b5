"""LLaVA-1.5 (Liu et al. 2023, arXiv:2310.03744; the first LLaVA: arXiv:2304.08485).

A Llama that reads pictures. CLIP's tower makes a vector of each patch, two matrices turn it into
one of the language model's width, and it stands where the text has a placeholder. From there on
it is a token like any other.

Axes: b batch (of texts), i image, c channel, y x pixel, n image token, m features of the tower,
t token, s cached and new tokens, d hidden size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache
from snippets.common.checkpoint import drop_tied_head, filled, read_config, read_tensors
from snippets.layers.swiglu import ACTIVATIONS
from snippets.models.llama import Llama, LlamaConfig
from snippets.multimodal.clip import CLIPVisionConfig, CLIPVisionTransformer, layout

IGNORED = -100  # the label that `F.cross_entropy` leaves out


@dataclass(frozen=True)
class LlavaTextConfig(LlamaConfig):
    """Llama's keys; published files leave those of a 7B Llama out."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    vocab_size: int = 32000


@dataclass(frozen=True)
class LlavaConfig:
    """The keys of config.json that matter here, with LLaVA-1.5's defaults.

    Raises:
        ValueError: a value that this model can't honour.
    """

    text_config: LlavaTextConfig = field(default_factory=LlavaTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    image_token_index: int = 32000  # the placeholder's id
    projector_hidden_act: str = "gelu"
    vision_feature_layer: int | list[int] = -2  # hidden states of the tower; 0 goes into layer 1
    vision_feature_select_strategy: str = "default"  # without the class token; "full" keeps it
    multimodal_projector_bias: bool = True

    # How many tokens an image takes follows from the tower. The tie is the text's to say.
    INERT: ClassVar[set[str]] = {
        "ignore_index", "image_seq_length", "tie_word_embeddings", "vocab_size",
    }  # fmt: skip

    def __post_init__(self):
        if self.projector_hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"projector_hidden_act={self.projector_hidden_act!r} isn't supported; "
                f"known: {known}"
            )
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r} is "
                "neither 'default' nor 'full'"
            )
        last = self.vision_config.num_hidden_layers
        if not self.layers or not all(-last - 1 <= layer <= last for layer in self.layers):
            shown = self.vision_feature_layer
            raise ValueError(f"vision_feature_layer={shown}: the tower has states 0 to {last}")

    @property
    def layers(self) -> list[int]:
        """The hidden states of the tower that are read, one behind the other."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else layers

    @property
    def tokens_per_image(self) -> int:
        """n."""
        return self.vision_config.grid**2 + (self.vision_feature_select_strategy == "full")


class LlavaProjector(nn.Module):
    """act(x W_1^T + b_1) W_2^T + b_2: from the tower's width to the language model's."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        d, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        m = config.vision_config.hidden_size * len(config.layers)
        self.linear_1, self.linear_2 = nn.Linear(m, d, bias=bias), nn.Linear(d, d, bias=bias)
        self.activation = ACTIVATIONS[config.projector_hidden_act]

    def forward(self, x: Float[Tensor, "i n m"]) -> Float[Tensor, "i n d"]:
        return self.linear_2(self.activation(self.linear_1(x)))


class Llava(nn.Module):
    """A LLaVA that gives logits; parameters are named as in published checkpoints."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = CLIPVisionTransformer(config.vision_config)
        self.multi_modal_projector = LlavaProjector(config)
        self.language_model = Llama(config.text_config)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "i c y x"] | None = None,
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache, with
                `config.tokens_per_image` placeholders for each image.
            pixel_values: the images, normalised, in the order of their placeholders, row by
                row. Those of earlier calls are in the cache.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: more or fewer placeholders than image tokens, images of another
                shape than the tower's, or a mask that isn't as long as cached and new
                tokens. The cache is as it was.
        """
        x = self.language_model.model.embed_tokens(input_ids)  # b t d
        features = None if pixel_values is None else self.image_features(pixel_values)
        past = 0 if cache is None else cache.length
        x = merge_images(input_ids, x, features, self.config.image_token_index, past)
        return self.language_model.head(self.language_model.model.decode(x, attention_mask, cache))

    def image_features(self, pixel_values: Float[Tensor, "i c y x"]) -> Float[Tensor, "i n d"]:
        """What stands in the stream for each image: n vectors of the language model's width."""
        states = [self.vision_tower.states(pixel_values, layer) for layer in self.config.layers]
        x = torch.cat(states, dim=-1)  # i n(+1) m
        if self.config.vision_feature_select_strategy == "default":
            x = x[:, 1:]
        return self.multi_modal_projector(x)

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts."""
        return self.language_model.new_cache()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Llava":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, LlavaConfig, model_types=("llava",))
        tensors = layout(read_tensors(folder, dtype), "vision_tower.")
        # Files of 2023 hold the rotary frequencies, which follow from the config.
        tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
        if config.text_config.tie_word_embeddings:
            head, rows = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
            drop_tied_head(tensors, head, rows, source=folder)
        return filled(cls, config, tensors, source=folder)


# What every model with placeholders does


def merge_images(
    input_ids: Int[Tensor, "b t"],
    embedded: Float[Tensor, "b t d"],
    features: Float[Tensor, "*images d"] | None,
    image_token: int,
    past: int = 0,
) -> Float[Tensor, "b t d"]:
    """The embedded tokens, with the images' vectors in place of the placeholders.

    Behind a prompt, a placeholder without an image is one that the model itself wrote: a token
    like any other, whose row stays.

    Args:
        input_ids: the tokens.
        embedded: what the language model makes of them; a placeholder's row is thrown away.
        features: of the images, in the order of their placeholders; None without images.
        image_token: the placeholder's id.
        past: tokens in the cache.

    Raises:
        ValueError: more or fewer placeholders than image tokens.
    """
    if features is None and past > 0:
        return embedded
    places = input_ids == image_token  # b t
    tokens = 0 if features is None else features.shape[:-1].numel()
    # A graph of torch.compile can't look at numbers; there the count is the caller's.
    if not torch.compiler.is_compiling() and (found := int(places.sum())) != tokens:
        raise ValueError(
            f"{found} placeholders (id {image_token}) in input_ids, and {tokens} image tokens "
            "in the features"
        )
    if features is None:
        return embedded
    return embedded.masked_scatter(places[..., None], features.to(embedded.dtype))


def expand_placeholders(ids: Sequence[int], counts: Sequence[int], image_token: int) -> list[int]:
    """A prompt with one placeholder an image, as tokenized, with as many as the image has tokens.

    Args:
        ids: of one prompt.
        counts: tokens of each image, in their order.
        image_token: the placeholder's id.

    Raises:
        ValueError: more or fewer placeholders than images.
    """
    if (found := sum(token == image_token for token in ids)) != len(counts):
        raise ValueError(f"{found} placeholders (id {image_token}) for {len(counts)} images")
    left = iter(counts)
    repeats = (next(left) if token == image_token else 1 for token in ids)
    return [token for token, times in zip(ids, repeats, strict=True) for _ in range(times)]


def text_labels(
    input_ids: Int[Tensor, "b t"],
    image_token: int,
    attention_mask: Int[Tensor, "b t"] | None = None,
) -> Int[Tensor, "b t"]:
    """What training asks for: the tokens, and -100, which counts for nothing, where there is none.

    An image's tokens are no words: the head has no row for what they hold. Shift as for any
    language model: logits t are judged by label t + 1.
    """
    ignored = input_ids == image_token
    if attention_mask is not None:
        ignored = ignored | (attention_mask == 0)
    return input_ids.masked_fill(ignored, IGNORED)
