"""Multi-token prediction against transformers' MtpLayer, and as a drafter against plain writing."""

import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from snippets.attention.kv_cache import LayerCache
from snippets.common.generate import generate
from snippets.models.llama import Llama, LlamaConfig, LlamaLayer
from snippets.moe.multi_token_prediction import (
    MTPModule,
    accept_or_resample,
    generate_with_drafter,
    multi_token_loss,
    predict_depths,
    probabilities,
)
from snippets.position.rope import rope_table

B, T, V, D = 2, 9, 23, 24
CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-3,
)


def model() -> Llama:
    torch.manual_seed(1)
    return redrawn(Llama(CONFIG))


def depth(seed: int = 2, eps: float = 1e-3) -> MTPModule:
    torch.manual_seed(seed)
    return redrawn(MTPModule(hidden_size=D, block=LlamaLayer(CONFIG), eps=eps))


def redrawn(module):
    """Norms that aren't 1, and layers that change much."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(std=0.4, mean=1.0 if "norm" in name else 0.0)
    return module.eval()


def rotation(t: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_table(CONFIG.frequencies()[0], torch.arange(first, first + t))


def ids(b: int = B, t: int = T) -> torch.Tensor:
    return torch.randint(V, (b, t), generator=torch.Generator().manual_seed(3))


def test_equals_transformers():
    ours = depth()
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-3,
        attn_implementation="sdpa",
    )
    theirs = MtpLayer(config, LlamaDecoderLayer, LlamaRMSNorm, 0)
    names = {"block.": "mtp_block.", "shared_head.norm.": "post_norm."}
    weights = ours.state_dict()
    for old, new in names.items():
        weights = {
            n.replace(old, new, 1) if n.startswith(old) else n: w for n, w in weights.items()
        }
    theirs.load_state_dict(weights)
    embedded, hidden = torch.randn(2, B, T, D)
    both = tuple(torch.cat((table, table), -1)[None] for table in rotation(T))
    expected = theirs(embedded, hidden, both, None, None, None)
    assert_close(ours(embedded, hidden, rotation(T)), expected)
    assert (ours(hidden, embedded, rotation(T)) - expected).abs().max() > 0.1


def test_equals_the_reports_equations():
    ours = depth(eps=0.01)
    embedded, hidden = torch.randn(2, B, T, D)

    def normed(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    left = normed(embedded, ours.enorm.weight, 0.01) @ ours.eh_proj.weight[:, :D].T
    right = normed(hidden, ours.hnorm.weight, 0.01) @ ours.eh_proj.weight[:, D:].T
    state = ours.block(left + right, rotation(T))
    expected = normed(state, ours.shared_head["norm"].weight, 0.01)
    assert_close(ours(embedded, hidden, rotation(T)), expected)


def test_parameters_are_named_as_in_checkpoints():
    names = {name for name in depth().state_dict() if not name.startswith("block.")}
    assert names == {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
    }  # fmt: skip
    default = MTPModule(hidden_size=D, block=torch.nn.Identity())
    assert {norm.eps for norm in (default.enorm, default.hnorm)} == {1e-6}
    assert default.shared_head["norm"].eps == 1e-6


@torch.no_grad()
def test_depths_see_the_token_that_comes_k_places_on():
    trunk, depths = model(), [depth(2), depth(4)]
    tokens = ids()
    hidden = trunk.model(tokens)
    outputs = predict_depths(depths, trunk.model.embed_tokens, hidden, tokens, rotation)
    assert [o.shape for o in outputs] == [(B, T - 1, D), (B, T - 2, D)]
    embedded = trunk.model.embed_tokens.weight[tokens]
    first = depths[0](embedded[:, 1:], hidden[:, :-1], rotation(T - 1))
    second = depths[1](embedded[:, 2:], first[:, :-1], rotation(T - 2))
    assert_close(outputs[0], first)
    assert_close(outputs[1], second)
    for place in range(T):  # state i of depth k knows the tokens up to i + k
        other = tokens.clone()
        other[:, place] = (tokens[:, place] + 1) % V
        changed = predict_depths(
            depths, trunk.model.embed_tokens, trunk.model(other), other, rotation
        )
        for k, (before, after) in enumerate(zip(outputs, changed, strict=True), start=1):
            moved = (before != after).any(-1).all(0).tolist()
            assert moved == [i + k >= place for i in range(T - k)]


def test_the_loss_is_the_mean_over_depths_and_targets():
    tokens = ids()
    logits = [torch.randn(B, T - 1, V), torch.randn(B, T - 2, V)]
    by_hand = []
    for k, guess in enumerate(logits, start=1):
        terms = [
            -guess[b, i].log_softmax(-1)[tokens[b, i + k + 1]]
            for b in range(B)
            for i in range(T - k - 1)
        ]
        by_hand.append(torch.stack(terms).mean())
    assert_close(multi_token_loss(logits, tokens), (by_hand[0] + by_hand[1]) / 2)
    assert_close(multi_token_loss(logits[:1], tokens), by_hand[0])


def test_the_loss_trains_the_trunk_too():
    trunk, depths = model(), [depth()]
    tokens = ids()
    states = predict_depths(depths, trunk.model.embed_tokens, trunk.model(tokens), tokens, rotation)
    loss = multi_token_loss([F.linear(s, trunk.lm_head.weight) for s in states], tokens)
    loss.backward()
    for part in (trunk.model.layers[0], trunk.model.norm, trunk.lm_head, depths[0].eh_proj):
        assert all(w.grad.abs().sum() > 0 for w in part.parameters())


def test_what_does_not_fit_is_refused(unchecked):
    ours = depth()
    with pytest.raises(ValueError, match=re.escape("(2, 8, 24) for hidden states of (2, 9, 24)")):
        ours(torch.randn(B, T - 1, D), torch.randn(B, T, D))
    with pytest.raises(ValueError, match="2 tokens for depth=2"):
        embed = torch.nn.Embedding(V, D)
        predict_depths([ours, ours], embed, torch.randn(B, 2, D), ids(t=2), rotation)
    with pytest.raises(ValueError, match="logits for 9 of 9 tokens at depth=1"):
        multi_token_loss([torch.randn(B, T, V)], ids())
    with pytest.raises(ValueError, match="no depth to predict"):
        multi_token_loss([], ids())


# As a drafter


def parts(trunk: Llama, module: MTPModule):
    """What `generate_with_drafter` takes, and a list that gets the tokens of each pass."""
    passes = []

    def run(tokens, cache):
        passes.append(tokens.shape[1])
        return trunk.model(tokens, cache=cache)

    def draft(tokens, hidden, cache):
        turned = rotation(tokens.shape[1], cache.length)
        embedded = trunk.model.embed_tokens(tokens)
        return trunk.lm_head(module(embedded, hidden, turned, None, cache))

    return (run, trunk.lm_head, draft), passes


@pytest.mark.parametrize("new", [1, 2, 3, 20])
@pytest.mark.parametrize("t", [1, T])
def test_greedy_text_is_the_models_own(new, t):
    trunk, tokens = model(), ids(1, t)
    functions, passes = parts(trunk, depth())
    cache = trunk.new_cache()
    written, kept = generate_with_drafter(*functions, cache, tokens, max_new_tokens=new)
    assert torch.equal(written, generate(trunk, tokens, max_new_tokens=new))
    assert passes == [t] + [2] * len(kept)
    assert new <= 1 + len(kept) + sum(kept) <= new + 1


@torch.no_grad()
def test_the_caches_hold_what_is_settled():
    """After refusals, the caches are those of a fresh pass over the text."""
    trunk, tokens = model(), ids(1)
    functions, _ = parts(trunk, depth())
    cache = trunk.new_cache()
    written, kept = generate_with_drafter(*functions, cache, tokens, max_new_tokens=15)
    assert not all(kept)
    fresh = trunk.new_cache()
    trunk.model(written[:, : cache.length], cache=fresh)
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        for held, expected in zip(one.store, other.store, strict=True):
            assert_close(held[..., : cache.length, :], expected[..., : cache.length, :])


def test_a_drafter_that_knows_the_model_is_always_right():
    """The model itself, run ahead, as its drafter: every guess stays, two tokens a pass."""
    trunk, tokens = model(), ids(1)
    run, head, _ = parts(trunk, depth())[0]
    own = trunk.new_cache()
    trunk.model(tokens[:, :1], cache=own)

    def oracle(after, hidden, cache):
        return trunk(after, cache=own)

    written, kept = generate_with_drafter(
        run, head, oracle, trunk.new_cache(), tokens, max_new_tokens=12
    )
    assert torch.equal(written, generate(trunk, tokens, max_new_tokens=12))
    assert all(kept) and len(kept) == 6


def test_the_draft_sees_each_state_with_the_token_after_it():
    trunk, tokens = model(), ids(1)
    (run, head, draft), _ = parts(trunk, depth())
    seen = []

    def watched(after, hidden, cache):
        seen.append((after, hidden))
        return draft(after, hidden, cache)

    written, _ = generate_with_drafter(
        run, head, watched, trunk.new_cache(), tokens, max_new_tokens=10
    )
    after, hidden = (torch.cat(pieces, 1) for pieces in zip(*seen, strict=True))
    assert torch.equal(after, written[:, 1 : 1 + after.shape[1]])
    with torch.no_grad():
        assert_close(hidden, trunk.model(written)[:, : after.shape[1]])


@pytest.mark.parametrize("guess_from", ["q", "far from q"])
def test_sampled_tokens_are_distributed_as_p(guess_from):
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    q = torch.tensor([0.1, 0.3, 0.2, 0.4] if guess_from == "q" else [0.0, 0.9, 0.1, 0.0])
    drawn = torch.Generator().manual_seed(0)
    n, counts, stayed = 20000, torch.zeros(4), 0
    for guess in torch.multinomial(q, n, replacement=True, generator=drawn).tolist():
        token, stays = accept_or_resample(guess, p, q, drawn)
        counts[token] += 1
        stayed += stays
        assert not stays or token == guess
    # Five standard deviations of a count.
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    overlap = torch.minimum(p, q).sum().item()
    assert stayed / n == pytest.approx(overlap, abs=0.02)


def test_its_generator_decides():
    p, q = torch.full((50,), 0.02), torch.zeros(50)
    q[0] = 1.0

    def drawn(seed):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        return [accept_or_resample(0, p, q, generator) for _ in range(20)]

    torch.manual_seed(1)
    first = drawn(0)
    torch.manual_seed(2)
    assert drawn(0) == first != drawn(1)


def test_the_block_gets_the_mask():
    module, x, h = depth(), torch.randn(B, T, D), torch.randn(B, T, D)
    allowed = torch.ones(B, 1, T, T, dtype=torch.bool).tril()
    allowed[1, :, 3:, 1] = False
    turned = rotation(T)
    with torch.no_grad():
        plain, masked = module(x, h, turned), module(x, h, turned, allowed)
    assert_close(plain[0], masked[0])
    assert (plain - masked)[1, 3:].abs().amax(-1).min() > 1e-4


def test_a_guess_that_cannot_be_never_stays():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for seed in range(20):
        drawn = torch.Generator().manual_seed(seed)
        assert accept_or_resample(1, p, q, drawn) == (0, False)
        assert accept_or_resample(0, p, p, drawn) == (0, True)


def test_sampled_text_has_the_models_distribution():
    """Second token of two, over many runs, against the sum over first tokens."""
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=12,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    trunk = redrawn(Llama(config))
    module = redrawn(MTPModule(hidden_size=12, block=LlamaLayer(config)))
    inv_freq = config.frequencies()[0]

    def draft(tokens, hidden, cache):
        places = torch.arange(cache.length, cache.length + tokens.shape[1])
        embedded = trunk.model.embed_tokens(tokens)
        return trunk.lm_head(module(embedded, hidden, rope_table(inv_freq, places), None, cache))

    def run(tokens, cache):
        return trunk.model(tokens, cache=cache)

    tokens, drawn, n = torch.tensor([[1, 4]]), torch.Generator().manual_seed(1), 700
    counts = torch.zeros(5, 5)
    for _ in range(n):
        written, _ = generate_with_drafter(
            run, trunk.lm_head, draft, trunk.new_cache(), tokens,
            max_new_tokens=2, temperature=1.3, generator=drawn,
        )  # fmt: skip
        counts[written[0, 2], written[0, 3]] += 1
    with torch.no_grad():
        first = (trunk(tokens)[0, -1] / 1.3).softmax(-1)
        longer = torch.cat((tokens.expand(5, -1), torch.arange(5)[:, None]), 1)
        joint = first[:, None] * (trunk(longer)[:, -1] / 1.3).softmax(-1)
    assert ((counts / n - joint).abs() <= 5 * (joint * (1 - joint) / n).sqrt() + 1e-9).all()


def test_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert probabilities(logits, 0.0).tolist() == [0, 1, 0]
    assert_close(probabilities(logits, 2.0), (logits / 2).softmax(-1))
    assert probabilities(logits.bfloat16(), 1.0).dtype == torch.float32
    with pytest.raises(ValueError, match=r"temperature=-0\.1 is below 0"):
        probabilities(logits, -0.1)


def test_prompts_that_cannot_be_drafted_for_are_refused(unchecked):
    trunk = model()
    functions, _ = parts(trunk, depth())
    for shape in ((2, 3), (1, 0)):
        with pytest.raises(ValueError, match=re.escape(f"{shape}")):
            tokens = torch.zeros(shape, dtype=torch.long)
            generate_with_drafter(*functions, trunk.new_cache(), tokens, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens=0 writes nothing"):
        generate_with_drafter(*functions, trunk.new_cache(), ids(1), max_new_tokens=0)


@torch.no_grad()
def test_chunks_through_a_cache_and_half_precision():
    ours, cache = depth(), LayerCache()
    embedded, hidden = torch.randn(2, B, T, D)
    outputs = [
        ours(embedded[:, part], hidden[:, part], rotation(len(part), int(part[0])), None, cache)
        for part in torch.arange(T).split([4, 1, 4])
    ]
    assert_close(torch.cat(outputs, 1), ours(embedded, hidden, rotation(T)))
    turned = tuple(table.bfloat16() for table in rotation(T))
    low = ours.bfloat16()(embedded.bfloat16(), hidden.bfloat16(), turned)
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_compiles_whole(unchecked):
    ours = depth()
    embedded, hidden = torch.randn(2, B, T, D)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close(compiled(embedded, hidden, rotation(T)), ours(embedded, hidden, rotation(T)))
