import json

import pytest
import torch
from safetensors import safe_open

from snippets.common.adapter_folder import read_adapter, read_options, report, write_adapter
from snippets.common.checkpoint import CheckpointError


def test_what_is_written_is_read(tmp_path):
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "b": weight, "c": weight.T, "d": weight.bfloat16()}
    write_adapter(tmp_path / "new/folder", {"r": 2, "é": None}, tensors)
    config, found = read_adapter(str(tmp_path / "new/folder"))
    assert config == {"r": 2, "é": None} and found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    with safe_open(tmp_path / "new/folder/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    text = (tmp_path / "new/folder/adapter_config.json").read_text()
    assert text == json.dumps(config, indent=2) + "\n"
    write_adapter(tmp_path / "new/folder", {}, {"e": weight.requires_grad_()})  # over it
    assert read_adapter(tmp_path / "new/folder")[0] == {}


def test_refuses_a_pickle_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: pickle files can run code"):
        read_adapter(tmp_path)


def test_options_are_of_their_types():
    known = {"r": (int, 8), "s": (str | list, None), "f": (int | float, 1.0)}
    assert read_options({}, known, "x") == {"r": 8, "s": None, "f": 1.0}
    given = {"r": None, "s": ["a"], "f": 2, "other": 1}
    assert read_options(given, known, "x") == {"r": 8, "s": ["a"], "f": 2}
    with pytest.raises(CheckpointError, match="x: r=True isn't of type int"):
        read_options({"r": True}, known, "x")
    with pytest.raises(CheckpointError, match=r"x: f='2' isn't of type int \| float"):
        read_options({"f": "2"}, known, "x")


def test_reports_where_it_was_called_from():
    with pytest.warns(UserWarning, match="^said$") as caught:
        report("said")
    assert len(caught) == 1
