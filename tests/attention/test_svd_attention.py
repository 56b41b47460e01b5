import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from snippets.attention.svd_attention import (
    Attention,
    OneLayerDecoder,
    attention_map,
    circuit_attention,
    effective_rank,
    factor,
    low_rank,
    ov_circuit,
    qk_circuit,
    singular_values,
)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def hilbert(n):
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


MATRICES = {
    "tall": lambda: random(9, 4),
    "wide": lambda: random(4, 9),
    "odd": lambda: random(7, 7),
    "even": lambda: 1e6 * random(8, 8),
    "row": lambda: random(1, 5),
    "column": lambda: random(5, 1),
    "number": lambda: random(1, 1),
    "low rank": lambda: random(12, 3) @ random(3, 10),
    "equal values": lambda: torch.linalg.qr(random(6, 6))[0],
    "zero": lambda: torch.zeros(5, 3, dtype=torch.float64),
    "zero columns": lambda: torch.diag(torch.tensor([0.0, 2, 0, 1])).double(),
    "hilbert": lambda: hilbert(9),
    "attention map": lambda: attention_map(20 * random(24, 24)),
}


# The decomposition


@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_equal_torch(name):
    matrix = MATRICES[name]()
    # atol: LAPACK's own error is a few eps of the largest value.
    atol = 1e-14 * max(matrix.shape) * matrix.abs().max().item()
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix), rtol=1e-12, atol=atol)


def test_small_singular_values_are_not_lost_to_squares():
    values = torch.logspace(0, -14, 8, dtype=torch.float64)
    # Scaled orthogonal columns: here even the relative error is a few eps.
    matrix = torch.linalg.qr(random(8, 8))[0] * values
    assert_close(singular_values(matrix[:, torch.randperm(8)]), values, rtol=1e-12, atol=0)
    matrix = hilbert(12)
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix), rtol=0, atol=1e-15 * 12)


@pytest.mark.parametrize("name", MATRICES)
def test_factors_are_orthogonal_and_multiply_to_the_matrix(name):
    matrix = MATRICES[name]()
    a, v = factor(matrix)
    scale = matrix.abs().max().item()
    lengths = a.norm(dim=0)
    assert_close(a @ v.T, matrix, rtol=0, atol=1e-13 * scale)
    assert_close(v.T @ v, torch.eye(len(v), dtype=torch.float64), rtol=0, atol=1e-13)
    gram = a.T @ a
    assert_close(gram, torch.diag(lengths**2), rtol=0, atol=1e-13 * scale**2 * max(matrix.shape))
    assert (lengths.diff() <= 0).all()


def test_float32_comes_out_as_float64():
    matrix = torch.randn(6, 5)
    assert singular_values(matrix).dtype == low_rank(matrix, 2).dtype == torch.float64
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix.double()))


@pytest.mark.parametrize("shape", [(11, 7), (7, 11)])
def test_low_rank_equals_torch_and_misses_the_tail(shape):
    matrix = random(*shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in range(8):
        ours = low_rank(matrix, rank)
        assert_close(ours, (u[:, :rank] * s[:rank]) @ vh[:rank])
        assert_close((matrix - ours).norm(), s[rank:].norm(), rtol=1e-7, atol=1e-12)


def test_effective_rank_is_the_perplexity_of_the_spectrum():
    values = torch.rand(9, dtype=torch.float64)
    entropy = torch.distributions.Categorical(probs=values).entropy()
    assert effective_rank(values) == pytest.approx(entropy.exp().item())
    assert effective_rank(1000 * values) == pytest.approx(effective_rank(values))
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)


# Circuits


def test_the_qk_circuit_gives_the_scores_and_forgets_the_basis():
    q, k, x = random(3, 4, 11), random(3, 4, 11), random(6, 11)
    queries, keys = x @ q.mT, x @ k.mT  # h t k
    circuit = qk_circuit(q, k)
    assert_close(x @ circuit @ x.T, queries @ keys.mT / 2)
    rotation = torch.linalg.qr(random(4, 4))[0]
    assert_close(qk_circuit(5 * rotation @ q, rotation @ k / 5), circuit)
    assert (singular_values(circuit[0]) > 1e-12).sum() == 4


