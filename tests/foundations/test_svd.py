"""Singular values against torch.linalg and numpy, and against searches for something better.

Tall, wide and square matrices, repeated and zero singular values, half precision.
"""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import svd
from snippets.foundations.svd import (
    low_rank,
    low_rank_error,
    numerical_rank,
    power_iteration,
    pseudo_inverse,
    randomized_svd,
)
from snippets.foundations.vectors_and_projections import least_squares

SHAPES = [(9, 6), (5, 8), (7, 7), (1, 4), (4, 1)]


def matrix(values, m=9, n=6, dtype=torch.float64) -> torch.Tensor:
    """A random matrix with these singular values."""
    k = len(values)
    u, v = (torch.linalg.qr(torch.randn(size, k, dtype=dtype)).Q for size in (m, n))
    return u * torch.tensor(values, dtype=dtype) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
def test_power_iteration_finds_the_first_triple_of_torch(shape):
    a = torch.randn(shape, dtype=torch.float64)
    u, s, v = power_iteration(a, torch.randn(shape[1], dtype=torch.float64), 400)
    theirs = torch.linalg.svd(a)
    assert_close(s, theirs.S[0])
    assert_close(torch.outer(u, v), torch.outer(theirs.U[:, 0], theirs.Vh[0]), atol=1e-6, rtol=0)
    assert_close(a @ v, s * u)
    assert_close(v.norm(), torch.tensor(1.0).double())


@pytest.mark.parametrize("ratio", [0.5, 0.9])
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_power_iteration_converges_by_the_square_of_the_ratio(ratio, iterations):
    a = torch.tensor([3.0, 3 * ratio]).double().diag()
    u, s, v = power_iteration(a, torch.tensor([1.0, -2.0]).double(), iterations)
    assert_close((v[1] / v[0]).item(), -2 * ratio ** (2 * iterations))
    assert_close(s, (a @ v).norm())
    assert_close(u, a @ v / s)


def test_a_start_at_a_right_angle_never_finds_it():
    a = torch.tensor([3.0, 1.0]).diag()
    assert power_iteration(a, torch.tensor([0.0, 1.0]), 50)[1] == 1


def test_power_iteration_does_not_overflow():
    a = torch.diag(torch.tensor([1e9, 1e8]))
    assert_close(power_iteration(a, torch.ones(2), 60)[1], torch.tensor(1e9))


