"""Writing text: against transformers' generate and its logits warpers, and by statistics."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from snippets.common.generate import generate, next_token
from snippets.models.llama import Llama

B, T, V = 3, 9, 37


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Llama, LlamaForCausalLM]:
    """The same tiny random model, ours and transformers'."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(std=0.3, mean=1.0 if "norm" in name else 0.0)
    folder = tmp_path_factory.mktemp("tiny")
    theirs.save_pretrained(folder)
    return Llama.from_pretrained(folder), theirs


def prompts(padded: bool) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(3, V, (B, T))
    if not padded:
        return ids, None
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :4], mask[2, :1] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def theirs_writes(theirs, ids, mask, steps, ends=None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return theirs.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )


# Greedy


@pytest.mark.parametrize("padded", [False, True])
def test_greedy_equals_transformers(models, padded):
    ours, theirs = models
    ids, mask = prompts(padded)
    written = generate(ours, ids, max_new_tokens=14, attention_mask=mask)
    assert torch.equal(written, theirs_writes(theirs, ids, mask, 14))
    assert len(written[:, T:].unique()) > 5  # not one token for ever


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_end_at_different_steps(models, padded, count):
    ours, theirs = models
    ids, mask = prompts(padded)
    free = generate(ours, ids, max_new_tokens=14, attention_mask=mask)[:, T:]
    ends = [free[0, 3].item(), free[1, 8].item()][:count]
    hits = torch.isin(free, torch.tensor(ends))
    first = torch.where(hits.any(1), hits.int().argmax(1), 14)  # each row's own last step
    assert len(set(first.tolist())) > 1
    written = generate(
        ours, ids, max_new_tokens=14, attention_mask=mask, eos_token_id=ends, pad_token_id=0
    )
    assert torch.equal(written, theirs_writes(theirs, ids, mask, 14, ends))
    new = written[:, T:]
    for row, last in enumerate(first.tolist()):
        assert torch.equal(new[row, : last + 1], free[row, : last + 1][: new.shape[1]])
        assert (new[row, last + 1 :] == 0).all()


def test_it_stops_when_all_rows_have_ended(models):
    ours, _ = models
    ids, _ = prompts(padded=False)
    free = generate(ours, ids, max_new_tokens=6)[:, T:]
    written = generate(ours, ids, max_new_tokens=6, eos_token_id=free[:, 1].tolist())
    assert written.shape[1] <= T + 2
    one = generate(ours, ids[:1], max_new_tokens=6, eos_token_id=free[0, 0].item())
    assert torch.equal(one, torch.cat((ids[:1], free[:1, :1]), 1))


def test_behind_an_ended_row_stands_the_chosen_padding(models):
    ours, _ = models
    ids, _ = prompts(padded=False)
    free = generate(ours, ids, max_new_tokens=5)[:, T:]
    end = free[0, 0].item()
    assert (free[1] != end).all()
    written = generate(ours, ids[:2], max_new_tokens=5, eos_token_id=end, pad_token_id=2)
    assert written[0, T:].tolist() == [end, 2, 2, 2, 2]
    assert torch.equal(written[1, T:], free[1])


@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(models, padded):
    ours, _ = models
    ids, mask = prompts(padded)
    written = generate(ours, ids, max_new_tokens=10, attention_mask=mask)
    for _ in range(10):
        with torch.no_grad():
            new = ours(ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, new), 1)
        mask = None if mask is None else torch.cat((mask, torch.ones_like(new)), 1)
    assert torch.equal(written, ids)


def test_each_token_is_computed_once(models):
    ours, _ = models
    ids, _ = prompts(padded=False)
    seen = []
    hook = ours.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    generate(ours, ids, max_new_tokens=5)
    hook.remove()
    assert seen == [T, 1, 1, 1, 1]


def test_a_row_does_not_depend_on_its_neighbours(models):
    ours, _ = models
    ids, mask = prompts(padded=True)
    together = generate(ours, ids, max_new_tokens=10, attention_mask=mask)
    for row in range(B):
        alone = generate(ours, ids[row : row + 1, mask[row].bool()], max_new_tokens=10)
        assert torch.equal(alone[0, -10:], together[row, -10:])


def test_it_keeps_no_gradients(models):
    ours, _ = models
    ids, _ = prompts(padded=False)
    recording = []
    hook = ours.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    generate(ours, ids, max_new_tokens=2)
    hook.remove()
    assert recording == [False, False] and torch.is_grad_enabled()


def test_what_is_written_can_be_trained_on(models):
    ours, _ = models
    ids, _ = prompts(padded=False)
    written = generate(ours, ids, max_new_tokens=2)
    weight = torch.randn(V, 5, requires_grad=True)
    torch.nn.functional.embedding(written, weight).sum().backward()  # keeps the ids
    assert_close(weight.grad[:, 0], written.flatten().bincount(minlength=V).float())


