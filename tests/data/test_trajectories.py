"""Stored trajectories: what goes in comes out, each call with its own trajectory's w and label, and nothing else is accepted."""

import pytest
import torch

from diffdistill.data.trajectories import Trajectories
from diffdistill.errors import UserError

N, K = 3, 4


def stored(dtype=torch.float32, with_labels=True, **changes):
    code = torch.arange(N * K, dtype=dtype).reshape(N, K, 1, 1, 1)
    parts = {
        "x_t": code.expand(N, K, 2, 1, 1).clone(),
        "target": -code.expand(N, K, 2, 1, 1).clone(),
        "t": torch.arange(N * K, dtype=torch.float64).reshape(N, K) * 10,
        "w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "labels": torch.tensor([7, 8, 9]) if with_labels else None,
        "origin": {"seed": 5},
    }
    return Trajectories(**(parts | changes))


def test_a_sample_is_one_call_with_the_w_and_the_label_of_its_trajectory():
    trajectories = stored(torch.float16)
    assert len(trajectories) == N * K
    asked = trajectories.take(torch.tensor([0, 3, 4, 11]))
    assert asked.x_t.dtype == asked.target.dtype == torch.float32 and asked.x_t.shape == (4, 2, 1, 1)
    assert asked.x_t[:, 0, 0, 0].tolist() == [0, 3, 4, 11] and torch.equal(asked.target, -asked.x_t)
    assert asked.t.tolist() == [0, 30, 40, 110] and asked.t.dtype == torch.float64
    assert asked.w.tolist() == [1, 1, 2, 3] and asked.labels.tolist() == [7, 7, 8, 9]
    assert stored(with_labels=False).take(torch.tensor([0])).labels is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("labels", [False, True])
def test_a_file_gives_back_what_was_saved(tmp_path, dtype, labels):
    before = stored(dtype, labels)
    after = Trajectories.load(before.save(tmp_path / "trajectories.safetensors"))
    for name in ("x_t", "target", "t", "w", "labels"):
        a, b = getattr(before, name), getattr(after, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert after.origin == {"seed": 5}


def test_parts_are_joined_in_order():
    whole = Trajectories.cat([stored(), stored(w=torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64))])
    assert len(whole) == 2 * N * K and whole.take(torch.tensor([N * K])).w.tolist() == [4]
    assert Trajectories.cat([stored(with_labels=False)] * 2).labels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.zeros(N, K, 2, 1, 2)}, "one shape"),
        ({"x_t": torch.zeros(0, K, 2, 1, 1), "target": torch.zeros(0, K, 2, 1, 1)}, "non-empty"),
        ({"t": torch.zeros(K, dtype=torch.float64)}, "calls need"),
        ({"w": torch.ones(N, K, dtype=torch.float64)}, "calls need"),
        ({"labels": torch.ones(K, dtype=torch.int64)}, "calls need"),
        ({"t": torch.zeros(N, K)}, "float64"),
        ({"target": torch.zeros(N, K, 2, 1, 1, dtype=torch.float16)}, "one dtype"),
        ({"labels": torch.ones(N)}, "int64"),
        ({"x_t": torch.full((N, K, 2, 1, 1), torch.inf)}, "in float32"),
        ({"w": torch.tensor([1.0, 2.0, torch.nan], dtype=torch.float64)}, "NaN"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        stored(**changes)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="cannot read"):
        Trajectories.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold"):
        Trajectories.load(tmp_path / "other.safetensors")
