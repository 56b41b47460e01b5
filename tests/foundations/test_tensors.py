"""Strides, views, broadcasting and einsum against numpy and torch, over all small cases.

Also empty axes, strides of 0, negative strides (numpy), gaps, and letters that repeat.
"""

import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from snippets.foundations import tensors
from snippets.foundations.tensors import (
    broadcast_shapes,
    contiguous_strides,
    einsum,
    expand_strides,
    offsets,
    read,
    view_strides,
)

SHAPES = [s for n in range(4) for s in itertools.product((0, 1, 2, 3), repeat=n)]
OF_SIZE: dict[int, set] = {}
for shape in itertools.chain(*(itertools.product(range(n > 2, 7), repeat=n) for n in range(5))):
    OF_SIZE.setdefault(math.prod(shape), set()).add(shape)
for size in range(60):
    OF_SIZE.setdefault(size, set()).add((size,))
EQUATIONS = {
    "ij,jk->ik": ((2, 3), (3, 4)),
    "ij,jk": ((2, 3), (3, 4)),
    "ba,b": ((2, 3), (2,)),  # implicit: alphabetic, so the result has axis a
    "cb,ca->ab": ((4, 2), (4, 3)),
    "bhtk,bhsk->bhts": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "bthk,bshk->bhts": ((2, 4, 3, 5), (2, 6, 3, 5)),
    "ii->i": ((3, 3),),
    "ii": ((3, 3),),
    "iji->j": ((3, 2, 3),),
    "iii->i": ((3, 3, 3),),
    "ijij->ji": ((2, 3, 2, 3),),
    "iij,jjk->ki": ((2, 2, 3), (3, 3, 4)),
    "i,j->ji": ((2,), (3,)),
    "i,i->": ((4,), (4,)),
    ",i->i": ((), (4,)),
    "->": ((),),
    "ij->": ((2, 3),),
    "ij->ji": ((2, 3),),
    "a,ab,abc,cd->d": ((2,), (2, 3), (2, 3, 4), (4, 5)),
    "ij,jk->ik with nothing": ((2, 0), (0, 4)),
    "ij,ij->i with nothing": ((0, 3), (0, 3)),
    " i j , j k -> i k ": ((2, 3), (3, 4)),
    "aB,Bc->ac": ((2, 3), (3, 4)),
}


