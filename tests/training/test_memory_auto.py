"""`memory: auto`: the documented order, nothing needless, the same picks in a resumed run."""

import re

import pytest
import torch
from test_resume import signal_at
from tiny_runs import final_hashes, run_config, run_values, save_teacher

from diffdistill.config import load_config, with_overrides
from diffdistill.errors import UserError
from diffdistill.memory import MemoryPlan, MemoryRow, TurnMemory, readable
from diffdistill.preflight import check
from diffdistill.training import memory_auto
from diffdistill.training import run as run_module
from diffdistill.training.folder import RunFolder
from diffdistill.training.memory_auto import Room, available, choose
from diffdistill.training.planning import plan_memory
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped

EIGHT_BIT = "stages.0.optimizers.student.name=adamw8bit_bnb"
CHECKPOINTING = "roles.activation_checkpointing=true"
AVERAGE = "ema.offload=true"
OFFLOAD = ("stages.0.optimizers.student.name=adamw", "stages.0.optimizers.student.offload=true")


ROLES = {"layout": "shared", "lora": {"rank": 1}}


@pytest.fixture(autouse=True)
def _everything_installed(monkeypatch):
    monkeypatch.setattr(memory_auto, "_installed", lambda package: True)


@pytest.fixture
def told(monkeypatch):
    """Plans in closed form in place of those of networks; returns the micro-batches whose step was taken."""
    steps = []

    def plan_activations(config, device_type):
        steps.append((config.micro_batch_size, config.roles.activation_checkpointing))
        return [{"student": 10 * config.micro_batch_size // (1 + config.roles.activation_checkpointing)}]

    def plan_memory(config, device_type, activations):
        """Base 1000, or 500, 250, 120 rounded; moments 80, or 20 of 8 bits; average 40; activations as above."""
        optimizer, options = config.stages[0].optimizer("student"), config.teacher_options
        base = {"int8": 250, "nf4": 120}.get(options.quantize, {"fp32": 1000, "bf16": 500}[options.dtype])
        moments = 0 if optimizer.offload else 20 if optimizer.name.startswith("adamw8bit") else 80
        average = 40 * (config.ema is not None and not config.ema.offload)
        row = MemoryRow("student", 1, 1, base, average, optimizer_bytes=moments, offloaded_bytes=160 * optimizer.offload)
        return MemoryPlan(0, (row,), (TurnMemory("student", ("student",), 0, activations[0]["student"]),))

    monkeypatch.setattr(memory_auto, "plan_activations", plan_activations)
    monkeypatch.setattr(memory_auto, "plan_memory", plan_memory)
    return steps


def config(folder, teacher="digits-unet", **changes):
    return run_config(teacher, folder, memory="auto", **({"batch_size": 8, "micro_batch_size": 8} | changes))


def in_room(size, host=2**40):
    return Room(size, size, host)


WHOLE = 1000 + 80 + 40 + 80  # base, moments, average, activations of 8


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (WHOLE, ()),
        (WHOLE - 60, (EIGHT_BIT,)),
        (WHOLE - 61, (EIGHT_BIT, AVERAGE)),
        (WHOLE - 100, (EIGHT_BIT, AVERAGE)),
        (WHOLE - 101, (EIGHT_BIT, AVERAGE, "micro_batch_size=4")),
        (WHOLE - 120, (EIGHT_BIT, AVERAGE, "micro_batch_size=4")),
        (WHOLE - 160, (EIGHT_BIT, AVERAGE, "micro_batch_size=2")),
        (WHOLE - 170, (EIGHT_BIT, AVERAGE, "micro_batch_size=1")),
        (WHOLE - 171, (EIGHT_BIT, AVERAGE, CHECKPOINTING, "micro_batch_size=1")),
        (WHOLE - 175, (EIGHT_BIT, AVERAGE, CHECKPOINTING, "micro_batch_size=1")),
        (WHOLE - 176, (AVERAGE, CHECKPOINTING, *OFFLOAD, "micro_batch_size=4")),  # a larger one again, and whole moments
        (WHOLE - 195, (AVERAGE, CHECKPOINTING, *OFFLOAD, "micro_batch_size=1")),
    ],
)
@pytest.mark.usefixtures("told")
def test_settings_are_picked_in_the_documented_order(room, expected, tmp_path):
    choice = choose(config(tmp_path), "cuda", in_room(room))
    assert choice.overrides == expected
    assert choice.before.peak.bytes == WHOLE and choice.after.peak.bytes <= room
    assert choice.of(config(tmp_path)) == with_overrides(config(tmp_path), ["memory=null", *expected])


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1000 + 5, (AVERAGE, CHECKPOINTING, *OFFLOAD, "micro_batch_size=1")),
        (1000 + 4, ("teacher_options.dtype=bf16",)),  # which makes all before it needless
        (500 + 4, ("teacher_options.quantize=int8",)),
        (250 + 4, (EIGHT_BIT, AVERAGE, "teacher_options.quantize=nf4")),
        (120 + 5, (AVERAGE, CHECKPOINTING, *OFFLOAD, "teacher_options.quantize=nf4", "micro_batch_size=1")),
    ],
)
@pytest.mark.usefixtures("told")
def test_the_base_of_shared_adapters_is_rounded_last(room, expected, tmp_path):
    choice = choose(config(tmp_path, roles=ROLES), "cuda", in_room(room))
    assert choice.overrides == expected, choice.lines()


