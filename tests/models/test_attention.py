"""Every kernel is the definition of attention, and one name chooses it for every network."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from role_networks import attention_calls, denoiser, inputs
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.errors import UserError
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.attention import KERNELS, Attention, Call, Kernel, current_attention, usable
from diffdistill.models.roles import build_roles

torch_attention = functional.scaled_dot_product_attention
CPU = torch.device("cpu")


def definition(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(d) + mask) v."""
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def made(kind: str, head_size: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """Return query, key and value of self- or cross-attention, and a mask that leaves every query a key."""
    generator = torch.Generator().manual_seed(0)
    lengths = (24, 24, 24) if kind.startswith("self") else (24, 13, 13)
    tensors = [torch.randn(2, 3, length, head_size, generator=generator, dtype=torch.float64) for length in lengths]
    seen = torch.rand(2, 1, 1, lengths[1], generator=generator) < 0.7
    seen[..., 0] = True
    added = torch.randn(2, 3, *lengths[:2], generator=generator)
    mask = {"masked": seen, "added": added.to(dtype)}.get(kind.partition(", ")[2])
    return [tensor.to(device, dtype) for tensor in tensors], None if mask is None else mask.to(device)


KINDS = ["self", "cross", "cross, masked", "self, added"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TENSOR_FLOAT_32 = 1e-3  # in which a fused kernel of a GPU may multiply float32


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of a difference over that of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check_kernel(name: str, kind: str, head_size: int, dtype: torch.dtype, gradient: bool, device: str = "cpu") -> None:
    """Compare outputs and gradients of a kernel with the definition in float64, to the rounding of its dtype."""
    tensors, mask = made(kind, head_size, dtype, device)
    wide = [tensor.double().requires_grad_(gradient) for tensor in tensors]
    wanted = definition(*wide, mask if mask is None or mask.dtype == torch.bool else mask.double(), scale=0.3)
    for tensor in tensors:
        tensor.requires_grad_(gradient)
    with Attention(name).using():
        found = functional.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.3)
    assert found.dtype == dtype
    tolerance = TENSOR_FLOAT_32 if device != "cpu" and dtype == torch.float32 else TOLERANCE[dtype]
    assert difference(found, wanted) < tolerance
    if gradient:
        direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
        gradients = torch.autograd.grad(found, tensors, direction.to(dtype))
        for one, other in zip(gradients, torch.autograd.grad(wanted, wide, direction), strict=True):
            assert difference(one, other) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [8, 40, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash", "math", "flex"])
def test_a_kernel_of_the_cpu_is_the_definition(name, kind, head_size, dtype):
    check_kernel(name, kind, head_size, dtype, gradient=name != "flex")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["auto", *KERNELS])
def test_a_kernel_of_the_gpu_is_the_definition_or_says_why_not(name, dtype):
    gpu = torch.device("cuda", torch.cuda.current_device())
    sizes, gradients = (
        ((40, 256), (True,)) if name == "flex" else ((40, 64, 128, 256), (True, False))
    )  # it compiles for seconds
    for kind, head_size, gradient in itertools.product(KINDS, sizes, gradients):
        mask = {"masked": "bool", "added": "added"}.get(kind.partition(", ")[2], "none")
        call = Call(gpu, dtype, head_size, head_size, mask, gradient=gradient)
        if name != "auto" and (reason := KERNELS[name].refuses(call)):
            assert reason.strip()
            with pytest.raises(UserError, match=name):
                check_kernel(name, kind, head_size, dtype, gradient, device="cuda")
        else:
            check_kernel(name, kind, head_size, dtype, gradient, device="cuda")


# --- the switch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "layers"), [("unet", 4), ("dit", 2)])
def test_the_switch_reaches_every_attention_of_the_network(kind, layers, monkeypatch):
    assert attention_calls(denoiser(kind), inputs(), monkeypatch) == (layers, [])


def test_a_network_computes_the_same_on_every_kernel():
    net = denoiser("dit")
    with torch.no_grad():
        said = {name: net.with_attention(Attention(name))(*inputs()).raw for name in ("sdpa", "auto", "flash", "math", "flex")}
    for name, raw in said.items():
        torch.testing.assert_close(raw, said["math"], atol=1e-5, rtol=0, msg=name)
    assert not torch.equal(said["flash"], said["math"])  # two kernels, so two roundings


def test_the_function_of_torch_is_back_after_a_call_also_one_that_fails():
    outer, inner = Attention(), Attention("math")
    with outer.using():
        with pytest.raises(ZeroDivisionError), inner.using():
            assert current_attention() is inner
            1 / 0
        assert current_attention() is outer
    assert functional.scaled_dot_product_attention is torch_attention and current_attention() is None


def test_torch_may_choose_cudnn_again_after_a_call():
    for before in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(before)
        with Attention().using():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    torch.backends.cuda.enable_cudnn_sdp(True)
    with Attention("sdpa").using():
        assert torch.backends.cuda.cudnn_sdp_enabled()


class Counting:
    """A kernel that counts its calls."""

    def __init__(self, monkeypatch, name="math"):
        self.calls = 0
        monkeypatch.setitem(KERNELS, name, Kernel(self.attend, lambda call: None))

    def attend(self, *tensors, **options):
        self.calls += 1
        return torch_attention(*tensors, **options)


def test_what_checkpointing_computes_again_runs_on_the_same_kernel(monkeypatch):
    counting = Counting(monkeypatch)
    net = denoiser("dit").with_attention(Attention("math"))
    roles = build_roles(net, ("student",), "shared", LoraSpec(rank=2))
    roles.enable_activation_checkpointing()
    roles.train_only(("student",))
    raw = roles["student"](*inputs()).raw
    forward = counting.calls
    raw.sum().backward()
    assert forward > 0 and counting.calls == 2 * forward
    assert current_attention() is None


def test_roles_of_one_network_keep_the_kernel_of_the_teacher():
    roles = build_roles(denoiser("dit").with_attention(Attention("math")), ("student", "fake"), "shared", LoraSpec(rank=2))
    copies = build_roles(denoiser("dit").with_attention(Attention("math")), ("student", "fake"), "copies")
    for role in (roles.teacher, roles["student"], roles["fake"], copies.teacher, copies["student"]):
        assert role.attention.name == "math"


# --- what is chosen, and what is said of it ---------------------------------------------------------------------------------


def call(**options) -> Call:
    return Call(CPU, torch.float32, 16, 16)._replace(**options)


def test_auto_is_the_fused_kernel_of_the_cpu_with_and_without_gradient():
    for gradient in (False, True):
        assert Attention().choose(call(gradient=gradient)) == ("flash", "torch's first choice")


def test_auto_warns_once_where_only_the_definition_can_run_a_call():
    attention = Attention()
    query = torch.randn(1, 2, 4, 8)
    with attention.using():
        with pytest.warns(
            UserWarning, match="float32 on cpu, heads of 8, with dropout.*flash: Both fused kernels do not support"
        ):
            functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            functional.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    assert [choice.name for choice in attention.choices.values()] == ["math"]


def test_auto_is_what_torch_takes_where_kernels_are_switched_off():
    with sdpa_kernel(SDPBackend.MATH), pytest.warns(UserWarning, match="no fused kernel"):
        assert Attention().choose(call()).name == "math"


def test_under_autocast_the_type_is_that_of_autocast():
    attention = Attention()
    with torch.no_grad(), attention.using(), torch.autocast("cpu", torch.bfloat16):
        tensor = torch.randn(1, 1, 4, 8)
        assert functional.scaled_dot_product_attention(tensor, tensor, tensor).dtype == torch.bfloat16
        assert [kind.dtype for kind in attention.choices] == [torch.bfloat16]
    for name in ("flex", "math"):
        with torch.no_grad(), Attention(name).using(), torch.autocast("cpu", torch.bfloat16):
            assert functional.scaled_dot_product_attention(tensor, tensor, tensor).dtype == torch.bfloat16


def test_derivatives_run_forward_through_a_network_and_are_those_of_a_difference():
    net, batch = denoiser("dit"), inputs()
    net.network.double()
    x, direction = batch.x.double(), torch.randn(batch.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def raw(states: Tensor) -> Tensor:
        return net(states, batch.t, batch.cond).raw

    value, tangent = torch.func.jvp(raw, (x,), (direction,))
    step = 1e-5
    with torch.no_grad():
        wanted = (raw(x + step * direction) - raw(x - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, wanted, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(value, raw(x).detach())
    chosen = {kind.tangent: choice.name for kind, choice in net.attention.choices.items()}
    assert chosen[False] == "flash" and chosen[True] in ("forward", "math")


def test_a_kernel_without_forward_mode_derivatives_says_so():
    net, batch = denoiser("dit").with_attention(Attention("flash")), inputs()
    with pytest.raises(
        UserError, match="'flash' cannot .*with a forward-mode derivative.*: it has no forward-mode.*auto, or to one.*math"
    ):
        torch.func.jvp(lambda x: net(x, batch.t, batch.cond).raw, (batch.x,), (batch.x,))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("memory_efficient", {}, "torch has no such kernel for cpu"),
        ("cudnn", {}, "torch has no such kernel for cpu"),
        ("cudnn", {"gradient": True}, "NaN for some lengths"),
        ("flash", {"dropout": True}, "do not support non-zero dropout"),
        ("flex", {"gradient": True}, "has no gradient on a CPU"),
        ("flex", {"causal": True}, "not called with is_causal"),
        ("flash_attn", {}, "flash_attn is not installed; pip install flash-attn"),
    ],
)
def test_a_kernel_that_cannot_run_a_call_is_refused_with_the_reason_and_the_others(name, options, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=f"{name!r} cannot .*float32 on cpu, heads of 16.*{said}.*compute.attention to auto, .*math"
    ):
        Attention(name).choose(call(**options))


def test_an_unknown_kernel_is_told_the_known_ones():
    with pytest.raises(UserError, match="flahs.*flash"):
        Attention("flahs")


def test_what_was_chosen_is_one_line():
    net = denoiser("dit")
    with torch.no_grad():
        net(*inputs())
    assert str(net.attention) == "auto: flash (torch's first choice) for float32 on cpu, heads of 8"
    assert str(Attention()) == "auto: no call yet"


def test_a_plan_is_made_with_a_kernel_that_keeps_as_much():
    kept = {name: Attention(name).planned().name for name in ("auto", "flash", "xformers", "math")}
    assert kept == {"auto": "auto", "flash": "auto", "xformers": "auto", "math": "math"}


def test_the_table_of_this_machine_says_yes_or_why_not():
    table = usable("cpu")
    assert list(table) == ["auto", *KERNELS] and table["auto"]["bfloat16"] == "flash (torch's first choice)"
    assert table["math"] == table["sdpa"] == dict.fromkeys(("float32", "bfloat16", "float16"), "yes")
    assert table["flash"]["float32"] == "yes" and "NaN" in table["cudnn"]["bfloat16"]
