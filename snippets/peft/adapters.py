"""Adapters on disk: the folders that peft writes, read into a model and written for peft.

LoRA, rsLoRA, PiSSA, DoRA, LoHa, LoKr and VeRA, with what is trained whole or in place beside
them. What a folder holds and this doesn't compute is refused by name, never skipped.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snippets.common.adapt import (
    Adapter,
    Retrained,
    adapters,
    dense_weight,
    exact_patterns,
    install,
    linear_layers,
    pattern_value,
    slots,
    switched,
    trained_biases,
)
from snippets.common.adapter_folder import read_adapter, read_options, report, write_adapter
from snippets.common.checkpoint import CheckpointError
from snippets.peft.dora import DoRA
from snippets.peft.loha import LoHa
from snippets.peft.lokr import LoKr
from snippets.peft.lora import LoRA
from snippets.peft.vera import SharedProjections, VeRA

PREFIX = "base_model.model."
PROJECTIONS = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
NUMBER, NAMES = int | float, str | list
# The keys of adapter_config.json that are read: type and default (peft's).
SHARED_KEYS = {
    "target_modules": (NAMES, ()),
    "exclude_modules": (NAMES, ()),
    "modules_to_save": (list, ()),
    "layers_to_transform": (int | list, None),
    "layers_pattern": (NAMES, None),
    "rank_pattern": (dict, {}),
    "alpha_pattern": (dict, {}),
    "bias": (str, "none"),
}
KEYS = {
    "LORA": {
        "r": (int, 8),
        "lora_alpha": (NUMBER, 8),
        "lora_dropout": (NUMBER, 0.0),
        "use_rslora": (bool, False),
        "use_dora": (bool, False),
        "init_lora_weights": (bool | str, True),
    },
    "LOHA": {"r": (int, 8), "alpha": (NUMBER, 8)},
    "LOKR": {
        "r": (int, 8),
        "alpha": (NUMBER, 8),
        "decompose_both": (bool, False),
        "decompose_factor": (int, -1),
    },
    "VERA": {
        "r": (int, 256),
        "projection_prng_key": (int, 0),
        "save_projection": (bool, True),
        "vera_dropout": (NUMBER, 0.0),
        "d_initial": (NUMBER, 0.1),
    },
}
# Other keys of peft's that change the outputs.
REFUSED = {
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config",
    "layer_replication", "lora_bias", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip
# Those that only say how training started or goes on; A and B of a file are as they ended.
# `fan_in_fan_out` tells how W is stored; A and B are stored alike for both.
INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "init_weights", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "rank_dropout_scale", "revision",
    "runtime_config", "task_type", "use_effective_conv2d",
}  # fmt: skip
# Read, but of no effect here: said when they are set.
ONLY_IN_TRAINING = {"rank_dropout", "module_dropout"}
# Ways to start A and B that leave W as it is. "pissa" is done again; others change W otherwise.
STARTS = (True, False, "gaussian", "orthogonal", "eva")


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> nn.Module:
    """The model with the adapter of a peft folder, switched on and trainable, the rest frozen.

    Modules are found by the names that the folder has: those of the model it was trained on,
    without its `base_model.model.`. Nothing is unpickled. Biases that were trained in place
    overwrite the model's.

    Args:
        model: the frozen base; it is changed itself, and returned.
        folder: with adapter_config.json and adapter_model.safetensors.
        name: for `switch`, beside other adapters.

    Raises:
        CheckpointError: a file is missing, damaged or a pickle; a method, option or way to
            start isn't supported; a name matches nothing; tensors are missing, unexpected or
            of another shape; PiSSA has no W to start from, or has changed it. All by name; the
            model is as before then, but frozen.
    """
    config, tensors = read_adapter(folder)
    options = checked_options(config, folder)
    try:
        layers = new_layers(model, options, name)
        check_start(model, layers, options)
        wanted = places(model, layers, options)
        load_tensors(model, layers, wanted, tensors, options, folder)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return model


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> None:
    """Write the adapter of this name as a folder that peft's `from_pretrained` reads.

    Raises:
        ValueError: there is none of this name, its layers differ in more than rank and
            alpha, or something beside it is trained that a folder can't hold.
    """
    layers = adapters(model, name)
    if not layers:
        raise ValueError(f"no adapter {name!r} in this model")
    config = config_of(layers)
    config["target_modules"] = exact_patterns(model, list(layers))
    found = switched(model)
    whole = {p: m for p, m in found if isinstance(m, Retrained) and m.name == name}
    own = {id(w) for _, layer in found for w in layer.own_parameters().values()}
    bias = next(iter(layers.values())).trained_bias
    biases = trained_biases(model, layers, bias)
    own |= {id(module.bias) for module in biases.values()}
    others = [n for n, w in model.named_parameters() if w.requires_grad and id(w) not in own]
    if others:
        raise ValueError(f"trained, but no part of {name!r}: {', '.join(others)}")
    if bias != "none":
        if config["peft_type"] in ("LOHA", "LOKR"):
            raise ValueError(f"peft's {config['peft_type']} has no {bias=}")
        config["bias"] = bias if bias == "all" else f"{config['peft_type'].lower()}_only"
    config["modules_to_save"] = list(whole) or None
    tensors = {
        f"{PREFIX}{p}.{n}": w for p, m in layers.items() for n, w in m.own_parameters().items()
    }
    for path, module in biases.items():
        tensors[PREFIX + bias_name(path, layers)] = module.bias
    for path, module in whole.items():
        tensors |= {f"{PREFIX}{path}.{n}": w for n, w in module.retrained.state_dict().items()}
    first = next(iter(layers.values()))
    if isinstance(first, VeRA):
        tensors |= {key: getattr(first.projections, n) for key, n in PROJECTIONS.items()}
    write_adapter(folder, config, tensors)


# Reading


def checked_options(config: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """The options of a config, with `peft_type`; refuses what isn't supported."""
    kind = config.get("peft_type")
    if kind not in KEYS:
        known = ", ".join(KEYS)
        raise CheckpointError(f"{folder}: peft_type={kind!r} isn't supported; this reads {known}")
    on = {key: value for key, value in config.items() if value not in (None, False, 0, "", [], {})}
    if refused := [f"{key}={on[key]!r}" for key in sorted(REFUSED & on.keys())]:
        raise CheckpointError(f"{folder}: not supported: {', '.join(refused)}")
    if idle := [f"{key}={on[key]!r}" for key in sorted(ONLY_IN_TRAINING & on.keys())]:
        report(f"{folder}: not applied when training goes on: {', '.join(idle)}")
    known = SHARED_KEYS | KEYS[kind]
    if unknown := sorted(on.keys() - known.keys() - INERT - ONLY_IN_TRAINING):
        report(f"{folder}: not read: {', '.join(unknown)}")
    options = read_options(config, known, folder) | {"peft_type": kind}
    if not options["target_modules"]:
        raise CheckpointError(f"{folder}: target_modules={config.get('target_modules')!r}")
    start = options.get("init_lora_weights", True)
    if start not in STARTS and (start != "pissa" or options["use_dora"]):
        raise CheckpointError(
            f"{folder}: init_lora_weights={start!r} isn't supported: it changes W at the start"
        )
    return options


