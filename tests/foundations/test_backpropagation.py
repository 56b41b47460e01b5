"""The engine against torch.autograd, finite differences and torch's own count of memory."""

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from snippets.foundations import backpropagation as bp
from snippets.foundations.backpropagation import Value, leaf

A, B, C = 3, 4, 5


def draw(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype)


def compare(ours, theirs, *inputs: torch.Tensor) -> None:
    """Values and gradients of the same function in the engine and in torch."""
    values = [leaf(x) for x in inputs]
    tensors = [x.clone().requires_grad_() for x in inputs]
    y, expected = ours(*values), theirs(*tensors)
    assert_close(y.data, expected.detach())
    upstream = torch.randn_like(y.data)
    y.backward(upstream)
    gradients = torch.autograd.grad(expected, tensors, upstream)
    for value, gradient in zip(values, gradients, strict=True):
        assert value.grad.shape == value.data.shape
        assert_close(value.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shapes",
    [
        ((A, B), (A, B)),
        ((A, B), (B,)),
        ((B,), (A, B)),
        ((A, B), (A, 1)),
        ((1, B), (A, 1)),
        ((2, 1, B), (A, 1)),
        ((A, B), ()),
        ((2, A, B), (1, 1, B)),
        ((1, B), (1, B)),
    ],
)
def test_broadcast_sums_and_products_equal_torch(shapes, dtype):
    x, y = draw(*shapes[0], dtype=dtype), draw(*shapes[1], dtype=dtype)
    positive = y.abs() + 0.5
    compare(lambda a, b: a + b, lambda a, b: a + b, x, y)
    compare(lambda a, b: a - b, lambda a, b: a - b, x, y)
    compare(lambda a, b: a * b, lambda a, b: a * b, x, y)
    compare(lambda a, b: a / b, lambda a, b: a / b, x, positive)


@pytest.mark.parametrize(
    "shapes",
    [
        ((A, B), (B, C)),
        ((2, A, B), (B, C)),
        ((A, B), (2, B, C)),
        ((2, 1, A, B), (3, B, C)),
        ((2, 3, A, B), (2, 3, B, C)),
    ],
)
def test_matrix_products_equal_torch(shapes):
    x, y = draw(*shapes[0]), draw(*shapes[1])
    compare(lambda a, b: a @ b, lambda a, b: a @ b, x, y)


def test_numbers_and_tensors_are_constants():
    x, c = draw(A, B), draw(B)
    compare(lambda a: 2.0 * a + 1.5, lambda a: 2 * a + 1.5, x)
    compare(lambda a: 1.5 + a * 2.0 - 3.0, lambda a: 2 * a - 1.5, x)
    compare(lambda a: -a / 4.0, lambda a: -a / 4, x)
    constant = Value(c)
    compare(lambda a: a * constant, lambda a: a * c, x)
    compare(lambda a: constant - a, lambda a: c - a, x)
    assert torch.equal(
        (leaf(x) / 3 + 0.1 - 0.7).data, x * (1 / torch.tensor(3.0).double()) + 0.1 - 0.7
    )
    assert constant.grad is None and (constant * 2.0 + 1.0).node is None


