"""Scaled rotary frequencies against transformers, and against the papers' formulas in loops.

Always with a factor above 1; tables are compared at positions beyond the trained length.
"""

import math
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from snippets.position.context_extension import (
    dynamic,
    linear,
    llama3,
    longrope,
    ntk_aware,
    scaled_frequencies,
    yarn,
    yarn_attention_factor,
    yarn_mscale,
)
from snippets.position.rope import inverse_frequencies, rope_table

LENGTH = "original_max_position_embeddings"
# What config.json of models holds: head dim, rope_theta, max_position_embeddings, rope_scaling.
LLAMA_3_1 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
QWEN3 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK_V3 = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
GPT_OSS = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "rope_type": "yarn", "truncate": False,
}  # fmt: skip
PUBLISHED = {
    "Llama 3.1": (128, 500000.0, 131072, LLAMA_3_1),
    "Llama 3.2": (64, 500000.0, 131072, LLAMA_3_1 | {"factor": 32.0}),
    "Qwen3": (128, 1000000, 40960, QWEN3),
    "DeepSeek-V3": (64, 10000, 163840, DEEPSEEK_V3),
    "gpt-oss": (64, 150000, 131072, GPT_OSS),
}
# Made up, so that each key acts: 12 pairs, no two numbers alike.
K, THETA, TRAINED = 24, 3000.0, 512
YARN = {"rope_type": "yarn", "factor": 5.0, "original_max_position_embeddings": TRAINED}
SMALL = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA_3_1 | {"original_max_position_embeddings": TRAINED, "factor": 6.0},
    "yarn": YARN,
    "betas": YARN | {"beta_fast": 11.5, "beta_slow": 2.5},
    "not truncated": YARN | {"beta_fast": 11.5, "beta_slow": 2.5, "truncate": False},
    "one beta": YARN | {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    "attention_factor": YARN | {"attention_factor": 0.9, "mscale": 2.0, "mscale_all_dim": 0.5},
    "mscale": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
    "mscale of 1 alone": YARN | {"mscale": 1.0},
}
CASES = PUBLISHED | {name: (K, THETA, 4 * TRAINED, SMALL[name]) for name in SMALL}
# Limits of the ramp beyond the first and the last pair.
CASES["yarn, ramp from below 0"] = (K, THETA, 500, YARN | {LENGTH: 100})
CASES["yarn, ramp beyond the head dim"] = (K, 8.0, 4 * TRAINED, YARN)
CASES["yarn, ramp without width"] = (K, THETA, 25, YARN | {LENGTH: 5})


def config(head_dim, theta, limit, scaling, kind=LlamaConfig):
    """transformers' config; it adds to the dict that it's given, so give a copy."""
    extra = {"head_dim": head_dim}
    if kind is Phi3Config:  # which has the trained length at the top level
        extra = {"pad_token_id": 0, LENGTH: scaling[LENGTH]}
    return kind(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=limit,
        rope_theta=theta,
        rope_scaling=dict(scaling),
        **extra,
    )


def ours(head_dim, theta, limit, scaling, length=None):
    return scaled_frequencies(
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=limit,
        length=length,
    )


def small(name, length=None, **changes):
    return ours(K, THETA, 4 * TRAINED, SMALL[name] | changes, length)


# Against transformers


@pytest.mark.parametrize("length", [None, 1, 3000, 2**18 + 1])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_factor_are_transformers_to_the_bit(name, length):
    head_dim, theta, _, scaling = CASES[name]
    kind = scaling.get("rope_type") or scaling["type"]
    theirs, their_factor = ROPE_INIT_FUNCTIONS[kind](config(*CASES[name]), seq_len=length)
    inv_freq, factor = ours(*CASES[name], length)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, theirs)
    assert factor == their_factor and isinstance(factor, float)
    if (kind, length) != ("dynamic", None) and (kind, length) != ("dynamic", 1):
        plain = inverse_frequencies(head_dim=head_dim, rope_theta=float(theta))
        assert (plain / inv_freq).max() > 1.3  # the feature was on


@pytest.mark.parametrize("name", CASES)
def test_tables_beyond_the_trained_length_are_llamas(name):
    limit = CASES[name][2]
    positions = torch.arange(3 * limit - 7, 3 * limit)[None]
    theirs = LlamaRotaryEmbedding(config(*CASES[name]))(torch.empty(0), positions)
    inv_freq, factor = ours(*CASES[name], length=3 * limit)
    for table, both_halves in zip(rope_table(inv_freq, positions), theirs, strict=True):
        # As its length is a tensor, transformers finds the new base of "dynamic" in float32:
        # relative errors of 1e-7, which the position multiplies.
        exact = {"rtol": 0, "atol": 1e-2 if name == "dynamic" else 0}
        assert_close(torch.cat((table, table), -1) * factor, both_halves, **exact)


