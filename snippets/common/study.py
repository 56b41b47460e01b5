"""A model's line in the table of all models: what its config says, counted on the model itself.

The build gathers the lines of all pages; nothing of them is typed.
"""

import copy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from snippets.common.proof import show

CONTEXT = 32768  # tokens in the cache


def study(name: str, model: nn.Module, *, year: int | None = None) -> None:
    """Add a full-size model to the table of models; prints one line.

    Args:
        name: of the checkpoint, "Mistral 7B".
        model: on the meta device: shapes without memory.
        year: of its report, where that isn't the page's.

    Raises:
        ValueError: the model holds memory, or its config lacks what the table shows.
    """
    refuse_memory(name, model)
    kept = cache_bytes(model)
    facts = {
        "layers": layers(model),
        "width": first(model, "hidden_size", "n_embd"),
        "heads": heads(model),
        "positions": positions(model),
        "norm": norm(model),
        "activation": first(model, "hidden_act", "hidden_activation", "activation_function"),
        "experts": experts(model),
        "window": window(model),
        "parameters": parameters(model),
        "cache a token": f"{kept / 1024:.1f} KiB",
    }
    facts = {key: str(value) for key, value in facts.items()}
    show(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}",
         {"study": name, "year": year, "facts": facts, "counted": counted(model, kept)}
         )  # fmt: skip


def two_stack_study(name: str, model: nn.Module) -> None:
    """Add a full-size encoder-decoder to the table of models; prints one line.

    Its config says sizes only: sinusoids and ReLU aren't a choice. The cache is the decoder's
    own, of the tokens it writes.

    Args:
        name: of the model, "Transformer base".
        model: on the meta device, with `encoder`, `decoder` and `decode`.

    Raises:
        ValueError: the model holds memory.
    """
    refuse_memory(name, model)
    facts = {
        "layers": f"{len(model.encoder.layers)} + {len(model.decoder.layers)}",
        "width": str(model.config.hidden_size),
        "heads": heads(model),
        "positions": "sinusoids",
        "norm": norm(model),
        "activation": "relu",
        "experts": experts(model),
        "window": "none",
        "parameters": parameters(model),
        "cache a token": f"{decoder_cache_bytes(model) / 1024:.1f} KiB",
    }
    show(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}",
         {"study": name, "facts": facts})  # fmt: skip


def refuse_memory(name: str, model: nn.Module) -> None:
    if any(weight.device.type != "meta" for weight in model.parameters()):
        raise ValueError(f"{name} isn't on the meta device")


def counted(model: nn.Module, kept: float) -> dict[str, Any]:
    """The config as config.json has it, and what was counted, for the calculators to meet."""
    total, active = counts(model)
    kinds = getattr(model, "model_types", None) or (type(model).__name__.lower(),)
    return {
        "config": {"model_type": kinds[0]} | asdict(model.config),
        "parameters": total,
        "active": active,
        "context": CONTEXT,
        "cache bytes": round(kept * CONTEXT),
    }


def seeing_study(
    name: str,
    model: nn.Module,
    *,
    tokens: int | str,
    encoder: str | tuple[str, ...],
    connector: str | tuple[str, ...] = (),
    language: str | tuple[str, ...] = (),
) -> None:
    """Add a full-size model that sees to the table of those; prints one line.

    Args:
        name: of the checkpoint, "LLaVA-1.5 7B".
        model: on the meta device: shapes without memory.
        tokens: that an image takes, computed.
        encoder: the names of the parts that read pixels, as `get_submodule` takes them; ""
            is the model itself. Their `config` says layers, width, pixels and patch.
        connector: of those between them and the language model.
        language: of those that read text.

    Raises:
        ValueError: the model holds memory.
    """
    refuse_memory(name, model)
    names = [(part,) if isinstance(part, str) else part for part in (encoder, connector, language)]
    eyes, links, texts = ([model.get_submodule(path) for path in paths] for paths in names)
    counts = [sum(w.numel() for m in part for w in m.parameters()) for part in (eyes, links, texts)]
    facts = {
        "encoder": " and ".join(stack(eye.config) for eye in eyes),
        "image": " and ".join(pixels(eye.config) for eye in eyes),
        "tokens an image": str(tokens),
        "connector": ", ".join(type(link).__name__ for link in links) or "none",
        "language model": " and ".join(stack(text.config) for text in texts) or "none",
        "parameters": billions(sum(w.numel() for w in model.parameters())),
        "encoder / connector / language": " / ".join(billions(n) if n else "0" for n in counts),
    }
    show(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items())}",
         {"study": name, "facts": facts})  # fmt: skip