@pytest.mark.usefixtures("told")
def test_the_base_of_whole_networks_is_not_rounded(tmp_path):
    settings = config(tmp_path)
    assert [saver(settings, "cuda") for saver in memory_auto.AFTER_SMALLER[2:]] == [None, None, None]
    with pytest.raises(UserError, match="found no settings"):
        choose(settings, "cuda", in_room(1000 + 4))


@pytest.mark.usefixtures("told")
def test_what_cannot_fit_is_refused_with_the_smallest_plan(tmp_path):
    with pytest.raises(UserError) as caught:
        choose(config(tmp_path), "cuda", Room(1200 * 2**20, 2**20 // 2**12, 2**40))
    smallest = readable(1000 + 5)
    assert re.search(
        rf"as configured a step needs {readable(WHOLE)} .* still {smallest} .*Set roles: {{layout: shared", str(caught.value)
    )


def test_few_steps_are_taken(told, tmp_path):
    choose(config(tmp_path), "cuda", in_room(WHOLE))
    assert told == [(8, False)]
    told.clear()
    choose(config(tmp_path), "cuda", in_room(WHOLE - 160))
    assert told == [(8, False), (2, False)]  # 4 cannot fit, as 8 shows


@pytest.mark.usefixtures("told")
def test_offloaded_optimisers_need_the_memory_of_the_cpu(tmp_path):
    assert choose(config(tmp_path), "cuda", in_room(WHOLE - 195, host=160)).overrides[2:4] == OFFLOAD
    with pytest.raises(UserError, match="found no settings"):
        choose(config(tmp_path), "cuda", in_room(WHOLE - 195, host=159))


def test_nothing_is_offloaded_without_a_gpu(tmp_path):
    settings = config(tmp_path)
    assert memory_auto.average_on_cpu(settings, "cpu") is memory_auto.optimizers_on_cpu(settings, "cpu") is None
    assert memory_auto.eight_bit_moments(settings, "cpu").overrides == ("stages.0.optimizers.student.name=adamw8bit",)


@pytest.mark.usefixtures("told")
def test_a_package_that_is_missing_is_not_picked(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_auto, "_installed", lambda package: False)
    assert choose(config(tmp_path), "cuda", in_room(WHOLE - 1)).overrides == (AVERAGE,)


def test_every_process_keeps_a_micro_batch(tmp_path):
    assert memory_auto._Planner(config(tmp_path, micro_batch_size=None), "cuda", num_processes=2).sizes == [4, 2, 1]


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory_auto, "_free_host_bytes", lambda: 1000)
    assert available("cpu", num_processes=2) == Room(500, 400, 0)


# In a run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("auto") / "teacher")


@pytest.fixture
def little_memory(monkeypatch, teacher, tmp_path):
    """Let this machine have less memory than the run needs as configured."""
    room = in_room(plan_memory(config(tmp_path, teacher), "cpu").peak.bytes - 1)
    monkeypatch.setattr(run_module, "available", lambda *args: room)
    monkeypatch.setattr("diffdistill.preflight.available", lambda *args: room)
    monkeypatch.setattr(memory_auto, "_installed", lambda package: False)


@pytest.mark.usefixtures("little_memory")
def test_a_resumed_run_takes_what_was_picked_at_its_start(teacher, tmp_path, monkeypatch, capsys):
    settings = config(tmp_path / "run", teacher, stages=run_values(teacher, tmp_path, steps=5)["stages"])
    signal_at(monkeypatch, (0, 2))
    with pytest.raises(Stopped):
        train(settings)
    said = capsys.readouterr().out
    assert "memory: auto may use" in said and "Picked:" in said
    text = (tmp_path / "run" / "config.yaml").read_text()
    picked = RunFolder(tmp_path / "run").picked
    assert picked == ["micro_batch_size=4"] and "\n#   micro_batch_size=4: smaller than 8" in text
    stored = load_config(tmp_path / "run" / "config.yaml")
    assert stored == with_overrides(settings, ["memory=null", *picked])

    monkeypatch.setattr(run_module, "choose", None)  # it is not asked again
    with pytest.raises(UserError, match="seed"):
        train(with_overrides(settings, ["seed=7"]), resume=True, progress=False)
    train(settings, resume=True, progress=False)
    explicit = with_overrides(stored, [f"output={tmp_path / 'explicit'}"])
    train(explicit, progress=False)
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "explicit")


@pytest.mark.usefixtures("little_memory")
def test_check_says_what_would_be_picked_and_tries_it(teacher, tmp_path):
    told = []
    report = check(config(tmp_path / "run", teacher), on_plan=lambda plan, picked: told.append((plan, picked)))
    assert told == [(report.memory, report.picked)]
    assert report.picked[0].endswith("Picked:") and report.to_json()["picked"] == report.picked
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_what_is_held_back_of_a_gpu_is_stated():
    room = available("cuda")
    free, _ = torch.cuda.mem_get_info()
    assert room.free == pytest.approx(free, rel=0.01) and room.usable == int(room.free * 0.95) - 2**30
