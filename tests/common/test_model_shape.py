"""Sizes read off a config are those of the model that the config builds, in every family."""

from dataclasses import replace

import pytest

from snippets.common.model_shape import problem, shape_of
from tests.small_models import GOOD, GROUPED, MODELS, SIZES, built


def test_windows_of_a_mixture_are_in_all_layers_whatever_the_file_says():
    _, config = built("Qwen3 MoE, windows")
    assert shape_of(config | {"max_window_layers": 3}).windowed_layers == 5


@pytest.mark.parametrize("name", MODELS)
def test_windows_and_experts_are_in_as_many_layers_as_the_model_has(name):
    model, config = built(name)
    shape = shape_of(config)
    windows = [m.window for m in model.modules() if hasattr(m, "window")]
    assert shape.windowed_layers == len(windows) and {shape.window} >= set(windows)
    experts = [m for m in model.modules() if type(m).__name__ == "Experts"]
    assert shape.expert_layers == len(experts)
    assert not experts or len(experts[0].gate_proj) == shape.num_experts


def test_what_a_published_file_leaves_out():
    gemma = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    alone = shape_of({"model_type": "gemma3_text"} | gemma)
    inside = shape_of({"model_type": "gemma3", "text_config": gemma | {"head_dim": 128}})
    assert (alone.vocab_size, alone.num_kv_heads, alone.head_dim) == (262208, 4, 256)
    assert (alone.windowed_layers, alone.tied) == (22, True)
    assert inside == replace(alone, head_dim=128)


def test_refused_configs():
    for changes, said in (
        ({"model_type": "mamba"}, "model_type: mamba isn't known, only gpt2"),
        ({"model_type": None}, "model_type: None"),
        ({"num_key_value_heads": 4}, "num_kv_heads: must divide the number of query heads"),
    ):
        with pytest.raises(ValueError, match=said):
            shape_of({"model_type": "llama"} | GROUPED | changes)
    with pytest.raises(ValueError, match="vocab_size: is missing"):
        shape_of({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "vocab_size"}})


@pytest.mark.parametrize(
    "field, changes",
    {
        "hidden_size": {"hidden_size": -1},
        "num_layers": {"num_layers": 0},
        "num_kv_heads": {"num_kv_heads": 4},
        "head_dim": {"head_dim": 0},
        "v_head_dim": {"kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2},
        "windowed_layers": {"windowed_layers": 6, "window": 3},
        "window": {"windowed_layers": 1},
        "expert_layers": {"expert_layers": 6},
        "experts_per_token": {"expert_layers": 1, "num_experts": 3, "experts_per_token": 4},
        "moe_intermediate_size": {"expert_layers": 1, "num_experts": 3, "experts_per_token": 2},
        "mlp_bias": {"expert_layers": 1, "num_experts": 3, "experts_per_token": 2,
                     "moe_intermediate_size": 5, "mlp_bias": True},
        "intermediate_size": {"intermediate_size": 0},
    }.items(),
)  # fmt: skip
def test_sizes_that_do_not_fit_name_their_field(field, changes):
    assert problem(GOOD) is None
    with pytest.raises(ValueError, match=f"^{field}: (must|is)"):
        replace(GOOD, **changes)
