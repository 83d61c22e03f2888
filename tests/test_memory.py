"""The memory plan: counted by hand on a small network, and the same on the meta device."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffdistill.math.schedules import VPSchedule
from diffdistill.memory import memory_plan, total
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import build_roles
from diffdistill.training.optimizers import OptimizerConfig

SCHEDULE = VPSchedule(torch.linspace(0.99, 0.01, 10))
ROLES = ("student", "fake")


def unet(dtype=torch.float32):
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    ).to(dtype)


def plan(network, layout, lora, **settings):
    denoiser = NetworkDenoiser(network, FAMILIES["UNet2DConditionModel"], SCHEDULE, "epsilon", (4, 8, 8))
    optimizers = {role: OptimizerConfig(**settings) for role in ROLES}
    return memory_plan(build_roles(denoiser, ROLES, layout, lora), optimizers, averaged=True)


def test_copies_hold_three_networks_and_two_optimisers():
    network = unet()
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    rows = {row.role: row for row in plan(network, "copies", None)}
    assert [rows[name].weights_bytes for name in ("teacher", "student", "fake", "average of student")] == [size] * 4
    assert [rows[name].gradient_bytes for name in ("teacher", *ROLES)] == [0, size, size]
    assert [rows[name].optimizer_bytes for name in ("teacher", *ROLES)] == [0, 2 * size, 2 * size]
    assert total(list(rows.values())).bytes == (4 + 2 + 4) * size


def test_the_shared_layout_holds_one_network_and_adapters_in_float32():
    network = unet(torch.bfloat16)
    linears = [m for name, m in network.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    adapter = 4 * sum(3 * (linear.in_features + linear.out_features) for linear in linears)
    base = 2 * sum(parameter.numel() for parameter in network.parameters())
    rows = {row.role: row for row in plan(network, "shared", LoraSpec(rank=3, targets="attention"))}
    assert rows["teacher"].weights_bytes == base and rows["teacher"].trained == 0
    assert [rows[name].weights_bytes for name in ROLES] == [adapter] * 2
    assert [rows[name].bytes for name in ROLES] == [4 * adapter] * 2
    assert rows["average of student"].bytes == adapter


@pytest.mark.parametrize(("settings", "moments"), [({"name": "sgd", "betas": (0.0, 0.9)}, 0), ({"name": "sgd"}, 1), ({}, 2)])
def test_moments_are_those_of_the_optimiser(settings, moments):
    rows = plan(unet(), "copies", None, **settings)
    assert all(row.optimizer_bytes == moments * row.gradient_bytes for row in rows)


@pytest.mark.parametrize(("layout", "lora"), [("copies", None), ("shared", LoraSpec(rank=3, targets="attention"))])
def test_a_plan_needs_no_weights(layout, lora):
    with torch.device("meta"):
        planned = plan(unet(), layout, lora)
    assert planned == plan(unet(), layout, lora)
