"""Vectors: dot product, cosine, projection, and least squares as a projection.

Orthogonalising columns one by one is Gram 1883 and Schmidt 1907; that a second pass is enough:
Giraud, Langou, Rozloznik and van den Eshof 2005, Numerische Mathematik 101. Least squares:
Legendre 1805, Gauss 1809.

Axes: d features of a vector, n directions (the columns of a), k right-hand sides.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """At least float32: sums over many features lose their digits in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def dot(x: Float[Tensor, "*b d"], y: Float[Tensor, "*#b d"]) -> Float[Tensor, "*b"]:
    """sum over i of x_i y_i: large where the two point the same way.

    Raises:
        ValueError: the vectors have different numbers of features.
    """
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"vectors of {x.shape[-1]} and {y.shape[-1]} features")
    return (precise(x) * precise(y)).sum(-1).to(x.dtype)


def cosine(x: Float[Tensor, "*b d"], y: Float[Tensor, "*#b d"]) -> Float[Tensor, "*b"]:
    """x·y / (|x| |y|), from -1 (opposite) over 0 (right angle) to 1; 0 for a vector of zeros.

    Raises:
        ValueError: the vectors have different numbers of features.
    """
    # Each divided by its own length: a product of two small lengths could round to 0.
    units = []
    for vector in map(precise, (x, y)):
        size = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)  # b 1
        units.append(vector / size.masked_fill(size == 0, 1))
    return dot(*units).to(x.dtype)


def gram_schmidt(a: Float[Tensor, "d n"]) -> tuple[Float[Tensor, "d n"], Float[Tensor, "n n"]]:
    """a = q r: q's columns are orthonormal and span what a's do; r is upper triangular.

    A column that depends on those before it adds no direction. Its column of q is zero, and so
    is its row of r: the rank is the number of other columns. Dependent means that no more is
    left of it, when the others are taken away, than max(d, n) · eps times the longest column.
    """
    columns = precise(a)
    sizes = torch.linalg.vector_norm(columns, dim=0)  # n
    tolerance = max(a.shape) * torch.finfo(columns.dtype).eps * sizes.max()
    q = torch.zeros_like(columns)
    r = columns.new_zeros(a.shape[1], a.shape[1])
    for j in range(a.shape[1]):
        rest = columns[:, j]
        # Rounding leaves a bit of the earlier directions behind, which is much of what is left
        # of a column nearly dependent on them. The second pass takes that bit away.
        for _ in range(2):
            share = q.T @ rest  # n
            rest = rest - q @ share
            r[:, j] += share
        size = torch.linalg.vector_norm(rest)
        dependent = size <= tolerance
        # `where` and no branch: NaN stays NaN, and the function compiles as one graph.
        q[:, j] = torch.where(dependent, 0, rest / torch.where(dependent, 1, size))
        r[j, j] = torch.where(dependent, 0, size)
    return q.to(a.dtype), r.to(a.dtype)


def project(x: Float[Tensor, "*b d"], onto: Float[Tensor, "d n"]) -> Float[Tensor, "*b d"]:
    """q qᵀ x: the point nearest to x among all combinations of the columns of `onto`.

    The columns may have any length and angles, and may depend on each other.

    Raises:
        ValueError: the columns have another number of features than x.
    """
    if x.shape[-1] != onto.shape[0]:
        raise ValueError(f"a vector of {x.shape[-1]} features onto columns of {onto.shape[0]}")
    q, _ = gram_schmidt(precise(onto))
    q = q.to(precise(x).dtype)
    return (precise(x) @ q @ q.T).to(x.dtype)


def least_squares(a: Float[Tensor, "d n"], b: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
    """The z with the smallest |a z - b|; of several, the shortest one. For each column of b.

    a z is the projection of b on a's columns: a z = q qᵀ b, and so r z = qᵀ b.

    Raises:
        ValueError: a and b have different numbers of rows.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{a.shape[0]} rows of a for {b.shape[0]} rows of b")
    q, r = gram_schmidt(precise(a))
    # Independent columns make r invertible. Dependent ones leave zero rows, and the shortest
    # solution is then a combination of the others: z = p y with rᵀ = p s, so sᵀ y = qᵀ b.
    p, s = gram_schmidt(r.T)
    s = s + (s.diagonal() == 0).to(s.dtype).diag()  # 1 · y = 0 for each zero row
    y = torch.linalg.solve_triangular(s.T, q.T @ precise(b), upper=False)  # n k
    return (p @ y).to(b.dtype)


def normal_equations(a: Float[Tensor, "d n"], b: Float[Tensor, "d k"]) -> Float[Tensor, "n k"]:
    """The same z from aᵀ a z = aᵀ b, for independent columns: shorter, and less exact.

    aᵀ a has the square of a's condition number, so half of the digits may be gone.

    Raises:
        ValueError: a and b have different numbers of rows.
        torch.linalg.LinAlgError: the columns are dependent, as far as rounding can tell.
    """
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{a.shape[0]} rows of a for {b.shape[0]} rows of b")
    a, right = precise(a), precise(b)
    factor = torch.linalg.cholesky(a.T @ a)  # n n
    return torch.cholesky_solve(a.T @ right, factor).to(b.dtype)
