"""Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).

Several narrow look-ups side by side, each in a subspace of its own, over the sequence's
own tokens (self-attention) or over another sequence's (cross-attention).

Axes: b batch, t query token, s key token, d hidden size, m hidden size of the memory,
h head, k head dim.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.scaled_dot_product import attend, causal_mask


@runtime_checkable
class KeepsTokens(Protocol):
    """A cache as the layer needs it: `LayerCache` of snippets/attention/kv_cache.py."""

    length: int  # tokens kept

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep new tokens; return them behind those that were kept."""


class MultiHeadAttention(nn.Module):
    """h look-ups of width k, and a matrix that adds up what they found.

    With q_i, k_i, v_i features i k to (i + 1) k of the projected tokens, returns
    [y_0 ... y_(h-1)] W_o^T, y_i = softmax(q_i k_i^T / sqrt(k)) v_i. Keys and values
    come from x, or from a memory: another sequence, of a length and width of its own.

    Args:
        hidden_size: of x and of the output.
        num_heads: h.
        head_dim: k, hidden_size / num_heads unless given.
        memory_size: width of the memory; given, this is cross-attention.
        causal: each token sees itself and earlier ones only, in self-attention.
        bias: of the four projections.

    Raises:
        ValueError: heads that don't divide the hidden size, or a causal memory.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        memory_size: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        if num_heads < 1 or (head_dim is None and hidden_size % num_heads):
            raise ValueError(f"head_dim needed: {hidden_size=}, {num_heads=}")
        if causal and memory_size is not None:
            # Token 3 of a translation is no later than word 5 of the original.
            raise ValueError(f"no order between two sequences: {causal=}, {memory_size=}")
        k = hidden_size // num_heads if head_dim is None else head_dim
        m = hidden_size if memory_size is None else memory_size
        self.num_heads, self.causal, self.is_cross = num_heads, causal, memory_size is not None
        self.q_proj = nn.Linear(hidden_size, num_heads * k, bias=bias)
        self.k_proj = nn.Linear(m, num_heads * k, bias=bias)
        self.v_proj = nn.Linear(m, num_heads * k, bias=bias)
        self.o_proj = nn.Linear(num_heads * k, hidden_size, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s m"] | None = None,
        attention_mask: Int[Tensor, "b s"]
        | Bool[Tensor, "b s"]
        | Bool[Tensor, "#b #h t s"]
        | None = None,
        cache: KeepsTokens | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Attend from t tokens to the s tokens of the memory, or to themselves and the cache.

        Args:
            x: the tokens that ask.
            memory: the tokens that answer, for cross-attention.
            attention_mask: over the tokens that answer, 1 for tokens and 0 for padding,
                which a causal layer makes causal; or True for the pairs that attend, taken
                as it is. See `allowed_pairs`.
            cache: this layer's. Self-attention adds its tokens to it; cross-attention
                fills it with the memory's keys and values once, and later reads those.

        Raises:
            ValueError: a mask, a memory or a cache that doesn't fit.
            TypeError: a mask for pairs that isn't boolean.
        """
        q, k, v, mask = self.look_ups(x, memory, attention_mask, cache)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def maps(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s m"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "b h t s"]:
        """How much each head's query looks at each key: rows of sum 1, or 0 without keys."""
        q, k, _, mask = self.look_ups(x, memory, attention_mask)
        # Key j hands over the j-th unit vector, so the blend is the weights themselves.
        units = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
        return attend(q, k, units.expand(*k.shape[:2], -1, -1), mask)

    def contributions(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s m"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "b h t d"]:
        """What each head adds to the output: y_i W_o,i^T. Their sum lacks only o_proj's bias."""
        q, k, v, mask = self.look_ups(x, memory, attention_mask)
        w_o = self.o_proj.weight.unflatten(1, (self.num_heads, -1))  # d h k
        return torch.einsum("bhtk,dhk->bhtd", attend(q, k, v, mask), w_o)

    def look_ups(
        self,
        x: Float[Tensor, "b t d"],
        memory: Float[Tensor, "b s m"] | None = None,
        attention_mask: Tensor | None = None,
        cache: KeepsTokens | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries b h t k, keys and values b h s k, and the mask: what the heads compute with."""
        if self.is_cross != (memory is not None):
            given = None if memory is None else tuple(memory.shape)
            raise ValueError(f"cross-attention is {self.is_cross}, memory is {given}")
        source = x if memory is None else memory
        if len(source) != len(x):
            raise ValueError(f"{len(x)} sequences ask, {len(source)} memories answer")
        past = 0 if cache is None else cache.length
        s = source.shape[1] if self.is_cross else past + source.shape[1]
        if self.is_cross and past:
            if s != past:
                raise ValueError(f"a memory of {s} tokens, in the cache are {past}")
            # Nothing new to keep. The memory is taken to be the one that was kept.
            source = source[:, :0]
        heads = {"num_heads": self.num_heads, "causal": self.causal}
        mask = allowed_pairs(attention_mask, *x.shape[:2], s, **heads, device=x.device)
        q = self.split(self.q_proj(x))  # b h t k
        k, v = self.split(self.k_proj(source)), self.split(self.v_proj(source))  # b h s k
        if cache is not None:
            k, v = cache.append(k, v)  # b h s k
        return q, k, v, mask

    def split(self, x: Float[Tensor, "b t hk"]) -> Float[Tensor, "b h t k"]:
        """Cut the features into heads: head i is features i k up to (i + 1) k.

        Two steps: features into h x k, then heads before tokens. A reshape straight to
        b h t k has the same shape and hands a head pieces of different tokens.
        """
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def allowed_pairs(
    attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | Bool[Tensor, "#b #h t s"] | None,
    b: int,
    t: int,
    s: int,
    *,
    num_heads: int,
    causal: bool,
    device: torch.device | None = None,
) -> Bool[Tensor, "#b #h #t s"] | Bool[Tensor, "t s"] | None:
    """Who may attend to whom, True = attend; None if everyone may to everyone.

    As `allowed_keys` of snippets/attention/kv_cache.py for causal layers, and for those
    in which order doesn't count: padding is then hidden from every query alike.

    Args:
        attention_mask: 1 for tokens and 0 for padding (b s), or booleans for every pair.
        b: sequences.
        t: queries; a causal layer's are the last of the s tokens.
        s: keys.
        num_heads: h.
        causal: hide later tokens; booleans for pairs are taken as they are.
        device: of the causal mask.

    Raises:
        ValueError: a mask of another shape.
        TypeError: four axes of another type than bool: floats are added elsewhere.
    """
    earlier = causal_mask(t, s, device=device) if causal else None
    if attention_mask is None:
        return earlier
    shape = tuple(attention_mask.shape)
    if attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"mask of {attention_mask.dtype}: needs booleans, True = attend")
        if shape[0] not in (1, b) or shape[1] not in (1, num_heads) or shape[2:] != (t, s):
            raise ValueError(f"mask of shape {shape}, for {b=} h={num_heads} {t=} {s=}")
        return attention_mask
    if shape != (b, s):
        raise ValueError(f"mask of shape {shape}, for {b=} {s=}")
    keys = attention_mask[:, None, None].bool()  # b 1 1 s
    return keys if earlier is None else earlier & keys


def unpack_torch(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `nn.MultiheadAttention` under the names here, of a layer or a whole model.

    torch stacks the query, key and value matrices in that order as `in_proj_weight`, unless
    their widths differ, and the biases always; it calls the last matrix `out_proj`. Tensors
    of other modules stay as they are.

    Raises:
        ValueError: `add_bias_kv=True`, a learned extra key that is no part of the paper.
    """
    unpacked = {}
    for name, weight in weights.items():
        prefix, dot, last = name.rpartition(".")
        if last in ("bias_k", "bias_v"):
            raise ValueError(f"{name}: an extra learned key, which has no place here")
        if last in ("in_proj_weight", "in_proj_bias"):
            kind = last.removeprefix("in_proj_")
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                unpacked[f"{prefix}{dot}{letter}_proj.{kind}"] = part
        elif last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            unpacked[f"{prefix}{dot}{last.replace('_weight', '.weight')}"] = weight
        elif prefix.rpartition(".")[2] == "out_proj":
            owner = prefix.removesuffix("out_proj")
            unpacked[f"{owner}o_proj.{last}"] = weight
        else:
            unpacked[name] = weight
    return unpacked
