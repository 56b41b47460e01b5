"""DeepSeek-V3 against transformers, through checkpoint folders that transformers wrote."""

import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from snippets.attention.kv_cache import LayerCache
from snippets.common.checkpoint import CheckpointError
from snippets.common.generate import generate
from snippets.models.deepseek_v2 import DeepseekV2Layer
from snippets.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from snippets.moe.multi_token_prediction import MTPModule
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
BASE = dict(
    vocab_size=V,
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=5,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    first_k_dense_replace=1,
    moe_intermediate_size=20,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.7,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.7}
CONFIGS = {
    "groups": {},
    "one group": {"n_group": 1, "topk_group": 1},
    "queries without a latent": {"q_lora_rank": None},
    "YaRN beyond the trained length": {"rope_parameters": YARN},
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
    "weights not divided by their sum": {"norm_topk_prob": False},
    "experts in every layer": {"first_k_dense_replace": 0, "n_shared_experts": 2},
}


def oracle(**changes) -> DeepseekV3ForCausalLM:
    config = transformers.DeepseekV3Config(**(BASE | changes))
    return redraw(DeepseekV3ForCausalLM(config))


@pytest.fixture
def folder(tmp_path):
    oracle().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = DeepseekV3.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [5, 1, 7]])
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = DeepseekV3.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 4 * B * T * (16 + 6) * 4  # layers, tokens, rank + rope dims, bytes


def test_it_writes_what_transformers_writes(folder):
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder)
    same_text(DeepseekV3.from_pretrained(folder), theirs, prompt(V, B, T), left_padded(B, T, 5))


REFUSED = [
    ({"scoring_func": "softmax"}, "scoring_func='softmax' with topk_method='noaux_tc'"),
    ({"topk_method": "greedy"}, "scoring_func='sigmoid' with topk_method='greedy'"),
    ({"rope_interleave": False}, "rope_interleave=False isn't supported"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1 isn't num_attention_heads=5"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' with weight_block"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        r"quant_method='fp8' with weight_block_size=\[128\]",
    ),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 is below 0"),
    ({"model_type": "deepseek_v2"}, "model_type='deepseek_v2'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        DeepseekV3.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_bias_of_the_choice_stays_in_float32(tmp_path, dtype):
    theirs = oracle()
    bias = theirs.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].clone()
    theirs.to(torch.bfloat16)
    theirs.model.layers[1].mlp.gate.e_score_correction_bias = bias
    theirs.save_pretrained(tmp_path)
    ours = DeepseekV3.from_pretrained(tmp_path, dtype=dtype)
    found = ours.model.layers[1].mlp.gate.e_score_correction_bias
    assert found.dtype == torch.float32 and torch.equal(found, bias)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}


# Weights in float8

