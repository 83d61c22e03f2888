"""From the name in a view to the network behind its resize and its precision: what the network sees, and what is said of it."""

import math

import pytest
import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Collector, Seen
from diffdistill.evaluation.evaluate import evaluate_images
from diffdistill.evaluation.extractors import (
    IMAGES_PER_PASS_ON_CPU,
    NetworkExtractor,
    PairExtractor,
    SpreadExtractor,
    open_extractor,
)
from diffdistill.evaluation.features import DiversityExtractor, Features, ScoringExtractor, TextExtractor
from diffdistill.evaluation.protocol import Protocol, View
from diffdistill.evaluation.resize import resize
from diffdistill.evaluation.transforms import Transform
from diffdistill.evaluation.views import open_views
from diffdistill.evaluation.weights import FOLDER_VARIABLE

SIZE, DIM = 6, 16
CPU = torch.device("cpu")


class Network(nn.Module):
    """A linear network of images of 6x6 pixels that notes what it sees, and under which settings."""

    name, fingerprint, dim, size = "tiny", "1" * 64, DIM, SIZE

    def __init__(self):
        super().__init__()
        weight = torch.randn(DIM, 3 * SIZE * SIZE, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight / math.sqrt(3 * SIZE * SIZE))
        self.seen: list[torch.Tensor] = []
        self.settings: list[tuple[str, bool]] = []

    def forward(self, images):
        self.seen.append(images)
        self.settings.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        pool = images.flatten(1) / 255 @ self.weight.T
        return Features(pool, logits=2 * pool)


class Reader(Network):
    """It reads too: a caption is the number of its letters."""

    def texts(self, captions):
        return torch.tensor([[float(len(caption))] for caption in captions]) @ self.weight[:1, :DIM]


class Judge(Network):
    """It scores pairs: the red of the first pixel in whole levels, and the number that the caption is."""

    def scores(self, images, captions):
        self.seen.append(images)
        return 1000 * images[:, 0, 0, 0] + torch.tensor([float(caption) for caption in captions])


class Comparer(Network):
    """It compares the images of a prompt: the variance of the red of their first pixels."""

    def diversity(self, images):
        self.seen.append(images)
        return images[:, :, 0, 0, 0].var(1)


def extractor_of(network, precision="float32", resize="identity", kind=NetworkExtractor):
    return kind(network, resize, precision, CPU)


def images(count, channels=3, size=SIZE):
    return torch.randint(256, (count, channels, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def view(extractor, **fields):
    return View(extractor=extractor, metrics=fields.pop("metrics", ["vendi"]), **fields)


def protocol(*views, **fields):
    """Four images, compared with no real ones."""
    return Protocol(
        **{
            **dict(name="tiny", dataset="noise", num_images=4, first_seeds=[0], label_rule="none", uint8_rule="round"),
            **dict(views=views, reference="none", jackknife_groups=2, metric_seed=0),
            **fields,
        }
    )


# --- What the network sees


def test_the_network_sees_resized_floats():
    network = Network()
    extractor_of(network, resize="tf1_bilinear")(images(3, size=9))
    assert torch.equal(network.seen[0], resize(images(3, size=9), (SIZE, SIZE), "tf1_bilinear"))
    extractor_of(network, resize="pil_bicubic_u8")(images(3, size=9))
    assert network.seen[1].dtype == torch.float32
    assert torch.equal(network.seen[1], resize(images(3, size=9), (SIZE, SIZE), "pil_bicubic_u8").float())


def test_a_network_of_any_size_sees_images_as_large_as_they_are():
    network = Comparer()
    network.size = None
    extractor_of(network, kind=SpreadExtractor).diversity(images(2, size=9)[None])
    assert network.seen[0].shape == (1, 2, 3, 9, 9)


def test_grey_images_are_seen_as_rgb_of_equal_channels():
    grey = images(5, channels=1)
    for kind in ("identity", "pil_bicubic", "torch_bilinear"):
        extractor = extractor_of(Network(), resize=kind)
        assert torch.equal(extractor(grey).features, extractor(grey.expand(-1, 3, -1, -1)).features)


def test_many_images_pass_in_parts_that_change_nothing():
    network, many = Network(), images(2 * IMAGES_PER_PASS_ON_CPU + 7)
    found = extractor_of(network)(many)
    assert [len(part) for part in network.seen] == [IMAGES_PER_PASS_ON_CPU, IMAGES_PER_PASS_ON_CPU, 7]
    assert torch.equal(torch.cat(network.seen), many.float())
    expected = many.double().flatten(1) / 255 @ network.weight.double().T
    torch.testing.assert_close(found.features.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(found.logits, 2 * found.features)
    assert found.spatial is None


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, SIZE, SIZE), torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)])
def test_what_are_no_bytes_is_refused(wrong):
    with pytest.raises(ValueError, match="uint8"):
        extractor_of(Network())(wrong)


