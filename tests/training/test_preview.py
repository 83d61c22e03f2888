"""What watches a run: drift figures on images of known statistics, and the score by which the best checkpoint is kept."""

import collections
import math
import threading
from dataclasses import replace

import pytest
import torch
from thread_processes import in_threads
from tiny_runs import run_config, save_teacher, small_protocol

from diffdistill import files
from diffdistill.evaluation import views
from diffdistill.evaluation.extractors import NetworkExtractor
from diffdistill.evaluation.protocol import load_protocol
from diffdistill.math import grids
from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import RectifiedFlowSchedule
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import build_roles
from diffdistill.processes import ALONE
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.training import checkpoint, drift, preview, run
from diffdistill.training.building import build_distiller, build_run_roles, open_teacher
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Interrupted, stopping_together


def test_saturation_is_the_share_of_values_at_the_ends():
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 0] = torch.tensor([1.0, -0.99])
    images[1, 0, 0] = torch.tensor([0.97, -0.97])
    assert drift.saturation(images) == 2 / 8


def test_contrast_is_the_standard_deviation_inside_an_image():
    flat, striped = torch.full((1, 1, 2, 2), 0.7), torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    assert drift.contrast(flat) == pytest.approx(0, abs=1e-7)
    assert drift.contrast(torch.cat([flat, striped])) == pytest.approx(0.5)


def test_diversity_compares_within_classes_only():
    images = torch.tensor([0.0, 0.0, 1.0, 0.5]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert drift.diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.25)  # 0 in one class, 0.5 in the other
    assert drift.diversity(images, None) == pytest.approx((0 + 1 + 0.5 + 1 + 0.5 + 0.5) / 6)
    assert math.isnan(drift.diversity(images[1:3], torch.tensor([0, 1])))


class Shrunk(Denoiser):
    """Says x0 = scale * the constant image 1."""

    schedule, sample_shape = RectifiedFlowSchedule(1.0), (1, 2, 2)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x_t, t, cond):
        alpha, sigma = self.schedule.coefficients(t)
        return Prediction("sample", torch.full_like(x_t, self.scale), x_t, alpha, sigma)


def test_fake_lag_is_below_one_for_a_fake_nearer_to_the_student_than_the_teacher():
    def lag(fake, teacher, samples):
        return drift.fake_lag(drift.denoising_errors(fake, teacher, samples, Condition.none(3), Noise(range(3))))

    samples = [torch.ones(3, 1, 2, 2)]
    assert lag(Shrunk(0.9), Shrunk(0.5), samples) == pytest.approx(0.1 / 0.5)
    assert lag(Shrunk(0.5), Shrunk(0.9), samples) == pytest.approx(5)
    of_every_step = [*samples, 0.6 * samples[0]]  # errors of 0.3 and 0.1 are added before they are divided
    assert lag(Shrunk(0.9), Shrunk(0.5), of_every_step) == pytest.approx(0.4 / 0.6)
    of_every_image = [torch.tensor([1.0, 1.0, 0.6]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)]  # so are those of images
    assert lag(Shrunk(0.9), Shrunk(0.5), of_every_image) == pytest.approx((0.1 + 0.1 + 0.3) / (0.5 + 0.5 + 0.1))


@pytest.fixture
def rows_of_threads(monkeypatch):
    """How many rows the networks of each thread have been asked about; the files of threads are kept apart like those of processes."""
    rows = collections.Counter()
    true = preview.Stoppable.__call__

    def call(stoppable, x_t, t, cond):
        answer = true(stoppable, x_t, t, cond)
        rows[threading.get_ident()] += len(x_t)
        return answer

    monkeypatch.setattr(preview.Stoppable, "__call__", call)
    monkeypatch.setattr(files, "_aside", lambda path: path.with_name(f"{path.name}.{threading.get_ident()}"))
    return rows


