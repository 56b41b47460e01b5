"""Mistral against transformers, through checkpoint folders that transformers wrote."""

import pytest
import torch
import transformers
from transformers import MistralForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.mistral import Mistral, MistralConfig
from tests.checkpoints import (
    cached_equals_whole,
    edit,
    left_padded,
    prompt,
    redraw,
    same_logits,
    same_text,
)

B, T, V, W = 2, 17, 101, 5
BASE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=64,
    sliding_window=W,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0}
YARN |= {"original_max_position_embeddings": 8}
CONFIGS = {
    "window": {},
    "window of one": {"sliding_window": 1},
    "window as long as the text": {"sliding_window": T},
    "window one shorter": {"sliding_window": T - 1},
    "no window": {"sliding_window": None},
    "tied": {"tie_word_embeddings": True},
    "YaRN beyond the trained length": {"rope_parameters": YARN},
}


def oracle(**changes) -> MistralForCausalLM:
    config = transformers.MistralConfig(**(BASE | changes))
    return redraw(MistralForCausalLM(config))


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = Mistral.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize(
    "chunks", [[1] * T, [T - 1, 1], [W] * 3 + [2], [W + 1] * 2 + [5], [5, 1, 11]]
)
@pytest.mark.parametrize("padding", [0, 3, 9])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = Mistral.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 2 * 3 * B * 2 * (W - 1) * 14 * 4  # k v, layers, g, tokens, k, bytes
    stored = sum(held.numel() for layer in cache.layers for held in layer.store)
    assert stored <= 2 * 3 * B * 2 * (2 * W) * 14


def test_it_writes_what_transformers_writes(folder):
    theirs = MistralForCausalLM.from_pretrained(folder)
    ours = Mistral.from_pretrained(folder)
    same_text(ours, theirs, prompt(V, B, T), left_padded(B, T, 6))
    same_text(ours, theirs, prompt(V, B, 3), left_padded(B, 3, 1))


def test_what_lies_outside_the_windows_does_not_count(folder):
    ours, ids = Mistral.from_pretrained(folder), prompt(V, B, T)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % V
    reach = 3 * (W - 1)  # W - 1 tokens back in each layer
    with torch.no_grad():
        moved = (ours(ids) != ours(changed)).any(-1).any(0)
    assert moved.tolist() == [n <= reach for n in range(T)]


REFUSED = [
    ({"sliding_window": 0}, "sliding_window=0 is below 1"),
    ({"hidden_act": "swish2"}, "hidden_act='swish2'"),
    ({"model_type": "llama"}, "model_type='llama'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Mistral.from_pretrained(folder)


def test_full_size_has_the_published_number_of_parameters():
    """7.24 billion: the sum over the release's files; the paper says 7B."""
    config = MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mistral(config).parameters())
    assert f"{count / 1e9:.2f}" == "7.24"
