"""kill -9 at random moments of training, saving, caching, evaluating and exporting.

After each kill every file that has its own name can be read whole, no checkpoint is lost but the one being written, and the same
command again ends in the bits of a run that nobody killed. `--kills N` sets the number of kills of each kind (`make faults`: 50).
"""

import contextlib
import functools
import hashlib
import json
import random
import shutil
import signal
import time

import pytest
import text_pipelines
import yaml
from kills import SURVIVED, count_operations, in_child, killed_after
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import final_hashes, run_values, save_teacher

from diffdistill import scoring
from diffdistill.config import parse_config
from diffdistill.data.cache import TensorCache
from diffdistill.evaluation import parts
from diffdistill.evaluation.protocol import load_protocol
from diffdistill.export.export import export
from diffdistill.files import sha256
from diffdistill.models.loading import load_teacher
from diffdistill.training import checkpoint, text_data
from diffdistill.training.data_feed import build_source
from diffdistill.training.loading import load_run
from diffdistill.training.run import train

EVERY, KEEP, STEPS = 2, 3, 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands below start from."""
    place = tmp_path_factory.mktemp("kills")
    save_teacher(place / "teacher")
    text_pipelines.save("sd", place)
    (place / "prompts.txt").write_text("a b\nc d\n")
    (place / "images").mkdir()
    for number, letter in enumerate("abcdefghi"):
        Image.new("RGB", (16, 16), (20 * number, 90, 30)).save(place / "images" / f"{letter}.png")
        (place / "images" / f"{letter}.txt").write_text(f"a {letter} b")
    return place


# What is killed. Each returns an action on a folder, and each action done again goes on or begins again.


def training(place, folder):
    values = run_values(
        place / "teacher",
        folder / "run",
        "dmd2",
        steps=STEPS,
        checkpoint={"every_steps": EVERY, "keep": KEEP},
        logging={"every_steps": 1, "tensorboard": True},
        samples={"every_steps": 5, "num": 4},
    )
    return lambda: train(parse_config(values), resume=(folder / "run" / "config.yaml").is_file(), progress=False)


def caching(place, folder):
    values = run_values(
        place / "sd",
        folder / "run",
        teacher_options={"size": 16},
        data={"kind": "captions", "path": str(place / "images"), "cache": str(folder / "cache")},
    )

    def action():
        text_data.TensorCache = functools.partial(TensorCache, rows_per_shard=2)
        build_source(parse_config(values), load_teacher(place / "sd", size=16))

    return action


def evaluating(place, folder):
    short = load_protocol("digits-short").model_dump(mode="json")
    views = [{"extractor": "digits", "metrics": ["fid", "pixels"]}]
    path = place / "protocol.yaml"
    path.write_text(yaml.safe_dump({**short, "name": "killed", "num_images": 60, "jackknife_groups": 10, "views": views}))

    def action():
        parts.ranges.__defaults__ = (10,)
        settings = scoring.Settings(path, output=folder / "scores", batch_size=5, save_images=folder / "images")
        found = scoring.evaluate(str(place / "teacher"), (2,), settings)
        scoring.write_evaluations("teacher", found, folder / "scores")

    return action


def exporting(place, folder, verified=False):
    if not (place / "run").exists():
        lora = {"layout": "copies", "lora": {"rank": 2, "targets": "attention"}}
        train(parse_config(run_values(place / "sd", place / "run", **text(place), roles=lora, steps=2)), progress=False)

    def action():
        loaded = load_run(place / "run")
        export(loaded.teacher, loaded.roles, loaded.sampler(2), folder / "export", verify=verified)

    return action


def text(place):
    data = {"kind": "prompts", "path": str(place / "prompts.txt"), "cache": str(place / "cache")}
    method = {"name": "dmd2", "student_steps": 2, "guidance": 3.0, "student_every": 1}
    return {"teacher_options": {"size": 16}, "data": data, "stages": [{"steps": 2, "method": method}]}


COMMANDS = {"training": training, "caching": caching, "evaluating": evaluating, "exporting": exporting}


# What must hold afterwards


def check_readable(folder):
    """Read every file that has its own name; hidden ones are being written."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") and part.endswith(".tmp") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            READERS.get(path.suffix, lambda path: None)(path)


