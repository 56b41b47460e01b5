"""Counting against dictionaries, fractions and torch; measures against torch and transformers.

The texts use few tokens, so that contexts repeat, are missing, and end in a row.
"""

import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from snippets.foundations.what_is_a_language_model import (
    NGramModel,
    bits_per_character,
    perplexity,
    surprisal,
    windows,
)

N, V, B = 400, 7, 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def text(length: int = N) -> torch.Tensor:
    """Tokens of unequal frequency that depend on their predecessor; V - 1 never occurs."""
    tokens = [0]
    for draw in (torch.rand(length - 1) ** 2).tolist():
        tokens.append((tokens[-1] + int(3 * draw)) % (V - 1))
    return torch.tensor(tokens)


def by_dictionary(tokens: list[int], context: tuple, smoothing: Fraction) -> list[Fraction]:
    """The formula in exact fractions, from counts of slices."""
    c = len(context)
    grams = Counter(tuple(tokens[i : i + c + 1]) for i in range(len(tokens) - c))
    total = sum(count for gram, count in grams.items() if gram[:-1] == context)
    if total == 0:
        return [Fraction(1, V)] * V
    return [(grams[*context, t] + smoothing) / (total + smoothing * V) for t in range(V)]


@pytest.mark.parametrize("smoothing", [0, 1, Fraction(1, 8)])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_counts_in_a_dictionary(order, smoothing):
    tokens = text()
    model = NGramModel(order=order, vocab_size=V, smoothing=float(smoothing)).fit(tokens)
    contexts = torch.randint(V, (B, order - 1))
    contexts[: B // 2] = windows(tokens, order)[0][-(B // 2) :]  # the last ones count too
    expected = [by_dictionary(tokens.tolist(), tuple(c), smoothing) for c in contexts.tolist()]
    got = model(contexts)
    assert_close(got.exp(), torch.tensor([[float(p) for p in row] for row in expected]))
    assert_close(got.exp().sum(-1), torch.ones(B))


def test_a_bigram_model_equals_torch_bincount_and_categorical():
    tokens = text()
    pairs = torch.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).view(V, V)
    model = NGramModel(order=2, vocab_size=V, smoothing=0.5).fit(tokens)
    expected = torch.distributions.Categorical(probs=pairs + 0.5).logits
    assert_close(model(torch.arange(V)[:, None]), expected)


def test_keeps_no_more_rows_than_the_text_has_contexts():
    tokens = text()
    model = NGramModel(order=4, vocab_size=V).fit(tokens)
    known = {tuple(c) for c in windows(tokens, 4)[0].tolist()}
    assert model.counts.shape == (len(known) + 1, V)
    assert model.counts.sum() == N - 3 and model.counts[-1].sum() == 0


def test_contexts_are_told_apart_by_the_order_of_their_tokens():
    model = NGramModel(order=3, vocab_size=V).fit(torch.tensor([1, 2, 3, 2, 1, 4]))
    log_probs = model(torch.tensor([[1, 2], [2, 1]]))
    assert log_probs.argmax(-1).tolist() == [3, 4]
    assert_close(log_probs.amax(-1), torch.zeros(2))


def test_unseen_contexts_say_nothing_and_unseen_tokens_are_impossible():
    model = NGramModel(order=2, vocab_size=V).fit(text())
    seen, unseen = model(torch.tensor([[0], [V - 1]]))
    assert seen[V - 1] == -math.inf
    assert_close(unseen, torch.full((V,), -math.log(V)))
    assert perplexity(seen[None], torch.tensor([V - 1])) == math.inf


@pytest.mark.parametrize("order", [1, 2, 4])
def test_an_unfitted_model_knows_nothing(order):
    model = NGramModel(order=order, vocab_size=V, smoothing=1.0)
    contexts = torch.randint(V, (B, order - 1))
    assert_close(model(contexts).exp(), torch.full((B, V), 1 / V))


def test_fits_anew_each_time():
    model, tokens = NGramModel(order=2, vocab_size=V), text()
    model.fit(tokens.flip(0))
    again, once = model.fit(tokens), NGramModel(order=2, vocab_size=V).fit(tokens)
    assert again is model and torch.equal(again.counts, once.counts)


def test_counts_are_where_the_cross_entropy_of_a_table_is_smallest():
    tokens = text()
    model = NGramModel(order=2, vocab_size=V, smoothing=0.0).fit(tokens)
    table = model(torch.arange(V)[:, None]).requires_grad_()
    F.cross_entropy(table[tokens[:-1]], tokens[1:]).backward()
    assert_close(table.grad, torch.zeros(V, V), atol=1e-7, rtol=0)


def test_windows_are_the_slices_of_a_text():
    contexts, following = windows(torch.arange(9), 4)
    assert contexts.tolist() == [[i, i + 1, i + 2] for i in range(6)]
    assert following.tolist() == list(range(3, 9))
    contexts, following = windows(torch.arange(9), 1)
    assert contexts.shape == (9, 0) and following.tolist() == list(range(9))
    assert windows(torch.arange(4), 4)[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surprisal_equals_torch_cross_entropy(dtype):
    logits = (5 * torch.randn(2, B, V)).to(dtype)
    tokens = torch.randint(V, (2, B))
    expected = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
    assert_close(surprisal(logits, tokens), expected)
    assert_close(perplexity(logits, tokens), expected.mean().exp())
    assert_close(bits_per_character(logits, tokens, 40), expected.sum() / math.log(2) / 40)


def test_perplexity_equals_the_loss_of_transformers():
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # far from guessing evenly
    )
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(37, (2, 13))
    with torch.no_grad():
        out = llama(ids, labels=ids)
    assert_close(perplexity(out.logits[:, :-1], ids[:, 1:]), out.loss.exp())
    assert abs(perplexity(out.logits, ids) - out.loss.exp()) > 1  # the shift matters


def test_even_guesses_have_the_perplexity_of_their_number():
    tokens = torch.randint(V, (B,))
    assert_close(perplexity(torch.full((B, V), 3.0), tokens), torch.tensor(float(V)))
    eight = torch.zeros(B, 8)
    assert_close(bits_per_character(eight, tokens, B), torch.tensor(3.0))


def test_bits_per_character_does_not_depend_on_the_tokens():
    """One model, its characters taken two at a time as V * V tokens: the square, the same bits."""
    tokens = text(2 * B + 1)
    model = NGramModel(order=2, vocab_size=V, smoothing=1.0).fit(text())
    single = model(tokens[:-1, None])
    first, second = single[::2], model(torch.arange(V)[:, None])  # b v, v v
    pairs = (first[:, :, None] + second).flatten(1)  # b vv
    names = tokens[1::2] * V + tokens[2::2]
    assert_close(perplexity(pairs, names), perplexity(single, tokens[1:]) ** 2)
    assert_close(
        bits_per_character(pairs, names, 2 * B), bits_per_character(single, tokens[1:], 2 * B)
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"order": 0}, "order=0 is below 1"),
        ({"smoothing": -0.1}, "smoothing=-0.1 below 0"),
    ],
)
def test_refuses_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        NGramModel(**({"order": 2, "vocab_size": V} | wrong))


def test_refuses_tokens_and_contexts_that_do_not_fit():
    model = NGramModel(order=3, vocab_size=V)
    for token in (V, -1):
        with pytest.raises(ValueError, match="tokens outside 0 … 6"):
            model.fit(torch.tensor([0, 1, token, 1]))
    with pytest.raises(ValueError, match="a text of 2 tokens has no window of 3"):
        model.fit(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="contexts of 1 tokens for order 3"):
        model(torch.zeros(B, 1, dtype=torch.int64))
