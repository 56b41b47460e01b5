"""How much memory a computation holds at most, counted exactly: the same on every machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that are made while it is on, and that are still alive.

    What was there before doesn't count, nor what torch's kernels take and give back inside.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in tree_leaves((args, kwargs or {})):
            if isinstance(given, torch.Tensor):
                self.note(given, new=False)
        output = func(*args, **(kwargs or {}))
        for made in tree_leaves(output):
            if isinstance(made, torch.Tensor):
                self.note(made, new=True)
        return output

    def note(self, tensor: torch.Tensor, *, new: bool) -> None:
        """A view shares its storage with what it was made of, which is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """The most bytes that tensors made by `function(*inputs)` take at one time."""
    with LiveBytes() as counter:
        function(*inputs)
    return counter.peak
