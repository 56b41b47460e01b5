"""The key-value cache: what attention keeps of the tokens it has seen.

In causal attention a token's keys and values depend on that token and its past only,
so a model that writes text computes them once and keeps them. What reading them again
costs is counted by Shazeer 2019, arXiv:1911.02150.

Axes: b batch, g key-value head, t new token, s token kept or new (s >= t), k features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from snippets.attention.scaled_dot_product import causal_mask


class LayerCache:
    """What one layer keeps: one or several tensors that grow along their token axis.

    Grouped-query attention keeps keys and values, b g s k. Other layers keep other
    tensors, which need no axis of heads and may differ in width. A layer that keeps
    them in another way overrides `append` and `nbytes`; `length` still counts the
    tokens it has seen.

    Room is taken ahead and doubled when it is used up: on average a token is written
    three times at most, however long the text. To forget the last tokens, lower
    `length`; the next ones are written over them.

    Writing in place is for inference. If autograd needs what was overwritten, or what
    shares its memory, `backward` raises.
    """

    def __init__(self):
        self.length = 0  # tokens seen
        self.store: list[Tensor] = []  # b g _ k; behind those seen there is room

    def append(self, *new: Float[Tensor, "b ... t _"]) -> tuple[Float[Tensor, "b ... s _"], ...]:
        """Keep the new tokens' tensors; return each with the kept ones before it.

        What is returned are views of the store; later tokens are written behind them.

        Raises:
            ValueError: the new tensors don't continue those that are kept. The cache
                is as it was.
        """
        store = self.store or [tensor[..., :0, :] for tensor in new]
        refuse_break([kept[..., : self.length, :] for kept in store], new)
        end = self.length + new[0].shape[-2]
        if end > store[0].shape[-2]:
            store = [with_room(kept, self.length, 2 * end) for kept in store]
        for kept, tensor in zip(store, new, strict=True):
            kept[..., self.length : end, :] = tensor
        self.store, self.length = store, end
        return tuple(kept[..., :end, :] for kept in store)

    @property
    def nbytes(self) -> int:
        """Bytes that the kept tokens take, without the room behind them."""
        return sum(kept[..., : self.length, :].nbytes for kept in self.store)


class KVCache:
    """The caches of a model's layers, in their order.

    A cache belongs to one batch of prompts: for the next one, take a new cache.
    """

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included.

        While a model runs, its first layer has already counted the new ones.
        """
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that the kept tokens take, over all layers."""
        return sum(layer.nbytes for layer in self.layers)


def with_room(
    kept: Float[Tensor, "b ... _ k"], length: int, tokens: int
) -> Float[Tensor, "b ... {tokens} k"]:
    """A store for so many tokens, which begins with the first `length` of `kept`."""
    room = kept.new_empty(*kept.shape[:-2], tokens, kept.shape[-1])
    room[..., :length, :] = kept[..., :length, :]
    return room


def refuse_break(kept: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Refuse new tensors that don't continue what is kept, with the sizes of both."""
    same = [kind(tensor) for tensor in new] == [kind(tensor) for tensor in kept]
    if not same or len({tensor.shape[-2] for tensor in new}) != 1:
        raise ValueError(
            f"a cache of {described(kept)} can't be continued with {described(new)}; "
            "another prompt needs a new cache"
        )


def kind(tensor: Tensor) -> tuple:
    """What must stay the same from call to call: all but the number of tokens."""
    return (*tensor.shape[:-2], tensor.shape[-1], tensor.dtype, tensor.device)


def described(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors) or "nothing"


def allowed_keys(
    attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | Bool[Tensor, "#b #h t s"] | None,
    b: int,
    t: int,
    past: int,
) -> Bool[Tensor, "#b #h t s"] | None:
    """Who may attend to whom: True = attend; None is causal without padding.

    Every attention module takes `attention_mask` in these forms, over s = past + t tokens.

    Args:
        attention_mask: 1 for tokens and 0 for padding (b s), which is made causal; or
            booleans for every pair (b 1 t s, also with 1 for b or h for 1), returned as they are.
        b: sequences.
        t: new tokens.
        past: tokens seen before them.

    Raises:
        ValueError: the attention mask isn't over all tokens, past and new.
        TypeError: four axes of another type than bool: floats are added elsewhere.
    """
    if attention_mask is None:
        return None
    shape, s = tuple(attention_mask.shape), past + t
    if attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            raise TypeError(f"mask of {attention_mask.dtype}: needs booleans, True = attend")
        if shape[0] not in (1, b) or shape[2:] != (t, s):
            raise ValueError(f"attention_mask of shape {shape}, for {b=} {t=} {s=}")
        return attention_mask
    if shape != (b, s):
        tokens = f"{b} sequences of {past} cached and {t} new tokens"
        raise ValueError(f"attention_mask of shape {shape}, for {tokens}")
    # Padding that stands first has no key to attend to: a row without True.
    return causal_mask(t, s, device=attention_mask.device) & attention_mask[:, None, None].bool()


def places(
    tokens: Shaped[Tensor, "b t *_"], attention_mask: Int[Tensor, "b s"] | None, past: int
) -> tuple[Int[Tensor, "*b t"], Bool[Tensor, "b 1 t s"] | None]:
    """Positions of t new tokens after `past` kept ones, and who may attend to whom.

    Args:
        tokens: the new ones, as ids or embedded.
        attention_mask: 1 for tokens and 0 for padding, over kept and new tokens; None
            means no padding, and gives None for the second, which is causal.
        past: the length of the cache before it gets the new tokens.

    Raises:
        ValueError: the attention mask isn't as long as kept and new tokens.
    """
    b, t = tokens.shape[:2]
    if attention_mask is None:
        return torch.arange(past, past + t, device=tokens.device), None
    allowed = allowed_keys(attention_mask, b, t, past)  # b 1 t s
    # Positions count tokens, not padding: padded on the left, a text still starts at 0.
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # b t
    return positions, allowed
