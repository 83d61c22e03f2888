"""Files of weights, and what is refused of them."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict, widened

WANTED = "Give the path of line.pth."


def line() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2)


@pytest.fixture
def weights():
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0])}


@pytest.fixture
def files(weights, tmp_path):
    """The weights as torch before 1.6 pickled them, as torch does today, in a checkpoint, in safetensors, and in TorchScript."""
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(weights, tmp_path / "today.pth")
    torch.save({"state_dict": weights, "epoch": 7}, tmp_path / "checkpoint.pt")
    save_file(weights, tmp_path / "line.safetensors")
    module = nn.Linear(3, 2)
    module.load_state_dict(weights)
    torch.jit.script(module).save(str(tmp_path / "script.pt"))
    return [tmp_path / name for name in ("old.pth", "today.pth", "checkpoint.pt", "line.safetensors", "script.pt")]


def test_every_kind_of_file_fills_a_network_with_frozen_weights(files):
    for path in files:
        network = line()
        fill(network, read_state_dict(path, WANTED), path, "a line", WANTED)
        assert network(torch.tensor([1.0, 1.0, 1.0])).tolist() == [4, 14]
        assert not network.weight.requires_grad and not network.bias.requires_grad


def test_no_copy_is_made(weights):
    network = line()
    fill(network, weights, "file", "a line", WANTED)
    assert network.weight.data_ptr() == weights["weight"].data_ptr()


def test_widened_weights_are_the_same_numbers_in_float32_and_a_copy(weights):
    halves = {"weight": weights["weight"].half() / 3, "bias": weights["bias"], "steps": torch.tensor(4), "size": torch.ones(2)}
    wide = widened(halves, without=["size", "never"])
    assert wide.keys() == {"weight", "bias", "steps"}
    assert wide["weight"].dtype == torch.float32 and torch.equal(wide["weight"], halves["weight"].float())
    assert wide["steps"].dtype == torch.int64
    assert wide["bias"].data_ptr() != weights["bias"].data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(3, 2)}, r"\(1 of 2 tensors\): weight is \(3, 2\) torch.float32, not \(2, 3\) torch.float32"),
        (
            {"bias": torch.zeros(2, dtype=torch.float16)},
            r"\(1 of 2 tensors\): bias is \(2,\) torch.float16, not \(2,\) torch.float32",
        ),
        ({"more": torch.zeros(5)}, r"\(1 of 3 tensors\): more is \(5,\) torch.float32, not absent"),
        ({"weight": None, "bias": None}, r"\(2 of 2 tensors\): weight is absent, not \(2, 3\) torch.float32"),
    ],
)
def test_another_name_shape_or_type_is_refused(weights, change, message):
    with pytest.raises(UserError, match=f"file does not hold a line {message}. Give the path of line.pth."):
        fill(line(), weights | change, "file", "a line", WANTED)


def test_absent_and_damaged_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent.pth. Give the path of line.pth."):
        read_state_dict(tmp_path / "absent.pth", WANTED)
    with pytest.raises(UserError, match="no file"):
        read_state_dict(tmp_path, WANTED)
    for path in files:
        damaged, content = tmp_path / f"damaged{path.suffix}", path.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 20):
            damaged.write_bytes(content[:length])
            with pytest.raises(UserError, match=r"damaged.* \([\d,]+ bytes\) is cut off, or no file of weights"):
                read_state_dict(damaged, WANTED)
    torch.save([torch.zeros(1)], tmp_path / "list")
    with pytest.raises(UserError, match="list holds a list and no weights by name"):
        read_state_dict(tmp_path / "list", WANTED)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps({"weight": Harmful(str(tmp_path / "ran"))}))
    with pytest.raises(UserError, match=r"harmful.pth.*no file of weights"):
        read_state_dict(tmp_path / "harmful.pth", WANTED)
    assert not (tmp_path / "ran").exists()
