"""Parameters and cache bytes against the models themselves: on the meta device, and while run."""

import pytest
import torch

from snippets.attention.gqa import GroupedQueryAttention
from snippets.common.model_shape import ModelShape, shape_of
from snippets.models.llama import Llama
from snippets.reference.calculators import kv_cache, matrices, parameters, with_attention
from tests.small_models import GOOD, MODELS, built


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_model(name):
    model, config = built(name)
    shape = shape_of(config)
    found = parameters(shape)
    assert found["total"] == sum(w.numel() for w in model.parameters())
    idle = 0
    for path, w in model.named_parameters():
        if ".experts." in path:
            idle += w.numel() // len(w) * (len(w) - shape.experts_per_token)
    assert found["total"] - found["active"] == idle
    vectors = sum(w.numel() for w in model.parameters() if w.ndim == 1)
    assert found["norms and biases"] == vectors
    inside = [n for n, m in model.named_parameters() if m.ndim > 1 and not outside(n)]
    assert sum(m.count for m in matrices(shape) if m.part == "routers") == sum(
        "gate.weight" in n for n in inside
    )


def outside(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [1, 7, 8, 9, 30])
def test_cache_bytes_are_those_that_the_model_keeps(name, context):
    """Windows are 9 tokens: one shorter, as long, and longer texts."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    cache, (_, read) = model.new_cache(), built(name)
    shape = shape_of(read)
    ids = torch.randint(101, (3, context + 1))
    with torch.no_grad():
        model(input_ids=ids[:, :context], cache=cache)
        found = kv_cache(shape, context=context, batch=3, bits=32)
        assert found["bytes"] == cache.nbytes == found["full layers"] + found["windowed layers"]
        model(input_ids=ids[:, context:], cache=cache)
    assert found["one more token"] == cache.nbytes - found["bytes"]


def test_fewer_bits_and_odd_numbers():
    odd = {"qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 3, "kv_lora_rank": 9}
    shape = ModelShape(101, 48, 1, 6, 2, 8, 80, **odd)
    sizes = [kv_cache(shape, context=3, batch=1, bits=b)["bytes"] for b in (16, 8, 4)]
    assert sizes == [66, 33, 17]


def test_another_attention_keeps_what_its_name_says():
    shape = ModelShape(101, 64, 5, 16, 4, 8, 80)
    one = {k: kv_cache(with_attention(shape, k), context=5000, batch=1, bits=8)["bytes"]
           for k in ("MHA", "GQA", "MQA", "MLA", "window")}  # fmt: skip
    assert one == {
        "MHA": 5000 * 5 * 2 * 16 * 8,
        "GQA": 5000 * 5 * 2 * 2 * 8,
        "MQA": 5000 * 5 * 2 * 1 * 8,
        "MLA": 5000 * 5 * (512 + 64),
        "window": 4095 * 5 * 2 * 4 * 8,
    }
    latent = with_attention(shape, "MLA")
    assert with_attention(latent, "MHA") == with_attention(shape, "MHA").__class__(
        **{**vars(with_attention(shape, "MHA")), "qk_nope_head_dim": 8, "qk_rope_head_dim": 64,
           "v_head_dim": 8}
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown kind='QQA'"):
        with_attention(shape, "QQA")


def test_one_head_for_eight_is_the_module_of_that_name():
    """The comparison's group size against the module that groups."""
    shape = with_attention(ModelShape(101, 64, 1, 16, 16, 4, 80), "GQA")
    module = GroupedQueryAttention(hidden_size=64, num_heads=16, num_kv_heads=2, head_dim=4)
    kept = module.k_proj.out_features + module.v_proj.out_features
    assert kv_cache(shape, context=1, batch=1, bits=8)["bytes"] == kept


def test_a_published_model_has_its_published_size():
    """Llama 3.1 8B: 8,030,261,248 parameters, 128 KiB of cache a token."""
    config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
              "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8}  # fmt: skip
    assert Llama.model_types == ("llama",)
    assert parameters(shape_of(config))["total"] == 8_030_261_248
    assert kv_cache(shape_of(config), context=1, batch=1, bits=16)["bytes"] == 128 * 1024


def test_a_refused_shape_has_no_cache():
    with pytest.raises(ValueError, match="num_kv_heads"):
        ModelShape(**{**vars(GOOD), "num_kv_heads": 0})
