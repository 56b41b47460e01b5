"""The table of models: what a line says of a config, counted by hand."""

import json

import pytest
import torch

from snippets.common.study import (
    CONTEXT,
    cache_bytes,
    counted,
    seeing_study,
    study,
    two_stack_study,
)
from snippets.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from snippets.models.gemma3 import Gemma3, Gemma3Config
from snippets.models.gpt2 import GPT2, GPT2Config
from snippets.models.mixtral import Mixtral, MixtralConfig
from snippets.models.transformer import Transformer, TransformerConfig
from snippets.multimodal.clip import CLIPVisionConfig
from snippets.multimodal.llava import Llava, LlavaConfig, LlavaTextConfig
from snippets.multimodal.vit import ViT, ViTConfig

SIZES = dict(
    vocab_size=100,
    hidden_size=240,
    intermediate_size=4000,
    num_hidden_layers=4,
    num_attention_heads=6,
)


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def test_a_line_says_what_the_config_says(capsys):
    config = MixtralConfig(**SIZES, num_key_value_heads=2, sliding_window=9, rope_theta=1e6)
    model = on_meta(Mixtral, config)
    study("Tiny", model)
    attention = 240 * 240 * 2 + 240 * 80 * 2
    shared = 2 * 100 * 240 + 240 + 4 * (attention + 2 * 240 + 8 * 240)
    expert = 3 * 240 * 4000
    total, active = shared + 4 * 8 * expert, shared + 4 * 2 * expert
    assert total == sum(w.numel() for w in model.parameters())
    assert capsys.readouterr().out == (
        "Tiny: layers 4, width 240, heads 6 / 2, positions RoPE 1,000,000, norm RMSNorm, "
        "activation silu, experts 2 of 8, window 9 in 4 of 4 layers, "
        f"parameters {total / 1e6:.0f}M, {active / 1e6:.0f}M active, cache a token 0.0 KiB\n"
    )


def test_two_stacks(capsys):
    config = TransformerConfig(**(SIZES | {"num_hidden_layers": 3}))
    two_stack_study("Both", on_meta(Transformer, config))
    layer = 4 * 240**2 + 2 * 240 * 4000 + 240 + 4000 + 2 * 2 * 240  # attention, network, norms
    total = 100 * 240 + 3 * (2 * layer + 4 * 240**2 + 2 * 240)  # the decoder's second attention
    assert total == sum(w.numel() for w in on_meta(Transformer, config).parameters())
    assert capsys.readouterr().out == (
        "Both: layers 3 + 3, width 240, heads 6 / 6, positions sinusoids, norm LayerNorm, "
        f"activation relu, experts none, window none, parameters {total / 1e6:.0f}M, "
        f"cache a token {2 * 2 * 3 * 240 / 1024:.1f} KiB\n"
    )
    with pytest.raises(ValueError, match="Both isn't on the meta device"):
        two_stack_study("Both", Transformer(config))


def test_the_cache_is_the_models_own():
    window = on_meta(Mixtral, MixtralConfig(**SIZES, num_key_value_heads=2, sliding_window=9))
    assert cache_bytes(window) == 2 * 4 * 2 * 2 * 40 * 8 / CONTEXT  # keys and values of 8 tokens
    assert cache_bytes(on_meta(GPT2, GPT2Config(n_embd=24, n_layer=3, n_head=4))) == 2 * 2 * 3 * 24
    latent = on_meta(DeepseekV3, DeepseekV3Config(**SIZES, n_routed_experts=16))
    assert cache_bytes(latent) == 2 * 4 * (512 + 64)
    assert cache_bytes(latent.bfloat16()) == 2 * 4 * (512 + 64)


def test_what_the_calculators_have_to_meet():
    model = on_meta(Mixtral, MixtralConfig(**SIZES, num_key_value_heads=2, sliding_window=9))
    found = counted(model, 24.0)
    assert found["config"]["model_type"] == "mixtral" and found["config"]["sliding_window"] == 9
    assert found["parameters"] - found["active"] == 4 * 6 * 3 * 240 * 4000  # six idle experts
    assert (found["context"], found["cache bytes"]) == (CONTEXT, 24 * CONTEXT)
    assert json.loads(json.dumps(found)) == found
    assert counted(on_meta(GPT2, GPT2Config()), 1.0)["config"]["model_type"] == "gpt2"


def test_other_families(capsys):
    gemma = Gemma3Config(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=7,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    study("Gemma", on_meta(Gemma3, gemma))
    study("GPT", on_meta(GPT2, GPT2Config(n_embd=24, n_layer=3, n_head=4)))
    study("V3", on_meta(DeepseekV3, DeepseekV3Config(**SIZES, n_routed_experts=16)))
    lines = capsys.readouterr().out.splitlines()
    assert "heads 8 / 4, positions RoPE 1,000,000 and 10,000, linear, norm UnitOff" in lines[0]
    assert "activation gelu_pytorch_tanh, experts none, window 4,096 in 6 of 7 layers" in lines[0]
    assert "layers 3, width 24, heads 4 / 4, positions learned, norm LayerNorm" in lines[1]
    assert "activation gelu_new, experts none, window none" in lines[1]
    assert "heads 6, latent 512 + 64" in lines[2] and "8 of 16, 1 shared" in lines[2]


def test_a_model_that_holds_memory_is_refused():
    with pytest.raises(ValueError, match="Tiny isn't on the meta device"):
        study("Tiny", Mixtral(MixtralConfig(**SIZES, num_key_value_heads=2)))


def test_a_line_of_a_model_that_sees(capsys):
    text = LlavaTextConfig(**SIZES)
    tower = CLIPVisionConfig(hidden_size=96, num_hidden_layers=5, image_size=64, patch_size=8)
    model = on_meta(Llava, LlavaConfig(text_config=text, vision_config=tower))
    parts = {
        "encoder": "vision_tower",
        "connector": ("multi_modal_projector",),
        "language": "language_model",
    }
    seeing_study("Tiny", model, tokens=model.config.tokens_per_image, **parts)
    count = {
        name: sum(w.numel() for w in getattr(model, path if isinstance(path, str) else path[0])
                  .parameters())
        for name, path in parts.items()
    }  # fmt: skip
    shown = " / ".join(f"{count[name] / 1e6:.0f}M" for name in parts)
    assert capsys.readouterr().out == (
        "Tiny: encoder 5 x 96, image 64 px in patches of 8, tokens an image 64, connector "
        "LlavaProjector, language model 4 x 240, parameters "
        f"{sum(count.values()) / 1e6:.0f}M, encoder / connector / language {shown}\n"
    )
    vit = on_meta(ViT, ViTConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2))
    seeing_study("ViT", vit, tokens=197, encoder="")
    assert "connector none, language model none, parameters" in capsys.readouterr().out


def test_a_model_that_sees_and_holds_memory_is_refused():
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="ViT isn't on the meta device"):
        seeing_study("ViT", ViT(config), tokens=197, encoder="")
