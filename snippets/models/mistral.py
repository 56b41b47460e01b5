"""Mistral (Jiang et al. 2023, arXiv:2310.06825).

Llama with a window: each token attends to the last `sliding_window` tokens, and the cache keeps
no more than those. Later versions dropped the window again (`sliding_window` is null).

Axes: as in `snippets/models/llama.py`.
"""

from dataclasses import dataclass

from torch import nn

from snippets.attention.sliding_window import attention_with_window
from snippets.models.llama import Llama, LlamaConfig, LlamaLayer


@dataclass(frozen=True)
class MistralConfig(LlamaConfig):
    """Llama's keys and the window, with Mistral's defaults.

    Raises:
        ValueError: a value that this model can't honour.
    """

    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # tokens, the token itself counted; None: all

    def __post_init__(self):
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} is below 1")

    def window(self, number: int) -> int | None:
        """How many tokens the layer of this number attends to; None: all."""
        return self.sliding_window


class MistralLayer(LlamaLayer):
    """A Llama layer whose attention has a window."""

    def attention(self, config: MistralConfig, number: int) -> nn.Module:
        return attention_with_window(
            config.window(number),
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.size_of_head,
            bias=config.attention_bias,
        )


class Mistral(Llama):
    """A Mistral that gives logits; parameters are named as in published checkpoints."""

    config_class = MistralConfig
    layer_class = MistralLayer
    model_types = ("mistral",)
