"""Settings of `compute` leave the losses of a run as they are, up to the rounding that each names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import run_values

from diffdistill.config import RunConfig, parse_config
from diffdistill.errors import UserError
from diffdistill.training.building import open_stage, open_teacher
from diffdistill.training.planning import plan_memory

METHODS = {
    "progressive": {"name": "progressive", "student_steps": 2},
    "consistency": {"name": "consistency"},
    "dmd2": {"name": "dmd2", "student_steps": 2, "student_every": 1, "guidance": 2.0},
    "dmd2 with a discriminator": {"name": "dmd2", "student_steps": 2, "student_every": 1, "gan": {}},
}
LAYOUTS = {"copies": {"layout": "copies"}, "shared": {"layout": "shared", "lora": {"rank": 4, "targets": "all"}}}


def config(method: str, layout: str, teacher: str | Path = "digits-unet", **changes) -> RunConfig:
    """Return a run of four samples a step on the digits."""
    small = {"batch_size": 4, "micro_batch_size": 4, "ema": None, "roles": LAYOUTS[layout]}
    values = run_values(Path(str(teacher)), Path("unused"), steps=4) | small | changes
    values["stages"] = [{**values["stages"][0], "method": METHODS[method]}]
    return parse_config({**values, "teacher": str(teacher)})


def losses(run: RunConfig, steps: int = 2, device: str = "cpu") -> list[dict[str, float]]:
    """Return what is logged of each step, from weights that have moved apart: at the start some losses are the rounding alone."""
    roles, engine = open_stage(run, open_teacher(run, device))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in roles.names:
            for parameter in roles.parameters(name):
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator).to(device), alpha=0.02 if roles.lora is None else 0.2
                )
    found = []
    for step in range(steps):
        engine.step(step)
        found.append(engine.meter.read())
    return found


@pytest.fixture(scope="module")
def plain():
    """Return the losses of a run as the settings' defaults have them, each made once."""
    made: dict[tuple[str, str], list[dict[str, float]]] = {}

    def of(method: str, layout: str) -> list[dict[str, float]]:
        if (method, layout) not in made:
            made[method, layout] = losses(config(method, layout))
        return made[method, layout]

    return of


