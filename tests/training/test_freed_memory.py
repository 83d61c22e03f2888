"""What a run lets go of before its first step, and what a second micro-batch adds to the first."""

import gc

import pytest
import torch
import transformers
import yaml
from test_text_runs import LCM, config, place  # noqa: F401 (a fixture)
from tiny_runs import run_config, save_teacher

from diffdistill.config import parse_config
from diffdistill.evaluation import reference
from diffdistill.evaluation.protocol import load_protocol
from diffdistill.memory import LiveBytes, nbytes
from diffdistill.training import preview
from diffdistill.training.building import open_stage, open_teacher
from diffdistill.training.engine import Engine
from diffdistill.training.planning import plan_memory
from diffdistill.training.run import train


def text_encoders():
    """Return the text encoders that are alive."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, transformers.PreTrainedModel)]


@pytest.fixture
def looking(monkeypatch):
    """Functions that look at the engine before each step."""
    looks, step = [], Engine.step

    def looked(self, *args, **kwargs):
        for look in looks:
            look(self)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "step", looked)
    return looks


def test_no_text_encoder_is_alive_in_a_step(place, looking):  # noqa: F811
    """Not those that encoded the data, nor those that sample grids and evaluations asked."""
    before, alive = len(text_encoders()), []
    looking.append(lambda engine: alive.append(len(text_encoders())))
    train(config(place, "freed", LCM, "captions", samples={"every_steps": 1, "num": 2}), progress=False)
    assert alive == [before] * 6


def test_no_text_encoder_is_alive_while_samples_and_scores_are_made(tmp_path, monkeypatch):
    """All that they ask for is encoded before the first step, where there are no activations yet."""
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    monkeypatch.setattr(reference, "NUM_DRAWN", 100)
    monkeypatch.setattr(preview, "TEACHER_STEPS", 2)
    protocol = load_protocol("shapes-short").model_dump(mode="json") | {"num_images": 20, "jackknife_groups": 5}
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    before, alive, looks, true = len(text_encoders()), {}, [], preview.Stoppable.__call__

    def call(*arguments):
        alive.setdefault(looks[-1], []).append(len(text_encoders()))
        return true(*arguments)

    def noting(each, name):
        method = getattr(each, name)
        monkeypatch.setattr(each, name, lambda *arguments: (looks.append(name), method(*arguments))[1])

    monkeypatch.setattr(preview.Stoppable, "__call__", call)
    noting(preview.Preview, "student_images")
    noting(preview.Validation, "scores")
    values = {
        "teacher": "shapes-sd",
        "output": str(tmp_path / "run"),
        "data": {"kind": "shapes", "num": 8, "cache": str(tmp_path / "cache")},
        "roles": {"layout": "shared", "lora": {"rank": 2}},
        "stages": [{"steps": 1, "method": LCM}],
        "batch_size": 2,
        "samples": {"every_steps": 1, "num": 2},
        "validation": {"every_steps": 1, "steps": [1], "protocol": str(tmp_path / "protocol.yaml")},
        "sampling_batch_size": 10,
    }
    train(parse_config(values), progress=False)
    assert alive == {"student_images": [before] * (1 + 2), "scores": [before] * 2}  # student, teacher; in parts of ten


@pytest.mark.gpu
def test_a_gpu_holds_what_is_planned_and_no_autoencoder(place, looking):  # noqa: F811
    settings = config(place, "freed-gpu", LCM, "captions", samples={"every_steps": 1, "num": 2})
    layer = torch.nn.Linear(64, 64, device="cuda")
    layer(torch.ones(64, 64, device="cuda")).sum().backward()  # libraries keep workspaces, one for each thread
    del layer
    gc.collect()
    before, held, devices = torch.cuda.memory_allocated(), [], []

    def look(engine):
        gc.collect()
        held.append(torch.cuda.memory_allocated() - before)
        vae = engine.feed.conditions.teacher.codec.vae
        devices.append(next(vae.parameters()).device.type)

    looking.append(look)
    train(settings, progress=False)
    kept = sum(row.kept_bytes for row in plan_memory(settings, "cuda").rows)
    assert set(devices) == {"cpu"} and max(held) < 1.1 * kept + 2**20


def test_further_micro_batches_add_the_gradients_once_and_nothing_else(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", block_out_channels=(16, 32))
    peaks = []
    for num in (1, 2, 4):
        settings = run_config(teacher, tmp_path / "run", batch_size=4 * num, micro_batch_size=4, ema=None)
        roles, engine = open_stage(settings, open_teacher(settings, "cpu"))
        engine.step(0)  # moments are there after it
        gc.collect()
        with LiveBytes() as live:
            engine.step(1)
        peaks.append(live.peak)
    gradients, batch = nbytes(roles.parameters("student")), 4 * 8 * 8 * 4 + 4 * 8
    one, two, four = peaks
    assert one + 0.9 * gradients < two < one + gradients + 4 * batch
    assert two <= four < two + 8 * batch
