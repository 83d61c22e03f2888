"""The self-check passes here, and notices what is broken."""

import pytest
import torch

from diffdistill import cli, selfcheck
from diffdistill.errors import UserError
from diffdistill.evaluation import resize
from diffdistill.evaluation.metrics import frechet


def by_name(found):
    return {check.name: check.passed for check in found}


def test_all_is_well_here(capsys):
    assert all(by_name(selfcheck.selfcheck()).values())
    assert cli.main(["selfcheck"]) == 0
    assert capsys.readouterr().out.count("ok") >= 4


def test_a_pillow_of_other_bytes_is_noticed(monkeypatch, capsys):
    pillow = resize.pillow
    monkeypatch.setattr(resize, "pillow", lambda *args: pillow(*args) ^ 1)
    assert not by_name(selfcheck.selfcheck())["resize"]
    assert cli.main(["selfcheck"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_square_root_in_float32_is_noticed(monkeypatch):
    distance = frechet.frechet_distance
    monkeypatch.setattr(frechet, "frechet_distance", lambda *moments: distance(*(part.float().double() for part in moments)))
    assert not by_name(selfcheck.selfcheck())["Frechet distance"]


def test_the_real_images_of_a_protocol_lie_on_its_reference_and_noise_does_not(tmp_path):
    from diffdistill.evaluation.image_files import PngWriter
    from diffdistill.evaluation.reference import all_digits

    noise = torch.randint(256, (300, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, images in (("real", all_digits().images), ("noise", noise)):
        with PngWriter(tmp_path / name) as writer:
            writer.add(images, 0)
    assert by_name(selfcheck.selfcheck("digits", tmp_path / "real"))["fid"]
    assert not by_name(selfcheck.selfcheck("digits", tmp_path / "noise"))["fid"]
    with pytest.raises(UserError, match="name it with --protocol"):
        selfcheck.selfcheck(images=tmp_path / "real")
