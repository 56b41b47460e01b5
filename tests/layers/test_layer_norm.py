"""LayerNorm against torch.nn, its place against GPT-2's and BERT's blocks, and its invariants."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import BertConfig, GPT2Config
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from snippets.layers.layer_norm import LayerNorm, post_norm, pre_norm, standardize

D = 50
EPS = 1e-3  # not the default, so that a hard-coded one shows


def rows(dtype=torch.float32, seed=0):
    """Large rows need the upcast, tiny rows show eps, a far mean must not eat the digits."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e4, 300.0, 1.0, 1e-2, 1e-5, 0.0, 2.0])[:, None]
    means = torch.tensor([0.0, 1e3, 3.0, -0.1, 0.0, 7.0, -5.0])[:, None]
    return (means + sizes * torch.randn(2, 7, D, generator=generator)).to(dtype)


def pair(dtype=torch.float32, eps=EPS, bias=True, seed=1):
    """Ours and torch's, with the same gain and bias, given by name."""
    generator = torch.Generator().manual_seed(seed)
    theirs = nn.LayerNorm(D, eps=eps, bias=bias)
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn(D, generator=generator)
    ours = LayerNorm(hidden_size=D, eps=eps, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
def test_equals_torch(dtype, bias):
    ours, theirs = pair(dtype, bias=bias)
    x = rows(dtype)
    assert ours(x).dtype == dtype
    assert_close(ours(x), theirs(x))
    assert ours(x).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_once(dtype):
    ours, _ = pair(dtype)
    exact = torch.nn.functional.layer_norm(
        rows(dtype).double(), (D,), ours.weight.double(), ours.bias.double(), EPS
    )
    # Half a step of the result, and a little for float32's own rounding; two roundings miss it.
    step = torch.finfo(dtype).eps * exact.abs() / 2 + 1e-5
    assert ((ours(rows(dtype)).double() - exact).abs() <= step).all()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_float32_parameters_with_half_rows_as_in_torch(dtype):
    ours, theirs = pair()
    assert ours(rows(dtype)).dtype == theirs(rows(dtype)).dtype == dtype
    assert_close(ours(rows(dtype)), theirs(rows(dtype)))


@pytest.mark.parametrize("bias", (True, False))
def test_gradients_equal_those_of_torch(bias):
    upstream = rows(seed=2)[:, 2:3].expand(2, 7, D)
    found = []
    for norm in pair(bias=bias):
        x = rows().requires_grad_()
        found.append(torch.autograd.grad(norm(x), (x, *norm.parameters()), upstream))
    assert len(found[0]) == 2 + bias
    for gradient, expected in zip(*found, strict=True):
        # float32 sums in another order: judged by the size of the whole gradient
        assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_gradient_is_the_formula_of_the_page():
    norm, _ = pair(torch.float64)
    x = rows(torch.float64)[:, 2:4].requires_grad_()
    upstream = rows(torch.float64, seed=2)[:, 2:4]
    (gradient,) = torch.autograd.grad(norm(x), x, upstream)
    z, g = standardize(x, EPS), norm.weight * upstream
    bracket = g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)
    sigma = (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    assert_close(gradient, bracket / sigma)
    assert_close(gradient.sum(-1), torch.zeros(2, 2).double(), rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(norm, x[0].detach().requires_grad_())


def test_a_fresh_norm_changes_nothing_but_mean_and_length():
    norm = LayerNorm(hidden_size=D)
    assert norm.eps == 1e-5 == nn.LayerNorm(D).eps
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in LayerNorm(hidden_size=D, bias=False).named_parameters()] == [
        "weight"
    ]
    y = norm(rows()[:, [2, 6]])
    assert_close(y.mean(-1), torch.zeros(2, 2), rtol=0, atol=1e-6)
    assert_close(y.norm(dim=-1), torch.full((2, 2), D**0.5), rtol=1e-4, atol=0)  # eps


def test_shift_and_scale_cancel():
    x = rows(torch.float64)[:, 2:4]
    y = standardize(x, 0.0)
    assert_close(standardize(1e3 * x + 20, 0.0), y)
    assert_close(standardize(-x, 0.0), -y)


def test_eps_stands_under_the_root_and_the_variance_is_biased():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0])  # mean 1/4, variance 3/16
    assert_close(standardize(x, 1 / 16), torch.tensor([1.5, -0.5, -0.5, -0.5]))
    constant = standardize(torch.full((3, D), 7.0), 1e-12)
    assert_close(constant, torch.zeros(3, D))


