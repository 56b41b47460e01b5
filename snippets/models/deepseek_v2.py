"""DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434).

Llama's stack with two parts exchanged: latent attention, which keeps one short vector a token
for all heads, and from some layer on a mixture of many small experts with shared ones beside.

Axes: as in `snippets/models/llama.py`.
"""

from dataclasses import dataclass

from torch import nn

from snippets.attention.mla import MultiHeadLatentAttention
from snippets.models.llama import Llama, LlamaConfig, LlamaLayer
from snippets.moe.deepseek_moe import DeepseekMoE
from snippets.position.context_extension import read_scaling, yarn_mscale


@dataclass(frozen=True)
class DeepseekV2Config(LlamaConfig):
    """Llama's keys, and those of latent attention and of the experts.

    Raises:
        ValueError: a value that this model can't honour.
    """

    q_lora_rank: int | None = 1536  # None in V2-Lite: queries straight from the stream
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 0  # so many layers have one dense network
    moe_layer_freq: int = 1  # of the others, every so many-th has experts
    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = 64  # None: no layer has experts
    num_experts_per_tok: int | None = None
    n_shared_experts: int | None = 2
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads not in (None, heads):
            raise ValueError(f"num_key_value_heads={kv_heads} isn't num_attention_heads={heads}")
        if self.mlp_bias:
            raise ValueError("mlp_bias=True isn't supported")
        if self.moe_layer_freq < 1 or self.first_k_dense_replace < 0:
            raise ValueError(
                f"moe_layer_freq={self.moe_layer_freq} is below 1, or "
                f"first_k_dense_replace={self.first_k_dense_replace} below 0"
            )
        if self.n_routed_experts and not self.num_experts_per_tok:
            raise ValueError(f"no num_experts_per_tok for {self.n_routed_experts} experts")
        self.refuse_routing()

    def refuse_routing(self) -> None:
        """V2's own limits; what no router can do, `DeepseekRouter` refuses."""
        if (self.scoring_func, self.topk_method) not in (
            ("softmax", "greedy"),
            ("softmax", "group_limited_greedy"),
        ):
            raise ValueError(
                f"scoring_func={self.scoring_func!r} with topk_method={self.topk_method!r} "
                "isn't DeepSeek-V2's"
            )
        if self.norm_topk_prob:
            # The released code then leaves the scaling factor out; transformers divides nothing.
            raise ValueError("norm_topk_prob=True has no one meaning in DeepSeek-V2")

    @property
    def size_of_head(self) -> int:
        """The features that turn. `head_dim` in files is this, or absent."""
        return self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(features of a key); with YaRN times yarn_mscale(factor, mscale_all_dim)²."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        _, given = read_scaling(self.rope_scaling, self.rope_theta)
        if all_dim := given.get("mscale_all_dim"):
            scale *= yarn_mscale(given["factor"], all_dim) ** 2
        return scale

    def has_experts(self, number: int) -> bool:
        """Whether the layer of this number, from 0, has experts."""
        late = number >= self.first_k_dense_replace and number % self.moe_layer_freq == 0
        return self.n_routed_experts is not None and late


class DeepseekV2Layer(LlamaLayer):
    """A Llama layer with latent attention, and with experts unless it is an early one."""

    def attention(self, config: DeepseekV2Config, number: int) -> nn.Module:
        return MultiHeadLatentAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            attention_bias=config.attention_bias,
            softmax_scale=config.softmax_scale,
        )

    def feed_forward(self, config: DeepseekV2Config, number: int) -> nn.Module:
        if not config.has_experts(number):
            return super().feed_forward(config, number)
        return DeepseekMoE(
            hidden_size=config.hidden_size,
            moe_intermediate_size=config.moe_intermediate_size,
            n_routed_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_shared_experts=config.n_shared_experts or 0,
            n_group=config.n_group or 1,
            topk_group=config.topk_group or 1,
            scoring_func=config.scoring_func,
            topk_method=config.topk_method,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            hidden_act=config.hidden_act,
        )


class DeepseekV2(Llama):
    """A DeepSeek-V2 that gives logits; parameters are named as in published checkpoints."""

    config_class = DeepseekV2Config
    layer_class = DeepseekV2Layer
    model_types = ("deepseek_v2",)
