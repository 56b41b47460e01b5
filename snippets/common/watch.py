"""What the parts of two models put out, side by side: the first that differs names the mistake.

Axes: p part, b batch, t token, d features of the part.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@torch.no_grad()
def watch(model: nn.Module, parts: Mapping[str, str], **inputs: Any) -> dict[str, Tensor]:
    """The output of each part while the model reads the inputs, and last the logits.

    Args:
        model: ours, or one of transformers.
        parts: what to call a part, and its path as in `get_submodule`, in the order they run.
            Two models that name their parts differently can so be compared.
        inputs: what the model is called with.

    Raises:
        AttributeError: the model has no part of this path.
        ValueError: a part that didn't run.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, given, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [model.get_submodule(p).register_forward_hook(keep(name)) for name, p in parts.items()]
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name in parts if name not in seen]:
        raise ValueError(f"did not run: {', '.join(idle)}")
    ordered = {name: seen[name] for name in parts}
    return ordered | {"logits": getattr(output, "logits", output)}


def relative_errors(
    found: Mapping[str, Float[Tensor, "b t _"]], right: Mapping[str, Float[Tensor, "b t _"]]
) -> Float[Tensor, " p"]:
    """For each part |found - right| / |right|, the mean over all tokens.

    By token: a few tokens have values so large that they would hide the others' differences.
    """
    return torch.stack(
        [((found[p] - x).norm(dim=-1) / x.norm(dim=-1)).mean() for p, x in right.items()]
    )


def first_difference(
    found: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = 1e-5
) -> str | None:
    """The first part whose relative error is above the tolerance; None if there is none."""
    errors = relative_errors(found, right).tolist()
    return next((p for p, e in zip(right, errors, strict=True) if not e <= tolerance), None)
