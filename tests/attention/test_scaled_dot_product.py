"""Attention against torch, transformers and the paper's formula in loops.

Sizes are such that swapped axes show: no two of b h t s k e are equal.
"""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.testing import assert_close
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

from snippets.attention.scaled_dot_product import attend, causal_mask

B, H, T, S, K, E = 2, 3, 5, 9, 6, 4
HALF = [torch.bfloat16, torch.float16]


def lookups(dtype=torch.float32) -> list[torch.Tensor]:
    """Queries, keys and values; in random order, so that no row is special."""
    shapes = ((B, H, T, K), (B, H, S, K), (B, H, S, E))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def padded() -> torch.Tensor:
    """b 1 t s: causal, and the second of the batch starts at its third key."""
    real = torch.arange(S) >= torch.tensor([[0], [2]])  # b s
    return causal_mask(T, S) & real[:, None, None]


def with_empty_rows() -> torch.Tensor:
    """t s: the third query has no key, the others some."""
    mask = torch.rand(T, S) < 0.6
    mask[:, 0], mask[2] = True, False
    return mask


MASKS = {
    "none": lambda: None,
    "causal t s": lambda: causal_mask(T, S),
    "padded b 1 t s": padded,
    "padding b 1 1 s": lambda: padded()[:, :, -1:],
    "per head b h t s": lambda: with_empty_rows().expand(B, H, T, S).clone(),
    "per head h t s": lambda: torch.rand(H, T, S) < 0.6,
    "empty rows t s": with_empty_rows,
}


def eager(q, k, v, mask, scale) -> torch.Tensor:
    """transformers' attention, whose mask is added to the scores."""
    if mask is not None:
        added = torch.zeros(mask.shape, dtype=q.dtype)
        mask = added.masked_fill(~mask, torch.finfo(q.dtype).min)
    module = SimpleNamespace(num_key_value_groups=1, training=False)
    return eager_attention_forward(module, q, k, v, mask, scale)[0].transpose(1, 2)


@pytest.mark.parametrize("name", MASKS)
def test_equals_sdpa_and_so_do_the_gradients(name):
    inputs, mask = lookups(), MASKS[name]()
    ours = attend(*inputs, mask)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(theirs, inputs, upstream)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", [name for name in MASKS if "per head" not in name])
def test_equals_transformers_to_the_bit(name, dtype):
    inputs, mask = lookups(dtype), MASKS[name]()
    ours, theirs = attend(*inputs, mask), eager(*inputs, mask, K**-0.5)
    assert ours.dtype == dtype
    if mask is not None:  # without any key, transformers gives the mean of the values
        some = mask.any(-1, keepdim=True)
        assert some.all() == ("empty" not in name)
        ours, theirs = ours * some, theirs * some
    assert torch.equal(ours, theirs)


def test_equals_the_papers_formula_in_loops():
    (q, k, v), mask = lookups(), padded()
    expected = torch.zeros(B, H, T, E)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                allowed = [s for s in range(S) if mask[b, 0, t, s]]
                scores = [(q[b, h, t] @ k[b, h, s]).item() / math.sqrt(K) for s in allowed]
                total = sum(math.exp(score) for score in scores)
                for s, score in zip(allowed, scores, strict=True):
                    expected[b, h, t] += math.exp(score) / total * v[b, h, s].detach()
    assert_close(attend(q, k, v, mask), expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_torch_multihead_attention_with_the_mask_inverted(need_weights):
    q, k, v = torch.randn(B, T, H * K), torch.randn(B, S, H * K), torch.randn(B, S, H * K)
    mha = nn.MultiheadAttention(H * K, H, bias=False, batch_first=True)
    one = torch.eye(H * K)  # identity projections: what is left is the attention
    mha.load_state_dict({"in_proj_weight": one.repeat(3, 1), "out_proj.weight": one})
    causal, padding = causal_mask(T, S), padded()[:, 0, -1]
    theirs, _ = mha(
        q, k, v, attn_mask=~causal, key_padding_mask=~padding, need_weights=need_weights
    )
    heads = [x.unflatten(-1, (H, K)).transpose(1, 2) for x in (q, k, v)]
    ours = attend(*heads, causal & padding[:, None, None])
    assert_close(ours.transpose(1, 2).flatten(2), theirs)


def test_without_leading_axes_and_with_one():
    q, k, v = lookups()
    mask = causal_mask(T, S)
    assert_close(attend(q[0, 0], k[0, 0], v[0, 0], mask), attend(q, k, v, mask)[0, 0])
    assert_close(attend(q[0], k[0], v[0], mask), attend(q, k, v, mask)[0])


@pytest.mark.parametrize("scale", [0.0, 0.37, 2.0])
def test_the_scale_given_is_the_scale_used(scale):
    inputs = lookups()
    theirs = F.scaled_dot_product_attention(*inputs, scale=scale)
    assert_close(attend(*inputs, scale=scale), theirs)


def test_scores_keep_unit_variance_at_any_width():
    for k in (4, 64, 1024):
        q, key = torch.randn(200, k), torch.randn(300, k)
        # Logarithms of weights are scores up to a constant in each row.
        weights = attend(q, key, torch.eye(300))
        assert abs(weights.log().var(-1).mean() - 1) < 0.1


def test_float64_stays_float64():
    inputs = lookups(torch.float64)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=padded())
    assert_close(attend(*inputs, padded()), theirs, atol=1e-14, rtol=1e-14)
    mask = with_empty_rows()
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_row_without_keys_gives_zeros_and_zero_gradients(dtype):
    inputs, mask = lookups(dtype), with_empty_rows()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        y = attend(*inputs, mask)
        y.square().sum().backward()
    assert torch.equal(y[:, :, 2], torch.zeros(B, H, E, dtype=dtype))
    assert torch.equal(inputs[0].grad[:, :, 2], torch.zeros(B, H, K, dtype=dtype))
    rest = [0, 1, 3, 4]
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    attend(q[:, :, rest], k, v, mask[rest]).square().sum().backward()
    for ours, without in zip(inputs[1:], (k, v), strict=True):
        assert ours.grad.isfinite().all()
        assert_close(ours.grad, without.grad)


