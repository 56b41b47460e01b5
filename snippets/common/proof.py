"""Proofs that pages, tests and downloaded notebooks run: equal to the oracle, or refused.

A number on a page is worth what could have made it differ. So `parity` wants to see the
output without the taught feature too, and refuses a comparison that could not have failed.
"""

import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

# A notebook keeps the numbers beside the printed line under this type; Jupyter ignores it.
MIME = "application/vnd.forward-pass.proof+json"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
VISIBLE = 100  # the taught feature must show this many times above the tolerance


def parity(
    ours: Tensor,
    theirs: Tensor,
    *,
    oracle: str,
    config: Mapping[str, Any],
    without: Tensor,
    tolerance: float | None = None,
) -> None:
    """Show that `ours` equals `theirs` with the feature switched on; prints one line.

    Args:
        ours: our module's output.
        theirs: the oracle's output for the same input, of the same shape and dtype.
        oracle: the installed distribution that computed `theirs`; its version is looked up.
        config: the sizes and settings that were compared, for the record.
        without: the same output with the taught feature off or left out.
        tolerance: largest absolute difference allowed; default by dtype (float32: 1e-5).

    Raises:
        AssertionError: the outputs differ by more than the tolerance.
        ValueError: the comparison proves nothing: other shapes or dtypes, shared storage,
            near-constant outputs, or a feature whose effect is below 100 tolerances.
        importlib.metadata.PackageNotFoundError: the oracle is not installed.
    """
    if ours.shape != theirs.shape or without.shape != ours.shape:
        shapes = f"{tuple(ours.shape)}, {tuple(theirs.shape)}, {tuple(without.shape)}"
        raise ValueError(f"shapes of ours, theirs and without differ: {shapes}")
    if ours.dtype != theirs.dtype:
        raise ValueError(f"dtypes differ: ours is {ours.dtype}, theirs {theirs.dtype}")
    if ours.numel() == 0:
        raise ValueError("nothing to compare: the outputs are empty")
    if ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr():
        raise ValueError("ours and theirs share storage: that compares a tensor with itself")
    if tolerance is None:
        tolerance = TOLERANCES.get(ours.dtype, 0.0)
    ours, theirs, without = (t.detach().double() for t in (ours, theirs, without))
    for name, tensor in (("theirs", theirs), ("without", without)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")

    difference = (ours - theirs).abs().max().item()
    effect = (without - theirs).abs().max().item()
    spread = (theirs.max() - theirs.min()).item()
    if not difference <= tolerance:  # a NaN of ours lands here too
        raise AssertionError(
            f"not equal to {oracle}: largest difference {difference:.3g}, tolerance {tolerance:.3g}"
        )
    visible = VISIBLE * tolerance
    if spread <= visible:
        raise ValueError(f"near-constant outputs (spread {spread:.3g}) would equal almost anything")
    if effect < visible or effect == 0:
        raise ValueError(
            f"the feature changes the output by {effect:.3g} only, below {VISIBLE} tolerances "
            f"({visible:.3g}): a module without it would pass too"
        )
    oracle_version = version(oracle)
    record = {
        "oracle": oracle,
        "version": oracle_version,
        "config": {key: str(value) for key, value in config.items()},
        "difference": difference,
        "tolerance": tolerance,
        "effect": effect,
    }
    show(
        f"equal to {oracle} {oracle_version}: largest difference {difference:.1e}, "
        f"tolerance {tolerance:.0e}; without the feature {effect:.1e}",
        record,
    )


def rejects(check: Callable[[Any], object], *, right: Any, wrong: Any, mistake: str) -> None:
    """Show that `check` passes the right thing and fails on a planted mistake.

    Args:
        check: raises AssertionError for what is wrong; gets `right`, then `wrong`.
        right: what must pass.
        wrong: the same with the mistake in it.
        mistake: the mistake in a few words.

    Raises:
        AssertionError: the check let the mistake pass, or failed on the right thing.
    """
    check(right)
    try:
        check(wrong)
    except AssertionError as error:
        said = reason(error)
    else:
        raise AssertionError(f"the check doesn't see the mistake: {mistake}")
    show(f"caught: {mistake} ({said})", {"mistake": mistake})


def reason(error: AssertionError) -> str:
    """The first line of what it says; of torch's comparisons the line with the numbers."""
    lines = str(error).strip().splitlines() or ["assertion failed"]
    numbers = [line for line in lines[1:] if line.startswith(("Greatest absolute", "Expected "))]
    if not numbers:
        return lines[0]
    text = re.sub(r" at index .*|\.$", "", numbers[0])
    text = re.sub(r"\d+\.\d{3,}(e[+-]\d+)?", lambda number: f"{float(number[0]):.2g}", text)
    return text[0].lower() + text[1:]


def show(line: str, record: dict) -> None:
    """Print the line; in a notebook or on a page, keep the record with it."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(line)
    else:
        from IPython.display import display

        display({"text/plain": line, MIME: record}, raw=True)
