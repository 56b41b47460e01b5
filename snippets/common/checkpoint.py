"""Reads a checkpoint folder as published: config.json, *.safetensors, their index.

Nothing is guessed and nothing skipped in silence. Pickle files are refused: reading one
runs whatever code is in it (https://docs.python.org/3/library/pickle.html).
"""

import dataclasses
import json
import types
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Keys of config.json that don't change what a model computes when it is evaluated. A config
# class can name more in a class variable INERT of its own.
INERT = {
    "_name_or_path", "_sliding_window_pattern", "architectures", "attention_dropout", "attn_pdrop",
    "auto_map", "aux_loss_alpha", "bos_token_id", "cache_implementation", "chunk_size_feed_forward",
    "dtype", "embd_pdrop", "eos_token_id", "ep_size", "id2label", "initializer_factor",
    "initializer_range", "is_llama_config", "label2id", "model_type", "n_ctx",
    "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "resid_pdrop",
    "return_dict", "router_aux_loss_coef", "router_jitter_noise", "seq_aux", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "task_specific_params", "torch_dtype", "transformers.js_config", "transformers_version",
    "use_cache",
    # How a text was to be sampled, which configs of 2021 to 2023 held.
    "diversity_penalty", "encoder_no_repeat_ngram_size", "length_penalty", "max_length",
    "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
    # Of vision models: dropout, and parts that the logits don't come from.
    "attention_probs_dropout_prob", "encoder_stride", "hidden_dropout_prob", "pooler_act",
    "pooler_output_size", "problem_type",
}  # fmt: skip

Config = TypeVar("Config")
Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint folder isn't what the model needs; says what, and in which file."""


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} isn't JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found


def read_config(
    folder: str | Path, config_class: type[Config], *, model_types: tuple[str, ...]
) -> Config:
    """config.json as a config dataclass, whose fields are named like the file's keys.

    A key without a field that could change the outputs is reported by a warning, not
    fatal: configs gain keys over the years. RoPE's settings are read in both spellings,
    `rope_theta` with `rope_scaling`, and `rope_parameters`. A field whose type is a
    dataclass takes an object of the file, read in the same way (`vision_config`).

    Args:
        folder: the checkpoint's folder.
        config_class: a dataclass; its `__post_init__` raises ValueError for a value
            that the model can't honour.
        model_types: the values of `model_type` that the model takes.

    Raises:
        CheckpointError: a missing file or key, a value of the wrong type, or one that is
            not supported.
    """
    path = Path(folder) / "config.json"
    found = read_json(path)
    model_type = found.get("model_type")
    if model_type not in model_types:
        raise CheckpointError(
            f"{path}: model_type={model_type!r} isn't supported; this class reads "
            f"{', '.join(map(repr, model_types))}"
        )
    config, unknown = build(found, config_class, str(path))
    if unknown:
        warnings.warn(f"{path}: not read: {', '.join(unknown)}", stacklevel=3)
    return config


def parse_config(
    found: Mapping[str, Any], config_class: type[Config], *, source: str | Path
) -> Config:
    """A part of a config.json, such as the dict under `vision_config`, as its dataclass.

    As `read_config` reads the whole; for models that choose the class of a part by its
    `model_type`.

    Args:
        source: what errors and the warning name, "config.json: vision_config".

    Raises:
        CheckpointError: a missing key, a value of the wrong type, or one that is not
            supported.
    """
    config, unknown = build(found, config_class, str(source))
    if unknown:
        warnings.warn(f"{source}: not read: {', '.join(unknown)}", stacklevel=2)
    return config