@pytest.mark.parametrize("length", [None, 100, 128, 129, 5000])
@pytest.mark.parametrize("extra", [{}, {"factor": 6.0}, {"attention_factor": 1.3}])
def test_longrope_is_phi3s(length, extra):
    short, long = [1 + 0.1 * i for i in range(8)], [2.0 + i * i for i in range(8)]
    scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long} | extra
    scaling["original_max_position_embeddings"] = 128
    phi = config(16, 10000.0, 4096, scaling, Phi3Config)
    inv_freq, factor = ours(16, 10000.0, 4096, scaling, length)
    theirs, their_factor = ROPE_INIT_FUNCTIONS["longrope"](phi, seq_len=length)
    assert torch.equal(inv_freq, theirs) and factor == their_factor > 1.1
    module, positions = Phi3RotaryEmbedding(phi), torch.arange(length or 128)[None]
    for table, both_halves in zip(
        rope_table(inv_freq, positions), module(torch.empty(0), positions), strict=True
    ):
        assert_close(torch.cat((table, table), -1) * factor, both_halves, rtol=0, atol=0)


def test_the_softmax_scale_of_deepseek_is_yarn_mscale():
    for factor, mscale in ((40, 1.0), (40, 0.707), (4.0, 0.3), (1.0, 1.0), (1, 0)):
        theirs = modeling_deepseek_v3.yarn_get_mscale(factor, mscale)
        assert yarn_mscale(factor, mscale) == theirs
    scaling = modeling_deepseek_v3.yarn_apply_mscale(DEEPSEEK_V3 | {"rope_type": "yarn"}, 1.0)
    assert scaling == yarn_mscale(40, 1.0) * yarn_mscale(40, 1.0) > 1.8
    assert ours(*PUBLISHED["DeepSeek-V3"])[1] == 1.0  # all of it went into the scale


def test_the_two_spellings_are_one():
    for scaling in SMALL.values():
        old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
        both, theta = old | scaling, {"rope_theta": THETA}
        for other in (old, both, scaling | theta):
            inv_freq, factor = ours(K, THETA, 4 * TRAINED, other)
            assert torch.equal(inv_freq, ours(K, THETA, 4 * TRAINED, scaling)[0])
            assert factor == ours(K, THETA, 4 * TRAINED, scaling)[1]


def test_nothing_asked_nothing_changed():
    for scaling in (None, {"rope_type": "default"}, {"type": "default", "rope_theta": THETA}):
        inv_freq, factor = ours(K, THETA, TRAINED, scaling)
        assert torch.equal(inv_freq, inverse_frequencies(head_dim=K, rope_theta=THETA))
        assert factor == 1.0


def test_null_is_no_key():
    nulls = dict.fromkeys(("attention_factor", "beta_fast", "mscale", "mscale_all_dim"))
    assert torch.equal(small("yarn", **nulls)[0], small("yarn")[0])
    assert small("yarn", **nulls)[1] == small("yarn")[1]


def test_the_dict_stays_as_it_was():
    for scaling in SMALL.values():
        before = dict(scaling)
        ours(K, THETA, 4 * TRAINED, scaling)
        assert scaling == before


# Against the papers


