"""The spectrum of attention: singular values of a head's map and of its two circuits.

The circuits follow Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"
(transformer-circuits.pub/2021/framework); the effective rank is that of Roy and Vetterli
2007; the decomposition is the one-sided Jacobi method (Hestenes 1958).

Axes: b batch, t token, d hidden size, k head dim, h head, g key-value head (g = h here),
      v vocabulary; m rows, n columns, r = min(m, n).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def factor(
    matrix: Float[Tensor, "m n"], *, sweeps: int = 40
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "n n"]]:
    """Turn the columns until all are orthogonal: matrix = a @ v.T, longest column of a first.

    v's columns are the right singular vectors; the lengths of a's columns are the singular
    values, their directions the left singular vectors. In float64, without gradient.

    Raises:
        ValueError: entries are not finite, or the sweeps were not enough.
    """
    if not matrix.isfinite().all():
        raise ValueError("the matrix holds values that are not finite")
    m, n = matrix.shape
    eps = torch.finfo(torch.float64).eps
    # v stands below a: one rotation of columns turns both. Working on the columns themselves
    # keeps small singular values; the Gram matrix would square them into the rounding.
    av = torch.cat([matrix.detach().double(), torch.eye(n, dtype=torch.float64)])
    noise = (eps * av[:m].norm()) ** 2
    # A round-robin tournament: the pairs of a round are disjoint, so they turn together.
    ring = list(range(n + n % 2))  # with n odd, whoever meets column n rests
    for _ in range(sweeps):
        worst = 0.0
        for _ in range(len(ring) - 1):
            pairs = [p for p in zip(ring, reversed(ring), strict=True) if max(p) < n]
            i, j = torch.tensor(pairs[: len(pairs) // 2], dtype=torch.long).view(-1, 2).T
            ring = [ring[0], ring[-1], *ring[1:-1]]
            p, q = av[:, i], av[:, j]
            pp, qq = p[:m].square().sum(0), q[:m].square().sum(0)
            pq = (p[:m] * q[:m]).sum(0)
            cosine = torch.where((pp > noise) & (qq > noise), pq.abs() / (pp * qq).sqrt(), 0.0)
            worst = max([worst, *cosine.tolist()])
            # The smaller of the two angles that make the pair orthogonal.
            slanted = cosine > eps
            tau = (qq - pp) / torch.where(slanted, 2 * pq, 1.0)
            tan = torch.where(tau < 0, -1.0, 1.0) / (tau.abs() + (1 + tau * tau).sqrt())
            tan = torch.where(slanted, tan, 0.0)
            cos = (1 + tan * tan).rsqrt()
            av[:, i], av[:, j] = cos * (p - tan * q), cos * (q + tan * p)
        if worst <= m * eps:
            break
    else:
        raise ValueError(f"columns still not orthogonal after {sweeps=}: cosine {worst:.1e}")
    order = av[:m].norm(dim=0).argsort(descending=True)
    return av[:m, order], av[m:, order]


def singular_values(matrix: Float[Tensor, "m n"]) -> Float[Tensor, " r"]:
    """All min(m, n) of them, largest first, in float64. Raises ValueError as `factor` does."""
    a, _ = factor(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T)
    return a.norm(dim=0)


def low_rank(matrix: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "m n"]:
    """The nearest matrix of this rank (Eckart and Young 1936): sum of s_i u_i v_i^T, i < rank.

    Raises:
        ValueError: no such rank, or as `factor` does.
    """
    if not 0 <= rank <= min(matrix.shape):
        raise ValueError(f"{rank=} of a matrix of shape {tuple(matrix.shape)}")
    a, v = factor(matrix)
    return a[:, :rank] @ v[:, :rank].T


def effective_rank(values: Float[Tensor, " r"]) -> float:
    """exp(-sum p_i log p_i) with p = values / sum(values): 1 for one direction, r for r equal ones.

    Raises:
        ValueError: a singular value is negative, or all are zero.
    """
    if values.min() < 0 or values.max() == 0:
        raise ValueError("singular values must be at least 0, and not all 0")
    return torch.special.entr(values.double() / values.double().sum()).sum().exp().item()


def qk_circuit(
    q_weight: Float[Tensor, "*h k d"], k_weight: Float[Tensor, "*g k d"]
) -> Float[Tensor, "*h d d"]:
    """W_Q^T W_K / sqrt(k): the score of query x_i and key x_j is x_i^T QK x_j.

    Raises:
        ValueError: the shapes differ; with grouped heads, repeat the key heads first.
    """
    if q_weight.shape != k_weight.shape:
        raise ValueError(f"shapes {tuple(q_weight.shape)} and {tuple(k_weight.shape)} differ")
    return q_weight.mT @ k_weight / math.sqrt(q_weight.shape[-2])


def ov_circuit(
    v_weight: Float[Tensor, "*g k d"], o_weight: Float[Tensor, "*h d k"]
) -> Float[Tensor, "*h d d"]:
    """W_O W_V: a query that looks at x_j alone adds OV x_j to its residual stream.

    Raises:
        ValueError: the shapes don't fit; with grouped heads, repeat the value heads first.
    """
    if o_weight.shape != v_weight.mT.shape:
        raise ValueError(f"shapes {tuple(v_weight.shape)} and {tuple(o_weight.shape)} don't fit")
    return o_weight @ v_weight


def attention_map(scores: Float[Tensor, "*b t t"]) -> Float[Tensor, "*b t t"]:
    """Causal softmax: row i is a distribution over the tokens 0..i."""
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1)


def circuit_attention(
    x: Float[Tensor, "b t d"], qk: Float[Tensor, "h d d"], ov: Float[Tensor, "h d d"]
) -> Float[Tensor, "b t d"]:
    """Attention with no queries, keys or values: sum over heads of map(x QK x^T) x OV^T."""
    x = x[:, None]  # b 1 t d
    maps = attention_map(x @ qk @ x.mT)  # b h t t
    return (maps @ x @ ov.mT).sum(1)


class Attention(nn.Module):
    """Causal multi-head attention; head_dim need not be hidden_size / num_heads."""

    def __init__(self, *, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # b h t k
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = attention_map(q @ k.mT / math.sqrt(q.shape[-1])) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def circuits(self) -> tuple[Float[Tensor, "h d d"], Float[Tensor, "h d d"]]:
        """QK and OV of every head."""
        q, k, v = (
            proj.weight.unflatten(0, (self.num_heads, -1))  # h k d
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = self.o_proj.weight.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # h d k
        return qk_circuit(q, k), ov_circuit(v, o)


class OneLayerDecoder(nn.Module):
    """Token and position embeddings, one attention layer, unembedding; no norm, no MLP.

    Nothing but the softmax is nonlinear, so that the circuits tell all there is.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_positions: int,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
    ):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.embed_positions = nn.Embedding(max_positions, hidden_size)
        self.self_attn = Attention(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        for table in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(table.weight, std=hidden_size**-0.5)  # rows of length about 1

    def embed(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Raises ValueError when there are more tokens than learned positions."""
        t, most = tokens.shape[1], self.embed_positions.num_embeddings
        if t > most:
            raise ValueError(f"{t} tokens, but positions for {most}")
        return self.embed_tokens(tokens) + self.embed_positions.weight[:t]

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        x = self.embed(tokens)
        return self.lm_head(x + self.self_attn(x))
