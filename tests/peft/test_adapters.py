"""Adapter folders: peft's read here, ours read by peft, with equal outputs."""

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoHaConfig, LoKrConfig, LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from snippets.common.adapt import adapt, adapters, linear_layers, merge_and_unload, switch
from snippets.common.checkpoint import CheckpointError
from snippets.models.llama import Llama
from snippets.peft.adapters import load_adapter, save_adapter
from snippets.peft.dora import DoRA
from snippets.peft.loha import LoHa
from snippets.peft.lokr import LoKr
from snippets.peft.lora import LoRA
from snippets.peft.vera import SharedProjections, VeRA
from tests.against_peft import TARGETS, B, D, Stack, T, peft_model, trained
from tests.checkpoints import prompt, redraw

RANKS = {"rank_pattern": {"fc1": 7, "^inner.0": 2}, "alpha_pattern": {r"inner\.\d": 3}}
LORA = {"r": 4, "lora_alpha": 10}
CONFIGS = {
    "LoRA": LoraConfig(**LORA, target_modules=TARGETS),
    "rsLoRA": LoraConfig(**LORA, use_rslora=True, target_modules=TARGETS),
    "PiSSA": LoraConfig(**LORA, init_lora_weights="pissa", target_modules=TARGETS),
    "Gaussian start": LoraConfig(**LORA, init_lora_weights="gaussian", target_modules=TARGETS),
    "DoRA": LoraConfig(**LORA, use_dora=True, target_modules=TARGETS),
    "LoRA, ranks differ": LoraConfig(**LORA, **RANKS, target_modules=TARGETS),
    "LoRA, biases": LoraConfig(**LORA, bias="lora_only", target_modules=TARGETS),
    "LoRA, all biases": LoraConfig(**LORA, bias="all", target_modules=TARGETS),
    "LoRA, head whole": LoraConfig(
        **LORA, modules_to_save=["lm_head", "inner.1"], target_modules=TARGETS
    ),
    "LoRA, biases, head whole": LoraConfig(
        **LORA, bias="lora_only", modules_to_save=["lm_head"], target_modules=TARGETS
    ),
    "LoRA, expression": LoraConfig(**LORA, target_modules=r".*fc\d|inner\.0"),
    "LoRA, all linear": LoraConfig(**LORA, target_modules="all-linear", exclude_modules=["fc1"]),
    "LoRA, excluded": LoraConfig(**LORA, target_modules=TARGETS, exclude_modules=r"inner\..*"),
    "LoRA, dropout": LoraConfig(**LORA, lora_dropout=0.3, target_modules=TARGETS),
    "LoHa": LoHaConfig(r=4, alpha=10, target_modules=TARGETS),
    "LoHa, ranks differ": LoHaConfig(r=4, alpha=10, **RANKS, target_modules=TARGETS),
    "LoHa, head whole": LoHaConfig(
        r=4, alpha=10, modules_to_save=["lm_head"], target_modules=TARGETS
    ),
    "LoKr": LoKrConfig(r=5, alpha=12, target_modules=TARGETS),
    "LoKr, thin": LoKrConfig(r=2, alpha=7, target_modules=TARGETS),
    "LoKr, both thin": LoKrConfig(r=1, alpha=7, decompose_both=True, target_modules=TARGETS),
    "LoKr, factor": LoKrConfig(
        r=2, alpha=7, decompose_both=True, decompose_factor=12, target_modules=TARGETS
    ),
    "LoKr, ranks differ": LoKrConfig(r=4, alpha=10, **RANKS, target_modules=TARGETS),
    "VeRA": VeraConfig(r=6, d_initial=0.3, projection_prng_key=3, target_modules=TARGETS),
    "VeRA, pair not saved": VeraConfig(
        r=6, save_projection=False, projection_prng_key=3, target_modules=TARGETS
    ),
    "VeRA, biases": VeraConfig(r=6, bias="vera_only", target_modules=TARGETS),
}


def quiet(function, *inputs, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*inputs, **options)


