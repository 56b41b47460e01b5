"""The checkpoint loader: what it reads, and that it refuses all the rest by name."""

import json
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from snippets.common.checkpoint import (
    INDEX,
    CheckpointError,
    drop_tied_head,
    filled,
    is_a,
    load_weights,
    parse_config,
    read_config,
    read_tensors,
    weight_files,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 500000.0}


@dataclass(frozen=True)
class Config:
    hidden_size: int
    hidden_act: str
    eps: float = 1e-6
    tied: bool = False
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    kinds: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act={self.hidden_act!r} isn't supported")


@dataclass(frozen=True)
class NestedRope:
    rope_parameters: dict[str, Any]


GOOD = {"model_type": "toy", "hidden_size": 8, "hidden_act": "silu"}


def config(folder: Path, found: dict | str | bytes, config_class=Config):
    text = json.dumps(found) if isinstance(found, dict) else found
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    return read_config(folder, config_class, model_types=("toy", "toy2"))


def refused(folder: Path, found, said: str, config_class=Config) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        config(folder, found, config_class)
    assert str(folder / "config.json") in str(caught.value)


# config.json


def test_a_config_is_read_as_the_dataclass(tmp_path):
    found = config(tmp_path, GOOD | {"eps": 1, "tied": True, "head_dim": 5, "kinds": ["a"]})
    assert found == Config(8, "silu", 1, True, 5, kinds=["a"])
    assert config(tmp_path, GOOD | {"model_type": "toy2", "head_dim": None}) == Config(8, "silu")