def read_tensors(path):
    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            stored.get_tensor(name)


def read_lines(path):
    lines = path.read_text().splitlines(keepends=True)
    for line in (
        lines if not lines or lines[-1].endswith("\n") else lines[:-1]
    ):  # the last may be cut short; resuming cuts it off
        json.loads(line)


READERS = {
    ".safetensors": read_tensors,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": read_lines,
    ".yaml": lambda path: yaml.safe_load(path.read_text()),
    ".png": lambda path: Image.open(path).load(),
}


def last_logged(run):
    with contextlib.suppress(FileNotFoundError):
        whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
        return max((json.loads(line)["step"] for line in whole), default=0)
    return 0


def check_checkpoints(run):
    """All are good, and those before the last logged step are there: that of the step itself may be the one being written."""
    found = checkpoint.available(run / "checkpoints")
    assert [fault for path in found if (fault := checkpoint.find_fault(path))] == []
    last = max(0, last_logged(run) - 1) // EVERY * EVERY
    must = {step for step in range(EVERY, last + 1, EVERY) if step > last - EVERY * (KEEP - 1)}
    assert must <= {int(path.name.removeprefix("step_")) for path in found}


def outcome(folder):
    """Return what a command leaves, without what a clock says."""
    if (folder / "run" / "checkpoints").is_dir():
        return final_hashes(folder / "run"), sorted(path.name for path in (folder / "run" / "samples").iterdir())
    if (folder / "scores").is_dir():
        found = scoring.load_evaluation(folder / "scores" / "steps-2.json")
        images = {path.name: sha256(path) for path in (folder / "images").rglob("*.png")}
        return {name: value.blocks for name, value in found.values.items()}, images
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "diffdistill.json")
    return {path.relative_to(folder).as_posix(): content(path) for path in files}


def content(path):
    """Return the hash of a file; of tensors that of their values, since safetensors writes its notes in any order."""
    if path.suffix != ".safetensors":
        return sha256(path)
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in load_file(path).items()}


# The kills


def moments(name, operations, seconds):
    """Yield ways to end an action by SIGKILL, by turns before a file operation and after a time."""
    dice = random.Random(name)
    while True:
        yield functools.partial(in_child, kill_before=dice.randrange(operations))
        yield functools.partial(killed_after, seconds=dice.random() * seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_is_killed_leaves_whole_files_and_ends_in_the_same_bits(name, place, tmp_path, request):
    straight = tmp_path / "straight"
    straight.mkdir()
    started = time.perf_counter()
    operations = count_operations(COMMANDS[name](place, straight), straight)
    seconds = time.perf_counter() - started
    wanted = outcome(straight)
    folder, killed, survived = tmp_path / "killed", 0, 0
    for kill in moments(name, operations, seconds):
        folder.mkdir(exist_ok=True)
        ended = kill(COMMANDS[name](place, folder), folder=folder)
        check_readable(folder)
        check_checkpoints(folder / "run")
        if ended == SURVIVED:  # what was left to do was less than what a kill waits for
            assert outcome(folder) == wanted
            shutil.rmtree(folder)  # begun anew for the kills to come
        else:
            assert ended == -signal.SIGKILL
        killed, survived = killed + (ended != SURVIVED), survived + (ended == SURVIVED)
        if killed == request.config.option.kills:
            break
    assert in_child(COMMANDS[name](place, folder), folder) == SURVIVED
    assert outcome(folder) == wanted
    assert not list(folder.rglob(".*.tmp"))
    print(f"{name}: {killed} kills, {survived} ended before theirs, {operations} file operations")
