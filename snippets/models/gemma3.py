"""Gemma 3 (Gemma Team 2025, arXiv:2503.19786), the language model.

Five layers with a window for each one that sees everything, the two kinds with rotary bases of
their own; norms on queries and keys, and before and behind each sublayer; GeGLU; a stream that
starts as sqrt(d) times the embedding.

Axes: as in `snippets/models/llama.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import KVCache, LayerCache, places
from snippets.attention.sliding_window import attention_with_window
from snippets.common.checkpoint import drop_tied_head, filled, read_config, read_tensors
from snippets.layers.rmsnorm import UnitOffsetRMSNorm
from snippets.layers.swiglu import ACTIVATIONS, GatedMLP
from snippets.position.context_extension import scaled_frequencies
from snippets.position.rope import rope_table

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Gemma3Config:
    """The keys of config.json that matter here, with Gemma 3's defaults.

    Raises:
        ValueError: a value that this model can't honour.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int = 262208
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    query_pre_attn_scalar: int | float = 256  # scores are divided by its root
    sliding_window: int | None = 4096  # tokens, the token itself counted
    sliding_window_pattern: int = 6  # every so many-th layer sees everything
    layer_types: list[str] | None = None  # says the same for each layer
    rope_theta: float = 1000000.0
    rope_local_base_freq: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # of the layers that see everything
    rope_parameters: dict[str, Any] | None = None  # all of the last three, by type of layer
    tie_word_embeddings: bool = True
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool = False

    def __post_init__(self):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name}={size} is below 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"uneven: num_attention_heads={self.num_attention_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.hidden_activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"hidden_activation={self.hidden_activation!r} isn't supported; known: {known}"
            )
        if not self.query_pre_attn_scalar > 0:
            raise ValueError(f"query_pre_attn_scalar={self.query_pre_attn_scalar} isn't above 0")
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)} isn't supported")
        if self.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention=True isn't supported")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} is below 1")
        if self.sliding_window_pattern < 1:
            raise ValueError(f"sliding_window_pattern={self.sliding_window_pattern} is below 1")
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers"
                )
            if unknown := sorted(set(self.layer_types) - {FULL, SLIDING}):
                raise ValueError(f"layer_types {unknown} aren't known, only {FULL}, {SLIDING}")
        for kind in (FULL, SLIDING):
            self.frequencies(kind)  # refuses what it can't read

    def kind(self, number: int) -> str:
        """Of the layer of this number, from 0."""
        if self.layer_types is not None:
            return self.layer_types[number]
        return SLIDING if (number + 1) % self.sliding_window_pattern else FULL

    def window(self, number: int) -> int | None:
        """How many tokens the layer of this number attends to; None: all."""
        return self.sliding_window if self.kind(number) == SLIDING else None

    def frequencies(self, kind: str) -> tuple[Float[Tensor, " f"], float]:
        """Of the rotation in layers of this kind, and the factor on its cosine and sine."""
        theta = self.rope_theta if kind == FULL else self.rope_local_base_freq
        scaling = self.rope_scaling if kind == FULL else None
        if self.rope_parameters is not None:
            scaling = self.rope_parameters.get(kind, {})
            if not isinstance(scaling, Mapping):
                raise ValueError(f"rope_parameters[{kind!r}]={scaling!r} isn't a set of parameters")
            theta = scaling.get("rope_theta", theta)
            scaling = {"rope_type": "default"} | dict(scaling)
        return scaled_frequencies(
            head_dim=self.head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=self.max_position_embeddings,
        )


class Gemma3Layer(nn.Module):
    """h = x + norm(attention(norm(x))); y = h + norm(mlp(norm(h)))."""

    def __init__(self, config: Gemma3Config, number: int):
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
        head = {"hidden_size": config.head_dim, "eps": config.rms_norm_eps}
        self.input_layernorm = UnitOffsetRMSNorm(**norm)
        self.self_attn = attention_with_window(
            config.window(number),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5,
            q_norm=UnitOffsetRMSNorm(**head),
            k_norm=UnitOffsetRMSNorm(**head),
        )
        self.post_attention_layernorm = UnitOffsetRMSNorm(**norm)
        self.pre_feedforward_layernorm = UnitOffsetRMSNorm(**norm)
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_activation,
        )
        self.post_feedforward_layernorm = UnitOffsetRMSNorm(**norm)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        y = self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class Gemma3Model(nn.Module):
    """Token embeddings, the layers, the last norm: everything below the logits."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Gemma3Layer(config, number) for number in numbers)
        self.norm = UnitOffsetRMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        return self.decode(self.embed(input_ids), attention_mask, cache)

    def embed(self, input_ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """sqrt(d) times the embedding: what the first layer reads."""
        x = self.embed_tokens(input_ids)  # b t d
        # Rounded to the stream's dtype first, as in the release: in bfloat16 sqrt(1152) is 34.
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype, device=x.device)

    def decode(
        self,
        x: Float[Tensor, "b t d"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
        pairs: Bool[Tensor, "b 1 t s"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The layers and the last norm, on tokens that are embedded already.

        `pairs` says who may attend to whom where that isn't causal, padding included; layers
        with a window still forget what lies too far back.
        """
        positions, mask = places(x, attention_mask, 0 if cache is None else cache.length)
        mask = mask if pairs is None else pairs
        rotations = {}
        for kind in (FULL, SLIDING):
            inv_freq, factor = self.config.frequencies(kind)
            cos, sin = rope_table(inv_freq.to(x.device), positions)  # t f or b t f
            rotations[kind] = (factor * cos).to(x.dtype), (factor * sin).to(x.dtype)
        for number, layer in enumerate(self.layers):
            rotation = rotations[self.config.kind(number)]
            x = layer(x, rotation, mask, None if cache is None else cache[number])
        return self.norm(x)


class Gemma3(nn.Module):
    """A Gemma 3 that gives logits; parameters are named as in published checkpoints."""

    tied_product = staticmethod(F.linear)  # `onednn_products` puts a faster one in its place

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.model = Gemma3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each of the t tokens.

        Args:
            input_ids: the tokens that come after those in the cache.
            attention_mask: 1 for tokens and 0 for padding, over cached and new tokens.
            cache: from `new_cache`; keys and values of the new tokens are added to it.

        Raises:
            ValueError: the attention mask isn't as long as cached and new tokens.
        """
        return self.head(self.model(input_ids, attention_mask, cache))

    def head(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits of hidden states behind the last norm."""
        if self.config.tie_word_embeddings:
            return self.tied_product(x, self.model.embed_tokens.weight)
        return self.lm_head(x)

    def new_cache(self) -> KVCache:
        """An empty cache, for one batch of prompts; layers with a window keep no more than it."""
        return KVCache([layer.self_attn.new_cache() for layer in self.model.layers])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Gemma3":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, Gemma3Config, model_types=("gemma3_text",))
        tensors = read_tensors(folder, dtype)
        if config.tie_word_embeddings:
            drop_tied_head(tensors, "lm_head.weight", "model.embed_tokens.weight", source=folder)
        return filled(cls, config, tensors, source=folder)