def built_for_each_thread(config):
    """Return teacher and roles for each of two threads, which cannot load them: diffusers patches torch while it does."""
    teachers = [open_teacher(config, "cpu") for _ in range(2)]
    return [(teacher, build_run_roles(config, teacher)) for teacher in teachers]


def previews(tmp_path, monkeypatch, num, in_step):
    """Return a function that lets a process make all that is looked at in samples, in passes of one image."""
    monkeypatch.setattr(preview, "TEACHER_STEPS", 3)
    config = run_config(save_teacher(tmp_path / "t"), tmp_path / "run", "dmd2")
    built = built_for_each_thread(config)
    for _, roles in built:
        generator = torch.Generator().manual_seed(0)
        for parameter in (*roles.parameters("student"), *roles.parameters("fake")):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    def look(processes):
        teacher, roles = built[processes.index]
        sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 2), "renoise")
        looking = preview.Preview(
            teacher, num, 0, teacher.examples(num), 1, tmp_path, stopping_together(processes), in_step=in_step
        )
        images = looking.student_images(roles, sampler, 7)
        return threading.get_ident(), looking.teacher_images, images, looking.fake_lag(roles, sampler, 7)

    return look


@pytest.mark.parametrize(
    ("num", "in_step", "made"),
    [
        (5, False, [3, 2]),
        (1, False, [1, 0]),
        (4, True, [2, 2]),
        (5, True, [5, 5]),
    ],  # split networks need as many passes in each
)
def test_processes_share_the_images_of_samples_and_all_get_those_of_one(
    tmp_path, monkeypatch, rows_of_threads, num, in_step, made
):
    look = previews(tmp_path, monkeypatch, num, in_step)
    _, teachers, students, lag = look(ALONE)
    passes = sum(rows_of_threads.values()) // num
    assert passes == 2 + 3 + (2 + 2 * 2 * 3)  # student, teacher; for the lag two networks at three levels of both outputs
    rows_of_threads.clear()
    shared = in_threads(2, look)
    assert [rows_of_threads[thread] for thread, *_ in shared] == [passes * images for images in made]
    for _, *found in shared:
        assert torch.equal(found[0], teachers) and torch.equal(found[1], students) and found[2] == lag
    assert not torch.equal(teachers, students) and abs(lag - 1) > 0.01
    assert not list(tmp_path.glob(".look*"))


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_process_ends_the_samples_of_all_before_their_next_pass(
    tmp_path, monkeypatch, rows_of_threads, signalled
):
    """It comes before the last pass of one of them, whose student makes three images; the other has made its two and waits."""
    asked = [0, 0]

    def asked_to_stop(index):
        asked[index] += 1
        return index == signalled and asked[index] >= 6

    ends = in_threads(2, previews(tmp_path, monkeypatch, 5, False), asked_to_stop)
    assert [type(end) for end in ends] == [Interrupted] * 2
    assert asked == [6, 6] and sorted(rows_of_threads.values()) == [4, 5]


def test_fake_lag_asks_both_networks_about_the_same_states_at_a_quarter_half_and_three_quarters():
    """At a flow's level t they are told (1 - t) x_g + t eps, of each image's own eps, a new one at each level."""

    class Asked(Shrunk):
        def __call__(self, x_t, t, cond):
            asked.append((x_t, t, cond))
            return super().__call__(x_t, t, cond)

    asked, cond = [], Condition.none(3)
    x_g = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2)
    drift.denoising_errors(Asked(0.9), Asked(0.5), [x_g], cond, Noise(range(3)))
    noise = Noise(range(3))
    assert len(asked) == 6 and all(condition is cond for _, _, condition in asked)
    for level, of_fake, of_teacher in zip((0.25, 0.5, 0.75), asked[::2], asked[1::2], strict=True):
        expected = (1 - level) * x_g + level * noise.draw((1, 2, 2))
        for x_t, t, _ in (of_fake, of_teacher):
            assert t.dtype == torch.float64 and t.tolist() == [level] * 3
            torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)


