"""A small model of every family, for tests that count them."""

from dataclasses import asdict

import torch

from snippets.common.model_shape import ModelShape
from snippets.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from snippets.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from snippets.models.gemma3 import Gemma3, Gemma3Config
from snippets.models.gpt2 import GPT2, GPT2Config
from snippets.models.llama import Llama, LlamaConfig
from snippets.models.mistral import Mistral, MistralConfig
from snippets.models.mixtral import Mixtral, MixtralConfig
from snippets.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config, Qwen3Moe, Qwen3MoeConfig

# All sizes differ, so that one taken for another shows.
SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=6,
)
GROUPED = SIZES | {"num_key_value_heads": 2}
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}
LATENT = SIZES | MOE | {"kv_lora_rank": 18, "qk_nope_head_dim": 10, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 7, "n_routed_experts": 8, "first_k_dense_replace": 1}
MODELS = {
    "GPT-2": (GPT2, GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=5, n_head=6)),
    "GPT-2 untied": (
        GPT2,
        GPT2Config(vocab_size=101, n_positions=64, n_embd=48, n_layer=3, n_head=6, n_inner=100,
                   tie_word_embeddings=False),
    ),
    "Llama": (Llama, LlamaConfig(**GROUPED)),
    "Llama 1": (Llama, LlamaConfig(**SIZES)),
    "Llama, biases, tied": (
        Llama,
        LlamaConfig(**GROUPED, head_dim=14, attention_bias=True, mlp_bias=True,
                    tie_word_embeddings=True),
    ),
    "Mistral": (Mistral, MistralConfig(**GROUPED, sliding_window=9)),
    "Mistral, no window": (Mistral, MistralConfig(**GROUPED, sliding_window=None)),
    "Mixtral": (Mixtral, MixtralConfig(**GROUPED, num_local_experts=5)),
    "Qwen2": (Qwen2, Qwen2Config(**GROUPED)),
    "Qwen2, windows": (
        Qwen2,
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=9, max_window_layers=3),
    ),
    "Qwen2, kinds": (
        Qwen2,
        Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=9,
                    layer_types=["full_attention", *["sliding_attention"] * 4]),
    ),
    "Qwen3": (Qwen3, Qwen3Config(**GROUPED)),
    "Qwen3 MoE": (
        Qwen3Moe,
        Qwen3MoeConfig(**GROUPED, **MOE, num_experts=8, decoder_sparse_step=2),
    ),
    "Qwen3 MoE, windows": (
        Qwen3Moe,
        Qwen3MoeConfig(**GROUPED, **MOE, num_experts=8, use_sliding_window=True,
                       sliding_window=9),
    ),
    "Gemma 3": (Gemma3, Gemma3Config(**GROUPED, head_dim=14, sliding_window=9)),
    "Gemma 3, kinds": (
        Gemma3,
        Gemma3Config(**GROUPED, sliding_window=9, sliding_window_pattern=2),
    ),
    "DeepSeek-V2": (
        DeepseekV2, DeepseekV2Config(**LATENT, q_lora_rank=22, moe_layer_freq=2),
    ),
    "DeepSeek-V2, direct queries": (DeepseekV2, DeepseekV2Config(**LATENT, q_lora_rank=None)),
    "DeepSeek-V2, biases": (DeepseekV2, DeepseekV2Config(**LATENT, attention_bias=True)),
    "DeepSeek-V2, dense": (DeepseekV2, DeepseekV2Config(**LATENT | {"n_routed_experts": None})),
    "DeepSeek-V3": (DeepseekV3, DeepseekV3Config(**LATENT, n_group=2, topk_group=1)),
}  # fmt: skip
GOOD = ModelShape(
    vocab_size=101, hidden_size=48, num_layers=5, num_heads=6, num_kv_heads=2, head_dim=8,
    intermediate_size=80,
)  # fmt: skip

TYPES = {GPT2: "gpt2", Gemma3: "gemma3_text"}


def built(name: str):
    """The model on the meta device, and its config as config.json has it."""
    kind, config = MODELS[name]
    with torch.device("meta"):
        model = kind(config)
    model_type = TYPES.get(kind) or kind.model_types[0]
    return model, {"model_type": model_type} | asdict(config)
