"""The frozen base in fewer bits: which layers, how near, how many bytes, and adapters that train on it."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from role_networks import denoiser
from text_pipelines import save
from torch import nn

from diffdistill.errors import UserError
from diffdistill.memory import LiveBytes, memory_rows
from diffdistill.models import quantize as module
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.guidance import guided
from diffdistill.models.loading import load_teacher
from diffdistill.models.quantize import block_linears, is_quantized, num_values, quantize, rounding_saves, stored_bytes
from diffdistill.models.roles import build_roles
from diffdistill.models.together import predict_both
from diffdistill.training.optimizers import OptimizerConfig

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
LORA = LoraSpec(rank=2, targets="all")
FAMILIES = ("sd", "sdxl", "pixart-sigma", "sd3", "flux", "sana")
# Ends of the names of layers that must keep their weights: time, text and patches in, the last layer out.
SENSITIVE = (
    "time_embedding",
    "time_text_embed",
    "caption_projection",
    "adaln_single",
    "context_embedder",
    "pos_embed",
    "time_embed",
)


def load(name, folder, quantized=None):
    place = folder / name if (folder / name).exists() else save(name, folder)
    return load_teacher(place, size=32 if name == "sana" else 16, quantized=quantized)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


def ask(teacher):
    t = torch.tensor([0.3, 0.8], dtype=torch.float64) * teacher.denoiser.schedule.t_max
    return (
        torch.randn(2, *teacher.denoiser.sample_shape, generator=torch.Generator().manual_seed(0)),
        t,
        teacher.condition(["a", "b"]),
    )


@needs_torchao
@pytest.mark.parametrize("name", FAMILIES)
def test_int8_rounds_the_blocks_and_nothing_else(name, place):
    """A channel's largest weight is 127 steps, so no weight moves by more than half a step; the output follows."""
    plain, rounded = load(name, place), load(name, place, "int8")
    names = block_linears(plain.network, plain.family)
    assert rounded.quantized == "int8" and is_quantized(rounded.network) and not is_quantized(plain.network)
    assert names and not any(name.startswith(SENSITIVE) or name in ("proj_out", "conv_out", "proj_in") for name in names)
    assert {name for name, _ in plain.network.named_modules() if name.endswith(("to_q", "to_out.0", "ff.net.2"))} <= set(names)
    before = dict(plain.network.named_parameters())
    for key, parameter in rounded.network.named_parameters():
        layer, _, leaf = key.rpartition(".")
        if layer in names and leaf == "weight":
            step = before[key].abs().amax(dim=1, keepdim=True) / 127
            assert bool(((parameter.dequantize() - before[key]).abs() <= 0.51 * step).all())
        else:
            assert torch.equal(parameter, before[key])
    wanted, found = (teacher.denoiser(*ask(teacher)).raw for teacher in (plain, rounded))
    assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < 2e-2


@needs_torchao
def test_bytes_are_counted_of_codes_and_scales(place):
    """int8: one byte a weight, and a float scale and an int8 zero point a channel; the plan counts the same."""
    plain, rounded = load("sd3", place), load("sd3", place, "int8")
    linears = [plain.network.get_submodule(name) for name in block_linears(plain.network, plain.family)]
    whole = sum(4 * parameter.numel() for parameter in plain.network.parameters())
    saved = sum(3 * linear.weight.numel() - 5 * linear.out_features for linear in linears)
    assert sum(map(stored_bytes, plain.network.parameters())) == whole
    assert sum(map(stored_bytes, rounded.network.parameters())) == whole - saved
    assert sum(map(num_values, rounded.network.parameters())) == whole // 4
    roles = build_roles(rounded.denoiser, ("student", "fake"), "shared", LORA)
    rows = {
        row.role: row for row in memory_rows(roles, {"student": OptimizerConfig(), "fake": OptimizerConfig()}, averaged=False)
    }
    buffers = sum(map(stored_bytes, plain.network.buffers()))
    assert rows["teacher"].weights_bytes == whole - saved + buffers and rows["teacher"].parameters == whole // 4
    assert rounding_saves(plain.network, plain.family, "int8") == saved
    assert rows["student"].adapter_bytes == sum(4 * parameter.numel() for parameter in roles.parameters("student"))


@needs_torchao
def test_a_rounded_teacher_has_a_fingerprint_of_its_own(place):
    """A run does not resume on, and stored pairs are not taken from, a teacher rounded in another way."""
    whole, rounded, again = (load("sd3", place, kind).fingerprints()["transformer"] for kind in (None, "int8", "int8"))
    assert rounded == again != whole


