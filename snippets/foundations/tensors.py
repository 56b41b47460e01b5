"""Tensors: a row of numbers in memory, and rules for counting through it.

The rules are NumPy's (Harris et al. 2020, arXiv:2006.10256) and PyTorch's (Paszke et al. 2019,
arXiv:1912.01703), with strides in elements as in PyTorch; NumPy's count bytes.

Axes: m numbers in memory; the tensors may have any axes.
"""

import math

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Sizes = tuple[int, ...]


def contiguous_strides(shape: Sizes) -> Sizes:
    """How far apart in memory neighbours on each axis are, when the last axis runs fastest."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)  # an empty axis has strides too, though nobody follows them
    return tuple(reversed(strides))


def offsets(shape: Sizes, strides: Sizes, start: int = 0) -> Int[Tensor, "..."]:
    """Where in memory each element is: start + sum over axes of index · stride.

    Raises:
        ValueError: not one stride for each axis.
    """
    if len(shape) != len(strides):
        raise ValueError(f"{len(strides)} strides {strides} for shape {shape}")
    found = torch.full((), start)
    for size, stride in zip(shape, strides, strict=True):
        found = found[..., None] + torch.arange(size) * stride
    return found


def read(
    memory: Shaped[Tensor, " m"], shape: Sizes, strides: Sizes, start: int = 0
) -> Shaped[Tensor, "..."]:
    """The tensor that this shape, these strides and this start see in memory, as a copy.

    Raises:
        ValueError: an element would be outside of the memory.
    """
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    first, last = start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach)
    if 0 not in shape and not 0 <= first <= last < len(memory):
        raise ValueError(f"elements {first} … {last} of a memory of {len(memory)}")
    return memory[offsets(shape, strides, start)]


def view_strides(shape: Sizes, strides: Sizes, new_shape: Sizes) -> Sizes | None:
    """Strides with which the same memory has the new shape; None if only a copy can have it.

    Raises:
        ValueError: the shapes have different numbers of elements.
    """
    if math.prod(shape) != math.prod(new_shape):
        raise ValueError(f"{shape} has {math.prod(shape)} elements, {new_shape} would have another")
    if 0 in shape:
        return contiguous_strides(new_shape)
    # Axes of which each continues the next one are a single run of evenly spaced elements.
    runs: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue  # no step is ever made along it
        if runs and runs[-1][1] == size * stride:
            size *= runs.pop()[0]
        runs.append((size, stride))
    # A run can be cut into axes anywhere, but no axis can cross from one run to the next.
    found, left, step = [], 1, 1
    for size in reversed(new_shape):
        if left == 1 and size > 1:
            left, step = runs.pop()
        if left % size:
            return None
        found.append(step)
        left, step = left // size, step * size
    return tuple(reversed(found))


def broadcast_shapes(*shapes: Sizes) -> Sizes:
    """The shape of a sum of tensors: aligned at the right, an axis of size 1 fits any other.

    Raises:
        ValueError: two sizes at one place differ, and neither is 1.
    """
    found = []
    for back in range(1, max([0] + [len(shape) for shape in shapes]) + 1):
        sizes = {shape[-back] for shape in shapes if len(shape) >= back} - {1}
        if len(sizes) > 1:
            raise ValueError(f"sizes {sorted(sizes)} at axis -{back} of {shapes}")
        found.append(sizes.pop() if sizes else 1)
    return tuple(reversed(found))


def expand_strides(shape: Sizes, strides: Sizes, new_shape: Sizes) -> Sizes:
    """Strides with which the same memory fills a larger shape: 0 on each stretched axis.

    Raises:
        ValueError: an axis to stretch has another size than 1, or the new shape fewer axes.
    """
    new = len(new_shape) - len(shape)
    if new < 0 or broadcast_shapes(shape, new_shape) != new_shape:
        raise ValueError(f"shape {shape} doesn't expand to {new_shape}")
    kept = zip(shape, new_shape[new:], strides, strict=True)
    return (0,) * new + tuple(0 if old != size else stride for old, size, stride in kept)


def einsum(equation: str, *operands: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Multiply elements with equal letters, and sum over the letters that the result lacks.

    "ij,jk->ik" is the matrix product. A letter twice in one operand takes its diagonal. Without
    "->" the result has the letters that occur once, in alphabetic order. All products are held
    at once: a way to define einsum, and not to compute it.

    Raises:
        ValueError: the letters don't fit the operands, or one has several sizes.
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    letters = left.replace(",", "")
    if not (letters + result).isalpha() and letters + result:
        raise ValueError(f"letters only, no ellipsis: {equation!r}")
    if not arrow:
        result = "".join(x for x in sorted(set(letters)) if letters.count(x) == 1)
    if len(inputs) != len(operands):
        raise ValueError(f"{len(operands)} operands for {equation!r}")
    if any(letters.count(x) == 0 or result.count(x) > 1 for x in result):
        raise ValueError(f"a result of {result!r} from {left!r}")
    size: dict[str, int] = {}
    for names, operand in zip(inputs, operands, strict=True):
        if len(names) != operand.ndim:
            raise ValueError(f"{names!r} for an operand of shape {tuple(operand.shape)}")
        for name, n in zip(names, operand.shape, strict=True):
            if size.setdefault(name, n) != n:
                raise ValueError(f"sizes {size[name]} and {n} for {name!r} in {equation!r}")

    order = result + "".join(x for x in size if x not in result)  # the summed ones last
    dtype = operands[0].dtype
    product = torch.ones((), dtype=torch.float32 if dtype.itemsize < 4 else dtype)
    for names, operand in zip(inputs, operands, strict=True):
        for name in order:
            while names.count(name) > 1:
                i, j = names.index(name), names.rindex(name)
                operand = operand.diagonal(dim1=i, dim2=j)  # the diagonal becomes the last axis
                names = names[:i] + names[i + 1 : j] + names[j + 1 :] + name
        operand = operand.permute([names.index(x) for x in order if x in names])
        product = product * operand.reshape([size[x] if x in names else 1 for x in order])
    summed = list(range(len(result), len(order)))
    return (product.sum(summed) if summed else product).to(dtype)
