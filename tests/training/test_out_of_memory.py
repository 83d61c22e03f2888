"""A run that runs out of memory says what it needs and what would help most, and leaves its last checkpoint whole."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import run_config, save_teacher

from diffdistill.errors import UserError
from diffdistill.training.loading import load_run
from diffdistill.training.out_of_memory import is_out_of_memory, remedies
from diffdistill.training.planning import plan_memory
from diffdistill.training.run import train

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("oom") / "teacher")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_ERROR), MemoryError()])
def test_it_is_known_from_a_gpu_from_the_allocator_of_the_cpu_and_from_python(error):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_the_message_has_the_plan_and_three_settings_and_the_checkpoint_stays(teacher, tmp_path, monkeypatch):
    from diffdistill.distillers.progressive import Progressive

    loss = Progressive.loss

    def fails_at_step_4(self, turn, batch, rng, step):  # the plan takes step 0
        if step == 4:
            raise RuntimeError(CPU_ERROR)
        return loss(self, turn, batch, rng, step)

    monkeypatch.setattr(Progressive, "loss", fails_at_step_4)
    with pytest.raises(UserError) as caught:
        train(run_config(teacher, tmp_path / "run"), progress=False)
    message = str(caught.value)
    assert "out of memory" in message and "step 4" in message and "step_0000003" in message and "activations" in message
    assert message.count("saves") == 3
    assert load_run(tmp_path / "run").step == 3


@pytest.mark.slow
def test_settings_are_ranked_by_the_bytes_they_save(teacher, tmp_path):
    config = run_config(teacher, tmp_path / "run", batch_size=8, micro_batch_size=8)
    plan = plan_memory(config, "cpu")
    found = remedies(config, plan, "cpu")
    saved = dict(found)
    assert [remedy.saved for remedy in found] == sorted(saved.values(), reverse=True)
    average = next(row for row in plan.rows if row.role.startswith("average"))
    assert saved["ema=null"] == average.bytes
    smaller = plan_memory(run_config(teacher, tmp_path / "run", batch_size=8, micro_batch_size=4), "cpu")
    assert saved["micro_batch_size=4"] == plan.peak.bytes - smaller.peak.bytes


def test_what_a_run_has_already_or_cannot_have_is_no_remedy(teacher, tmp_path):
    roles = {"layout": "shared", "lora": {"rank": 2}, "activation_checkpointing": True}
    config = run_config(teacher, tmp_path / "run", roles=roles, ema=None, micro_batch_size=1, precision="bf16")
    settings = {remedy.setting for remedy in remedies(config, plan_memory(config, "cpu"), "cpu")}
    assert settings - {"teacher_options.quantize=int8"} == {"teacher_options.dtype=bf16", "roles.lora.rank=1"}
