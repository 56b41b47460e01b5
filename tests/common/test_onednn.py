"""oneDNN's product stands under the layers it fits, gives what torch's gives, and goes again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

from snippets.common import onednn
from snippets.common.generate import generate
from snippets.common.onednn import onednn_products, product
from snippets.models.gemma3 import Gemma3, Gemma3Config
from snippets.models.gpt2 import GPT2, GPT2Config
from snippets.models.llama import Llama, LlamaConfig

ONEDNN = pytest.mark.skipif(not onednn.ONEDNN, reason="no oneDNN")


class Other(nn.Linear):
    """Its own product, which isn't to be replaced."""

    def forward(self, x):
        return -super().forward(x)


@pytest.fixture
def model() -> nn.ModuleDict:
    layers = {
        "plain": nn.Linear(7, 5),
        "bare": nn.Linear(7, 5, bias=False),
        "other": Other(7, 5),
        "short": nn.Linear(7, 5).bfloat16(),
        "long": nn.Linear(7, 5).double(),
        "away": nn.Linear(7, 5, device="meta"),
        "normed": weight_norm(nn.Linear(7, 5)),
    }
    return nn.ModuleDict(layers)


def products(run) -> list[str]:
    """The kernels that ran, of the two that multiply."""
    with torch.profiler.profile() as profile:
        run()
    names = [event.name for event in profile.events()]
    return [name for name in names if name in ("aten::linear", "mkldnn::_linear_pointwise")]


@ONEDNN
@torch.no_grad()
def test_it_stands_under_the_layers_that_it_fits(model):
    x = torch.randn(2, 7)
    with onednn_products(model) as layers:
        names = ("plain", "bare", "short", "long", "away")
        assert layers == [model[name] for name in names]
        for name in ("plain", "bare"):
            ran = products(lambda name=name: model[name](x))
            assert ran == ["mkldnn::_linear_pointwise"]
        assert products(lambda: model["other"](x)) == ["aten::linear"]
        others = {"short": x.bfloat16(), "long": x.double(), "away": x.to("meta")}
        for name, given in others.items():
            ran = products(lambda name=name, given=given: model[name](given))
            assert ran == ["aten::linear"], name
    assert products(lambda: model["plain"](x)) == ["aten::linear"]


@ONEDNN
@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "bare"])
@pytest.mark.parametrize("shape", [(1, 7), (7,), (2, 1, 7), (0, 7), (3, 4, 5, 7)])
def test_it_gives_the_same(model, name, shape):
    x, layer = torch.randn(shape), model[name]
    expected = layer(x)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    by_hand = (x.double()[..., None, :] * layer.weight.double()).sum(-1) + bias
    with onednn_products(model):
        assert products(lambda: layer(x)) == ["mkldnn::_linear_pointwise"]
        found = layer(x)
    assert_close(found, expected)
    assert_close(found, by_hand.float())


@ONEDNN
@torch.no_grad()
def test_views_are_multiplied_as_what_they_show():
    x = torch.randn(3, 14, 4).transpose(1, 2)[..., ::2]
    weight = torch.randn(14, 10).T[::2, ::2]
    assert not x.is_contiguous() and not weight.is_contiguous()
    assert_close(product(x, weight), F.linear(x, weight))


@torch.no_grad()
def test_what_else_is_multiplied_stays_with_torch():
    """Else oneDNN fails, without a word that helps."""
    x, layer = torch.randn(2, 7).bfloat16(), nn.Linear(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        with onednn_products(layer):
            assert torch.equal(layer(x), expected) and expected.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype"), onednn_products(layer):
        layer(x)


class Negative(torch.Tensor):
    """A weight that multiplies in its own way, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, given=(), named=None):
        plain = [x.as_subclass(torch.Tensor) if isinstance(x, cls) else x for x in given]
        result = function(*plain, **(named or {}))
        return -result if function is F.linear else result


@torch.no_grad()
def test_a_weight_of_another_class_keeps_its_product():
    x, weight = torch.randn(2, 7), torch.randn(5, 7)
    own = weight.as_subclass(Negative)
    assert_close(product(x, own), -F.linear(x, weight))


@torch.no_grad()
def test_a_weight_on_another_device_gets_torchs_error(model, unchecked):
    with pytest.raises(RuntimeError, match="device"), onednn_products(model):
        model["away"](torch.randn(2, 7))


def test_gradients_are_torchs(model):
    x = torch.randn(2, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(model["plain"](x).square().sum(), x)
    with onednn_products(model):
        (found,) = torch.autograd.grad(model["plain"](x).square().sum(), x)
    assert torch.equal(found, expected) and expected.abs().min() > 0


@torch.no_grad()
def test_everything_is_as_before_also_after_an_error(model, unchecked):
    before = [set(vars(layer)) for layer in model.values()]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), onednn_products(model):
        model["plain"](torch.randn(2, 6))
    assert [set(vars(layer)) for layer in model.values()] == before


@ONEDNN
@torch.no_grad()
def test_within_itself_it_does_nothing_more(model):
    x = torch.randn(2, 7)
    with onednn_products(model):
        with onednn_products(model) as layers:
            assert layers == []
        assert products(lambda: model["plain"](x)) == ["mkldnn::_linear_pointwise"]


@ONEDNN
@torch.no_grad()
def test_hooks_run_and_new_weights_are_read(model):
    layer, x, seen = model["plain"], torch.randn(2, 7), []
    hook = layer.register_forward_hook(lambda module, given, output: seen.append(output))
    with onednn_products(model):
        layer.weight = nn.Parameter(torch.ones(5, 7))
        found = layer(x)
    hook.remove()
    assert torch.equal(seen[0], found)
    assert_close(found, x.sum(-1, keepdim=True) + layer.bias)


def llama(tied: bool) -> Llama:
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Llama(LlamaConfig(**sizes, tie_word_embeddings=tied))


def gemma3(tied: bool) -> Gemma3:
    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return Gemma3(Gemma3Config(**sizes, tie_word_embeddings=tied))


def gpt2(tied: bool) -> GPT2:
    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return GPT2(GPT2Config(**sizes, tie_word_embeddings=tied))


@ONEDNN
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [llama, gemma3, gpt2])
def test_generate_writes_with_it(make, tied):
    model, ids = make(tied), torch.randint(31, (1, 5))
    ran = products(lambda: generate(model, ids, max_new_tokens=3))
    head = "mkldnn::_linear_pointwise"
    if make is gpt2:  # its layers are no `nn.Linear`
        assert ran == (["aten::linear"] * 2 * 4 + [head]) * 3
    else:  # of each layer seven, and the head, at each step
        assert ran == [head] * 3 * (2 * 7 + 1)
