"""Llama against transformers, through checkpoint folders that transformers wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.common.generate import generate
from snippets.models.llama import Llama, LlamaConfig
from weights import smollm2

ROOT = Path(__file__).parents[2]
B, T, V = 2, 13, 101
BASE = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    ORIGINAL: 8,  # below T: all three kinds of frequencies occur
}
CONFIGS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 14, "rope_theta": 500000.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-head, gelu": {"num_key_value_heads": 6, "hidden_act": "gelu_pytorch_tanh"},
    "multi-query, large eps": {"num_key_value_heads": 1, "rms_norm_eps": 0.1},
    "Llama 3.1's frequencies": {"head_dim": 14, "rope": LLAMA3},
    "linear": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "YaRN": {"rope": {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 8}},
}


def oracle(**changes) -> LlamaForCausalLM:
    """A tiny random Llama, every parameter drawn anew: norms aren't 1, biases not 0."""
    changes = BASE | changes
    rope = {"rope_theta": changes.pop("rope_theta", 10000.0)}
    rope |= changes.pop("rope", {"rope_type": "default"})
    config = transformers.LlamaConfig(**changes, rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.15, mean=1.0 if "norm" in name else 0.0)
    return model


@pytest.fixture
def folder(tmp_path) -> Path:
    oracle().save_pretrained(tmp_path)
    return tmp_path


def prompt() -> torch.Tensor:
    return torch.randint(3, V, (B, T))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs, ids = oracle(**changes), prompt()
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert_close(ours(input_ids=ids), expected)
    assert expected.std() > 0.1 and ours.state_dict().keys() == set(theirs.state_dict()) - (
        {"lm_head.weight"} if "tie_word_embeddings" in changes else set()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_or_chosen(dtype, tmp_path):
    oracle().to(dtype).save_pretrained(tmp_path)
    # Read back: `.to(dtype)` has rounded the rotary frequencies of the model in memory.
    theirs, ids = LlamaForCausalLM.from_pretrained(tmp_path), prompt()
    kept = Llama.from_pretrained(tmp_path)
    assert {weight.dtype for weight in kept.parameters()} == {dtype}
    assert not kept.training
    chosen = Llama.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert_close(kept(ids), theirs(ids).logits)
        assert_close(chosen(ids), theirs.float()(ids).logits)


@pytest.mark.parametrize("padding", [slice(4), slice(T - 4, T), slice(5, 8)])
def test_padding_changes_nothing(folder, padding):
    """On the left, on the right, or in between: positions count tokens."""
    ours, ids = Llama.from_pretrained(folder), prompt()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = ours(ids, mask)
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        alone = ours(ids[1:, mask[1].bool()])
    assert_close(padded[mask.bool()], expected[mask.bool()])
    assert_close(padded[1][mask[1].bool()], alone[0])
    assert padded.isfinite().all()


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [5, 1, 7]])
@pytest.mark.parametrize("padded", [False, True])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padded):
    ours, ids = Llama.from_pretrained(folder), prompt()
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :3] = 0
    cache, outputs = ours.new_cache(), []
    with torch.no_grad():
        for part in torch.arange(T).split(chunks):
            seen = mask[:, : part[-1] + 1] if padded else None
            outputs.append(ours(ids[:, part], seen, cache))
        whole = ours(ids, mask if padded else None)
    rows = mask.bool() if padded else torch.ones(B, T, dtype=torch.bool)
    assert_close(torch.cat(outputs, 1)[rows], whole[rows])
    assert cache.length == T and cache.nbytes == 2 * 3 * B * 2 * T * 8 * 4  # k v, layers, g, k


def test_greedy_tokens_equal_transformers(folder):
    ours, ids = Llama.from_pretrained(folder), prompt()
    theirs = LlamaForCausalLM.from_pretrained(folder)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, :5] = 0
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    written = generate(ours, ids, attention_mask=mask, max_new_tokens=20, eos_token_id=2)
    assert torch.equal(written, expected)


def test_the_future_is_not_seen(folder):
    ours, ids = Llama.from_pretrained(folder), prompt()
    changed = ids.clone()
    changed[:, 7] = (ids[:, 7] + 1) % V
    with torch.no_grad():
        before, after = ours(ids), ours(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-4).all()


def test_a_mask_of_another_length_is_refused(folder):
    ours = Llama.from_pretrained(folder)
    cache = ours.new_cache()
    ours(prompt(), cache=cache)
    with pytest.raises(ValueError, match=r"\(2, 1\), for 2 sequences of 13 cached and 1 new"):
        ours(prompt()[:, :1], torch.ones(B, 1, dtype=torch.long), cache)