def trained_by_peft(
    base: nn.Module, config, folder: Path | None = None, std: float = 0.3
) -> peft.PeftModel:
    """peft's model with random numbers in all that is trained, saved."""
    # Not to share the config: peft writes into it.
    theirs = peft_model(copy.deepcopy(base), copy.deepcopy(config))
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape) * std)
                if "magnitude" in name:
                    weight.abs_().add_(0.5)
    if folder is not None:
        theirs.save_pretrained(folder)
    return theirs.eval()


def read_by_peft(base: nn.Module, folder: Path, **options) -> peft.PeftModel:
    return quiet(peft.PeftModel.from_pretrained, copy.deepcopy(base), folder, **options).eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_pefts_and_back(config, tmp_path):
    base, x = Stack().eval(), torch.randn(B, T, D)
    theirs = quiet(trained_by_peft, base, config, tmp_path / "theirs")
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that peft writes is unknown
        assert load_adapter(ours, tmp_path / "theirs") is ours
    expected = theirs(x)
    assert (expected - base(x)).abs().max() > 0.05
    assert_close(ours(x), expected)
    assert trained(ours).keys() == trained(theirs).keys()
    assert not any(module.training for module in ours.modules())

    save_adapter(ours, tmp_path / "ours")
    assert_close(read_by_peft(base, tmp_path / "ours")(x), expected)
    names = load_file(tmp_path / "ours/adapter_model.safetensors")
    his = load_file(tmp_path / "theirs/adapter_model.safetensors")
    if config.to_dict().get("save_projection") is not False:
        assert names.keys() == his.keys()
    again = load_adapter(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(x), ours(x))
    # peft reads it to train on, with the same parameters.
    theirs = read_by_peft(base, tmp_path / "ours", is_trainable=True)
    assert trained(theirs).keys() == trained(ours).keys()
    if config.to_dict().get("bias", "none") == "none":
        switch(ours)
        if config.to_dict().get("init_lora_weights") != "pissa":
            assert torch.equal(ours(x), base(x))


def test_dropout_is_kept_and_applied(tmp_path):
    base, x = Stack().train(), torch.randn(B, T, D)
    trained_by_peft(base, CONFIGS["LoRA, dropout"], tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    assert adapters(ours)["fc1"].lora_dropout.p == 0.3
    assert (ours(x) - ours(x)).abs().max() > 0.01
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.3


def makers():
    shared = SharedProjections(linear_layers(Stack(), TARGETS).values(), r=6)
    return {
        "LoRA": partial(LoRA, **LORA),
        "DoRA": partial(DoRA, **LORA, use_rslora=True),
        "PiSSA": partial(LoRA, **LORA, pissa=True),
        "LoHa": partial(LoHa, r=4, alpha=10),
        "LoKr": partial(LoKr, r=2, alpha=7, decompose_both=True, decompose_factor=12),
        "VeRA": partial(VeRA, projections=shared),
    }


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "PiSSA", "LoHa", "LoKr", "VeRA"])
def test_trained_here_read_by_peft(kind, tmp_path):
    base, x = Stack(), torch.randn(B, T, D)
    ours = copy.deepcopy(base)
    adapt(ours, "all-linear", makers()[kind], modules_to_save=["lm_head"])
    optimizer = torch.optim.SGD(trained(ours).values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        ours(x).square().mean().backward()
        optimizer.step()
    save_adapter(ours, tmp_path)
    assert_close(read_by_peft(base, tmp_path)(x), ours(x))
    assert (ours(x) - base(x)).abs().max() > 1e-3
    assert (tmp_path / "adapter_config.json").read_text().endswith("}\n")


# Of a Llama


LLAMA = dict(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
LINEAR = ["q_proj", "v_proj", "down_proj"]
ON_LLAMA = {
    "LoRA": LoraConfig(**LORA, target_modules=LINEAR),
    "DoRA": LoraConfig(**LORA, use_dora=True, target_modules=LINEAR),
    "all linear": LoraConfig(**LORA, target_modules="all-linear"),
    "the head too": LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]),
    "head and norm whole": LoraConfig(
        **LORA, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]
    ),
    "two layers": LoraConfig(**LORA, target_modules=LINEAR, layers_to_transform=[1, 3]),
    "one layer": LoraConfig(
        **LORA, target_modules=LINEAR, layers_to_transform=2, layers_pattern="layers"
    ),
    "ranks by layer": LoraConfig(
        **LORA, target_modules=LINEAR, rank_pattern={r"layers\.[01]\..*": 2}
    ),
    "LoHa": LoHaConfig(r=4, alpha=10, target_modules=LINEAR),
    "LoKr": LoKrConfig(r=2, alpha=7, decompose_both=True, target_modules=LINEAR),
    "VeRA": VeraConfig(r=6, target_modules=LINEAR),
}


