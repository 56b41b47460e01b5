"""The task of text to JSON: nothing leaks, labels fit, the metric is greedy decoding."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from snippets.common.extraction import (
    FORMS,
    HELD_OUT,
    IGNORED,
    SEEN,
    answer_loss,
    encode,
    exact_match,
    read,
    sentences,
)
from snippets.common.generate import generate
from snippets.models.llama import Llama
from weights import smollm2

ROOT = Path(__file__).parents[2]


class Letters:
    """A tokenizer of letters, each its code point."""

    eos_token_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def test_answers_are_json_of_what_the_text_says():
    for held_out in (False, True):
        for prompt, answer in sentences(200, seed=1, held_out=held_out):
            said = json.loads(answer)
            assert list(said) == ["name", "age", "city"]
            assert all(str(value) in prompt for value in said.values())
            assert prompt.endswith(".\n") and prompt.count("\n") == 1
            assert type(said["age"]) is int and 20 <= said["age"] <= 79


def test_what_is_held_out_stands_in_no_training_sentence():
    seen = " ".join(prompt for prompt, _ in sentences(2000, seed=0)).lower()
    for kind in SEEN:
        words, others = (bag[kind].split() for bag in (SEEN, HELD_OUT))
        assert len({*words, *others}) == len(words) + len(others)
        assert all(word.lower() in seen for word in words)
        assert not any(f" {word.lower()}" in seen for word in others)
    forms = [f for f in FORMS if "moved to" in f]
    assert len(forms) == 1 and "moved to" in seen


def test_a_seed_gives_the_same_and_a_prefix():
    first = sentences(9, seed=4)
    assert sentences(5, seed=4) == first[:5] and len({*first}) == 9
    assert sentences(5, seed=5) != first[:5]
    assert sentences(5, seed=4, held_out=True) != first[:5]
    assert sentences(0, seed=4) == []


def test_labels_are_the_answer_and_its_end():
    ids, labels = encode([("ab\n", "cd"), ("a\n", "cdef")], Letters())
    assert ids.tolist() == [
        [97, 98, 10, 99, 100, 0, 0],
        [97, 10, 99, 100, 101, 102, 0],
    ]
    no = IGNORED
    assert labels.tolist() == [[no, no, no, 99, 100, 0, no], [no, no, 99, 100, 101, 102, 0]]


def test_refuses_to_encode_nothing():
    with pytest.raises(ValueError, match="0 pairs"):
        encode([], Letters())


def test_the_loss_is_that_of_the_answers_alone():
    labels = torch.tensor([[IGNORED, IGNORED, 2, 0], [IGNORED, 3, 0, IGNORED]])
    logits = torch.randn(2, 4, 5)
    log = logits.log_softmax(-1)
    expected = -(log[0, 1, 2] + log[0, 2, 0] + log[1, 0, 3] + log[1, 1, 0]) / 4
    assert_close(answer_loss(logits, labels), expected)


def test_one_wrong_token_is_no_match():
    labels = torch.tensor([[IGNORED, 2, 0], [IGNORED, 1, IGNORED]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 2] = logits[0, 1, 0] = logits[1, 0, 1] = 1
    assert exact_match(logits, labels) == 1
    logits[0, 1, 3] = 2
    assert exact_match(logits, labels) == 0.5
    logits[1, 1:] = torch.randn(2, 4)  # predicts what isn't asked
    assert exact_match(logits, labels) == 0.5


def test_matches_exactly_where_greedy_decoding_gives_the_answer():
    folder = smollm2.prepare(ROOT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, dtype=torch.float32)
    pairs = sentences(2, seed=0, held_out=True)
    for prompt, answer in pairs:
        ids, labels = encode([(prompt, answer)], tokenizer)
        start = (labels[0] != IGNORED).nonzero()[0, 0]
        whole = generate(model, ids[:, :start], max_new_tokens=4)[0]
        # What the model itself writes is an answer that it gives whole; the asked one isn't.
        own = whole[None].clone()
        marks = own.clone()
        marks[:, :start] = IGNORED
        with torch.no_grad():
            assert exact_match(model(own), marks) == 1
            assert exact_match(model(ids), labels) == 0
            assert math.isfinite(answer_loss(model(ids), labels))


def test_reads_objects_only():
    assert read(' {"name": "Ana", "age": 3}\n') == {"name": "Ana", "age": 3}
    assert read("[1]") is None and read("name: Ana") is None and read("") is None
