"""The plan of a run's memory against what the allocator handed out while the real run took a step."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import text_pipelines
import torch
from test_text_runs import config, place  # noqa: F401 (a fixture)
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from diffdistill.config import RunConfig
from diffdistill.memory import LiveBytes, MemoryPlan
from diffdistill.models.loading import load_teacher
from diffdistill.models.weightless import as_fakes
from diffdistill.training.building import build_run_roles, open_stage, open_teacher
from diffdistill.training.planning import _autocast, _backward, _images, _rules, plan_memory

DMD2 = {"name": "dmd2", "student_steps": 2, "guidance": 3.0, "student_every": 1}
COPIES = {"layout": "copies"}
SHARED = {"layout": "shared", "lora": {"rank": 2, "targets": "attention"}}
CHECKPOINTING = {"activation_checkpointing": True}
HALF = {"teacher_options": {"size": 32, "dtype": "bf16"}, "precision": "bf16"}


@pytest.fixture(scope="module")
def pipelines(place: Path) -> Path:  # noqa: F811
    text_pipelines.save("pixart", place)
    return place


def run(pipelines: Path, name: str, roles: dict, method: dict = DMD2, **changes) -> RunConfig:
    """Return a run on images of 32 pixels."""
    values = {"teacher": str(pipelines / name), "teacher_options": {"size": 32}, "roles": roles, "batch_size": 16, "ema": None}
    return config(pipelines, "planned", method, **(values | changes))


def measured_peak(run: RunConfig, folder: Path) -> int:
    """Return the most bytes that torch's allocator had handed out at once in the second step, from before the teacher was loaded."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        _, engine = open_stage(run, open_teacher(run, "cpu"))
        engine.step(0)
        gc.collect()  # what encoding the prompts left behind is no part of a step
        with record_function("second step"):
            engine.step(1)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    step = next(event for event in events if event.get("name") == "second step")
    totals = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    totals.sort(key=lambda entry: entry[0])
    first = totals[0][1]
    before = first["Total Allocated"] - first["Bytes"]  # the profiler counts on from its last use
    return max(counts["Total Allocated"] for time, counts in totals if 0 <= time - step["ts"] <= step["dur"]) - before


@pytest.mark.parametrize(
    ("name", "roles", "changes"),
    [
        ("sd", SHARED, {}),
        ("sd", COPIES | CHECKPOINTING, {}),
        ("pixart", SHARED | CHECKPOINTING, {"batch_size": 64}),
        ("pixart", COPIES, {"batch_size": 64, "micro_batch_size": 32, **HALF}),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(pipelines, tmp_path, name, roles, changes):
    settings = run(pipelines, name, roles, **changes)
    planned, measured = plan_memory(settings, "cpu").peak.bytes, measured_peak(settings, tmp_path)
    assert planned == pytest.approx(measured, rel=0.15), planned / measured


@pytest.fixture(scope="module")
def shared_plan(pipelines) -> MemoryPlan:
    """The plan of the transformer in the shared layout."""
    return plan_memory(run(pipelines, "pixart", SHARED), "cpu")


def test_activation_checkpointing_keeps_fewer(pipelines, shared_plan):
    checkpointed = plan_memory(run(pipelines, "pixart", SHARED | CHECKPOINTING), "cpu")
    assert checkpointed.peak.activation_bytes < 0.8 * shared_plan.peak.activation_bytes
    assert [row.kept_bytes for row in checkpointed.rows] == [row.kept_bytes for row in shared_plan.rows]


def test_activations_are_those_of_the_micro_batch(pipelines, shared_plan):
    half = plan_memory(run(pipelines, "pixart", SHARED, micro_batch_size=8), "cpu")
    assert half.peak.activation_bytes == pytest.approx(shared_plan.peak.activation_bytes / 2, rel=0.1)
    assert [row.kept_bytes for row in half.rows] == [row.kept_bytes for row in shared_plan.rows]


def test_the_graph_of_dmds_regression_does_not_lie_beside_that_of_its_matching(pipelines):
    def student(regression, **changes):
        method = {"name": "dmd", "guidance": 3.0, "regression": regression}
        plan = plan_memory(run(pipelines, "pixart", COPIES, method, batch_size=64, **changes), "cpu")
        return next(turn for turn in plan.turns if turn.name == "student").activation_bytes

    pairs = student({}, pairs={"num": 64}) - student(None)
    assert 0 <= pairs < 0.1 * student(None)  # the stored states alone


def test_the_autoencoder_has_a_row(pipelines, shared_plan):
    rows = {row.role: row for row in shared_plan.rows}
    vae = load_teacher(pipelines / "pixart").codec.vae
    assert rows["autoencoder"].weights_bytes == sum(4 * tensor.numel() for tensor in (*vae.parameters(), *vae.buffers()))


def test_images_are_planned_with_the_rows_of_a_pass_their_decoding_and_the_average(pipelines, shared_plan):
    def needed(device_type="cpu", **changes):
        settings = run(pipelines, "pixart", SHARED, **changes)
        teacher = open_teacher(settings, "meta")
        with torch.device("meta"):
            roles = build_run_roles(settings, teacher)
        return _images(settings, device_type, teacher, as_fakes(roles, roles.networks.values()))

    few = needed(sampling_batch_size=4)
    usual = next(turn.bytes for turn in shared_plan.turns if turn.name == "images")
    assert usual == pytest.approx(4 * few, rel=0.05)  # a micro-batch has 16 samples
    teacher = load_teacher(pipelines / "pixart", size=32)
    with LiveBytes() as live, torch.no_grad():
        teacher.codec.decode(torch.zeros(4, *teacher.denoiser.sample_shape))
    assert live.peak <= few <= 1.2 * live.peak
    rows = {row.role: row for row in shared_plan.rows}
    assert needed(sampling_batch_size=4, ema={"decay": 0.9}) == few + 2 * rows["student"].adapter_bytes
    assert needed("cuda", sampling_batch_size=4) == few + rows["autoencoder"].weights_bytes


@pytest.mark.parametrize(("device_type", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_norms_are_float32_under_the_autocast_of_a_gpu_alone(device_type, dtype):
    x = torch.ones(2, 4, 4, 4, dtype=torch.bfloat16)
    with _rules(device_type), _autocast("bf16"):
        assert torch.nn.GroupNorm(2, 4).bfloat16()(x).dtype == dtype
        assert torch.nn.LayerNorm(4).bfloat16()(x).dtype == dtype
        assert torch.nn.Linear(4, 4)(x.float()).dtype == torch.bfloat16


def test_what_is_recomputed_in_the_backward_pass_follows_the_autocast_of_a_gpu_as_well():
    """Checkpointing refuses what comes back in another dtype."""
    block = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).bfloat16()
    seen = []
    block[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x = torch.ones(2, 4, requires_grad=True)
    with _rules("cuda"):
        with _autocast("bf16"):
            out = checkpoint(block, x, use_reentrant=False)
        _backward(out.sum())
    assert seen == [torch.float32] * 2 and x.grad is not None
