"""What only a GPU shows: steps that never wait for it, and runs, samples and scores made on it. `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import text_pipelines
import torch

import diffdistill as dd
from diffdistill import recipes
from diffdistill.config import RunConfig, load_config
from diffdistill.evaluation.extractors import shapes_clip
from diffdistill.evaluation.images import to_uint8
from diffdistill.targets import open_target
from diffdistill.training.building import open_stage, open_teacher
from diffdistill.training.loading import load_run
from diffdistill.training.run import train

pytestmark = pytest.mark.gpu
STEPS = [  # a step of every kind that the recipes of the shapes have
    ("lcm", 0),
    ("dmd2-4", 1),
    ("dmd2-2", 1),
    ("vsd", 1),
    ("guidance", 0),
    ("guidance", 1),
]


def recipe(name: str, folder: Path, *changes: str) -> RunConfig:
    """Return a recipe of the shapes, small."""
    small = ["data.num=64", f"data.cache={folder / 'cache'}", f"output={folder / 'run'}", "batch_size=8", *changes]
    return load_config(recipes.recipe_path(f"shapes/{name}"), small)


@pytest.mark.parametrize(("name", "stage"), STEPS)
def test_a_step_never_waits_for_the_gpu(name: str, stage: int, tmp_path: Path) -> None:
    config = recipe(name, tmp_path)
    _, engine = open_stage(config, open_teacher(config, "cuda"), stage)
    for step in range(2):
        engine.step(step)  # kernels are chosen, tables moved
    busiest = max(range(100, 200), key=lambda step: len(engine.distiller.turns(step)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(busiest)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_lora_trained_on_the_gpu_leaves_for_stock_pipelines(tmp_path: Path) -> None:
    run = train(recipe("lcm", tmp_path, "stages.0.steps=3"), progress=False).folder
    assert load_run(run).teacher.device.type == "cuda"
    dd.export(run, tmp_path / "lora", kind="lora", steps=(2,))
    assert dd.verify(tmp_path / "lora").passed


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux", "sana"])
def test_half_precision_has_finite_gradients(name: str, tmp_path: Path) -> None:
    pipeline = text_pipelines.save(name.removesuffix("15"), tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na red house\na tree\n")
    changes = [
        f"teacher={pipeline}",
        f"teacher_options={{dtype: bf16, size: {32 if name == 'sana' else 16}}}",
        f"data.path={tmp_path / 'prompts.txt'}",
        f"data.cache={tmp_path / 'cache'}",
        f"output={tmp_path / 'run'}",
        "batch_size=2",
        "micro_batch_size=2",
    ]
    config = load_config(recipes.recipe_path(f"text/{name}-dmd2-lora"), changes)
    _, engine = open_stage(config, open_teacher(config, "cuda"))
    for step in range(6):
        engine.step(step)
    assert engine.guard.read() == {"student": [0, 0], "fake": [0, 0]}


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m"])
def test_an_image_of_a_seed_is_the_one_the_cpu_makes(solver: str) -> None:
    teacher = open_target("shapes-sd", solver)
    assert teacher.sampler(4).num_steps == 4
    seeds, captions = list(range(8)), ["a small red circle above a large blue square"] * 8
    on_gpu = teacher.generator(teacher.sampler(4))(seeds, captions)
    assert on_gpu.is_cuda
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        cpu = open_target("shapes-sd", solver)
        on_cpu = cpu.generator(cpu.sampler(4))(seeds, captions)
    assert not on_cpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=5e-2, rtol=0)  # TensorFloat-32 in convolutions
    assert float((on_gpu.cpu() - on_cpu).square().mean().sqrt()) < 5e-3


def test_features_are_those_of_the_cpu() -> None:
    images = to_uint8(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    on_gpu, on_cpu = shapes_clip("cuda"), shapes_clip("cpu")
    assert on_gpu.fingerprint == on_cpu.fingerprint
    torch.testing.assert_close(on_gpu(images).features.cpu(), on_cpu(images).features, atol=1e-4, rtol=1e-4)
