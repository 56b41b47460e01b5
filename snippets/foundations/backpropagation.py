"""Reverse-mode differentiation, small: what torch.autograd does, for a dozen operations.

The idea is Linnainmaa's (1970); Rumelhart, Hinton and Williams 1986 made it known as
backpropagation. Checkpointing for deep networks: Chen et al. 2016 (arXiv:1604.06174).

Axes: every operation works on any shape; t token, v vocabulary where it says so.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snippets.foundations.softmax_and_cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    softmax,
)


class Node:
    """One step of a computation: where it came from, and how to go back.

    `vjp(g, *saved)` takes the gradient of the result and returns those of the parents: a
    vector times the Jacobian, which is never built. Of a constant parent stands None.
    """

    def __init__(
        self,
        parents: tuple["Node | None", ...] = (),
        saved: tuple[Tensor, ...] = (),
        vjp: Callable[..., tuple[Tensor, ...]] | None = None,
    ):
        self.parents = parents
        self.saved = saved
        self.vjp = vjp
        self.grad = None  # of leaves only


class Value:
    """A tensor and the node that made it. What is kept for later hangs on the node.

    So a result that no step needs to go back, such as the sum of a bias, is freed.
    """

    def __init__(self, data: Tensor, node: Node | None = None):
        self.data = data
        self.node = node

    @property
    def grad(self) -> Tensor | None:
        """What `backward` has added up here; None before it, and where nothing was asked for."""
        return None if self.node is None else self.node.grad

    def __add__(self, other: "Value | int | float") -> "Value":
        return add(self, other)

    def __mul__(self, other: "Value | int | float") -> "Value":
        return multiply(self, other)

    def __matmul__(self, other: "Value") -> "Value":
        return matmul(self, other)

    def __pow__(self, exponent: int | float) -> "Value":
        return power(self, exponent)

    def __neg__(self) -> "Value":
        return multiply(self, -1.0)

    def __sub__(self, other: "Value | int | float") -> "Value":
        return add(self, -as_value(other, self))

    def __truediv__(self, other: "Value | int | float") -> "Value":
        return multiply(self, power(as_value(other, self), -1.0))

    __radd__, __rmul__ = __add__, __mul__

    def backward(self, upstream: Tensor | None = None) -> None:
        """Add to the `grad` of every leaf the gradient of sum(upstream · self).

        Raises:
            ValueError: no upstream, and more than one number to differentiate; an upstream of
                another shape; a constant.
        """
        if self.node is None:
            raise ValueError("a constant depends on no leaf")
        if upstream is None:
            upstream = torch.ones_like(self.data)
            if self.data.numel() != 1:
                raise ValueError(f"gradient of which of {self.data.numel()} numbers?")
        if upstream.shape != self.data.shape:
            shapes = f"{tuple(upstream.shape)} for {tuple(self.data.shape)}"
            raise ValueError(f"an upstream gradient of shape {shapes}")
        gradients = {self.node: upstream}
        # In this order a node comes after all that used it: then its sum is complete.
        for node in reversed(topological_order(self.node)):
            g = gradients.pop(node)
            if node.vjp is None:
                node.grad = g if node.grad is None else node.grad + g
                continue
            for parent, part in zip(node.parents, node.vjp(g, *node.saved), strict=True):
                if parent is not None:
                    known = gradients.get(parent)
                    gradients[parent] = part if known is None else known + part


def leaf(data: Tensor) -> Value:
    """A value whose gradient is wanted."""
    return Value(data.detach(), Node())


def as_value(x: Value | int | float, like: Value) -> Value:
    """Numbers as constants, of the other's dtype: 0.1 in float32 is another number."""
    if isinstance(x, Value):
        return x
    return Value(torch.as_tensor(x, dtype=like.data.dtype, device=like.data.device))


def topological_order(root: Node) -> list[Node]:
    """Every node below the root once, each after all of its parents; without recursion."""
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, parents_done = stack.pop()
        if parents_done:
            order.append(node)
        elif node not in seen:
            # Seen when it is opened, not when it is found: another way to it may be longer.
            seen.add(node)
            stack.append((node, True))
            stack += [(parent, False) for parent in node.parents if parent is not None]
    return order


def record(
    data: Tensor, parents: Sequence[Value], saved: tuple[Tensor, ...], vjp: Callable
) -> Value:
    """The result of a step, with a node unless all parents are constants."""
    nodes = tuple(parent.node for parent in parents)
    if all(node is None for node in nodes):
        return Value(data)
    return Value(data, Node(nodes, saved, vjp))