def frequencies(theta=THETA):
    return [theta ** (-2 * i / K) for i in range(K // 2)]


def test_linear_is_the_same_as_dividing_positions():
    positions = torch.tensor([[0, 1, 511, 512, 1535]])
    scaled = linear(head_dim=K, rope_theta=THETA, factor=4)  # a power of two: exact
    plain = inverse_frequencies(head_dim=K, rope_theta=THETA)
    for ours, theirs in zip(
        rope_table(scaled, positions),
        ((positions / 4)[..., None].mul(plain).cos(), (positions / 4)[..., None].mul(plain).sin()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_ntk_keeps_the_fastest_and_divides_the_slowest():
    scaled = ntk_aware(head_dim=K, rope_theta=THETA, stretch=7.0)
    assert scaled[0] == 1.0
    assert_close(scaled[-1].item(), frequencies()[-1] / 7, rtol=1e-6, atol=0)
    by_hand = frequencies(THETA * 7.0 ** (K / (K - 2)))
    assert_close(scaled, torch.tensor(by_hand))


def test_dynamic_starts_beyond_the_trained_length():
    def at(length):
        return dynamic(
            head_dim=K, rope_theta=THETA, factor=3.0, max_position_embeddings=TRAINED, length=length
        )

    plain = inverse_frequencies(head_dim=K, rope_theta=THETA)
    for length in (None, 1, TRAINED - 1, TRAINED):
        assert torch.equal(at(length), plain)
    for length in (TRAINED + 1, 2 * TRAINED, 10 * TRAINED):
        stretch = 3 * length / TRAINED - 2
        assert_close(at(length)[-1].item(), frequencies()[-1] / stretch, rtol=1e-6, atol=0)
        assert at(length)[0] == 1.0


def test_a_cached_key_of_dynamic_is_not_where_a_new_pass_puts_it():
    """The trap of the method: parts equal the whole up to the trained length only."""
    position = torch.tensor([TRAINED - 1])
    cached = rope_table(small("dynamic", length=4 * TRAINED)[0], position)[0]
    assert torch.equal(rope_table(small("dynamic", length=1)[0], position)[0], cached)
    anew = rope_table(small("dynamic", length=8 * TRAINED)[0], position)[0]
    assert (cached - anew).abs().max() > 0.1


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_the_formula_of_the_authors_code(truncate):
    factor, fast, slow = 5.0, 11.5, 2.5
    first, last = (
        K * math.log(TRAINED / (beta * 2 * math.pi)) / (2 * math.log(THETA))
        for beta in (fast, slow)
    )
    assert 1 < first < last - 1 and first % 1 and last % 1
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    expected = []
    for i, frequency in enumerate(frequencies()):
        share = min(1, max(0, (last - i) / (last - first)))  # kept
        expected.append(share * frequency + (1 - share) * frequency / factor)
    scaled = yarn(
        head_dim=K, rope_theta=THETA, factor=factor, original_max_position_embeddings=TRAINED,
        beta_fast=fast, beta_slow=slow, truncate=truncate,
    )  # fmt: skip
    assert_close(scaled, torch.tensor(expected))
    turns = TRAINED * torch.tensor(frequencies()) / (2 * math.pi)
    assert_close(scaled[turns > 30], torch.tensor(frequencies())[turns > 30])
    assert_close(scaled[turns < 1], torch.tensor(frequencies())[turns < 1] / factor)


def test_the_papers_own_line_is_llama3s():
    """It isn't what the code does: the paper's ramp runs over turns, the code's over indices."""
    alpha, beta, factor = 1, 32, 5.0
    expected = []
    for frequency in frequencies():
        turns = TRAINED * frequency / (2 * math.pi)
        ramp = min(1, max(0, (turns - alpha) / (beta - alpha)))
        expected.append((1 - ramp) * frequency / factor + ramp * frequency)
    limits = {"low_freq_factor": alpha, "high_freq_factor": beta}
    common = {"factor": factor, "original_max_position_embeddings": TRAINED}
    paper = llama3(head_dim=K, rope_theta=THETA, **common, **limits)
    assert_close(paper, torch.tensor(expected))
    code = yarn(head_dim=K, rope_theta=THETA, **common)
    assert (code / paper).max() > 1.3


def test_yarns_attention_factor_is_the_papers():
    for factor in (2, 4.0, 16, 32.0):
        assert math.isclose(yarn_attention_factor(factor), 0.1 * math.log(factor) + 1)
    assert yarn_attention_factor(1) == 1.0


def test_defaults_are_those_of_the_authors_code():
    sizes = dict(head_dim=K, rope_theta=THETA, factor=4.0, original_max_position_embeddings=TRAINED)
    assert torch.equal(yarn(**sizes), yarn(**sizes, beta_fast=32, beta_slow=1, truncate=True))
    assert yarn_mscale(math.e) == pytest.approx(1.1)
    # What makes nothing longer changes no score, mscale or not.
    assert yarn_mscale(0.5) == yarn_mscale(1, 3.0) == 1.0


def test_llama3_is_the_released_code():
    factor, low, high = 6.0, 1.0, 4.0
    expected = []
    for frequency in frequencies():
        wavelength = 2 * math.pi / frequency
        if wavelength < TRAINED / high:
            expected.append(frequency)
        elif wavelength > TRAINED / low:
            expected.append(frequency / factor)
        else:
            smooth = (TRAINED / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    mixed = sum(f / factor < e < f for f, e in zip(frequencies(), expected, strict=True))
    assert mixed >= 2
    scaled = llama3(
        head_dim=K, rope_theta=THETA, factor=factor, original_max_position_embeddings=TRAINED,
        low_freq_factor=low, high_freq_factor=high,
    )  # fmt: skip
    assert_close(scaled, torch.tensor(expected))


@pytest.mark.parametrize("name", SMALL)
def test_no_pair_turns_faster_or_slower_than_the_factor_allows(name):
    plain = inverse_frequencies(head_dim=K, rope_theta=THETA)
    scaled = small(name, length=8 * TRAINED)[0]
    slower = plain / scaled
    most = 3 * 2 - 2 if name == "dynamic" else SMALL[name]["factor"]  # limit 4 TRAINED, twice
    assert slower.min() > 1 - 1e-5 and slower.max() < most * (1 + 1e-5)
    assert (slower.diff() > -1e-5).all()  # slow pairs are slowed at least as much


# Refused


def refused(message, scaling, **changes):
    arguments = {"head_dim": K, "rope_theta": THETA, "max_position_embeddings": 4 * TRAINED}
    with pytest.raises(ValueError, match=re.escape(message)):
        scaled_frequencies(**arguments | changes, rope_scaling=scaling)


@pytest.mark.parametrize("kind", ["ntk", "su", "mrope", "proportional", "Linear", ""])
def test_refuses_a_type_by_name(kind):
    refused(f"rope_type={kind!r}", {"rope_type": kind, "factor": 2.0})


def test_refuses_no_type_or_two():
    for scaling in ({}, {"factor": 2.0}, {"type": "linear", "rope_type": "yarn", "factor": 2.0}):
        refused("needs one rope_type", scaling)


@pytest.mark.parametrize("name", [*SMALL, "longrope"])
def test_refuses_a_missing_key_and_an_unknown_one(name):
    scaling = SMALL.get(name) or {
        "rope_type": "longrope", "short_factor": [1.0] * (K // 2),
        "long_factor": [2.0] * (K // 2), "original_max_position_embeddings": TRAINED,
    }  # fmt: skip
    kind = scaling["rope_type"]
    needed = {"factor", "original_max_position_embeddings"} & scaling.keys()
    needed |= {
        "low_freq_factor",
        "high_freq_factor",
        "short_factor",
        "long_factor",
    } & scaling.keys()
    for key in needed:
        message = f"{key} is missing for rope_type={kind!r}"
        refused(message, {k: v for k, v in scaling.items() if k != key})
        refused(message, scaling | {key: None})
    for key in (
        "llama_4_scaling_beta",
        "partial_rotary_factor",
        "mrope_section",
        "low_freq_factor",
    ):
        if key not in scaling:
            refused(f"{key}=0.5 isn't a key of rope_type={kind!r}", scaling | {key: 0.5})


def test_refuses_keys_of_another_type():
    refused("factor=2.0 isn't a key of rope_type='default'", {"type": "default", "factor": 2.0})
    refused("attention_factor=2.0", SMALL["linear"] | {"attention_factor": 2.0})
    refused("beta_fast=32", SMALL["llama3"] | {"beta_fast": 32})
    refused("original_max_position_embeddings=9", SMALL["dynamic"] | {
        "original_max_position_embeddings": 9})  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", 0.5), ("factor", "8"), ("factor", True), ("factor", math.inf),
        ("factor", math.nan), ("original_max_position_embeddings", 0), ("beta_fast", 0),
        ("beta_slow", -1), ("attention_factor", 0), ("truncate", 1), ("mscale", -1.0),
        ("mscale_all_dim", "1"), ("beta_slow", 0),
    ],
)  # fmt: skip
def test_refuses_values(key, value):
    refused(f"{key}={value!r} doesn't fit", YARN | {key: value})


@pytest.mark.parametrize("value", ["1.0", [0.0] * 4, [1.0, "1", 1.0, 1.0], [True] * 4, 1.0])
def test_refuses_divisors(value):
    scaling = {"rope_type": "longrope", "short_factor": value, "long_factor": [2.0] * (K // 2)}
    refused(
        f"short_factor={value!r} doesn't fit", scaling | {"original_max_position_embeddings": 9}
    )


def test_refuses_what_its_readers_disagree_on():
    for mscale in ({"mscale": 0.707}, {"mscale_all_dim": 1.0}, {"mscale": 0, "mscale_all_dim": 0}):
        refused("ambiguous", YARN | mscale)
        assert ours(K, THETA, TRAINED, YARN | mscale | {"attention_factor": 1.2})[1] == 1.2
    refused("truncate=None", YARN | {"truncate": None})
    refused("two bases", YARN | {"rope_theta": THETA + 1})


def test_refuses_limits_in_the_wrong_order():
    refused("beta_fast is below beta_slow", YARN | {"beta_fast": 1, "beta_slow": 2})
    refused("low_freq_factor isn't below", SMALL["llama3"] | {"high_freq_factor": 1.0})


def test_refuses_heads():
    for scaling in (None, *SMALL.values()):
        refused("head_dim=7", scaling, head_dim=7)
    refused("head_dim=2", SMALL["dynamic"], head_dim=2)
    with pytest.raises(ValueError, match="3 divisors for 4 pairs"):
        longrope(head_dim=8, rope_theta=10000, divisors=[1.0, 2.0, 3.0])
