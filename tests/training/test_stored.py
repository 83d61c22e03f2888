"""Stored states of a teacher that reads text: each names its prompt, comes back after a stop, and belongs to one teacher and one text."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import text_pipelines
import torch

from diffdistill.config import PairsConfig, parse_config
from diffdistill.data.cache import TensorCache
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.guidance_adapters import load_guidance_adapters, save_guidance_adapters
from diffdistill.models.loading import load_teacher
from diffdistill.processes import Processes
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import TrajectorySpec
from diffdistill.training.conditions import Conditions
from diffdistill.training.data_feed import DataFeed, build_source
from diffdistill.training.engine import Engine
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped
from diffdistill.training.stored import StoredStates, origin_of

PROMPTS = ["a fox", "a house", "a tree"]
MADE = {"num": 6, "steps": 4, "every": 2, "guidance": [2.0, 4.0], "precision": "fp32"}
AGD = {"name": "agd", "adapters": {"kind": "cross_attention", "hidden_dim": 8}, "student_steps": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stored")
    for name in ("sd", "pixart-sigma"):
        text_pipelines.save(name, root)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "other.txt").write_text("\n".join(["a moon", *PROMPTS[1:]]))
    return root


def config(place: Path, output: str, method: dict[str, Any], teacher: str = "sd", **changes: Any):
    values: dict[str, Any] = {
        "teacher": str(place / teacher),
        "teacher_options": {"size": 16},
        "output": str(place / output),
        "data": {"kind": "prompts", "path": str(place / "prompts.txt"), "cache": str(place / "cache")},
        "roles": {"layout": "shared"},
        "stages": [{"steps": 4, "method": method, "optimizers": {"student": {"lr": 1e-2}}}],
        "batch_size": 4,
        "samples": None,
        "logging": {"every_steps": 1, "tensorboard": False},
        "exportable": False,
    }
    return parse_config(values | changes)


def agd(place: Path, output: str, teacher: str = "sd", trajectories: dict[str, Any] = MADE, **changes: Any):
    return config(place, output, {**AGD, "trajectories": trajectories, "guidance_input": 3.0}, teacher, **changes)


@pytest.fixture(scope="module")
def finished(place) -> Path:
    train(agd(place, "agd"), progress=False)
    return place / "agd"


@pytest.mark.parametrize("name", ["sd", "pixart-sigma"])
def test_a_trajectory_is_the_guided_teacher_s_under_the_prompt_it_names(place, finished, name):
    """F(x, null) + w (F(x, prompt) - F(x, null)) at the stored states, of a teacher loaded afresh and told the prompt itself."""
    if name != "sd":
        train(agd(place, name + "-run", name), progress=False)
    folder = finished if name == "sd" else place / f"{name}-run"
    stored, teacher = Trajectories.load(folder / "trajectories.safetensors"), load_teacher(place / name, size=16)
    assert sorted(stored.labels.tolist()) == [0, 0, 1, 1, 2, 2]  # each prompt in turn
    cond = teacher.condition([PROMPTS[label] for label in stored.labels])
    for k in range(stored.t.shape[1]):
        x_t, t = stored.x_t[:, k], stored.t[:, k]
        with torch.no_grad():
            told, null = (teacher.denoiser(x_t, t, c).raw for c in (cond, cond.null_like()))
        expected = null + stored.w.reshape(-1, 1, 1, 1).float() * (told - null)
        torch.testing.assert_close(stored.target[:, k], expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(told, told.roll(1, 0), atol=1e-3)


def test_a_micro_batch_has_the_state_the_w_and_the_prompt_of_one_trajectory(place, finished):
    run, teacher = agd(place, "unused"), load_teacher(place / "sd", size=16)
    stored, source = Trajectories.load(finished / "trajectories.safetensors"), build_source(run, teacher)
    asked = DataFeed(source, None, stored, teacher, batch_size=12, size=4, seed=0, stage=0).batch(0, 1).trajectories
    with torch.no_grad():
        told, null = (teacher.denoiser(asked.x_t, asked.t, c).raw for c in (asked.cond, asked.cond.null_like()))
    torch.testing.assert_close(asked.target, null + asked.w.reshape(-1, 1, 1, 1).float() * (told - null), atol=1e-5, rtol=1e-4)


def test_adapters_learn_from_them_and_leave_for_another_finetune_of_the_base(place, finished, tmp_path):
    run, plain = load_run(finished), load_teacher(place / "sd", size=16)
    cond, noise = plain.condition(PROMPTS[:2]), Noise([1, 2]).draw(plain.denoiser.sample_shape)
    t, told = (
        torch.full((2,), 500.0, dtype=torch.float64),
        cond.with_values(guidance=torch.full((2,), 3.0, dtype=torch.float64)),
    )
    with torch.no_grad():
        base, teacher, student = (d(noise, t, told).raw for d in (plain.denoiser, run.roles.teacher, run.roles["student"]))
        assert torch.equal(base, teacher) and not torch.equal(base, student)
        file = save_guidance_adapters(run.roles["student"].network, tmp_path / "adapters.safetensors")
        load_guidance_adapters(plain.network, plain.family, file)
        assert torch.equal(plain.denoiser(noise, t, told).raw, student)


def test_a_run_that_was_stopped_finds_its_trajectories_and_ends_in_the_same_bits(place, finished, monkeypatch):
    plain = Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda self, k, stop=False: (os.kill(os.getpid(), signal.SIGTERM), plain(self, k, stop))
    )
    with pytest.raises(Stopped):
        train(agd(place, "stopped"), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("diffdistill.training.stored.make_trajectories", lambda *_: pytest.fail("they are stored"))
    train(agd(place, "stopped"), resume=True, progress=False)
    states = [load_run(folder).roles.state("student") for folder in (finished, place / "stopped")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_run_reads_them_from_their_path(place, finished):
    given = {"path": str(finished / "trajectories.safetensors"), "guidance": MADE["guidance"]}
    train(agd(place, "given", trajectories=given), progress=False)
    states = [load_run(folder).roles.state("student") for folder in (finished, place / "given")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "other.txt"}, "made with other texts or text encoders than"),
        ({"teacher": "finetuned"}, "made with another teacher, or one loaded in another dtype than"),
        ({"teacher": "finetuned", "data": "other.txt"}, "another teacher.* and with other texts"),
    ],
)
def test_trajectories_of_another_teacher_or_of_other_prompts_are_refused_before_anything_is_written(
    place, finished, changes, message
):
    if not (place / "finetuned").exists():
        shutil.copytree(place / "sd", place / "finetuned")
        network = load_teacher(place / "sd").network
        with torch.no_grad():
            network.conv_out.weight.mul_(1.01)
        network.save_pretrained(place / "finetuned" / "unet")
    path = place / changes.get("data", "prompts.txt")
    given = {"path": str(finished / "trajectories.safetensors"), "guidance": MADE["guidance"]}
    run = agd(
        place,
        "refused",
        changes.get("teacher", "sd"),
        given,
        data={"kind": "prompts", "path": str(path), "cache": str(place / "cache")},
    )
    with pytest.raises(UserError, match=message):
        train(run, progress=False)
    assert not list((place / "refused").glob("*.yaml"))


DMD = {"name": "dmd", "guidance": 2.0, "regression": {"weight": 1.0}}
LORA = {"roles": {"layout": "shared", "lora": {"rank": 2, "targets": "attention"}}}


class Given:
    """Noise that was drawn before."""

    def __init__(self, noise):
        self.noise = noise

    def draw(self, shape, dtype=torch.float32):
        return self.noise


@pytest.mark.parametrize("name", ["sd", "pixart-sigma"])
def test_a_pair_is_noise_and_the_teacher_s_image_of_it_under_the_prompt_it_names(place, name):
    run = config(place, f"{name}-dmd", DMD, name, pairs={"num": 5, "steps": 3, "guidance": 2.0}, **LORA)
    train(run, progress=False)
    pairs, teacher = Pairs.load(place / f"{name}-dmd" / "pairs.safetensors"), load_teacher(place / name, size=16)
    assert sorted(pairs.labels.tolist())[0::2] == [0, 1, 2] and len(pairs) == 5
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 3), guidance=2.0)
    with torch.no_grad():
        x0 = sampler.sample(teacher.denoiser, Given(pairs.noise), teacher.condition([PROMPTS[label] for label in pairs.labels]))
    torch.testing.assert_close(x0, pairs.x0, atol=1e-4, rtol=1e-4)
    other = {"kind": "prompts", "path": str(place / "other.txt"), "cache": str(place / "cache")}
    with pytest.raises(UserError, match="other texts"):
        train(
            config(place, "refused", DMD, name, pairs={"path": str(place / f"{name}-dmd")}, data=other, **LORA), progress=False
        )


# Made in parts, here of two images each -----------------------------------------------------------------------------------

KINDS = {"pairs": Pairs, "trajectories": Trajectories}
SETTINGS = {
    "pairs": PairsConfig(num=7, steps=2, guidance=2.0),
    "trajectories": TrajectorySpec(num=7, steps=3, every=3, precision="fp32"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def parts_made(monkeypatch) -> list[int]:
    """Make parts small, and return the list to which the number of each part that is made is added."""
    made: list[int] = []
    plain = TensorCache.fill_shard

    def noted(self, shard, compute):
        if self.folder.parent.suffix == ".parts":
            made.append(shard)
        plain(self, shard, compute)

    monkeypatch.setattr("diffdistill.training.stored.IMAGES_PER_PART", 2)
    monkeypatch.setattr(TensorCache, "fill_shard", noted)
    return made


@pytest.fixture(scope="module")
def plain(place) -> StoredStates:
    """What makes the states of seed 0 in one process."""
    teacher = load_teacher(place / "sd", size=16)
    source = build_source(agd(place, "unused"), teacher)
    origin = origin_of(teacher, teacher.fingerprints(), source)
    return StoredStates(teacher.denoiser, Conditions(teacher, source), origin, seed=0, micro_batch_size=4)


def make(states: StoredStates, kind: str, folder: Path) -> bytes:
    """Return the file of seven images."""
    path = folder / f"{kind}.safetensors"
    getattr(states, kind)(SETTINGS[kind], path)
    return path.read_bytes()


def make_until(states: StoredStates, last: int, kind: str, folder: Path) -> list[str]:
    """Stop when so many images are there, before they are put together, and return what was said on the way."""
    said: list[str] = []

    def stop(done: str) -> None:
        said.append(done)
        if done == f"{last} of 7 {kind} of the teacher":
            raise Stopped(done)

    with pytest.raises(Stopped):
        make(dataclasses.replace(states, between_parts=stop), kind, folder)
    assert not (folder / f"{kind}.safetensors").exists()
    return said


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory) -> dict[str, bytes]:
    """The file of each kind, made at once in parts of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffdistill.training.stored.IMAGES_PER_PART", 2)
        return {kind: make(plain, kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@each_kind
def test_parts_say_what_one_pass_says(plain, tmp_path, monkeypatch, kind):
    """Every image by its own number: noise, prompt, guidance, first stored step (j = 3 does not divide the parts of two)."""
    make(plain, kind, tmp_path)
    whole = KINDS[kind].load(tmp_path / f"{kind}.safetensors").tensors()
    monkeypatch.setattr("diffdistill.training.stored.IMAGES_PER_PART", 2)
    (tmp_path / "parts").mkdir()
    make(plain, kind, tmp_path / "parts")
    parts = KINDS[kind].load(tmp_path / "parts" / f"{kind}.safetensors").tensors()
    assert whole.keys() == parts.keys() and len(whole["labels"]) == 7
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-5)


@each_kind
def test_two_halves_are_the_whole_bit_for_bit(plain, whole, tmp_path, parts_made, kind):
    make_until(plain, 4, kind, tmp_path)
    assert parts_made == [0, 1]
    assert make(plain, kind, tmp_path) == whole[kind] and parts_made == [0, 1, 2, 3]
    assert make(plain, kind, tmp_path) == whole[kind] and parts_made == [0, 1, 2, 3]  # found
    assert [file.name for file in tmp_path.iterdir()] == [f"{kind}.safetensors"]


@each_kind
def test_a_damaged_part_is_made_again(plain, whole, tmp_path, parts_made, kind):
    make_until(plain, 6, kind, tmp_path)
    first, second, _ = sorted((tmp_path / f"{kind}.parts").rglob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    parts_made.clear()
    assert make(plain, kind, tmp_path) == whole[kind] and parts_made == [0, 1, 3]


@each_kind
@pytest.mark.parametrize("changes", [{"seed": 1}, {"origin": "weights"}, {"origin": "scheduler"}, {"origin": "texts"}])
def test_parts_of_another_seed_teacher_or_text_are_not_used(plain, whole, tmp_path, parts_made, kind, changes):
    if "origin" in changes:
        changes = {"origin": {**plain.origin, changes["origin"]: "another"}}
    make_until(dataclasses.replace(plain, **changes), 4, kind, tmp_path)
    parts_made.clear()
    assert make(plain, kind, tmp_path) == whole[kind] and parts_made == [0, 1, 2, 3]


@each_kind
def test_what_another_start_left_is_made_anew_for_another_seed_and_refused_for_another_teacher(
    plain, whole, tmp_path, parts_made, kind
):
    assert make(dataclasses.replace(plain, seed=1), kind, tmp_path) != whole[kind]
    assert make(plain, kind, tmp_path) == whole[kind]
    moved = dataclasses.replace(plain, origin={**plain.origin, "teacher": "elsewhere"})
    parts_made.clear()
    assert make(moved, kind, tmp_path) == whole[kind] and parts_made == []
    with pytest.raises(UserError, match="made with another teacher.*or delete the file"):
        make(dataclasses.replace(plain, origin={**plain.origin, "weights": "another"}), kind, tmp_path)


@each_kind
def test_three_processes_share_the_parts_and_store_what_one_does(plain, whole, tmp_path, parts_made, kind):
    """One after the other, the main one last: it finds the others' parts. All wait as often, also who has no part 4 or 5."""
    rounds = [f"{done} of 7 {kind} of the teacher" for done in (6, 7)]
    for index, own in ((2, [2]), (1, [1]), (0, [0, 3])):
        parts_made.clear()
        states = dataclasses.replace(plain, processes=Processes(index, 3))
        assert make_until(states, 7, kind, tmp_path) == rounds and parts_made == own
    assert make(plain, kind, tmp_path) == whole[kind] and parts_made == [0, 3]


def test_a_signal_stops_a_run_after_a_part_and_resuming_makes_the_others(place, parts_made, monkeypatch, capsys):
    noted = TensorCache.fill_shard

    def signalled(self, shard, compute):
        noted(self, shard, compute)
        if parts_made == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TensorCache, "fill_shard", signalled)
    message = "stopped by SIGTERM after 4 of 6 trajectories of the teacher; everything is saved .*config.yaml --resume"
    with pytest.raises(Stopped, match=message):
        train(agd(place, "halves"))
    train(agd(place, "halves"), resume=True)
    assert parts_made == [0, 1, 2] and not (place / "halves" / "trajectories.parts").exists()
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("image ")]
    assert [line.split("  ")[:2] for line in shown] == [
        [f"image {done}/6", "trajectories of the teacher"] for done in (2, 4, 6)
    ]
    assert all("images/s" in line and "left" in line for line in shown)