# --- Precision


def test_float32_is_strict_whatever_is_set_around_it():
    network, some = Network(), images(8)
    expected = extractor_of(network)(some).features
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = extractor_of(network)(some).features
            assert torch.get_float32_matmul_precision() == "medium"  # afterwards everything is as it was
            assert (some.float().flatten(1) @ network.weight.T).dtype == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected) and found.dtype == torch.float32
    assert network.settings == [("highest", False)] * 2
    assert not found.requires_grad


@pytest.mark.parametrize(("precision", "places"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_is_the_networks_alone(precision, places):
    """What is rounded to p binary places is off by 2^-p of it at most: pixels, weights and the sum, each once."""
    network, some = Network(), images(64)
    exact, found = (extractor_of(network, kind)(some).features for kind in ("float32", precision))
    assert found.dtype == torch.float32 and torch.equal(found, found.to(getattr(torch, precision)).float())
    scale = some.float().flatten(1) / 255 @ network.weight.abs().T
    error = ((found - exact).abs() / scale).max()
    assert 2 ** -(places + 4) < error < 3 * 2**-places


def test_tf32_is_allowed_only_where_it_is_asked_for():
    network = Network()
    extractor_of(network, "tf32")(images(1))
    assert network.settings == [("high", True)]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
def test_tf32_changes_the_numbers_of_a_gpu():
    network, some = nn.Conv2d(3, 8, SIZE, bias=False), images(50)

    def features(precision):
        wrapped = Network()
        wrapped.forward = lambda images: Features(network.cuda()(images / 255).flatten(1))
        return NetworkExtractor(wrapped, "identity", precision, torch.device("cuda"))(some).features.cpu()

    expected = network.cpu().double()(some.double() / 255).flatten(1).float()
    network.float()
    torch.testing.assert_close(features("float32"), expected, rtol=0, atol=1e-5)
    assert 1e-5 < (features("tf32") - expected).abs().max() < 1e-2


def test_the_precision_stands_in_the_protocol():
    views = [view("tiny", precision=precision) for precision in ("float32", "tf32", "float16", "bfloat16")]
    assert len({protocol(one).hash for one in views}) == 4
    assert len({protocol(one).reference_hash(one) for one in views}) == 4
    assert str(views[3]) == "tiny in bfloat16" and str(views[0]) == "tiny"


def test_the_precision_of_the_view_reaches_the_numbers():
    name = f"{__name__}:Network"
    found = {
        precision: evaluate_images(images(4), None, protocol(view(name, precision=precision)))
        for precision in ("float32", "bfloat16")
    }
    exact, rough = (one.mean("vendi") for one in found.values())
    assert exact != rough == pytest.approx(exact, rel=1e-2)


# --- Captions and prompts


def test_a_network_that_reads_is_a_text_extractor():
    extractor = open_extractor(view(f"{__name__}:Reader"), CPU)
    assert isinstance(extractor, TextExtractor) and not isinstance(extractor, ScoringExtractor)
    texts = extractor.texts(["ab", "abcd"])
    assert texts.dtype == torch.float32 and not texts.requires_grad
    assert torch.equal(texts[1], 2 * texts[0])


def test_each_image_is_scored_with_its_own_caption():
    many, network = images(2 * IMAGES_PER_PASS_ON_CPU + 3), Judge()
    extractor = extractor_of(network, kind=PairExtractor)
    scores = extractor.scores(many, [str(index) for index in range(len(many))])
    assert torch.equal(scores, 1000 * many[:, 0, 0, 0].float() + torch.arange(len(many)))
    assert [len(part) for part in network.seen] == [IMAGES_PER_PASS_ON_CPU, IMAGES_PER_PASS_ON_CPU, 3]
    assert isinstance(open_extractor(view(f"{__name__}:Judge"), CPU), ScoringExtractor)


def test_the_images_of_a_prompt_are_compared_among_themselves():
    many, network = images(3 * 4), Comparer()
    groups = many.unflatten(0, (3, 4))
    expected = groups[:, :, 0, 0, 0].float().var(1)
    assert torch.equal(extractor_of(network, kind=SpreadExtractor).diversity(groups), expected)
    narrow = SpreadExtractor(network, "identity", "float32", CPU, images_per_pass=9)  # two prompts of four
    torch.testing.assert_close(narrow.diversity(groups), expected)
    assert [part.shape[:2] for part in network.seen] == [(3, 4), (2, 4), (1, 4)]
    assert isinstance(open_extractor(view(f"{__name__}:Comparer"), CPU), DiversityExtractor)


# --- Names and weights


def test_a_network_of_ones_own_is_named_by_its_place():
    name = f"{__name__}:Network"
    extractor = open_extractor(view(name, resize="pil_bicubic", precision="float16"), CPU)
    assert (extractor.name, extractor.fingerprint, extractor.dim) == ("tiny", "1" * 64, DIM)
    assert (extractor.resize, extractor.precision) == ("pil_bicubic", "float16")
    found = evaluate_images(images(4, size=9), None, protocol(view(name, resize="pil_bicubic")))
    assert found.views[0]["extractor"] == "tiny" and not found.is_invalid
    assert 1 < found.mean("vendi") <= 4


@pytest.mark.parametrize("place", ["no_such_module:network", f"{__name__}:no_such_network", "json:no_such_network", ":Network"])
def test_a_place_where_nothing_is_is_refused(place):
    with pytest.raises(UserError, match=f"extractor '{place}' cannot be imported.*Write module:function"):
        open_extractor(view(place), CPU)


def test_an_unknown_name_shows_the_nearest_and_all():
    with pytest.raises(UserError, match="unknown feature extractor 'incepton'. Did you mean 'inception'"):
        open_extractor(view("incepton"), CPU)


@pytest.mark.parametrize("fields", [{"resize": "pil_bicubic"}, {"precision": "bfloat16"}])
def test_an_embedded_extractor_takes_images_as_they_are(fields):
    with pytest.raises(UserError, match="extractor 'digits' takes images as they are"):
        open_extractor(view("digits", **fields), CPU)
    assert open_extractor(view("digits"), CPU).name == "digits"


def test_weights_that_are_not_there_are_asked_for_and_nothing_takes_their_place(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match="there are no weights for 'inception'.*diffdistill weights add inception FILE"):
        open_extractor(view("inception-pytorch-fid"), CPU)


@pytest.mark.parametrize("weights", ["random:", "random:x", "random:-1", "random:1.5", "/some/file.pt", "0"])
def test_random_weights_have_a_seed_and_others_lie_in_the_store(weights):
    with pytest.raises(UserError, match=f"weights '{weights}' are unknown.*written random:SEED"):
        open_extractor(view("inception"), CPU, weights)


def test_numbers_of_random_weights_are_stamped():
    views = [
        view("inception", resize="tf1_bilinear"),
        view("inception-pytorch-fid", resize="tf1_bilinear", metrics=["inception_score"]),
    ]
    asked = protocol(*views)
    found = evaluate_images(images(4), None, asked, views=open_views(asked, ["vendi"], weights="random:7", device=CPU))
    assert found.views[0]["extractor"] == "inception-random-7-INVALID"
    assert found.is_invalid and found.to_json()["views"][0]["extractor"].endswith("INVALID")


def test_random_weights_stand_in_for_their_own_network_alone():
    other = open_extractor(view("inception-pytorch-fid", resize="tf1_bilinear"), CPU, "random:0")
    assert other.name == "inception-pytorch-fid-random-0-INVALID"
    with pytest.raises(UserError, match="is for extractor 'inception'; got 'inception-pytorch-fid-random-0-INVALID'"):
        open_views(protocol(view("inception", resize="tf1_bilinear")), extractors={"inception": other})


def test_a_score_of_images_alone_needs_no_captions_and_one_that_reads_is_skipped_without():
    class Scorer(torch.nn.Module):
        name, fingerprint, size = "scorer", "0" * 64, 8

        def __init__(self, reads):
            super().__init__()
            self.reads = reads

        def scores(self, images, captions):
            return images.mean((1, 2, 3))

    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {}
    for reads in (False, True):
        extractor = PairExtractor(Scorer(reads), "identity", "float32", torch.device("cpu"))
        collector = Collector([Seen(Transform(), extractor, frozenset({"scores"}))], torch.zeros(5, dtype=torch.int64))
        collector.add(images)
        [found[reads]] = collector.finish()
    torch.testing.assert_close(found[False].scores, images.float().mean((1, 2, 3)))
    assert found[True].scores is None