def unbroadcast(g: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum over the axes along which a tensor of this shape was repeated to g's."""
    g = g.sum(tuple(range(g.ndim - len(shape)))) if g.ndim > len(shape) else g
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(repeated, keepdim=True) if repeated else g


# Linear


def add(a: Value, b: Value | int | float) -> Value:
    b = as_value(b, a)
    shapes = a.data.shape, b.data.shape
    return record(a.data + b.data, (a, b), (), lambda g: tuple(unbroadcast(g, s) for s in shapes))


def multiply(a: Value, b: Value | int | float) -> Value:
    b = as_value(b, a)

    def vjp(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return unbroadcast(g * y, x.shape), unbroadcast(g * x, y.shape)

    return record(a.data * b.data, (a, b), (a.data, b.data), vjp)


def matmul(a: Value, b: Value) -> Value:
    """Of the last two axes; those before broadcast.

    Raises:
        ValueError: fewer than two axes, or inner sizes that differ.
    """
    x, y = a.data, b.data
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-2]:
        raise ValueError(f"no matrix product: {tuple(x.shape)} @ {tuple(y.shape)}")

    def vjp(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return unbroadcast(g @ y.mT, x.shape), unbroadcast(x.mT @ g, y.shape)

    return record(x @ y, (a, b), (x, y), vjp)


def total(a: Value, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Value:
    """Sum over some axes, or all."""
    shape = a.data.shape
    dims = range(len(shape)) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    axes = {i % len(shape) for i in dims}
    ones = [1 if i in axes else n for i, n in enumerate(shape)]

    def vjp(g: Tensor) -> tuple[Tensor]:
        return (g.reshape(ones).expand(shape),)

    return record(a.data.sum(tuple(axes), keepdim), (a,), (), vjp)


def reshape(a: Value, *shape: int) -> Value:
    before = a.data.shape
    return record(a.data.reshape(shape), (a,), (), lambda g: (g.reshape(before),))


def transpose(a: Value, first: int = -2, second: int = -1) -> Value:
    return record(
        a.data.transpose(first, second), (a,), (), lambda g: (g.transpose(first, second),)
    )


def rows(table: Value, ids: Int[Tensor, "*ids"]) -> Value:
    """table[ids]; a row that was read twice gets the sum of both gradients."""
    shape = table.data.shape

    def vjp(g: Tensor, ids: Tensor) -> tuple[Tensor]:
        return (g.new_zeros(shape).index_put((ids,), g, accumulate=True),)

    return record(table.data[ids], (table,), (ids,), vjp)


# Bent. Each keeps what its derivative is made of: often its own result.


def exp(a: Value) -> Value:
    y = a.data.exp()
    return record(y, (a,), (y,), lambda g, y: (g * y,))


def log(a: Value) -> Value:
    return record(a.data.log(), (a,), (a.data,), lambda g, x: (g / x,))


def power(a: Value, exponent: int | float) -> Value:
    def vjp(g: Tensor, x: Tensor) -> tuple[Tensor]:
        return (g * exponent * x ** (exponent - 1),)

    return record(a.data**exponent, (a,), (a.data,), vjp)


def relu(a: Value) -> Value:
    """At 0, where there is no derivative, it takes 0, as torch does."""
    y = a.data.clamp(min=0)
    return record(y, (a,), (y,), lambda g, y: (g * (y > 0),))


def tanh(a: Value) -> Value:
    y = a.data.tanh()
    return record(y, (a,), (y,), lambda g, y: (g * (1 - y * y),))


def softmax_rows(a: Value) -> Value:
    """Over the last axis. Its Jacobian is diag(p) - p pᵀ; the product with it is cheap."""
    p = softmax(a.data)

    def vjp(g: Tensor, p: Tensor) -> tuple[Tensor]:
        return (p * (g - (g * p).sum(-1, keepdim=True)),)

    return record(p, (a,), (p,), vjp)


def cross_entropy_loss(logits: Value, labels: Int[Tensor, "*rows"]) -> Value:
    """The mean of `cross_entropy`; back with p - y."""

    def vjp(g: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (g * cross_entropy_gradient(x, labels),)

    loss = cross_entropy(logits.data, labels)
    return record(loss, (logits,), (logits.data, labels), vjp)


# Memory


def checkpoint(function: Callable[..., Value], *inputs: Value) -> Value:
    """function(*inputs), of which only the inputs are kept; run again on the way back.

    Leaves that the function uses otherwise, such as its weights, get their gradients too.
    What it computes must be the same both times: no fresh random numbers.
    """

    def vjp(g: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        again = [leaf(x) for x in saved]
        function(*again).backward(g)
        return tuple(torch.zeros_like(x.data) if x.grad is None else x.grad for x in again)

    y = function(*(Value(x.data) for x in inputs))  # its own graph is dropped here
    nodes = tuple(x.node for x in inputs)
    if y.node is None and all(node is None for node in nodes):
        return y
    return Value(y.data, Node(nodes, tuple(x.data for x in inputs), vjp))


def kept_bytes(value: Value, apart_from: Sequence[Value] = ()) -> int:
    """Memory of all that the nodes below have saved; what shares storage counts once.

    Args:
        value: the end of a computation.
        apart_from: values that live anyway, such as weights.
    """
    storages = {}
    for node in topological_order(value.node):
        for tensor in node.saved:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    for other in apart_from:
        storages.pop(other.data.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def finite_differences(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*shape"], step: float = 1e-5
) -> Float[Tensor, "*shape"]:
    """(f(x + h) - f(x - h)) / 2h for each number in x; wants float64, and two runs each."""
    gradient = torch.zeros_like(x)
    for i in range(x.numel()):
        h = torch.zeros_like(x)
        h.view(-1)[i] = step
        gradient.view(-1)[i] = (function(x + h) - function(x - h)) / (2 * step)
    return gradient