def new_layers(model: nn.Module, options: dict[str, Any], name: str) -> dict[str, Adapter]:
    """Adapters as the options say, by path, not yet in the model."""
    keys = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    given = {key: options[key] for key in keys}
    found = linear_layers(model, options["target_modules"], **given)
    kind, r = options["peft_type"], options["r"]
    if kind == "VERA":
        key = options["projection_prng_key"]
        shared = SharedProjections(found.values(), r=r, projection_prng_key=key)
        make = partial(
            VeRA,
            projections=shared,
            vera_dropout=options["vera_dropout"],
            d_initial=options["d_initial"],
        )
        return {path: make(layer, name=name) for path, layer in found.items()}
    alpha_key = "lora_alpha" if kind == "LORA" else "alpha"
    keys = {"LORA": ("lora_dropout", "use_rslora"), "LOKR": ("decompose_both", "decompose_factor")}
    more = {key: options[key] for key in keys.get(kind, ())}
    methods = {"LORA": DoRA if options.get("use_dora") else LoRA, "LOHA": LoHa, "LOKR": LoKr}
    layers = {}
    for path, layer in found.items():
        rank = pattern_value(options["rank_pattern"], path, r)
        alpha = pattern_value(options["alpha_pattern"], path, options[alpha_key])
        layers[path] = methods[kind](layer, r=rank, name=name, **{alpha_key: alpha}, **more)
    return layers


def check_start(model: nn.Module, layers: dict[str, Adapter], options: dict[str, Any]) -> None:
    """Whether the layers find the W they were trained beside: PiSSA takes its part out of it.

    Raises:
        ValueError: an adapter of the model has done so, or the folder's can't.
    """
    for path, layer in switched(model):
        if getattr(layer, "pissa", False):
            raise ValueError(f"{path}: W lacks what PiSSA took out of it for {layer.name!r}")
    if options.get("init_lora_weights") != "pissa":
        return
    for path, layer in layers.items():
        try:
            layer.refuse_no_principal_part()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def places(
    model: nn.Module, layers: dict[str, Adapter], options: dict[str, Any]
) -> dict[str, Tensor]:
    """For each tensor's name in the file, one of the shape it must have."""
    wanted = {
        f"{PREFIX}{p}.{n}": w for p, m in layers.items() for n, w in m.own_parameters().items()
    }
    for path, module in trained_biases(model, layers, options["bias"]).items():
        wanted[PREFIX + bias_name(path, layers)] = module.bias
    for path, module in slots(model):
        if any(path.endswith(end) for end in options["modules_to_save"]):
            kept = module.current if isinstance(module, Retrained) else module
            wanted |= {f"{PREFIX}{path}.{n}": w for n, w in kept.state_dict().items()}
    if options.get("save_projection"):
        shared = next(iter(layers.values())).projections
        wanted |= {key: getattr(shared, name) for key, name in PROJECTIONS.items()}
    return wanted


