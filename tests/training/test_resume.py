"""Resuming: the same bits as never having stopped, whatever stopped it, and refusal where that cannot be."""

import json
import os
import re
import signal

import pytest
import torch
import yaml
from nursery import wait_until
from safetensors.torch import load_file, save_file
from test_checkpoint import flip, truncate
from tiny_runs import CLOCKED, DRIVER, METHODS, final_hashes, run_config, run_values, save_teacher

from diffdistill.config import load_config
from diffdistill.data.batches import ImageSource
from diffdistill.data.digits import digits
from diffdistill.data.pairs import Pairs
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.loading import load_teacher
from diffdistill.sampling.sampler import Sampler
from diffdistill.training import checkpoint
from diffdistill.training.data_feed import DataFeed
from diffdistill.training.engine import Engine
from diffdistill.training.folder import RunFolder
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module")
def straight(teacher, tmp_path_factory):
    """The uninterrupted run of each method: final hashes and metric lines."""
    results = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method) / "run"
        train(run_config(teacher, folder, method), progress=False)
        results[method] = (final_hashes(folder), lines(folder))
    return results


def lines(folder):
    """Return the metric lines without what a clock says."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKED} for record in records]


def signal_at(monkeypatch, *steps, number=signal.SIGTERM):
    """Send this process a signal in the middle of the given steps, each once."""
    plain, left = Engine.step, list(steps)

    def step(self, k, stop=False):
        if (self.stage, k) in left:
            left.remove((self.stage, k))
            os.kill(os.getpid(), number)
        plain(self, k, stop)

    monkeypatch.setattr(Engine, "step", step)


def train_to_the_end(config):
    """Train, resuming after each stop, and return the number of stops."""
    for stops in range(9):
        try:
            train(config, resume=stops > 0, progress=False)
        except Stopped:
            continue
        return stops
    raise AssertionError("does not end")


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_equal_five_and_five(teacher, straight, tmp_path, monkeypatch, method):
    signal_at(monkeypatch, (0, 4))  # neither a checkpoint's nor a log's step
    config = run_config(teacher, tmp_path / "run", method)
    with pytest.raises(Stopped, match=f"after step 5 of 10; .*diffdistill train {tmp_path}/run/config.yaml --resume"):
        train(config, progress=False)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 5
    train(config, resume=True, progress=False)
    assert (final_hashes(tmp_path / "run"), lines(tmp_path / "run")) == straight[method]


def two_stages(teacher, folder):
    student = {"optimizers": {"student": {"lr": 1e-3}}}
    stages = [
        {"steps": 4, "method": {"name": "progressive", "student_steps": 2}, **student},
        {"steps": 4, "method": {"name": "progressive", "student_steps": 1}, **student},
        {"steps": 3, "method": METHODS["dmd2"]},
    ]
    return run_config(teacher, folder, stages=stages)


def test_stops_at_and_around_stage_boundaries_change_nothing(teacher, tmp_path, monkeypatch):
    assert train_to_the_end(two_stages(teacher, tmp_path / "a")) == 0
    signal_at(monkeypatch, (0, 3), (1, 0), (1, 3), (2, 1))
    assert train_to_the_end(two_stages(teacher, tmp_path / "b")) == 4
    assert final_hashes(tmp_path / "a") == final_hashes(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    last = checkpoint.newest(tmp_path / "a" / "checkpoints")[0]
    assert (last.step, last.state["stage"]) == (11, 3)
    source, student = (last.tensors[f"role-{role}"] for role in ("source", "student"))
    assert any(not torch.equal(source[key], student[key]) for key in source)  # the third stage moved on


def test_a_stage_starts_from_the_student_of_the_one_before(teacher, tmp_path):
    train(two_stages(teacher, tmp_path / "run"), progress=False)
    # step 4 is pruned; at 8 the second stage has ended, and finish() made its student the source
    eighth = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_0000008")
    assert eighth.state["stage_step"] == 0
    for key, value in eighth.tensors["role-student"].items():
        assert torch.equal(value, eighth.tensors["role-source"][key])


def test_a_role_that_follows_the_student_starts_a_stage_at_the_student(teacher, tmp_path):
    stages = [
        {"steps": 3, "method": {"name": "consistency"}, "optimizers": {"student": {"lr": 1e-3}}},
        {"steps": 3, "method": METHODS["progressive"]},
    ]
    train(run_config(teacher, tmp_path / "run", stages=stages, checkpoint={"every_steps": 1, "keep": 9}), progress=False)
    third, fifth = (checkpoint.load(tmp_path / "run" / "checkpoints" / f"step_000000{step}") for step in (3, 5))
    for key, value in third.tensors["role-student"].items():
        assert torch.equal(value, fifth.tensors["role-source"][key])


def test_batches_are_the_data_sets_and_differ_between_stages(teacher):
    loaded, images = load_teacher(teacher), digits()

    def batches(stage, size):
        feed = DataFeed(ImageSource(*images), None, None, loaded, batch_size=8, size=size, seed=1, stage=stage)
        return [feed.batch(step, micro) for step in range(3) for micro in range(8 // size)]

    x0, again, other = (torch.cat([batch.x0 for batch in batches(*key)]) for key in ((0, 4), (0, 2), (1, 4)))
    assert torch.equal(x0, again) and not torch.equal(x0, other)
    labels = torch.cat([batch.cond.values["class_labels"] for batch in batches(0, 4)])
    pairs = {(tuple(image.flatten().tolist()), int(label)) for image, label in zip(*images, strict=True)}
    assert all((tuple(image.flatten().tolist()), int(label)) in pairs for image, label in zip(x0, labels, strict=True))
    assert torch.equal(batches(0, 4)[0].cond.null["class_labels"], torch.tensor([10]))


def test_pairs_are_the_teachers_and_the_same_after_resuming(teacher, tmp_path, monkeypatch):
    changes = {"stages": [{"steps": 4, "method": {"name": "dmd", "regression": {}}}], "pairs": {"num": 9, "steps": 3}}
    config = run_config(teacher, tmp_path / "a", **changes)
    train(config, progress=False)
    loaded, pairs = load_teacher(teacher), Pairs.load(tmp_path / "a" / "pairs.safetensors")
    sampler = Sampler(grids.trailing(loaded.denoiser.schedule, 3))
    x0 = sampler.sample(loaded.denoiser, Given(pairs.noise), loaded.condition(pairs.labels))
    torch.testing.assert_close(x0, pairs.x0)
    signal_at(monkeypatch, (0, 1))
    assert train_to_the_end(run_config(teacher, tmp_path / "b", **changes)) == 1
    assert final_hashes(tmp_path / "a") == final_hashes(tmp_path / "b")


class Given:
    """Noise that was drawn before."""

    def __init__(self, noise):
        self.noise = noise

    def draw(self, shape, dtype=torch.float32):
        return self.noise


def newest_step(folder):
    metrics = folder / "metrics.jsonl"
    return max([record["step"] for record in map(json.loads, whole_lines(metrics))], default=0)


def whole_lines(path):
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(teacher, nursery, tmp_path):
    config, log = tmp_path / "run.yaml", tmp_path / "log"
    config.write_text(yaml.safe_dump(run_values(teacher, tmp_path / "run", steps=100000)))
    process = nursery.start(log, config, code=DRIVER)
    wait_until(lambda: newest_step(tmp_path / "run") >= 2)
    os.kill(process, signal.SIGTERM)
    code, output = nursery.wait(process), log.read_text()
    assert code == 0, output
    assert "stopped by SIGTERM after step" in output and "--resume" in output
    found, notes = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert notes == [] and f"after step {found.step} of" in output


@pytest.mark.parametrize("damage", [flip, truncate], ids=["flipped", "truncated"])
def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(teacher, straight, tmp_path, monkeypatch, damage):
    signal_at(monkeypatch, (0, 7))
    config, folder = run_config(teacher, tmp_path / "run"), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, progress=False)
    damage(folder / "checkpoints" / "step_0000008" / "role-student.safetensors")
    with pytest.raises(UserError, match="role-student.safetensors does not match .*good one before it is .*step_0000006"):
        load_run(folder, checkpoint="step_0000008")
    with pytest.warns(UserWarning, match="step_0000008 is damaged and passed over: role-student.safetensors"):
        train(config, resume=True, progress=False)
    assert (final_hashes(folder), lines(folder)) == straight["progressive"]


def test_resuming_a_finished_run_does_nothing(teacher, tmp_path, capsys):
    config = run_config(teacher, tmp_path / "run", steps=2)
    first = train(config, progress=False)
    before = (final_hashes(tmp_path / "run"), lines(tmp_path / "run"))
    second = train(config, resume=True)
    assert "is finished: 2 steps" in capsys.readouterr().out
    assert (second.step, second.checkpoint) == (first.step, first.checkpoint)
    assert (final_hashes(tmp_path / "run"), lines(tmp_path / "run")) == before


def test_resume_before_the_first_checkpoint_starts_at_zero(teacher, straight, tmp_path, capsys):
    train(run_config(teacher, tmp_path / "run"), resume=True)
    assert "starting at step 0" in capsys.readouterr().out
    assert final_hashes(tmp_path / "run") == straight["progressive"][0]


def test_a_changed_config_is_refused_naming_the_fields(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=2), progress=False)
    changed = run_config(teacher, tmp_path / "run", steps=3, seed=4, ema=None, logging={"every_steps": 2, "tensorboard": False})
    with pytest.raises(UserError) as caught:
        train(changed, resume=True, progress=False)
    text = str(caught.value)
    assert (
        "  seed: 0 -> 4\n" in text
        and "  stages.0.steps: 2 -> 3\n" in text
        and '  ema: {"decay": 0.9, "offload": false} -> null\n' in text
    )
    assert "logging" not in text and "batch_size" not in text


def older(values):
    """Drop from the values of a config what its version did not know yet."""
    del values["compute"], values["memory"], values["parallel"], values["roles"]["rows_at_once"], values["ema"]["offload"]
    del values["stages"][0]["optimizers"]["student"]["offload"]


def made_by_another_version(folder, change):
    """Make a run folder as it would be if the version that wrote it had written the values of the config so changed."""
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text())
    change(values)
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    for path in checkpoint.available(folder / "checkpoints"):
        content = json.loads((path / checkpoint.STATE).read_text())
        (path / checkpoint.STATE).unlink()
        state = {**content["state"], "config": RunFolder(folder).config_hash}
        checkpoint._seal(path, content["step"], state, content["files"])


def test_a_run_started_before_there_were_some_settings_goes_on(teacher, straight, tmp_path, monkeypatch):
    config, folder = run_config(teacher, tmp_path / "run"), tmp_path / "run"
    signal_at(monkeypatch, (0, 4), (0, 6))
    with pytest.raises(Stopped):
        train(config, progress=False)
    made_by_another_version(folder, older)
    old = (folder / "config.yaml").read_text()
    with pytest.raises(Stopped):
        train(config, resume=True, progress=False)
    train(load_config(folder / "config.yaml"), resume=True, progress=False)  # its checkpoint is of the new version
    assert (final_hashes(folder), lines(folder)) == straight["progressive"]
    assert (folder / "config.yaml").read_text() == old and load_run(folder).step == 10


def test_a_setting_unknown_when_the_run_started_is_refused_unless_it_is_at_its_default(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=2), progress=False)
    made_by_another_version(tmp_path / "run", older)
    changed = run_config(teacher, tmp_path / "run", steps=2, compute={"attention": "math"}, parallel="fsdp")
    with pytest.raises(UserError) as caught:
        train(changed, resume=True, progress=False)
    differing = str(caught.value).splitlines()[1:-1]
    assert differing == ['  compute.attention: "auto" -> "math"']


def test_a_setting_that_is_no_longer_known_is_told_with_the_version_that_knew_it(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=2), progress=False)
    made_by_another_version(tmp_path / "run", lambda values: values.update(turbo=True))
    with pytest.raises(UserError) as caught:
        train(run_config(teacher, tmp_path / "run", steps=2), resume=True, progress=False)
    version = RunFolder(tmp_path / "run")._sessions()[0]["versions"]["diffdistill"]
    assert re.search(r"run/config.yaml has one mistake:\n  turbo: unknown key", str(caught.value))
    assert f"was started with this config by diffdistill {version}. Put back what was edited in it, go on with" in str(
        caught.value
    )


def test_an_edited_run_folder_is_noticed(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=2), progress=False)
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 4", 1))
    with pytest.raises(UserError, match="was made with another config than .*config.yaml, which must have been edited"):
        train(run_config(teacher, tmp_path / "run", steps=2, seed=4), resume=True, progress=False)
    file.write_text("seed: [")
    with pytest.raises(UserError, match=r"config.yaml is not valid YAML: line 1, column 8"):
        train(run_config(teacher, tmp_path / "run", steps=2), resume=True, progress=False)


def test_a_teacher_replaced_under_its_path_is_noticed(tmp_path, monkeypatch):
    folder = save_teacher(tmp_path / "t")
    signal_at(monkeypatch, (0, 0), (0, 1))
    config = run_config(folder, tmp_path / "run", steps=3)
    with pytest.raises(Stopped):
        train(config, progress=False)
    save_teacher(folder)  # the same teacher, written once more
    with pytest.raises(Stopped):
        train(config, resume=True, progress=False)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_teacher(folder).fingerprints()
    rewrite(weights, lambda tensors: {name: value + (name == "conv_out.bias") for name, value in tensors.items()})
    after = load_teacher(folder).fingerprints()
    with pytest.raises(UserError) as caught:
        train(config, resume=True, progress=False)
    assert f"  unet: {before['unet'][:12]} -> {after['unet'][:12]}\n" in str(caught.value)
    with pytest.raises(UserError, match="the teacher is not the one"):
        load_run(tmp_path / "run")
    assert "scheduler" not in str(caught.value) and before["scheduler"] == after["scheduler"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 2  # nothing was trained


def rewrite(path, change):
    """Replace the tensors of a safetensors file by what `change` makes of them."""
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_a_run_folder_may_be_moved(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=2), progress=False)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train(run_config(teacher, tmp_path / "moved", steps=2), resume=True, progress=False).step == 2
    assert load_run(tmp_path / "moved").step == 2


def test_a_second_run_in_the_folder_is_refused(teacher, tmp_path):
    config = run_config(teacher, tmp_path / "run", steps=2)
    train(config, progress=False)
    before = final_hashes(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run. Go on with it by --resume, or choose another output"):
        train(config, progress=False)
    assert final_hashes(tmp_path / "run") == before


def test_a_run_that_failed_before_its_first_step_may_be_corrected_and_started_again(teacher, tmp_path):
    with pytest.raises(UserError, match="there is no teacher"):
        train(run_config(tmp_path / "nowhere", tmp_path / "run", steps=1), progress=False)
    train(run_config(teacher, tmp_path / "run", steps=1), progress=False)
    assert load_run(tmp_path / "run").config.teacher == str(teacher)


def test_a_folder_of_other_files_is_refused(teacher, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not of a run"):
        train(run_config(teacher, tmp_path), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_runs_in_one_folder_at_once_are_refused(teacher, tmp_path):
    holder = RunFolder(tmp_path / "run")
    holder.lock()
    config = run_config(teacher, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on \S+ is training in .*run"):
        train(config, progress=False)
    holder.unlock()
    assert train(config, progress=False).step == 1


def test_a_run_goes_on_with_the_micro_batches_it_was_started_with(teacher, straight, tmp_path, monkeypatch):
    from diffdistill.training import run

    config = run_config(teacher, tmp_path / "run", micro_batch_size=None)
    monkeypatch.setattr(run, "micro_batch_size", lambda *_: 4)  # as two processes would have it
    signal_at(monkeypatch, (0, 4))
    with pytest.raises(Stopped):
        train(config, progress=False)
    monkeypatch.undo()
    train(config, resume=True, progress=False)
    assert final_hashes(tmp_path / "run") == straight["progressive"][0]


def test_load_run_gives_the_average_unless_told_otherwise(teacher, tmp_path):
    train(run_config(teacher, tmp_path / "run", steps=4), progress=False)
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")[0]
    averaged, plain = load_run(tmp_path / "run"), load_run(tmp_path / "run", ema=False)
    differ = False
    for key, value in found.tensors["role-student"].items():
        assert torch.equal(plain.roles.state("student")[key], value)
        assert torch.equal(averaged.roles.state("student")[key], found.tensors["ema-student"][key])
        differ |= not torch.equal(value, found.tensors["ema-student"][key])
    assert differ and averaged.step == 4 and averaged.sampler(2).num_steps == 2
    assert load_run(tmp_path / "run", checkpoint="step_0000003").step == 3


def test_load_run_explains_what_is_missing(teacher, tmp_path):
    with pytest.raises(UserError, match="is not a run folder: it has no config.yaml"):
        load_run(tmp_path)
    train(run_config(teacher, tmp_path / "run", steps=1), progress=False)
    with pytest.raises(UserError, match="no checkpoint 'step_7' in .*Known: step_0000001"):
        load_run(tmp_path / "run", checkpoint="step_7")
    with pytest.raises(UserError, match="no evaluated checkpoint"):
        load_run(tmp_path / "run", checkpoint="best")


def test_tensorboard_samples_and_environment_are_written(teacher, tmp_path):
    from PIL import Image

    config = run_config(
        teacher,
        tmp_path / "run",
        "dmd2",
        steps=2,
        samples={"every_steps": 2, "num": 15},
        logging={"every_steps": 1, "tensorboard": True},
    )
    train(config, progress=False)
    picture = Image.open(tmp_path / "run" / "samples" / "step_0000002.png")
    assert picture.size == (10 * 32 + 9 * 3, 4 * 32 + 3 * 3)  # two rows of the teacher, two of the student, gaps of 3
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    session = json.loads((tmp_path / "run" / "environment.json").read_text())[0]
    (kernel,) = session["attention"]
    assert kernel == "flash (torch's first choice)" and session["attention"][kernel][0].startswith("float32 on cpu")
    assert session["compute"] == config.compute.model_dump()
    assert session["processes"] == 1 and torch.__version__.startswith(session["versions"]["torch"])
    drift = next(line for line in lines(tmp_path / "run") if "drift/contrast" in line)
    assert drift["drift/fake_lag"] == pytest.approx(1.0, abs=0.05)  # fake and teacher have hardly parted


def test_samples_at_other_steps_change_no_weight(teacher, straight, tmp_path):
    train(run_config(teacher, tmp_path / "run", "dmd2", samples={"every_steps": 3, "num": 3}), progress=False)
    assert final_hashes(tmp_path / "run") == straight["dmd2"][0]
