"""Forward-mode derivatives of real networks of every family: those of a central difference, in float64 throughout."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import small_networks
import text_pipelines
import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.math.schedules import EDMSchedule, VPSchedule
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.families import FAMILIES
from diffdistill.models.forward_mode import check_forward_mode, denoiser_jvp
from diffdistill.models.loading import load_teacher
from diffdistill.models.network import EDMDenoiser, FamilyDenoiser, NetworkDenoiser
from diffdistill.models.roles import build_roles

F64 = torch.float64
VP = VPSchedule(torch.linspace(0.9999, 0.01, 1000, dtype=F64))


class Asked(NamedTuple):
    denoiser: FamilyDenoiser
    cond: Condition


def of_classes(network: nn.Module) -> Asked:
    """Return a class-conditional network whose layers that start at zero have values."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    family = FAMILIES[type(network).__name__]
    return Asked(
        NetworkDenoiser(network.eval(), family, VP, "epsilon", (1, 8, 8)), Condition.labels(torch.tensor([0, 2]), None)
    )


@cache
def asked(name: str) -> Asked:
    """Return a small network of a family with a condition of two rows."""
    import tempfile

    torch.manual_seed(0)
    if name == "unet2d":
        return of_classes(small_networks.unet(num_class_embeds=3))
    if name == "dit":
        return of_classes(small_networks.dit())
    if name == "edm":
        network = small_networks.unet().eval()
        return Asked(EDMDenoiser(network, FAMILIES["UNet2DModel"], EDMSchedule(0.002, 80), (1, 8, 8)), Condition.none(2))
    teacher = load_teacher(text_pipelines.save(name, Path(tempfile.mkdtemp())), size=32 if name == "sana" else 16)
    return Asked(teacher.denoiser, teacher.condition(["a red circle", "blue square left of it"], 2))


FAMILY_NAMES = ("unet2d", "edm", "dit", "sd", "sdxl", "pixart", "sd3", "flux", "sana")


def waves(self: Timesteps, timesteps: Tensor) -> Tensor:
    """Embed times in float64; diffusers does it in float32, in which a small difference of times has no digits."""
    half = self.num_channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=F64) / (half - self.downscale_freq_shift))
    angles = self.scale * timesteps[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()], dim=-1)


@pytest.fixture
def wide_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timesteps, "forward", waves)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # of the times, in families and networks


class Point(NamedTuple):
    x_t: Tensor
    t: Tensor
    cond: Condition
    vx: Tensor
    vt: Tensor


def in_float64(name: str) -> tuple[FamilyDenoiser, Point]:
    denoiser, cond = asked(name)
    wide = denoiser.with_network(denoiser.network.double())
    x_t, vx = torch.randn(2, 2, *wide.sample_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.25, 0.625], dtype=F64) * wide.schedule.t_max
    values = {key: value.double() if value.is_floating_point() else value for key, value in cond.values.items()}
    vt = torch.tensor([1.0, 0.5], dtype=F64) * wide.schedule.t_max / 10
    return wide, Point(x_t, t, Condition(2, values, cond.null), vx, vt)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.usefixtures("wide_times")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_derivative_is_that_of_a_central_difference(name: str):
    denoiser, point = in_float64(name)
    exact = denoiser_jvp(denoiser, *point)
    central = denoiser_jvp(denoiser, *point, backend="fd_central", step=1e-6)
    assert relative(exact.tangent, central.tangent) < 1e-6
    for still in ("vx", "vt"):  # each input has a part in it
        part = denoiser_jvp(denoiser, *point._replace(**{still: torch.zeros_like(getattr(point, still))}))
        assert relative(part.tangent, exact.tangent) > 1e-3
    with torch.no_grad():
        ordinary = denoiser(*point[:3]).raw
    torch.testing.assert_close(exact.value, ordinary, rtol=0, atol=1e-12)
    assert {choice.name == "forward" for call, choice in denoiser.attention.choices.items() if call.tangent} == {True}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_direction_thrice_as_long_has_thrice_the_derivative(name: str):
    denoiser, point = in_float64(name)
    once, thrice = (denoiser_jvp(denoiser, *point._replace(vx=c * point.vx, vt=c * point.vt)).tangent for c in (1, 3))
    assert relative(thrice, 3 * once) < 1e-6  # the time is embedded in float32


@pytest.mark.usefixtures("wide_times")
def test_what_is_read_of_the_prediction_is_what_is_differentiated():
    """D = (x_t - sigma eps) / alpha, its coefficients moving with the time."""
    denoiser, point = in_float64("dit")

    def denoised(x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, t, point.cond).x0

    value, tangent = denoiser_jvp(denoiser, *point, read=lambda prediction: prediction.x0)
    h = 1e-6
    moved = [denoised(point.x_t + sign * h * point.vx, point.t + sign * h * point.vt) for sign in (1, -1)]
    torch.testing.assert_close(value, denoised(point.x_t, point.t), rtol=1e-12, atol=0)
    assert relative(tangent, (moved[0] - moved[1]) / (2 * h)) < 1e-6


@pytest.mark.usefixtures("wide_times")
def test_an_adapter_of_a_role_is_in_the_derivative():
    torch.manual_seed(0)
    denoiser, cond = of_classes(small_networks.dit().double())
    roles = build_roles(denoiser, ("student",), "shared", LoraSpec(rank=2, targets="attention"))
    _, point = in_float64("dit")
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    student, teacher = (denoiser_jvp(role, *point._replace(cond=cond)) for role in (roles["student"], roles.teacher))
    central = denoiser_jvp(roles["student"], *point._replace(cond=cond), backend="fd_central", step=1e-6)
    assert relative(student.tangent, central.tangent) < 1e-6
    assert relative(teacher.tangent, central.tangent) > 0.01


def test_the_pass_that_follows_drops_the_same_units():
    torch.manual_seed(0)
    denoiser, cond = of_classes(small_networks.dit(dropout=0.3))
    denoiser.network.transformer_blocks.train()
    _, point = in_float64("dit")
    value, _ = denoiser_jvp(denoiser, point.x_t.float(), point.t, cond, point.vx.float(), point.vt)
    following, another = (denoiser(point.x_t.float(), point.t, cond).raw for _ in range(2))
    torch.testing.assert_close(value, following.detach(), rtol=0, atol=1e-6)
    assert relative(another, following) > 0.01


@pytest.mark.parametrize("name", ["edm", "dit", "sd", "flux"])
def test_the_self_test_passes_networks_that_are_right(name: str):
    check_forward_mode(*asked(name))


def cut_times(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].long(),)


def cut_half(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return (output + output.detach()) / 2


@pytest.mark.parametrize(("where", "message"), [("times", "in the time t is not"), ("state", "in the state x is not")])
def test_the_self_test_finds_a_cut_and_names_the_network(where: str, message: str):
    torch.manual_seed(0)
    denoiser, cond = of_classes(small_networks.dit())
    for block in denoiser.network.transformer_blocks:
        if where == "times":
            block.norm1.emb.time_proj.register_forward_pre_hook(cut_times)
        else:
            block.attn1.register_forward_hook(cut_half)
    with pytest.raises(UserError, match=f"DiTTransformer2DModel: the network's forward-mode derivative {message}"):
        check_forward_mode(denoiser, cond)
