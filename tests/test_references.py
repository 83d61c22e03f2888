"""Statistics of real images: made from images, taken from another package's file, found again by eval, and refused where they differ."""

import io
import json

import numpy as np
import pytest
import torch
import yaml

from diffdistill import cli, scoring
from diffdistill.errors import UserError
from diffdistill.evaluation.image_files import PngWriter
from diffdistill.evaluation.networks.inception import Inception
from diffdistill.evaluation.resize import resize
from diffdistill.references import make_statistics

COUNT = 4
FAKE, REAL = (
    torch.randint(low, 256, (COUNT, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(low))
    for low in (0, 60)
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Fake and real images as PNG files, and a protocol of four images for the network behind FID."""
    lay_out(tmp_path, monkeypatch)
    return tmp_path


def lay_out(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(folder / "references"))
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(folder / "weights"))
    for name, images in (("fake", FAKE), ("real", REAL)):
        with PngWriter(name) as writer:
            writer.add(images, 0)
    write_protocol("mine.yaml")


def write_protocol(path, **fields):
    values = {
        "name": "mine",
        "about": "Take the images from the cupboard.",
        "dataset": "cupboard",
        "num_images": COUNT,
        "first_seeds": [0],
        "label_rule": "none",
        "uint8_rule": "round",
        "views": [{"extractor": "inception", "resize": "tf1_bilinear", "metrics": ["fid"]}],
        "reference": "cupboard",
        "jackknife_groups": 2,
        "metric_seed": 0,
    }
    with open(path, "w") as file:
        yaml.safe_dump({**values, **fields}, file)


SETTINGS = scoring.Settings("mine.yaml", weights="random:0")


@pytest.fixture(scope="module")
def features():
    network = Inception.random(0)
    with torch.no_grad():
        return [network(resize(images, (299, 299), "tf1_bilinear")).features.double() for images in (FAKE, REAL)]


def score():
    return scoring.evaluate("fake", settings=SETTINGS)["images"]


ADM = [{"extractor": "inception", "resize": "tf1_bilinear", "metrics": ["fid", "sfid", "precision_recall"]}]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Scores against the real images themselves; those against another package's statistics of them must be the same."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        lay_out(tmp_path_factory.mktemp("expected"), monkeypatch)
        write_protocol("mine.yaml", views=ADM)
        make_statistics("real", "mine.yaml", weights="random:0")
        return score()


def test_statistics_are_made_once_and_found_by_eval(folders, capsys, features):
    with pytest.raises(UserError, match=r"diffdistill stats IMAGES --protocol mine(.|\n)*from the cupboard"):
        score()
    assert cli.main(["stats", "real", "--protocol", "mine.yaml", "--weights", "random:0"]) == 0
    assert "references/cupboard-" in capsys.readouterr().out
    found = score()
    fake, real = features
    expected = np.square((fake.mean(0) - real.mean(0)).numpy()).sum()
    assert found.mean("fid") > expected  # the mean term alone
    assert found.is_invalid and found.views[0]["reference"]["count"] == COUNT
    assert any("4 images for 2048 features" in text for text in found.warnings)


def test_statistics_of_edm_give_the_same_distance_and_say_where_they_come_from(folders, features, expected):
    real = features[1]
    np.savez("edm.npz", mu=real.mean(0).numpy(), sigma=real.T.cov().numpy())
    [path] = make_statistics("edm.npz", "mine.yaml", "edm", weights="random:0")
    found = score()
    assert found.mean("fid") == pytest.approx(expected.mean("fid"), rel=1e-6)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert (facts["format"], facts["source"], facts["count"]) == ("edm", "edm.npz", None)


def test_a_file_of_another_resize_is_refused(folders, features):
    real = features[1]
    np.savez("pytorch.npz", mu=real.mean(0).numpy(), sigma=real.T.cov().numpy())
    with pytest.raises(
        UserError, match="inception-pytorch-fid after torch_bilinear; this evaluation uses inception after tf1_bilinear"
    ):
        make_statistics("pytorch.npz", "mine.yaml", "pytorch-fid", weights="random:0")


def test_statistics_of_other_weights_or_another_resize_are_not_found(folders):
    make_statistics("real", "mine.yaml", weights="random:1")
    with pytest.raises(UserError, match="there are no statistics for inception after tf1_bilinear"):
        score()
    make_statistics("real", "mine.yaml", weights="random:0")
    write_protocol("mine.yaml", views=[{"extractor": "inception", "resize": "pil_bicubic", "metrics": ["fid"]}])
    with pytest.raises(UserError, match="there are no statistics for inception after pil_bicubic"):
        score()


@pytest.mark.slow
def test_adms_file_gives_moments_of_all_and_features_of_its_images(folders, features, expected):
    write_protocol("mine.yaml", views=ADM)
    network = Inception.random(0)
    with torch.no_grad():
        spatial = network(resize(REAL, (299, 299), "tf1_bilinear")).spatial.double()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        arr_0=REAL.permute(0, 2, 3, 1).numpy(),
        mu=features[1].mean(0).numpy(),
        sigma=features[1].T.cov().numpy(),
        mu_s=spatial.mean(0).numpy(),
        sigma_s=spatial.T.cov().numpy(),
    )
    (folders / "adm.npz").write_bytes(buffer.getvalue())
    make_statistics("adm.npz", "mine.yaml", "adm", weights="random:0")
    found = score()
    assert found.values.keys() == expected.values.keys() >= {"fid", "sfid", "precision", "recall"}
    for name, value in expected.values.items():
        assert found.mean(name) == pytest.approx(value.mean, rel=1e-6), name


@pytest.mark.parametrize(("protocol", "said"), [("digits", r"embedded images \(digits-all\)"), ("hpsv2", "no real images")])
def test_protocols_that_need_no_statistics_say_so(folders, protocol, said):
    with pytest.raises(UserError, match=said):
        make_statistics("real", protocol)


def test_without_weights_the_slot_is_named(folders):
    with pytest.raises(UserError, match="diffdistill weights add inception FILE"):
        make_statistics("real", "mine.yaml")


def test_too_few_or_too_many_images_are_refused(folders):
    make_statistics("real", "mine.yaml", weights="random:0")
    (folders / "fake" / "000000.png").unlink()
    with pytest.raises(UserError, match="scores 4 images; got 3"):
        score()
