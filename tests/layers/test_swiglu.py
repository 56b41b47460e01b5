"""Gated feed-forward layers against Llama, Gemma, T5, Phi-3, torch.nn and plain loops.

Sizes are such that swapped axes show: no two of b t d f are equal.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, GemmaConfig, LlamaConfig, Phi3Config, T5Config
from transformers.activations import ACT2FN
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from snippets.layers.swiglu import ACTIVATIONS, MLP, GatedMLP, llama_intermediate_size

B, T, D, W = 2, 7, 24, 40  # W: intermediate size, since F is torch's
SIZES = {"hidden_size": D, "intermediate_size": W}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def filled(layer: nn.Module, dtype=torch.float32) -> nn.Module:
    """Weights of a size at which activations bend and the variants differ; biases, too."""
    for p in layer.parameters():
        nn.init.normal_(p, std=1.5 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.5)
    return layer.to(dtype)


def gated(act: str = "silu", dtype=torch.float32, **options) -> GatedMLP:
    return filled(GatedMLP(**SIZES, hidden_act=act, **options), dtype)


def llama(ours: GatedMLP, act: str = "silu", bias: bool = False) -> LlamaMLP:
    """The same weights in transformers' layer; strict: names and shapes are Llama's."""
    config = LlamaConfig(**SIZES, hidden_act=act, mlp_bias=bias, num_attention_heads=2)
    theirs = LlamaMLP(config)
    theirs = theirs.to(ours.up_proj.weight.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def gemma(ours: GatedMLP) -> GemmaMLP:
    theirs = GemmaMLP(GemmaConfig(**SIZES)).to(ours.up_proj.weight.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def matrices(layer: GatedMLP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_llama(act, bias):
    ours, x = gated(act, bias=bias), torch.randn(B, T, D)
    assert sum(name.endswith("bias") for name in ours.state_dict()) == 3 * bias
    assert_close(ours(x), llama(ours, act, bias)(x))


def test_equals_gemma_which_has_the_tanh_form():
    ours, x = gated("gelu_pytorch_tanh"), torch.randn(B, T, D)
    assert_close(ours(x), gemma(ours)(x))
    erf = gated("gelu")
    erf.load_state_dict(ours.state_dict())
    assert (erf(x) - ours(x)).abs().max() > 1e-3  # or the comparison would see neither


@pytest.mark.parametrize("dtype", HALF)
def test_equals_llama_and_gemma_to_the_bit_in_half_precision(dtype):
    x = torch.randn(B, T, D, dtype=dtype)
    for ours, model in ((gated("silu", dtype), llama), (gated("gelu_pytorch_tanh", dtype), gemma)):
        y = ours(x)
        assert y.dtype == dtype
        assert torch.equal(y, model(ours)(x))


def test_gradients_equal_those_of_llama():
    ours, x = gated(bias=True), torch.randn(B, T, D)
    theirs, upstream = llama(ours, bias=True), torch.randn(B, T, D)
    for layer in (ours, theirs):
        layer(x).backward(upstream)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert_close(p.grad, q.grad, msg=name)


def test_equals_t5_in_which_wi_0_is_the_gate():
    ours, x = gated("gelu_pytorch_tanh"), torch.randn(B, T, D)
    config = T5Config(d_model=D, d_ff=W, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = T5DenseGatedActDense(config)
    names = ("wi_0.weight", "wi_1.weight", "wo.weight")
    theirs.load_state_dict(dict(zip(names, matrices(ours), strict=True)))
    assert_close(ours(x), theirs(x))


def test_equals_phi3_which_packs_the_gate_first():
    ours, x = filled(GatedMLP(**SIZES)), torch.randn(B, T, D)  # the default is silu
    gate, up, down = matrices(ours)
    theirs = Phi3MLP(Phi3Config(**SIZES, pad_token_id=0))
    packed = torch.cat([gate, up])
    theirs.load_state_dict({"gate_up_proj.weight": packed, "down_proj.weight": down})
    assert_close(ours(x), theirs(x))


def test_equals_torch_glu_which_wants_the_gate_last():
    ours, x = gated("sigmoid"), torch.randn(B, T, D)
    gate, up, down = matrices(ours)
    assert_close(ours(x), F.glu(x @ torch.cat([up, gate]).T) @ down.T)


def test_without_an_activation_it_is_bilinear():
    ours, x = gated("linear"), torch.randn(B, T, D)
    gate, up, down = matrices(ours)
    form = torch.einsum("if,fj,fk->ijk", down, gate, up)
    assert_close(ours(x), F.bilinear(x, x, form), rtol=1e-5, atol=1e-4)  # sums of d² terms


PLAIN = {
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_pytorch_tanh": lambda z: (
        z / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    ),
    "quick_gelu": lambda z: z / (1 + math.exp(-1.702 * z)),
    "relu": lambda z: max(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "linear": lambda z: z,
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_equals_the_formula_in_loops(act):
    ours, x = gated(act, torch.float64, bias=True), torch.randn(3, D, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for row in range(3):
        expected[row] = ours.down_proj.bias
        for unit in range(W):
            g = ours.gate_proj.weight[unit] @ x[row] + ours.gate_proj.bias[unit]
            u = ours.up_proj.weight[unit] @ x[row] + ours.up_proj.bias[unit]
            h = PLAIN[act](g.item()) * u
            expected[row] += h * ours.down_proj.weight[:, unit]
    assert_close(ours(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_have_the_names_of_transformers(act, dtype):
    z = torch.linspace(-9, 9, 1001).to(dtype)
    assert torch.equal(ACTIVATIONS[act](z), ACT2FN[act](z))


def test_the_three_gelus_are_as_far_apart_as_the_comment_says():
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    exact = ACTIVATIONS["gelu"](z)
    tanh = (ACTIVATIONS["gelu_pytorch_tanh"](z) - exact).abs().max()
    quick = (ACTIVATIONS["quick_gelu"](z) - exact).abs().max()
    assert 4.7e-4 < tanh < 5e-4
    assert 0.020 < quick < 0.021


@pytest.mark.parametrize("act", sorted(ACTIVATIONS.keys() - {"linear"}))
def test_gate_and_up_are_not_exchangeable(act):
    ours, x = gated(act), torch.randn(B, T, D)
    weights, y = ours.state_dict(), ours(x)
    gate, up = weights["gate_proj.weight"].clone(), weights["up_proj.weight"].clone()
    ours.load_state_dict(weights | {"gate_proj.weight": up, "up_proj.weight": gate})
    assert (ours(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("act", sorted(ACTIVATIONS.keys() - {"sigmoid", "linear"}))
def test_two_units_multiply_two_features(act):
    layer = GatedMLP(hidden_size=D, intermediate_size=2, hidden_act=act)
    for p in layer.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        layer.gate_proj.weight[:, 3] = torch.tensor([1.0, -1.0])
        layer.up_proj.weight[:, 5] = 1
        layer.down_proj.weight[8] = torch.tensor([1.0, -1.0])
    x = torch.randn(B, T, D)
    expected = torch.zeros_like(x)
    expected[..., 8] = x[..., 3] * x[..., 5]
    assert_close(layer(x), expected)


def test_the_output_grows_with_the_square_of_the_input():
    x = torch.randn(B, T, D)
    layer, plain = gated("relu"), filled(MLP(**SIZES))
    # Products are 9 times as large, and so are the errors of their sums.
    assert_close(layer(3 * x), 9 * layer(x), rtol=1e-5, atol=9e-5)
    assert_close(plain(3 * x), 3 * plain(x))


@pytest.mark.parametrize("layer", [GatedMLP, MLP])
def test_rows_are_alone(layer):
    layer, x = filled(layer(**SIZES)), torch.randn(B, T, D)
    y = layer(x)
    assert_close(layer(x[1, 3]), y[1, 3])  # also without batch and token axes
    changed = x.clone()
    changed[:, 4] += 1
    others = [0, 1, 2, 3, 5, 6]
    assert_close(layer(changed)[:, others], y[:, others])
    assert ((layer(changed) - y)[:, 4].abs().amax(-1) > 0.1).all()


@pytest.mark.parametrize("bias", [False, True])
def test_the_ungated_layer_equals_torch(bias):
    ours, x = filled(MLP(**SIZES, bias=bias)), torch.randn(B, T, D)
    up, down = nn.Linear(D, W, bias=bias), nn.Linear(W, D, bias=bias)
    up.load_state_dict(ours.up_proj.state_dict())
    down.load_state_dict(ours.down_proj.state_dict())
    assert_close(ours(x), nn.Sequential(up, nn.ReLU(), down)(x))


def test_the_ungated_layer_equals_clips():
    ours, x = filled(MLP(**SIZES, hidden_act="quick_gelu", bias=True)), torch.randn(B, T, D)
    theirs = CLIPMLP(CLIPVisionConfig(**SIZES))
    names = {"up_proj": "fc1", "down_proj": "fc2"}
    renamed = {
        f"{names[part]}.{kind}": p
        for (part, kind), p in ((name.split("."), p) for name, p in ours.state_dict().items())
    }
    theirs.load_state_dict(renamed)
    assert_close(ours(x), theirs(x))


def test_two_thirds_of_the_width_weigh_the_same():
    three = GatedMLP(hidden_size=D, intermediate_size=64)
    two = MLP(hidden_size=D, intermediate_size=96)
    assert sum(p.numel() for p in three.parameters()) == sum(p.numel() for p in two.parameters())


@pytest.mark.parametrize(
    "rule, published",
    [
        ({"hidden_size": 4096}, 11008),  # Llama 1 and 2, 7B
        ({"hidden_size": 5120}, 13824),  # 13B
        ({"hidden_size": 6656}, 17920),  # 33B
        ({"hidden_size": 8192}, 22016),  # Llama 1, 65B
        ({"hidden_size": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"hidden_size": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
        ({"hidden_size": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),
        ({"hidden_size": 16384, "multiple_of": 4096, "ffn_dim_multiplier": 1.2}, 53248),
        ({"hidden_size": 288, "multiple_of": 32}, 768),  # exact: nothing to round
        # Made up: int(1.3 * int(2 * 40 / 3)) is 33, and 34 without the first int.
        ({"hidden_size": 10, "multiple_of": 1, "ffn_dim_multiplier": 1.3}, 33),
    ],
)
def test_intermediate_sizes_of_published_llamas(rule, published):
    assert llama_intermediate_size(**rule) == published


def test_shapes_at_full_size():
    with torch.device("meta"):
        layer = GatedMLP(hidden_size=4096, intermediate_size=14336)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "gate_proj.weight": (14336, 4096),
        "up_proj.weight": (14336, 4096),
        "down_proj.weight": (4096, 14336),
    }


@pytest.mark.parametrize("layer", [GatedMLP, MLP])
def test_refuses_what_it_does_not_know(layer):
    with pytest.raises(ValueError, match=r"hidden_act='gelu_new'; known: silu, gelu, "):
        layer(**SIZES, hidden_act="gelu_new")
    with pytest.raises(ValueError, match=r"hidden_size=0, intermediate_size=40"):
        layer(hidden_size=0, intermediate_size=W)
    with pytest.raises(ValueError, match=r"hidden_size=24, intermediate_size=0"):
        layer(hidden_size=D, intermediate_size=0)


def test_refuses_another_layers_weights():
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_proj\.weight"):
        gated().load_state_dict(MLP(**SIZES).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for gate_proj\.weight"):
        gated().load_state_dict(GatedMLP(hidden_size=D, intermediate_size=W + 1).state_dict())