@pytest.mark.parametrize(
    "found, said",
    [
        ('{"hidden_size": 8,', "isn't JSON: Expecting property name"),
        ("", "isn't JSON"),
        (b'{"hidden_act": "\xff"}', "isn't JSON: .*utf-8"),
        ("[1, 2]", "holds no JSON object"),
        ({}, "model_type=None isn't supported; this class reads 'toy', 'toy2'"),
        (GOOD | {"model_type": "llama"}, "model_type='llama' isn't supported"),
        ({"model_type": "toy"}, "lacks hidden_size, hidden_act$"),
        (GOOD | {"hidden_size": "8"}, "hidden_size='8' isn't of type int"),
        (GOOD | {"hidden_size": 8.5}, r"hidden_size=8\.5 isn't of type int"),
        (GOOD | {"hidden_size": True}, "hidden_size=True isn't of type int"),
        (GOOD | {"hidden_size": None}, "hidden_size=None isn't of type int"),
        (GOOD | {"tied": 1}, "tied=1 isn't of type bool"),
        (GOOD | {"tied": "false"}, "tied='false' isn't of type bool"),
        (GOOD | {"head_dim": "64"}, r"head_dim='64' isn't of type int \| None"),
        (GOOD | {"kinds": "full"}, "kinds='full' isn't of type list"),
        (GOOD | {"hidden_act": "relu"}, "hidden_act='relu' isn't supported"),
        (GOOD | {"quantization_config": {"bits": 4}}, "quantization_config isn't supported"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(tmp_path, found, said):
    refused(tmp_path, found, said)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere/config\.json"):
        read_config(tmp_path / "nowhere", Config, model_types=("toy",))


def test_unknown_keys_are_reported_and_not_fatal(tmp_path):
    with pytest.warns(UserWarning, match=r"config\.json: not read: logit_scale, zebra$") as caught:
        found = config(tmp_path, GOOD | {"zebra": [1], "logit_scale": 0.5, "use_cache": True})
    assert found == Config(8, "silu") and len(caught) == 1


@pytest.mark.parametrize(
    "quiet",
    [
        {"sliding_window": None, "use_sliding_window": False, "rope_interleaved": False},
        {"architectures": ["Toy"], "torch_dtype": "float16", "eos_token_id": [1, 2]},
        {"quantization_config": None},
        {"rope_scaling": None},
    ],
)
def test_what_changes_nothing_is_not_reported(tmp_path, quiet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config(tmp_path, GOOD | quiet) == Config(8, "silu")


def test_a_key_that_is_zero_is_reported(tmp_path):
    with pytest.warns(UserWarning, match="not read: logit_scale"):
        config(tmp_path, GOOD | {"logit_scale": 0})


@pytest.mark.parametrize(
    "value, hint, fits",
    [
        (1, float, True),
        (1.5, float, True),
        (1.5, int, False),
        (True, float, False),
        (False, bool, True),
        (None, int | None, True),
        (True, int | None, False),
        ({"a": 1}, dict[str, Any], True),
        ([1], dict[str, Any], False),
        ("x", Any, True),
    ],
)
def test_types(value, hint, fits):
    assert is_a(value, hint) is fits


# A config within a config


@dataclass(frozen=True)
class Tower:
    image_size: int
    depth: int = 2
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    INERT: ClassVar[set[str]] = {"projection_dim"}

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} is below 1")


@dataclass(frozen=True)
class Composite:
    vision_config: Tower
    spare_config: Tower | None = None
    text_config: Config = Config(4, "silu")
    rest: dict[str, Any] | None = None


BOTH = {"model_type": "toy", "vision_config": {"image_size": 8, "projection_dim": 7}}


def test_an_object_becomes_the_dataclass_of_its_field(tmp_path):
    more = {"text_config": {"hidden_size": 3, "hidden_act": "silu"}, "rest": {"image_size": 1}}
    found = config(tmp_path, BOTH | more | {"spare_config": None}, Composite)
    assert found == Composite(Tower(8), None, Config(3, "silu"), {"image_size": 1})
    spare = {"image_size": 9, "rope_parameters": PLAIN, "rope_theta": None}
    found = config(tmp_path, BOTH | {"spare_config": spare}, Composite)
    assert found == Composite(Tower(8), Tower(9, rope_theta=500000.0))


@pytest.mark.parametrize(
    "part, said",
    [
        ({}, "json: vision_config lacks image_size$"),
        ({"image_size": "8"}, "json: vision_config: image_size='8' isn't of type int$"),
        ({"image_size": 0}, "json: vision_config: image_size=0 is below 1$"),
        ([8], r"json: vision_config=\[8\] isn't of type Tower$"),
        (None, "json: vision_config=None isn't of type Tower$"),
        (
            {"image_size": 8, "rope_theta": 1.0, "rope_parameters": PLAIN},
            "json: vision_config: these contradict each other: rope_theta=1.0",
        ),
        (
            {"image_size": 8, "quantization_config": {"bits": 4}},
            "json: vision_config: quantization_config isn't supported",
        ),
    ],
)
def test_what_is_wrong_within_a_part_is_named_with_it(tmp_path, part, said):
    refused(tmp_path, BOTH | {"vision_config": part}, said, Composite)


def test_unknown_keys_of_parts_are_reported_in_one_warning(tmp_path):
    found = BOTH | {
        "vision_config": {"image_size": 8, "zebra": 1, "patch": 2},
        "text_config": {"hidden_size": 3, "hidden_act": "silu", "projection_dim": 7},
        "ant": 1,
    }
    said = r"json: not read: ant, vision_config\.patch, vision_config\.zebra, text_config\.projec"
    with pytest.warns(UserWarning, match=said) as caught:
        config(tmp_path, found, Composite)
    assert len(caught) == 1


def test_a_part_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = {"image_size": 8, "model_type": "x", "pruned_heads": {}, "top_k": 50}
        assert parse_config(part, Tower, source="here") == Tower(8)
    with pytest.warns(UserWarning, match="^here: not read: zebra$"):
        parse_config({"image_size": 8, "zebra": 0}, Tower, source="here")
    with pytest.raises(CheckpointError, match=r"^here lacks image_size$"):
        parse_config({"depth": 8}, Tower, source="here")
    with pytest.raises(CheckpointError, match=r"^here: image_size=0 is below 1$"):
        parse_config({"image_size": 0}, Tower, source="here")


# RoPE in two spellings

SCALED = LLAMA3 | {"rope_theta": 500000.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": SCALED},
        {"rope_parameters": SCALED, "rope_theta": 500000, "rope_scaling": None},
        {"rope_parameters": SCALED, "rope_theta": None, "rope_scaling": LLAMA3},
        {"rope_scaling": SCALED},  # transformers 5 reads it so
        {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in SCALED.items()}},
        {"rope_scaling": SCALED | {"type": "llama3"}},
    ],
)
def test_every_spelling_of_scaled_rope(tmp_path, spelling):
    found = config(tmp_path, GOOD | spelling)
    assert (found.rope_theta, found.rope_scaling) == (500000.0, LLAMA3)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": PLAIN},
        {"rope_parameters": {"rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500000.0},
        {"rope_parameters": PLAIN, "rope_theta": 500000.0, "rope_scaling": None},
    ],
)
def test_every_spelling_of_plain_rope(tmp_path, spelling):
    found = config(tmp_path, GOOD | spelling)
    assert (found.rope_theta, found.rope_scaling) == (500000.0, None)


def test_without_any_spelling_the_default_stands(tmp_path):
    assert config(tmp_path, GOOD).rope_theta == 10000.0
    empty = GOOD | {"rope_parameters": {}, "rope_theta": 777.0}
    assert config(tmp_path, empty).rope_theta == 777.0


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": PLAIN, "rope_theta": 10000.0},
        {"rope_parameters": PLAIN, "rope_scaling": LLAMA3},
        {"rope_parameters": SCALED, "rope_scaling": LLAMA3 | {"factor": 32.0}},
        {"rope_parameters": SCALED, "rope_scaling": {"type": "default"}},
        {"rope_scaling": SCALED, "rope_theta": 10000.0},
    ],
)
def test_spellings_that_contradict_each_other_are_refused(tmp_path, spelling):
    refused(tmp_path, GOOD | spelling, "contradict each other: rope_theta=.*rope_")


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": [1]},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}},
    ],
)
def test_rope_that_is_not_one_set_of_parameters_is_refused(tmp_path, spelling):
    refused(tmp_path, GOOD | spelling, "rope_.* isn't a single set of parameters")