def test_the_ov_circuit_maps_what_is_looked_at_to_what_is_written():
    v, o, x = random(3, 4, 11), random(3, 11, 4), random(11)
    written = torch.stack([o[h] @ (v[h] @ x) for h in range(3)])
    assert_close(ov_circuit(v, o) @ x, written)


def test_a_causal_map_is_stochastic_triangular_and_of_full_rank():
    maps = attention_map(random(2, 5, 5))
    assert_close(maps.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    assert (maps.triu(1) == 0).all() and (maps.diagonal(0, -2, -1) > 0).all()
    for one in maps:
        assert_close(singular_values(one).prod(), one.diagonal().prod())


# Attention and the decoder


def sdpa(layer, x):
    q, k, v = (
        proj(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return layer.o_proj(y.transpose(1, 2).flatten(2))


def test_attention_and_its_circuits_equal_torch():
    # Weights five times the default: near-even maps would hide a wrong scale.
    layer = Attention(hidden_size=20, num_heads=3, head_dim=6).double()
    for p in layer.parameters():
        p.data *= 5
    x = random(2, 7, 20)
    assert_close(layer(x), sdpa(layer, x))
    assert_close(circuit_attention(x, *layer.circuits()), sdpa(layer, x))


def torch_attention(layer):
    """torch.nn.MultiheadAttention with this layer's weights; needs h * k = d."""
    d = layer.q_proj.in_features
    theirs = nn.MultiheadAttention(d, layer.num_heads, bias=False, batch_first=True)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    theirs.in_proj_weight.data = torch.cat([proj.weight for proj in projections])
    theirs.out_proj.weight.data = layer.o_proj.weight.data
    return theirs


def decoder():
    model = OneLayerDecoder(vocab_size=17, max_positions=9, hidden_size=20, num_heads=4, head_dim=5)
    for p in model.self_attn.parameters():
        p.data *= 5
    return model


def test_no_part_has_a_bias():
    assert not [name for name in decoder().state_dict() if name.endswith("bias")]


def test_embeddings_begin_with_rows_of_length_1():
    torch.manual_seed(0)
    model = OneLayerDecoder(
        vocab_size=400, max_positions=300, hidden_size=256, num_heads=4, head_dim=5
    )
    for table in (model.embed_tokens, model.embed_positions):
        assert_close(table.weight.norm(dim=1).mean(), torch.tensor(1.0), atol=0.02, rtol=0)


def test_decoder_equals_torch():
    model = decoder()
    tokens = torch.randint(17, (2, 7))  # fewer than there are positions
    x = F.embedding(tokens, model.embed_tokens.weight) + model.embed_positions(torch.arange(7))
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    y, _ = torch_attention(model.self_attn)(x, x, x, attn_mask=later, need_weights=False)
    assert_close(model(tokens), F.linear(x + y, model.lm_head.weight))


def test_decoder_is_causal():
    model = decoder()
    tokens = torch.randint(17, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 17
    before, after = model(tokens), model(changed)
    assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-4).all()


# Refused


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(bad):
    matrix = torch.eye(3)
    matrix[1, 2] = bad
    for call in (factor, singular_values, lambda m: low_rank(m, 1)):
        with pytest.raises(ValueError, match="not finite"):
            call(matrix)


def test_too_few_sweeps_are_noticed():
    with pytest.raises(ValueError, match="sweeps=2"):
        factor(random(9, 9), sweeps=2)


@pytest.mark.parametrize("rank", [-1, 4])
def test_an_impossible_rank_is_refused(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} .*\(3, 5\)"):
        low_rank(random(3, 5), rank)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, -0.5]])
def test_what_is_no_spectrum_is_refused(values):
    with pytest.raises(ValueError, match="at least 0"):
        effective_rank(torch.tensor(values))


def test_grouped_or_unfit_heads_are_refused():
    with pytest.raises(ValueError, match=r"\(8, 4, 11\) and \(2, 4, 11\)"):
        qk_circuit(torch.ones(8, 4, 11), torch.ones(2, 4, 11))
    with pytest.raises(ValueError, match=r"\(1, 4, 11\) and \(8, 11, 4\)"):
        ov_circuit(torch.ones(1, 4, 11), torch.ones(8, 11, 4))


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="10 tokens, but positions for 9"):
        decoder()(torch.zeros(1, 10, dtype=torch.long))
