"""What the roles of DMD2 keep in memory on networks of true size, planned on the meta device and, for SD 1.5, measured.

Networks have the published configurations and no trained weights: only shapes count.

    python eval/memory.py            # plan all, measure Stable Diffusion 1.5, write docs/memory.md
    python eval/memory.py --plan     # only print the plan
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffdistill.files import write_atomic
from diffdistill.math.schedules import VPSchedule
from diffdistill.memory import MemoryRow, memory_plan, total
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import Layout, Roles, build_roles
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
ROLES = ("student", "fake")
LORA = LoraSpec(rank=32, targets="attention")
OPTIMIZERS = {role: OptimizerConfig() for role in ROLES}
GIB = 2**30
SCHEDULE = VPSchedule(torch.linspace(0.99, 0.01, 1000))  # any: its tensors are no part of the roles


def sd15() -> Any:
    """Return the network of Stable Diffusion 1.5, 860 M parameters."""
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> Any:
    """Return the network of SDXL, 2.6 B parameters."""
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def flux() -> Any:
    """Return the network of FLUX.1-dev, 11.9 B parameters."""
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


NETWORKS: dict[str, Callable[[], Any]] = {"Stable Diffusion 1.5": sd15, "SDXL": sdxl, "FLUX.1-dev": flux}


def roles_of(network: Any, layout: Layout) -> Roles:
    """Return student and fake on a network: adapters in the shared layout, whole copies in the other."""
    denoiser = NetworkDenoiser(
        network,
        FAMILIES[type(network).__name__],
        SCHEDULE,
        "epsilon",
        (4, 64, 64),
    )
    return build_roles(denoiser, ROLES, layout, LORA if layout == "shared" else None)


def planned(build: Callable[[], Any], layout: Layout, dtype: torch.dtype) -> tuple[int, MemoryRow]:
    """Return the number of the base's parameters, and the sum of all roles."""
    with torch.device("meta"):
        network = build().to(dtype)
        count = sum(parameter.numel() for parameter in network.parameters())
        return count, total(memory_plan(roles_of(network, layout), OPTIMIZERS, averaged=False))


def resident() -> int:
    """Return the bytes this process has in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(build: Callable[[], Any]) -> int:
    """Return the bytes that base, adapters, gradients and optimiser of the shared layout add to this process."""
    before = resident()
    with torch.device("meta"):
        network = build().to(torch.bfloat16)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()  # touched, or the pages would not be there
    roles = roles_of(network, "shared")
    optimizers = [RoleOptimizer(role, roles.parameters(role), OPTIMIZERS[role], total_steps=10) for role in ROLES]
    for role, optimizer in zip(ROLES, optimizers, strict=True):
        for parameter in roles.parameters(role):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0, torch.zeros(()))
    return resident() - before


def page(rows: list[str], note: str) -> str:
    """Return docs/memory.md."""
    head = "| network | base parameters | base | layout | weights + optimiser | of the base | with gradients |"
    return "\n".join(
        [
            "# Memory of the roles",
            "",
            f"DMD2's student and fake, AdamW, adapters of rank {LORA.rank} on attention in the shared layout; written by "
            "`python eval/memory.py`.",
            "Adapters, their gradients and moments are float32. Activations come on top, and are those of one network in both layouts.",
            "",
            head,
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            note,
            "",
        ]
    )


def main() -> None:
    """Plan, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="do not measure or write")
    only_plan = parser.parse_args().plan
    rows = []
    for name, build in NETWORKS.items():
        for layout, dtype in (("shared", torch.bfloat16), ("copies", torch.bfloat16), ("copies", torch.float32)):
            count, summed = planned(build, layout, dtype)
            base = count * dtype.itemsize
            kept = summed.weights_bytes + summed.optimizer_bytes
            kind = "bf16" if dtype == torch.bfloat16 else "fp32"
            rows.append(
                f"| {name} | {count / 1e6:,.0f} M | {kind}, {base / GIB:.2f} GiB | {layout} | {kept / GIB:.2f} GiB "
                f"| {kept / base:.3f} | {summed.bytes / GIB:.2f} GiB |"
            )
            print(rows[-1], flush=True)
    if only_plan:
        return
    found, plan = measured(sd15), planned(sd15, "shared", torch.bfloat16)[1].bytes
    note = (
        f"Measured for Stable Diffusion 1.5 in the shared layout, with gradients: {found / GIB:.3f} GiB against {plan / GIB:.3f} GiB "
        f"planned ({found / plan:.3f}), as growth of the resident memory of a process that builds the roles and takes one optimiser step."
    )
    print(note)
    write_atomic(PAGE, page(rows, note).encode())


if __name__ == "__main__":
    main()
