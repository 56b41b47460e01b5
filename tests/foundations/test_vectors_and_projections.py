"""Vectors against numpy, torch.linalg and sums in loops.

More rows than columns and the reverse, dependent columns, zero columns, half precision.
"""

import importlib.util
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from snippets.foundations import vectors_and_projections as vectors
from snippets.foundations.vectors_and_projections import (
    cosine,
    dot,
    gram_schmidt,
    least_squares,
    normal_equations,
    project,
)

D, N, K = 11, 4, 3
FORMS = ["independent", "dependent", "zero column", "wide", "all equal", "nothing"]


@pytest.fixture
def alone(monkeypatch):
    """The module as a reader has it: without the shape checks that tests/conftest.py adds."""
    spec = importlib.util.spec_from_file_location("copy_of_vectors", vectors.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where torch.compile looks for globals
    spec.loader.exec_module(module)
    return module


def columns(form: str, dtype=torch.float64) -> torch.Tensor:
    a = torch.randn(D, N, dtype=dtype) * torch.tensor([1e-3, 1, 50, 2], dtype=dtype)
    if form == "dependent":
        a[:, 2] = 3 * a[:, 0] - a[:, 1]
    elif form == "zero column":
        a[:, 1] = 0
    elif form == "wide":
        a = torch.randn(N, D, dtype=dtype)
    elif form == "all equal":
        a = torch.ones(D, N, dtype=dtype)
    elif form == "nothing":
        a = torch.zeros(D, N, dtype=dtype)
    return a


def test_dot_is_a_sum_of_products_and_equals_numpy():
    x, y = torch.randn(5, D), torch.randn(5, D)
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    loops = [math.fsum(p * q for p, q in zip(*pair, strict=True)) for pair in pairs]
    assert_close(dot(x, y), torch.tensor(loops))
    assert_close(dot(x, y), torch.from_numpy(np.einsum("bd,bd->b", x.numpy(), y.numpy())))
    assert_close(dot(x, y[0]), x @ y[0])
    assert dot(x[0], y[0]).shape == ()


def test_cosine_equals_torch():
    x, y = torch.randn(5, 3, D), torch.randn(5, 3, D)
    assert_close(cosine(x, y), F.cosine_similarity(x, y, dim=-1))
    assert_close(cosine(x, 3 * x), torch.ones(5, 3))
    assert_close(cosine(x, -x), -torch.ones(5, 3))
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 0
    assert cosine(torch.zeros(D), x[0, 0]) == 0 == cosine(x[0, 0], torch.zeros(D))
    assert_close(cosine(1e-15 * x, 1e-15 * y), cosine(x, y))  # torch gives 0 here


@pytest.mark.parametrize("form", FORMS)
def test_gram_schmidt_gives_an_orthonormal_basis(form):
    a = columns(form)
    q, r = gram_schmidt(a)
    rank = np.linalg.matrix_rank(a.numpy())
    kept = q.norm(dim=0) > 0
    assert kept.sum() == rank
    assert_close(q.T @ q, kept.double().diag(), atol=1e-14, rtol=0)
    assert_close(q @ r, a, atol=1e-13, rtol=0)
    assert torch.equal(r, r.triu() * kept[:, None]) or (r.tril(-1).abs() < 1e-14).all()
    assert (r[~kept] == 0).all() and (r.diagonal()[kept] > 0).all()


@pytest.mark.parametrize("form", ["independent", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_schmidt_equals_qr_of_torch(form, dtype):
    a = columns(form, dtype)
    q, r = gram_schmidt(a)
    theirs = torch.linalg.qr(a)
    size = min(a.shape)
    sign = theirs.R.diagonal().sign()  # theirs may be negative, ours are lengths
    assert_close(q[:, :size], theirs.Q * sign)
    assert_close(r[:size], sign[:, None] * theirs.R)
    assert (q[:, size:] == 0).all()


def test_stays_orthogonal_where_one_pass_does_not():
    hilbert = 1 / (torch.arange(8)[:, None] + torch.arange(8) + 1.0)  # float32, condition 1e10
    q, _ = gram_schmidt(hilbert)
    kept = (q.norm(dim=0) > 0).float()
    assert kept.sum() >= 5
    assert (q.T @ q - kept.diag()).abs().max() < 1e-6


@pytest.mark.parametrize(("left", "rank"), [(0.5, 1), (2.0, 2)])
@pytest.mark.parametrize("shape", [(D, 2), (2, 5)])
def test_the_tolerance_counts_the_larger_size(left, rank, shape):
    """Two directions, the second less or more than max(d, n) eps away from the first."""
    a = torch.zeros(shape, dtype=torch.float64)
    a[0, :] = 7
    a[1, -1] = 7 * left * max(shape) * torch.finfo(torch.float64).eps
    q, _ = gram_schmidt(a)
    assert (q.norm(dim=0) > 0).sum() == rank


@pytest.mark.parametrize("form", FORMS)
def test_projection_is_the_nearest_point(form):
    a = columns(form)
    x = torch.randn(2, 5, len(a), dtype=torch.float64)
    y = project(x, a)
    solution = np.linalg.lstsq(a.numpy(), x.flatten(0, 1).T.numpy(), rcond=None)[0]
    assert_close(y, torch.from_numpy(a.numpy() @ solution).T.unflatten(0, (2, 5)))
    assert ((x - y) @ a).abs().max() < 1e-11  # a right angle to each column
    assert_close(project(y, a), y)
    assert_close(project(x, a.flip(1) * 5), y)
    assert_close(project(x[0, 0], a), y[0, 0])


def test_projection_on_a_line_and_on_everything():
    x, line = torch.randn(D), torch.randn(D)
    assert_close(project(x, line[:, None]), line * dot(x, line) / dot(line, line))
    assert_close(project(x, torch.randn(D, D)), x)
    assert_close(project(x, torch.randn(D, 2 * D)), x)


@pytest.mark.parametrize("form", FORMS)
def test_least_squares_equals_numpy_also_with_dependent_columns(form):
    a = columns(form)
    b = torch.randn(len(a), K, dtype=torch.float64)
    theirs = np.linalg.lstsq(a.numpy(), b.numpy(), rcond=1e-12)[0]  # the shortest solution
    assert_close(least_squares(a, b), torch.from_numpy(theirs))
    assert_close(least_squares(a, b), torch.linalg.lstsq(a, b, driver="gelsd").solution)


def test_least_squares_in_float32_equals_torch():
    a, b = torch.randn(D, N), torch.randn(D, K)
    theirs = torch.linalg.lstsq(a, b).solution
    assert_close(least_squares(a, b), theirs)
    assert_close(normal_equations(a, b), theirs)


def test_least_squares_is_where_the_gradient_vanishes():
    a, b = columns("independent"), torch.randn(D, K, dtype=torch.float64)
    z = least_squares(a, b).requires_grad_()
    (gradient,) = torch.autograd.grad((a @ z - b).square().sum(), z)
    assert gradient.abs().max() < 1e-9
    assert_close(normal_equations(a, b), z, atol=1e-8, rtol=1e-8)


def test_normal_equations_lose_twice_the_digits():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(D, N)).Q, torch.linalg.qr(torch.randn(N, N)).Q
    a = u * torch.logspace(0, -3, N) @ v
    z = torch.randn(N, 1)
    ours, normal = (
        (solve(a, a @ z) - z).abs().max() for solve in (least_squares, normal_equations)
    )
    assert ours < 1e-3 and normal > 10 * ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounded_float32(dtype):
    a, b, x = (torch.randn(s).to(dtype) for s in ((D, N), (D, K), (5, D)))
    f = [t.float() for t in (a, b, x)]
    assert torch.equal(dot(x, b[:, 0]), dot(f[2], f[1][:, 0]).to(dtype))
    assert torch.equal(cosine(x, b[:, 0]), cosine(f[2], f[1][:, 0]).to(dtype))
    assert torch.equal(project(x, a), project(f[2], f[0]).to(dtype))
    assert torch.equal(least_squares(a, b), least_squares(f[0], f[1]).to(dtype))
    assert torch.equal(normal_equations(a, b), normal_equations(f[0], f[1]).to(dtype))
    for ours, exact in zip(gram_schmidt(a), gram_schmidt(f[0]), strict=True):
        assert torch.equal(ours, exact.to(dtype))


def test_half_precision_does_not_sum_in_half_precision():
    x = torch.full((4096,), 0.1, dtype=torch.bfloat16)
    assert_close(dot(x, x).item(), 4096 * float(x[0]) ** 2, rtol=2**-8, atol=0)


def test_compiles_as_one_graph(alone):
    a, b = columns("dependent", torch.float32), torch.randn(D, K)
    for function, inputs in [
        (dot, (b.T, a[:, 0])),
        (cosine, (b.T, a[:, 0])),
        (project, (b.T, a)),
        (least_squares, (a, b)),
    ]:
        compiled = torch.compile(getattr(alone, function.__name__), fullgraph=True, backend="eager")
        assert_close(compiled(*inputs), function(*inputs))


def test_what_is_not_a_number_stays_visible():
    a, b = torch.randn(D, N), torch.randn(D, K)
    a[3, 1] = math.nan
    assert gram_schmidt(a)[0][:, 1:].isnan().all()
    assert least_squares(a, b).isnan().any() and project(b.T, a).isnan().all()


def test_refuses_other_sizes(unchecked):
    a, b, x = torch.randn(D, N), torch.randn(D + 1, K), torch.randn(2, 5, D + 2)
    for function in (dot, cosine):
        with pytest.raises(ValueError, match=r"^vectors of 13 and 11 features"):
            function(x, a.T)
    for function in (least_squares, normal_equations):
        with pytest.raises(ValueError, match=r"^11 rows of a for 12 rows of b"):
            function(a, b)
    with pytest.raises(ValueError, match=r"^a vector of 13 features onto columns of 11"):
        project(x, a)


def test_normal_equations_refuse_dependent_columns():
    a = torch.ones(D, 2, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        normal_equations(a, torch.randn(D, K, dtype=torch.float64))
