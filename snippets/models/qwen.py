"""Qwen2 to Qwen2.5 (2024, arXiv:2407.10671, arXiv:2412.15115) and Qwen3 (2025, arXiv:2505.09388).

Qwen2 is Llama with biases on queries, keys and values. Qwen3 drops them and norms each head's
queries and keys instead; its larger models have experts. Windows are possible and seldom used.

Axes: as in `snippets/models/llama.py`.
"""

import warnings
from dataclasses import dataclass

from torch import nn

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.sliding_window import attention_with_window
from snippets.layers.rmsnorm import RMSNorm
from snippets.models.llama import Llama, LlamaConfig, LlamaLayer
from snippets.moe.mixture_of_experts import MixtureOfExperts

KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Qwen2Config(LlamaConfig):
    """Llama's keys, and those of the windows.

    Raises:
        ValueError: a value that this model can't honour.
    """

    max_position_embeddings: int = 32768
    use_sliding_window: bool = False
    sliding_window: int | None = 4096  # tokens, the token itself counted
    max_window_layers: int = 28  # so many layers, the first ones, see everything
    layer_types: list[str] | None = None  # says the same for each layer

    def __post_init__(self):
        super().__post_init__()
        if self.mlp_bias:
            raise ValueError("mlp_bias=True isn't supported")
        if self.layer_types is not None:
            if len(self.layer_types) != self.num_hidden_layers:
                raise ValueError(
                    f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers"
                )
            if unknown := sorted(set(self.layer_types) - set(KINDS)):
                raise ValueError(f"layer_types {unknown} aren't known, only {', '.join(KINDS)}")
        windows = [self.window(number) for number in range(self.num_hidden_layers)]
        if any(window is not None and window < 1 for window in windows):
            raise ValueError(f"sliding_window={self.sliding_window} is below 1")

    def window(self, number: int) -> int | None:
        """How many tokens the layer of this number attends to; None: all."""
        if not self.use_sliding_window or self.sliding_window is None:
            return None
        if self.layer_types is None:
            return self.sliding_window if number >= self.max_window_layers else None
        return self.sliding_window if self.layer_types[number] == KINDS[1] else None


class Qwen2Layer(LlamaLayer):
    """A Llama layer whose queries, keys and values have biases."""

    def attention(self, config: Qwen2Config, number: int) -> nn.Module:
        return attention_with_window(
            config.window(number), **qwen_sizes(config), bias=True, o_bias=False
        )


def qwen_sizes(config: Qwen2Config) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": config.size_of_head,
    }


class Qwen2(Llama):
    """A Qwen2 or Qwen2.5 that gives logits; parameters are named as in published checkpoints."""

    config_class = Qwen2Config
    layer_class = Qwen2Layer
    model_types = ("qwen2",)


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """Qwen2's keys; heads are 128 wide, whatever the hidden size.

    Raises:
        ValueError: a value that this model can't honour.
    """

    head_dim: int | None = 128


class Qwen3Layer(LlamaLayer):
    """A Llama layer that norms each head's queries and keys before they turn."""

    def attention(self, config: Qwen3Config, number: int) -> GroupedQueryAttention:
        norm = {"hidden_size": config.size_of_head, "eps": config.rms_norm_eps}
        return attention_with_window(
            config.window(number),
            **qwen_sizes(config),
            bias=config.attention_bias,
            q_norm=RMSNorm(**norm),
            k_norm=RMSNorm(**norm),
        )


class Qwen3(Llama):
    """A Qwen3 that gives logits; parameters are named as in published checkpoints."""

    config_class = Qwen3Config
    layer_class = Qwen3Layer
    model_types = ("qwen3",)


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Qwen3's keys, and those of the experts.

    Raises:
        ValueError: a value that this model can't honour.
    """

    head_dim: int | None = None
    num_key_value_heads: int | None = 4
    max_window_layers: int = 0  # not a key of this family, though published files have it
    decoder_sparse_step: int = 1  # every so many-th layer has experts
    mlp_only_layers: list[int] | None = None  # but not these
    moe_intermediate_size: int = 768
    num_experts: int | None = None  # 128; transformers 5 writes num_local_experts
    num_local_experts: int | None = None
    num_experts_per_tok: int = 8
    norm_topk_prob: bool = False

    def __post_init__(self):
        super().__post_init__()
        if set(self.layer_types or ()) - {KINDS[self.use_sliding_window]}:
            raise ValueError(f"layer_types={self.layer_types}: all layers have the window, or none")
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step={self.decoder_sparse_step} is below 1")
        if len({self.num_experts, self.num_local_experts} - {None}) > 1:
            raise ValueError(
                f"num_experts={self.num_experts}, num_local_experts={self.num_local_experts}"
            )
        if self.experts and not 1 <= self.num_experts_per_tok <= self.experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} of num_experts={self.experts}"
            )
        if self.use_sliding_window and self.max_window_layers:
            warnings.warn(
                f"not read: max_window_layers={self.max_window_layers}; all layers have the window",
                stacklevel=3,
            )

    def window(self, number: int) -> int | None:
        """The same for all layers, as transformers has it; None: all tokens."""
        return self.sliding_window if self.use_sliding_window else None

    @property
    def experts(self) -> int:
        """Of a layer that has any, by either name."""
        given = (self.num_experts, self.num_local_experts)
        return next((number for number in given if number is not None), 128)

    def has_experts(self, number: int) -> bool:
        """Whether the layer of this number, from 0, has experts."""
        dense = number in (self.mlp_only_layers or ())
        return self.experts > 0 and not dense and (number + 1) % self.decoder_sparse_step == 0


class Qwen3MoeLayer(Qwen3Layer):
    """A Qwen3 layer whose network may be a mixture of experts."""

    def feed_forward(self, config: Qwen3MoeConfig, number: int) -> nn.Module:
        if not config.has_experts(number):
            return super().feed_forward(config, number)
        return MixtureOfExperts(
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_experts=config.experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_act=config.hidden_act,
            norm_topk_prob=config.norm_topk_prob,
            names=("gate_proj", "up_proj", "down_proj"),
        )


class Qwen3Moe(Qwen3):
    """A Qwen3 with experts that gives logits; parameters are named as in published checkpoints."""

    config_class = Qwen3MoeConfig
    layer_class = Qwen3MoeLayer
    model_types = ("qwen3_moe",)
