"""Our numbers are those of the packages that people quote: one network in their own kinds of file, the same images, their functions."""

import itertools
from typing import NamedTuple

import pytest
import torch
from fid_packages import PACKAGES, PROTOCOLS, frechet_distance, our_extractor, random_images, score, write_pngs, write_weights
from inception_files import torchvision_network

from diffdistill.evaluation.features import Features
from diffdistill.evaluation.metrics.inception_score import inception_score
from diffdistill.evaluation.metrics.kernel import kernel_distance
from diffdistill.evaluation.metrics.neighbours import precision_recall

NUM_GENERATED, NUM_REAL = 4, 3
GENERATED = random_images(NUM_GENERATED, (48, 64), seed=0, contrast=0.25)
REAL = random_images(NUM_REAL, (48, 64), seed=1, contrast=0.2)
EVERY = 4  # of the 2048 features are compared: distances in 512 dimensions take a tenth of a second


class Thinned:
    """An extractor of which every fourth feature is taken; all are kept in `seen`."""

    def __init__(self, extractor):
        self.extractor, self.seen = extractor, []

    def __getattr__(self, name):
        return getattr(self.extractor, name)

    def __call__(self, images):
        self.seen.append(self.extractor(images).features)
        return Features(self.seen[-1][:, ::EVERY])


class Ours(NamedTuple):
    """FID of thinned features by the whole evaluation, and that of all features, which takes a moment by `frechet_distance`."""

    evaluated: float
    of_all: float


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(torchvision_network(), tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_pngs(GENERATED, folder / "generated"), write_pngs(REAL, folder / "real")


@pytest.fixture(scope="module")
def ours(weights):
    """By protocol."""
    found = {}
    for name, protocol in PROTOCOLS.items():
        extractor = Thinned(our_extractor(protocol, weights))
        evaluation = score(protocol.with_num_images(NUM_GENERATED), extractor, GENERATED, REAL, ("fid",))
        found[name] = Ours(evaluation.mean("fid"), frechet_distance(*extractor.seen))
    return found


def package(name):
    pytest.importorskip(name.split()[0].replace("clean-fid", "cleanfid").replace("-", "_"))
    return PACKAGES[name]()


@pytest.mark.parametrize("name", PACKAGES)
def test_fid_is_that_of_the_package(name, weights, folders, ours):
    its = package(name)
    features = [its.features(weights, folder) for folder in folders]
    evaluated, of_all = ours[its.protocol]
    assert evaluated == pytest.approx(frechet_distance(*(part[:, ::EVERY] for part in features)), rel=1e-5)
    bound = 1e-6 if its.protocol == "clean" else 1e-5  # after resizes bit for bit equal only the network rounds differently
    assert of_all == pytest.approx(frechet_distance(*features), rel=bound)


def test_the_protocols_differ_by_much_more_than_the_bounds(ours):
    values = sorted(found.evaluated for found in ours.values())
    assert min(b / a - 1 for a, b in itertools.pairwise(values)) > 1000 * 1e-5


@pytest.fixture(scope="module")
def clouds():
    """Features of generated and of real images as any network could give them, float64 (90, 16), overlapping in part."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 90, 16, generator=generator, dtype=torch.float64)
    return 1.3 * x + 0.3, y


def test_kid_is_that_of_torch_fidelity_and_clean_fid(clouds):
    """Over subsets that are the whole sets, so that no draw of theirs or ours counts."""
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    cleanfid = pytest.importorskip("cleanfid.fid")
    x, y = clouds
    ours, *_ = kernel_distance(x, y, num_subsets=2, subset_size=90, seed=0)
    options = {"kid_subsets": 2, "kid_subset_size": 90, "verbose": False}
    assert ours == pytest.approx(kid.kid_features_to_metric(x, y, **options)[kid.KEY_METRIC_KID_MEAN], rel=1e-11)
    assert ours == pytest.approx(cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=2), rel=1e-11)


def test_the_inception_score_is_that_of_torch_fidelity_in_the_order_of_the_images(clouds):
    """And the spread over the splits, which papers write behind ±, is sqrt(splits - 1) times our standard error."""
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.cat(clouds)[torch.randperm(180, generator=torch.Generator().manual_seed(1))][:97]  # splits of 9 and of 10
    ours, its = inception_score(logits, num_splits=10), isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    assert ours.value == pytest.approx(its[isc.KEY_METRIC_ISC_MEAN], rel=1e-12)
    assert 3 * ours.se == pytest.approx(its[isc.KEY_METRIC_ISC_STD], rel=1e-9)


def test_precision_and_recall_are_those_of_torch_fidelity(clouds):
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = clouds
    its = prc.prc_features_to_metric(x, y, verbose=False)
    ours = precision_recall(x, y)
    assert ours == pytest.approx((its[prc.KEY_METRIC_PRECISION], its[prc.KEY_METRIC_RECALL]))
    assert 0.1 < ours[0] < ours[1] - 0.1 < 0.9  # what is spread wider lies outside more often, and covers more
