"""How the networks of a run are computed: settings that leave what is learnt as it is, up to the rounding they name."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from diffdistill.errors import UserError
from diffdistill.models.attention import AttentionName
from diffdistill.models.network import FamilyDenoiser
from diffdistill.models.quantize import block_linears
from diffdistill.models.regions import Recorded, compile_blocks
from diffdistill.models.roles import Roles

FP8_CAPABILITY = (8, 9)  # the first GPUs that multiply in it: Ada, Hopper


class ComputeConfig(BaseModel):
    """How the networks are computed; what is learnt stays as it is, up to rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: AttentionName = Field(
        "auto",
        description="kernel of attention: auto for the fastest of torch's that the call allows, or one by name, which is refused where it "
        "cannot run (`diffdistill doctor` lists them)",
    )
    compile: Literal["blocks"] | None = Field(
        None,
        description="blocks: torch.compile on each repeated block of the networks, which takes minutes at the start of a run; null for none",
    )
    cuda_graphs: bool = Field(
        False,
        description="whether passes of frozen roles without gradient are recorded as CUDA graphs, one for each shape: for small "
        "networks and batches, where a GPU waits for the CPU",
    )
    channels_last: bool = Field(
        False,
        description="whether a UNet's convolutions keep channels as the last dimension in memory, as tensor cores want them",
    )
    frozen: Literal["bf16", "fp8"] | None = Field(
        None,
        description="narrower type for the passes of the teacher, and those without gradient of other frozen roles: bf16; or fp8 (torchao) "
        "in the linear layers of the teacher's blocks and bf16 elsewhere, from Ada and Hopper on and in layout copies. Its rounding, 1/256 "
        "of an output, stands in what roles differ by. null for the type of all passes",
    )


def lower_frozen(roles: Roles, names: Sequence[str], frozen: Literal["bf16", "fp8"], device_type: str) -> None:
    """Let the passes of the teacher and of other frozen roles run in a narrower type.

    The weights of a teacher whose network is its own are stored in it. Other frozen roles follow a trained one, and keep theirs: their
    passes without gradient run in bf16, as do those of a teacher that shares its network.

    Args:
        roles: the teacher is one of them in any case.
        names: the other frozen roles.
        frozen: the type; fp8 for the teacher alone, and for the others bf16.
        device_type: of the device that computes.
    Raises:
        UserError: fp8 without what it needs, or on a network that roles share.
    """
    for name in names:
        denoiser: Any = roles[name]
        roles.replace(name, dataclasses.replace(denoiser, role=_Lowered(denoiser.role, device_type)))
    teacher: Any = roles.teacher
    if all(network is not teacher.network for name, network in roles.networks.items() if name != "teacher"):
        nn.Module.to(
            teacher.network, torch.bfloat16
        )  # diffusers' own `to` warns of layers kept in float32, also where there are none
        if frozen == "fp8":
            _to_fp8(teacher)
    elif frozen == "bf16":
        roles.teacher = dataclasses.replace(teacher, role=_Lowered(teacher.role, device_type))
    else:
        raise UserError(
            "compute.frozen: fp8 rounds the teacher's weights, and other roles stand on them. Set bf16, or layout copies."
        )


@dataclasses.dataclass(frozen=True)
class _Lowered:
    """A role whose passes without gradient run under bf16's autocast."""

    role: Callable[[], AbstractContextManager[Any]]
    device_type: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with (
            self.role(),
            torch.autocast(self.device_type, torch.bfloat16, enabled=not torch.is_grad_enabled(), cache_enabled=False),
        ):
            yield


def usable(device: torch.device) -> dict[str, str]:
    """Return setting -> "yes", or why not: what `doctor` shows."""
    return {
        "compile: blocks": _compile_lacks(device) or "yes",
        "cuda_graphs": "yes" if device.type == "cuda" else "needs a GPU",
        "channels_last": "yes",
        "frozen: bf16": "yes",
        "frozen: fp8": _fp8_lacks(device) or "yes",
    }


def _compile_lacks(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs Triton; pip install triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"needs a C++ compiler, and there is no {compiler}"


def _fp8_lacks(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type.upper()}"
        return f"needs a GPU of compute capability 8.9 (Ada, Hopper); this is {name}"
    if importlib.util.find_spec("torchao") is None:
        return "needs torchao; pip install 'diffdistill[torchao]'"
    return None


def _to_fp8(teacher: FamilyDenoiser) -> None:
    if lacks := _fp8_lacks(next(teacher.network.parameters()).device):
        raise UserError(f"compute.frozen: fp8 {lacks}. Set bf16 or null.")
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    chosen = {
        name
        for name in block_linears(teacher.network, teacher.family)
        if not any(size % 16 for size in teacher.network.get_parameter(f"{name}.weight").shape)  # what the kernels take
    }
    quantize_(
        teacher.network,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        filter_fn=lambda module, name: name in chosen,
    )


def channels_last(roles: Roles) -> None:
    """Keep the weights of every convolution with channels as the last dimension in memory; activations follow.

    Raises:
        UserError: the networks are no UNets.
    """
    teacher: Any = roles.teacher
    if teacher.family.component != "unet":
        raise UserError(
            f"compute.channels_last is for the convolutions of UNets; this is a {teacher.family.name}. Leave it out."
        )
    for network in _distinct(roles):
        nn.Module.to(network, memory_format=torch.channels_last)


def compile_networks(roles: Roles, varying_sizes: bool, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks of every network; see `regions.compile_blocks`.

    Args:
        roles: complete, for a copy of a compiled network would share what was compiled.
        varying_sizes: whether images have several sizes.
        backend: of torch.compile.
    """
    teacher: Any = roles.teacher
    for network in _distinct(roles):
        compile_blocks(network, teacher.family.blocks, varying_sizes, backend)


def record_passes(roles: Roles, frozen: Sequence[str]) -> None:
    """Record the passes without gradient of the teacher and of the roles named as CUDA graphs.

    Raises:
        UserError: they are not on a GPU.
    """
    teacher: Any = roles.teacher
    device = next(teacher.network.parameters()).device
    if device.type != "cuda":
        raise UserError(f"compute.cuda_graphs needs a GPU, and the networks are on the {device.type.upper()}. Set it to false.")
    roles.teacher = dataclasses.replace(teacher, recorded=Recorded())
    for name in frozen:
        denoiser: Any = roles[name]
        roles.replace(name, dataclasses.replace(denoiser, recorded=Recorded()))


def _distinct(roles: Roles) -> list[nn.Module]:
    """Return the networks of the roles, each once, the discriminator head not among them."""
    return list({id(network): network for name, network in roles.networks.items() if name != "head"}.values())
