"""The whole pass: independence from the batch size, blocks, labels, timing, and the JSON of the result."""

import json
import time
from dataclasses import replace

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.evaluate import evaluate, evaluate_images
from diffdistill.evaluation.features import CallableExtractor, DigitsExtractor
from diffdistill.evaluation.images import from_uint8, to_uint8
from diffdistill.evaluation.metrics.frechet import frechet_distance
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.reference import all_digits
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.views import open_views
from diffdistill.files import write_json

REAL = all_digits()
CLASSES = [REAL.images[REAL.asked == label] for label in range(10)]


def generator_of(noise=0.0, shift=0):
    """A generator whose image k depends on seed and label k only: a real digit of class label + shift, with noise."""

    def one(seed, label):
        rng = torch.Generator().manual_seed(seed)
        pool = CLASSES[(label + shift) % 10]
        image = from_uint8(pool[int(torch.randint(len(pool), (), generator=rng))])
        return image + noise * torch.randn(image.shape, generator=rng)

    return lambda seeds, labels: torch.stack([one(*pair) for pair in zip(seeds, labels.tolist(), strict=True)])


METRICS = load_protocol("digits-short").metrics


def small(metrics=METRICS, extractor="digits", **fields):
    sizes = {"num_images": 700, "first_seeds": [0, 700], "jackknife_groups": 10}
    views = [{"extractor": extractor, "metrics": metrics}]
    return Protocol(**{**load_protocol("digits-short").model_dump(), **sizes, "views": views, **fields})


def score(generate, extractor, protocol=None, **options):
    protocol = small() if protocol is None else protocol
    return evaluate(generate, protocol, views=open_views(protocol, extractors={extractor.name: extractor}), **options)


def score_images(images, asked, extractor, protocol, **options):
    views = open_views(protocol, extractors={extractor.name: extractor})
    return evaluate_images(images, asked, protocol, views=views, **options)


@pytest.fixture(scope="module")
def extractor():
    return DigitsExtractor()


@pytest.fixture(scope="module")
def result(extractor):
    return score(generator_of(0.1), extractor, nfe=8, num_steps=4, batch_size=100)


@pytest.mark.parametrize("batch_size", [63, 700, 5000])
def test_the_result_does_not_depend_on_the_batch_size(result, extractor, batch_size):
    other = score(generator_of(0.1), extractor, batch_size=batch_size)
    for name, value in result.values.items():
        assert other.values[name].blocks == pytest.approx(value.blocks, rel=1e-9), name


def test_noise_raises_the_distance_and_lowers_the_accuracy(result, extractor):
    worse = score(generator_of(0.6), extractor)
    assert worse.mean("fid") > 2 * result.mean("fid")
    assert worse.mean("kid") > result.mean("kid")
    assert worse.mean("accuracy") < result.mean("accuracy")
    assert worse.mean("precision") < result.mean("precision")


def test_labels_off_by_one_show_in_the_accuracy_alone(result, extractor):
    shifted = score(generator_of(0.1, shift=1), extractor)
    assert result.mean("accuracy") > 0.98
    assert shifted.mean("accuracy") < 0.02
    assert shifted.mean("fid") == pytest.approx(result.mean("fid"), rel=0.5)


def test_the_real_digits_against_themselves_give_zero(extractor):
    protocol = small(num_images=1797, first_seeds=[0])
    found = score_images(REAL.images, REAL.asked, extractor, protocol)
    assert found.mean("fid") < 1e-9
    assert (found.mean("precision"), found.mean("recall")) == (1.0, 1.0)
    assert found.mean("diversity") == pytest.approx(1.0)
    for name in ("accuracy", "saturated", "contrast"):
        assert found.mean(name) == pytest.approx(found.reference_values[name])


def test_values_carry_mean_and_spread_of_the_blocks(result):
    fid = result.values["fid"]
    assert result.num_blocks == len(fid.blocks) == 2
    assert fid.mean == pytest.approx(sum(fid.blocks) / 2)
    assert fid.sd == pytest.approx(abs(fid.blocks[0] - fid.blocks[1]) / 2**0.5)
    assert fid.se > 0


def test_images_and_generator_give_the_same_numbers(result, extractor):
    protocol = small()
    batches = [to_uint8(generator_of(0.1)(list(protocol.seeds(block)), protocol.labels(block))) for block in (0, 1)]
    images = torch.cat(batches)
    labels = torch.cat([protocol.labels(0), protocol.labels(1)])
    other = score_images(images, labels, extractor, protocol)
    assert other.values == result.values
    first = score_images(batches[0], protocol.labels(0), extractor, protocol)  # one block alone
    assert first.values["fid"].blocks == result.values["fid"].blocks[:1]
    assert first.values["fid"].sd is None


def test_without_labels_the_metrics_that_need_them_are_named_as_skipped(extractor):
    protocol = small(first_seeds=[0])
    images = to_uint8(generator_of()(list(protocol.seeds(0)), protocol.labels(0)))
    found = score_images(images, None, extractor, protocol)
    assert found.skipped == {"accuracy": "needs labels", "diversity": "needs labels"}
    assert found.mean("accuracy") is None
    assert found.mean("fid") > 0


@pytest.mark.parametrize("count", [0, 699, 1000, 1401])
def test_another_number_of_images_is_refused(extractor, count):
    with pytest.raises(UserError, match="scores 700 or 2 x 700 images"):
        score_images(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), None, extractor, small(metrics=["pixels"]))