# Sampling

DRAWS = 20_000


def frequencies(logits: Tensor, **settings) -> Tensor:
    new = torch.Generator().manual_seed(1)
    drawn = next_token(logits.expand(DRAWS, -1), **settings, generator=new)
    return drawn.bincount(minlength=logits.shape[-1]) / DRAWS


def test_the_samples_follow_the_softmax():
    logits = torch.randn(12) * 2
    for temperature in (0.5, 1.0, 3.0):
        p = (logits.double() / temperature).softmax(-1)
        found = frequencies(logits, temperature=temperature).double()
        # Pearson's chi-square with 11 degrees of freedom: above 31.3 once in 1,000 seeds.
        assert DRAWS * ((found - p) ** 2 / p).sum() < 31.3


def test_rows_are_drawn_from_their_own_logits():
    logits = torch.full((3, 5), -20.0)
    logits[0, 4] = logits[1, 0] = logits[2, 2] = 20.0
    assert next_token(logits, temperature=1.0).tolist() == [4, 0, 2]


def probabilities(monkeypatch, logits: Tensor, **settings) -> Tensor:
    """What `next_token` draws from."""
    handed = []

    def spy(p: Tensor, count: int, generator) -> Tensor:
        handed.append(p)
        return p.argmax(-1, keepdim=True)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", spy)
        next_token(logits, **settings)
    return handed[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(5, None), (None, 0.6), (5, 0.6), (1, None), (99, 0.95)])
def test_the_kept_tokens_equal_transformers(monkeypatch, temperature, top_k, top_p):
    logits = torch.randn(B, V) * 2
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = probabilities(monkeypatch, logits, **settings)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(min(top_k, V))(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = expected.softmax(-1)
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected)
    assert (found > 0).sum(-1).max() < V  # the filter did something


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    kept = {p: frequencies(logits, temperature=1.0, top_p=p) > 0 for p in (1e-9, 0.41, 0.71, 1.0)}
    assert [k.nonzero().flatten().tolist() for k in kept.values()] == [
        [1],
        [1, 3],
        [1, 2, 3],
        [0, 1, 2, 3],
    ]


def test_top_p_of_one_keeps_the_rarest_token(monkeypatch):
    """In float32 the sum of the others is 1 already."""
    logits = torch.tensor([[0.0] * 4 + [-25.0] * 3])
    assert logits.softmax(-1).cumsum(-1)[0, 3] == 1
    assert (probabilities(monkeypatch, logits, temperature=1.0, top_p=1.0) > 0).all()


def test_seeds_repeat_samples(models):
    ours, _ = models
    ids, _ = prompts(padded=False)

    def write(seed: int) -> Tensor:
        new = torch.Generator().manual_seed(seed)
        return generate(ours, ids, max_new_tokens=8, temperature=1.0, generator=new)

    assert torch.equal(write(1), write(1)) and not torch.equal(write(1), write(2))


def test_settings_reach_the_sampler(models):
    """With one token kept, sampling is greedy."""
    ours, _ = models
    ids, _ = prompts(padded=False)
    greedy = generate(ours, ids, max_new_tokens=8)
    for one in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        settings = {"temperature": 5.0} | one
        assert torch.equal(generate(ours, ids, max_new_tokens=8, **settings), greedy)
    assert not torch.equal(generate(ours, ids, max_new_tokens=8, temperature=5.0), greedy)


def test_half_precision_logits_are_sampled_in_float32(monkeypatch):
    logits = torch.randn(2, 5).bfloat16()
    found = probabilities(monkeypatch, logits, temperature=0.3, top_p=0.9)
    assert found.dtype == torch.float32


# Refused


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -0.1}, r"temperature=-0\.1 is below 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 keeps no token"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0\.0 isn't a probability"),
        ({"temperature": 1.0, "top_p": 1.1}, r"top_p=1\.1 isn't a probability"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 writes nothing"),
    ],
)
def test_settings_out_of_range_are_refused(models, settings, said):
    ids, _ = prompts(padded=False)
    with pytest.raises(ValueError, match=said):
        generate(models[0], ids, **{"max_new_tokens": 2} | settings)


def test_prompts_that_cannot_be_continued_are_refused(models):
    ids, mask = prompts(padded=True)
    with pytest.raises(ValueError, match=r"pad on the left; rows \[1, 2\]"):
        generate(models[0], ids, max_new_tokens=2, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="an empty prompt"):
        generate(models[0], ids[:, :0], max_new_tokens=2)
