"""Reference statistics: what they hold, the file, and the refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.features import CallableExtractor, DigitsExtractor
from diffdistill.evaluation.protocol import Protocol, View, load_protocol
from diffdistill.evaluation.reference import (
    all_digits,
    build_reference,
    check_reference,
    load_reference,
    reference_for,
    save_reference,
)

DIGITS = load_protocol("digits")
VIEW = DIGITS.views[0]


@pytest.fixture(scope="module")
def extractor():
    return DigitsExtractor()


@pytest.fixture(scope="module")
def reference(extractor):
    return build_reference(DIGITS, VIEW, extractor)


def test_reference_holds_the_moments_of_all_digits(reference, extractor):
    real = all_digits()
    assert reference.provenance["count"] == reference.sample.moments.count == len(real.images) == 1797
    features = extractor(real.images).features.double().numpy()
    np.testing.assert_allclose(reference.sample.moments.mean(), features.mean(0), atol=1e-4)
    covariance = np.cov(features, rowvar=False)
    np.testing.assert_allclose(reference.sample.moments.covariance(), covariance, atol=1e-4 * covariance.max())


def test_the_classifier_knows_the_real_digits(reference):
    accuracy = (reference.sample.logits.argmax(1) == reference.sample.labels).double().mean()
    assert accuracy > 0.97


def test_the_file_gives_everything_back(tmp_path, reference, extractor):
    path = save_reference(reference, tmp_path / "digits.npz")
    again = load_reference(path, load_protocol("digits-short"), VIEW, extractor)  # another protocol, the same real images
    assert again.provenance == reference.provenance
    assert torch.equal(again.sample.moments.covariance(), reference.sample.moments.covariance())
    for field in ("features", "logits", "labels", "pixels"):
        assert torch.equal(getattr(again.sample, field), getattr(reference.sample, field))
    assert again.sample.spatial is None


def test_the_file_keeps_spatial_moments(tmp_path):
    spatial = CallableExtractor(lambda x: (x.float().mean((2, 3)), None, x[:, 0, 3]), "digits", "1" * 64, dim=1)
    built = build_reference(DIGITS, VIEW, spatial)
    again = load_reference(save_reference(built, tmp_path / "digits.npz"), DIGITS, VIEW, spatial)
    assert again.sample.spatial.dim == 8
    assert again.sample.spatial.count == 1797
    assert torch.equal(again.sample.spatial.covariance(), built.sample.spatial.covariance())
    assert torch.equal(again.sample.moments.covariance(), built.sample.moments.covariance())


def test_other_weights_or_images_are_refused_by_name(reference, extractor):
    stale = replace(reference, provenance={**reference.provenance, "fingerprint": "0" * 64})
    with pytest.raises(UserError, match="fingerprint"):
        check_reference(stale, DIGITS, VIEW, extractor)
    other = Protocol(**{**DIGITS.model_dump(), "dataset": "other"})
    with pytest.raises(UserError, match="reference_hash"):
        check_reference(reference, other, VIEW, extractor)
    with pytest.raises(UserError, match="is for extractor 'x'"):
        check_reference(reference, DIGITS, View(extractor="x", metrics=["fid"]), extractor)


def test_a_file_for_other_weights_is_refused(tmp_path, reference, extractor):
    stale = replace(reference, provenance={**reference.provenance, "fingerprint": "0" * 64})
    path = save_reference(stale, tmp_path / "digits.npz")
    with pytest.raises(UserError, match="fingerprint"):
        load_reference(path, DIGITS, VIEW, extractor)


def test_a_file_that_its_sidecar_does_not_describe_is_refused(tmp_path, reference, extractor):
    path = save_reference(reference, tmp_path / "digits.npz")
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), "sha256": "0" * 64}))
    with pytest.raises(UserError, match="not the file"):
        load_reference(path, DIGITS, VIEW, extractor)
    sidecar.unlink()
    with pytest.raises(UserError, match="side by side"):
        load_reference(path, DIGITS, VIEW, extractor)


def test_the_cache_is_written_once_and_then_read(tmp_path, extractor, monkeypatch):
    first = reference_for(DIGITS, VIEW, extractor, tmp_path)
    monkeypatch.setattr("diffdistill.evaluation.reference.build_reference", lambda *_: pytest.fail("built again"))
    second = reference_for(DIGITS, VIEW, extractor, tmp_path)
    assert torch.equal(first.sample.features, second.sample.features)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npz"]


def test_missing_statistics_say_how_to_make_them(extractor):
    protocol = Protocol(**{**DIGITS.model_dump(), "reference": "digits-al", "about": "Take them from the moon."})
    with pytest.raises(UserError, match=r"diffdistill stats IMAGES --protocol digits(.|\n)*from the moon"):
        build_reference(protocol, VIEW, extractor)
