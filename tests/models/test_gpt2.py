"""GPT-2 against transformers, through checkpoint folders that transformers wrote."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from snippets.common.checkpoint import CheckpointError
from snippets.models.gpt2 import GPT2, GPT2Config
from tests.checkpoints import (
    cached_equals_whole,
    edit,
    left_padded,
    prompt,
    redraw,
    same_logits,
    same_text,
)

B, T, V = 2, 13, 101
BASE = {"vocab_size": V, "n_positions": 40, "n_embd": 48, "n_layer": 3, "n_head": 6}
BASE |= {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "narrow network, erf": {"n_inner": 70, "activation_function": "gelu"},
    "large eps": {"layer_norm_epsilon": 0.1},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
}


def oracle(**changes) -> GPT2LMHeadModel:
    config = transformers.GPT2Config(**(BASE | changes))
    return redraw(GPT2LMHeadModel(config))


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [5, 1, 7]])
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = GPT2.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 2 * 3 * B * T * 48 * 4  # k v, layers, tokens, d, bytes


def test_it_writes_what_transformers_writes(folder):
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    same_text(GPT2.from_pretrained(folder), theirs, prompt(V, B, T), left_padded(B, T, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_or_chosen(dtype, tmp_path):
    oracle().to(dtype).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    kept = GPT2.from_pretrained(tmp_path)
    assert {weight.dtype for weight in kept.parameters()} == {dtype} and not kept.training
    chosen = GPT2.from_pretrained(tmp_path, dtype=torch.float32)
    same_logits(chosen, theirs.float(), prompt(V, B, T))


def test_no_position_beyond_the_table(folder):
    ours = GPT2.from_pretrained(folder)
    assert ours(prompt(V, 1, 40)).shape == (1, 40, V)
    with pytest.raises(ValueError, match=r"0 cached and 41 new tokens: n_positions=40"):
        ours(prompt(V, 1, 41))
    cache = ours.new_cache()
    ours(prompt(V, 1, 38), cache=cache)
    with pytest.raises(ValueError, match=r"38 cached and 3 new tokens: n_positions=40"):
        ours(prompt(V, 1, 3), cache=cache)


def test_the_first_files_are_one_level_below_and_hold_masks(folder):
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for number in range(3):
        old[f"h.{number}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        old[f"h.{number}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, folder / "model.safetensors")
    same_logits(GPT2.from_pretrained(folder), theirs, prompt(V, B, T))


def test_the_head_of_tied_embeddings_may_be_stored_twice(folder):
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    same_logits(GPT2.from_pretrained(folder), theirs, prompt(V, B, T))
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte"):
        GPT2.from_pretrained(folder)


REFUSED = [
    ({"activation_function": "swish2"}, "activation_function='swish2' isn't supported"),
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"n_layer": 0}, "n_layer=0 is below 1"),
    ({"n_inner": 0}, "n_inner=0 is below 1"),
    ({"n_embd": 50}, "uneven: n_embd=50, n_head=6"),
    ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True isn't supported"),
    ({"add_cross_attention": True}, "add_cross_attention=True isn't supported"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        GPT2.from_pretrained(folder)


def test_a_key_without_meaning_here_is_reported(folder):
    edit(folder, attention_sink=4)
    with pytest.warns(UserWarning, match=r"not read: attention_sink$"):
        GPT2.from_pretrained(folder)


def test_missing_and_unexpected_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.7.ln_1.weight"] = tensors.pop("transformer.h.1.ln_1.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: transformer\.h\.1\.ln_1\.weight; unexp"):
        GPT2.from_pretrained(folder)


# Table 2 of the paper prints 117M, 345M, 762M and 1542M; the released README counts 124M, 355M,
# 774M and 1558M, the embedding once.
@pytest.mark.parametrize(
    "millions, width, layers, heads",
    [(124, 768, 12, 12), (355, 1024, 24, 16), (774, 1280, 36, 20), (1558, 1600, 48, 25)],
)
def test_full_sizes_have_the_published_number_of_parameters(millions, width, layers, heads):
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == millions


def test_a_matrix_is_stored_as_in_times_out():
    with torch.device("meta"):
        block = GPT2(GPT2Config(n_embd=48, n_head=6, n_layer=1)).transformer.h[0]
    assert block.mlp.c_fc.weight.shape == (48, 192)
    assert block.attn.c_attn.weight.shape == (48, 144)