@pytest.mark.parametrize("shape", SHAPES)
def test_low_rank_equals_numpys_truncation_and_its_error_is_eckart_youngs(shape):
    a = torch.randn(shape, dtype=torch.float64)
    u, s, vh = np.linalg.svd(a.numpy(), full_matrices=False)
    for rank in range(min(shape) + 1):
        left, right = low_rank(a, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        theirs = u[:, :rank] * s[:rank] @ vh[:rank]
        assert_close(left @ right, torch.from_numpy(theirs))
        assert_close(left.norm(dim=0), right.norm(dim=1))
        spectral, frobenius = low_rank_error(torch.from_numpy(s.copy()), rank)
        assert_close(torch.linalg.matrix_norm(a - left @ right, 2), spectral)
        assert_close(torch.linalg.matrix_norm(a - left @ right), frobenius)


def test_no_search_finds_a_nearer_matrix():
    a = torch.randn(9, 6, dtype=torch.float64)
    spectral, frobenius = low_rank_error(torch.linalg.svdvals(a), 2)
    for _ in range(5):
        right = torch.randn(2, 6, dtype=torch.float64)
        for _ in range(300):  # the best left for this right, and so on
            left = least_squares(right.T, a.T).T
            right = least_squares(left, a)
        difference = a - left @ right
        assert torch.linalg.matrix_norm(difference) > frobenius * (1 - 1e-9)
        assert torch.linalg.matrix_norm(difference, 2) > spectral * (1 - 1e-9)
    assert_close(torch.linalg.matrix_norm(difference), frobenius, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rank_equals_torchs_and_numpys(dtype):
    for values in ([3, 2, 1, 0.5], [3, 2, 0, 0], [3, 1e-5, 1e-12, 0], [1, 1, 1, 1]):
        for m, n in ((9, 6), (4, 30)):
            a = matrix(values, m, n, dtype)
            rank = numerical_rank(a)
            assert rank == torch.linalg.matrix_rank(a) == np.linalg.matrix_rank(a.numpy())
            assert numerical_rank(a, 0.6) == torch.linalg.matrix_rank(a, rtol=0.6)
    assert numerical_rank(torch.zeros(3, 2)) == 0


@pytest.mark.parametrize(("left", "rank"), [(0.9, 1), (1.1, 2)])
@pytest.mark.parametrize("shape", [(12, 2), (2, 12)])
def test_the_tolerance_counts_the_larger_size(left, rank, shape):
    a = torch.zeros(shape, dtype=torch.float64)
    a[0, 0], a[1, 1] = 7, 7 * left * 12 * torch.finfo(torch.float64).eps
    assert numerical_rank(a) == rank
    assert (pseudo_inverse(a) != 0).sum() == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pseudo_inverse_equals_torchs_and_numpys(shape):
    a = torch.randn(shape, dtype=torch.float64)
    inverse = pseudo_inverse(a)
    assert_close(inverse, torch.linalg.pinv(a))
    assert_close(inverse, torch.from_numpy(np.linalg.pinv(a.numpy())))


def test_the_pseudo_inverse_of_dependent_columns():
    a = matrix([3, 2, 1e-3])
    inverse = pseudo_inverse(a)
    assert_close(inverse, torch.linalg.pinv(a), atol=1e-8, rtol=1e-8)
    assert_close(pseudo_inverse(a, 1e-2), torch.linalg.pinv(a, rtol=1e-2))
    assert_close(pseudo_inverse(a, 0.5), torch.linalg.pinv(a, rtol=0.5))
    assert not torch.allclose(pseudo_inverse(a, 1e-2), inverse)
    # Penrose's four conditions, which only one matrix meets.
    for p, q in ((a, inverse), (inverse, a)):
        assert_close(p @ q @ p, p, atol=1e-9, rtol=1e-9)
        assert_close(p @ q, (p @ q).T, atol=1e-9, rtol=1e-9)
    b = torch.randn(9, 2, dtype=torch.float64)
    assert_close(inverse @ b, least_squares(a, b), atol=1e-8, rtol=1e-8)
    assert (pseudo_inverse(torch.zeros(3, 2)) == 0).all()


@pytest.mark.parametrize("oversample", [0, 3, 50])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_randomized_svd_is_exact_for_a_matrix_of_that_rank(shape, oversample):
    a = matrix([5, 3, 2], *shape)
    u, s, v = randomized_svd(a, 3, oversample=oversample)
    assert_close(s, torch.tensor([5.0, 3, 2]).double())
    assert_close(u * s @ v.T, a)
    for q in (u, v):
        assert_close(q.T @ q, torch.eye(3).double())


def test_randomized_svd_equals_torch_with_enough_iterations():
    a = torch.randn(40, 25, dtype=torch.float64)
    theirs = torch.linalg.svd(a)
    u, s, v = randomized_svd(a, 4, iterations=60)
    assert_close(s, theirs.S[:4])
    best = theirs.U[:, :4] * theirs.S[:4] @ theirs.Vh[:4]
    assert_close(u * s @ v.T, best, atol=1e-6, rtol=0)
    assert u.shape == (40, 4) and s.shape == (4,) and v.shape == (25, 4)


def test_iterations_and_oversampling_bring_it_nearer():
    a = matrix([0.9**i for i in range(30)], 60, 40)
    best = low_rank_error(torch.linalg.svdvals(a), 5)[1]

    def excess(**settings) -> float:
        new, found = torch.Generator().manual_seed(0), []
        for _ in range(10):
            u, s, v = randomized_svd(a, 5, generator=new, **settings)
            found.append((a - u * s @ v.T).norm() / best - 1)
        return sum(found).item() / 10

    none, one, two = (excess(iterations=i) for i in range(3))
    assert none > 3 * one > 6 * two > 0
    assert excess(oversample=0, iterations=0) > 1.5 * none
    assert math.isclose(excess(), excess(oversample=10, iterations=2))  # the defaults
    assert excess(oversample=9) > excess() > excess(oversample=11)


def test_the_error_stays_below_the_papers_bound():
    """Theorem 10.6: the mean spectral error without iterations."""
    a, r, p = matrix([0.9**i for i in range(30)], 60, 40), 5, 6
    values = torch.linalg.svdvals(a)
    next_one, rest = low_rank_error(values, r)
    bound = (1 + math.sqrt(r / (p - 1))) * next_one + math.e * math.sqrt(r + p) / p * rest
    errors = []
    for _ in range(20):
        u, s, v = randomized_svd(a, r + p, oversample=0, iterations=0)
        errors.append(torch.linalg.matrix_norm(a - u * s @ v.T, 2))
    assert torch.stack(errors).mean() < bound


def test_many_iterations_keep_small_directions():
    a = matrix([1, 1e-3, 1e-6], dtype=torch.float64)
    assert_close(randomized_svd(a, 3, iterations=30)[1][2].item(), 1e-6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(dtype):
    a = torch.randn(9, 6).to(dtype)
    f, new = a.float(), torch.Generator()
    for run in (
        lambda x: power_iteration(x, x[0], 5),
        lambda x: low_rank(x, 3),
        lambda x: low_rank_error(x[:, 0].abs(), 2),
        lambda x: (pseudo_inverse(x, 0.1),),
        lambda x: randomized_svd(x, 3, generator=new.manual_seed(0)),
    ):
        for ours, exact in zip(run(a), run(f), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))
    # Rounding to half precision is rounding too.
    flat = (torch.randn(9, 2) @ torch.randn(2, 6)).to(dtype)
    assert numerical_rank(flat) == 2 and numerical_rank(flat.float()) == 6
    assert_close(
        pseudo_inverse(flat).float(),
        torch.linalg.pinv(flat.float(), rtol=0.01),
        rtol=0.1,
        atol=0.05,
    )


def test_compiles_as_one_graph(monkeypatch):
    spec = importlib.util.spec_from_file_location("copy_of_svd", svd.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)  # where torch.compile looks for globals
    spec.loader.exec_module(alone)
    monkeypatch.setattr(alone, "precise", lambda x: x)

    def several(a, start):
        triple = alone.power_iteration(a, start, 3)
        error = alone.low_rank_error(a[0], 2)
        return *triple, *alone.low_rank(a, 2), *error, alone.pseudo_inverse(a)

    inputs = torch.randn(9, 6), torch.randn(6)
    compiled = torch.compile(several, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs), several(*inputs))
    random = torch.compile(lambda a: alone.randomized_svd(a, 2), fullgraph=True, backend="eager")
    assert random(inputs[0])[0].shape == (9, 2)


def test_refuses_what_does_not_fit(unchecked):
    a = torch.randn(9, 6)
    refused = [
        (r"^a start of 9 for 6 columns, iterations=1", lambda: power_iteration(a, a[:, 0], 1)),
        (r"^a start of 6 for 6 columns, iterations=-1", lambda: power_iteration(a, a[0], -1)),
        (r"^rank=7 of a matrix of shape \(9, 6\)", lambda: low_rank(a, 7)),
        (r"^rank=-1 of a matrix of shape \(9, 6\)", lambda: low_rank(a, -1)),
        (r"^rank=7 of a matrix of shape \(9, 6\)", lambda: randomized_svd(a, 7)),
        (r"^rank=7 of 6 singular values", lambda: low_rank_error(a[0], 7)),
        (r"^rank=-1 of 6 singular values", lambda: low_rank_error(a[0], -1)),
        (
            r"^negative: oversample=-1, iterations=0",
            lambda: randomized_svd(a, 2, oversample=-1, iterations=0),
        ),
        (
            r"^negative: oversample=0, iterations=-1",
            lambda: randomized_svd(a, 2, oversample=0, iterations=-1),
        ),
    ]
    for said, call in refused:
        with pytest.raises(ValueError, match=said):
            call()
    assert randomized_svd(a, 2, oversample=0, iterations=0)[1].shape == (2,)
