"""Qwen2, Qwen3 and its experts against transformers, through folders that transformers wrote."""

import warnings

import pytest
import torch
import transformers
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from snippets.common.checkpoint import CheckpointError
from snippets.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config, Qwen3Moe, Qwen3MoeConfig
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
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500.0},
)
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0}
YARN |= {"original_max_position_embeddings": 8}
WINDOWS = {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 2}
TYPES = ["sliding_attention", "full_attention"] * 2
EXPERTS = dict(
    num_experts=7, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True, head_dim=14
)
FAMILY = {
    "qwen2": (Qwen2, Qwen2ForCausalLM, transformers.Qwen2Config, {}),
    "qwen3": (Qwen3, Qwen3ForCausalLM, transformers.Qwen3Config, {"head_dim": 14}),
    "qwen3_moe": (Qwen3Moe, Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, EXPERTS),
}
CASES = {
    "2": ("qwen2", {}),
    "2, windows in late layers": ("qwen2", WINDOWS),
    "2, windows by list": ("qwen2", WINDOWS | {"layer_types": TYPES}),
    "2, windows listed but off": ("qwen2", {"layer_types": ["full_attention"] * 4}),
    "2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "2, YaRN beyond the trained length": ("qwen2", {"rope_parameters": YARN}),
    "3": ("qwen3", {}),
    "3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "3, large eps": ("qwen3", {"rms_norm_eps": 0.1}),
    "3, windows": ("qwen3", WINDOWS),
    "3, YaRN beyond the trained length": ("qwen3", {"rope_parameters": YARN}),
    "MoE": ("qwen3_moe", {}),
    "MoE, weights not divided": ("qwen3_moe", {"norm_topk_prob": False}),
    "MoE in some layers": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "MoE, windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": W}),
}


def oracle(kind: str, **changes):
    _, model, config, own = FAMILY[kind]
    return redraw(model(config(**(BASE | own | changes))))


@pytest.fixture(params=list(FAMILY))
def family(request, tmp_path):
    """Ours and theirs, the folder, with windows in some layers where the kind has them."""
    kind = request.param
    changes = {} if kind == "qwen3_moe" else WINDOWS
    theirs = oracle(kind, **changes)
    theirs.save_pretrained(tmp_path)
    return FAMILY[kind][0].from_pretrained(tmp_path), theirs, tmp_path


