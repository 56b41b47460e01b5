"""How long prefill and decode take at best: operations, bytes, and the slower of the two.

The roofline: Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785. Two operations
a weight and token: Kaplan et al. 2020, arXiv:2001.08361. What inference reads: Pope et al. 2022,
arXiv:2211.05102. All in floating point, each sum and product in a fixed order, so that another
language gets the same to the bit.

Axes: as in `snippets/reference/calculators.py`; t new token.
"""

from snippets.common.model_shape import ModelShape
from snippets.reference.calculators import kv_cache, matrices, mlp, parameters


def pairs(new: int, past: int, window: int) -> int:
    """How many queries meet how many keys: each of the new tokens itself and what is before.

    Without a window new · past + new (new + 1) / 2; with one, at most `window` a token.
    """
    if not window:
        return new * past + new * (new + 1) // 2
    short = max(0, min(past + new, window) - past)  # tokens whose past is within the window
    return short * past + short * (short + 1) // 2 + (new - short) * window


def pair_flops(shape: ModelShape, *, absorbed: bool) -> float:
    """Operations for one query and one key in one layer, over all heads.

    4 h k: a product of width k for the score, and one for the value. Latent attention has wider
    products when it meets the latents themselves, as it does when it writes.
    """
    if not shape.kv_lora_rank:
        return 4.0 * shape.num_heads * shape.head_dim
    p, c = shape.qk_rope_head_dim, shape.kv_lora_rank
    width = 2 * c + p if absorbed else shape.qk_nope_head_dim + p + shape.v_head_dim
    return 2.0 * shape.num_heads * width


def operations(shape: ModelShape, *, new: int, past: int, batch: int) -> dict[str, float]:
    """Operations of one pass over `new` tokens behind `past` ones; logits of the last one only.

    Args:
        shape: the model.
        new: tokens of each text; one is decode, several are prefill.
        past: tokens of each text in the cache. Prefill of latent attention has none.
        batch: texts.
    """
    used = 0
    for matrix in matrices(shape):
        used += matrix.size * matrix.used
    seen = (shape.num_layers - shape.windowed_layers) * float(pairs(new, past, 0))
    seen += shape.windowed_layers * float(pairs(new, past, shape.window))
    found = {
        "matrices": 2.0 * used * (batch * new),
        "attention": pair_flops(shape, absorbed=new == 1) * seen * batch,
        "head": 2.0 * shape.vocab_size * shape.hidden_size * batch,
    }
    return found | {"total": found["matrices"] + found["attention"] + found["head"]}


def power(base: float, exponent: int) -> float:
    """base^exponent by squaring: libraries of two languages may differ in the last digit."""
    result = 1.0
    while exponent:
        if exponent % 2:
            result = result * base
        base = base * base
        exponent = exponent // 2
    return result


def experts_met(shape: ModelShape, tokens: int) -> float:
    """How many of a layer's experts so many tokens meet, if each chooses evenly: expected.

    e (1 - (1 - k / e)^n).
    """
    e = shape.num_experts
    return e * (1.0 - power(1.0 - shape.experts_per_token / e, tokens))


def traffic(
    shape: ModelShape, *, new: int, past: int, batch: int, weight_bits: int, cache_bits: int
) -> dict[str, float]:
    """Bytes that one pass must read or write: weights once, the cache read and written.

    Of the embedding only the tokens' rows are read; a tied head is read whole. Activations and
    what doesn't fit on the chip are left out: the least that it can be.
    """
    counts = parameters(shape)
    numbers = float(counts["total"] - counts["experts"])
    if not shape.tied:  # else the head reads it
        numbers = numbers - counts["embedding"] + batch * new * shape.hidden_size
    if shape.expert_layers:
        one = 0
        for outputs, inputs in mlp(shape, shape.moe_intermediate_size):
            one += outputs * inputs
        met = experts_met(shape, batch * new)
        numbers = numbers + shape.expert_layers * one * met
    weights = numbers * weight_bits / 8
    cache = {"batch": batch, "bits": cache_bits}
    read = float(kv_cache(shape, context=past, **cache)["bytes"])
    written = float(kv_cache(shape, context=new, **cache)["bytes"])
    return {"weights": weights, "cache": read + written, "total": weights + (read + written)}


def roofline(
    shape: ModelShape,
    *,
    new: int,
    past: int,
    batch: int,
    weight_bits: int,
    cache_bits: int,
    chips: int,
    peak: float,
    bandwidth: float,
) -> dict[str, float]:
    """Seconds of one pass: the longer of computing and moving, on chips that share it evenly.

    Args:
        shape: the model.
        new: tokens of each text.
        past: tokens of each text in the cache.
        batch: texts.
        weight_bits: 16 is bfloat16; below, weights are unpacked on the chip, which is not counted.
        cache_bits: of the cache's numbers.
        chips: how many; what they send each other is not counted.
        peak: operations a second of one.
        bandwidth: bytes a second of one's memory.

    Returns:
        Seconds, and `intensity`: operations a byte. Below `ridge` memory is what limits.
    """
    flops = operations(shape, new=new, past=past, batch=batch)["total"]
    moved = traffic(
        shape, new=new, past=past, batch=batch, weight_bits=weight_bits, cache_bits=cache_bits
    )["total"]
    computing, moving = flops / (chips * peak), moved / (chips * bandwidth)
    return {
        "operations": flops,
        "bytes": moved,
        "computing": computing,
        "moving": moving,
        "seconds": max(computing, moving),
        "intensity": flops / moved,
        "ridge": peak / bandwidth,
    }


def answer_seconds(
    shape: ModelShape,
    *,
    prompt: int,
    answer: int,
    batch: int,
    weight_bits: int,
    cache_bits: int,
    chips: int,
    peak: float,
    bandwidth: float,
) -> dict[str, float]:
    """Seconds until the first token, and for all later ones, each a pass of its own.

    The other arguments are those of `roofline`.

    Args:
        shape: the model.
        prompt: tokens.
        answer: tokens to write; the first comes with the prompt's pass.
    """

    def one(new: int, past: int) -> float:
        return roofline(
            shape, new=new, past=past, batch=batch, weight_bits=weight_bits,
            cache_bits=cache_bits, chips=chips, peak=peak, bandwidth=bandwidth,
        )["seconds"]  # fmt: skip

    first, later = one(prompt, 0), 0.0
    for number in range(1, answer):
        later = later + one(1, prompt + number - 1)
    return {"first": first, "later": later, "total": first + later}
