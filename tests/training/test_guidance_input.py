"""A run whose student takes w as an input: guidance distillation, then fewer steps, stopped at the border and resumed."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import final_hashes, run_config, save_teacher

from diffdistill.errors import UserError
from diffdistill.models.extras import extra_inputs_of
from diffdistill.models.loading import load_teacher
from diffdistill.sampling.noise import Noise
from diffdistill.training.engine import Engine
from diffdistill.training.loading import load_run
from diffdistill.training.run import train

W = {"guidance": [1.0, 5.0], "guidance_input": 2.0}
STAGES = [
    {"steps": 4, "method": {"name": "guidance", "student_steps": 4, **W}, "optimizers": {"student": {"lr": 1e-2}}},
    {"steps": 3, "method": {"name": "progressive", "student_steps": 2, **W}},
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def test_both_stages_hear_w_and_a_resumed_run_is_the_same(teacher, tmp_path, monkeypatch):
    config = run_config(teacher, tmp_path / "run", stages=STAGES, exportable=False)
    train(config, progress=False)
    run = load_run(tmp_path / "run")
    assert extra_inputs_of(run.teacher.network) is None
    assert extra_inputs_of(run.roles["student"].network) is not None
    sampler = run.sampler(2)
    assert (sampler.guidance, sampler.guidance_as_input, sampler.nfe) == (2.0, True, 2)
    cond = run.teacher.condition(torch.tensor([0, 1]), 2)
    student, asked = run.roles["student"], (sampler, replace(sampler, guidance=2.0), replace(sampler, guidance=5.0))
    images = [each.sample(student, Noise([1, 2]), cond) for each in asked]
    assert torch.equal(images[0], images[1]) and float((images[0] - images[2]).detach().abs().max()) > 1e-4

    broken, plain = run_config(teacher, tmp_path / "broken", stages=STAGES, exportable=False), Engine.step

    def step(self, k, stop=False):
        if (self.stage, k) == (1, 1) and not step.done:
            step.done = True
            raise KeyboardInterrupt
        plain(self, k, stop)

    step.done = False
    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train(broken, progress=False)
    train(broken, resume=True, progress=False)
    assert final_hashes(tmp_path / "broken") == final_hashes(tmp_path / "run")


def test_what_no_stock_pipeline_carries_is_refused_before_the_first_step(teacher, tmp_path):
    with pytest.raises(UserError, match="takes its guidance as an input"):
        train(run_config(teacher, tmp_path / "run", stages=STAGES), progress=False)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_one_network_for_all_roles_has_no_room_for_an_input(teacher, tmp_path):
    roles = {"layout": "shared", "lora": {"rank": 2, "targets": "all"}}
    with pytest.raises(UserError, match="Set copies"):
        run_config(teacher, tmp_path / "run", stages=STAGES, exportable=False, roles=roles)


AGD = {
    "name": "agd",
    "adapters": {"kind": "offset", "hidden_dim": 8, "targets": ["resnets.0"]},
    "trajectories": {"num": 4, "steps": 4, "every": 2, "guidance": [1.0, 4.0]},
    "student_steps": 4,
}


@pytest.mark.parametrize("layout", ["copies", "shared"])
def test_adapters_learn_from_stored_trajectories_and_leave_the_network_as_it_was(teacher, tmp_path, layout):
    stages = [{"steps": 6, "method": AGD, "optimizers": {"student": {"lr": 1e-2}}}]
    config = run_config(
        teacher, tmp_path / "run", stages=stages, data={"kind": "labels"}, exportable=False, roles={"layout": layout}
    )
    train(config, progress=False)
    assert (tmp_path / "run" / "trajectories.safetensors").exists()
    run = load_run(tmp_path / "run")
    cond, sampler = run.teacher.condition(torch.tensor([0, 1]), 2), run.sampler(4)
    assert (sampler.nfe, sampler.guidance_as_input) == (4, True)
    base, student = load_teacher(teacher).network.state_dict(), run.roles["student"].network.state_dict()
    assert all(torch.equal(base[name], student[name]) for name in base)
    x, t = Noise([1, 2]).draw((1, 8, 8)), torch.full((2,), 500.0, dtype=torch.float64)
    told = cond.with_values(guidance=torch.full((2,), 3.0, dtype=torch.float64))
    assert torch.equal(run.roles.teacher(x, t, told).raw, load_teacher(teacher).denoiser(x, t, cond).raw)
    few = sampler.sample(run.roles["student"], Noise([1, 2]), cond)
    other = replace(sampler, guidance=1.0).sample(run.roles["student"], Noise([1, 2]), cond)
    assert few.isfinite().all() and not torch.equal(few, other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"roles": {"layout": "copies", "lora": {"rank": 2}}}, "roles.lora"),
        (
            {"stages": [{"steps": 1, "method": AGD}, {"steps": 1, "method": {"name": "dmd2"}}]},
            "Make it a run of its own",
        ),
    ],
)
def test_guidance_adapters_stand_alone(teacher, tmp_path, changes, said):
    values = {"stages": [{"steps": 1, "method": AGD}], "data": {"kind": "labels"}, "exportable": False} | changes
    with pytest.raises(UserError, match=said):
        run_config(teacher, tmp_path / "run", **values)
