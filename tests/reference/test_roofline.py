"""Operations against torch's own counter, bytes against the tensors that a pass reads."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from snippets.common.model_shape import shape_of
from snippets.reference.roofline import (
    answer_seconds,
    experts_met,
    operations,
    pair_flops,
    pairs,
    power,
    roofline,
    traffic,
)
from tests.small_models import GOOD, MODELS, built

CHIP = dict(batch=3, weight_bits=16, cache_bits=16, chips=2, peak=1e12, bandwidth=1e10)
LATENT = [name for name in MODELS if "DeepSeek" in name]


def small(name: str):
    """On the meta device, where torch takes the kernels that its counter knows."""
    model, config = built(name)
    return model.bfloat16(), shape_of(config)


def grouped(a, b, *args, out_shape=None, **kwargs) -> int:
    """Which it doesn't know: each row goes through one expert's matrix."""
    return 2 * a[0] * a[1] * b[-1]


@torch.no_grad()
def counted(function, *inputs, **more) -> int:
    rules = {torch.ops.aten._grouped_mm: grouped}
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=rules) as counter:
        function(*inputs, **more)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_the_next_token_takes_what_torch_counts(name):
    """One query at a time: torch counts attention without a mask, and there is none to count."""
    (model, shape), b = small(name), 2
    for past in (3, 8, 20):  # windows are 9
        cache = model.new_cache()
        with torch.device("meta"), torch.no_grad():
            model(input_ids=torch.zeros(b, past, dtype=torch.long), cache=cache)
        expected = operations(shape, new=1, past=past, batch=b)["total"]
        if name in LATENT:  # values padded to the width of keys: p products more a pair
            assert model.model.layers[0].self_attn.absorbs(1, past + 1)
            expected += 2 * shape.num_heads * shape.qk_rope_head_dim * b * (past + 1) * 5
        token = torch.zeros(b, 1, dtype=torch.long, device="meta")
        assert counted(model, input_ids=token, cache=cache) == expected


@pytest.mark.parametrize("name", [n for n in MODELS if n not in LATENT])
def test_a_prompt_is_the_sum_of_its_tokens(name):
    shape, t, b = shape_of(built(name)[1]), 30, 2
    whole = operations(shape, new=t, past=0, batch=b)
    steps = [operations(shape, new=1, past=past, batch=b) for past in range(t)]
    for part in ("matrices", "attention"):
        assert whole[part] == sum(step[part] for step in steps)
    assert whole["head"] == steps[0]["head"] == 2 * 101 * 48 * b  # the last token's only


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_reads_a_prompt_with_expanded_heads(name):
    model, shape = small(name)
    t, layer = 12, model.model.layers[0].self_attn
    assert not layer.absorbs(t, t) and layer.absorbs(1, t)
    found = counted(layer, torch.zeros(1, t, 48, dtype=torch.bfloat16, device="meta"))
    sizes = [m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    # torch counts all t² pairs, and values as wide as they are.
    pair = pair_flops(shape, absorbed=False)
    assert found == 2 * t * sum(sizes) + pair * t * t


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("past", [0, 3, 30])
@pytest.mark.parametrize("new", [1, 2, 9, 20])
def test_pairs_are_those_of_the_mask(new, past, window):
    s = past + new
    causal = torch.ones(new, s, dtype=torch.bool).tril(past)
    if window:
        causal = causal.triu(past - window + 1)
    assert pairs(new, past, window) == causal.sum()


def test_power_is_power():
    for base, exponent in ((0.5, 7), (0.98, 1000), (0.0, 0), (0.3, 1)):
        assert power(base, exponent) == pytest.approx(base**exponent, rel=1e-12)


def test_the_experts_that_random_tokens_meet():
    shape = shape_of(built("DeepSeek-V3")[1])  # 3 of 8
    assert experts_met(shape, 1) == pytest.approx(3) and experts_met(shape, 1000) == 8
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(4000, 5, 8, generator=g).topk(3).indices  # 5 tokens
    met = torch.zeros(4000, 8).scatter_(1, chosen.flatten(1), 1).sum(1)
    assert met.mean().item() == pytest.approx(experts_met(shape, 5), rel=0.01)


@pytest.mark.parametrize("name", [n for n in MODELS if "MoE" not in n])
def test_one_token_reads_every_weight_once(name):
    """Of the embedding one row, of the experts the chosen ones."""
    model, shape = small(name)
    read = 0
    for path, w in model.named_parameters():
        if any(part in path for part in ("embed_tokens", "wte")) and not shape.tied:
            read += w.shape[1]
        elif ".experts." in path:
            read += w.numel() * shape.experts_per_token // len(w)
        else:
            read += w.numel()
    found = traffic(shape, new=1, past=0, batch=1, weight_bits=32, cache_bits=32)
    assert found["weights"] == pytest.approx(4 * read, rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_decode_reads_the_cache_and_adds_to_it(name):
    model, shape = small(name)
    cache = model.new_cache()
    with torch.device("meta"):
        model(input_ids=torch.zeros(2, 20, dtype=torch.long), cache=cache)
    about = dict(batch=2, weight_bits=16, cache_bits=16)
    found, fresh = (traffic(shape, new=1, past=past, **about)["cache"] for past in (20, 0))
    assert found == cache.nbytes + fresh > cache.nbytes


def test_the_slower_of_the_two_decides():
    slow = roofline(GOOD, new=1, past=9, **CHIP)
    assert slow["seconds"] == slow["moving"] > slow["computing"]
    assert slow["intensity"] < slow["ridge"] == 100
    fast = roofline(GOOD, new=900, past=0, **CHIP | {"bandwidth": 1e12})
    assert fast["seconds"] == fast["computing"] > fast["moving"]
    assert fast["intensity"] > fast["ridge"] == 1
    twice = roofline(GOOD, new=900, past=0, **CHIP | {"bandwidth": 1e12, "chips": 4})
    assert twice["seconds"] == fast["seconds"] / 2


def test_an_answer_is_its_passes():
    found = answer_seconds(GOOD, prompt=10, answer=4, **CHIP)
    later = [roofline(GOOD, new=1, past=past, **CHIP)["seconds"] for past in (10, 11, 12)]
    assert found["later"] == sum(later) and found["total"] == found["first"] + found["later"]
    assert answer_seconds(GOOD, prompt=10, answer=1, **CHIP)["later"] == 0
