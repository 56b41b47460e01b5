"""The sizes of a language model that decide what it costs, read off its config.json.

One vocabulary for all families: what a key is called, what it is when the file leaves it out,
and which layers have a window or experts.

Axes: d hidden size, h query head, k head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that decide what it costs; 0 is "has none".

    Named as in config.json where that has one name for it. With `kv_lora_rank` the attention is
    latent, and `num_kv_heads` and `head_dim` are not read.

    Raises:
        ValueError: sizes that don't fit; the message names the field.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool = True  # three matrices in an MLP, not two
    tied: bool = False  # the head is the embedding
    positions: int = 0  # learned ones
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    window: int = 0  # tokens, the token itself counted
    windowed_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    shared_experts: int = 0
    expert_layers: int = 0
    layer_norms: int = 2  # in a layer, each as wide as the stream
    norm_bias: bool = False
    head_norms: bool = False  # of each head's queries and keys
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if found := problem(self):
            raise ValueError(f"{found[0]}: {found[1]}")


def problem(shape: ModelShape) -> tuple[str, str] | None:
    """The first field that doesn't fit, and why."""
    for field in fields(shape):
        if field.type is int and getattr(shape, field.name) < 0:
            return field.name, "must not be below 0"
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
        if getattr(shape, name) < 1:
            return name, "must be at least 1"
    if shape.kv_lora_rank:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if getattr(shape, name) < 1:
                return name, "must be at least 1 in latent attention"
    elif shape.num_kv_heads < 1 or shape.num_heads % shape.num_kv_heads:
        return "num_kv_heads", "must divide the number of query heads"
    elif shape.head_dim < 1:
        return "head_dim", "must be at least 1"
    if shape.windowed_layers > shape.num_layers:
        return "windowed_layers", "must not be more than there are layers"
    if shape.windowed_layers and not shape.window:
        return "window", "must be at least 1 where layers have a window"
    if shape.expert_layers > shape.num_layers:
        return "expert_layers", "must not be more than there are layers"
    if shape.expert_layers and not 1 <= shape.experts_per_token <= shape.num_experts:
        return "experts_per_token", "must be from 1 to the number of experts"
    if shape.expert_layers and not shape.moe_intermediate_size:
        return "moe_intermediate_size", "must be at least 1 where layers have experts"
    if shape.expert_layers and shape.mlp_bias:
        return "mlp_bias", "is not known of models with experts"
    if shape.expert_layers < shape.num_layers and not shape.intermediate_size:
        return "intermediate_size", "must be at least 1 where layers have no experts"
    return None


# From a config.json


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The sizes that a config.json states, or implies by its model type.

    Layers for multi-token prediction (DeepSeek-V3) are not counted: the model works without.

    Raises:
        ValueError: a model type that isn't known, a missing key, or sizes that don't fit.
    """
    config = dict(config)
    kind = config.get("model_type")
    config |= config.get("text_config") or {}  # of a model that sees
    if kind not in READERS:
        raise ValueError(f"model_type: {kind} isn't known, only {', '.join(READERS)}")
    try:
        return ModelShape(**READERS[kind](config))
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: is missing") from None


def gpt2(config: dict) -> dict[str, Any]:
    d, h = config["n_embd"], config["n_head"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": d,
        "num_layers": config["n_layer"],
        "num_heads": h,
        "num_kv_heads": h,
        "head_dim": d // h,
        "intermediate_size": config.get("n_inner") or 4 * d,
        "gated": False,
        "tied": config.get("tie_word_embeddings", True),
        "positions": config["n_positions"],
        "norm_bias": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    }


def llama(config: dict) -> dict[str, Any]:
    d, h = config["hidden_size"], config["num_attention_heads"]
    bias = config.get("attention_bias") or False
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": d,
        "num_layers": config["num_hidden_layers"],
        "num_heads": h,
        "num_kv_heads": config.get("num_key_value_heads") or h,
        "head_dim": config.get("head_dim") or d // h,
        "intermediate_size": config["intermediate_size"],
        "tied": config.get("tie_word_embeddings") or False,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": config.get("mlp_bias") or False,
    }


def mistral(config: dict) -> dict[str, Any]:
    window = config.get("sliding_window") or 0
    layers = config["num_hidden_layers"] if window else 0
    return llama(config) | {"window": window, "windowed_layers": layers}


def mixtral(config: dict) -> dict[str, Any]:
    return mistral(config) | {
        "num_experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "moe_intermediate_size": config["intermediate_size"],
        "expert_layers": config["num_hidden_layers"],
    }


def qwen2(config: dict) -> dict[str, Any]:
    return llama(config) | qwen_window(config) | {"qkv_bias": True, "o_bias": False}


def qwen_window(config: dict) -> dict[str, int]:
    """Qwen has its window switched off in most files, which state one all the same."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") or 0
    if not window or not config.get("use_sliding_window"):
        return {}
    limited = max(0, layers - config["max_window_layers"])
    if kinds := config.get("layer_types"):
        limited = kinds.count("sliding_attention")
    return {"window": window, "windowed_layers": limited}


def qwen3(config: dict) -> dict[str, Any]:
    head = {"head_dim": config.get("head_dim") or 128}
    return llama(config) | qwen_window(config) | head | {"head_norms": True}


def qwen3_moe(config: dict) -> dict[str, Any]:
    layers, skipped = config["num_hidden_layers"], config.get("mlp_only_layers") or []
    step = config.get("decoder_sparse_step") or 1
    with_experts = [i for i in range(layers) if i not in skipped and (i + 1) % step == 0]
    d, h = config["hidden_size"], config["num_attention_heads"]
    # Published files have `max_window_layers`, too; a window is in all layers all the same.
    return qwen3(config | {"max_window_layers": 0}) | {
        "head_dim": config.get("head_dim") or d // h,
        "num_experts": config.get("num_experts") or config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "moe_intermediate_size": config["moe_intermediate_size"],
        "expert_layers": len(with_experts),
    }


def gemma3(config: dict) -> dict[str, Any]:
    """Published files leave out what is as in transformers' defaults."""
    defaults = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    defaults |= {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
    config = defaults | config
    layers, every = config["num_hidden_layers"], config.get("sliding_window_pattern") or 6
    limited = layers - layers // every
    if kinds := config.get("layer_types"):
        limited = kinds.count("sliding_attention")
    window = config["sliding_window"] or 0
    return llama(config) | {
        "window": window,
        "windowed_layers": limited if window else 0,
        "layer_norms": 4,
        "head_norms": True,
    }


def deepseek(config: dict) -> dict[str, Any]:
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace") or 0
    step, experts = config.get("moe_layer_freq") or 1, config.get("n_routed_experts") or 0
    with_experts = [i for i in range(layers) if experts and i >= dense and i % step == 0]
    return llama(config) | {
        "kv_lora_rank": config["kv_lora_rank"],
        "q_lora_rank": config.get("q_lora_rank") or 0,
        "qk_nope_head_dim": config["qk_nope_head_dim"],
        "qk_rope_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "num_experts": experts,
        "experts_per_token": config.get("num_experts_per_tok") or 0,
        "moe_intermediate_size": config.get("moe_intermediate_size") or 0,
        "shared_experts": config.get("n_shared_experts") or 0,
        "expert_layers": len(with_experts),
    }


READERS = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma3": gemma3,
    "gemma3_text": gemma3,
    "deepseek_v2": deepseek,
    "deepseek_v3": deepseek,
}
