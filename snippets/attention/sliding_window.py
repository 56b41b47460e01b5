"""Sliding-window attention (Beltagy et al. 2020, arXiv:2004.05150).

As in Mistral 7B (Jiang et al. 2023, arXiv:2310.06825) and Gemma 3 (2025, arXiv:2503.19786).
Every token attends to the last W tokens, itself counted. What lies further back reaches it
through the layers below, W - 1 tokens a layer, and a cache needs to keep W - 1 tokens only.

Axes: b batch, h query head, g key-value head, t query token, s key token that is still kept
(or new), k head dim.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.attention.gqa import GroupedQueryAttention
from snippets.attention.kv_cache import LayerCache, refuse_break, with_room
from snippets.attention.scaled_dot_product import causal_mask


def window_mask(
    t: int, s: int, window: int, *, device: torch.device | str | None = None
) -> Bool[Tensor, "t s"]:
    """True where query i of t may attend to key j of s: s - t + i - window < j <= s - t + i.

    The queries are the last t of the s tokens. The window counts the token itself, as in
    transformers; counted without it, a window of the same name is one wider.

    Raises:
        ValueError: window below 1, or more queries than keys.
    """
    if window < 1:
        raise ValueError(f"a token doesn't even see itself: {window=}")
    return causal_mask(t, s, device=device).triu(s - t - window + 1)


def within_window(
    mask: Bool[Tensor, "#b #h t _"] | None, t: int, s: int, window: int, device: torch.device
) -> Bool[Tensor, "#b #h t s"] | Bool[Tensor, "t s"] | None:
    """The mask of all tokens seen, for the last s of them and within the window.

    The window ends the past. What lies ahead a mask of pairs forbids or allows by itself: the
    tokens of one image see each other (Gemma 3).
    """
    if mask is None:
        # Causal is enough where no key is too old; a rolling cache has none that is.
        return None if s <= window else window_mask(t, s, window, device=device)
    return mask[..., -s:].triu(s - t - window + 1)


class RollingCache(LayerCache):
    """Keeps the last window - 1 tokens: with the next one they are its window.

    A chunk attends first and is trimmed then: `append` returns what was kept and all new
    tokens, else the chunk's first queries would miss part of their windows.

    There is room for twice the window. Tokens are written one behind the other; when the room
    is used up, those that are still needed move to its front: on average a token is copied once
    more.

    Raises:
        ValueError: window below 1.
    """

    def __init__(self, window: int):
        super().__init__()
        if window < 1:
            raise ValueError(f"a cache that keeps nothing: {window=}")
        self.window = window
        self.end = 0  # of the written part of the store

    @property
    def kept(self) -> int:
        """Tokens that are kept."""
        return min(self.length, self.window - 1)

    def append(self, *new: Float[Tensor, "b ... t _"]) -> tuple[Float[Tensor, "b ... s _"], ...]:
        """Keep the last window - 1 tokens; return what was kept before with all the new ones.

        What is returned are views of the store, good until the next call.

        Raises:
            ValueError: the new tensors don't continue those that are kept. The cache
                is as it was.
        """
        store = self.store or [tensor[..., :0, :] for tensor in new]
        refuse_break(self.live(store), new)
        t, kept = new[0].shape[-2], self.kept
        if kept + t > 2 * self.window:  # more than there is ever room for: attend, then trim
            whole = tuple(
                torch.cat((held, tensor), dim=-2)
                for held, tensor in zip(self.live(store), new, strict=True)
            )
            self.length += t
            self.end = self.kept
            last = [tensor[..., tensor.shape[-2] - self.end :, :] for tensor in whole]
            self.store = [with_room(tensor, self.end, 2 * self.window) for tensor in last]
            return whole
        end = self.end
        if end + t > store[0].shape[-2]:
            room = min(2 * (kept + t), 2 * self.window)
            store, end = [with_room(held, kept, room) for held in self.live(store)], kept
        for held, tensor in zip(store, new, strict=True):
            held[..., end : end + t, :] = tensor
        self.store, self.end, self.length = store, end + t, self.length + t
        return tuple(held[..., end - kept : end + t, :] for held in store)

    def live(self, store: list[Tensor]) -> list[Tensor]:
        """Of the store, the tokens that are kept."""
        return [held[..., self.end - self.kept : self.end, :] for held in store]

    @property
    def nbytes(self) -> int:
        """Bytes that the kept tokens take, without the room around them."""
        return sum(held.nbytes for held in self.live(self.store))


class SlidingWindowAttention(GroupedQueryAttention):
    """Grouped-query attention to the last `window` tokens, the token itself counted.

    Parameters are named as in Mistral checkpoints. A mask is over all tokens seen, as for
    any other layer; the cache may be a `RollingCache` or one that keeps everything.

    Raises:
        ValueError: window below 1, or heads that don't divide evenly.
    """

    def __init__(self, *, window: int, **sizes):
        super().__init__(**sizes)
        if window < 1:
            raise ValueError(f"a token doesn't even see itself: {window=}")
        self.window = window

    def attend(
        self,
        q: Float[Tensor, "b h t k"],
        k: Float[Tensor, "b g s k"],
        v: Float[Tensor, "b g s k"],
        mask: Bool[Tensor, "#b 1 t _"] | None,
    ) -> Float[Tensor, "b h t k"]:
        mask = within_window(mask, q.shape[2], k.shape[2], self.window, q.device)
        return super().attend(q, k, v, mask)

    def new_cache(self) -> RollingCache:
        """An empty cache that keeps window - 1 tokens."""
        return RollingCache(self.window)


def attention_with_window(window: int | None, **sizes) -> GroupedQueryAttention:
    """Attention to the last `window` tokens, or to all of them: for models that have both."""
    if window is None:
        return GroupedQueryAttention(**sizes)
    return SlidingWindowAttention(window=window, **sizes)
