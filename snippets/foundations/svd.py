"""The singular value decomposition: low rank, power iteration, randomized SVD, pseudo-inverse.

The nearest matrix of low rank: Eckart and Young 1936, Psychometrika 1; in the spectral norm,
Mirsky 1960. Randomized SVD: Halko, Martinsson and Tropp 2009, arXiv:0909.4061. Pseudo-inverse:
Moore 1920, Penrose 1955.

Axes: m rows, n columns, k = min(m, n) singular values, r rank, p = r + oversampling.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snippets.foundations.vectors_and_projections import precise


def check_rank(a: Tensor, rank: int) -> None:
    """Raises ValueError when a matrix of a's shape can't have this rank."""
    if not 0 <= rank <= min(a.shape):
        raise ValueError(f"{rank=} of a matrix of shape {tuple(a.shape)}")


def power_iteration(
    a: Float[Tensor, "m n"], start: Float[Tensor, " n"], iterations: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, ""], Float[Tensor, " n"]]:
    """u, s, v of the largest singular value: v <- aᵀ a v, made length 1, again and again.

    The part of v that points elsewhere shrinks by (s_2 / s_1)² an iteration. A start with no
    part along the wanted direction never finds it.

    Raises:
        ValueError: a start of another size, or a negative number of iterations.
    """
    if len(start) != a.shape[1] or iterations < 0:
        raise ValueError(f"a start of {len(start)} for {a.shape[1]} columns, {iterations=}")
    matrix, v = precise(a), precise(start)
    for _ in range(iterations):
        v = matrix.T @ (matrix @ (v / v.norm()))
    v = v / v.norm()
    y = matrix @ v
    return (y / y.norm()).to(a.dtype), y.norm().to(a.dtype), v.to(a.dtype)


def low_rank(
    a: Float[Tensor, "m n"], rank: int
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """left and right with left @ right the nearest matrix of this rank: sum of s_i u_i v_iᵀ.

    Each gets the roots of the singular values, so that their columns and rows are equally long.

    Raises:
        ValueError: no matrix of this shape has that rank.
    """
    check_rank(a, rank)
    u, s, vh = torch.linalg.svd(precise(a), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(a.dtype), (root[:, None] * vh[:rank]).to(a.dtype)


def low_rank_error(
    values: Float[Tensor, " k"], rank: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """What no matrix of this rank can fall below: the next singular value, and all that are left.

    The first is the spectral norm of the difference, the largest stretch of any direction. The
    second is the Frobenius norm, the root of the sum of squares of the entries.

    Raises:
        ValueError: more than there are singular values.
    """
    if not 0 <= rank <= len(values):
        raise ValueError(f"{rank=} of {len(values)} singular values")
    left_out = torch.cat([precise(values)[rank:], precise(values).new_zeros(1)])
    return left_out[0].to(values.dtype), left_out.norm().to(values.dtype)


def numerical_rank(a: Float[Tensor, "m n"], rtol: float | None = None) -> Int[Tensor, ""]:
    """How many singular values exceed rtol times the largest; rtol is max(m, n) · eps if not given.

    Others can't be told from the rounding of the entries.
    """
    matrix = precise(a)
    s = torch.linalg.svdvals(matrix)
    if rtol is None:
        rtol = max(a.shape) * torch.finfo(a.dtype).eps
    return (s > rtol * s.max()).sum()


def pseudo_inverse(a: Float[Tensor, "m n"], rtol: float | None = None) -> Float[Tensor, "n m"]:
    """sum of v_i u_iᵀ / s_i over the singular values that exceed rtol times the largest.

    pseudo_inverse(a) @ b is the shortest z with the smallest |a z - b|. The default rtol is
    that of `numerical_rank`.
    """
    u, s, vh = torch.linalg.svd(precise(a), full_matrices=False)
    if rtol is None:
        rtol = max(a.shape) * torch.finfo(a.dtype).eps
    kept = s > rtol * s.max()
    inverse = torch.where(kept, 1 / torch.where(kept, s, 1), 0)
    return ((vh.T * inverse) @ u.T).to(a.dtype)


def randomized_svd(
    a: Float[Tensor, "m n"],
    rank: int,
    *,
    oversample: int = 10,
    iterations: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "n r"]]:
    """About the first `rank` of u, s, v, from a few products with a (algorithms 4.4 and 5.1).

    Random combinations of a's columns span nearly what its largest directions span; there a is
    a small matrix. Each iteration applies a aᵀ, which makes small singular values smaller still.

    Raises:
        ValueError: no matrix of this shape has that rank; a negative oversample or iterations.
    """
    check_rank(a, rank)
    if oversample < 0 or iterations < 0:
        raise ValueError(f"negative: {oversample=}, {iterations=}")
    matrix = precise(a)
    p = min(rank + oversample, *a.shape)
    test = torch.randn(a.shape[1], p, generator=generator, dtype=matrix.dtype, device=a.device)
    q = torch.linalg.qr(matrix @ test).Q  # m p
    for _ in range(iterations):
        # Made orthonormal each time: otherwise rounding leaves only the first direction.
        q = torch.linalg.qr(matrix.T @ q).Q  # n p
        q = torch.linalg.qr(matrix @ q).Q  # m p
    u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)  # of p n
    found = (q @ u)[:, :rank], s[:rank], vh[:rank].T
    return tuple(x.to(a.dtype) for x in found)
