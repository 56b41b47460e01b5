"""DeepSeek-V3 against transformers, through checkpoint folders that transformers wrote."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
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


# Real sizes


def test_full_size_has_the_published_number_of_parameters():
    """The report's abstract: 671B, and 37B for one token; without the MTP layer."""
    config = DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
    )
    with torch.device("meta"):
        model = DeepseekV3(config)
    count = sum(w.numel() for w in model.parameters())
    assert f"{count / 1e9:.0f}" == "671"
    idle = 58 * (256 - 8) * 3 * 7168 * 2048
    assert 37 <= (count - idle) / 1e9 < 38
    lookup = 129280 * 7168
    assert f"{(count - idle - lookup) / 1e9:.0f}" == "37"
