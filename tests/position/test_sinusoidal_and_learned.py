"""Absolute positions against numpy, GPT-2, BERT, RoBERTa, OPT and five models' sinusoids.

Sizes are such that swapped axes show: no two of b t d f are equal.
"""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, DynamicCache, GPT2Config, GPT2Model, RobertaConfig
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.models.ctrl.modeling_ctrl import positional_encoding
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.whisper.modeling_whisper import sinusoids as whisper_sinusoids

from snippets.position.sinusoidal_and_learned import (
    LearnedPositions,
    frequencies,
    shift_map,
    sinusoids,
    sinusoids_in_halves,
    stretched_frequencies,
    token_positions,
)

B, T, D = 3, 7, 20
LINE = torch.arange(40)
SETS = [frequencies, stretched_frequencies]
LAYOUTS = [sinusoids, sinusoids_in_halves]


# Sinusoids


@pytest.mark.parametrize("size", [2, 6, 20, 512])
def test_the_papers_formula_in_numpy(size):
    p, i = np.arange(5000)[:, None], np.arange(size // 2)
    expected = np.empty((5000, size))
    expected[:, 0::2] = np.sin(p / 10000 ** (2 * i / size))
    expected[:, 1::2] = np.cos(p / 10000 ** (2 * i / size))
    omega = frequencies(hidden_size=size, dtype=torch.float64)
    ours = sinusoids(torch.arange(5000), omega)
    assert ours.dtype == torch.float64
    assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-10)
    # float32 knows an angle near 5000 to 2^-12.
    omega = frequencies(hidden_size=size)
    assert omega.dtype == torch.float32
    assert_close(sinusoids(torch.arange(5000), omega), ours.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [6, 20])
def test_interleaved_sinusoids_are_distilberts(size):
    theirs = create_sinusoidal_embeddings(40, size, torch.empty(40, size))
    assert_close(sinusoids(LINE, frequencies(hidden_size=size)), theirs)


def test_halves_with_the_papers_frequencies_are_marians_and_ctrls():
    ours = sinusoids_in_halves(LINE, frequencies(hidden_size=D))
    assert_close(ours, MarianSinusoidalPositionalEmbedding(40, D).create_weight())
    assert_close(ours, positional_encoding(40, D, torch.float32))


@pytest.mark.parametrize("base", [10000, 500.0])
def test_halves_with_stretched_frequencies_are_whispers(base):
    ours = sinusoids_in_halves(LINE, stretched_frequencies(hidden_size=D, base=base))
    assert ours.dtype == torch.float32
    assert_close(ours, whisper_sinusoids(40, D, base))


def test_halves_with_stretched_frequencies_are_m2m100s_behind_its_offset():
    oracle = M2M100SinusoidalPositionalEmbedding(40, D, padding_idx=1)
    ids = torch.randint(5, 90, (B, T))
    ids[1, 4:] = 1  # padding behind
    positions = token_positions((ids != 1).long())
    ours = sinusoids_in_halves(positions + 2, stretched_frequencies(hidden_size=D))
    real = ids != 1
    assert_close(ours[real], oracle(ids)[real])


def test_the_bases_and_the_ends_of_both_sets():
    paper, stretched = (f(hidden_size=8, base=16, dtype=torch.float64) for f in SETS)
    assert paper.tolist() == [1.0, 0.5, 0.25, 0.125]
    assert_close(stretched, torch.tensor([16.0 ** (-i / 3) for i in range(4)]).double())
    for make in SETS:
        assert make(hidden_size=8)[0] == 1 and make(hidden_size=8).dtype == torch.float32
        assert_close(make(hidden_size=8), make(hidden_size=8, base=10000))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_dtypes_and_angles_that_stay_in_float32(layout):
    positions = torch.randint(4000, 5000, (B, T))
    omega = frequencies(hidden_size=D)
    ours = layout(positions, omega)
    assert ours.shape == (B, T, D)
    assert torch.equal(ours[1], layout(positions[1], omega))
    half = layout(positions, omega, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, ours.bfloat16())
    cast = layout(positions, omega.bfloat16())
    assert torch.equal(cast, layout(positions, omega.bfloat16().float()))