def bias_name(path: str, layers: dict[str, Adapter]) -> str:
    return f"{path}.base_layer.bias" if path in layers else f"{path}.bias"


@torch.no_grad()
def load_tensors(
    model: nn.Module,
    layers: dict[str, Adapter],
    wanted: dict[str, Tensor],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    folder: str | Path,
) -> None:
    """Check all tensors, then put the layers into the model and the numbers into them."""
    tensors = without_frozen(layers, tensors, folder)
    troubles = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "mis-shaped": [
            f"{name} is {tuple(tensors[name].shape)}, model and config want {tuple(own.shape)}"
            for name, own in wanted.items()
            if name in tensors and tensors[name].shape != own.shape
        ],
    }
    said = [f"{kind}: {', '.join(names)}" for kind, names in troubles.items() if names]
    if said:
        raise CheckpointError(f"{folder} doesn't fit the model; {'; '.join(said)}")
    install(model, layers, modules_to_save=options["modules_to_save"], bias=options["bias"])
    if options.get("init_lora_weights") == "pissa":
        for layer in layers.values():
            layer.start_from_principal_part()
    # Now again: of modules that are trained whole, the copies.
    for name, own in places(model, layers, options).items():
        own.copy_(tensors[name])


def without_frozen(
    layers: dict[str, Adapter], tensors: dict[str, Tensor], folder: str | Path
) -> dict[str, Tensor]:
    """What is left without frozen weights: an adapted head's, which peft saves, too."""
    frozen = {f"{PREFIX}{path}.base_layer.weight": layer for path, layer in layers.items()}
    for key in frozen.keys() & tensors.keys():
        own = dense_weight(frozen[key].base_layer)
        if own.shape != tensors[key].shape or not torch.equal(own, tensors[key].to(own)):
            raise CheckpointError(f"{folder}: {key} isn't this model's: it is of another base")
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


# Writing


def config_of(layers: dict[str, Adapter]) -> dict[str, Any]:
    """What adapter_config.json says of these layers: what most have, and patterns."""
    each = {path: layer_options(layer) for path, layer in layers.items()}
    config, patterns = {}, {"r": "rank_pattern", "alpha": "alpha_pattern"}
    patterns["lora_alpha"] = "alpha_pattern"
    keys = [*next(iter(each.values()))]
    for key in keys:
        if any(keys != [*options] for options in each.values()):
            raise ValueError(
                f"several methods: {sorted({type(m).__name__ for m in layers.values()})}"
            )
        values = {path: options[key] for path, options in each.items()}
        config[key] = Counter(values.values()).most_common(1)[0][0]
        other = {path: value for path, value in values.items() if value != config[key]}
        if other and (key not in patterns or "projection_prng_key" in keys):
            raise ValueError(f"{key} differs between layers: {sorted(set(values.values()))}")
        if other:  # anchored: peft takes a pattern for an end of a path
            exact = {"^" + path.replace(".", r"\."): value for path, value in other.items()}
            config[patterns[key]] = exact
    return config | {"inference_mode": True}


def layer_options(layer: Adapter) -> dict[str, Any]:
    """A layer's keys of adapter_config.json."""
    if isinstance(layer, LoRA):
        return {
            "peft_type": "LORA",
            "r": layer.r,
            "lora_alpha": layer.lora_alpha,
            "lora_dropout": rate(layer.lora_dropout),
            "use_rslora": layer.use_rslora,
            "use_dora": isinstance(layer, DoRA),
            "init_lora_weights": "pissa" if layer.pissa else True,
        }
    if isinstance(layer, LoHa):
        return {"peft_type": "LOHA", "r": layer.r, "alpha": layer.alpha}
    if isinstance(layer, LoKr):
        return {
            "peft_type": "LOKR",
            "r": layer.r,
            "alpha": layer.alpha,
            "decompose_both": layer.decompose_both,
            "decompose_factor": layer.decompose_factor,
        }
    if isinstance(layer, VeRA):
        return {
            "peft_type": "VERA",
            "r": layer.r,
            "projection_prng_key": layer.projections.projection_prng_key,
            "save_projection": True,
            "vera_dropout": rate(layer.vera_dropout),
            "d_initial": layer.d_initial,
        }
    raise ValueError(f"{type(layer).__name__} isn't one of LoRA, DoRA, LoHa, LoKr, VeRA")


def rate(dropout: nn.Module) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0
