"""GPTQ against the optimal-brain formula with every inverse computed anew, and against all codes.

Sizes are such that swapped axes show: n d and the number of rows differ, d isn't a power of two.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from snippets.common.grid import fit_grid, from_codes
from snippets.quantization.gptq import (
    GPTQLinear,
    Quantized,
    gptq,
    hessian,
    inverse_factor,
    layer_error,
    rtn,
)

N, D, ROWS = 5, 24, 60


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(rows=ROWS, d=D, common=4, outliers=(), dtype=torch.float64, seed=0) -> torch.Tensor:
    """Tokens whose features have a few causes in common, and some of which are large."""
    mix = torch.randn(common, d, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = torch.randn(rows, common, dtype=dtype) @ mix + 0.5 * torch.randn(rows, d, dtype=dtype)
    x[:, list(outliers)] *= 12
    return x


def layer(n=N, d=D, dtype=torch.float64) -> torch.Tensor:
    """Of each six neighbours the largest is positive.

    Minus the largest would be half way between two values of a symmetric grid.
    """
    w = torch.randn(n, d, dtype=dtype) * torch.rand(n, 1, dtype=dtype)
    for part in w.split(6, 1):
        part *= torch.where(part.amax(1, keepdim=True) < -part.amin(1, keepdim=True), -1.0, 1.0)
    return w


def grid_values(weights: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """All values of the grid of some weights of a row."""
    low, high = min(0.0, float(weights.min())), max(0.0, float(weights.max()))
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    step = (high - low) / (2**bits - 1)
    zero = 2 ** (bits - 1) if symmetric else round(-low / step)
    return torch.tensor([step * (code - zero) for code in range(2**bits)], dtype=weights.dtype)


def optimal_brain(w, h, *, bits, group_size=D, symmetric=False, damping=0.01, order, static=False):
    """Equations 2 and 3 of the paper for each row by itself, in the given order of columns."""
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    q = torch.empty_like(w)
    for i in range(len(w)):
        row, left, values = w[i].clone(), list(order), {}
        if static:
            for g, part in enumerate(w[i].split(group_size)):
                values[g] = grid_values(part, bits, symmetric)
        for place, j in enumerate(order):
            g = j // group_size if static else place // group_size
            if g not in values:
                members = order[place : place + group_size]
                values[g] = grid_values(row[members], bits, symmetric)
            q[i, j] = min(values[g], key=lambda value: abs(value - row[j]))
            inverse = torch.linalg.inv(h[left][:, left])
            at = left.index(j)
            change = -(row[j] - q[i, j]) / inverse[at, at] * inverse[at]
            row[left] = row[left] + change
            left.remove(j)
    return q


OPTIONS = [
    {},
    {"group_size": 8},
    {"group_size": 6, "symmetric": True, "static_groups": True},
    {"symmetric": True, "act_order": True},
    {"group_size": 8, "act_order": True},
    {"group_size": 6, "static_groups": True},
    {"group_size": 8, "act_order": True, "static_groups": True},
    {"group_size": 4, "act_order": True, "damping": 0.2},
    {"damping": 0.0},
]


def order_of(h: torch.Tensor, options: dict) -> list[int]:
    if not options.get("act_order"):
        return list(range(len(h)))
    return sorted(range(len(h)), key=lambda j: -float(h[j, j]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_papers_formula_with_every_inverse(options, bits):
    w, h = layer(), hessian(inputs(outliers=(3, 17)))
    plain = {k: v for k, v in options.items() if k not in ("act_order", "static_groups")}
    static = options.get("static_groups", False)
    expected = optimal_brain(w, h, bits=bits, order=order_of(h, options), static=static, **plain)
    found = gptq(w, h, bits=bits, **options)
    assert_close(found.values(), expected, rtol=0, atol=1e-10)
    assert found.codes.max() == 2**bits - 1 and found.codes.dtype == torch.uint8
    assert (found.values() - rtn(w, bits=bits).values()).abs().max() > 1e-3
    g = D // options.get("group_size", D)
    assert found.step.shape == found.zero.shape == (N, g)
    assert found.groups.bincount().tolist() == [D // g] * g


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 5, 8, 23, 24, 1000])
def test_the_block_size_changes_nothing(options, block_size):
    w, h = layer(), hessian(inputs(outliers=(3, 17)))
    one, other = (gptq(w, h, bits=3, block_size=b, **options) for b in (128, block_size))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.groups, other.groups)
    assert_close(one.step, other.step, rtol=0, atol=1e-10)


def test_a_layer_wider_than_a_block():
    w, h = layer(3, 150), hessian(inputs(400, 150))
    expected = optimal_brain(w, h, bits=3, group_size=150, order=list(range(150)))
    assert_close(gptq(w, h, bits=3).values(), expected, rtol=0, atol=1e-10)


def test_no_codes_are_better_than_the_best_and_these_are_near():
    """Of all 4^4 codes of a row: never below the optimum, and nearer to it than rounding."""
    excess = []
    for _ in range(40):
        w, h = layer(1, 4), hessian(inputs(30, 4, common=2, seed=len(excess)))
        step, zero = fit_grid(w, bits=2)
        every = torch.cartesian_prod(*[torch.arange(4, dtype=torch.uint8)] * 4)
        away = w - from_codes(every, step.expand(256, 1), zero.expand(256, 1))
        errors = torch.einsum("ci,ij,cj->c", away, h, away).div(2).tolist()
        ours = layer_error(w, gptq(w, h, bits=2, damping=0.0).values(), h).item()
        nearest = layer_error(w, rtn(w, bits=2).values(), h).item()
        assert min(errors) <= ours * (1 + 1e-9) and min(errors) > 0
        excess.append([ours / min(errors), nearest / min(errors)])
    ours, nearest = torch.tensor(excess, dtype=torch.float64).T
    assert (ours < 1 + 1e-9).sum() > (nearest < 1 + 1e-9).sum()
    assert ours.log().mean() < 0.8 * nearest.log().mean()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_beats_rounding_on_new_inputs_with_outliers(group_size, act_order):
    for seed in range(5):
        w, outliers = layer(16, 48), torch.randperm(48)[:4].tolist()
        x, new = (inputs(400, 48, outliers=outliers, seed=seed) for _ in range(2))
        kinds = {"bits": 3, "group_size": group_size}
        ours = gptq(w, hessian(x), **kinds, act_order=act_order).values()
        nearest = rtn(w, **kinds).values()
        error = [(new @ (w - q).T).square().sum() for q in (ours, nearest)]
        assert error[0] < (0.7 if act_order else 0.95) * error[1]


def test_the_order_matters_when_outliers_come_last():
    w, x = layer(16, 48), inputs(400, 48, outliers=(44, 45, 46, 47))
    h = hessian(x)
    plain, first = (gptq(w, h, bits=3, act_order=o).values() for o in (False, True))
    assert layer_error(w, first, h) < 0.7 * layer_error(w, plain, h)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("more", [{}, {"act_order": True, "static_groups": True}], ids=str)
def test_ties_with_rounding_where_there_is_nothing_to_gain(symmetric, group_size, more):
    w, h = layer(), torch.diag(torch.rand(D, dtype=torch.float64) + 0.1)
    kinds = {"bits": 3, "group_size": group_size, "symmetric": symmetric}
    ours, nearest = gptq(w, h, **kinds, **more), rtn(w, **kinds)
    for found, expected in zip(ours, nearest, strict=True):
        assert torch.equal(found, expected)


def test_rounding_is_on_the_grid_of_each_group():
    w = layer()
    for options in ({}, {"group_size": 8}, {"group_size": 6, "symmetric": True}):
        found = rtn(w, bits=3, **options)
        size = options.get("group_size", D)
        assert found.groups.tolist() == [j // size for j in range(D)]
        for i in range(N):
            for j in range(D):
                part = w[i, j // size * size : (j // size + 1) * size]
                values = grid_values(part, 3, options.get("symmetric", False))
                best = min(values, key=lambda value: abs(value - w[i, j]))
                assert_close((found.values()[i, j] - w[i, j]).abs(), (best - w[i, j]).abs())


def test_static_groups_are_neighbours_and_others_follow_the_order():
    w, h = layer(), hessian(inputs(outliers=(3, 17)))
    order = torch.tensor(order_of(h, {"act_order": True}))
    found = gptq(w, h, bits=3, group_size=8, act_order=True)
    assert found.groups[order].tolist() == [i // 8 for i in range(D)]
    static = gptq(w, h, bits=3, group_size=8, act_order=True, static_groups=True)
    assert static.groups.tolist() == [j // 8 for j in range(D)]
    assert torch.equal(static.step, rtn(w, bits=3, group_size=8).step)


def test_columns_of_the_same_size_keep_their_order():
    w, h = layer(2, 48), torch.eye(48, dtype=torch.float64)
    found = gptq(w, h, bits=3, group_size=6, act_order=True)
    assert found.groups.tolist() == [j // 6 for j in range(48)]


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_dead_column_is_rounded_and_leaves_the_others_alone(damping):
    w, x = layer(), inputs()
    x[:, 7] = 0
    found = gptq(w, hessian(x), bits=3, damping=damping, static_groups=True)
    assert torch.equal(found.codes[:, 7], rtn(w, bits=3).codes[:, 7])
    assert (found.values()[:, 7] - w[:, 7]).abs().max() <= found.step.max() / 2
    # A column of twice zero has the other 23 of mean 24 / 23 as large: the damping in them.
    living = [j for j in range(D) if j != 7]
    plain = optimal_brain(
        w[:, living], hessian(x[:, living]), bits=3, damping=damping * 23 / 24,
        order=list(range(23)), group_size=23, static=True,
    )  # fmt: skip
    extremes = w.aminmax(dim=1)
    if all((w[:, 7] != e).all() for e in extremes):  # the grid didn't depend on it
        assert_close(found.values()[:, living], plain, rtol=0, atol=1e-10)
    else:
        raise AssertionError("column 7 holds an extreme: choose another seed")


def test_nothing_known_is_rounded_to_nearest():
    w = layer()
    found = gptq(w, torch.zeros(D, D, dtype=w.dtype), bits=3, group_size=8)
    assert torch.equal(found.codes, rtn(w, bits=3, group_size=8).codes)


def test_the_hessian_is_the_second_derivative_of_the_error():
    x, w, q = inputs(), layer(1)[0], layer(1)[0]
    theirs = torch.autograd.functional.hessian(lambda q: (x @ (w - q)).square().sum(), q)
    assert_close(hessian(x), theirs, rtol=0, atol=1e-10)
    parts = x.split((13, 7, 40))
    assert_close(sum(map(hessian, parts)), theirs, rtol=0, atol=1e-10)
    assert_close(hessian(x.view(3, 20, D)), theirs, rtol=0, atol=1e-10)


def test_half_precision_inputs_are_summed_in_float32():
    x = inputs(dtype=torch.float32).bfloat16().requires_grad_()
    assert torch.equal(hessian(x), hessian(x.float())) and hessian(x).dtype == torch.float32
    assert not hessian(x).requires_grad


def test_the_error_of_a_layer():
    w, q, x = layer(), layer(), inputs()
    expected = (x @ w.T - x @ q.T).square().sum()
    assert_close(layer_error(w, q, hessian(x)), expected, rtol=1e-12, atol=0)
    assert layer_error(w.bfloat16(), q.bfloat16(), hessian(x).float()).dtype == torch.float32


def test_the_factor_gives_the_inverse_of_what_remains():
    h = hessian(inputs())
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(D, dtype=h.dtype)
    factor = inverse_factor(h, damping=0.05)
    assert torch.equal(factor, factor.triu())
    for j in range(D):
        inverse = torch.linalg.inv(damped[j:, j:])
        assert_close(factor[j, j:] / factor[j, j], inverse[0] / inverse[0, 0], rtol=0, atol=1e-10)
        assert_close(factor[j, j] ** 2, inverse[0, 0], rtol=0, atol=1e-10)


def test_a_dead_input_has_one_on_the_diagonal():
    x = inputs()
    x[:, 4] = 0
    factor = inverse_factor(hessian(x), damping=0.01)
    assert factor[4, 4] == 1 and factor[4].count_nonzero() == factor[:, 4].count_nonzero() == 1


def test_the_scale_of_the_hessian_does_not_matter():
    w, h = layer(), hessian(inputs())
    assert torch.equal(gptq(w, h / 2**40, bits=3).codes, gptq(w, h, bits=3).codes)


def test_needs_damping_with_fewer_tokens_than_columns():
    w, h = layer(), hessian(inputs(10, common=2))
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(w, h - 1e-9 * torch.eye(D, dtype=h.dtype), bits=3, damping=0.0)
    assert gptq(w, h, bits=3).values().isfinite().all()


def test_what_it_gets_stays_as_it_was():
    w, h = layer().requires_grad_(), hessian(inputs())
    before = w.detach().clone(), h.clone()
    for options in ({}, {"act_order": True}):
        found = gptq(w, h, bits=3, **options)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])
    assert not found.step.requires_grad and not found.values().requires_grad


def test_half_precision_is_quantized_in_float32():
    w, h = layer(dtype=torch.bfloat16), hessian(inputs())
    found, expected = gptq(w, h, bits=3), gptq(w.float(), h.float(), bits=3)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.step, expected.step)
    assert found.step.dtype == torch.float32


# The layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_layer_computes_with_the_rounded_weights(bits, act_order, with_bias):
    w, x = layer(dtype=torch.float32), inputs(dtype=torch.float32).view(3, 20, D)
    bias = torch.randn(N) if with_bias else None
    found = gptq(w, hessian(x), bits=bits, group_size=8, act_order=act_order)
    linear = GPTQLinear(found, bits=bits, bias=bias)
    assert linear.packed.shape == (N, D * bits // 8) and linear.packed.dtype == torch.uint8
    assert torch.equal(linear.weight(), found.values())
    assert_close(linear(x), F.linear(x, found.values(), bias))
    assert linear.groups.dtype == torch.int32 and not list(linear.parameters())


def test_the_layer_is_saved_and_loaded():
    w, h = layer(dtype=torch.float32), hessian(inputs(dtype=torch.float32))
    one = GPTQLinear(gptq(w, h, bits=4, group_size=8, act_order=True), bits=4, bias=torch.ones(N))
    other = GPTQLinear(rtn(torch.randn(N, D), bits=4, group_size=8), bits=4, bias=torch.zeros(N))
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, D)
    assert torch.equal(one(x), other(x))
    assert list(one.state_dict()) == ["packed", "step", "zero", "groups", "bias"]


def test_the_layer_in_bfloat16():
    w, x = layer(dtype=torch.float32), inputs(dtype=torch.float32)
    exact = GPTQLinear(gptq(w, hessian(x), bits=4, group_size=8), bits=4, bias=torch.randn(N))
    y = exact(x)
    half = exact.bfloat16()
    assert half.packed.dtype == half.zero.dtype == torch.uint8 and half.step.dtype == torch.bfloat16
    found = half(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), y, rtol=0.02, atol=0.02 * float(y.abs().max()))
    # Steps of another precision than the inputs.
    other = GPTQLinear(gptq(w, hessian(x), bits=4), bits=4)
    assert other(x.double()).dtype == torch.float64


@pytest.mark.parametrize("options", [{}, {"act_order": True}], ids=str)
def test_nothing_is_on_a_device_of_its_own(options):
    w, x = layer(dtype=torch.float32).to("meta"), inputs(dtype=torch.float32).to("meta")
    for found in (gptq(w, hessian(x), bits=4, group_size=8, **options), rtn(w, bits=4)):
        assert GPTQLinear(found, bits=4)(x).device == found.groups.device == w.device


def test_compiles_whole(unchecked):
    w, x = layer(dtype=torch.float32), inputs(dtype=torch.float32)
    linear = GPTQLinear(gptq(w, hessian(x), bits=4, group_size=8, act_order=True), bits=4)
    assert_close(torch.compile(linear, fullgraph=True, backend="eager")(x), linear(x))

    def quantize(w, x):
        return gptq(w, hessian(x), bits=3, group_size=4, block_size=3, act_order=True)[:2]

    w, x = w[:, :8], x[:, :8]
    assert_close(torch.compile(quantize, fullgraph=True, backend="eager")(w, x), quantize(w, x))


# What doesn't fit


def test_refuses_the_wrong_axis(unchecked):
    w, h = layer(), hessian(inputs())
    with pytest.raises(ValueError, match=r"a Hessian of shape \(24, 24\) for 5 input columns"):
        gptq(w.T, h, bits=3)
    with pytest.raises(ValueError, match=r"a Hessian of shape \(24, 23\) for 24 input columns"):
        gptq(w, h[:, 1:], bits=3)


def test_refuses_sizes_below_their_least():
    w, h = layer(), hessian(inputs())
    with pytest.raises(ValueError, match=r"block_size=0 is below 1, or damping=0.01 below 0"):
        gptq(w, h, bits=3, block_size=0)
    with pytest.raises(ValueError, match=r"block_size=128 is below 1, or damping=-0.5 below 0"):
        gptq(w, h, bits=3, damping=-0.5)
    for call in (lambda **k: gptq(w, h, **k), lambda **k: rtn(w, **k)):
        with pytest.raises(ValueError, match="24 columns aren't groups of group_size=7"):
            call(bits=3, group_size=7)
        with pytest.raises(ValueError, match="bits=1 aren't 2 to 8"):
            call(bits=1)


def test_the_layer_refuses_what_does_not_fit(unchecked):
    found = rtn(torch.randn(N, 9), bits=4)
    with pytest.raises(ValueError, match="9 codes of bits=4 aren't whole bytes"):
        GPTQLinear(found, bits=4)
    for bias in (torch.zeros(9), torch.zeros(N, 1)):
        with pytest.raises(ValueError, match=rf"shape \({bias.shape[0]},.*\) for 5 outputs"):
            GPTQLinear(found, bits=8, bias=bias)


def test_quantized_is_four_tensors_with_values():
    found = rtn(layer(), bits=3, group_size=8)
    codes, step, zero, groups = found
    assert isinstance(found, Quantized)
    assert_close(found.values(), step[:, groups] * (codes.double() - zero[:, groups]))
