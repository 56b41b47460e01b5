"""LongLoRA: shifted sparse attention for training (Chen et al. 2023, arXiv:2309.12307).

A model learns long texts with attention inside short groups of tokens, and reads them
with full attention afterwards: the parameters are the same. Half of the heads have their
groups shifted by half a group, so that information crosses the borders. Beside adapters,
norms and embeddings are trained.

Axes: b batch, t token, h query head, g key-value head, n group, w token within its group,
k head dim.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from snippets.attention.gqa import GroupedQueryAttention, fused_grouped_attention
from snippets.attention.kv_cache import LayerCache


def refuse_odd(num_heads: int, group_size: int) -> None:
    """Refuse heads or groups that have no halves, with their sizes."""
    if num_heads % 2 or group_size < 2 or group_size % 2:
        raise ValueError(f"can't be halved: {num_heads=}, {group_size=}")


def attend_in_groups(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g t k"],
    v: Float[Tensor, "b g t k"],
    mask: Bool[Tensor, "#b 1 t t"] | None = None,
    *,
    group_size: int,
    scale: float | None = None,
) -> Float[Tensor, "b h t k"]:
    """Attention inside consecutive groups of tokens, which know nothing of each other.

    The groups become sequences of a larger batch: t w scores a head instead of t t. Inside
    a group the mask decides (True = attend); without a mask it is causal.
    """
    b = q.shape[0]
    q, k, v = (x.unflatten(2, (-1, group_size)).transpose(1, 2) for x in (q, k, v))  # b n _ w k
    if mask is not None:
        blocks = mask.unflatten(3, (-1, group_size)).unflatten(2, (-1, group_size))
        blocks = blocks.diagonal(dim1=2, dim2=4).movedim(-1, 1)  # b n 1 w w
        mask = blocks.expand(b, -1, -1, -1, -1).flatten(0, 1)  # bn 1 w w
    folded = (x.flatten(0, 1) for x in (q, k, v))  # bn _ w k
    y = fused_grouped_attention(*folded, mask, scale=scale)
    return y.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)


def shifted_sparse_attention(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g t k"],
    v: Float[Tensor, "b g t k"],
    mask: Bool[Tensor, "#b 1 t t"] | None = None,
    *,
    group_size: int,
    scale: float | None = None,
) -> Float[Tensor, "b h t k"]:
    """S2-Attn: attention inside groups of w tokens, shifted by w / 2 in the second half of heads.

    Token i of the first h / 2 heads is in group i // w, of the others in (i + w / 2) // w:
    there the first and the last group have w / 2 tokens. Inside its group a token sees what
    the mask allows (True = attend); without a mask, itself and its past.

    Rolling the tokens by w / 2 instead, as the paper's short form does, puts the last w / 2
    before the first w / 2 in one group: the first ones would see the end of the text.

    Raises:
        ValueError: heads or groups that can't be halved, tokens that aren't whole groups,
            queries and keys of different tokens.
    """
    (h, t), s, half = q.shape[1:3], k.shape[2], group_size // 2
    refuse_odd(h, group_size)
    if t != s or t % group_size:
        raise ValueError(f"not whole groups: {t=} queries, {s=} keys, {group_size=}")
    if k.shape[1] % 2:
        # The middle key-value head is read by both halves. Each one twice, with half of
        # its readers, is the same attention.
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    (q, q_shifted), (k, k_shifted), (v, v_shifted) = (x.chunk(2, dim=1) for x in (q, k, v))

    # Half a group, whole groups (none if there is only one), half a group.
    spans = ((0, half, half), (half, t - half, group_size), (t - half, t, half))
    pieces = [
        attend_in_groups(
            *(x[:, :, first:last] for x in (q_shifted, k_shifted, v_shifted)),
            None if mask is None else mask[:, :, first:last, first:last],
            group_size=size,
            scale=scale,
        )
        for first, last, size in spans
        if first < last
    ]
    y_shifted = torch.cat(pieces, dim=2)
    y = attend_in_groups(q, k, v, mask, group_size=group_size, scale=scale)
    return torch.cat((y, y_shifted), dim=1)


class ShiftedSparseAttention(GroupedQueryAttention):
    """Grouped-query attention that is shifted and sparse while it trains, and full otherwise.

    Parameters, and the output in evaluation mode, are those of `GroupedQueryAttention`.

    Args:
        num_heads: query heads; the second half of them is shifted.
        group_size: tokens of a group; a quarter of the text in the released code.
        **sizes: as in `GroupedQueryAttention`.

    Raises:
        ValueError: heads or groups that can't be halved.
    """

    def __init__(self, *, num_heads: int, group_size: int, **sizes: Any):
        super().__init__(num_heads=num_heads, **sizes)
        refuse_odd(num_heads, group_size)
        self.group_size = group_size

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
        """As in `GroupedQueryAttention`.

        Raises:
            ValueError: a cache while training, tokens that aren't whole groups while
                training, a mask that isn't over all tokens, a cache of other sizes.
        """
        if self.training and cache is not None:
            # New tokens one by one are no groups, and a text is written with full attention.
            raise ValueError(f"a cache, of {cache.length} tokens, while training: call eval()")
        return super().forward(x, rotation, attention_mask, cache)

    def attend(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        mask: Bool[Tensor, "#b 1 t s"] | None,
    ) -> Float[Tensor, "b h t k"]:
        if not self.training:
            return super().attend(q, k, v, mask)
        return shifted_sparse_attention(q, k, v, mask, group_size=self.group_size, scale=self.scale)


def train_norms_and_embeddings(model: nn.Module) -> list[str]:
    """Make the parameters of norms and embeddings trainable, and list them.

    With adapters, the authors call this LoRA+. Norms are the modules whose class
    has "norm" in its name, whatever the model calls them; an output layer is trained when
    it shares the embedding's matrix. All other parameters stay as they are.

    Raises:
        ValueError: the model has neither.
    """
    chosen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    named = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    if not named:
        raise ValueError(f"no norm or embedding with parameters in {type(model).__name__}")
    for parameter in named.values():
        parameter.requires_grad_(True)
    return list(named)
