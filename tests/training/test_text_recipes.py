"""Every recipe of a text-to-image model is built and trained for two steps on a small pipeline of its family."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import text_pipelines
import torch
from test_text_runs import place  # noqa: F401 (a fixture)

from diffdistill import recipes
from diffdistill.config import load_config
from diffdistill.training.building import build_run_roles, open_teacher
from diffdistill.training.loading import load_run
from diffdistill.training.run import train

NAMES = [name for name in recipes.recipe_names() if name.startswith("text/")]
PIPELINES = {"sd15": "sd", "sdxl": "sdxl", "pixart": "pixart", "sd3": "sd3", "flux": "flux", "sana": "sana"}


def test_every_family_has_lcm_and_dmd2_and_two_have_more() -> None:
    expected = [f"text/{model}-{method}-lora" for model in PIPELINES for method in ("lcm", "dmd2")]
    assert sorted([*expected, "text/sd15-vsd", "text/sdxl-guidance"]) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_states_the_memory_of_a_step(name: str) -> None:
    lines = [line for line in recipes.recipe_text(name).splitlines() if line.startswith("# Memory:")]
    assert len(lines) == 1 and re.search(r"[\d.]+ GiB = weights .* activations [\d.]+ GiB \(turn of \w+\)$", lines[0])


def test_the_header_is_what_the_recipe_keeps_at_true_size() -> None:
    """All but the activations, whose finding takes a step, is planned anew; these are read from the header."""
    name = "text/pixart-dmd2-lora"
    spec = importlib.util.spec_from_file_location("eval_memory", Path(__file__).parents[2] / "eval" / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    line = next(line for line in recipes.recipe_text(name).splitlines() if line.startswith("# Memory:"))
    stated = int(float(re.search(r"activations ([\d.]+) GiB", line)[1]) * 2**30)
    planned = module.header(module.recipe_plan(name, [{"student": stated, "fake": 0}]))
    parts = re.compile(r"(weights|adapters|optimizer|gradients|activations) [\d.]+ [MG]iB")
    assert [match[0] for match in parts.finditer(planned)] == [match[0] for match in parts.finditer(line)]


@pytest.fixture(scope="module")
def pipelines(place: Path) -> Path:  # noqa: F811
    for name in sorted({*PIPELINES.values()} - {"sd"}):
        text_pipelines.save(name, place)
    return place


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_trains_on_a_small_pipeline(name: str, pipelines: Path, tmp_path: Path) -> None:
    model = name.removeprefix("text/").split("-")[0]
    config = load_config(recipes.recipe_path(name))
    data = pipelines / ("prompts.txt" if config.data.kind == "prompts" else "images")
    run = load_config(
        recipes.recipe_path(name),
        [
            f"teacher={pipelines / PIPELINES[model]}",
            "teacher_options={dtype: bf16, size: 16}",
            f"output={tmp_path / 'run'}",
            f"data.path={data}",
            f"data.cache={tmp_path / 'cache'}",
            "roles.lora.rank=2",
            "stages.0.steps=2",
            "batch_size=2",
            "micro_batch_size=2",
            "samples=null",
        ],
    )
    result = train(run, progress=False)
    # Not the student of DMD2 without guidance: at its one turn fake and teacher are still the same network, and it has no gradient.
    role = config.stages[0].trained[-1]
    moved = load_run(result.folder).roles.adapter_state(role)
    assert any(bool(tensor.any()) for key, tensor in moved.items() if "lora_B" in key)


@pytest.mark.parametrize("name", [name for name in recipes.recipe_names() if name.startswith("shapes/")])
def test_a_recipe_of_the_shapes_trains_on_the_embedded_teacher(name: str, tmp_path: Path) -> None:
    config = load_config(recipes.recipe_path(name))
    few = [f"stages.{index}.steps=2" for index in range(len(config.stages))]
    if name == "shapes/agd":
        few.append("stages.0.method.trajectories={num: 2, steps: 5, every: 5, guidance: [1.0, 5.0]}")
    small = [f"output={tmp_path / 'run'}", "data.num=8", f"data.cache={tmp_path / 'cache'}", "batch_size=2", *few]
    run = load_run(train(load_config(recipes.recipe_path(name), small), progress=False).folder)
    assert run.step == 2 * len(config.stages)
    before = build_run_roles(run.config, open_teacher(run.config, "cpu")).state("student")
    assert any(not torch.equal(value, before[key]) for key, value in run.roles.state("student").items())
