"""DeepSeek-V2 against transformers, through checkpoint folders that transformers wrote."""

import pytest
import torch
import transformers
from transformers import DeepseekV2ForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
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
    n_shared_experts=2,
    routed_scaling_factor=1.7,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1}
YARN |= {"original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.7}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
CONFIGS = {
    "greedy": {},
    "groups": LIMITED,
    "queries without a latent": {"q_lora_rank": None},
    "YaRN beyond the trained length": {"rope_parameters": YARN} | LIMITED,
    "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
    "experts in every layer": {"first_k_dense_replace": 0, "n_shared_experts": 1},
    "dense only": {"first_k_dense_replace": 4},
}


def oracle(**changes) -> DeepseekV2ForCausalLM:
    config = transformers.DeepseekV2Config(**(BASE | changes))
    return redraw(DeepseekV2ForCausalLM(config))


@pytest.fixture
def folder(tmp_path):
    oracle(**LIMITED).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(changes, tmp_path):
    theirs = oracle(**changes)
    theirs.save_pretrained(tmp_path)
    ours = DeepseekV2.from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [5, 1, 7]])
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_through_the_cache_equal_the_whole(folder, chunks, padding):
    ours = DeepseekV2.from_pretrained(folder)
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    assert cache.nbytes == 4 * B * T * (16 + 6) * 4  # layers, tokens, rank + rope dims, bytes


def test_it_writes_what_transformers_writes(folder):
    theirs = DeepseekV2ForCausalLM.from_pretrained(folder)
    same_text(DeepseekV2.from_pretrained(folder), theirs, prompt(V, B, T), left_padded(B, T, 5))


def test_experts_in_some_layers_only():
    config = DeepseekV2Config(**(small() | {"moe_layer_freq": 2}))
    with torch.device("meta"):
        layers = DeepseekV2(config).model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, False, True, False]
    assert not any(config.has_experts(n) for n in range(4) if n % 2)
    without = DeepseekV2Config(**(small() | {"n_routed_experts": None}))
    assert not any(map(without.has_experts, range(4)))


def small() -> dict:
    rest = {k: v for k, v in BASE.items() if k not in ("bos_token_id", "eos_token_id")}
    rope = rest.pop("rope_parameters")
    return rest | {"rope_theta": rope["rope_theta"]}


REFUSED = [
    ({"num_key_value_heads": 1}, "num_key_value_heads=1 isn't num_attention_heads=5"),
    ({"mlp_bias": True}, "mlp_bias=True isn't supported"),
    ({"norm_topk_prob": True}, "norm_topk_prob=True has no one meaning"),
    ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid' with topk_method='group_limited_greedy'"),
    ({"topk_method": "noaux_tc"}, "scoring_func='softmax' with topk_method='noaux_tc'"),
    ({"moe_layer_freq": 0}, "moe_layer_freq=0 is below 1"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 below 0"),
    ({"num_experts_per_tok": None}, "no num_experts_per_tok for 12 experts"),
    ({"hidden_act": "swish2"}, "hidden_act='swish2'"),
    ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3'"),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        DeepseekV2.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_group": 5}, "12 experts don't make 5 equal groups"),
        ({"topk_group": 5}, "a token can't choose 5 of 4 groups"),
        ({"qk_rope_head_dim": 5, "head_dim": 5}, "features don't pair up"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(folder, changes, said):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=said):
        DeepseekV2.from_pretrained(folder)


def full(**changes) -> DeepseekV2Config:
    """DeepSeek-V2's published config.json."""
    return DeepseekV2Config(
        **dict(
            vocab_size=102400,
            hidden_size=5120,
            intermediate_size=12288,
            num_hidden_layers=60,
            num_attention_heads=128,
            first_k_dense_replace=1,
            moe_intermediate_size=1536,
            n_routed_experts=160,
            num_experts_per_tok=6,
            n_shared_experts=2,
            n_group=8,
            topk_group=3,
            topk_method="group_limited_greedy",
            routed_scaling_factor=16.0,
        )
        | changes
    )


LITE = dict(
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    moe_intermediate_size=1408,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    routed_scaling_factor=1.0,
)


@pytest.mark.parametrize(
    "total, active, changes",
    # The abstract's 236B and 21B; appendix B's 15.7B. Of the 2.4B active that it names for Lite,
    # the count with embedding and head is 2.66, with the head alone 2.45: see the page.
    [("236", "21", {}), ("15.7", None, LITE)],
    ids=["V2", "V2-Lite"],
)
def test_full_sizes_have_the_published_number_of_parameters(total, active, changes):
    config = full(**changes)
    with torch.device("meta"):
        model = DeepseekV2(config)
    count = sum(w.numel() for w in model.parameters())
    assert f"{count / 1e9:.{len(total.partition('.')[2])}f}" == total
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    layers = sum(config.has_experts(n) for n in range(config.num_hidden_layers))
    used = count - layers * (config.n_routed_experts - config.num_experts_per_tok) * expert
    assert active is None or f"{used / 1e9:.0f}" == active