def test_feature_networks_are_on_the_device_only_while_a_validation_asks_them(tmp_path, monkeypatch):
    class Watched:
        size = None

        def __init__(self, digits):
            self.digits, self.name, self.fingerprint = digits, digits.name, digits.fingerprint

        def to(self, device):
            events.append(str(device))
            return self

        def __call__(self, images):
            events.append("asked")
            return self.digits(images[:, :1].to(torch.uint8))

    config = run_config(save_teacher(tmp_path / "t"), tmp_path / "run")
    protocol = load_protocol(small_protocol(tmp_path / "tiny.yaml", 61))
    opened, events = views.open_views(protocol, cache=tmp_path), []
    extractor = NetworkExtractor(Watched(opened[0].extractor), "identity", "float32", torch.device("cpu:0"))
    monkeypatch.setattr(views, "open_views", lambda *_, **__: [replace(opened[0], extractor=extractor)])
    teacher, roles = built_for_each_thread(config)[0]
    monkeypatch.setattr(Teacher, "device", torch.device("cpu:0"))  # the same CPU by another name
    validation = preview.Validation(teacher, protocol, (2, 1), 16, tmp_path)
    assert events == ["cpu:0", "cpu"]
    events.clear()
    assert validation.scores(roles, build_distiller(config.stages[0], roles), 7)["fid"] > 0
    assert events == ["cpu:0", *["asked"] * (len(events) - 2), "cpu"] and len(events) > 2


@pytest.mark.parametrize(
    ("num_images", "in_step", "made"),
    [(61, False, [31, 30]), (60, True, [30, 30]), (61, True, [61, 61])],  # split networks need as many passes in each process
)
def test_processes_share_the_images_of_a_validation_and_all_get_the_scores_of_one(
    tmp_path, rows_of_threads, num_images, in_step, made
):
    config = run_config(save_teacher(tmp_path / "t"), tmp_path / "run")
    protocol = load_protocol(small_protocol(tmp_path / "tiny.yaml", num_images))
    built, opening = built_for_each_thread(config), threading.Lock()

    def scores(processes):
        teacher, roles = built[processes.index]
        with opening:
            validation = preview.Validation(teacher, protocol, (2, 1), 16, tmp_path, stopping_together(processes), in_step)
        return threading.get_ident(), validation.scores(roles, build_distiller(config.stages[0], roles), 7)

    _, alone = scores(ALONE)
    assert sum(rows_of_threads.values()) == num_images * (2 + 1)
    rows_of_threads.clear()
    shared = in_threads(2, scores)
    assert [rows_of_threads[thread] for thread, _ in shared] == [(2 + 1) * images for images in made]
    for _, found in shared:
        assert found == pytest.approx(alone, rel=1e-5)  # float32 features of other blocks of images
    assert shared[0][1] == shared[1][1]
    assert not list(tmp_path.glob(".look*"))


@pytest.fixture(scope="module")
def latent():
    """The digits DiT, whose images are decoded, with adapters that answer otherwise than it does."""
    teacher = load_teacher("digits-dit")
    roles = build_roles(teacher.denoiser, ("student", "fake"), "shared", LoraSpec(rank=2, targets="attention"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*roles.parameters("student"), *roles.parameters("fake")):
            parameter.normal_(0, 0.1, generator=generator)
    return teacher, roles


def largest_batches(teacher, look):
    """Return what `look` does, and the most rows that network and decoder saw meanwhile."""
    seen = {teacher.network: 0, teacher.codec.vae.decoder: 0}

    def note(module, args, kwargs):
        seen[module] = max(seen[module], len(args[0] if args else kwargs["hidden_states"]))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in seen]
    found = look()
    for hook in hooks:
        hook.remove()
    return found, list(seen.values())


