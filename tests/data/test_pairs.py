import pytest
import torch
from safetensors.torch import save_file

from diffdistill.data.pairs import Pairs
from diffdistill.errors import UserError


def make(labels: bool = True) -> Pairs:
    noise = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    return Pairs(noise, noise.tanh(), torch.arange(5) if labels else None, {"teacher": "digits-unet", "num_steps": 50})


@pytest.mark.parametrize("labels", [True, False])
def test_what_was_saved_is_loaded(tmp_path, labels):
    pairs = make(labels)
    loaded = Pairs.load(pairs.save(tmp_path / "pairs.safetensors"))
    assert torch.equal(loaded.noise, pairs.noise) and torch.equal(loaded.x0, pairs.x0)
    assert (loaded.labels is None) if not labels else torch.equal(loaded.labels, pairs.labels)
    assert loaded.origin == pairs.origin and len(loaded) == 5


def test_taking_keeps_noise_sample_and_label_together():
    taken = make().take(torch.tensor([3, 1]))
    assert torch.equal(taken.x0, taken.noise.tanh()) and taken.labels.tolist() == [3, 1]


def test_pairs_that_do_not_fit_are_refused():
    noise, labels = torch.zeros(5, 1, 2, 2), torch.arange(5)
    bad = noise.clone()
    bad[0] = float("nan")
    for arguments in (
        (noise, noise[:4], labels),
        (noise[:0], noise[:0], None),
        (noise, bad, labels),
        (bad, noise, labels),
        (noise.double(), noise.double(), labels),
        (noise, noise, labels[:4]),
        (noise, noise, labels.float()),
    ):
        with pytest.raises(UserError, match="stored pairs"):
            Pairs(*arguments)


def test_files_that_are_damaged_or_of_something_else_are_refused(tmp_path):
    path = tmp_path / "pairs.safetensors"
    with pytest.raises(UserError, match="cannot read"):
        Pairs.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cannot read"):
        Pairs.load(path)
    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(UserError, match="holds weight"):
        Pairs.load(path)
