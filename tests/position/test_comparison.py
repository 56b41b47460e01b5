"""The five variants against transformers' Llama, to which all of them come down.

Sizes are such that swapped axes show: no two of b t d h k v are equal, 2 layers.
"""

import math
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

from snippets.position.comparison import KINDS, PositionedAttention, PositionedDecoder
from snippets.position.context_extension import linear

B, T, D, H, K, V, M = 3, 7, 24, 4, 6, 19, 11
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_heads": H,
    "intermediate_size": 40,
    "num_layers": 2,
    "max_positions": M,
}
LINE = torch.arange(T)


def build(kind: str, **sizes) -> PositionedDecoder:
    torch.manual_seed(0)
    model = PositionedDecoder(position=kind, **SIZES | sizes)
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            p.data *= 4  # sharper attention: positions show
        if "norm" in name:
            p.data += 0.3 * torch.randn_like(p)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(V, (B, T))


def sines() -> torch.Tensor:
    return torch.tensor(
        [
            [(math.cos if i % 2 else math.sin)(p / 10000 ** (2 * (i // 2) / D)) for i in range(D)]
            for p in range(T)
        ]
    )


def llama(model: PositionedDecoder, ids: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """The same logits from transformers: positions as inputs, in the mask, or as RoPE."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=H,
        rms_norm_eps=1e-6,
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    oracle = LlamaModel(config).eval()
    weights = model.state_dict()
    rows = weights.pop("embed_positions.weight", None)
    oracle.load_state_dict(weights)  # strict: the names and shapes are Llama's
    if model.position != "rope":
        oracle.rotary_emb.inv_freq.zero_()  # turns nothing
    x = model.embed_tokens(ids) * math.sqrt(D)
    mask = torch.full((T, T), torch.finfo(x.dtype).min).triu(1).expand(H, T, T)
    if model.position == "sinusoidal":
        x = x + sines()
    elif model.position == "learned":
        x = x + rows[:T]
    elif model.position == "alibi":
        slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None]
        mask = mask - slopes * (LINE[:, None] - LINE).clamp(min=0)
    y = oracle(inputs_embeds=x, attention_mask=mask.expand(len(ids), H, T, T)).last_hidden_state
    return y @ model.embed_tokens.weight.T


@pytest.mark.parametrize("kind", KINDS)
def test_equals_llama(kind):
    model, ids = build(kind), tokens()
    assert_close(model(ids), llama(model, ids), rtol=1e-5, atol=2e-5)  # of logits near 10


def test_kinds_start_with_the_same_values_and_differ():
    ids, models = tokens(), {kind: build(kind) for kind in KINDS}
    common = models["none"].state_dict()
    for kind, model in models.items():
        for name, value in common.items():
            if "norm" not in name:  # touched by `build` in another order
                assert torch.equal(model.state_dict()[name], value)
        extra = model.state_dict().keys() - common.keys()
        assert extra == ({"embed_positions.weight"} if kind == "learned" else set())
    outputs = [model(ids) for model in models.values()]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_is_causal(kind):
    model, ids = build(kind), tokens()
    before = model(ids)
    for t in range(T):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        after = model(changed)
        assert_close(after[:, :t], before[:, :t])
        assert ((after - before)[:, t].abs().amax(-1) > 1e-3).all()


def test_without_positions_one_layer_sees_a_bag_and_two_do_not():
    ids = tokens()
    moved = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], 1)
    change = [
        (model(ids) - model(moved))[:, -1].abs().max()
        for model in (build("none", num_layers=1), build("none"))
    ]
    assert change[0] < 1e-5 < 0.01 < change[1]


def test_rope_takes_other_frequencies_and_a_factor():
    model, ids = build("rope"), tokens()
    own = linear(head_dim=K, rope_theta=10000, factor=1)
    assert_close(model(ids, own), model(ids))
    other = linear(head_dim=K, rope_theta=500, factor=1)
    assert_close(model(ids, other), llama(model, ids, theta=500.0), rtol=1e-5, atol=2e-5)
    # A factor of 2 on cosine and sine doubles queries and keys.
    doubled = build("rope")
    doubled.load_state_dict(model.state_dict())
    for layer in doubled.layers:
        layer.self_attn.q_proj.weight.data *= 2
        layer.self_attn.k_proj.weight.data *= 2
    assert_close(model(ids, factor=2.0), doubled(ids))
    assert_close(model(ids, factor=1.0), model(ids))


def test_new_values_are_as_large_as_said():
    model = PositionedDecoder(
        position="learned", **SIZES | {"vocab_size": 5000, "max_positions": 4000, "hidden_size": 16}
    )
    assert 0.245 < model.embed_tokens.weight.std() < 0.255
    assert 0.98 < model.embed_positions.weight.std() < 1.02
    assert model.embed_positions.weight.shape == (4000, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind, dtype):
    model, ids = build(kind), tokens()
    expected = model(ids)
    y = model.to(dtype)(ids)
    assert y.dtype == dtype
    assert (y - expected).abs().max() < (0.5 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(unchecked, kind):
    model, ids = build(kind), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids), model(ids))


def test_on_meta_it_has_shapes_only():
    for kind in KINDS:
        model = build(kind).to("meta")
        assert model(tokens().to("meta")).shape == (B, T, V)


def test_a_table_ends_and_the_others_do_not():
    long = torch.randint(V, (B, M + 1))
    with pytest.raises(ValueError, match=f"0 to {M}, the table has 0 to {M - 1}"):
        build("learned")(long)
    assert build("learned")(long[:, :M]).shape == (B, M, V)
    for kind in set(KINDS) - {"learned"}:
        assert build(kind)(long).isfinite().all()


@pytest.mark.parametrize("size, heads", [(24, 5), (24, 0), (24, -4)])
def test_refuses_heads_of_uneven_size(size, heads):
    with pytest.raises(ValueError, match=f"hidden_size={size}, num_heads={heads}"):
        PositionedAttention(hidden_size=size, num_heads=heads)


def test_one_head_is_enough():
    assert build("rope", num_heads=1)(tokens()).shape == (B, T, V)


def test_refuses_another_kind():
    with pytest.raises(ValueError, match=re.escape("position='t5' isn't one of none, sinusoidal")):
        build("t5")


def test_each_head_reads_its_own_features():
    layer, x = PositionedAttention(hidden_size=D, num_heads=H), torch.randn(B, T, D)
    heads = []
    for h in range(H):
        part = slice(h * K, (h + 1) * K)
        q, k, v = (x @ p.weight[part].T for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        scores = (q @ k.mT / K**0.5).masked_fill(LINE[:, None] < LINE, -math.inf)
        heads.append(scores.softmax(-1) @ v)
    assert_close(layer(x), torch.cat(heads, -1) @ layer.o_proj.weight.T)
