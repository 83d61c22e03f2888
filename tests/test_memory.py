"""What is kept in memory: counted by hand on a small network, the same on the meta device; and what is alive, byte by byte."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffdistill.math.schedules import VPSchedule
from diffdistill.memory import LiveBytes, MemoryPlan, MemoryRow, TurnMemory, memory_rows, readable, total, without_a_gpu
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
    return memory_rows(build_roles(denoiser, ROLES, layout, lora), optimizers, averaged=True)


def test_copies_hold_three_networks_and_two_optimisers():
    network = unet()
    size = 4 * sum(parameter.numel() for parameter in network.parameters())
    rows = {row.role: row for row in plan(network, "copies", None)}
    assert [rows[name].weights_bytes for name in ("teacher", "student", "fake", "average of student")] == [size] * 4
    assert [rows[name].gradient_bytes for name in ("teacher", *ROLES)] == [0, size, size]
    assert [rows[name].optimizer_bytes for name in ("teacher", *ROLES)] == [0, 2 * size, 2 * size]
    assert total(list(rows.values())).bytes == (4 + 2 + 4) * size


def test_an_average_of_half_precision_weights_is_kept_in_float32():
    network = unet(torch.bfloat16)
    rows = {row.role: row for row in plan(network, "copies", None)}
    assert rows["student"].weights_bytes == 2 * rows["student"].parameters
    assert rows["average of student"].weights_bytes == 4 * rows["student"].parameters


def test_the_shared_layout_holds_one_network_and_adapters_in_float32():
    network = unet(torch.bfloat16)
    linears = [m for name, m in network.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    adapter = 4 * sum(3 * (linear.in_features + linear.out_features) for linear in linears)
    base = 2 * sum(parameter.numel() for parameter in network.parameters())
    rows = {row.role: row for row in plan(network, "shared", LoraSpec(rank=3, targets="attention"))}
    assert rows["teacher"].weights_bytes == base and rows["teacher"].trained == 0
    assert [(rows[name].weights_bytes, rows[name].adapter_bytes) for name in ROLES] == [(0, adapter)] * 2
    assert [rows[name].bytes for name in ROLES] == [4 * adapter] * 2
    assert rows["average of student"].bytes == rows["average of student"].adapter_bytes == adapter


def test_copies_with_adapters_hold_their_own_base_beside_them():
    rows = {row.role: row for row in plan(unet(torch.bfloat16), "copies", LoraSpec(rank=3, targets="attention"))}
    assert rows["student"].weights_bytes == rows["teacher"].weights_bytes > 0
    assert rows["student"].gradient_bytes == rows["student"].adapter_bytes == 4 * rows["student"].trained


@pytest.mark.parametrize(("settings", "moments"), [({"name": "sgd", "betas": (0.0, 0.9)}, 0), ({"name": "sgd"}, 1), ({}, 2)])
def test_moments_are_those_of_the_optimiser(settings, moments):
    rows = plan(unet(), "copies", None, **settings)
    assert all(row.optimizer_bytes == moments * row.gradient_bytes for row in rows)


def test_what_is_offloaded_is_on_the_cpu_and_in_no_sum():
    denoiser = NetworkDenoiser(unet(), FAMILIES["UNet2DConditionModel"], SCHEDULE, "epsilon", (4, 8, 8))
    optimizers = {"student": OptimizerConfig(offload=True), "fake": OptimizerConfig()}
    rows = {row.role: row for row in memory_rows(build_roles(denoiser, ROLES, "copies"), optimizers, True, True)}
    size = rows["teacher"].weights_bytes
    assert (rows["student"].optimizer_bytes, rows["student"].bytes) == (0, 2 * size)
    assert rows["student"].offloaded_bytes == (2 + 1 + 1) * size  # moments, a copy of the weights, the gradients on their way
    assert (rows["fake"].optimizer_bytes, rows["fake"].offloaded_bytes) == (2 * size, 0)
    assert (rows["average of student"].bytes, rows["average of student"].offloaded_bytes) == (0, 2 * size)
    summary = MemoryPlan(0, tuple(rows.values()), (TurnMemory("student", ("student",), size, 0),)).summary()
    assert summary.startswith(f"{readable(6 * size)} = ") and summary.endswith(
        f"and {readable(6 * size)} in the memory of the CPU"
    )
    student = without_a_gpu(rows["student"])
    assert (student.optimizer_bytes, student.offloaded_bytes) == (4 * size, 0)


@pytest.mark.parametrize(("layout", "lora"), [("copies", None), ("shared", LoraSpec(rank=3, targets="attention"))])
def test_a_plan_needs_no_weights(layout, lora):
    with torch.device("meta"):
        planned = plan(unet(), layout, lora)
    assert planned == plan(unet(), layout, lora)


def test_the_peak_has_one_turn_at_a_time_and_all_that_is_kept():
    rows = (
        MemoryRow("teacher", 1, 0, weights_bytes=1000),
        MemoryRow("student", 1, 1, 0, adapter_bytes=100, gradient_bytes=100, optimizer_bytes=200, activation_bytes=30),
        MemoryRow("fake", 1, 1, 0, adapter_bytes=10, gradient_bytes=10, optimizer_bytes=20, activation_bytes=110),
    )
    turns = (TurnMemory("student", ("student",), 100, 30), TurnMemory("fake", ("fake",), 10, 110))
    peak = MemoryPlan(0, rows, turns).peak
    assert (peak.weights_bytes, peak.adapter_bytes, peak.optimizer_bytes) == (1000, 110, 220)
    assert (peak.gradient_bytes, peak.activation_bytes, peak.bytes) == (100, 30, 1000 + 110 + 220 + 130)
    heavier = TurnMemory("fake", ("fake",), 10, 121)  # by one byte, of activations
    assert MemoryPlan(0, rows, (turns[0], heavier)).heaviest == heavier


def test_live_bytes_follow_each_storage_from_its_making_to_its_end():
    outside = torch.ones(1000)
    with LiveBytes() as live:
        a = outside * 2  # 4000 bytes
        view = a[10:].reshape(-1)
        outside.add_(1)
        assert live.now == 4000
        b = a.double()  # 8000
        assert live.now == 12_000
        del a
        assert live.now == 12_000, "the view keeps the storage"
        del view, b
        assert live.now == 0
    assert live.peak == 12_000


def test_live_bytes_count_what_autograd_keeps():
    x = torch.ones(250, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().exp()  # each result is kept for the backward pass
        assert live.now == 2000
        y.sum().backward()
        del y
        assert live.now == 1000, "x.grad"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(2**19, "0.5 MiB"), (2**30 - 2**20, "1,023.0 MiB"), (2**30, "1.00 GiB"), (3 * 2**29, "1.50 GiB"), (2**42, "4,096.00 GiB")],
)
def test_bytes_are_told_in_mib_below_a_gib(amount, text):
    assert readable(amount) == text
