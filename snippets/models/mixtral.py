"""Mixtral (Jiang et al. 2024, arXiv:2401.04088).

Mistral with eight feed-forward networks in each layer, of which every token goes through two.

Axes: as in `snippets/models/llama.py`.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from snippets.attention.kv_cache import LayerCache
from snippets.models.mistral import Mistral, MistralConfig, MistralLayer
from snippets.moe.mixture_of_experts import MixtureOfExperts


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Mistral's keys, and those of the experts.

    Raises:
        ValueError: a value that this model can't honour.
    """

    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} of "
                f"num_local_experts={self.num_local_experts}"
            )


class MixtralLayer(MistralLayer):
    """A Mistral layer whose network is a mixture of experts."""

    def __init__(self, config: MixtralConfig, number: int = 0):
        super().__init__(config, number)
        self.block_sparse_moe = self.mlp  # its name in checkpoints
        del self.mlp

    def feed_forward(self, config: MixtralConfig, number: int) -> nn.Module:
        return MixtureOfExperts(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_act=config.hidden_act,
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "b 1 t s"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Mixtral(Mistral):
    """A Mixtral that gives logits; parameters are named as in published checkpoints."""

    config_class = MixtralConfig
    layer_class = MixtralLayer
    model_types = ("mixtral",)