@pytest.mark.parametrize("kind, changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(kind, changes, tmp_path):
    theirs = oracle(kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = FAMILY[kind][0].from_pretrained(tmp_path)
    expected = same_logits(ours, theirs, prompt(V, B, T))
    assert expected.std() > 0.1
    same_logits(ours, theirs, prompt(V, B, T), left_padded(B, T, 4))


@pytest.mark.parametrize("chunks", [[1] * T, [T - 1, 1], [W + 1] * 2 + [5]])
@pytest.mark.parametrize("padding", [0, 3])
def test_chunks_through_the_cache_equal_the_whole(family, chunks, padding):
    ours, _, _ = family
    mask = left_padded(B, T, padding) if padding else None
    cache = cached_equals_whole(ours, prompt(V, B, T), chunks, mask)
    windows = [ours.config.window(number) for number in range(4)]
    kept = sum(T if window is None else window - 1 for window in windows)
    assert cache.nbytes == 2 * B * 2 * kept * ours.config.size_of_head * 4


def test_it_writes_what_transformers_writes(family):
    ours, theirs, _ = family
    same_text(ours, theirs, prompt(V, B, T), left_padded(B, T, 6))


def test_both_spellings_of_the_experts_are_read(tmp_path):
    theirs = oracle("qwen3_moe")
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, "num_local_experts", num_experts=7)  # as published
    ours = Qwen3Moe.from_pretrained(tmp_path)
    assert ours.config.num_experts == ours.config.experts == 7
    same_logits(ours, theirs, prompt(V, B, T))
    edit(tmp_path, num_local_experts=7)
    assert Qwen3Moe.from_pretrained(tmp_path).config.experts == 7


def test_the_mixtures_windows_are_in_all_layers_and_the_key_that_is_not_read_is_named(tmp_path):
    theirs = oracle("qwen3_moe", **WINDOWS)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="not read: max_window_layers=2"):
        ours = Qwen3Moe.from_pretrained(tmp_path)
    same_logits(ours, theirs, prompt(V, B, T))
    assert [ours.config.window(number) for number in range(4)] == [W] * 4
    # Published files hold the key and no window: nothing to report.
    edit(tmp_path, use_sliding_window=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Qwen3Moe.from_pretrained(tmp_path).config.window(3) is None


REFUSED = [
    ("qwen2", {"layer_types": TYPES[:3]}, "3 layer_types for 4 layers"),
    ("qwen2", {"layer_types": ["linear_attention"] * 4}, r"layer_types \['linear_attention'\]"),
    ("qwen2", WINDOWS | {"sliding_window": 0}, "sliding_window=0 is below 1"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias=True isn't supported"),
    ("qwen2", {"model_type": "qwen3"}, "model_type='qwen3'"),
    ("qwen3", {"hidden_act": "swish2"}, "hidden_act='swish2'"),
    ("qwen3_moe", {"layer_types": TYPES}, r"layer_types=\[.*\]: all layers have the window, or"),
    ("qwen3_moe", WINDOWS | {"layer_types": TYPES}, r"layer_types=\[.*\]: all layers have the"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 is below 1"),
    ("qwen3_moe", {"num_experts": 6}, "num_experts=6, num_local_experts=7"),
    ("qwen3_moe", {"num_experts_per_tok": 8}, "num_experts_per_tok=8 of num_experts=7"),
]


@pytest.mark.parametrize("kind, changes, said", REFUSED)
def test_a_config_that_cannot_be_honoured_is_refused(kind, changes, said, tmp_path):
    oracle(kind).save_pretrained(tmp_path)
    edit(tmp_path, **({"layer_types": None} | changes))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{said}"):
        FAMILY[kind][0].from_pretrained(tmp_path)


# Sizes: hidden, intermediate, layers, heads, kv heads, tied, vocabulary; billions by the reports'
# tables (Qwen2.5: section 2 and the model cards' "number of parameters"; Qwen3: the model cards).
QWEN25 = {
    "0.5B": ("0.49", 896, 4864, 24, 14, 2, True, 151936),
    "1.5B": ("1.54", 1536, 8960, 28, 12, 2, True, 151936),
    "3B": ("3.09", 2048, 11008, 36, 16, 2, True, 151936),
    "7B": ("7.62", 3584, 18944, 28, 28, 4, False, 152064),
    "14B": ("14.8", 5120, 13824, 48, 40, 8, False, 152064),
    "32B": ("32.8", 5120, 27648, 64, 40, 8, False, 152064),
    "72B": ("72.7", 8192, 29568, 80, 64, 8, False, 152064),
}
QWEN3 = {
    "0.6B": ("0.6", 1024, 3072, 28, 16, 8, True, 151936),
    "1.7B": ("1.7", 2048, 6144, 28, 16, 8, True, 151936),
    "4B": ("4.0", 2560, 9728, 36, 32, 8, True, 151936),
    "8B": ("8.2", 4096, 12288, 36, 32, 8, False, 151936),
    "14B": ("14.8", 5120, 17408, 40, 40, 8, False, 151936),
    "32B": ("32.8", 5120, 25600, 64, 64, 8, False, 151936),
}


@pytest.mark.parametrize(
    "kind, config, row",
    [(Qwen2, Qwen2Config, row) for row in QWEN25.values()]
    + [(Qwen3, Qwen3Config, row) for row in QWEN3.values()],
    ids=[f"2.5 {name}" for name in QWEN25] + [f"3 {name}" for name in QWEN3],
)
def test_full_sizes_have_the_published_number_of_parameters(kind, config, row):
    published, hidden, intermediate, layers, heads, kv_heads, tied, vocabulary = row
    sizes = config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        count = sum(weight.numel() for weight in kind(sizes).parameters())
    digits = len(published.partition(".")[2])
    assert f"{count / 1e9:.{digits}f}" == published


@pytest.mark.parametrize(
    "total, active, sizes",
    [
        ("30.5", "3.3", (2048, 6144, 48, 32, 4, 768)),
        ("235", "22", (4096, 12288, 94, 64, 4, 1536)),
    ],
)
def test_experts_have_the_published_number_of_parameters(total, active, sizes):
    hidden, intermediate, layers, heads, kv_heads, narrow = sizes
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        moe_intermediate_size=narrow,
    )
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Qwen3Moe(config).parameters())
    idle = layers * (128 - 8) * 3 * hidden * narrow
    digits = len(total.partition(".")[2])
    assert f"{count / 1e9:.{digits}f}" == total
    # 3.35 and 22.2: the cards cut off, they don't round.
    assert str((count - idle) / 1e9).startswith(active)