# The folder


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 777.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_theta": 777.0, "rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3 | {"rope_theta": 777.0}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 777.0}},
    ],
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(folder, spelling):
    ids = prompt()
    with torch.no_grad():
        before = Llama.from_pretrained(folder)(ids)
        config = json.loads((folder / "config.json").read_text())
        del config["rope_parameters"]
        (folder / "config.json").write_text(json.dumps(config | spelling))
        ours = Llama.from_pretrained(folder)(ids)
        assert_close(ours, LlamaForCausalLM.from_pretrained(folder)(ids).logits)
    assert (ours - before).abs().max() > 0.01


REFUSED = [
    ({"hidden_act": "swish2"}, "hidden_act='swish2'"),
    ({"model_type": "mistral"}, "model_type='mistral'"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"num_key_value_heads": 4}, "uneven: num_attention_heads=6, num_key_value_heads=4"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0 is below 1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 is below 1"),
    ({"hidden_size": 50, "head_dim": None}, "uneven: hidden_size=50, num_attention_heads=6"),
    ({"head_dim": 7}, "features don't pair up: head_dim=7"),
]
REFUSED_ROPE = [
    ({"rope_type": "spiral", "factor": 2.0}, "rope_type='spiral' isn't known"),
    ({"type": "dynamic", "factor": 2.0}, "rope_type='dynamic' isn't supported"),
    ({"rope_type": "longrope"}, "rope_type='longrope' isn't supported"),
    ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings is missing"),
    (LLAMA3 | {"factor": "8"}, "factor='8' doesn't fit"),
    (LLAMA3 | {"extra": 1.0}, "extra=1.0 isn't a key of rope_type='llama3'"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor isn't below high_freq_factor"),
]


@pytest.mark.parametrize(
    "changes, said",
    [*REFUSED, *(({"rope_parameters": rope}, said) for rope, said in REFUSED_ROPE)],
)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        Llama.from_pretrained(folder)


def test_an_unknown_key_that_could_matter_is_reported(folder):
    edit(folder, logits_scaling=8.0, rope_interleaved=False)
    with pytest.warns(UserWarning, match=r"config\.json: not read: logits_scaling$"):
        Llama.from_pretrained(folder)


def test_the_head_of_tied_embeddings_may_be_stored_twice(tmp_path):
    theirs, ids = oracle(tie_word_embeddings=True), prompt()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # files of 2023
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_close(Llama.from_pretrained(tmp_path)(ids), theirs(ids).logits)
    tensors["lm_head.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed"):
        Llama.from_pretrained(tmp_path)


def test_a_tied_head_that_the_config_calls_untied_is_missing(tmp_path):
    oracle(tie_word_embeddings=True).save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        Llama.from_pretrained(tmp_path)


def test_several_files_with_their_index(folder, tmp_path_factory):
    whole, ids = Llama.from_pretrained(folder), prompt()
    parts = tmp_path_factory.mktemp("parts")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(parts, max_shard_size="60KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(Llama.from_pretrained(parts)(ids), whole(ids))
    next(parts.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lists files that are absent: model-0"):
        Llama.from_pretrained(parts)


# Real weights, real sizes


@pytest.fixture(scope="module")
def real() -> Path:
    return smollm2.prepare(ROOT)


def test_smollm2_writes_what_transformers_writes(real):
    tokenizer = transformers.AutoTokenizer.from_pretrained(real)
    theirs = LlamaForCausalLM.from_pretrained(real, dtype=torch.float32)
    ours = Llama.from_pretrained(real, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(ours(ids), theirs(ids).logits)
    written = generate(ours, ids, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(written, expected)
    assert "Paris" in tokenizer.decode(written[0, ids.shape[1] :])


def test_a_chat_of_several_turns_is_transformers(real):
    """Each answer becomes part of the next prompt, by the checkpoint's own template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real)
    theirs = LlamaForCausalLM.from_pretrained(real, dtype=torch.float32)
    ours = Llama.from_pretrained(real, dtype=torch.float32)
    chat, before = [{"role": "system", "content": "Answer with one word."}], ""
    questions = ("What is the capital of France?", "And of Italy?", "Which is farther north?")
    for question in questions:
        chat.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text.startswith(before) and text.count("<|im_start|>") == len(chat) + 1
        ids = tokenizer(text, return_tensors="pt").input_ids
        written = generate(ours, ids, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id)
        assert torch.equal(written, theirs.generate(ids, max_new_tokens=10, do_sample=False))
        answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.strip()
        chat.append({"role": "assistant", "content": answer})
        before = text
    assert "Paris" in chat[2]["content"] and "Rome" in chat[4]["content"]


def test_a_folder_cut_short_is_refused(real, tmp_path):
    shutil.copytree(real, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "billions, sizes",
    [
        (8.03, (4096, 14336, 32, 32)),
        (70.6, (8192, 28672, 80, 64)),
        (406, (16384, 53248, 126, 128)),
    ],
)
def test_full_sizes_have_the_published_number_of_parameters(billions, sizes):
    hidden, intermediate, layers, heads = sizes
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Llama(config).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)
