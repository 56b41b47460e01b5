"""Each optimizer against torch.optim over 20 steps, and against the papers' sums.

Shapes differ (wide, tall, square, a vector), gradients vary in size, one is missing for a while.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from snippets.foundations.optimizers import (
    Optimizer,
    adam,
    adamw,
    muon,
    orthogonalize,
    sgd,
    warmup_cosine,
)

MATRICES = [(5, 3), (3, 5), (4, 4), (1, 6)]
SHAPES = [*MATRICES, (7,), ()]


def parameters(shapes, dtype=torch.float64) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def compare(rule, oracle, lr, shapes=SHAPES, dtype=torch.float64, **tolerance) -> None:
    """Both optimizers get the same 20 gradients; the learning rate changes on the way."""
    ours, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    mine, yours = Optimizer(ours, rule, lr), oracle(theirs, lr)
    for step in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step % 5 - 2)
            q.grad = p.grad.clone()
        if step in (3, 4):
            ours[0].grad = theirs[0].grad = None
        mine.lr = yours.param_groups[0]["lr"] = lr / (1 + step % 3)
        mine.step()
        yours.step()
        assert_close([*ours], [*theirs], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torch(momentum, nesterov, decay, dtype):
    settings = {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
    compare(
        partial(sgd, **settings),
        lambda p, lr: torch.optim.SGD(p, lr, **settings),
        0.05,
        dtype=dtype,
    )


def test_plain_momentum_is_the_default():
    compare(partial(sgd, momentum=0.9), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule, oracle", [(adam, torch.optim.Adam), (adamw, torch.optim.AdamW)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"betas": (0.8, 0.95), "eps": 1e-3}, {"weight_decay": 0.3}, {"betas": (0.0, 0.5)}],
)
def test_adam_and_adamw_equal_torch(rule, oracle, settings, dtype):
    compare(partial(rule, **settings), lambda p, lr: oracle(p, lr, **settings), 0.05, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.6, "weight_decay": 0.0},
        {"nesterov": False, "weight_decay": 0.5},
        {"ns_steps": 3},
        {"adjust_lr": "match_rms_adamw"},
    ],
)
def test_muon_equals_torch(settings, dtype):
    theirs = {{"adjust_lr": "adjust_lr_fn"}.get(k, k): v for k, v in settings.items()}
    compare(
        partial(muon, **settings),
        lambda p, lr: torch.optim.Muon(p, lr, **theirs),
        0.05,
        MATRICES,
        dtype,
    )


@pytest.mark.parametrize("rule", [partial(sgd, momentum=0.9), adam, adamw, muon])
def test_works_in_bfloat16(rule):
    (p,) = parameters([(5, 3)], torch.bfloat16)
    before = p.detach().clone()
    optimizer = Optimizer([p], rule, 0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert p.dtype == torch.bfloat16 and p.isfinite().all() and (p != before).any()
    tensors = [v for v in optimizer.state[0].values() if isinstance(v, torch.Tensor)]
    assert tensors and all(v.dtype == torch.bfloat16 for v in tensors)


# The papers' formulas


def test_adam_is_a_quotient_of_weighted_means():
    gradients, lr, betas, eps = torch.randn(6, 3, dtype=torch.float64), 0.1, (0.7, 0.9), 1e-2
    p, state = torch.zeros(3, dtype=torch.float64), {}
    for t in range(1, 7):
        weights = [[beta ** (t - i) for i in range(1, t + 1)] for beta in betas]
        m, v = (
            sum(w * x for w, x in zip(ws, values, strict=False)) / sum(ws)
            for ws, values in zip(weights, (gradients, gradients**2), strict=True)
        )
        expected = p - lr * m / (v.sqrt() + eps)
        p = adam(p, gradients[t - 1], state, lr, betas=betas, eps=eps)
        assert_close(p, expected)


def test_the_first_step_of_adam_is_the_learning_rate_whatever_the_gradient():
    for scale in (1e-6, 1.0, 1e6):
        g = scale * torch.randn(5, dtype=torch.float64)
        p = adam(torch.zeros_like(g), g, {}, 0.1, eps=0.0)
        assert_close(p, -0.1 * g.sign())
    assert adam(torch.zeros(1), torch.zeros(1), {}, 0.1) == 0  # eps against 0 / 0


def test_decay_of_adamw_is_decoupled():
    p, none = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert_close(adamw(p, none, {}, 0.1, weight_decay=0.5), p * 0.95)
    assert_close(adam(p, none, {}, 0.1, weight_decay=0.5), p - 0.1)  # a gradient like any


def test_momentum_of_a_constant_gradient_reaches_ten_times():
    p, state = torch.zeros(1, dtype=torch.float64), {}
    for _ in range(200):
        before, p = p, sgd(p, torch.ones(1, dtype=torch.float64), state, 1.0, momentum=0.9)
    assert_close(before - p, torch.full((1,), 10.0, dtype=torch.float64))


# Orthogonalization


@pytest.mark.parametrize("shape", [(8, 8), (20, 6), (6, 20), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_singular_values_come_near_one_and_vectors_stay(shape, dtype):
    g = torch.randn(shape, dtype=torch.float64)
    x = orthogonalize(g, dtype=dtype)
    assert x.dtype == dtype and x.shape == g.shape
    s = torch.linalg.svdvals(x.double())
    assert s.min() > 0.5 and s.max() < 1.25
    if dtype == torch.float64:
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        core = u.mT @ x @ vh.mT
        assert_close(core, core.diagonal().diag(), atol=1e-10, rtol=0)


def test_applies_the_polynomial_to_the_singular_values():
    g, (a, b, c) = torch.randn(5, 7, dtype=torch.float64), (2.0, -1.5, 0.4)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(3):
        s = a * s + b * s**3 + c * s**5
    ours = orthogonalize(g, 3, coefficients=(a, b, c), dtype=torch.float64)
    assert_close(ours, u @ s.diag() @ vh)


def test_defaults_of_orthogonalize_are_torchs():
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    for shape in MATRICES:
        g = torch.randn(shape)
        expected = theirs(g, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert torch.equal(orthogonalize(g), expected)
    tiny = 1e-9 * torch.randn(4, 3)
    assert torch.equal(orthogonalize(tiny), theirs(tiny, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert (orthogonalize(torch.zeros(3, 4)) == 0).all()


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_with_a_sum_for_momentum_is_the_same(nesterov):
    p = q = torch.randn(4, 6, dtype=torch.float64)
    total, state = torch.zeros_like(p), {}
    for _ in range(10):
        g = torch.randn_like(p)
        total = 0.95 * total + g
        step = orthogonalize(g + 0.95 * total if nesterov else total, dtype=torch.float64)
        q = q * (1 - 0.02 * 0.1) - 0.02 * step
        p = muon(p, g, state, 0.02, nesterov=nesterov, dtype=torch.float64)
        assert_close(p, q)


def test_muon_matches_the_size_of_adamws_steps():
    for shape in ((64, 64), (256, 32), (32, 256)):
        p = torch.zeros(shape)
        step = muon(p, torch.randn(shape), {}, 1.0, adjust_lr="match_rms_adamw")
        assert 0.15 < step.square().mean().sqrt() < 0.25
        original = muon(p, torch.randn(shape), {}, 1.0)
        assert (
            abs(torch.linalg.matrix_norm(original, 2) / max(1, shape[0] / shape[1]) ** 0.5 - 1)
            < 0.3
        )


# Schedule and driver


@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (9, 10), (4, 17)])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_equals_transformers(warmup, total, final):
    optimizer = torch.optim.SGD(parameters([()]), lr=1.0)
    if final:
        theirs = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, total, min_lr_rate=final
        )
    else:
        theirs = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total + 1):
        ours = warmup_cosine(step, warmup_steps=warmup, total_steps=total, final=final)
        assert math.isclose(ours, theirs.get_last_lr()[0], abs_tol=1e-12)
        optimizer.step()
        theirs.step()
    later = warmup_cosine(total + 5, warmup_steps=warmup, total_steps=total, final=final)
    assert math.isclose(later, final, abs_tol=1e-12)
    if not final:
        assert warmup_cosine(total, warmup_steps=warmup, total_steps=total) == 0


@pytest.mark.parametrize("warmup, total", [(10, 10), (11, 10), (-1, 10)])
def test_refuses_a_schedule_without_room(warmup, total):
    said = rf"^no room: warmup_steps={warmup}, total_steps={total}"
    with pytest.raises(ValueError, match=said):
        warmup_cosine(0, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), ()])
def test_muon_refuses_what_is_no_matrix(unchecked, shape):
    p = torch.zeros(shape)
    said = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^Muon wants a matrix, not shape {said}"):
        muon(p, p, {}, 0.1)


def test_refuses_an_unknown_adjustment_and_no_parameters():
    p = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^unknown adjust_lr='spectral'"):
        muon(p, p, {}, 0.1, adjust_lr="spectral")
    with pytest.raises(ValueError, match=r"^no parameters"):
        Optimizer(iter(()), sgd, 0.1)


def test_counts_the_bytes_of_its_state_and_clears_gradients():
    for rule, tensors in ((sgd, 0), (partial(sgd, momentum=0.9), 1), (adam, 2), (muon, 1)):
        p = parameters([(5, 3)], torch.float32)[0]
        optimizer = Optimizer([p], rule, 0.1)
        assert optimizer.state_bytes() == 0
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state_bytes() == tensors * 15 * 4
        optimizer.zero_grad()
        assert p.grad is None and p.requires_grad
        before = p.detach().clone()
        optimizer.step()
        assert torch.equal(p, before)


def test_two_parameters_do_not_share_a_state():
    p, q = parameters([(3,), (3,)])
    both, alone = (
        Optimizer([p, q], adam, 0.1),
        Optimizer([nn.Parameter(q.detach().clone())], adam, 0.1),
    )
    for _ in range(3):
        p.grad, q.grad = torch.randn_like(p), torch.randn_like(q)
        alone.params[0].grad = q.grad.clone()
        both.step()
        alone.step()
    assert torch.equal(q, alone.params[0])
