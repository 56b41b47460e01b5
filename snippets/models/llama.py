"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783).

A decoder-only transformer: RMSNorm before each sublayer, rotary positions, grouped-query
attention, a gated MLP, no biases. Reads checkpoints of Llama 1 to 3.3 and of the many
models of the same build, SmolLM2 for one.

Axes: b batch, t token, s cached and new tokens, d hidden size, v vocabulary, f frequency
(head dim 2 f).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import KVCache, LayerCache, places
from snippets.common.checkpoint import drop_tied_head, filled, read_config, read_tensors
from snippets.layers.rmsnorm import RMSNorm
from snippets.layers.swiglu import ACTIVATIONS, GatedMLP
from snippets.position.context_extension import scaled_frequencies
from snippets.position.rope import rope_table


@dataclass(frozen=True)
class LlamaConfig:
    """The keys of config.json that matter here; those with a default came in later.

    Raises:
        ValueError: a value that this model can't honour.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # Llama 1 has none: as many as query heads
    head_dim: int | None = None  # hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # where training ended; not enforced
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # since Llama 3.1: "llama3"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes += ("num_attention_heads", "num_key_value_heads", "head_dim")
        for name in sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} is below 1")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads is not None and heads % kv_heads:
            raise ValueError(f"uneven: num_attention_heads={heads}, num_key_value_heads={kv_heads}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"uneven: hidden_size={self.hidden_size}, num_attention_heads={heads}")
        if self.hidden_act not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"hidden_act={self.hidden_act!r} isn't supported; known: {known}")
        scaling = self.rope_scaling or {}
        if (kind := scaling.get("rope_type", scaling.get("type"))) in ("dynamic", "longrope"):
            raise ValueError(f"rope_type={kind!r} isn't supported: it depends on the text's length")
        self.frequencies()  # refuses what it can't read

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def frequencies(self) -> tuple[Float[Tensor, " f"], float]:
        """Of the rotation, and the factor on its cosine and sine."""
        return scaled_frequencies(
            head_dim=self.size_of_head,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            max_position_embeddings=self.max_position_embeddings,
        )


class LlamaLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)).

    Models that keep this shape say in `attention` and `feed_forward` what they exchange.
    """

    def __init__(self, config: LlamaConfig, number: int = 0):
        super().__init__()
        norm = {"hidden_size": config.hidden_size, "eps": config.rms_norm_eps}
        self.input_layernorm = RMSNorm(**norm)
        self.self_attn = self.attention(config, number)
        self.post_attention_layernorm = RMSNorm(**norm)
        self.mlp = self.feed_forward(config, number)

    def attention(self, config: LlamaConfig, number: int) -> nn.Module:
        return GroupedQueryAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.size_of_head,
            bias=config.attention_bias,
        )

    def feed_forward(self, config: LlamaConfig, number: int) -> nn.Module:
        return GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            bias=config.mlp_bias,
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Token embeddings, the layers, the last norm: everything below the logits."""

    def __init__(self, config: LlamaConfig, layer_class: type[LlamaLayer] = LlamaLayer):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        numbers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(layer_class(config, number) for number in numbers)
        self.norm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        return self.decode(self.embed_tokens(input_ids), attention_mask, cache)

    def decode(
        self,
        x: Float[Tensor, "b t d"],
        attention_mask: Int[Tensor, "b s"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The same of tokens that are embedded already, of which some may be no words."""
        positions, mask = places(x, attention_mask, 0 if cache is None else cache.length)
        rotation = self.rotation(positions, x.dtype)
        numbers = range(self.config.num_hidden_layers)
        for number, layer in zip(numbers, self.layers, strict=False):  # behind them may be others
            x = layer(x, rotation, mask, None if cache is None else cache[number])
        return self.norm(x)

    def rotation(
        self, positions: Int[Tensor, "*b t"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*b t f"], Float[Tensor, "*b t f"]]:
        """Cosine and sine of each position's angles."""
        # Not a buffer: `.bfloat16()` would round it, `meta` would leave it empty.
        inv_freq, factor = self.config.frequencies()
        cos, sin = rope_table(inv_freq.to(positions.device), positions)
        return (factor * cos).to(dtype), (factor * sin).to(dtype)


class Llama(nn.Module):
    """A Llama that gives logits; parameters are named as in published checkpoints."""

    config_class = LlamaConfig
    layer_class = LlamaLayer
    model_types: tuple[str, ...] = ("llama",)
    tied_product = staticmethod(F.linear)  # `onednn_products` puts a faster one in its place

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, self.layer_class)
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
        """An empty cache, for one batch of prompts."""
        layers = self.model.layers[: self.config.num_hidden_layers]
        return KVCache([layer.self_attn.new_cache() for layer in layers])

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None) -> "Llama":
        """Read a checkpoint folder: config.json and *.safetensors.

        Args:
            folder: as published; several files come with their index.
            dtype: of the parameters; as on disk unless given.

        Raises:
            CheckpointError: what is missing, unexpected, mis-shaped, damaged or not
                supported, by name and file.
        """
        config = read_config(folder, cls.config_class, model_types=cls.model_types)
        return cls.from_tensors(config, cls.tensors(folder, config, dtype), source=folder)

    @classmethod
    def from_tensors(
        cls, config: LlamaConfig, tensors: dict[str, Tensor], *, source: str | Path
    ) -> "Llama":
        """A model of exactly these tensors, by name; `source` is named in errors."""
        if config.tie_word_embeddings:
            drop_tied_head(tensors, "lm_head.weight", "model.embed_tokens.weight", source=source)
        return filled(cls, config, tensors, source=source)

    @staticmethod
    def tensors(
        folder: str | Path, config: LlamaConfig, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """The folder's weights by name, without what isn't one."""
        # Files of 2023 hold the rotary frequencies, which follow from the config.
        tensors = read_tensors(folder, dtype)
        return {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
