"""RMSNorm against torch.nn.RMSNorm, Llama's and Gemma's norms, and its own invariants."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from snippets.layers.rmsnorm import RMSNorm, UnitOffsetRMSNorm, rms_normalize

D = 50
EPS = 1e-5  # not the default, so that a hard-coded one shows
BOTH = (RMSNorm, UnitOffsetRMSNorm)
PAIRS = (
    (RMSNorm, LlamaRMSNorm),
    (UnitOffsetRMSNorm, GemmaRMSNorm),
    (UnitOffsetRMSNorm, Gemma3RMSNorm),
)


def rows(dtype=torch.float32, seed=0):
    """Large rows need the upcast, tiny rows show eps, a row of zeros must stay one."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e4, 300.0, 1.0, 1e-3, 1e-5, 0.0, 2.0])[:, None]
    return (sizes * torch.randn(2, 7, D, generator=generator)).to(dtype)


def offsets(seed=1):
    """Distances from the gain 1, on a grid where w and 1 + w both exist in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-32, 33, (D,), generator=generator) / 64


def filled(norm, gain):
    """The norm with this gain, whichever way its class stores it."""
    stored = gain if isinstance(norm, RMSNorm | nn.RMSNorm) else gain - 1
    norm.load_state_dict({"weight": stored})
    return norm


@pytest.mark.parametrize("ours", BOTH)
def test_equals_torch(ours):
    x, gain = rows(), 1 + offsets()
    theirs = filled(nn.RMSNorm(D, eps=EPS), gain)
    ours = filled(ours(hidden_size=D, eps=EPS), gain)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("ours", BOTH)
def test_gradients_equal_those_of_torch(ours):
    gain = 1 + offsets()
    norms = filled(nn.RMSNorm(D, eps=EPS), gain), filled(ours(hidden_size=D, eps=EPS), gain)
    upstream = rows(seed=2)[:, 2:3].expand(2, 7, D)
    found = []
    for norm in norms:
        x = rows().requires_grad_()
        found.append(torch.autograd.grad(norm(x), (x, norm.weight), upstream))
    for expected, gradient in zip(*found, strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_equals_the_models_norm_to_the_bit(ours, theirs, dtype):
    x = rows(dtype)
    theirs = theirs(D, eps=EPS).to(dtype)
    theirs.weight.data += offsets().to(dtype)
    ours = ours(hidden_size=D, eps=EPS).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    y = ours(x)
    assert y.dtype == dtype
    assert torch.equal(y, theirs(x))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_float32_weight_and_bfloat16_rows_as_in_the_model(ours, theirs):
    x = rows(torch.bfloat16)
    theirs = theirs(D, eps=EPS)
    theirs.weight.data.add_(torch.rand(D, generator=torch.Generator().manual_seed(3)))
    ours = ours(hidden_size=D, eps=EPS)
    ours.load_state_dict(theirs.state_dict())
    assert ours(x).dtype == theirs(x).dtype
    assert torch.equal(ours(x), theirs(x))


def test_llama_and_gemma_round_in_different_places():
    x, gain = rows(torch.bfloat16), 1 + offsets()
    llama, gemma = (filled(norm(hidden_size=D).bfloat16(), gain)(x) for norm in BOTH)
    once = nn.functional.rms_norm(x, (D,), gain.bfloat16(), eps=1e-6)
    assert torch.equal(gemma, once)
    assert not torch.equal(llama, once)
    assert_close(llama, once)  # but only by rounding


def test_unit_offset_is_added_in_float32():
    norm = UnitOffsetRMSNorm(hidden_size=D, eps=0.0)
    nn.init.constant_(norm.weight, 0.003)  # 1 + 0.003 is 1 in bfloat16
    x = torch.full((1, D), 1.2969, dtype=torch.bfloat16)
    norm.bfloat16()
    y = rms_normalize(x, 0.0) * (1 + norm.weight.float())
    assert torch.equal(norm(x), y.bfloat16())
    wide = norm(torch.full((1, D), 1.0))
    assert_close(wide, torch.full((1, D), 1.003), rtol=0, atol=1e-5)  # 0.003 as bfloat16


@pytest.mark.parametrize("norm", BOTH)
def test_a_fresh_norm_has_gain_one(norm):
    x, norm = rows(), norm(hidden_size=D)
    assert norm.eps == 1e-6
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert_close(norm(x), rms_normalize(x, 1e-6))
    assert_close(norm(x)[:, :3].square().mean(-1), torch.ones(2, 3))


def test_eps_stands_under_the_root():
    x = torch.full((3, D), 1e-3)
    assert_close(rms_normalize(x, 3e-6), torch.full((3, D), 0.5))
    assert_close(rms_normalize(torch.zeros(3, D), 1e-6), torch.zeros(3, D))


def test_scale_cancels_and_shift_does_not():
    x = rows().double()[:, 2:5]
    y = rms_normalize(x, 0.0)
    assert_close(rms_normalize(1e4 * x, 0.0), y)
    assert_close(rms_normalize(-x, 0.0), -y)
    assert (rms_normalize(x + 1, 0.0) - y).abs().max() > 0.1


@pytest.mark.parametrize("norm", BOTH)
def test_rows_are_normalised_apart(norm):
    x, norm = rows(), filled(norm(hidden_size=D), 1 + offsets())
    assert_close(norm(x)[1, 3], norm(x[1, 3]))  # without batch and token axes too
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(norm(changed)[:, :4], norm(x)[:, :4])


def test_layer_norm_is_rms_norm_of_the_centred_row():
    x, gain = rows()[:, :3] + 0.5, 1 + offsets()
    norm = filled(RMSNorm(hidden_size=D, eps=EPS), gain)
    theirs = nn.functional.layer_norm(x, (D,), gain, eps=EPS)
    assert_close(norm(x - x.mean(-1, keepdim=True)), theirs)


@pytest.mark.parametrize("norm", BOTH)
def test_float64_stays_float64(norm):
    x = rows(torch.float64)
    norm = filled(norm(hidden_size=D, eps=EPS).double(), 1 + offsets())
    expected = (1 + offsets()) * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)  # float32 would miss by 1e-7
    small = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, small)


def test_half_precision_rows_come_out_of_the_helper_in_float32():
    x = rows(torch.float16)
    y = rms_normalize(x, EPS)
    assert y.dtype == torch.float32
    assert torch.equal(y, rms_normalize(x.float(), EPS))
    assert (y[:, 0] != 0).any()  # squares overflow in float16


@pytest.mark.parametrize("eps", (0.1, 0.0))
def test_gradient_along_the_row_is_what_eps_leaves(eps):
    norm = filled(RMSNorm(hidden_size=D, eps=eps), 1 + offsets()).double()
    x = rows().double()[0, 2].requires_grad_()
    upstream = rows(seed=2).double()[0, 2]
    (gradient,) = torch.autograd.grad(norm(x), x, upstream)
    r2 = x.square().mean() + eps
    expected = (x @ (norm.weight * upstream)) * eps / r2**1.5
    assert_close(x @ gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", BOTH)
def test_refuses_sizes_that_do_not_fit(norm):
    with pytest.raises(ValueError, match="hidden_size=0"):
        norm(hidden_size=0)
    with pytest.raises(ValueError, match=r"\(2, 7, 1\).*=50"):
        norm(hidden_size=D)(torch.ones(2, 7, 1))  # would broadcast
    with pytest.raises(ValueError, match=r"\(2, 7, 50\).*=1$"):
        norm(hidden_size=1)(rows())