def test_a_setting_of_plain_rope_is_not_lost(tmp_path):
    """It lands in rope_scaling, where a model refuses what it doesn't know."""
    half = PLAIN | {"partial_rotary_factor": 0.5}
    found = config(tmp_path, GOOD | {"rope_parameters": half})
    assert found.rope_scaling == {"rope_type": "default", "partial_rotary_factor": 0.5}


def test_a_model_that_takes_rope_parameters_gets_them_as_they_stand(tmp_path):
    nested = {"full_attention": PLAIN, "sliding_attention": {"rope_theta": 1.0}}
    found = config(tmp_path, {"model_type": "toy", "rope_parameters": nested}, NestedRope)
    assert found.rope_parameters == nested


# Files


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(2, 3), "b": torch.randn(4), "steps": torch.tensor([7])}


def split(folder: Path, **files: list[str]) -> dict[str, torch.Tensor]:
    """Write the tensors over files, with their index; returns them."""
    made = tensors()
    for file, names in files.items():
        save_file({name: made[name] for name in names}, folder / f"{file}.safetensors")
    listed = {name: f"{file}.safetensors" for file, names in files.items() for name in names}
    write_index(folder, listed)
    return made


def write_index(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])


def test_one_file(tmp_path):
    made = tensors()
    save_file(made, tmp_path / "model.safetensors")
    assert_same(read_tensors(tmp_path), made)
    assert_same(read_tensors(str(tmp_path)), made)


def test_several_files_with_and_without_their_index(tmp_path):
    made = split(tmp_path, one=["a"], two=["b", "steps"])
    # What the index doesn't list is not read: folders often hold the weights twice.
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_same(read_tensors(tmp_path), made)
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / INDEX).unlink()
    assert_same(read_tensors(tmp_path), made)


def test_an_index_may_list_the_single_file(tmp_path):
    made = split(tmp_path, model=["a", "b", "steps"])
    assert_same(read_tensors(tmp_path), made)


