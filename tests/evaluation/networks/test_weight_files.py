"""Files of weights: every kind is read, nothing in them is run, and a network takes all of them or none."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.weight_files import fill, read_weights

WANTED = "Give the path of w.pt."


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(40, 30)


@pytest.fixture
def files(layer, tmp_path):
    """The layer's weights in each kind of file."""
    save_file(layer.state_dict(), tmp_path / "w.safetensors")
    torch.save(layer.state_dict(), tmp_path / "w.bin")
    torch.save(layer.state_dict(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": layer.state_dict(), "epoch": 7}, tmp_path / "checkpoint.pt")
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(layer, torch.zeros(1, 40)).save(str(tmp_path / "graph.pt"))
    return [tmp_path / name for name in ("w.safetensors", "w.bin", "old.bin", "checkpoint.pt", "graph.pt")]


def test_every_kind_of_file_gives_the_tensors_by_name(files, layer):
    for path in files:
        stored = read_weights(path, WANTED)
        assert stored.keys() == {"weight", "bias"}
        assert all(torch.equal(stored[name], value) for name, value in layer.state_dict().items())


def test_damaged_absent_and_foreign_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent.pt\. Give the path of w.pt\."):
        read_weights(tmp_path / "absent.pt", WANTED)
    for path in files:
        content = path.read_bytes()
        for length in (0, 1, 200, len(content) // 2, len(content) - 100):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match=rf"{path.name} \({length:,} bytes\) is cut off.*Give the path"):
                read_weights(path, WANTED)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(UserError, match="holds a list and no weights by name"):
        read_weights(tmp_path / "list", WANTED)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps({"weight": Harmful(str(tmp_path / "ran"))}))
    with pytest.raises(UserError, match=r"harmful.pt.*no file of weights"):
        read_weights(tmp_path / "harmful.pt", WANTED)
    assert not (tmp_path / "ran").exists()


def test_narrower_numbers_become_the_same_float32_numbers(layer, tmp_path):
    halves = {name: value.half() for name, value in layer.state_dict().items()}
    fill(layer, halves, tmp_path, "a layer", WANTED)
    assert layer.weight.dtype == torch.float32 and torch.equal(layer.weight, halves["weight"].float())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(weight=torch.ones(30, 41)),
            r"\(1 of 2 tensors differ\): weight is \(30, 41\) torch.float32, not \(30, 40\) floats",
        ),
        (dict(bias=torch.ones(30, dtype=torch.int64)), r"bias is \(30,\) torch.int64, not \(30,\) floats"),
        (dict(bias=None), r"bias is missing, not \(30,\) floats"),
        (dict(gain=torch.ones(2)), r"gain is \(2,\) torch.float32, not absent"),
    ],
)
def test_a_network_takes_its_own_tensors_and_no_others(change, message, layer, tmp_path):
    before = layer.weight.clone()
    stored = {name: value + 1 for name, value in layer.state_dict().items()} | change
    stored = {name: value for name, value in stored.items() if value is not None}
    with pytest.raises(UserError, match=rf"x.pt does not hold a layer .*{message}\. Give the path of w.pt"):
        fill(layer, stored, tmp_path / "x.pt", "a layer", WANTED)
    assert torch.equal(layer.weight, before)


def test_names_that_may_be_there_besides_are_left_out(layer, tmp_path):
    fill(layer, layer.state_dict() | {"steps": torch.ones(1)}, tmp_path, "a layer", WANTED, ignored=["steps"])