def test_pictures_and_lag_do_not_depend_on_the_rows_of_a_pass(latent, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "TEACHER_STEPS", 5)
    teacher, roles = latent
    teacher = replace(teacher, guidance=2.0)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 2), "renoise")

    def look(rows):
        looking = preview.Preview(teacher, 7, 0, teacher.examples(7), rows, tmp_path)
        images = looking.student_images(roles, sampler, 0)
        return looking.teacher_images, images, looking.fake_lag(roles, sampler, 0)

    (teachers, students, lag), largest = largest_batches(teacher, lambda: look(3))
    assert largest == [3, 3]
    (all_teachers, all_students, one_lag), largest = largest_batches(teacher, lambda: look(100))
    assert largest == [14, 7]  # two rows an image under the teacher's guidance
    torch.testing.assert_close(teachers, all_teachers, atol=1e-5, rtol=0)
    torch.testing.assert_close(students, all_students, atol=1e-5, rtol=0)
    assert lag == pytest.approx(one_lag, rel=1e-5) and not torch.equal(teachers, students)


def test_scores_do_not_depend_on_the_rows_of_a_pass(latent, tmp_path):
    teacher, roles = latent
    protocol = load_protocol(small_protocol(tmp_path / "tiny.yaml", 100))

    class Method:
        def sampler(self, count):
            return Sampler(grids.trailing(teacher.denoiser.schedule, count), "renoise", guidance=2.0)

    def scores(rows):
        validation = preview.Validation(teacher, protocol, (1,), rows, tmp_path)
        return largest_batches(teacher, lambda: validation.scores(roles, Method(), 0))

    (few, largest), (many, at_once) = scores(16), scores(100)
    assert largest == [16, 16] and at_once == [100, 100]
    assert few == pytest.approx(many, rel=1e-3)


@pytest.mark.parametrize(("settings", "rows"), [({}, 4), ({"sampling_batch_size": 3}, 3)])
def test_a_run_looks_at_its_student_in_passes_of_a_micro_batch_or_as_many_rows_as_it_says(
    tmp_path, monkeypatch, settings, rows
):
    seen = []
    for true in (preview.Preview, preview.Validation):
        monkeypatch.setattr(
            run, true.__name__, lambda *args, true=true, **options: seen.append(true(*args, **options)) or seen[-1]
        )
    samples = {"every_steps": 1, "num": 6}
    looks = {"samples": samples, "validation": {"every_steps": 5, "steps": [1], "protocol": "digits-short"}}
    config = run_config(save_teacher(tmp_path / "t"), tmp_path / "run", steps=1, **looks, **settings)
    monkeypatch.setattr(preview.Validation, "scores", lambda *args: {})
    train(config, progress=False)
    assert [each.rows for each in seen] == [rows, rows]


def test_the_checkpoint_of_lowest_fid_is_kept_and_loaded_as_best(tmp_path, monkeypatch):
    protocol = small_protocol(tmp_path / "tiny.yaml", 200)
    true = preview.Validation.scores

    def rising(self, roles, distiller, step):
        scores = true(self, roles, distiller, step)
        assert scores["fid"] == scores["eval/fid@2"] > 0 and 0 <= scores["eval/contrast@2"] <= 1
        rising.calls += 1
        return {**scores, "fid": {1: 5.0, 2: 3.0}.get(rising.calls, 9.0)}

    rising.calls = 0
    monkeypatch.setattr(preview.Validation, "scores", rising)
    config = run_config(
        save_teacher(tmp_path / "t"),
        tmp_path / "run",
        steps=8,
        checkpoint={"every_steps": 4, "keep": 1},
        validation={"every_steps": 2, "steps": [2], "protocol": protocol},
    )
    train(config, progress=False)
    assert rising.calls == 4
    # at step 2 and 4 a new best; 2 falls to 4; 8 is the end
    assert [path.name for path in checkpoint.available(tmp_path / "run" / "checkpoints")] == ["step_0000004", "step_0000008"]
    assert load_run(tmp_path / "run", checkpoint="best").step == 4