@pytest.mark.parametrize(
    "weight_map",
    [None, {}, [], {"a": None}, {"a": ["one.safetensors"]}, {"a": "../one.safetensors"}],
)
def test_a_damaged_index_is_refused(tmp_path, weight_map):
    split(tmp_path, one=["a", "b", "steps"])
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=f"{INDEX} has no weight_map"):
        weight_files(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    split(tmp_path, one=["a", "b", "steps"])
    (tmp_path / INDEX).write_text('{"weight_map": {')
    with pytest.raises(CheckpointError, match=f"{INDEX} isn't JSON"):
        weight_files(tmp_path)


def test_absent_files_of_the_index_are_all_named(tmp_path):
    split(tmp_path, one=["a"], two=["b"], three=["steps"])
    for name in ("one", "three"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"absent: one\.safetensors, three\.safetensors$"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "change", [{"ghost": "one.safetensors"}, {"a": "two.safetensors"}], ids=["absent", "elsewhere"]
)
def test_an_index_that_names_another_place_is_refused(tmp_path, change):
    split(tmp_path, one=["a", "b"], two=["steps"])
    listed = json.loads((tmp_path / INDEX).read_text())["weight_map"] | change
    write_index(tmp_path, listed)
    ((name, file),) = change.items()
    with pytest.raises(CheckpointError, match=f"says that {name} is in {file}, and it isn't"):
        weight_files(tmp_path)


def test_a_tensor_that_the_index_forgot_is_read_all_the_same(tmp_path):
    made = split(tmp_path, one=["a"], two=["b", "steps"])
    listed = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    del listed["steps"]
    write_index(tmp_path, listed)
    assert_same(read_tensors(tmp_path), made)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tensor_in_two_files_is_refused(tmp_path, indexed):
    split(tmp_path, one=["a", "b"], two=["steps", "a"])
    if not indexed:
        (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"a is in one\.safetensors and in two\.safetensors"):
        read_tensors(tmp_path)


def test_a_single_file_beside_the_index_of_others_is_refused(tmp_path):
    split(tmp_path, one=["a"], two=["b", "steps"])
    save_file(tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"doesn't list model\.safetensors"):
        read_tensors(tmp_path)


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors$"):
        read_tensors(tmp_path)


class Bomb:
    """Whoever unpickles it creates a file: `exploded` beside it."""

    def __init__(self, folder: Path):
        self.trace = folder / "exploded"

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_named_and_not_opened(tmp_path, name):
    bomb = Bomb(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=f"{name}: pickle files can run code when read"):
        read_tensors(tmp_path)
    assert not bomb.trace.exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert bomb.trace.exists()  # it would have


@pytest.mark.parametrize("cut", [-1, 100, 5, 0])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    made = split(tmp_path, one=["a", "b"], two=["steps"])
    file = tmp_path / "one.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"one\.safetensors is damaged or cut short: "):
        read_tensors(tmp_path)
    assert len(made) == 3


def test_a_pointer_instead_of_weights_is_refused(tmp_path):
    """What `git clone` leaves of large files where git-lfs is not installed."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_chosen_dtype_is_that_of_floats_only(tmp_path, dtype):
    made = tensors() | {"half": torch.randn(3).half(), "flag": torch.tensor([True, False])}
    save_file(made, tmp_path / "model.safetensors")
    floats = {name for name, tensor in made.items() if tensor.is_floating_point()}
    assert len(floats) == 3
    expected = {n: t.to(dtype) if dtype and n in floats else t for n, t in made.items()}
    assert_same(read_tensors(tmp_path, dtype), expected)


# Into a model


def model(device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return nn.ModuleDict({"up": nn.Linear(3, 5), "norm": nn.BatchNorm1d(5)})


def right() -> dict[str, torch.Tensor]:
    """Weights for the model: floats, and one integer that counts batches."""
    torch.manual_seed(5)
    new = {name: torch.randn(t.shape) for name, t in model().state_dict().items()}
    return new | {"norm.num_batches_tracked": torch.tensor(3)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_loaded_whole(device):
    loaded, weights = model(device), right()
    load_weights(loaded, weights, source="here")
    assert_same(loaded.state_dict(), weights)


def test_a_model_takes_the_dtype_of_the_weights():
    loaded, weights = model(), right()
    weights = {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}
    load_weights(loaded, weights, source="here")
    assert_same(loaded.state_dict(), weights)


WRONG = {
    "missing: up.bias$": lambda w: w.pop("up.bias"),
    "missing: up.weight, up.bias$": lambda w: (w.pop("up.bias"), w.pop("up.weight")),
    "unexpected: down.bias$": lambda w: w.update({"down.bias": torch.ones(1)}),
    r"mis-shaped: up.weight is \(3, 5\), the config wants \(5, 3\)$": (
        lambda w: w.update({"up.weight": w["up.weight"].T})
    ),
    r"mis-shaped: up.bias is \(1,\), the config wants \(5,\)$": (
        lambda w: w.update({"up.bias": torch.ones(1)})
    ),
    r"mis-typed: up.weight is torch\.int8$": (
        lambda w: w.update({"up.weight": torch.ones(5, 3, dtype=torch.int8)})
    ),
    r"mis-typed: norm.num_batches_tracked is torch\.float32$": (
        lambda w: w.update({"norm.num_batches_tracked": torch.tensor(3.0)})
    ),
    r"missing: up.bias; unexpected: up.scale; mis-shaped: up.weight is .* \(5, 3\)$": (
        lambda w: (
            w.pop("up.bias"),
            w.update({"up.scale": torch.ones(1), "up.weight": torch.ones(5)}),
        )
    ),
}


@pytest.mark.parametrize("said", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_that_do_not_fit_are_all_named_and_change_nothing(said, device):
    loaded, weights = model(device), right()
    before = {n: t.clone() for n, t in loaded.state_dict().items()}
    WRONG[said](weights)
    with pytest.raises(CheckpointError, match=f"^here doesn't fit ModuleDict; {said}"):
        load_weights(loaded, weights, source="here")
    after = loaded.state_dict()
    assert all(t.is_meta for t in after.values()) == (device == "meta")
    if device == "cpu":
        assert_same(after, before)


class Whole(nn.Module):
    """A model of a config, that notes where it was built."""

    def __init__(self, config: dict[str, int]):
        super().__init__()
        self.up = nn.Linear(config["inside"], config["outside"])
        self.drop = nn.Dropout(0.5)
        self.built_on = self.up.weight.device.type


def test_a_model_is_built_without_memory_and_filled():
    torch.manual_seed(5)
    tensors = {"up.weight": torch.randn(5, 3), "up.bias": torch.randn(5)}
    made = filled(Whole, {"inside": 3, "outside": 5}, tensors, source="here")
    assert made.built_on == "meta" and not made.training
    assert_same(made.state_dict(), tensors)
    assert torch.zeros(1).device.type == "cpu"  # the default device is as before


@pytest.mark.parametrize(
    "said, tensors",
    [
        ("missing: up.bias", {"up.weight": (5, 3)}),
        ("unexpected: down.bias", {"up.weight": (5, 3), "up.bias": (5,), "down.bias": (3,)}),
        (
            r"mis-shaped: up.weight is \(3, 5\), the config wants \(5, 3\)",
            {"up.weight": (3, 5), "up.bias": (5,)},
        ),
    ],
)
def test_a_model_is_not_filled_by_halves(said, tensors):
    tensors = {name: torch.ones(shape) for name, shape in tensors.items()}
    with pytest.raises(CheckpointError, match=f"^here doesn't fit Whole; {said}$"):
        filled(Whole, {"inside": 3, "outside": 5}, tensors, source="here")


# Tied heads


def test_a_head_equal_to_the_embedding_is_dropped():
    embedding = torch.randn(4, 3)
    held = {"embed": embedding, "head": embedding.clone()}
    drop_tied_head(held, "head", "embed", source="here")
    assert held.keys() == {"embed"}
    drop_tied_head(held, "head", "embed", source="here")  # nothing to drop is fine
    assert held.keys() == {"embed"}


@pytest.mark.parametrize("head", [torch.zeros(4, 3), torch.zeros(5, 3)], ids=["values", "shape"])
def test_a_head_that_differs_from_the_embedding_is_refused(head):
    held = {"embed": torch.ones(4, 3), "head": head}
    with pytest.raises(CheckpointError, match=r"here: .* is true, and head differs from embed"):
        drop_tied_head(held, "head", "embed", source="here")