BLOCK = [16, 24]  # small, so that a tiny matrix has several, some of them cut off
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": BLOCK}


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 weights and a scale for each block, by loops."""
    rows, columns = (math.ceil(n / size) for n, size in zip(weight.shape, BLOCK, strict=True))
    small, scales = torch.empty_like(weight), torch.empty(rows, columns)
    for p in range(rows):
        for q in range(columns):
            block = (
                slice(p * BLOCK[0], (p + 1) * BLOCK[0]),
                slice(q * BLOCK[1], (q + 1) * BLOCK[1]),
            )
            scales[p, q] = weight[block].abs().max() / 448  # float8's largest number
            small[block] = weight[block] / scales[p, q]
    return small.to(torch.float8_e4m3fn), scales


@pytest.fixture
def float8(folder):
    """The folder with its matrices in float8, and what they are worth."""
    tensors, worth = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            small, scales = quantized(weight)
            tensors[name], tensors[name + "_scale_inv"] = small, scales
            wide = torch.kron(scales, torch.ones(BLOCK))[: weight.shape[0], : weight.shape[1]]
            worth[name] = small.float() * wide
    save_file(tensors, folder / "model.safetensors")
    edit(folder, quantization_config=FP8)
    return folder, worth


def test_blocks_in_float8_are_scaled(float8):
    folder, worth = float8
    ours = DeepseekV3.from_pretrained(folder, dtype=torch.float32)
    found = ours.state_dict()
    assert len(worth) > 30
    for name, weight in worth.items():
        assert torch.equal(found[name], weight)
    theirs = oracle()
    weights = theirs.state_dict()
    for name, weight in worth.items():
        if name in weights:
            weights[name].copy_(weight)
    for number in range(1, 4):
        experts = [worth_of(worth, number, e) for e in range(12)]
        prefix = f"model.layers.{number}.mlp.experts"
        weights[f"{prefix}.gate_up_proj"].copy_(torch.stack([up for up, _ in experts]))
        weights[f"{prefix}.down_proj"].copy_(torch.stack([down for _, down in experts]))
    same_logits(ours, theirs, prompt(V, B, T))
    kept = DeepseekV3.from_pretrained(folder).state_dict()
    name = next(iter(worth))
    assert torch.equal(kept[name], worth[name].bfloat16())


def worth_of(worth: dict, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    gate, up, down = (worth[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return torch.cat((gate, up)), down


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda t, n, s: t.pop(s), r"o_proj\.weight is in float8, without scales"),
        (lambda t, n, s: t.update({s: t[s][:1]}), r"o_proj\.weight: \(1, 2\) scales for \(3, 2\)"),
        (lambda t, n, s: t.update({n: t[n].float()}), r"o_proj\.weight is in torch\.float32, with"),
        (lambda t, n, s: t.update({"x" + s: t[s].clone()}), "scales without a weight: xmodel"),
    ],
)
def test_scales_that_do_not_fit_are_refused(float8, spoil, said):
    folder, _ = float8
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    spoil(tensors, name, name + "_scale_inv")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        DeepseekV3.from_pretrained(folder)


def test_float8_without_a_block_size_is_refused(float8):
    folder, _ = float8
    edit(folder, "quantization_config")
    with pytest.raises(CheckpointError, match="is in float8, without scales"):
        DeepseekV3.from_pretrained(folder)


# The MTP layer

COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def mtp_tensors(seed: int = 5, number: int = 4) -> dict[str, torch.Tensor]:
    """Of one MTP layer, under the names of the published files."""
    one_more = oracle(num_hidden_layers=5)
    redraw(one_more, seed)
    prefix = f"model.layers.{number}."
    block = {n: w for n, w in hub_names(one_more).items() if n.startswith("model.layers.4.")}
    drawn = torch.Generator().manual_seed(seed)
    d = BASE["hidden_size"]
    own = {
        "embed_tokens.weight": torch.randn(V, d, generator=drawn),
        "enorm.weight": 1 + 0.3 * torch.randn(d, generator=drawn),
        "hnorm.weight": 1 + 0.3 * torch.randn(d, generator=drawn),
        "eh_proj.weight": 0.2 * torch.randn(d, 2 * d, generator=drawn),
        "shared_head.norm.weight": 1 + 0.3 * torch.randn(d, generator=drawn),
        "shared_head.head.weight": torch.randn(V, d, generator=drawn),
    }
    block = {n.replace("model.layers.4.", prefix): w for n, w in block.items()}
    return block | {prefix + n: w for n, w in own.items()}


def hub_names(model) -> dict[str, torch.Tensor]:
    """A reference's weights as it writes them to a file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def add(folder, *layers: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for layer in layers:
        tensors |= layer
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def drafting(folder):
    """A folder with an MTP layer that shares embedding and head with the model, as published."""
    tensors, layer = load_file(folder / "model.safetensors"), mtp_tensors()
    layer["model.layers.4.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    layer["model.layers.4.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    add(folder, layer)
    return folder


@pytest.fixture
def reads_layer_4(monkeypatch):
    """transformers looks for V3's MTP layer at 61 only."""
    patterns = [r"model\.layers\.4\."]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)