def build(
    found: Mapping[str, Any], config_class: type[Config], source: str
) -> tuple[Config, list[str]]:
    """The dataclass, and the keys that it has no field for."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if "rope_parameters" not in fields:
        found = old_rope_spelling(found, source)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in found]:
        raise CheckpointError(f"{source} lacks {', '.join(missing)}")
    if found.get("quantization_config") and "quantization_config" not in fields:
        raise CheckpointError(f"{source}: quantization_config isn't supported: full weights needed")
    # What is null, false or {} switches nothing on.
    on = {key for key, value in found.items() if value not in (None, {}) and value is not False}
    unknown = sorted(on - fields.keys() - INERT - getattr(config_class, "INERT", set()))
    hints = typing.get_type_hints(config_class)
    values = {name: found[name] for name in fields if name in found}
    for name, value in values.items():
        part = part_class(hints[name])
        if part is not None and isinstance(value, Mapping):
            values[name], deeper = build(value, part, f"{source}: {name}")
            unknown += [f"{name}.{key}" for key in deeper]
        elif not is_a(value, hints[name]):
            hint = hints[name]
            wanted = hint.__name__ if isinstance(hint, type) else hint
            raise CheckpointError(f"{source}: {name}={value!r} isn't of type {wanted}")
    try:
        return config_class(**values), unknown
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def part_class(hint: Any) -> type | None:
    """The dataclass that a field holds, also in `Part | None`."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value from JSON fits a field's type; an int also fits a float."""
    if isinstance(hint, types.UnionType):
        return any(is_a(value, part) for part in typing.get_args(hint))
    if hint is Any:
        return True
    kind = typing.get_origin(hint) or hint
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def old_rope_spelling(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`rope_parameters` (since transformers 5) as `rope_theta` with `rope_scaling`.

    `rope_scaling` comes out as None where nothing is scaled, else with a `rope_type`, which
    files of 2023 call `type`.

    Raises:
        CheckpointError: the spellings contradict each other, or one isn't a single set of
            parameters (some models have one for each type of layer).
    """
    rest = dict(config)
    said = {key: rest.pop(key, None) for key in ("rope_scaling", "rope_parameters")}
    said = {key: value for key, value in said.items() if value is not None}
    for key, value in said.items():
        single = isinstance(value, Mapping)
        if not single or any(isinstance(part, Mapping) for part in value.values()):
            raise CheckpointError(f"{source}: {key}={value!r} isn't a single set of parameters")
    thetas = [part.get("rope_theta") for part in (rest, *said.values())]
    thetas = [theta for theta in thetas if theta is not None]
    scalings = [scaling_of(value) for value in said.values()]
    if any(theta != thetas[0] for theta in thetas) or any(s != scalings[0] for s in scalings):
        shown = {"rope_theta": rest.get("rope_theta"), **said}
        listed = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        raise CheckpointError(f"{source}: these contradict each other: {listed}")
    if thetas:
        rest["rope_theta"] = thetas[0]
    if scalings:
        rest["rope_scaling"] = scalings[0]
    return rest


def scaling_of(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """What changes the rotary frequencies, with its `rope_type`; None if nothing does."""
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    scaling["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return None if scaling == {"rope_type": "default"} else scaling


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Where each tensor is: its name to its file.

    Raises:
        CheckpointError: no safetensors file, a listed file or tensor that is absent, a
            damaged file or index, a tensor in two files, or a single file beside an index
            that doesn't list it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    index = folder / INDEX
    listed = {}
    if index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(map(is_name, listed.values())):
            raise CheckpointError(f"{index} has no weight_map of tensors to files of the folder")
        files = [folder / name for name in sorted(set(listed.values()))]
        if absent := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(f"{index} lists files that are absent: {', '.join(absent)}")
        if (folder / SINGLE).exists() and SINGLE not in listed.values():
            # transformers would read the single file, others the listed ones.
            raise CheckpointError(f"{index} doesn't list {SINGLE}, which is there too: remove one")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        refused = f"; {', '.join(pickles)}: pickle files can run code when read" if pickles else ""
        raise CheckpointError(f"{folder} holds no *.safetensors{refused}")
    found: dict[str, Path] = {}
    for file in files:
        for name in tensor_names(file):
            if name in found:
                raise CheckpointError(f"{name} is in {found[name].name} and in {file.name}")
            found[name] = file
    for name, file in listed.items():
        if name not in found or found[name].name != file:
            raise CheckpointError(f"{index} says that {name} is in {file}, and it isn't")
    return found


def is_name(value: Any) -> bool:
    """Whether an index's value is the name of a file, not a path out of the folder."""
    return isinstance(value, str) and Path(value).name == value


def tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or cut short: {error}") from None


def read_tensors(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a folder by name, in their dtype on disk unless another is chosen."""
    by_file: dict[Path, list[str]] = {}
    for name, file in weight_files(folder).items():
        by_file.setdefault(file, []).append(name)
    tensors = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names:
                tensor = opened.get_tensor(name)
                floats = dtype is not None and tensor.is_floating_point()
                tensors[name] = tensor.to(dtype) if floats else tensor
    return tensors


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str | Path) -> None:
    """Give a model exactly these tensors, all of them; the model can be on `meta`.

    Raises:
        CheckpointError: tensors are missing, unexpected, mis-shaped, or no numbers with a
            fraction where the model has such; lists them all. The model keeps its own then.
    """
    wanted = model.state_dict()
    both = {name: (tensors[name], wanted[name]) for name in wanted if name in tensors}
    troubles = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "mis-shaped": [
            f"{name} is {tuple(found.shape)}, the config wants {tuple(own.shape)}"
            for name, (found, own) in both.items()
            if found.shape != own.shape
        ],
        "mis-typed": [
            f"{name} is {found.dtype}"
            for name, (found, own) in both.items()
            if found.is_floating_point() != own.is_floating_point()
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in troubles.items() if names]
    if found:
        raise CheckpointError(f"{source} doesn't fit {type(model).__name__}; {'; '.join(found)}")
    model.load_state_dict(tensors, assign=True)


def filled(
    model_class: Callable[[Any], Model],
    config: Any,
    tensors: Mapping[str, Tensor],
    *,
    source: str | Path,
) -> Model:
    """A model of exactly these tensors, ready to evaluate.

    It is built on `meta`, without memory: nothing is drawn that the file then replaces.

    Args:
        model_class: makes the model of the config.
        source: what errors name, such as the folder.

    Raises:
        CheckpointError: as `load_weights`.
    """
    with torch.device("meta"):
        model = model_class(config)
    load_weights(model, tensors, source=source)
    return model.eval()


def drop_tied_head(
    tensors: dict[str, Tensor], head: str, embedding: str, *, source: str | Path
) -> None:
    """Remove the head's matrix where a file holds it besides the embedding it is tied to.

    Raises:
        CheckpointError: the two differ, so they aren't tied, whatever the config says.
    """
    kept = tensors.pop(head, None)
    if kept is not None and not torch.equal(kept, tensors.get(embedding, kept)):
        raise CheckpointError(
            f"{source}: tie_word_embeddings is true, and {head} differs from {embedding}"
        )


def drop_head_if_tied(
    said: bool | None, tensors: dict[str, Tensor], head: str, embedding: str, *, source: str | Path
) -> bool:
    """Whether a head is the embedding's matrix, by the file; if so, it is removed from there.

    For models whose config says "tied" though nobody asked it. A file decides: the two are one
    where it holds no head, or the same numbers twice. A head of its own is kept, as in
    transformers, with a warning where the config contradicts it.

    Args:
        said: the config's `tie_word_embeddings`; None where it says nothing, and False for a
            head that is kept in any case.
    """
    if said is False:
        return False
    kept = tensors.get(head)
    if kept is None or torch.equal(kept, tensors.get(embedding, kept)):
        tensors.pop(head, None)
        return True
    if said:
        warnings.warn(
            f"{source}: tie_word_embeddings is true, and {head} differs from {embedding}: not tied",
            stacklevel=3,
        )
    return False
