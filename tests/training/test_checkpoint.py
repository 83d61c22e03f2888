"""Checkpoints: what is read is what was written, or it is refused by name."""

import errno
import json
import os

import pytest
import torch

from diffdistill.errors import MachineError, UserError
from diffdistill.training import checkpoint

STATE = {"stage": 1, "stage_step": 7, "engine": {"meter": [[["a/b"], [0.1, 1.0]]]}, "metrics": {}}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(5, 3, generator=generator)
    return {
        "role-student": {"w": weights, "half": weights.bfloat16(), "transposed": weights.T, "same": weights, "no": weights[:0]},
        "optimizer-student": {"0.step": torch.tensor(3.0), "0.exp_avg": weights.double(), "count": torch.tensor([7])},
    }


def flip(path, position=-3):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_what_is_read_equals_what_was_written(tmp_path):
    path = checkpoint.save(tmp_path, 120, tensors(), STATE)
    assert path.name == "step_0000120"
    found = checkpoint.load(path)
    assert (found.step, found.state) == (120, STATE)
    for group, named in tensors().items():
        assert named.keys() == found.tensors[group].keys()
        for key, value in named.items():
            assert found.tensors[group][key].dtype == value.dtype and torch.equal(found.tensors[group][key], value)


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()], ids=["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", ["role-student.safetensors", "optimizer-student.safetensors", "state.json"])
def test_a_damaged_file_is_refused_by_name_with_the_good_one_before_it(tmp_path, file, damage):
    before = checkpoint.save(tmp_path, 1, tensors(1), STATE)
    path = checkpoint.save(tmp_path, 2, tensors(2), STATE)
    damage(path / file)
    with pytest.raises(UserError, match=f"{file}.*newest good one before it is .*{before.name}"):
        checkpoint.load(path)
    found, warnings = checkpoint.newest(tmp_path)
    assert found.step == 1 and len(warnings) == 1
    assert file in warnings[0] and str(path) in warnings[0]


def test_every_byte_of_the_state_is_covered(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), STATE) / "state.json"
    content = path.read_bytes()
    missed = []
    for position in range(0, len(content), 3):
        flip(path, position)
        if checkpoint.find_fault(path.parent) is None and json.loads(path.read_bytes()) != json.loads(content):
            missed.append(position)
        path.write_bytes(content)
    assert missed == []  # white space may change, values may not


def test_when_all_are_damaged_nothing_is_loaded(tmp_path):
    for step in (1, 2):
        truncate(checkpoint.save(tmp_path, step, tensors(), STATE) / "role-student.safetensors")
    with pytest.raises(UserError, match="no checkpoint can be used: .*step_0000002.*step_0000001"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UserError, match="no other good one"):
        checkpoint.load(tmp_path / "step_0000002")


def test_no_checkpoint_at_all_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") == (None, [])


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, fid in enumerate([9.0, 2.0, 3.0, None, 5.0, 4.0], start=1):
        checkpoint.save(tmp_path, step, tensors(), {**STATE, "metrics": {} if fid is None else {"fid": fid}})
        checkpoint.prune(tmp_path, keep=2)
    assert [path.name[-1] for path in checkpoint.available(tmp_path)] == ["2", "5", "6"]
    assert checkpoint.best(tmp_path).name == "step_0000002" and checkpoint.best_score(tmp_path) == 2.0


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def fsync_fails(monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)


def safetensors_fails(monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def save_file(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


@pytest.mark.parametrize("fail", [fsync_fails, safetensors_fails])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch, fail, step):
    old = checkpoint.save(tmp_path, 1, tensors(1), STATE)
    with monkeypatch.context() as patched, pytest.raises(MachineError, match="no space left"):
        fail(patched)
        checkpoint.save(tmp_path, step, tensors(2), STATE)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert torch.equal(checkpoint.load(old).tensors["role-student"]["w"], tensors(1)["role-student"]["w"])


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    checkpoint.save(tmp_path, 1, tensors(), STATE)
    (tmp_path / ".step_0000002.77.tmp").mkdir()
    (tmp_path / ".step_0000002.77.tmp" / "role-student.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path)[0].step == 1
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]


def test_nothing_is_unpickled():
    import inspect

    assert "torch.load(" not in inspect.getsource(checkpoint)
