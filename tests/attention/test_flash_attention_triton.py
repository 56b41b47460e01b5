"""The Triton kernel against torch, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")  # there is none for macOS

from snippets.attention.flash_attention import flash_attention
from snippets.attention.flash_attention_triton import flash_attention_triton
from snippets.attention.gqa import fused_grouped_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # see conftest.py


def heads(t: int, s: int, k: int, dtype=torch.float32) -> list[torch.Tensor]:
    shapes = [(2, 4, t, k), (2, 2, s, k), (2, 2, s, k)]
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


@pytest.mark.parametrize("t, s", [(20, 20), (17, 36), (1, 19)])
@pytest.mark.parametrize("k", [16, 20])
def test_equals_torch(t, s, k):
    q, key, v = heads(t, s, k)
    found = flash_attention_triton(q, key, v, block_q=16, block_k=32)
    assert_close(found, fused_grouped_attention(q, key, v))
    assert_close(found, flash_attention(q, key, v))


def test_a_scale_of_ones_own_and_tiles_of_any_size():
    q, k, v = heads(18, 33, 16)
    expected = fused_grouped_attention(q, k, v, scale=0.7)
    for block_q, block_k in ((32, 16), (16, 64)):
        found = flash_attention_triton(q, k, v, scale=0.7, block_q=block_q, block_k=block_k)
        assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    q, k, v = heads(20, 20, 16, dtype)
    found = flash_attention_triton(q, k, v)
    assert found.dtype == dtype
    exact = fused_grouped_attention(q.float(), k.float(), v.float())
    assert_close(found, exact.to(dtype), atol=8e-3, rtol=8e-3)


def test_inputs_may_be_views():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(20, 20, 16))
    assert not q.is_contiguous()
    assert_close(flash_attention_triton(q, k, v), fused_grouped_attention(q, k, v))


def test_what_does_not_fit_is_refused():
    q, k, v = heads(20, 20, 16)
    with pytest.raises(ValueError, match="uneven groups: 3 query heads, 2 key-value heads"):
        flash_attention_triton(q[:, :3], k, v)
    with pytest.raises(ValueError, match="more queries than keys: t=20, s=19"):
        flash_attention_triton(q, k[:, :, :19], v[:, :, :19])
    for sizes in ({"block_q": 8}, {"block_k": 24}):
        with pytest.raises(ValueError, match="powers of two from 16: block_q="):
            flash_attention_triton(q, k, v, **sizes)
