"""Gemma 3 against transformers, through checkpoint folders that transformers wrote."""

import math

import pytest
import torch
import transformers
from transformers import Gemma3ForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.gemma3 import Gemma3, Gemma3Config
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
FULL, SLIDING = "full_attention", "sliding_attention"
BASE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=7,  # five with a window, one without, one with
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    max_position_embeddings=64,
    sliding_window=W,
    query_pre_attn_scalar=10,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
}
CONFIGS = {
    "five to one": {},
    "rope of both kinds": {"rope_parameters": ROPE},
    "kinds by list": {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING]},
    "untied": {"tie_word_embeddings": False},
    "biases, large eps": {"attention_bias": True, "rms_norm_eps": 0.1},
}


def oracle(**changes) -> Gemma3ForCausalLM:
    config = transformers.Gemma3TextConfig(**(BASE | changes))
    return redraw(Gemma3ForCausalLM(config))


@pytest.fixture
def folder(tmp_path):
    oracle(rope_parameters=ROPE).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = Gemma3.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [W] * 3 + [2], [W + 1] * 2 + [5]])
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = Gemma3.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 2 * B * 2 * (6 * (W - 1) + T) * 14 * 4


def test_it_writes_what_transformers_writes(folder):
    theirs = Gemma3ForCausalLM.from_pretrained(folder)
    same_text(Gemma3.from_pretrained(folder), theirs, prompt(V, B, T), left_padded(B, T, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_stream_starts_with_the_rounded_root(dtype, folder):
    theirs = Gemma3ForCausalLM.from_pretrained(folder, dtype=dtype)
    ours = Gemma3.from_pretrained(folder, dtype=dtype)
    seen = []
    ours.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        ours(prompt(V, B, T))
        assert torch.equal(seen[0], theirs.model.embed_tokens(prompt(V, B, T)))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 777.0, "rope_local_base_freq": 33.0},
        {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 12.0},
        {"sliding_window_pattern": 3, "layer_types": None},
        {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 99.0}}},
    ],
)
def test_every_spelling_is_read_as_transformers_reads_it(folder, spelling):
    edit(folder, "rope_parameters", **spelling)
    ours, ids = Gemma3.from_pretrained(folder), prompt(V, B, T)
    theirs = Gemma3ForCausalLM.from_pretrained(folder)
    same_logits(ours, theirs, ids)


REFUSED = [
    ({"hidden_activation": "swish2"}, "hidden_activation='swish2'"),
    ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping=30\.0 isn't supported"),
    ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 isn't supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"sliding_window": 0}, "sliding_window=0 is below 1"),
    ({"sliding_window_pattern": 0}, "sliding_window_pattern=0 is below 1"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 isn't above 0"),
    ({"layer_types": [FULL]}, "1 layer_types for 7 layers"),
    ({"layer_types": ["linear_attention"] * 7}, r"layer_types \['linear_attention'\]"),
    ({"num_key_value_heads": 4}, "uneven: num_attention_heads=6, num_key_value_heads=4"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ({"head_dim": 7}, "features don't pair up: head_dim=7"),
    ({"rope_parameters": {FULL: 3}}, r"rope_parameters\['full_attention'\]=3 isn't a set"),
    ({"rope_parameters": {FULL: {"rope_type": "spiral"}}}, "rope_type='spiral' isn't known"),
    ({"model_type": "gemma2"}, "model_type='gemma2'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Gemma3.from_pretrained(folder)


# Table 1 of the report, in millions: embedding parameters, and the others. The first column has
# the map from the vision tower's 1152 features into the stream too, and is rounded up; the tower's
# own 417M are counted apart.
@pytest.mark.parametrize(
    "embedding, other, sees, sizes",
    [
        (302, 698, False, (1152, 6912, 26, 4, 1, 256, 262144)),
        (675, 3209, True, (2560, 10240, 34, 8, 4, 256, 262208)),
        (1012, 10759, True, (3840, 15360, 48, 16, 8, 256, 262208)),
        (1416, 25600, True, (5376, 21504, 62, 32, 16, 128, 262208)),
    ],
    ids=["1B", "4B", "12B", "27B"],
)
def test_full_sizes_have_the_published_number_of_parameters(embedding, other, sees, sizes):
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = sizes
    config = Gemma3Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
    )
    with torch.device("meta"):
        model = Gemma3(config)
    table = model.model.embed_tokens.weight.numel()
    rest = sum(weight.numel() for weight in model.parameters()) - table
    assert round(rest / 1e6) == other
    assert math.ceil((table + sees * 1152 * hidden) / 1e6) == embedding