def stack(config: Any) -> str:
    """Layers times width."""
    return f"{config.num_hidden_layers} x {config.hidden_size}"


def pixels(config: Any) -> str:
    """Of a side, and of a patch's; of both sides where they differ."""
    sizes = (config.image_size, config.patch_size)
    image, patch = ("x".join(map(str, s)) if isinstance(s, tuple | list) else str(s) for s in sizes)
    return f"{image} px in patches of {patch}"


def first(model: nn.Module, *names: str) -> Any:
    """The config's value under the first of these names that it has."""
    for name in names:
        if (value := getattr(model.config, name, None)) is not None:
            return value
    raise ValueError(f"{type(model.config).__name__} has none of {', '.join(names)}")


def layers(model: nn.Module) -> int:
    return first(model, "num_hidden_layers", "n_layer")


def heads(model: nn.Module) -> str:
    """Query heads, and those of keys and values where they are fewer or one latent."""
    config, h = model.config, first(model, "num_attention_heads", "n_head")
    if rank := getattr(config, "kv_lora_rank", None):
        return f"{h}, latent {rank} + {config.qk_rope_head_dim}"
    g = getattr(config, "num_key_value_heads", None) or h
    return f"{h} / {g}"


def positions(model: nn.Module) -> str:
    config = model.config
    if hasattr(config, "n_positions"):
        return "learned"
    kind = (config.rope_scaling or {}).get("rope_type", "")
    bases = f"{config.rope_theta:,.0f}"
    if local := getattr(config, "rope_local_base_freq", None):
        bases += f" and {local:,.0f}"
    return f"RoPE {bases}{f', {kind}' if kind else ''}"


def norm(model: nn.Module) -> str:
    kinds = (type(module).__name__ for module in model.modules())
    return next(kind for kind in kinds if kind.endswith("Norm"))


def experts(model: nn.Module) -> str:
    config = model.config
    names = ("num_local_experts", "n_routed_experts", "num_experts")
    count = next((n for name in names if (n := getattr(config, name, None))), None)
    if not count:
        return "none"
    shared = getattr(config, "n_shared_experts", None)
    return f"{config.num_experts_per_tok} of {count}{f', {shared} shared' if shared else ''}"


def window(model: nn.Module) -> str:
    """The window, and in how many layers."""
    reach = getattr(model.config, "window", lambda number: None)
    limited = [w for number in range(layers(model)) if (w := reach(number)) is not None]
    if not limited:
        return "none"
    return f"{limited[0]:,} in {len(limited)} of {layers(model)} layers"


def parameters(model: nn.Module) -> str:
    """All of them, and those that one token touches, in words."""
    total, active = counts(model)
    return billions(total) + (f", {billions(active)} active" if active < total else "")


def counts(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that one token touches; embedding and head are in both."""
    named = list(model.named_parameters())
    total, idle = sum(weight.numel() for _, weight in named), 0
    for name, weight in named:
        if ".experts." in name:  # a stack, one matrix for each expert
            chosen = model.config.num_experts_per_tok
            idle += weight.numel() // len(weight) * (len(weight) - chosen)
    return total, total - idle


@torch.no_grad()
def cache_bytes(model: nn.Module) -> float:
    """Bytes a token in bfloat16 that the model's own cache keeps of a text of `CONTEXT` tokens."""
    short = torch.zeros(1, 1, dtype=torch.long, device="meta")
    model = copy.deepcopy(model).bfloat16()
    cache = model.new_cache()
    model(input_ids=short, cache=cache)
    # What follows can't depend on values, and attention over all of it isn't needed for a size.
    for layer in cache.layers:
        new = [kept[..., :1, :].expand(*kept.shape[:-2], CONTEXT - 1, -1) for kept in layer.store]
        layer.append(*new)
    assert cache.length == CONTEXT
    return cache.nbytes / CONTEXT


@torch.no_grad()
def decoder_cache_bytes(model: nn.Module) -> float:
    """The same of a decoder that reads a memory, whose keys and values aren't in it."""
    model = copy.deepcopy(model).bfloat16().eval()
    cache = model.new_cache()
    written = torch.zeros(1, CONTEXT, dtype=torch.long, device="meta")
    memory = torch.empty(1, 1, model.config.hidden_size, dtype=torch.bfloat16, device="meta")
    model.decode(written, memory, cache=cache)
    own = [layer for layer in cache.layers if layer.length == CONTEXT]
    return sum(layer.nbytes for layer in own) / CONTEXT


def billions(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 999.5e6 else f"{count / 1e6:.0f}M"