def difference(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> float:
    """Return the largest difference of a loss relative to it."""
    assert [step.keys() for step in found] == [step.keys() for step in wanted]
    totals = [(a[name], b[name]) for a, b in zip(found, wanted, strict=True) for name in a if name.endswith("/total")]
    return max(abs(a - b) / abs(b) for a, b in totals)


each_run = pytest.mark.parametrize("layout", LAYOUTS)
each_method = pytest.mark.parametrize("method", METHODS)


@each_run
@each_method
def test_channels_last_changes_the_order_of_sums_alone(method, layout, plain):
    """Sums of up to n = 9 x 128 products in another order differ by sqrt(n) 2^-24 = 2e-6; a loss squares, a step carries on."""
    found = losses(config(method, layout, compute={"channels_last": True}))
    assert difference(found, plain(method, layout)) < 1e-4


@each_run
@each_method
def test_a_teacher_in_bf16_changes_the_losses_by_its_rounding(method, layout, plain):
    """Its output is off by some 2^-8, and a loss is of second degree in it: less than 4 x 2^-8 while the roles are apart."""
    found = losses(config(method, layout, compute={"frozen": "bf16"}))
    assert 1e-6 < difference(found, plain(method, layout)) < 4 * 2**-8


def test_the_teacher_in_copies_is_stored_in_bf16_and_the_plan_counts_it():
    roles, _ = open_stage(run := config("dmd2", "copies", compute={"frozen": "bf16"}), open_teacher(run, "cpu"))
    assert {p.dtype for p in roles.networks["teacher"].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in roles.parameters("student")} == {torch.float32}
    kept = [plan_memory(each, "cuda").rows[0].weights_bytes for each in (config("dmd2", "copies"), run)]
    assert kept[1] == pytest.approx(kept[0] / 2, rel=0.01)


def test_only_passes_without_gradient_of_frozen_roles_are_lowered_where_weights_are_shared():
    plain, lowered = (
        open_stage(run := config("progressive", "shared", **changes), open_teacher(run, "cpu"))[0]
        for changes in ({}, {"compute": {"frozen": "bf16"}})
    )
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 300.0, dtype=torch.float64)
    cond = open_teacher(config("progressive", "shared"), "cpu").condition(torch.arange(2), 2)
    for names, gradient, equal in (
        (("teacher", "source"), False, False),
        (("teacher", "source"), True, True),
        (("student",), False, True),
    ):
        for name in names:
            with torch.set_grad_enabled(gradient):
                one, other = ((r.teacher if name == "teacher" else r[name])(x, t, cond) for r in (plain, lowered))
            assert torch.equal(one.raw, other.raw) is equal, (name, gradient)
            torch.testing.assert_close(other.x0, one.x0, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("method", "layout", "changes", "said"),
    [
        ("dmd2", "shared", {"compute": {"frozen": "fp8"}}, "layout: copies"),
        ("dmd2 with a discriminator", "copies", {"compute": {"frozen": "fp8"}}, "no gradient"),
        ("dmd2", "shared", {"compute": {"frozen": "bf16"}, "precision": "bf16"}, "no effect"),
        ("dmd2", "copies", {"compute": {"frozen": "bf16"}, "teacher_options": {"dtype": "bf16"}}, "no effect"),
        ("dmd2", "copies", {"compute": {"attention": "flahs"}}, "attention"),
    ],
)
def test_what_cannot_be_together_is_refused_with_the_config(method, layout, changes, said):
    with pytest.raises(UserError, match=f"compute.*{said}"):
        config(method, layout, **changes)


@pytest.mark.parametrize(
    ("teacher", "changes", "said"),
    [
        ("digits-unet", {"cuda_graphs": True}, "cuda_graphs needs a GPU, and the networks are on the CPU. Set it to false"),
        ("digits-unet", {"frozen": "fp8"}, "compute capability 8.9 .*this is the CPU. Set bf16 or null"),
        ("digits-dit", {"channels_last": True}, "for the convolutions of UNets; this is a dit"),
    ],
)
def test_what_the_machine_or_the_network_cannot_is_refused_before_the_first_step(teacher, changes, said):
    run = config("progressive", "copies", teacher, compute=changes)
    with pytest.raises(UserError, match=said):
        open_stage(run, open_teacher(run, "cpu"))


# --- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_run
@each_method
@pytest.mark.parametrize(("setting", "tolerance"), [("cuda_graphs", 1e-5), ("channels_last", 1e-2)])
def test_losses_on_a_gpu_stay_as_they_are(method, layout, setting, tolerance, monkeypatch):
    """Recorded passes run the same kernels, and sums by atomic additions differ by rounding; in another layout TensorFloat-32 rounds others."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, changed = (losses(config(method, layout, compute=each), device="cuda") for each in ({}, {setting: True}))
    assert difference(changed, plain) <= tolerance


@pytest.mark.gpu
@each_run
def test_losses_on_a_gpu_stay_as_they_are_with_compiled_blocks(layout):
    """They are fused, and round the same sums elsewhere; one method, since compiling takes a minute."""
    plain, changed = (losses(config("dmd2", layout, compute=each), device="cuda") for each in ({}, {"compile": "blocks"}))
    assert difference(changed, plain) <= 1e-2


@pytest.mark.gpu
def test_a_teacher_in_fp8_rounds_to_three_bits():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 from Ada and Hopper on")
    plain, changed = (
        losses(config("dmd2", "copies", "digits-dit", compute=each), device="cuda") for each in ({}, {"frozen": "fp8"})
    )
    assert 1e-6 < difference(changed, plain) < 4 * 2**-4
