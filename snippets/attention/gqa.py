"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

A group of query heads shares one key-value head. With as many key-value heads
as query heads this is multi-head attention (Vaswani et al. 2017,
arXiv:1706.03762), with a single one multi-query attention (Shazeer 2019,
arXiv:1911.02150).

Axes: b batch, t query token, s key token (s >= t, with a cache), d hidden size,
h query head, g key-value head, r query head within its group (h = g r), k head dim.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.kv_cache import LayerCache, allowed_keys
from snippets.attention.scaled_dot_product import causal_mask
from snippets.position.rope import rotate


def grouped_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b g s k"],
    mask: Bool[Tensor, "#b 1 t s"] | Bool[Tensor, "t s"] | None = None,
) -> Float[Tensor, "b h t k"]:
    """Attention in which query head i reads key-value head j = i // r, r = h / g.

    y_i = softmax(q_i k_j^T / sqrt(head dim)) v_j, over the keys that the mask allows
    (True = attend). Without a mask it is causal, the queries being the last t of the
    s tokens. It holds all b h t s scores at once.
    """
    if mask is None:
        mask = causal_mask(q.shape[2], k.shape[2], device=q.device)
    # Query head i becomes (i // r, i % r), the order of heads in checkpoints.
    # Split as (r, g) it would read i % g: the shapes fit, the output is wrong.
    q = q.unflatten(1, (k.shape[1], -1))  # b g r t k
    # Having no r axis, keys and values serve their whole group unrepeated.
    scores = torch.einsum("bgrtk,bgsk->bgrts", q, k) * q.shape[-1] ** -0.5
    if mask.ndim == 4:
        mask = mask.unsqueeze(2)  # b 1 1 t s
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # Llama computes its softmax in float32, whatever the dtype of the rest. Padding
    # that stands first has no key to attend to: zeros, not the mean of all values.
    weights = scores.softmax(dim=-1, dtype=torch.float32).masked_fill(~mask, 0.0)
    y = torch.einsum("bgrts,bgsk->bgrtk", weights.to(q.dtype), v)
    return y.flatten(1, 2)  # b h t k


def fused_grouped_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b g s k"],
    mask: Bool[Tensor, "#b 1 t s"] | Bool[Tensor, "t s"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Tensor, "b h t k"]:
    """`grouped_attention` by torch's fused kernel, which never holds all the scores.

    `scale` multiplies the scores: 1 / sqrt(head dim) unless given.
    """
    t, s = q.shape[2], k.shape[2]
    # torch aligns `is_causal` with the first keys, which is right for t = s only.
    # A single query is the last token and sees every key.
    if mask is None and 1 < t < s:
        mask = causal_mask(t, s, device=q.device)
    causal = mask is None and t == s
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share key-value heads in groups.

    With x's heads y_i as in `grouped_attention`, returns [y_0 ... y_(h-1)] W_o^T.
    num_kv_heads = num_heads is multi-head attention, 1 is multi-query attention.
    head_dim is hidden_size / num_heads unless given; many models give another.
    Parameters are named and shaped as in Llama checkpoints.

    Args:
        bias: of the four projections.
        o_bias: of the last one, if it differs from the other three (Qwen2).
        scale: multiplies the scores; 1 / sqrt(head dim) unless given (Gemma).
        q_norm: applied to each head's queries before they turn (Qwen3, Gemma 3).
        k_norm: the same for the keys.

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
        bias: bool = False,
        o_bias: bool | None = None,
        scale: float | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ):
        super().__init__()
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"uneven groups: {num_heads=}, {num_kv_heads=}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"head_dim needed: {hidden_size=}, {num_heads=}")
            head_dim = hidden_size // num_heads
        self.head_dim, self.scale = head_dim, scale
        self.q_norm, self.k_norm = q_norm, k_norm
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        o_bias = bias if o_bias is None else o_bias
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=o_bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        rotation: tuple[Tensor, Tensor] | None = None,
        attention_mask: Int[Tensor, "b s"]
        | Bool[Tensor, "b s"]
        | Bool[Tensor, "#b 1 t s"]
        | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from t tokens to themselves and to those in the cache.

        Args:
            x: the tokens' hidden states.
            rotation: cos and sin of `rope_table`, to rotate queries and keys by.
            attention_mask: 1 for tokens and 0 for padding, or True for the pairs that
                attend, over the s = cached + t tokens; see `allowed_keys`. None is causal.
            cache: this layer's; the t tokens' keys and values are added to it.

        Raises:
            ValueError: a mask that isn't over all tokens, a cache of other sizes.
        """
        past = 0 if cache is None else cache.length
        mask = allowed_keys(attention_mask, *x.shape[:2], past)
        q = self.split(self.q_proj(x))  # b h t k
        k = self.split(self.k_proj(x))  # b g t k
        v = self.split(self.v_proj(x))  # b g t k
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            # Keys are kept rotated: a token's position never changes.
            k, v = cache.append(k, v)  # b g s k
        y = self.attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def attend(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        mask: Bool[Tensor, "#b 1 t s"] | Bool[Tensor, "t s"] | None,
    ) -> Float[Tensor, "b h t k"]:
        """What the layer does with its queries, keys and values; others attend otherwise."""
        return fused_grouped_attention(q, k, v, mask, scale=self.scale)

    def new_cache(self) -> LayerCache:
        """An empty cache for this layer."""
        return LayerCache()

    def split(self, x: Float[Tensor, "b t hk"]) -> Float[Tensor, "b h t k"]:
        """Cut the features into heads: head i is features i k up to (i + 1) k."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def pool_kv_heads(
    weights: Mapping[str, Tensor], *, num_kv_heads: int, head_dim: int
) -> dict[str, Tensor]:
    """A checkpoint with fewer key-value heads, each the mean of a group (section 2.1 of GQA).

    New head j is the mean of the old heads j r to (j + 1) r - 1, in the weights (g k d) and
    biases (g k) of each k_proj and v_proj; the query heads that read them now read head j.
    Other tensors stay as they are, and so do `weights`. Takes a layer's state dict or a whole
    model's, from multi-head attention or from groups. In config.json,
    `num_key_value_heads` has to follow.

    What comes out is a starting point: it wants further training.

    Raises:
        ValueError: the rows aren't whole groups of heads, or there is nothing to pool.
    """
    if num_kv_heads < 1 or head_dim < 1:
        raise ValueError(f"below 1: {num_kv_heads=}, {head_dim=}")
    owner = {name: name.rpartition(".")[0].rpartition(".")[2] for name in weights}
    pooled = {name: weights[name] for name in weights if owner[name] in ("k_proj", "v_proj")}
    if not pooled:
        raise ValueError(f"no k_proj or v_proj among {len(weights)} tensors")
    for name, weight in pooled.items():
        if len(weight) % (num_kv_heads * head_dim):
            raise ValueError(f"{name}: {len(weight)} rows, {num_kv_heads=}, {head_dim=}")
        # All heads turn alike under RoPE, so that the mean may be taken before.
        heads = weight.unflatten(0, (num_kv_heads, -1, head_dim))  # g r k ...
        pooled[name] = heads.mean(1).flatten(0, 1)
    return dict(weights) | pooled
