"""Parts of an evaluation: a killed one goes on to the same bytes, another partition or several processes to the same values."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffdistill.errors import UserError
from diffdistill.evaluation.evaluate import Keeping, evaluate, evaluate_images
from diffdistill.evaluation.features import CallableExtractor
from diffdistill.evaluation.metrics.sample import Sample, SampleSum
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.parts import PartFiles, Range, ranges
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.views import open_views
from diffdistill.memory import LiveBytes
from diffdistill.processes import Processes

METRICS = ("fid", "sfid", "kid_normalised", "accuracy", "pixels")


def protocol(**fields):
    sizes = {"num_images": 700, "first_seeds": [0, 700], "jackknife_groups": 10}
    views = [
        {"extractor": "digits", "metrics": ["fid", "kid_normalised", "accuracy", "pixels"]},
        {"extractor": "rows", "metrics": ["sfid"]},
    ]
    return Protocol(**{**load_protocol("digits-short").model_dump(), **sizes, "views": views, **fields})


PROTOCOL = protocol()
ROWS = CallableExtractor(lambda x: (x.float().mean((2, 3)), None, x.float().mean(3).flatten(1)), "rows", "1" * 64, dim=1)


@pytest.fixture(scope="module")
def views():
    return open_views(PROTOCOL, extractors={"rows": ROWS})


def noise(seeds, labels):
    return torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) / 2 for seed in seeds])


@pytest.fixture(scope="module")
def whole(views):
    return evaluate(noise, PROTOCOL, views=views)


class Killed(BaseException):
    """What a test stops an evaluation with."""


def dying(after):
    """A generator that dies in call number `after` + 1."""
    calls = []

    def generate(seeds, labels):
        if len(calls) == after:
            raise Killed
        calls.append(seeds)
        return noise(seeds, labels)

    return generate, calls


def assert_same_values(one, two, rel):
    assert one.values.keys() == two.values.keys() and len(one.values) >= len(METRICS)
    for name, value in one.values.items():
        assert two.values[name].blocks == pytest.approx(value.blocks, rel=rel, abs=rel), name


def test_parts_are_ranges_that_keep_the_images_of_a_prompt_together():
    assert ranges(PROTOCOL, [0, 1], 300) == [
        [Range(block, start, stop) for start, stop in ((0, 300), (300, 600), (600, 700))] for block in (0, 1)
    ]
    prompts = protocol(images_per_prompt=7, label_rule="prompts", prompts={"file": "p.txt"})
    assert {part.start % 7 for block in ranges(prompts, [0], 100) for part in block} == {0}
    assert ranges(prompts, [0], 5)[0][0] == Range(0, 0, 7)


def test_a_killed_evaluation_goes_on_with_the_parts_that_are_missing_and_gives_the_same_bytes(views, whole, tmp_path):
    options = {"views": views, "batch_size": 50, "images_per_part": 100}
    keeping = Keeping(tmp_path / "parts", {"model": "noise"})
    generate, calls = dying(after=7)  # in the middle of the fourth part
    with pytest.raises(Killed):
        evaluate(generate, PROTOCOL, keeping=keeping, **options)
    kept = {path.name: path.read_bytes() for path in keeping.folder.glob("*.safetensors")}
    assert len(kept) == 3

    generate, calls = dying(after=-1)
    resumed = evaluate(generate, PROTOCOL, keeping=keeping, **options)
    assert calls[0] == list(range(300, 350)) and len(calls) == 2 * 11
    assert not keeping.folder.exists()
    straight = evaluate(noise, PROTOCOL, **options)
    assert resumed.values == straight.values  # bit for bit
    for name, values in straight.deleted.items():
        assert torch.equal(resumed.deleted[name], values)
    assert_same_values(straight, whole, rel=1e-12)  # another partition


def test_progress_of_a_resumed_evaluation_counts_what_is_left(views, tmp_path):
    keeping, seen = Keeping(tmp_path / "parts"), []
    options = {"views": views, "batch_size": 350, "images_per_part": 350, "keeping": keeping}
    with pytest.raises(Killed):
        evaluate(dying(after=2)[0], PROTOCOL, **options)
    evaluate(noise, PROTOCOL, lambda done, total: seen.append((done, total)), **options)
    assert seen == [(350, 700), (700, 700)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"keeping": "other"}, "target"), ({"images_per_part": 200}, "images_per_part"), ({"protocol": 1}, "protocol")],
)
def test_parts_of_another_evaluation_are_refused(views, tmp_path, changes, field):
    options = {"views": views, "images_per_part": 100, "keeping": Keeping(tmp_path, {"model": "noise"})}
    with pytest.raises(Killed):
        evaluate(dying(after=2)[0], PROTOCOL, **options)
    options["images_per_part"] = changes.get("images_per_part", 100)
    options["keeping"] = Keeping(tmp_path, {"model": changes.get("keeping", "noise")})
    with pytest.raises(UserError, match=rf"another evaluation \({field} differ\)"):
        evaluate(noise, protocol(metric_seed=changes.get("protocol", 0)), **options)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:100] + b"x" + data[101:]])
def test_a_damaged_part_is_named(views, tmp_path, damage):
    options = {"views": views, "images_per_part": 700, "keeping": Keeping(tmp_path, {})}
    with pytest.raises(Killed):
        evaluate(dying(after=2)[0], PROTOCOL, **options)
    [path] = tmp_path.glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"block0-00000000-00000700.safetensors is damaged .*Delete it"):
        evaluate(noise, PROTOCOL, **options)


def test_several_processes_without_a_place_to_put_parts_are_refused(views):
    with pytest.raises(ValueError, match="give `keeping`"):
        evaluate(noise, PROTOCOL, views=views, processes=Processes(0, 2))


def test_images_that_exist_are_resumed_too(views, tmp_path):
    images = torch.randint(256, (700, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Source:
        def __init__(self, end=700):
            self.asked, self.end = [], end

        def __len__(self):
            return 700

        def batches(self, batch_size, start, stop):
            if stop > self.end:
                raise Killed
            self.asked.append((start, stop))
            yield from images[start:stop].split(64)

    options = {"views": views, "keeping": Keeping(tmp_path / "parts"), "images_per_part": 200}
    with pytest.raises(Killed):
        evaluate_images(Source(end=500), None, PROTOCOL, **options)
    source = Source()
    found = evaluate_images(source, None, PROTOCOL, **options)
    assert source.asked == [(400, 600), (600, 700)]
    assert found.values == evaluate_images(images, None, PROTOCOL, views=views, images_per_part=200).values


def test_a_sink_gets_every_image_with_its_number(views):
    seen, flushed = {}, []

    class Sink:
        def add(self, images, first):
            seen.update({first + index: image for index, image in enumerate(images)})

        def flush(self):
            flushed.append(len(seen))

    evaluate(noise, PROTOCOL, views=views, batch_size=90, sink=Sink(), images_per_part=500)
    assert flushed == [500, 700, 1200, 1400]  # before a part counts as done
    assert list(seen) == list(range(1400))
    assert torch.equal(seen[705], ((noise([705], None)[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


def test_a_part_holds_only_the_groups_it_touches_and_no_features_unless_a_metric_reads_them(tmp_path):
    fid_only = protocol(views=[{"extractor": "digits", "metrics": ["fid"]}], first_seeds=[0])
    options = {"views": open_views(fid_only), "images_per_part": 140, "keeping": Keeping(tmp_path)}
    with pytest.raises(Killed):
        evaluate(dying(after=2)[0], fid_only, **options)
    first, second = (load_file(path) for path in sorted(tmp_path.glob("*.safetensors")))
    assert {name.split(".")[1] for name in first} == {"moments"}
    assert first["0.moments.counts"].tolist() == second["0.moments.counts"].tolist() == [70, 70]
    assert json.loads((tmp_path / "key.json").read_text())["protocol"] == fid_only.hash


def test_the_samples_of_parts_add_up_to_that_of_the_whole():
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    groups = torch.arange(60) * 4 // 60
    expected = Moments(3, 4)
    expected.update(x, groups)
    total = SampleSum(4)
    for start, stop in ((0, 20), (20, 22), (22, 60)):
        first = int(groups[start])
        part = Moments(3, int(groups[stop - 1]) - first + 1)
        part.update(x[start:stop], groups[start:stop] - first)
        total.add(Sample(moments=part, labels=torch.arange(start, stop)), first)
    found = total.sample()
    assert found.labels.tolist() == list(range(60)) and found.features is None
    assert found.moments.counts.tolist() == expected.counts.tolist()
    for rest, expected_rest in zip(found.moments.leave_one_out(), expected.leave_one_out(), strict=True):
        torch.testing.assert_close(rest.mean(), expected_rest.mean())
        torch.testing.assert_close(rest.covariance(), expected_rest.covariance())
    again = Sample.from_tensors(found.tensors())
    assert torch.equal(again.moments.covariance(), found.moments.covariance()) and again.labels is not None


def test_parts_left_by_nobody_make_no_folder(tmp_path):
    files = PartFiles(tmp_path / "parts", {"a": 1})
    assert not files.has(Range(0, 0, 1)) and not files.folder.exists()


def test_with_moments_alone_memory_does_not_grow_with_the_number_of_images():
    few = protocol(views=[{"extractor": "digits", "metrics": ["fid"]}], num_images=6000, first_seeds=[0], jackknife_groups=10)
    held = []

    def generate(seeds, labels):
        held.append(live.now)
        return torch.rand(len(seeds), 1, 8, 8, generator=torch.Generator().manual_seed(seeds[0]))

    views = open_views(few)
    with LiveBytes() as live:
        evaluate(generate, few, views=views, batch_size=100, images_per_part=1000)
    assert len(held) == 60
    assert max(held[50:]) <= max(held[10:20])  # the sixth part against the second