@needs_torchao
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_gradients_on_rounded_weights_are_those_on_the_same_weights_in_full(name, place):
    """Through the whole network, to the adapter and to the input: the codes are constants like any other frozen weight."""
    rounded, full = load(name, place, "int8"), load(name, place)
    values = {
        key: parameter.dequantize() for key, parameter in rounded.network.named_parameters() if hasattr(parameter, "qdata")
    }
    full.network.load_state_dict(full.network.state_dict() | values)
    found = []
    for teacher in (rounded, full):
        roles = build_roles(teacher.denoiser, ("student",), "shared", LORA)
        with torch.no_grad():
            for k, parameter in enumerate(roles.parameters("student")):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
        x, t, cond = ask(teacher)
        x.requires_grad_()
        roles["student"](x, t, cond).raw.square().mean().backward()
        found.append({"x": x.grad} | {key: parameter.grad for key, parameter in roles.named_parameters("student").items()})
    for key, wanted in found[1].items():
        torch.testing.assert_close(found[0][key], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
        assert bool(wanted.any()), key


@needs_torchao
def test_the_graph_keeps_rounded_weights_as_they_are(place):
    """Left to itself autograd keeps each weight widened, and the base lies in memory whole after all."""
    kept = []
    for quantized in (None, "int8"):
        teacher = load("sd3", place, quantized)
        roles = build_roles(teacher.denoiser, ("student",), "shared", LORA)
        with LiveBytes() as live:
            prediction = roles["student"](*ask(teacher))
            kept.append(live.now)
        del prediction
    assert kept[1] == pytest.approx(kept[0], rel=0.01)


@needs_torchao
def test_forward_mode_goes_through_rounded_layers():
    plain = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)).requires_grad_(False)
    rounded = copy.deepcopy(plain)
    module._to_int8(rounded, ["0", "1"])
    for whole, layer in zip(plain, rounded, strict=True):
        whole.weight.copy_(layer.weight.dequantize())
    x, tangent = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(torch.func.jvp(rounded, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(found, wanted)


@needs_torchao
def test_roles_on_rounded_weights_run_as_one_batch_too(place):
    teacher = load("sd", place, "int8")
    roles = build_roles(teacher.denoiser, ("student", "fake"), "shared", LORA, one_batch_up_to=2)
    with torch.no_grad():
        for parameter in roles.parameters("fake"):
            parameter.add_(0.05)
    real = guided(roles.teacher, 3.0)
    for said, wanted in zip(predict_both(real, roles["fake"], *ask(teacher)), (real, roles["fake"]), strict=True):
        torch.testing.assert_close(said.raw, wanted(*ask(teacher)).raw, rtol=1e-5, atol=1e-5)


@needs_torchao
def test_rounded_weights_carry_adapters_of_the_shared_layout_only(place):
    teacher = load("sd", place, "int8")
    for layout, lora in (("copies", None), ("copies", LORA)):
        with pytest.raises(UserError, match="adapters of the shared layout only"):
            build_roles(teacher.denoiser, ("student",), layout, lora)
    roles = build_roles(teacher.denoiser, ("student",), "shared", LORA)
    with pytest.raises(UserError, match="stand on rounded weights"):
        roles.network_state("student")


def test_a_missing_package_and_a_device_without_kernels_are_named(monkeypatch):
    net = denoiser("dit")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(UserError, match=rf"needs {package}. Install it with `pip install 'diffdistill\[{package}\]'`"):
            quantize(net.network, net.family, kind)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="nf4 works on a GPU .* this network is on cpu"):
        quantize(net.network, net.family, "nf4")
    assert all(type(layer) is not nn.Linear or layer.weight.dtype == torch.float32 for layer in net.network.modules())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes rounds to nf4 on a GPU")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_nf4_holds_four_bits_a_weight_and_trains(place):
    save("sd3", place)
    plain, rounded = (load_teacher(place / "sd3", size=16, device="cuda", quantized=kind) for kind in (None, "nf4"))
    names = block_linears(plain.network, plain.family)
    for name in names:
        weight = rounded.network.get_submodule(name).weight
        assert weight.numel() * weight.element_size() == plain.network.get_submodule(name).weight.numel() / 2
    assert sum(map(num_values, rounded.network.parameters())) == sum(p.numel() for p in plain.network.parameters())
    roles = build_roles(rounded.denoiser, ("student",), "shared", LORA)
    x, t, cond = ask(plain)
    roles["student"](x.cuda(), t.cuda(), cond).raw.square().mean().backward()
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in roles.parameters("student"))
