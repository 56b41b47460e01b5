"""The key-value cache: what attention keeps of the tokens it has seen.

A token's keys and values depend on that token and its past only (Shazeer 2019,
arXiv:1911.02150, counts what reading them costs). So a model that writes text computes
them once and keeps them.

Axes: b batch, g key-value head, s tokens kept, t new tokens, k features.
"""

from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """What one layer keeps: one or several tensors that grow along their token axis.

    Grouped-query attention keeps keys and values, b g s k; others keep something else.
    Room is taken in advance and doubled when it is used up: appending one token copies
    that token, not all the earlier ones.
    """

    def __init__(self):
        self.length = 0  # tokens seen
        self.store: list[Tensor] = []

    def append(self, *new: Float[Tensor, "b *g t _"]) -> tuple[Float[Tensor, "b *g s _"], ...]:
        """Keep the new tokens' tensors; return each with the kept ones before it.

        Raises:
            ValueError: the new tensors don't continue those that are kept.
        """
        end = self.length + new[0].shape[-2]
        if not self.store:
            self.store = [tensor[..., :0, :] for tensor in new]
        for kept, tensor in zip(self.store, new, strict=True):
            if kept[..., :0, :].shape != tensor[..., :0, :].shape or kept.dtype != tensor.dtype:
                raise ValueError(
                    f"a cache of {tuple(kept.shape)}, {kept.dtype}, can't be continued with "
                    f"{tuple(tensor.shape)}, {tensor.dtype}; another prompt needs a new cache"
                )
        if end > self.store[0].shape[-2]:
            self.store = [self.with_room(kept, 2 * end) for kept in self.store]
        for kept, tensor in zip(self.store, new, strict=True):
            kept[..., self.length : end, :] = tensor
        self.length = end
        return tuple(kept[..., :end, :] for kept in self.store)

    def with_room(self, kept: Tensor, tokens: int) -> Tensor:
        """The same tensor with room for more tokens."""
        room = kept.new_empty(*kept.shape[:-2], tokens, kept.shape[-1])
        room[..., : self.length, :] = kept[..., : self.length, :]
        return room


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
        """Tokens seen so far, padding included."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes that the kept tokens take, without the room ahead of them."""
        return sum(
            kept[..., : layer.length, :].numel() * kept.element_size()
            for layer in self.layers
            for kept in layer.store
        )
