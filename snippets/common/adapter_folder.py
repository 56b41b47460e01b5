"""A peft folder's two files: adapter_config.json and adapter_model.safetensors.

What stands in them is the matter of snippets/peft/adapters.py. Pickle files are refused, as in
snippets/common/checkpoint.py.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from snippets.common.checkpoint import CheckpointError, is_a, read_json, tensor_names

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors by name, as they are.

    Raises:
        CheckpointError: no such folder, a missing or damaged file, or a pickle in its place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    config, file = read_json(folder / CONFIG), folder / TENSORS
    if not file.is_file():
        pickle = (folder / PICKLE).exists()
        refused = f"; {PICKLE}: pickle files can run code when read" if pickle else ""
        raise CheckpointError(f"there is no {file}{refused}")
    names = tensor_names(file)
    with safe_open(file, framework="pt") as opened:
        return config, {name: opened.get_tensor(name) for name in names}


def write_adapter(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Both files, in a folder that is made if there is none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    # One place in memory for each: safetensors refuses what is shared.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, folder / TENSORS, metadata={"format": "pt"})


def read_options(
    config: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]], source: str | Path
) -> dict[str, Any]:
    """The values of known keys, each with its type and default; null is the default.

    Raises:
        CheckpointError: a value of another type.
    """
    values = {}
    for key, (kind, default) in known.items():
        value = config.get(key)
        values[key] = default if value is None else value
        if value is not None and not is_a(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise CheckpointError(f"{source}: {key}={value!r} isn't of type {wanted}")
    return values


def report(message: str) -> None:
    warnings.warn(message, stacklevel=4)
