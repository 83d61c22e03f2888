"""DMD2 with every role a LoRA of one backbone keeps little more than plain LoRA fine-tuning does."""

import importlib.util
import sys
from pathlib import Path

import pytest

from diffdistill import recipes
from diffdistill.config import load_config
from diffdistill.training.building import build_distiller, build_run_roles, open_teacher
from diffdistill.training.planning import empty_batch, plan_memory, turn_activations


@pytest.fixture(scope="module")
def planner():
    """eval/memory.py, which plans plain fine-tuning."""
    spec = importlib.util.spec_from_file_location("eval_memory", Path(__file__).parents[2] / "eval" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module


def settings(*overrides):
    return load_config(recipes.recipe_path("digits-dmd2-lora"), list(overrides))


def test_dmd2_of_adapters_needs_at_most_1_15_of_plain_fine_tuning_by_default(planner):
    config = settings("stages.0.method.guidance=3.0")
    plain = planner.finetuning_plan(config, "cpu", open_teacher(config, "meta")).peak.bytes
    usual, in_quarters, at_once = (
        plan_memory(each, "cpu").peak.bytes
        for each in (config, *(settings("stages.0.method.guidance=3.0", f"roles.rows_at_once={rows}") for rows in (16, 192)))
    )
    assert 1.05 < usual / plain <= 1.15
    assert in_quarters < 0.97 * usual < 0.82 * at_once


def test_the_plan_is_what_tensors_take(planner):
    config = settings("stages.0.method.fake_warmup_steps=0")
    planned = {turn.name: turn.activation_bytes for turn in plan_memory(config, "cpu").turns if turn.trains}
    teacher = open_teacher(config, "cpu")
    roles, batch = build_run_roles(config, teacher), empty_batch(teacher, config.batch_size, images=False)
    assert turn_activations(config, "cpu", roles, build_distiller(config.stages[0], roles), 0, batch) == planned
    plain = [
        planner.finetuning_plan(config, "cpu", open_teacher(config, place), fakes).peak
        for place, fakes in (("meta", True), ("cpu", False))
    ]
    assert plain[0] == plain[1]
