"""Rotary frequencies for contexts longer than those a model was trained on.

Every method slows pairs down, so that far positions come to angles that training has shown:
position interpolation (Chen et al. 2023, arXiv:2306.15595), NTK-aware and dynamic scaling
(published as posts, described in the next), YaRN (Peng et al. 2023, arXiv:2309.00071),
Llama 3.1's (arXiv:2407.21783; numbers from its code and config.json) and LongRoPE
(Ding et al. 2024, arXiv:2402.13753).

Arguments are named as the keys of `rope_scaling` in config.json. `head_dim` means the features
that turn: a model with a `partial_rotary_factor` passes fewer than its heads have.

Axes: f frequency (head dim 2 f). Below, k is the head dim, L the trained length, s the factor.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from snippets.position.rope import inverse_frequencies, refuse_odd

LENGTH = "original_max_position_embeddings"
REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", LENGTH),
    "llama3": ("factor", LENGTH, "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor", LENGTH),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}


def linear(*, head_dim: int, rope_theta: float | int, factor: float | int) -> Float[Tensor, " f"]:
    """Position interpolation: all frequencies by s, the same as all positions by s."""
    return inverse_frequencies(head_dim=head_dim, rope_theta=float(rope_theta)) / factor


def ntk_aware(
    *, head_dim: int, rope_theta: float | int, stretch: float | int
) -> Float[Tensor, " f"]:
    """The base θ s^(k / (k - 2)): the fastest pair as it was, the slowest one slower by s.

    Raises:
        ValueError: a single pair, which would be the fastest and the slowest.
    """
    if head_dim < 4:
        raise ValueError(f"NTK-aware scaling needs two pairs or more: {head_dim=}")
    theta = rope_theta * stretch ** (head_dim / (head_dim - 2))
    return inverse_frequencies(head_dim=head_dim, rope_theta=float(theta))


def dynamic(
    *,
    head_dim: int,
    rope_theta: float | int,
    factor: float | int,
    max_position_embeddings: int,
    length: int | None = None,
) -> Float[Tensor, " f"]:
    """NTK-aware with s = factor · length / L - (factor - 1), and nothing changed up to L.

    The frequencies change with each token beyond L. Keys must be turned anew each time:
    those in a cache stand where the frequencies of an earlier length have put them.
    """
    length = max(length or 0, max_position_embeddings)
    stretch = factor * length / max_position_embeddings - (factor - 1)
    return ntk_aware(head_dim=head_dim, rope_theta=rope_theta, stretch=stretch)


def yarn(
    *,
    head_dim: int,
    rope_theta: float | int,
    factor: float | int,
    original_max_position_embeddings: int,
    beta_fast: float | int = 32,
    beta_slow: float | int = 1,
    truncate: bool = True,
) -> Float[Tensor, " f"]:
    """NTK-by-parts: a pair keeps its frequency, has it divided by s, or gets a mixture.

    Kept where a pair turns at least `beta_fast` times in the trained length, divided where at
    most `beta_slow` times, and a line in between. The line runs over the *index* of the pair,
    as in the authors' code, and `truncate` widens it to whole indices; the paper's runs over
    the turns and isn't widened, which is `llama3` with these limits.

    Raises:
        ValueError: beta_fast is below beta_slow.
    """
    refuse_odd(head_dim)
    if beta_fast < beta_slow:
        raise ValueError(f"beta_fast is below beta_slow: {beta_fast=}, {beta_slow=}")

    def pair_that_turns(times: float | int) -> float:
        """The i with L θ^(-2i/k) / 2π = times; seldom a whole number."""
        turns = original_max_position_embeddings / (2 * math.pi * times)
        return head_dim * math.log(turns) / (2 * math.log(rope_theta))

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)  # f
    kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    # Not inverse_frequencies / factor, which differs in the last bit.
    powers = rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (1 / (factor * powers)) * (1 - kept) + (1 / powers) * kept


def yarn_mscale(factor: float | int, mscale: float | int = 1) -> float:
    """0.1 · mscale · ln s + 1. With mscale 1 it's the paper's sqrt(1/t).

    DeepSeek's attention multiplies its softmax scale by yarn_mscale(s, mscale_all_dim)²
    besides: that reaches the features that don't turn.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_attention_factor(
    factor: float | int, mscale: float | int = 1, mscale_all_dim: float | int = 0
) -> float:
    """What multiplies cos and sin: the part of mscale that mscale_all_dim doesn't cover."""
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)


def llama3(
    *,
    head_dim: int,
    rope_theta: float | int,
    factor: float | int,
    original_max_position_embeddings: int,
    low_freq_factor: float | int,
    high_freq_factor: float | int,
) -> Float[Tensor, " f"]:
    """Llama 3.1's: like YaRN's, with a line over the *turns* in the trained length.

    Kept from `high_freq_factor` turns on, divided up to `low_freq_factor`; no attention factor.

    Raises:
        ValueError: low_freq_factor isn't below high_freq_factor.
    """
    if not low_freq_factor < high_freq_factor:
        raise ValueError(
            f"low_freq_factor isn't below high_freq_factor: {low_freq_factor=}, {high_freq_factor=}"
        )
    inv_freq = inverse_frequencies(head_dim=head_dim, rope_theta=float(rope_theta))
    turns = original_max_position_embeddings / (2 * math.pi / inv_freq)  # f
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return (1 - kept) * inv_freq / factor + kept * inv_freq


