"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

A group of query heads shares one key-value head. With as many key-value heads
as query heads this is multi-head attention (Vaswani et al. 2017,
arXiv:1706.03762), with a single one multi-query attention (Shazeer 2019,
arXiv:1911.02150).

Axes: b batch, t query token, s key token, d hidden size, h query head,
g key-value head, r query head within its group (h = g r), k head dim.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def grouped_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g t k"],
    v: Float[Tensor, "b g t k"],
) -> Float[Tensor, "b h t k"]:
    """Causal attention; query head i reads key-value head j = i // r, r = h / g.

    y_i = softmax(q_i k_j^T / sqrt(head dim)) v_j, over the keys s <= t.
    The same function as `F.scaled_dot_product_attention(q, k, v, is_causal=True,
    enable_gqa=True)`, spelled out: it holds all b h t t scores at once.
    """
    # Query head i becomes (i // r, i % r), the order of heads in checkpoints.
    # Split as (r, g) it would read i % g: the shapes fit, the output is wrong.
    q = q.unflatten(1, (k.shape[1], -1))  # b g r t k
    # Having no r axis, keys and values serve their whole group unrepeated.
    scores = torch.einsum("bgrtk,bgsk->bgrts", q, k) * q.shape[-1] ** -0.5
    future = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)  # t s
    scores = scores.masked_fill(future, float("-inf"))
    # Llama computes its softmax in float32, whatever the dtype of the rest.
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    y = torch.einsum("bgrts,bgsk->bgrtk", weights, v)
    return y.flatten(1, 2)  # b h t k


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share key-value heads in groups.

    With x's heads y_i as in `grouped_attention`, returns [y_0 ... y_(h-1)] W_o^T.
    num_kv_heads = num_heads is multi-head attention, 1 is multi-query attention.
    head_dim is hidden_size / num_heads unless given; many models give another.
    Parameters are named and shaped as in Llama checkpoints.

    Raises:
        ValueError: the heads don't divide evenly.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
    ):
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"uneven groups: {num_heads=}, {num_kv_heads=}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"head_dim needed: {hidden_size=}, {num_heads=}")
            head_dim = hidden_size // num_heads
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q = self.split(self.q_proj(x))  # b h t k
        k = self.split(self.k_proj(x))  # b g t k
        v = self.split(self.v_proj(x))  # b g t k
        y = grouped_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def split(self, x: Float[Tensor, "b t hk"]) -> Float[Tensor, "b h t k"]:
        """Cut the features into heads: head i is features i k up to (i + 1) k."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
