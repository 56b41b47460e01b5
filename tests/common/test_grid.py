"""The uniform grid against torch's observers and fake quantization, packing against big ints."""

import itertools

import pytest
import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.testing import assert_close

from snippets.common.grid import (
    at_least_float32,
    columns,
    fit_grid,
    from_codes,
    pack,
    to_codes,
    unpack,
)

N, D = 5, 24
ALL_BITS = (2, 3, 4, 5, 8)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weights(n: int = N, d: int = D, dtype=torch.float32) -> torch.Tensor:
    """Rows that lie differently about zero: the last two are all above, all below."""
    w = torch.randn(n, d, dtype=dtype) * torch.rand(n, 1, dtype=dtype) + torch.rand(n, 1) - 0.5
    w[-1], w[-2] = w[-1].abs() + 0.1, -w[-2].abs() - 0.1
    return w


def observed(w: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's step and zero of each row."""
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.quint8, qscheme=scheme, quant_min=0, quant_max=2**bits - 1, eps=1e-12
    )
    observer(w)
    return observer.calculate_qparams()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group_size", [None, 1, 6, 8, D])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_equals_torch_in_each_group(bits, group_size):
    w, s = weights(), group_size or D
    step, zero = fit_grid(w, bits=bits, group_size=group_size)
    codes = to_codes(w, step, zero, bits=bits)
    assert step.shape == zero.shape == (N, D // s) and codes.dtype == zero.dtype == torch.uint8
    for g, part in enumerate(w.split(s, 1)):
        scale, point = observed(part.contiguous(), bits, False)
        assert_close(step[:, g], scale)
        assert zero[:, g].tolist() == point.tolist()
        theirs = torch.fake_quantize_per_channel_affine(part, scale, point, 0, 0, 2**bits - 1)
        ours = from_codes(codes, step, zero)[:, g * s : (g + 1) * s]
        assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", ALL_BITS)
def test_a_symmetric_step_is_torchs_and_its_zero_the_upper_middle(bits):
    w = weights()
    step, zero = fit_grid(w, bits=bits, symmetric=True)
    assert_close(step[:, 0], observed(w, bits, True)[0])
    assert zero.unique().tolist() == [2 ** (bits - 1)]
    point = zero[:, 0].to(torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(w, step[:, 0], point, 0, 0, 2**bits - 1)
    ours = from_codes(to_codes(w, step, zero, bits=bits), step, zero)
    between = w.abs() == w.abs().amax(1, keepdim=True)  # half a step from two values: either
    assert_close(ours[~between], theirs[~between])
    assert_close((ours - w)[between].abs(), (theirs - w)[between].abs())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_nearest_of_all_values_is_taken(bits, symmetric):
    w = weights(dtype=torch.float64)
    step, zero = fit_grid(w, bits=bits, group_size=8, symmetric=symmetric)
    assert step.dtype == torch.float64
    codes = to_codes(w, step, zero, bits=bits)
    rounded = from_codes(codes, step, zero)
    for i, j in itertools.product(range(N), range(D)):
        k = j // 8
        values = [step[i, k] * (code - int(zero[i, k])) for code in range(2**bits)]
        best = min(abs(w[i, j] - value) for value in values)
        assert_close((w[i, j] - rounded[i, j]).abs(), best, rtol=0, atol=1e-12)
        assert best <= step[i, k] / 2 * (1 + 1e-9)  # no weight lies off the grid
    assert_close(to_codes(rounded, step, zero, bits=bits), codes)


def test_values_beyond_the_grid_are_clamped():
    step, zero = torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8)
    w = torch.tensor([[-1e4, -2.0, -1.5, 0.0, 5.9, 6.0, 6.4, 1e4]])
    assert to_codes(w, step, zero, bits=4).tolist() == [[0, 0, 0, 3, 15, 15, 15, 15]]
    assert to_codes(w, step, zero, bits=2).tolist() == [[0, 0, 0, 3, 3, 3, 3, 3]]


def test_a_group_of_zeros_stays_zero():
    w = weights()
    w[:, 8:16] = 0
    for symmetric in (False, True):
        step, zero = fit_grid(w, bits=3, group_size=8, symmetric=symmetric)
        assert step[:, 1].tolist() == [1.0] * N
        rounded = from_codes(to_codes(w, step, zero, bits=3), step, zero)
        assert (rounded[:, 8:16] == 0).all() and rounded.isfinite().all()


def test_zero_is_on_every_grid():
    w = weights()
    step, zero = fit_grid(w, bits=3)
    assert zero[-1] == 0 and zero[-2] == 7
    nothing = torch.zeros(N, 1)
    assert (from_codes(to_codes(nothing, step, zero, bits=3), step, zero) == 0).all()


def test_columns_may_belong_to_any_group():
    w, order = weights(), torch.randperm(D)
    step, zero = fit_grid(w[:, order], bits=3, group_size=6)
    groups = torch.empty(D, dtype=torch.long)
    groups[order] = torch.arange(D) // 6
    codes = to_codes(w, step, zero, bits=3, groups=groups)
    assert torch.equal(codes[:, order], to_codes(w[:, order], step, zero, bits=3))
    back = from_codes(codes, step, zero, groups=groups)
    assert torch.equal(back[:, order], from_codes(codes[:, order], step, zero))


def test_half_precision_is_fitted_in_float32():
    w = weights().bfloat16()
    step, zero = fit_grid(w, bits=4, group_size=8)
    assert step.dtype == torch.float32
    expected = fit_grid(w.float(), bits=4, group_size=8)
    assert torch.equal(step, expected[0]) and torch.equal(zero, expected[1])
    assert (
        from_codes(to_codes(w, step, zero, bits=4), step.bfloat16(), zero).dtype == torch.bfloat16
    )
    assert at_least_float32(w) == torch.float32
    assert at_least_float32(w.double()) == torch.float64


def test_a_grid_has_no_gradient():
    step, zero = fit_grid(weights().requires_grad_(), bits=4)
    assert not step.requires_grad and not zero.requires_grad


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_bits_are_those_of_one_large_number(bits):
    codes = torch.randint(2**bits, (N, D), dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    packed = pack(codes, bits=bits)
    assert packed.dtype == torch.uint8 and packed.shape == (N, D * bits // 8)
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum(code << bits * i for i, code in enumerate(row))
        assert bytes(found) == number.to_bytes(D * bits // 8, "little")
    assert torch.equal(unpack(packed, bits=bits), codes)


def test_every_pair_of_nibbles_returns():
    codes = torch.cartesian_prod(*[torch.arange(16, dtype=torch.uint8)] * 2)
    packed = pack(codes, bits=4)
    assert packed[:, 0].tolist() == [low + 16 * high for low, high in codes.tolist()]
    assert torch.equal(unpack(packed, bits=4), codes)


@pytest.mark.parametrize("bits", [1, 9])
def test_refuses_other_bits(bits):
    w, codes = weights(), torch.zeros(N, D, dtype=torch.uint8)
    step, zero = fit_grid(w, bits=4)
    for call in (
        lambda: fit_grid(w, bits=bits),
        lambda: to_codes(w, step, zero, bits=bits),
        lambda: pack(codes, bits=bits),
        lambda: unpack(codes, bits=bits),
    ):
        with pytest.raises(ValueError, match=f"bits={bits} aren't 2 to 8"):
            call()


@pytest.mark.parametrize("group_size", [7, 0, -6, 48])
def test_refuses_groups_that_do_not_divide(group_size):
    with pytest.raises(ValueError, match=f"24 columns aren't groups of group_size={group_size}"):
        fit_grid(weights(), bits=4, group_size=group_size)


def test_refuses_what_is_not_whole_bytes_or_codes():
    with pytest.raises(ValueError, match="3 codes of bits=4 aren't whole bytes"):
        pack(torch.zeros(N, 3, dtype=torch.uint8), bits=4)
    with pytest.raises(ValueError, match="4 bytes aren't whole codes of bits=3"):
        unpack(torch.zeros(N, 4, dtype=torch.uint8), bits=3)


def test_refuses_anothers_groups(unchecked):
    w = weights()
    step, zero = fit_grid(w, bits=4, group_size=6)
    codes = to_codes(w, step, zero, bits=4)
    with pytest.raises(ValueError, match=r"groups of shape \(4, 4\) for 5 rows, 24 columns"):
        to_codes(w, step[:4], zero[:4], bits=4)
    with pytest.raises(ValueError, match=r"groups of shape \(5, 4\) for 5 rows, 23 columns"):
        from_codes(codes[:, 1:], step, zero)
    with pytest.raises(ValueError, match=r"groups of shape \(5, 0\) for 5 rows, 24 columns"):
        columns(step[:, :0], w, None)
    with pytest.raises(ValueError, match=r"groups of \(23,\) columns for 24"):
        from_codes(codes, step, zero, groups=torch.zeros(23, dtype=torch.long))


def test_compile_gives_the_same(unchecked):
    def there_and_back(w):
        step, zero = fit_grid(w, bits=3, group_size=8)
        codes = to_codes(w, step, zero, bits=3)
        return from_codes(unpack(pack(codes, bits=3), bits=3), step, zero)

    w = weights()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert_close(compiled(w), there_and_back(w))