def layouts():
    """Tensors over one memory with every kind of stride, and the memory."""
    memory = torch.arange(60)
    base = memory[:24].view(2, 3, 4)
    for order in itertools.permutations(range(3)):
        yield base.permute(order)
    yield from (base[:, ::2], base[..., 1:3], base[:, 1:, :], base[1:, :, ::3], base[0], base[0, 1])
    yield from (memory[5:], memory[::7], memory[0], base[:, :1], base[:, :, :1].transpose(0, 2))
    yield from (base[:, None].expand(2, 5, 3, 4), memory[:3].expand(4, 3), memory[7].expand(2, 3))
    yield from (memory[:1].expand(6), base.unfold(2, 2, 1), base.diagonal(dim1=0, dim2=1))
    yield from (base[:, :0], base[2:], memory[:0], memory.as_strided((2, 1, 3), (3, 17, 1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_strides_equal_torch_and_numpy(shape):
    assert contiguous_strides(shape) == torch.zeros(shape).stride()
    if 0 not in shape:
        memory = torch.arange(math.prod(shape))
        strides = contiguous_strides(shape)
        theirs = np.arange(math.prod(shape)).reshape(shape)
        assert np.array_equal(read(memory, shape, strides).numpy(), theirs)


@pytest.mark.parametrize("tensor", list(layouts()))
def test_offsets_and_reading_equal_as_strided(tensor):
    where = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    assert torch.equal(offsets(*where), tensor)  # the memory holds its own addresses
    assert torch.equal(read(3 * torch.arange(60), *where), 3 * tensor)


def test_the_start_is_0_unless_given():
    assert offsets((2, 2), (5, 1)).tolist() == [[0, 1], [5, 6]]
    assert read(torch.arange(10), (2, 2), (5, 1)).tolist() == [[0, 1], [5, 6]]
    assert read(torch.arange(10), (), (), 9) == 9


def test_negative_strides_read_backwards_as_in_numpy():
    memory = np.arange(12)
    theirs = memory.reshape(3, 4)[::-1, ::-2]
    strides = tuple(s // memory.itemsize for s in theirs.strides)
    assert strides == (-4, -2)
    assert np.array_equal(read(torch.arange(12), theirs.shape, strides, 11).numpy(), theirs)


@pytest.mark.parametrize("tensor", list(layouts()))
def test_a_view_exists_exactly_where_torch_and_numpy_make_one(tensor):
    shape, strides, start = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    array = tensor.numpy()
    for new_shape in sorted(OF_SIZE[tensor.numel()]):
        ours = view_strides(shape, strides, new_shape)
        try:
            theirs = tensor.view(new_shape)
        except RuntimeError:
            assert ours is None
            with pytest.raises(ValueError):
                np.reshape(array, new_shape, copy=False)
            continue
        assert ours is not None
        assert np.shares_memory(np.reshape(array, new_shape, copy=False), array) or 0 in new_shape
        assert torch.equal(read(torch.arange(60), new_shape, ours, start), theirs)
        used = [i for i, size in enumerate(new_shape) if size > 1 and 0 not in new_shape]
        assert [ours[i] for i in used] == [theirs.stride(i) for i in used]


@pytest.mark.parametrize("flips", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_views_of_reversed_arrays_are_numpys(flips):
    array = np.arange(12).reshape(3, 4)[:: flips[0], :: flips[1]]
    strides = tuple(s // array.itemsize for s in array.strides)
    for new_shape in ((12,), (2, 6), (3, 2, 2), (3, 4, 1), (6, 2)):
        try:
            theirs = np.reshape(array, new_shape, copy=False)
        except ValueError:
            assert view_strides(array.shape, strides, new_shape) is None
        else:
            ours = view_strides(array.shape, strides, new_shape)
            used = zip(ours, theirs.strides, new_shape, strict=True)
            assert all(s == bytes_ // array.itemsize for s, bytes_, n in used if n > 1)


def test_axes_of_size_1_get_the_strides_that_torch_gives_them():
    for shape, new in [((), (1, 1)), ((6,), (1, 6, 1)), ((2, 3), (2, 1, 3)), ((4,), (2, 1, 2, 1))]:
        tensor = torch.zeros(shape)
        assert view_strides(shape, tensor.stride(), new) == tensor.view(new).stride()


def test_broadcasting_equals_torch_and_numpy_on_all_small_shapes():
    for a, b in itertools.product(SHAPES, SHAPES):
        try:
            theirs = np.broadcast_shapes(a, b)
        except ValueError:
            with pytest.raises(ValueError, match="at axis -"):
                broadcast_shapes(a, b)
            with pytest.raises(RuntimeError):
                torch.broadcast_shapes(a, b)
        else:
            assert broadcast_shapes(a, b) == theirs == tuple(torch.broadcast_shapes(a, b))
    assert broadcast_shapes((2, 1), (3,), (4, 1, 1)) == (4, 2, 3)
    assert broadcast_shapes() == () and broadcast_shapes((5, 0)) == (5, 0)


def test_expanding_equals_torch_on_all_small_shapes():
    for a, b in itertools.product(SHAPES, SHAPES):
        tensor = torch.arange(math.prod(a)).view(a)
        try:
            theirs = tensor.expand(b)
        except RuntimeError:
            with pytest.raises(ValueError, match=r"doesn't expand|at axis -"):
                expand_strides(a, tensor.stride(), b)
            continue
        ours = expand_strides(a, tensor.stride(), b)
        if 0 not in b:
            assert torch.equal(read(torch.arange(max(1, math.prod(a))), b, ours), theirs)
        used = [i for i, size in enumerate(b) if size > 1]
        assert [ours[i] for i in used] == [theirs.stride(i) for i in used]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("name", EQUATIONS)
def test_einsum_equals_torch_and_numpy(name, dtype):
    equation = name.removesuffix(" with nothing")
    inputs = [(10 * torch.randn(s, dtype=torch.float64)).to(dtype) for s in EQUATIONS[name]]
    ours = einsum(equation, *inputs)
    assert ours.dtype == dtype
    assert_close(
        ours, torch.from_numpy(np.asarray(np.einsum(equation, *[x.numpy() for x in inputs])))
    )
    if dtype == torch.float64:
        assert_close(ours, torch.einsum(equation, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_einsum_keeps_the_type_and_sums_precisely(dtype):
    a, b = (4 * torch.randn(3, 200)).to(dtype), (4 * torch.randn(200, 2)).to(dtype)
    exact = a.double() @ b.double()
    assert_close(einsum("ij,jk->ik", a, b), exact.to(dtype))
    ones = torch.ones(1000, dtype=torch.bfloat16)
    assert einsum("i->", ones) == 1000


def test_einsum_of_whole_numbers_is_exact():
    short = torch.tensor([2**25 + 1, 3], dtype=torch.int32)
    assert einsum("i->i", short).tolist() == [2**25 + 1, 3]
    large = torch.tensor([2**40 + 1, 3])
    assert einsum("i,i->i", large, torch.tensor([1, 5])).tolist() == [2**40 + 1, 15]


def test_einsum_is_a_sum_in_loops():
    a, b = torch.randn(2, 3, 2), torch.randn(3, 4)
    expected = torch.zeros(4, 2)
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        expected[k, i] += a[i, j, i] * b[j, k]
    assert_close(einsum("iji,jk->ki", a, b), expected)


def test_einsum_of_expanded_and_reversed_memory():
    a = torch.randn(3).expand(4, 3)
    b = torch.randn(5, 8).T[::2, 1:4]
    assert_close(einsum("ij,ik->jk", a, b), a.T @ b)


def test_gradients_pass():
    a, b = torch.randn(2, 3, 3).double(), torch.randn(3, 4).double()
    run = lambda a, b: einsum("bii,ik->bk", a, b)  # noqa: E731
    assert torch.autograd.gradcheck(run, (a.requires_grad_(), b.requires_grad_()))


def test_compiles_as_one_graph(monkeypatch):
    spec = importlib.util.spec_from_file_location("copy_of_tensors", tensors.__file__)
    alone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, alone)  # where torch.compile looks for globals
    spec.loader.exec_module(alone)

    def several(memory, a):
        strides = alone.view_strides((2, 3, 4), alone.contiguous_strides((2, 3, 4)), (6, 4))
        shape = alone.broadcast_shapes((6, 1), (4,))
        stretched = alone.expand_strides((4,), (1,), shape)
        seen = alone.read(memory, shape, strides), alone.read(memory, shape, stretched)
        return *seen, alone.einsum("ij,kj->ik", seen[0], a)

    inputs = torch.randn(24), torch.randn(5, 4)
    compiled = torch.compile(several, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs), several(*inputs))


def test_refuses_what_does_not_fit(unchecked):
    memory, a = torch.arange(12), torch.zeros(2, 3)
    refused = [
        (r"^1 strides \(1,\) for shape \(2, 3\)", lambda: offsets((2, 3), (1,))),
        (r"^elements 0 … 12 of a memory of 12", lambda: read(memory, (13,), (1,))),
        (r"^elements 2 … 12 of a memory of 12", lambda: read(memory, (2, 3), (6, 2), 2)),
        (r"^elements -1 … 3 of a memory of 12", lambda: read(memory, (3,), (-2,), 3)),
        (
            r"^\(2, 3\) has 6 elements, \(7,\) would have another",
            lambda: view_strides((2, 3), (3, 1), (7,)),
        ),
        (
            r"^sizes \[2, 3\] at axis -2 of \(\(2, 1\), \(3, 4\)\)",
            lambda: broadcast_shapes((2, 1), (3, 4)),
        ),
        (r"^shape \(3, 2\) doesn't expand to \(2,\)", lambda: expand_strides((3, 2), (2, 1), (2,))),
        (r"^shape \(3,\) doesn't expand to \(1,\)", lambda: expand_strides((3,), (1,), (1,))),
        (r"^letters only, no ellipsis: '\.\.\.i->i'", lambda: einsum("...i->i", a)),
        (r"^1 operands for 'ij,jk->ik'", lambda: einsum("ij,jk->ik", a)),
        (r"^a result of 'k' from 'ij'", lambda: einsum("ij->k", a)),
        (r"^a result of 'X' from 'i,i'", lambda: einsum("i,i->X", a[0], a[0])),
        (r"^a result of 'ii' from 'ij'", lambda: einsum("ij->ii", a)),
        (r"^'ijk' for an operand of shape \(2, 3\)", lambda: einsum("ijk->i", a)),
        (r"^sizes 2 and 3 for 'i' in 'ii->i'", lambda: einsum("ii->i", a)),
        (r"^sizes 3 and 2 for 'j' in 'ij,jk->ik'", lambda: einsum("ij,jk->ik", a, a)),
    ]
    for said, call in refused:
        with pytest.raises(ValueError, match=said):
            call()
    assert read(memory, (2, 6), (6, 1)).max() == 11 and read(memory, (4, 0), (99, 1)).numel() == 0