@pytest.mark.parametrize("config", ON_LLAMA.values(), ids=ON_LLAMA)
def test_on_llama(config, tmp_path):
    base = redraw(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    base.save_pretrained(tmp_path / "base")
    theirs = quiet(trained_by_peft, base, config, tmp_path / "adapter", std=0.1)
    ids = prompt(101, 2, 9)
    ours = load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = theirs(ids).logits
    assert (expected - base(ids).logits).abs().max() > 0.01
    assert_close(ours(ids), expected)
    save_adapter(ours, tmp_path / "ours")
    assert_close(read_by_peft(base, tmp_path / "ours")(ids).logits, expected)
    if "rank_pattern" not in config.to_dict() or not config.rank_pattern:
        before = ours(ids)
        plain = merge_and_unload(ours)
        assert_close(plain(ids), before)
        assert (
            plain.state_dict().keys()
            == Llama.from_pretrained(tmp_path / "base").state_dict().keys()
        )


WITH_TABLE = {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}
TABLES = {
    "LoRA": LoraConfig(**LORA, **WITH_TABLE),
    "LoKr": LoKrConfig(r=2, alpha=7, **WITH_TABLE),
    "VeRA": VeraConfig(r=6, **WITH_TABLE),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", TABLES.values(), ids=TABLES)
def test_a_tied_head_keeps_the_frozen_table(config, tied, tmp_path):
    """peft trains a copy of the table; a head that shares the matrix still has the old one."""
    sizes = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)
    base = redraw(transformers.LlamaForCausalLM(sizes))
    base.save_pretrained(tmp_path / "base")
    theirs = quiet(trained_by_peft, base, config, tmp_path / "adapter", std=0.1)
    ids = prompt(101, 2, 9)
    ours = load_adapter(Llama.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    expected = theirs(ids).logits
    assert_close(ours(ids), expected)
    save_adapter(ours, tmp_path / "ours")
    assert_close(quiet(read_by_peft, base, tmp_path / "ours")(ids).logits, expected)
    if not tied:
        assert_close(merge_and_unload(ours)(ids), expected)
        return
    with pytest.raises(ValueError, match="embed_tokens: trained without the head that is tied"):
        merge_and_unload(ours)
    assert_close(ours(ids), expected)  # nothing is half merged
    switch(ours)
    assert_close(merge_and_unload(ours)(ids), base(ids).logits)


# Names and patterns


class Twins(nn.Module):
    """One path is the end of another."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(D, D + 3)
        self.deep = nn.ModuleDict({"fc": nn.Linear(D + 3, D), "norm": nn.LayerNorm(D)})
        self.norm = nn.LayerNorm(D)

    def forward(self, x):
        x = self.deep["norm"](self.deep["fc"](torch.tanh(self.fc(x))))
        return self.norm(torch.tanh(x))


def test_a_path_that_is_another_ones_end_is_written_so_that_peft_takes_it_alone(tmp_path):
    base, x = Twins(), torch.randn(B, D)
    ours = copy.deepcopy(base)
    adapt(ours, "fc", partial(LoRA, **LORA), modules_to_save=["deep.norm"])
    nn.init.normal_(ours.fc.lora_B.weight)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"
    assert_close(read_by_peft(base, tmp_path)(x), ours(x))
    assert list(adapters(load_adapter(base, tmp_path))) == ["fc"]


def test_ranks_of_a_path_that_is_another_ones_end(tmp_path):
    base, x = Twins(), torch.randn(B, D)
    ours = copy.deepcopy(base)
    ranks = {id(ours.fc): 2, id(ours.deep["fc"]): 5}
    adapt(ours, ["fc"], lambda layer: LoRA(layer, r=ranks[id(layer)], lora_alpha=ranks[id(layer)]))
    for layer in adapters(ours).values():
        nn.init.normal_(layer.lora_B.weight)
    save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^deep\.fc": 5} and config["r"] == 2
    assert config["alpha_pattern"] == {r"^deep\.fc": 5} and config["target_modules"] == [
        "fc",
        "deep.fc",
    ]
    assert_close(read_by_peft(base, tmp_path)(x), ours(x))
    assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), ours(x))


def test_modules_trained_whole_whose_path_is_another_ones_end(tmp_path):
    base, x = Twins(), torch.randn(B, D)
    ours = copy.deepcopy(base)
    adapt(ours, ["fc"], partial(LoRA, **LORA), modules_to_save=["norm"])
    assert len([n for n in trained(ours) if "norm" in n]) == 4
    for weight in trained(ours).values():
        nn.init.normal_(weight)
    save_adapter(ours, tmp_path)
    assert_close(read_by_peft(base, tmp_path)(x), ours(x))


def test_several_in_one_model(tmp_path):
    base, x, expected = Stack().eval(), torch.randn(B, T, D), {}
    for name in ("LoRA, head whole", "DoRA", "VeRA"):
        theirs = trained_by_peft(base, CONFIGS[name], tmp_path / name)
        expected[name] = theirs(x)
    ours = copy.deepcopy(base)
    for name in expected:
        load_adapter(ours, tmp_path / name, name=name)
        assert_close(ours(x), expected[name])  # the last is the one that is on
    for name, wanted in expected.items():
        switch(ours, name)
        assert_close(ours(x), wanted)
        save_adapter(ours, tmp_path / "again", name=name)
        assert_close(read_by_peft(base, tmp_path / "again")(x), wanted)
    switch(ours)
    assert torch.equal(ours(x), base(x))


# Refused


@pytest.fixture
def folder(tmp_path) -> Path:
    trained_by_peft(Stack(), CONFIGS["LoRA"], tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuses(folder: Path, said: str, model: nn.Module | None = None) -> None:
    model = Stack() if model is None else model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        load_adapter(model, folder)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"peft_type": "IA3"},
            "peft_type='IA3' isn't supported; this reads LORA, LOHA, LOKR, VERA",
        ),
        ({"peft_type": None}, "peft_type=None isn't supported"),
        ({"r": 3}, r"fc1.lora_A.weight is \(4, 20\), model and config want \(3, 20\)"),
        ({"r": "4"}, "r='4' isn't of type int"),
        ({"r": 0}, "r=0 is below 1"),
        ({"lora_alpha": [1]}, r"lora_alpha=\[1\] isn't of type int | float"),
        ({"use_dora": True}, "missing: base_model.model.fc1.lora_magnitude_vector"),
        ({"target_modules": ["fc1", "fc9"]}, "target_modules: 'fc9' matches none of 6 modules"),
        ({"target_modules": "fc9"}, "target_modules: 'fc9' matches none of 6 modules"),
        ({"target_modules": None}, "target_modules=None"),
        ({"target_modules": ["fc1"]}, "unexpected: base_model.model.fc2.lora_A.weight, "),
        ({"target_modules": [*TARGETS, "inner.1"]}, "inner.1 is a LayerNorm, not nn.Linear"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matches nothing"),
        ({"modules_to_save": ["lm_head"]}, "missing: base_model.model.lm_head.weight, "),
        ({"exclude_modules": ["fc1"]}, "unexpected: base_model.model.fc1.lora_A.weight, "),
        ({"exclude_modules": ".*"}, "no layer of 6 modules is left of"),
        ({"bias": "some"}, "bias='some' isn't one of"),
        ({"bias": "all"}, "missing: base_model.model.fc1.base_layer.bias, "),
        ({"layers_to_transform": [1]}, "no layer of 6 modules is left"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' isn't supported: it changes W"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' isn't"),
        ({"lora_bias": True}, "not supported: lora_bias=True"),
        ({"trainable_token_indices": [3]}, r"not supported: trainable_token_indices=\[3\]"),
        (
            {"target_parameters": ["a"], "use_qalora": True},
            r"target_parameters=\['a'\], use_qalora",
        ),
        ({"rank_pattern": {"fc1": 6}}, r"fc1.lora_A.weight is \(4, 20\), model .* want \(6, 20\)"),
    ],
)
def test_refuses_an_option_by_name(changes, said, folder, unchecked):
    edit(folder, **changes)
    if "layers_to_transform" in changes:
        edit(folder, target_modules=["0"])
    refuses(folder, said)


def test_refuses_a_model_that_does_not_fit(folder, unchecked):
    wider = Stack()
    wider.fc2 = nn.Linear(30, 12)
    refuses(folder, r"fc2.lora_A.weight is \(4, 28\), model and config want \(4, 30\)", wider)
    missing = Stack()
    del missing.fc2
    refuses(folder, "target_modules: 'fc2' matches none of 5 modules", missing)
    loaded = load_adapter(Stack(), folder)
    with pytest.raises(CheckpointError, match="there is an adapter 'default' on this layer"):
        load_adapter(loaded, folder)


def test_an_adapted_head_that_peft_saves_must_be_the_models_own(tmp_path):
    base = redraw(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    quiet(trained_by_peft, base, ON_LLAMA["the head too"], tmp_path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")[key], base.lm_head.weight)
    said = f"{key} isn't this model's: it is of another base"
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    refuses(tmp_path, said, base)
    base.lm_head = nn.Linear(48, 103)
    refuses(tmp_path, said, base)


def test_pissa_needs_a_plain_matrix_of_its_rank(tmp_path, unchecked):
    base = Stack()
    quiet(trained_by_peft, base, CONFIGS["PiSSA"], tmp_path / "pissa")
    quiet(trained_by_peft, base, CONFIGS["LoRA"], tmp_path / "lora")
    # Under another adapter, where `start_from_principal_part` would fail on a model half changed.
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "lora", name="first")
    refuses(tmp_path / "pissa", "fc1: PiSSA changes W: LoRA has no plain matrix", loaded)
    small = nn.ModuleDict({"fc": nn.Linear(20, 3)})
    quiet(trained_by_peft, small, LoraConfig(r=4, target_modules=["fc"]), tmp_path / "high")
    edit(tmp_path / "high", init_lora_weights="pissa")
    refuses(tmp_path / "high", "fc: PiSSA: r=4 is above the rank of W, 3 x 20", small)
    small = nn.ModuleDict({"fc": nn.Linear(20, 4)})  # the highest that there can be
    quiet(trained_by_peft, small, LoraConfig(r=4, target_modules=["fc"]), tmp_path / "high")
    edit(tmp_path / "high", init_lora_weights="pissa")
    assert load_adapter(small, tmp_path / "high").fc.pissa


def test_a_w_that_pissa_changed_is_no_base_for_another_adapter(tmp_path, unchecked):
    base = Stack()
    quiet(trained_by_peft, base, CONFIGS["PiSSA"], tmp_path / "pissa")
    config = LoraConfig(**LORA, target_modules=["lm_head"])
    quiet(trained_by_peft, base, config, tmp_path / "elsewhere")
    loaded = load_adapter(base, tmp_path / "pissa", name="first")
    said = "fc1: W lacks what PiSSA took out of it for 'first'"
    refuses(tmp_path / "elsewhere", said, loaded)
    refuses(tmp_path / "pissa", said, loaded)


def test_refuses_files(tmp_path, folder):
    refuses(tmp_path / "nowhere", "there is no folder .*nowhere")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refuses(folder, "adapter_model.safetensors is damaged or cut short")
    file.rename(folder / "adapter_model.bin")
    refuses(folder, "there is no .*adapter_model.bin: pickle files can run code when read")
    (folder / "adapter_model.bin").unlink()
    refuses(folder, "there is no .*adapter_model.safetensors$")
    (folder / "adapter_config.json").write_text("[")
    refuses(folder, "adapter_config.json isn't JSON")
    (folder / "adapter_config.json").unlink()
    refuses(folder, "there is no .*adapter_config.json")


def test_refuses_tensors_by_name(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.fc1.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    refuses(folder, f"doesn't fit the model; missing: {name}$")
    save_file(tensors | {"fc1.extra": torch.ones(1)}, file)
    refuses(folder, "doesn't fit the model; unexpected: fc1.extra$")


def test_a_vera_folder_needs_the_pair_that_it_promises(tmp_path):
    quiet(trained_by_peft, Stack(), CONFIGS["VeRA, pair not saved"], tmp_path)
    edit(tmp_path, save_projection=True)
    refuses(tmp_path, "missing: base_model.vera_A, base_model.vera_B")
    quiet(trained_by_peft, Stack(), CONFIGS["VeRA"], tmp_path)
    edit(tmp_path, r=5)
    refuses(tmp_path, r"vera_lambda_d is \(6,\), model and config want \(5,\)")


def test_a_pair_that_is_saved_is_used(tmp_path):
    """And not that of the seed: other machines may draw otherwise."""
    base, x = Stack().eval(), torch.randn(B, D)
    theirs = trained_by_peft(base, CONFIGS["VeRA"], tmp_path)
    edit(tmp_path, projection_prng_key=99)
    assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), theirs(x))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"new_option": 3}, "not read: new_option"),
        ({"rank_dropout": 0.1}, "not applied when training goes on: rank_dropout=0.1"),
    ],
)
def test_reports_what_it_does_not_read(changes, said, folder):
    edit(folder, **changes)
    with pytest.warns(UserWarning, match=said) as caught:
        load_adapter(Stack(), folder)
    assert len(caught) == 1
    edit(folder, **dict.fromkeys(changes, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(Stack(), folder)


def test_refuses_to_save_what_a_folder_cannot_hold(tmp_path, unchecked):
    def adapted(make=None, **options):
        model = Stack()
        adapt(model, TARGETS, make or partial(LoRA, **LORA), **options)
        return model

    with pytest.raises(ValueError, match="no adapter 'other' in this model"):
        save_adapter(adapted(), tmp_path, name="other")
    with pytest.raises(ValueError, match="no adapter 'default'"):
        save_adapter(Stack(), tmp_path)
    model = adapted()
    model.lm_head.requires_grad_(True)
    said = "trained, but no part of 'default': lm_head.weight, lm_head.bias"
    with pytest.raises(ValueError, match=said):
        save_adapter(model, tmp_path)
    drops = iter([0.1, 0.2, 0.2])
    model = adapted(lambda layer: LoRA(layer, **LORA, lora_dropout=next(drops)))
    with pytest.raises(ValueError, match=r"lora_dropout differs between layers: \[0.1, 0.2\]"):
        save_adapter(model, tmp_path)
    kinds = iter([LoRA, DoRA, DoRA])
    model = adapted(lambda layer: next(kinds)(layer, **LORA))
    with pytest.raises(ValueError, match=r"use_dora differs between layers: \[False, True\]"):
        save_adapter(model, tmp_path)
    makes = iter([partial(LoRA, **LORA), *2 * [partial(LoHa, r=2, alpha=3)]])
    model = adapted(lambda layer: next(makes)(layer))
    with pytest.raises(ValueError, match=r"several methods: \['LoHa', 'LoRA'\]"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="peft's LOHA has no bias='all'"):
        save_adapter(adapted(partial(LoHa, r=2, alpha=3), bias="all"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_compiled(folder, unchecked):
    ours, x = load_adapter(Stack(), folder), torch.randn(B, D)
    assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))


def test_in_bfloat16(tmp_path):
    base = Stack().bfloat16().eval()
    theirs = trained_by_peft(base, CONFIGS["LoRA"], tmp_path)
    x = torch.randn(B, D).bfloat16()
    assert_close(load_adapter(copy.deepcopy(base), tmp_path)(x), theirs(x))