def test_no_row_has_a_key():
    inputs = lookups()
    y = attend(*inputs, torch.zeros(T, S, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    for x in inputs:
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_masked_keys_may_hold_anything_finite():
    q, k, v = lookups()
    mask = padded()
    before = attend(q, k, v, mask)
    with torch.no_grad():
        k[1, :, :2], v[1, :, :2] = 1e30, -1e4
    assert torch.equal(attend(q, k, v, mask), before)


@pytest.mark.parametrize(
    "dtype, low", [(torch.float32, -1e12), (torch.bfloat16, -1e12), (torch.float16, -65504.0)]
)
def test_no_score_is_low_enough_to_let_masked_keys_in(dtype, low):
    # float16: the least number there is, 256 * 255.875. Added as a mask it would be a tie.
    q = torch.tensor([[-256.0]], dtype=dtype)
    k = torch.tensor([[low / -256], [0.0]], dtype=dtype)
    v = torch.tensor([[3.0], [5.0]], dtype=dtype)
    assert attend(q, k, v, torch.tensor([[True, False]])).item() == 3.0


def test_causal_mask_is_aligned_at_the_last_query():
    assert causal_mask(2, 5).tolist() == [[True, True, True, True, False], [True] * 5]
    assert causal_mask(3, 3).tolist() == [[True, False, False], [True, True, False], [True] * 3]
    assert causal_mask(1, 4).all()
    assert causal_mask(0, 4).shape == (0, 4)
    assert causal_mask(T, S).sum(-1).tolist() == [S - T + i + 1 for i in range(T)]


@pytest.mark.parametrize("t, s", [(1, 7), (T, S), (7, 7), (1, 1)])
def test_causal_mask_equals_transformers(t, s):
    theirs = sdpa_mask(1, t, s, q_offset=s - t, allow_is_causal_skip=False)
    assert torch.equal(causal_mask(t, s), theirs[0, 0])


def test_causal_mask_equals_torchs_lower_right():
    inputs = lookups()
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=causal_lower_right(T, S))
    assert_close(attend(*inputs, causal_mask(T, S)), theirs)
    top_left = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert (attend(*inputs, causal_mask(T, S)) - top_left).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 2, 4, S - 1, S])
def test_chunks_of_queries_equal_the_full_pass(chunk):
    q, k, v = torch.randn(B, H, S, K), torch.randn(B, H, S, K), torch.randn(B, H, S, E)
    parts = []
    for start in range(0, S, chunk):
        end = min(start + chunk, S)
        mask = causal_mask(end - start, end)
        parts.append(attend(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(torch.cat(parts, 2), full)


def test_is_causal():
    q, k, v = lookups()
    mask = causal_mask(T, S)
    before = attend(q, k, v, mask)
    for s in range(S):
        with torch.no_grad():
            new_k, new_v = k.clone(), v.clone()
            new_k[:, :, s] += 1
            new_v[:, :, s] += 1
        moved = (attend(q, new_k, new_v, mask) != before).any(-1).all(0).all(0)
        assert moved.tolist() == [s <= S - T + i for i in range(T)]


def test_compiles_without_a_break():
    ours, mask = inspect.unwrap(attend), inspect.unwrap(causal_mask)  # checks don't trace

    def layer(q, k, v):
        return ours(q, k, v, mask(q.shape[-2], k.shape[-2], device=q.device))

    # "eager" runs what was captured: the test is the capture, not a compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = lookups()
    plain, traced = layer(*inputs), compiled(*inputs)
    assert torch.equal(plain, traced)
    upstream = torch.randn_like(plain)
    assert_close(
        torch.autograd.grad(plain, inputs, upstream), torch.autograd.grad(traced, inputs, upstream)
    )


def test_the_mask_is_made_where_asked():
    assert causal_mask(2, 3, device="meta").device.type == "meta"
    q, k, v = (x.to("meta") for x in lookups())
    assert attend(q, k, v, causal_mask(T, S, device="meta")).shape == (B, H, T, E)


def test_refuses_more_queries_than_keys():
    with pytest.raises(ValueError, match="more queries than keys: t=6, s=4"):
        causal_mask(6, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_refuses_a_mask_that_is_not_boolean(dtype):
    mask = causal_mask(T, S).to(dtype)
    unchecked = inspect.unwrap(attend)  # as a reader calls it, without the shape checks
    with pytest.raises(TypeError, match=f"mask of {dtype}: needs booleans, True = attend"):
        unchecked(*lookups(), mask)


@pytest.mark.parametrize("shape", [(S, T), (T, S + 1), (T + 1, S), (B, T, S)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(TypeCheckError):
        attend(*lookups(), torch.ones(shape, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="size"):
        inspect.unwrap(attend)(*lookups(), torch.ones(shape, dtype=torch.bool))
