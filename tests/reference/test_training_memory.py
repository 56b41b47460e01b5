"""Bytes of training against torch: optimizer states, gradients, adapters, and what is saved."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from snippets.common.adapt import adapt
from snippets.common.model_shape import ModelShape, shape_of
from snippets.peft.lora import LoRA
from snippets.peft.qlora import NF4Linear, quantize_linears
from snippets.reference.training_memory import (
    KEPT,
    activation_bytes,
    adapter_parameters,
    layer_activations,
    nf4_bytes,
    training_memory,
)
from tests.small_models import GOOD, MODELS, built

PLAIN = dict(
    method="full", precision="float32", optimizer="AdamW", context=17, batch=2, kept="no scores",
    dropout=False, rank=3, targets="all matrices",
)  # fmt: skip
OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
    "SGD with momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD": partial(torch.optim.SGD, lr=0.1),
}
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"GPT-2", "GPT-2 untied"}  # their heads' outputs need no copy: nothing was rotated
EXACT = [*FUSED, "Llama", "Llama 1", "Llama, biases, tied", "Mistral, no window", "Qwen2", "Qwen3"]


def small(name: str):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    return kind(config), shape_of(built(name)[1])


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def one_step(model: nn.Module, make) -> tuple[int, int, int]:
    """Bytes of weights, gradients and states of a model after a real step."""
    optimizer = make(trained(model))
    ids = torch.randint(101, (2, 17))
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    states = [s for state in optimizer.state.values() for s in state.values() if s is not None]
    return (
        sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()),
        sum(p.grad.nbytes for p in trained(model)),
        sum(s.nbytes for s in states if s.ndim),  # not the counter of steps
    )


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral", "DeepSeek-V2"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_full_training_holds_what_torch_holds(name, optimizer):
    model, shape = small(name)
    found = training_memory(shape, **PLAIN | {"optimizer": optimizer})
    weights, gradients, states = one_step(model, OPTIMIZERS[optimizer])
    assert (found["weights"], found["gradients"]) == (weights, gradients)
    assert found["optimizer"] == states and found["float32 copy"] == 0
    model.bfloat16()
    half = training_memory(shape, **PLAIN | {"optimizer": optimizer, "precision": "bfloat16"})
    assert [half[k] for k in ("weights", "gradients", "optimizer")] == list(
        one_step(model, OPTIMIZERS[optimizer])
    )


def test_mixed_precision_takes_the_sixteen_bytes_of_the_paper():
    found = training_memory(GOOD, **PLAIN | {"precision": "mixed"})
    state = sum(found[k] for k in ("weights", "gradients", "float32 copy", "optimizer"))
    assert state == 16 * found["trained"]
    assert found["total"] == state + found["activations"] + found["logits"]


@pytest.mark.parametrize(
    "targets, ends", {"all matrices": MATRICES, "attention": MATRICES[:4]}.items()
)
def test_lora_trains_what_the_module_trains(targets, ends):
    model, shape = small("Llama")
    adapt(model, ends, partial(LoRA, r=3, lora_alpha=6))
    found = training_memory(shape, **PLAIN | {"method": "LoRA", "targets": targets})
    assert found["trained"] == sum(p.numel() for p in trained(model))
    weights, gradients, states = one_step(model, OPTIMIZERS["AdamW"])
    assert (found["weights"], found["gradients"]) == (weights, gradients)
    assert found["optimizer"] == states


@pytest.mark.parametrize("shape", [(64, 256), (33, 7), (130, 130), (5, 1)])
def test_nf4_bytes_are_those_of_the_layer(shape):
    layer = NF4Linear(nn.Linear(*shape, bias=False))
    tables = layer.quant_map.nbytes + layer.nested_quant_map.nbytes
    assert nf4_bytes(shape[0] * shape[1]) + tables == layer.nbytes and tables == 1088


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "DeepSeek-V2, dense"])
def test_qlora_weighs_what_the_modules_weigh(name):
    model, shape = small(name)
    tables = 1088 * len(quantize_linears(model))
    latent = "DeepSeek" in name
    ends = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"] if latent else MATRICES[:4]
    found = training_memory(shape, **PLAIN | {"method": "QLoRA", "targets": "attention"})
    adapt(model, ends, partial(LoRA, r=3, lora_alpha=6))
    tensors = [*model.parameters(), *model.buffers()]
    extra = 0
    if latent:  # whose kv_b_proj is never called as a layer, so that it can't have an adapter here
        extra = 4 * 3 * (18 + 6 * 17) * 5
    assert found["weights"] == sum(t.nbytes for t in tensors) - tables + extra
    assert found["trained"] == adapter_parameters(shape, rank=3, targets="attention")


@pytest.mark.parametrize("s, b, d, h, layers", [(17, 2, 48, 6, 3), (1024, 4, 768, 12, 12)])
def test_activations_of_gpt_are_the_papers(s, b, d, h, layers):
    """Korthikanti et al. 2022: equations 1 and 2 with t = 1, table 2, and section 4.3."""
    shape = ModelShape(50257, d, layers, h, h, d // h, 4 * d, gated=False)
    about = dict(context=s, batch=b, precision="mixed", dropout=True)
    found = {kept: activation_bytes(shape, kept=kept, **about) for kept in KEPT}
    assert found["everything"]["layers"] == layers * s * b * (34 * d + 5 * h * s)
    assert found["no scores"]["layers"] == layers * s * b * 34 * d
    assert found["layer inputs"]["layers"] == layers * s * b * 2 * d + s * b * 34 * d
    assert found["no scores"]["ends"] == s * b * d + 4 * s * b * d + 4 * s * b * 50257


def saved(model: nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps between the passes, each storage once and no parameter."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address comes twice
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", sorted(EXACT))
def test_activations_are_what_autograd_saves(name):
    """To the byte, with what plain modules keep that fused ones don't, named here."""
    (model, shape), b, t = small(name), 2, 17
    ids = torch.randint(101, (b, t))
    about = dict(context=t, batch=b, precision="float32", dropout=False, kept="no scores")
    found = sum(activation_bytes(shape, **about).values())
    layers, d, h, k = shape.num_layers, shape.hidden_size, shape.num_heads, shape.head_dim
    norms = (shape.layer_norms * layers + 1) * (d + 1)  # the normed x, and 1 / rms
    if shape.head_norms:
        norms += layers * (h + shape.num_kv_heads) * (k + 1)
    a_token = norms + layers * h  # the sum that softmax divided by, one a head
    if name not in FUSED:
        a_token += layers * h * k  # heads side by side again: a copy
    tables = t * k if name not in FUSED else 2 * t  # cos and sin; or positions, in int64
    assert saved(model, ids) == found + 4 * b * t * (a_token + 2) + 4 * tables + 4


@pytest.mark.parametrize("name", sorted(MODELS.keys() - EXACT))
def test_other_models_save_at_least_that_and_not_much_more(name):
    (model, shape), ids = small(name), torch.randint(101, (2, 17))
    about = dict(context=17, batch=2, precision="float32", dropout=False, kept="no scores")
    found = sum(activation_bytes(shape, **about).values())
    assert found < saved(model, ids) < 1.6 * found


def test_only_layers_with_experts_keep_experts():
    shape = shape_of(built("DeepSeek-V2")[1])
    dense, sparse = (layer_activations(shape, experts=e) for e in (False, True))
    assert sparse - dense == 3 * (2 * 48 + 4 * 24) + 2 * 4 * 24 - 4 * 80
    about = dict(context=1, batch=1, precision="mixed", dropout=False)
    found = activation_bytes(shape, kept="no scores", **about)["layers"]
    assert found == 2 * (dense * (5 - shape.expert_layers) + sparse * shape.expert_layers)
    inputs = activation_bytes(shape, kept="layer inputs", **about)["layers"]
    assert inputs == 2 * (5 * 48 + max(dense, sparse))