@pytest.mark.parametrize("mean", (1e3, 1e5))
def test_a_far_mean_does_not_eat_the_digits(mean):
    x = rows()[:, 2:3] + mean
    exact = standardize(x.double(), EPS).float()  # of the same rounded numbers
    # x is good to one step of its format; the error of a mean over D of them is below 1 step
    atol = mean * torch.finfo(torch.float32).eps
    assert_close(standardize(x, EPS), exact, rtol=0, atol=atol)


def test_rows_are_normalised_apart():
    x, (norm, _) = rows(), pair()
    assert_close(norm(x)[1, 3], norm(x[1, 3]))  # without batch and token axes too
    changed = x.clone()
    changed[:, 4:] += 1
    changed[0] -= 2
    assert torch.equal(norm(changed)[1, :4], norm(x)[1, :4])


def filled(module):
    """Random parameters of a size at which each of them shows."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        parameter.data += 0.2 * noise
    return module.eval()


def norm_like(theirs):
    ours = LayerNorm(hidden_size=len(theirs.weight), eps=theirs.eps)
    ours.load_state_dict(theirs.state_dict())
    return ours


def gpt2():
    config = GPT2Config(n_embd=24, n_head=3, layer_norm_epsilon=0.1, attn_implementation="eager")
    return filled(GPT2Block(config, layer_idx=0))


def bert():
    sizes = dict(hidden_size=24, num_attention_heads=3, intermediate_size=40)
    config = BertConfig(**sizes, layer_norm_eps=0.1, attn_implementation="eager")
    return filled(BertLayer(config))


def through_gpt2(block, place, x):
    x = place(x, norm_like(block.ln_1), lambda h: block.attn(h)[0])
    return place(x, norm_like(block.ln_2), block.mlp)


def through_bert(layer, place, x):
    attention = layer.attention
    x = place(
        x,
        norm_like(attention.output.LayerNorm),
        lambda h: attention.output.dense(attention.self(h)[0]),
    )
    return place(
        x,
        norm_like(layer.output.LayerNorm),
        lambda h: layer.output.dense(layer.intermediate(h)),
    )


@pytest.mark.parametrize(
    ("block", "through", "right", "wrong"),
    ((gpt2, through_gpt2, pre_norm, post_norm), (bert, through_bert, post_norm, pre_norm)),
)
def test_place_of_the_norm_is_the_models(block, through, right, wrong):
    block, x = block(), torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = block(x)
        assert_close(through(block, right, x), theirs)
        assert (through(block, wrong, x) - theirs).abs().max() > 0.1


def test_pre_norm_keeps_a_path_without_norms():
    norm, zero = LayerNorm(hidden_size=D), torch.zeros_like
    assert torch.equal(pre_norm(rows(), norm, zero), rows())
    assert torch.equal(post_norm(rows(), norm, zero), norm(rows()))


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="hidden_size=0"):
        LayerNorm(hidden_size=0)
    with pytest.raises(ValueError, match=r"\(2, 7, 1\).*=50"):
        LayerNorm(hidden_size=D)(torch.ones(2, 7, 1))  # would broadcast
    with pytest.raises(ValueError, match=r"\(2, 7, 50\).*=1$"):
        LayerNorm(hidden_size=1)(rows())