def test_labels_of_another_number_are_refused(extractor):
    with pytest.raises((UserError, ValueError), match="one label or caption per image"):
        score_images(REAL.images[:700], REAL.asked[:701], extractor, small(metrics=["accuracy"]))


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (lambda seeds, labels: torch.zeros(len(seeds) - 1, 1, 8, 8), "one image per seed"),
        (lambda seeds, labels: torch.zeros(len(seeds), 1, 8, 8, dtype=torch.uint8), "floating"),
        (lambda seeds, labels: torch.full((len(seeds), 1, 8, 8), float("nan")), "NaN"),
        (lambda seeds, labels: torch.zeros(len(seeds), 3, 8, 8), r"\(B, 1, 8, 8\)"),
    ],
)
def test_what_no_generator_should_return_is_refused(extractor, generate, message):
    with pytest.raises(ValueError, match=message):
        score(generate, extractor)


def test_time_per_image_leaves_out_the_first_batch(extractor):
    calls = []

    def generate(seeds, labels):
        time.sleep(1.0 if not calls else 0.02)
        calls.append(len(seeds))
        return torch.zeros(len(seeds), 1, 8, 8)

    protocol = small(num_images=40, first_seeds=[0], metrics=["pixels"])
    found = score(generate, extractor, protocol, batch_size=10)
    assert calls == [10] * 4
    assert 2.0 <= found.cost.ms_per_image < 20.0  # 20 ms for ten images, on a machine that may be busy; with the first: 35
    assert found.seconds["generate"] >= 1.05
    assert score(generate, extractor, protocol, batch_size=40).cost.ms_per_image is None


def test_progress_reports_every_batch(extractor):
    seen = []
    protocol = small(num_images=50, first_seeds=[0, 50], metrics=["pixels"])
    score(generator_of(), extractor, protocol, progress=lambda done, total: seen.append((done, total)), batch_size=30)
    assert seen == [(30, 100), (50, 100), (80, 100), (100, 100)]


def test_the_result_goes_through_json(tmp_path, result):
    path = write_json(tmp_path / "eval.json", result.to_json())
    assert Evaluation.from_json(json.loads(path.read_text())) == result
    json.dumps(result.to_json(), allow_nan=False)
    report = result.to_json()
    assert report["schema"] == 2
    assert (report["cost"]["nfe"], report["cost"]["num_steps"], report["num_images"]) == (8, 4, 700)
    assert report["protocol_hash"] == small().hash
    assert set(report["versions"]) == {"diffdistill", "torch", "numpy", "diffusers"}
    with pytest.raises(UserError, match="schema"):
        Evaluation.from_json({**report, "schema": 0})


def test_a_callable_serves_as_extractor(monkeypatch):
    flat = CallableExtractor(lambda images: images.flatten(1).float() / 255, "pixels", "1" * 64, dim=64)
    protocol = small(extractor="pixels", metrics=["fid", "kid", "accuracy"], first_seeds=[0])
    found = score(generator_of(0.05), flat, protocol)
    assert 0 < found.mean("fid") < 1
    assert found.skipped == {"accuracy": "needs logits"}
    assert found.views[0]["fingerprint"] == "1" * 64


def halves(images):
    """The mean of the image as its feature; those of its upper and its lower half as the spatial ones."""
    rows = images.float().mean((1, 3)) / 255
    return rows.mean(1, keepdim=True), None, torch.stack([rows[:, :4].mean(1), rows[:, 4:].mean(1)], 1)


def test_sfid_sees_where_in_the_image_and_fid_does_not():
    split = CallableExtractor(halves, "halves", "1" * 64, dim=1)
    protocol = small(extractor="halves", metrics=["fid", "sfid"], num_images=1797, first_seeds=[0])
    real = split(REAL.images).spatial.double()
    flipped = score_images(REAL.images.flip(2), None, split, protocol)
    mean, covariance = real.mean(0), real.T.cov()
    expected = frechet_distance(mean.flip(0), covariance.flip(0, 1), mean, covariance).value
    assert flipped.mean("sfid") == pytest.approx(expected, rel=1e-4)
    assert flipped.mean("fid") < 1e-6 * expected
    assert flipped.values["sfid"].se > 0


def test_sfid_of_an_extractor_without_spatial_features_is_skipped(extractor):
    found = score_images(REAL.images[:700], None, extractor, small(metrics=["sfid"], first_seeds=[0]))
    assert found.skipped == {"sfid": "needs spatial"}


def test_an_extractor_that_the_protocol_does_not_name_is_refused():
    flat = CallableExtractor(lambda images: images.flatten(1).float(), "pixels", "1" * 64, dim=64)
    with pytest.raises(UserError, match="is for extractor 'digits'"):
        evaluate(generator_of(), small(), views=open_views(small(), extractors={"digits": flat}))


def test_features_that_are_not_finite_are_one_clear_message():
    broken = CallableExtractor(lambda images: images.flatten(1).float() / 0, "pixels", "1" * 64, dim=64)
    fine = CallableExtractor(lambda images: images.flatten(1).float(), "pixels", "1" * 64, dim=64)
    protocol = small(extractor="pixels", metrics=["fid"], first_seeds=[0])
    [view] = open_views(protocol, extractors={"pixels": fine})
    with pytest.raises(UserError, match=r"features hold NaN or infinity.*weights verify"):
        evaluate(generator_of(), protocol, views=[replace(view, extractor=broken)])