@pytest.mark.parametrize("dim", [None, 0, 1, -1, (0, 2), (-1, 0), (0, 1, 2)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_equal_torch(dim, keepdim):
    compare(lambda a: bp.total(a, dim, keepdim), lambda a: a.sum(dim, keepdim), draw(A, B, C))
    if dim is None:
        compare(lambda a: bp.total(a), lambda a: a.sum(), draw(A, B, C))
    if not keepdim:
        compare(lambda a: bp.total(a, dim), lambda a: a.sum(dim), draw(A, B, C))


def test_shapes_equal_torch():
    x = draw(2, A, B)
    compare(lambda a: bp.reshape(a, A, 2 * B), lambda a: a.reshape(A, 2 * B), x)
    compare(lambda a: bp.transpose(a), lambda a: a.mT, x)
    compare(lambda a: bp.transpose(a, 0, 1), lambda a: a.transpose(0, 1), x)
    ids = torch.tensor([[0, 2, 2], [1, 0, 2]])
    compare(lambda a: bp.rows(a, ids), lambda a: a[ids], draw(A, C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bent_functions_equal_torch(dtype):
    x, positive = draw(A, B, dtype=dtype), draw(A, B, dtype=dtype).abs() + 0.2
    compare(bp.exp, torch.exp, x)
    compare(bp.log, torch.log, positive)
    compare(bp.tanh, torch.tanh, x)
    compare(bp.relu, torch.relu, torch.cat([x, torch.zeros_like(x)]))
    compare(bp.softmax_rows, lambda a: a.softmax(-1), x)
    for exponent in (2, 0.5, -1, -1.5, 3.0):
        compare(lambda a, e=exponent: a**e, lambda a, e=exponent: a**e, positive)


def test_cross_entropy_equals_torch():
    labels = torch.tensor([[0, 3, -100, 1], [-100, 2, 2, 4]])
    compare(
        lambda a: bp.cross_entropy_loss(a, labels) * 3.0,
        lambda a: 3 * F.cross_entropy(a.flatten(0, 1), labels.flatten()),
        draw(2, B, C),
    )


def attention(q, k, v, softmax, transpose):
    return softmax(q @ transpose(k)) @ v


def test_attention_equals_torch():
    q, k, v = draw(2, A, B), draw(2, C, B), draw(2, C, A)
    compare(
        lambda *x: attention(*x, bp.softmax_rows, bp.transpose),
        lambda *x: attention(*x, lambda s: s.softmax(-1), lambda m: m.mT),
        q, k, v,
    )  # fmt: skip


def random_expression(seed: int, values: list, ours: bool):
    """The same random graph in the engine or in torch; results are used again and again."""
    dice = torch.Generator().manual_seed(seed)
    pool = list(values)
    tanh = bp.tanh if ours else torch.tanh
    for _ in range(12):
        kind, i, j = torch.randint(0, 10**6, (3,), generator=dice).tolist()
        a, b = pool[i % len(pool)], pool[j % len(pool)]
        steps = (lambda a, b: a + b, lambda a, b: a * b, lambda a, b: a @ b, lambda a, b: tanh(a))
        pool.append(tanh(steps[kind % 4](a, b)))
    y = pool[0]
    for value in pool[1:]:
        y = y + value
    return y


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs_equal_torch(seed):
    inputs = [draw(A, A) for _ in range(3)]
    compare(
        lambda *x: random_expression(seed, x, True),
        lambda *x: random_expression(seed, x, False),
        *inputs,
    )


# The engine


def test_a_value_used_twice_gets_both_gradients():
    x = draw(A, A)
    compare(lambda a: a * a + a @ a, lambda a: a * a + a @ a, x)
    compare(lambda a: a * (a + a), lambda a: 2 * a * a, x)


def test_gradients_add_up_over_calls_as_in_torch():
    x, y = leaf(draw(A)), draw(A).requires_grad_()
    for factor in (2.0, 5.0):
        bp.total(x * factor).backward()
        (y * factor).sum().backward()
    assert_close(x.grad, y.grad)
    loss = bp.total(x * x)
    loss.backward()
    loss.backward()  # nothing is freed: this works, unlike in torch
    assert_close(x.grad, 7 + 4 * x.data)


def test_only_leaves_keep_gradients_and_constants_get_none():
    x, c = leaf(draw(A)), Value(draw(A))
    y = x * c
    bp.total(y).backward()
    assert y.grad is None and c.grad is None
    assert_close(x.grad, c.data)
    assert not leaf(draw(A).requires_grad_()).data.requires_grad


def test_order_puts_parents_first_whatever_way_leads_to_them():
    x = leaf(draw(A))
    middle = bp.exp(x)
    for y in (x + middle, middle + x, x * bp.exp(middle) + middle):
        order = bp.topological_order(y.node)
        assert len(order) == len(set(order)) and order[-1] is y.node
        place = {node: i for i, node in enumerate(order)}
        for node in order:
            assert all(place[p] < place[node] for p in node.parents if p is not None)
    compare(lambda a: a + bp.exp(a), lambda a: a + a.exp(), draw(A))
    compare(lambda a: bp.exp(a) + a, lambda a: a + a.exp(), draw(A))


def test_deep_and_bushy_graphs_take_linear_time():
    x = leaf(torch.tensor(1e-9, dtype=torch.float64))
    y = x
    for _ in range(3000):  # beyond the recursion limit
        y = y + 0.0
    y.backward()
    assert x.grad == 1
    y = x
    for _ in range(60):  # 2 ** 60 paths
        y = y + y
    y.backward()
    assert x.grad == 1 + 2.0**60


def test_refuses_what_has_no_gradient(unchecked):
    x = leaf(draw(A, B))
    with pytest.raises(ValueError, match=r"^gradient of which of 12 numbers"):
        x.backward()
    for shape in ((B,), (A, 1), (B, A)):
        said = re.escape(f"an upstream gradient of shape {shape} for (3, 4)")
        with pytest.raises(ValueError, match=f"^{said}"):
            x.backward(draw(*shape))
    with pytest.raises(ValueError, match=r"^a constant depends on no leaf"):
        Value(draw(1)).backward()
    leaf(draw(1, 1)).backward()  # one number, whatever its shape


@pytest.mark.parametrize("shapes", [((A, B), (A, B)), ((B,), (B, C)), ((A, B), (B,))])
def test_refuses_what_is_no_matrix_product(unchecked, shapes):
    said = re.escape(f"no matrix product: {shapes[0]} @ {shapes[1]}")
    with pytest.raises(ValueError, match=f"^{said}"):
        leaf(draw(*shapes[0])) @ leaf(draw(*shapes[1]))


def test_finite_differences_equal_autograd():
    x = draw(A, B).requires_grad_()

    def function(x):
        return (x.tanh() * x.exp()).sum()

    expected = torch.autograd.grad(function(x), x)[0]
    ours = bp.finite_differences(lambda x: function(x), x.detach())
    assert_close(ours, expected, atol=1e-9, rtol=1e-8)
    cube = bp.finite_differences(lambda x: (x**3).sum(), torch.ones(1, dtype=torch.float64), 0.5)
    assert_close(cube, torch.tensor([3.25], dtype=torch.float64))  # 3 + step²: central
    near = bp.finite_differences(lambda x: (x**3).sum(), torch.ones(1, dtype=torch.float64))
    assert abs(near.item() - 3) < 1e-9


# Memory


def network(width=16, depth=6):
    weights = [draw(width, width, dtype=torch.float32) / width**0.5 for _ in range(depth)]
    return draw(8, width, dtype=torch.float32), weights


def stack(x, weights, tanh):
    for w in weights:
        x = tanh(x @ w)
    return x


def torch_keeps(function, apart_from) -> int:
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    for tensor in apart_from:
        found.pop(tensor.untyped_storage().data_ptr(), None)
    assert y is not None
    return sum(found.values())


@pytest.mark.parametrize("ours, theirs", [(bp.tanh, torch.tanh), (bp.relu, torch.relu)])
def test_keeps_as_many_bytes_as_torch(ours, theirs):
    x, weights = network()
    leaves = [leaf(w) for w in weights]
    y = stack(Value(x), leaves, ours)
    assert bp.kept_bytes(y, leaves) == 7 * 8 * 16 * 4  # the input and six results
    assert bp.kept_bytes(y) == 7 * 8 * 16 * 4 + 6 * 16 * 16 * 4
    for w in weights:
        w.requires_grad_()
    assert bp.kept_bytes(y, leaves) == torch_keeps(lambda: stack(x, weights, theirs), weights)


def test_what_no_step_needs_is_freed():
    a, b = leaf(draw(A, B)), leaf(draw(B))
    between = a + b
    freed = weakref.ref(between.data)
    y = between + 1.0
    del between
    gc.collect()
    assert freed() is None and bp.kept_bytes(y) == 0
    y.backward(draw(A, B))


def segments(x, leaves, size):
    for i in range(0, len(leaves), size):
        part = leaves[i : i + size]
        x = bp.checkpoint(lambda x, part=part: stack(x, part, bp.tanh), x)
    return x


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_checkpoints_change_memory_and_not_gradients(size):
    x, weights = network()
    plain, saving = [leaf(w) for w in weights], [leaf(w) for w in weights]
    inputs = leaf(x), leaf(x)
    y, z = stack(inputs[0], plain, bp.tanh), segments(inputs[1], saving, size)
    assert torch.equal(y.data, z.data)
    assert bp.kept_bytes(z) == -(-6 // size) * 8 * 16 * 4
    bp.total(y * y).backward()
    bp.total(z * z).backward()
    for a, b in zip([*plain, inputs[0]], [*saving, inputs[1]], strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_checkpoint_of_constants_trains_its_weights_all_the_same():
    x, weights = network(depth=2)
    leaves = [leaf(w) for w in weights]
    bp.total(segments(Value(x), leaves, 2)).backward()
    again = [leaf(w) for w in weights]
    bp.total(stack(Value(x), again, bp.tanh)).backward()
    for a, b in zip(leaves, again, strict=True):
        assert torch.equal(a.grad, b.grad)
    constant = bp.checkpoint(bp.tanh, Value(x))
    assert constant.node is None and torch.equal(constant.data, x.tanh())


def test_a_checkpoint_with_an_unused_input_and_one_used_twice():
    compare(
        lambda a, b, c: bp.checkpoint(lambda a, b, c: a * b + a, a, b, c) * c,
        lambda a, b, c: (a * b + a) * c,
        draw(A), draw(A), draw(A),
    )  # fmt: skip
    x, unused = leaf(draw(A)), leaf(draw(B))
    bp.total(bp.checkpoint(lambda x, unused: x * x, x, unused)).backward()
    assert_close(x.grad, 2 * x.data)
    assert (unused.grad == 0).all()


def test_a_checkpoint_runs_its_function_twice():
    calls = []

    def counted(x):
        calls.append(1)
        return bp.tanh(x)

    y = bp.checkpoint(counted, leaf(draw(A)))
    assert len(calls) == 1
    bp.total(y).backward()
    assert len(calls) == 2


def test_works_in_bfloat16():
    x, weights = network()
    leaves = [leaf(w.bfloat16()) for w in weights]
    loss = bp.cross_entropy_loss(stack(Value(x.bfloat16()), leaves, bp.relu), torch.arange(8))
    loss.backward()
    tensors = [w.bfloat16().requires_grad_() for w in weights]
    F.cross_entropy(stack(x.bfloat16(), tensors, torch.relu).float(), torch.arange(8)).backward()
    for ours, theirs in zip(leaves, tensors, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=0.05)  # roundings in another order