@torch.no_grad()
def test_the_mtp_layer_leaves_the_logits_alone(drafting):
    ours, ids = DeepseekV3.from_pretrained(drafting), prompt(V, B, T)
    assert len(ours.mtp_layers) == 1 and len(ours.new_cache().layers) == 4
    same_logits(ours, oracle(), ids, left_padded(B, T, 4))
    assert set(ours.state_dict()) == set(load_file(drafting / "model.safetensors"))


@torch.no_grad()
def test_guesses_are_those_of_transformers(drafting, reads_layer_4):
    theirs = DeepseekV3ForCausalLM.from_pretrained(drafting)
    module = MtpModel.from_pretrained(theirs)
    ours, ids = DeepseekV3.from_pretrained(drafting), prompt(V, 1, T)
    hidden = theirs.model(ids).last_hidden_state
    places = torch.arange(1, T)[None]
    expected = module.forward_layer(0, hidden[:, :-1], places, None, input_ids=ids[:, 1:])
    layer, rotation = ours.mtp_layers[0], ours.model.rotation(places[0], torch.float32)
    found = layer(ids[:, 1:], ours.model(ids)[:, :-1], rotation)
    assert_close(found, expected)
    assert_close(layer.shared_head["head"](found), module.shared_head(expected))


@torch.no_grad()
def test_the_mtp_layer_equals_the_module_of_its_lesson(folder):
    """With an embedding and a head of its own, which a checkpoint may hold."""
    layer = mtp_tensors()
    add(folder, layer)
    ours = DeepseekV3.from_pretrained(folder)
    config, ids, hidden = ours.config, prompt(V, B, T), torch.randn(B, T, 40)
    module = MTPModule(hidden_size=40, block=DeepseekV2Layer(config, 4), eps=config.rms_norm_eps)
    own = {n.removeprefix("model.layers.4."): w for n, w in layer.items()}
    embedding, head = (own.pop(name) for name in COPIES)
    beside = ("enorm", "hnorm", "eh_proj", "shared_head")
    module.load_state_dict({n if n.startswith(beside) else f"block.{n}": own[n] for n in own})
    rotation = ours.model.rotation(torch.arange(T), torch.float32)
    expected = module(embedding[ids], hidden, rotation)
    found = ours.mtp_layers[0](ids, hidden, rotation)
    assert_close(found, expected)
    assert torch.equal(ours.mtp_layers[0].shared_head["head"].weight, head)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[T - 1], [1] * (T - 1), [5, 2, T - 8]])
