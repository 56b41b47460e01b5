"""Rotary position embedding against Llama, GPT-J, Llama 4, torch.polar and the paper's formula.

Sizes are such that swapped axes show: no two of b t d h g k f are equal, h k != d.
"""

import importlib.util
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama4 import modeling_llama4

from snippets.position import rope
from snippets.position.rope import (
    half_from_interleaved,
    interleaved_from_half,
    inverse_frequencies,
    rope_table,
    rotate,
    rotate_interleaved,
)

B, T, D, H, G, K = 3, 7, 40, 8, 4, 12
THETA = 500.0  # low enough for every pair to turn visibly within T positions
POSITIONS = torch.tensor([[0], [5], [4001]]) + torch.arange(T)  # b t


def llama(**sizes) -> LlamaConfig:
    sizes = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G} | sizes
    theta = sizes.pop("rope_theta", THETA)
    rope_parameters = {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig(**{"head_dim": K, "rope_parameters": rope_parameters} | sizes)


def table(positions=POSITIONS, dtype=torch.float32):
    return rope_table(inverse_frequencies(head_dim=K, rope_theta=THETA), positions, dtype)


def heads(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, H, T, K, dtype=dtype), torch.randn(B, G, T, K, dtype=dtype)


@pytest.fixture
def unchecked(monkeypatch):
    """The module as a reader has it: without the shape checks that tests/conftest.py adds."""
    spec = importlib.util.spec_from_file_location("copy_of_rope", rope.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where torch.compile looks for globals
    spec.loader.exec_module(module)
    return module


# Frequencies and tables


@pytest.mark.parametrize("head_dim", [2, 12, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
def test_frequencies_are_llamas_to_the_bit(head_dim, theta):
    theirs = modeling_llama.LlamaRotaryEmbedding(llama(head_dim=head_dim, rope_theta=theta))
    ours = inverse_frequencies(head_dim=head_dim, rope_theta=theta)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.inv_freq)


def test_frequencies_equal_the_papers_formula():
    ours = inverse_frequencies(head_dim=8)
    assert_close(ours, torch.tensor([1.0, 0.1, 0.01, 0.001]))  # 10000^(-2 (i - 1) / 8), i from 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tables_are_llamas_to_the_bit(dtype):
    theirs = modeling_llama.LlamaRotaryEmbedding(llama())(torch.empty(0, dtype=dtype), POSITIONS)
    for ours, both_halves in zip(table(dtype=dtype), theirs, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(torch.cat((ours, ours), -1), both_halves)


def test_a_model_in_bfloat16_gets_rounded_cosines_not_rounded_angles():
    positions = torch.arange(4000, 4000 + T)  # bfloat16 would take all of them for 4000
    angles = positions[:, None].double() * inverse_frequencies(head_dim=K, rope_theta=THETA)
    cos, sin = table(positions, torch.bfloat16)
    half_a_step = {"rtol": 0, "atol": 2**-9 + 1e-3}  # below 1, plus the angle's own rounding
    assert_close(cos.double(), angles.cos(), **half_a_step)
    assert_close(sin.double(), angles.sin(), **half_a_step)


def test_tables_for_a_batch_are_those_of_its_rows():
    for row, cos, sin in zip(POSITIONS, *table(), strict=True):
        assert torch.equal(torch.stack(table(row)), torch.stack((cos, sin)))


# Rotations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotate_is_llamas_to_the_bit(dtype):
    q, k = heads(dtype)
    tables = modeling_llama.LlamaRotaryEmbedding(llama())(q, POSITIONS)
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, *tables)
    for ours, their in zip((q, k), theirs, strict=True):
        ours = rotate(ours, *table(dtype=dtype))
        assert ours.dtype == dtype
        assert torch.equal(ours, their)


def test_rotate_interleaved_equals_torch_polar():
    x, _ = heads()
    inv_freq = inverse_frequencies(head_dim=K, rope_theta=THETA)
    turns = torch.polar(torch.ones(B, T, K // 2), POSITIONS[..., None] * inv_freq)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    assert_close(
        rotate_interleaved(x, *table()), torch.view_as_real(pairs * turns[:, None]).flatten(3)
    )


def test_rotate_interleaved_equals_gptj():
    x, _ = heads()
    cos, sin = table()
    theirs = modeling_gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    assert torch.equal(rotate_interleaved(x, cos, sin), theirs)


def test_rotate_interleaved_equals_llama4():
    q, k = heads()
    turns = torch.complex(*table())
    theirs = modeling_llama4.apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), turns)
    for ours, their in zip((q, k), theirs, strict=True):
        assert_close(rotate_interleaved(ours, *table()), their.transpose(1, 2))


def test_both_equal_the_papers_formula_in_loops():
    x, _ = heads()
    half, interleaved = torch.zeros_like(x), torch.zeros_like(x)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, (B, T, H))).tolist():
        for i in range(K // 2):
            angle = POSITIONS[b, t].item() * THETA ** (-2 * i / K)
            cos, sin = math.cos(angle), math.sin(angle)
            for out, u, v in ((half, i, i + K // 2), (interleaved, 2 * i, 2 * i + 1)):
                first, second = x[b, h, t, u].item(), x[b, h, t, v].item()
                out[b, h, t, u] = cos * first - sin * second
                out[b, h, t, v] = sin * first + cos * second
    # An angle near 4000 is known to 2^-13 in float32.
    assert_close(rotate(x, *table()), half, rtol=0, atol=1e-3)
    assert_close(rotate_interleaved(x, *table()), interleaved, rtol=0, atol=1e-3)


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
def test_scores_depend_on_the_distance_only(turn):
    q, k = torch.randn(1, 1, 1, K).expand(1, 1, T, K), torch.randn(1, 1, 1, K).expand(1, 1, T, K)
    positions = torch.arange(T) + 90
    scores = turn(q, *table(positions)) @ turn(k, *table(positions)).mT
    by_distance = [scores[0, 0].diagonal(offset) for offset in range(1 - T, T)]
    for diagonal in by_distance:
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    means = torch.stack([diagonal.mean() for diagonal in by_distance])
    assert (means[:, None] - means).fill_diagonal_(1).abs().min() > 1e-3  # all distances differ


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
def test_lengths_stay_and_position_0_changes_nothing(turn):
    x, _ = heads()
    assert_close(turn(x, *table()).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turn(x, *table(torch.zeros(T, dtype=torch.long))), x)


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
def test_one_token_at_an_offset_is_a_slice_of_the_whole(turn):
    x, _ = heads()
    whole = turn(x, *table())
    for t in range(T):
        alone = turn(x[:, :, t : t + 1], *table(POSITIONS[:, t : t + 1]))
        assert torch.equal(alone, whole[:, :, t : t + 1])


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
def test_a_table_without_batch_serves_all_sequences(turn):
    x, _ = heads()
    shared = turn(x, *table(POSITIONS[1]))
    assert torch.equal(turn(x, *table(POSITIONS[1:2])), shared)
    assert torch.equal(turn(x, *table(POSITIONS[1:2].expand(B, T))), shared)
    assert not torch.equal(turn(x, *table()), shared)


@pytest.mark.parametrize("turn", [rotate, rotate_interleaved])
def test_the_gradient_is_turned_back(turn):
    x, _ = heads()
    x.requires_grad_()
    upstream = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(turn(x, *table()), x, upstream)
    assert_close(gradient, turn(upstream, *table(-POSITIONS)))


# Layouts


def permute(w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """What transformers' script for converting Llama checkpoints does to q_proj and k_proj."""
    dim1, dim2 = w.shape
    return w.view(n_heads, dim1 // n_heads // 2, 2, dim2).transpose(1, 2).reshape(dim1, dim2)


def test_half_from_interleaved_is_the_conversion_of_llama_checkpoints():
    for n_heads in (H, G):
        weight = torch.randn(n_heads * K, D)
        half = half_from_interleaved(weight, head_dim=K)
        assert torch.equal(half, permute(weight, n_heads))
        assert torch.equal(interleaved_from_half(half, head_dim=K), weight)
        assert not torch.equal(interleaved_from_half(weight, head_dim=K), half)


def test_a_permuted_weight_and_bias_give_the_other_layout():
    weight, bias, x = torch.randn(H * K, D), torch.randn(H * K), torch.randn(B, T, D)

    def project(weight, bias):
        return F.linear(x, weight, bias).unflatten(-1, (H, K)).transpose(1, 2)

    interleaved = rotate_interleaved(project(weight, bias), *table())
    permuted = (half_from_interleaved(w, head_dim=K) for w in (weight, bias))
    half = rotate(project(*permuted), *table())
    assert torch.equal(half, torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), -1))


def attend(x, weights, turn):
    def split(name):
        return F.linear(x, weights[f"{name}_proj.weight"]).unflatten(-1, (-1, K)).transpose(1, 2)

    q, k = (turn(split(name), *table()) for name in "qk")
    y = F.scaled_dot_product_attention(q, k, split("v"), is_causal=True, enable_gqa=True)
    return F.linear(y.transpose(1, 2).flatten(2), weights["o_proj.weight"])


def test_attention_equals_llamas_in_both_layouts():
    config = llama(attn_implementation="eager")
    oracle, x = modeling_llama.LlamaAttention(config, layer_idx=0), torch.randn(B, T, D)
    future = torch.full((1, 1, T, T), -math.inf).triu(1)
    tables = modeling_llama.LlamaRotaryEmbedding(config)(x, POSITIONS)
    theirs = oracle(x, tables, future)[0]
    half = oracle.state_dict()
    interleaved = half | {
        name: interleaved_from_half(half[name], head_dim=K)
        for name in ("q_proj.weight", "k_proj.weight")
    }
    assert_close(attend(x, half, rotate), theirs)
    assert_close(attend(x, interleaved, rotate_interleaved), theirs)
    for weights, turn in ((half, rotate_interleaved), (interleaved, rotate)):
        assert (attend(x, weights, turn) - theirs).abs().max() > 0.01


# Compiled, refused


@pytest.mark.parametrize("name", ["rotate", "rotate_interleaved"])
def test_compiles_whole_also_for_one_token(unchecked, name):

    def turned(x, positions):
        inv_freq = unchecked.inverse_frequencies(head_dim=K)
        return getattr(unchecked, name)(x, *unchecked.rope_table(inv_freq, positions))

    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager")
    x, _ = heads()
    for part, positions in ((x, POSITIONS), (x[:, :, :4], POSITIONS[0, :4])):
        assert_close(compiled(part, positions), turned(part, positions))
    for position in (40, 41):
        one = torch.full((B, 1), position)
        assert_close(compiled(x[:, :, :1], one), turned(x[:, :, :1], one))


@pytest.mark.parametrize("head_dim", [0, 1, 7, -2])
def test_refuses_features_that_do_not_pair_up(head_dim):
    for refused in (
        lambda: inverse_frequencies(head_dim=head_dim),
        lambda: half_from_interleaved(torch.ones(14, 2), head_dim=head_dim),
        lambda: interleaved_from_half(torch.ones(14, 2), head_dim=head_dim),
    ):
        with pytest.raises(ValueError, match=rf"head_dim={head_dim}$"):
            refused()


@pytest.mark.parametrize("convert", [half_from_interleaved, interleaved_from_half])
def test_refuses_rows_that_are_not_whole_heads(convert):
    with pytest.raises(ValueError, match=r"14 rows .* head_dim=4"):
        convert(torch.ones(14, 2), head_dim=4)


@pytest.mark.parametrize("name", ["rotate", "rotate_interleaved"])
def test_refuses_tables_for_other_tokens(unchecked, name):
    x, inv_freq = torch.ones(2, 5, 1, 6), unchecked.inverse_frequencies(head_dim=6)
    right = unchecked.rope_table(inv_freq, torch.zeros(2, 1, dtype=torch.long))
    getattr(unchecked, name)(x, *right)
    for shape in ((9,), (3, 1), (2, 9), (1, 1, 1)):  # each of them broadcasts with x
        wrong = unchecked.rope_table(inv_freq, torch.zeros(shape, dtype=torch.long))
        for tables in (wrong, (right[0], wrong[1]), (wrong[0], right[1])):
            with pytest.raises(ValueError, match=r"\(2, 5, 1, 6\)"):
                getattr(unchecked, name)(x, *tables)
    with pytest.raises(ValueError, match=r"table \(2, 1, 1\)"):
        getattr(unchecked, name)(x, right[0][..., :1], right[1][..., :1])


@pytest.mark.parametrize("name", ["rotate", "rotate_interleaved"])
def test_refuses_an_odd_head(unchecked, name):
    with pytest.raises(ValueError, match=r"head_dim=7$"):
        getattr(unchecked, name)(torch.ones(2, 5, 1, 7), torch.ones(1, 3), torch.ones(1, 3))