def longrope(
    *, head_dim: int, rope_theta: float | int, divisors: Sequence[float | int]
) -> Float[Tensor, " f"]:
    """Each frequency divided by a number of its own, found by search on the model.

    Raises:
        ValueError: not one divisor for each pair.
    """
    refuse_odd(head_dim)
    if len(divisors) != head_dim // 2:
        raise ValueError(f"{len(divisors)} divisors for {head_dim // 2} pairs")
    powers = rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return 1 / (torch.tensor(divisors, dtype=torch.float32) * powers)


def scaled_frequencies(
    *,
    head_dim: int,
    rope_theta: float | int,
    rope_scaling: Mapping[str, Any] | None,
    max_position_embeddings: int,
    length: int | None = None,
) -> tuple[Float[Tensor, " f"], float]:
    """The inverse frequencies, and the attention factor that multiplies cos and sin.

    Args:
        head_dim: how many features of a head turn.
        rope_theta: the base.
        rope_scaling: as in config.json; None changes nothing.
        max_position_embeddings: as in config.json; "dynamic" takes it for the trained length.
        length: of the whole sequence, cached tokens too. "dynamic" and "longrope" depend on
            it; without it they give what they give up to the trained length.

    Raises:
        ValueError: an unknown rope type; a key that is missing, unknown or of a wrong value.
    """
    head = {"head_dim": head_dim, "rope_theta": rope_theta}
    rope_type, given = read_scaling(rope_scaling, rope_theta)
    if rope_type == "linear":
        return linear(**head, **given), 1.0
    if rope_type == "dynamic":
        limits = {"max_position_embeddings": max_position_embeddings, "length": length}
        return dynamic(**head, **given, **limits), 1.0
    if rope_type == "llama3":
        return llama3(**head, **given), 1.0
    if rope_type == "yarn":
        scales = {key: given.pop(key) for key in ("mscale", "mscale_all_dim") if key in given}
        attention = given.pop("attention_factor", None)
        if attention is None:
            attention = yarn_attention_factor(given["factor"], **scales)
            # transformers takes one that is missing or 0 for neither given, DeepSeek doesn't.
            both = scales.get("mscale") and scales.get("mscale_all_dim")
            if not both and attention != yarn_attention_factor(given["factor"]):
                raise ValueError(f"ambiguous, as one of mscale, mscale_all_dim is nought: {scales}")
        return yarn(**head, **given), float(attention)
    if rope_type == "longrope":
        trained = given[LENGTH]
        factor = given.get("factor", max_position_embeddings / trained)
        by_rule = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        divisors = given["long_factor" if (length or 0) > trained else "short_factor"]
        return longrope(**head, divisors=divisors), float(given.get("attention_factor", by_rule))
    return inverse_frequencies(head_dim=head_dim, rope_theta=float(rope_theta)), 1.0


def read_scaling(
    rope_scaling: Mapping[str, Any] | None, rope_theta: float | int
) -> tuple[str, dict[str, Any]]:
    """The rope type, and the other keys after checks; null is the same as no key."""
    if rope_scaling is None:
        return "default", {}
    given = {key: value for key, value in rope_scaling.items() if value is not None}
    types = [given.pop(key) for key in ("rope_type", "type") if key in given]
    if not types or types[0] != types[-1]:
        raise ValueError(f"{rope_scaling=} needs one rope_type (or type, as it was called)")
    rope_type = types[0]
    if rope_type not in tuple(REQUIRED):
        raise ValueError(f"{rope_type=} isn't known, only {', '.join(REQUIRED)}")
    # Newer files keep the base here too.
    if given.pop("rope_theta", rope_theta) != rope_theta:
        raise ValueError(f"two bases: {rope_theta=}, in {rope_scaling=}")
    for key in REQUIRED[rope_type]:
        if key not in given:
            raise ValueError(f"{key} is missing for {rope_type=}")
    for key, value in given.items():
        if key not in REQUIRED[rope_type] + OPTIONAL.get(rope_type, ()):
            raise ValueError(f"{key}={value} isn't a key of {rope_type=}")
        refuse_value(key, value)
    if rope_scaling.get("truncate", True) is None:
        raise ValueError("truncate=None: transformers takes that for false")
    return rope_type, given


def refuse_value(key: str, value: Any) -> None:
    if key == "truncate":
        fits = isinstance(value, bool)
    elif key in ("short_factor", "long_factor"):
        fits = isinstance(value, (list, tuple)) and all(is_number(x) and x > 0 for x in value)
    elif key == "factor":
        fits = is_number(value) and value >= 1
    else:  # mscale, mscale_all_dim, low_freq_factor may be 0
        fits = is_number(value) and value >= 0
        if key in (LENGTH, "attention_factor", "beta_fast", "beta_slow"):
            fits = fits and value > 0
    if not fits:
        raise ValueError(f"{key}={value!r} doesn't fit")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