def test_drafts_are_the_mtp_layers_own_also_through_a_cache(folder, chunks):
    layer = mtp_tensors()  # with a head that isn't the model's
    add(folder, layer)
    ours, ids = DeepseekV3.from_pretrained(folder), prompt(V, B, T)
    hidden, cache = ours.model(ids)[:, :-1], LayerCache()
    rotation = ours.model.rotation(torch.arange(T - 1), torch.float32)
    states = ours.mtp_layers[0](ids[:, 1:], hidden, rotation)
    expected = F.linear(states, layer["model.layers.4.shared_head.head.weight"])
    assert_close(ours.draft(ids[:, 1:], hidden), expected)
    pieces = [
        ours.draft(ids[:, 1:][:, part], hidden[:, part], cache)
        for part in torch.arange(T - 1).split(chunks)
    ]
    assert_close(torch.cat(pieces, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("t", [1, T])
def test_with_the_drafter_it_writes_what_it_writes_alone(drafting, reads_layer_4, t):
    ours, ids = DeepseekV3.from_pretrained(drafting), prompt(V, 1, t)
    written, kept = ours.generate_with_drafter(ids, max_new_tokens=25)
    assert torch.equal(written, generate(ours, ids, max_new_tokens=25))
    assert kept and not all(kept)
    theirs = DeepseekV3ForCausalLM.from_pretrained(drafting)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        ids, max_new_tokens=25, do_sample=False, use_mtp=True, pad_token_id=0
    )
    assert torch.equal(written, expected)


@torch.no_grad()
def test_each_guess_is_the_mtp_layers_own(drafting):
    """One guess after another, without a cache: which of them stay."""
    ours, ids = DeepseekV3.from_pretrained(drafting), prompt(V, 1, T)
    written, kept = ours.generate_with_drafter(ids, max_new_tokens=40)
    layer, expected, seen = ours.mtp_layers[0], [], T + 1
    while seen < written.shape[1]:
        states = ours.model(written[:, : seen - 1])
        rotation = ours.model.rotation(torch.arange(seen - 1), torch.float32)
        states = layer(written[:, 1:seen], states, rotation)
        guess = layer.shared_head["head"](states)[0, -1].argmax()
        expected.append(bool(guess == written[0, seen]))
        seen += 1 + expected[-1]
    assert kept == expected


def test_sampling_with_the_drafter_repeats_with_its_generator(drafting):
    ours, ids = DeepseekV3.from_pretrained(drafting), prompt(V, 1, T)

    def write(seed: int, temperature: float) -> list[int]:
        drawn = torch.Generator().manual_seed(seed)
        written, _ = ours.generate_with_drafter(
            ids, max_new_tokens=10, temperature=temperature, generator=drawn
        )
        return written[0, T:].tolist()

    assert write(0, 2.0) == write(0, 2.0) != write(1, 2.0)
    assert write(0, 0.0) == write(1, 0.0)


def test_without_its_tensors_there_is_no_drafter(folder):
    ours = DeepseekV3.from_pretrained(folder)  # whose config.json announces one MTP layer
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert ours.mtp_layers == [] and ours.config.num_nextn_predict_layers == 0
    with pytest.raises(ValueError, match="no MTP layer to draft with"):
        ours.generate_with_drafter(prompt(V, 1, T), max_new_tokens=1)


@pytest.mark.parametrize(
    "name", ["enorm.weight", "mlp.experts.7.up_proj.weight", "shared_head.head.weight"]
)
def test_an_mtp_layer_in_part_is_refused(drafting, name):
    tensors = load_file(drafting / "model.safetensors")
    del tensors[f"model.layers.4.{name}"]
    save_file(tensors, drafting / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing: model\.layers\.4\.{re.escape(name)}$"):
        DeepseekV3.from_pretrained(drafting)


def test_two_mtp_layers_are_read_and_one_of_two_is_refused(drafting):
    edit(drafting, num_nextn_predict_layers=2)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.5\.input_layernorm"):
        DeepseekV3.from_pretrained(drafting)
    add(drafting, mtp_tensors(6, number=5))
    assert len(DeepseekV3.from_pretrained(drafting).mtp_layers) == 2


def test_tensors_that_the_config_does_not_announce_are_refused(drafting):
    edit(drafting, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"unexpected: .*model\.layers\.4\.eh_proj\.weight"):
        DeepseekV3.from_pretrained(drafting)


# Real sizes


def test_full_size_has_the_published_number_of_parameters():
    """The release's README_WEIGHTS.md: 671B, 36.6B of them for one token (with the head, not the
    embedding); in the MTP layer 11.5B besides embedding and head, eh_proj not counted."""
    config = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_nextn_predict_layers=1,
    )
    with torch.device("meta"):
        model = DeepseekV3(config)
    (mtp_layer,) = model.mtp_layers
    extra = sum(w.numel() for w in mtp_layer.parameters())
    count = sum(w.numel() for w in model.parameters()) - extra
    assert f"{count / 1e9:.0f}" == "671"
    idle = 58 * (256 - 8) * 3 * 7168 * 2048
    matrix = 129280 * 7168  # embedding or head
    assert f"{(count - idle - matrix) / 1e9:.1f}" == "36.6"
    joining = mtp_layer.eh_proj.weight.numel()
    assert f"{(extra - 2 * matrix - joining) / 1e9:.1f}" == "11.5"
    assert f"{matrix / 1e9:.1f}" == "0.9"