def test_layouts_hold_the_same_numbers():
    omega = frequencies(hidden_size=D)
    interleaved, halves = (layout(LINE, omega) for layout in LAYOUTS)
    assert torch.equal(torch.cat([interleaved[:, ::2], interleaved[:, 1::2]], -1), halves)


@pytest.mark.parametrize("make", SETS)
@pytest.mark.parametrize("steps", [0, 1, 5, -3, 1000])
def test_a_linear_map_moves_every_position_by_as_much(make, steps):
    omega = make(hidden_size=D, dtype=torch.float64)
    shift = shift_map(omega, steps)
    assert shift.shape == (D, D) and shift.dtype == torch.float64
    moved = sinusoids(LINE, omega) @ shift.T
    assert_close(moved, sinusoids(LINE + steps, omega), rtol=0, atol=1e-10)
    assert_close(shift @ shift.T, torch.eye(D).double(), rtol=0, atol=1e-12)
    blocks = torch.block_diag(*torch.ones(D // 2, 2, 2)).bool()
    assert (shift[~blocks] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dot_products_depend_on_the_distance_only(layout):
    omega = frequencies(hidden_size=D, dtype=torch.float64)
    code = layout(LINE, omega)
    by_sum = ((LINE[:, None] - LINE)[..., None] * omega).cos().sum(-1)
    assert_close(code @ code.T, by_sum, rtol=0, atol=1e-10)
    assert_close(code.norm(dim=-1), torch.full((40,), math.sqrt(D / 2)).double())


# Tables


def test_gpt2s_first_hidden_state_with_a_cache():
    config = GPT2Config(n_embd=D, n_head=2, n_layer=1, n_positions=12, vocab_size=50)
    model, ids = GPT2Model(config).eval(), torch.randint(50, (B, 9))
    ours = LearnedPositions(max_positions=12, hidden_size=D)
    ours.load_state_dict(model.wpe.state_dict())
    cache = DynamicCache(config=config)
    for part in torch.arange(9).split([6, 1, 2]):
        with torch.no_grad():
            states = model(ids[:, part], past_key_values=cache, output_hidden_states=True)
            assert_close(model.wte(ids[:, part]) + ours(part), states.hidden_states[0])


def test_berts_embeddings_count_places_also_of_padding():
    config = BertConfig(hidden_size=D, vocab_size=50, max_position_embeddings=12)
    oracle, ids = BertEmbeddings(config).eval(), torch.randint(50, (B, T))
    ids[1, :3] = config.pad_token_id
    ours = LearnedPositions(max_positions=12, hidden_size=D)
    ours.load_state_dict(oracle.position_embeddings.state_dict())
    x = oracle.word_embeddings(ids) + oracle.token_type_embeddings(0 * ids)
    assert_close(oracle.LayerNorm(x + ours(torch.arange(T))), oracle(ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_robertas_embeddings_count_tokens_from_2(side):
    config = RobertaConfig(hidden_size=D, vocab_size=50, max_position_embeddings=14)
    oracle, ids = RobertaEmbeddings(config).eval(), torch.randint(3, 50, (B, T))
    ids[1, slice(3) if side == "left" else slice(-3, None)] = 1
    oracle.position_embeddings.weight.data.normal_()
    ours = LearnedPositions(max_positions=12, hidden_size=D, offset=2)
    ours.load_state_dict(oracle.position_embeddings.state_dict())
    x = oracle.word_embeddings(ids) + oracle.token_type_embeddings(0 * ids)
    positions = token_positions((ids != 1).long())
    assert_close(oracle.LayerNorm(x + ours(positions)), oracle(ids))


def test_opts_rows_are_the_same():
    oracle, mask = OPTLearnedPositionalEmbedding(12, D), torch.ones(B, T, dtype=torch.long)
    mask[1, :3] = 0
    ours = LearnedPositions(max_positions=12, hidden_size=D, offset=2)
    ours.load_state_dict(oracle.state_dict())
    assert_close(ours(token_positions(mask)), oracle(mask))


def test_token_positions():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    assert token_positions(mask).tolist() == [[-1, -1, 0, 1], [0, 1, -1, -1], [0, -1, 1, 2]]


def test_only_rows_that_were_used_learn():
    table = LearnedPositions(max_positions=12, hidden_size=D)
    table(torch.tensor([[2, 5], [5, 7]])).sum().backward()
    used = table.weight.grad.abs().sum(1)
    assert used.tolist() == [D * n for n in (0, 0, 1, 0, 0, 2, 0, 1, 0, 0, 0, 0)]


def test_a_new_table_is_as_small_as_gpt2s():
    table = LearnedPositions(max_positions=5000, hidden_size=D)
    assert table.weight.shape == (5000, D)
    assert 0.0195 < table.weight.std() < 0.0205 and table.weight.mean().abs() < 0.001


@pytest.mark.parametrize("offset, positions", [(0, [0, 11]), (2, [-2, 11]), (0, [])])
def test_the_first_and_the_last_position_and_none(offset, positions):
    table = LearnedPositions(max_positions=12, hidden_size=D, offset=offset)
    rows = torch.tensor(positions, dtype=torch.long)
    assert torch.equal(table(rows), table.weight[rows + offset])


@pytest.mark.parametrize(
    "offset, positions, said",
    [
        (0, [0, 12], "positions 0 to 12, the table has 0 to 11$"),
        (0, [-1, 3], "positions -1 to 3, the table has 0 to 11$"),
        (2, [5, 12], "positions 5 to 12, the table has -2 to 11$"),
        (2, [-3, 5], "positions -3 to 5, the table has -2 to 11$"),
    ],
)
def test_refuses_positions_beyond_the_table(offset, positions, said):
    table = LearnedPositions(max_positions=12, hidden_size=D, offset=offset)
    with pytest.raises(ValueError, match=said):
        table(torch.tensor(positions))


# Refused, compiled


@pytest.mark.parametrize("size", [0, -2, 7])
@pytest.mark.parametrize("make, least", list(zip(SETS, (2, 4), strict=True)))
def test_refuses_features_that_do_not_pair_up(make, least, size):
    with pytest.raises(ValueError, match=f"hidden_size={size}, needs an even {least}"):
        make(hidden_size=size)


def test_a_single_pair_has_nothing_to_stretch():
    assert frequencies(hidden_size=2).tolist() == [1]
    with pytest.raises(ValueError, match="hidden_size=2"):
        stretched_frequencies(hidden_size=2)
    assert_close(stretched_frequencies(hidden_size=4), torch.tensor([1, 1e-4]))


def test_compiles_whole(unchecked):
    table = LearnedPositions(max_positions=12, hidden_size=D)

    def embedded(positions):
        code = sinusoids(positions, frequencies(hidden_size=D))
        halves = sinusoids_in_halves(positions, stretched_frequencies(hidden_size=D))
        return code + halves + table(positions) @ shift_map(frequencies(hidden_size=D), 3).T

    compiled = torch.compile(embedded, fullgraph=True, backend="aot_eager")
    for t in (T, 1):
        positions = torch.arange(B * t).view(B, t) % 12
        assert_close(compiled(positions), embedded(positions))


def test_on_meta_it_has_shapes_only():
    with torch.device("meta"):
        table = LearnedPositions(max_positions=12, hidden_size=D)
        assert table(torch.arange(T)).shape == (T, D)
    assert shift_map(frequencies(hidden_size=D).to("meta"), 1).is_meta
