"""Mixtral against transformers, through checkpoint folders that transformers wrote."""

import pytest
import torch
import transformers
from transformers import MixtralForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.mixtral import Mixtral, MixtralConfig
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
    num_local_experts=5,
    num_experts_per_tok=2,
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


def oracle(**changes) -> MixtralForCausalLM:
    config = transformers.MixtralConfig(**(BASE | changes))
    return redraw(MixtralForCausalLM(config))


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = Mixtral.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize(
    "chunks", [[1] * T, [T - 1, 1], [W] * 3 + [2], [W + 1] * 2 + [5], [5, 1, 11]]
)
@pytest.mark.parametrize("padding", [0, 3, 9])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = Mixtral.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 2 * 3 * B * 2 * (W - 1) * 14 * 4  # k v, layers, g, tokens, k, bytes
    stored = sum(held.numel() for layer in cache.layers for held in layer.store)
    assert stored <= 2 * 3 * B * 2 * (2 * W) * 14


def test_it_writes_what_transformers_writes(folder):
    theirs = MixtralForCausalLM.from_pretrained(folder)
    ours = Mixtral.from_pretrained(folder)
    same_text(ours, theirs, prompt(V, B, T), left_padded(B, T, 6))
    same_text(ours, theirs, prompt(V, B, 3), left_padded(B, 3, 1))


REFUSED = [
    ({"num_experts_per_tok": 6}, "num_experts_per_tok=6 of num_local_experts=5"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 of num_local_experts=5"),
    ({"sliding_window": 0}, "sliding_window=0 is below 1"),
    ({"hidden_act": "swish2"}, "hidden_act='swish2'"),
    ({"model_type": "llama"}, "model_type='llama'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Mixtral.from_pretrained(folder)


def test_full_size_has_the_published_number_of_parameters():
    """The paper's 47B in all, and 13B for a token; embedding and head included."""
    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Mixtral(config).parameters())
    idle = 32 * (8 - 2) * 3 * 4096 * 14336
    assert f"{count / 1e9:.0f}" == "47" and f"{(count - idle) / 1e9:.0f}" == "13"
