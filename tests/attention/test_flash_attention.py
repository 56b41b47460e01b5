"""FlashAttention, forward and backward, against torch, autograd and the formula in float64."""

import importlib.util
import math
import re
import sys
from importlib.machinery import SourceFileLoader

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from snippets.attention.flash_attention import Flash, blocks, flash_attention, tiles
from snippets.attention.gqa import fused_grouped_attention, grouped_attention
from snippets.attention.scaled_dot_product import attend, causal_mask
from snippets.common.memory import peak_bytes

B, H, G, T, S, K, E = 2, 6, 3, 13, 17, 5, 7
EXACT = {"atol": 1e-10, "rtol": 0}


def heads(t: int = T, s: int = S, dtype=torch.float64) -> list[torch.Tensor]:
    shapes = [(B, H, t, K), (B, G, s, K), (B, G, s, E)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def formula(q, k, v, mask, scale=None) -> torch.Tensor:
    """With all scores at once, in the dtype of the inputs; rows without a key are zeros."""
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = q @ k.mT * (K**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def gradients(y: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.autograd.grad(y, inputs, upstream.to(y.dtype))


def padding() -> torch.Tensor:
    """Of sequence 1 the first 9 tokens: with tiles of 4, two whole ones at its beginning."""
    real = torch.ones(B, 1, 1, S, dtype=torch.bool)
    real[1, ..., :9] = False
    return causal_mask(T, S) & real


MASKS = {
    "causal": lambda: None,
    "padding, first tiles empty": padding,
    "random": lambda: torch.rand(B, 1, T, S) > 0.5,
    "of each head": lambda: torch.rand(1, H, T, S) > 0.5,
    "two axes": lambda: torch.rand(T, S) > 0.5,
    "rows without a key": lambda: (torch.rand(T, S) > 0.5) & (torch.arange(T) % 3 > 0)[:, None],
    "nothing at all": lambda: torch.zeros(T, S, dtype=torch.bool),
    "everything": lambda: torch.ones(T, S, dtype=torch.bool),
}


@pytest.mark.parametrize("tile", [(4, 5), (5, 4), (1, 1), (T, S), (64, 64), (3, 64)], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_equals_the_formula_with_its_gradients(tile, mask):
    inputs, mask = heads(), mask()
    y = flash_attention(*inputs, mask, block_q=tile[0], block_k=tile[1])
    expected = formula(*inputs, causal_mask(T, S) if mask is None else mask)
    assert_close(y, expected, **EXACT)
    found, wanted = gradients(y, inputs), gradients(expected, inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs.nan_to_num(0.0), **EXACT)
        assert ours.isfinite().all()


@pytest.mark.parametrize("t, s", [(13, 13), (1, 17), (5, 17), (16, 17)])
def test_equals_torchs_fused_kernel_with_gradients(t, s):
    inputs = heads(t, s, torch.float32)
    y = flash_attention(*inputs, block_q=4, block_k=3)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=causal_mask(t, s), enable_gqa=True)
    assert_close(y, expected)
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs)


def test_equals_the_sites_other_forms():
    q, k, v = heads(dtype=torch.float32)
    v = v[..., :K]
    for other in (grouped_attention, fused_grouped_attention):
        assert_close(flash_attention(q, k, v, block_q=4, block_k=4), other(q, k, v))
    assert_close(flash_attention(q[:, :G], k, v, padding()), attend(q[:, :G], k, v, padding()))


def test_gradients_equal_finite_differences():
    shapes = [(1, 2, 3, 2), (1, 1, 4, 2), (1, 1, 4, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, block_q=2, block_k=3), inputs, atol=1e-7
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_a_scale_of_ones_own(scale):
    inputs = heads()
    y = flash_attention(*inputs, scale=scale, block_q=4, block_k=4)
    expected = formula(*inputs, causal_mask(T, S), scale)
    assert_close(y, expected, **EXACT)
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs, **EXACT)


def test_large_scores_do_not_overflow():
    q, k, v = heads(dtype=torch.float32)
    v = v[..., :K]
    y = flash_attention(100 * q, 100 * k, v, block_q=4, block_k=4)
    assert_close(y, fused_grouped_attention(100 * q, 100 * k, v))


def test_kept_are_inputs_output_and_one_number_a_query():
    q, k, v = heads()
    grouped = q.unflatten(1, (G, -1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        Flash.apply(grouped, k, v, None, 1.0, 4, 4)
    shapes = sorted(tuple(x.shape) for x in kept)
    r = H // G
    lse, y = (B, G, r, T), (B, G, r, T, E)
    assert shapes == sorted([(B, G, r, T, K), (B, G, S, K), (B, G, S, E), y, lse])


def test_the_second_result_is_the_log_of_the_sum():
    q, k, v = heads()
    mask = padding()[:, :, None].expand(B, G, H // G, T, S)
    _, lse = Flash.apply(q.unflatten(1, (G, -1)), k, v, mask, 0.7, 4, 4)
    scores = 0.7 * q.unflatten(1, (G, -1)) @ k[:, :, None].mT
    expected = scores.masked_fill(~mask, -math.inf).logsumexp(-1)
    empty = ~mask.any(-1)
    assert empty.any() and (lse[empty] == math.inf).all()
    assert_close(lse[~empty], expected[~empty], **EXACT)
    assert not lse.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in heads()]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y = flash_attention(*inputs, block_q=4, block_k=4)
    expected = formula(*wide, causal_mask(T, S))
    assert y.dtype == dtype
    close = {"atol": 2**-8 if dtype == torch.bfloat16 else 2**-11, "rtol": 2**-8}
    assert_close(y.double(), expected, **close)
    for ours, theirs in zip(gradients(y, inputs), gradients(expected, wide), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), theirs, atol=6e-2, rtol=2e-2)


def test_tiles_in_the_future_are_left_out():
    """Of 4 by 4 tiles, 10 are needed; with keys from a cache, those before all queries too."""

    def pairs(t: int, s: int, causal: bool = True) -> list[tuple[int, int]]:
        rows = blocks(t, 4)
        return [(r.start, c.start) for r in rows for c in tiles(r, t, s, 4, causal)]

    assert len(pairs(16, 16)) == 10 and len(pairs(16, 16, causal=False)) == 16
    assert pairs(4, 12) == [(0, 0), (0, 4), (0, 8)]
    for t, s in ((13, 17), (5, 9), (1, 8), (16, 16)):
        seen = causal_mask(t, s)
        needed = {(i // 4 * 4, j // 4 * 4) for i, j in seen.nonzero().tolist()}
        assert set(pairs(t, s)) == needed
    assert [(b.start, b.stop) for b in blocks(10, 4)] == [(0, 4), (4, 8), (8, 10)]


def test_memory_grows_with_the_length_not_its_square():
    def run(attention, t: int) -> int:
        q, k, v = (torch.randn(1, 2, t, 16, requires_grad=True) for _ in range(3))
        return peak_bytes(lambda: attention(q, k, v).sum().backward())

    ours = [run(flash_attention, t) for t in (192, 384, 768)]
    plain = [run(grouped_attention, t) for t in (192, 384, 768)]
    assert (ours[2] - ours[1]) == pytest.approx(2 * (ours[1] - ours[0]), rel=0.01)
    assert plain[2] > 3.9 * plain[1] and plain[2] > 20 * ours[2]


def test_no_sequences_share_anything():
    q, k, v = heads()
    both = flash_attention(q, k, v, block_q=4, block_k=4)
    assert_close(flash_attention(q[1:], k[1:], v[1:], block_q=4, block_k=4)[0], both[1], **EXACT)


def test_what_does_not_fit_is_refused(unchecked):
    q, k, v = heads()
    refused = {
        "uneven groups: 5 query heads, 3 key-value heads": lambda: flash_attention(q[:, :5], k, v),
        "more queries than keys: t=13, s=12": lambda: flash_attention(
            q, k[:, :, :12], v[:, :, :12]
        ),
        "tiles without a token: block_q=0, block_k=64": lambda: flash_attention(q, k, v, block_q=0),
        "block_k=-1": lambda: flash_attention(q, k, v, block_k=-1),
        "mask of (13, 16) for t=13 s=17": lambda: flash_attention(q, k, v, causal_mask(T, 16)),
    }
    for said, call in refused.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
    with pytest.raises(TypeError, match=r"mask of torch\.float32: needs booleans"):
        flash_attention(q, k, v, torch.zeros(T, S))
    # With a mask, more queries than keys are no contradiction.
    wide = torch.ones(T, 12, dtype=torch.bool)
    found = flash_attention(q, k[:, :, :12], v[:, :, :12], wide)
    assert_close(found, formula(q, k[:, :, :12], v[:, :, :12], wide), **EXACT)


def test_compiles_whole(monkeypatch):
    """The file as readers have it: the decorator that checks shapes can't be captured."""
    file = sys.modules[flash_attention.__module__].__file__
    spec = importlib.util.spec_from_file_location("plain_flash", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain_flash", module)
    SourceFileLoader("plain_flash", file).exec_module(module)
    inputs = heads(dtype=torch.float32)

    def run(*x):
        return module.flash_attention(*x, block_q=8, block_k=8)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs), flash_attention(*inputs, block_q=8, block_k=8))
    for ours, theirs in zip(
        gradients(compiled(*inputs), inputs), gradients(run(*inputs), inputs), strict=True
    ):
        assert_close(ours, theirs)
