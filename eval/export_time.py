"""How long it takes to export and verify a LoRA of the size of Stable Diffusion 1.5's, and what changing roles costs beside a pass.

The pipeline has the published configurations (860 M parameters of UNet, CLIP-L text encoder, autoencoder) and random weights.

    python eval/export_time.py [--check-size 512] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from memory import sd15

from diffdistill.export import export, verify
from diffdistill.files import temporary_folder
from diffdistill.math import grids
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.loading import load_teacher
from diffdistill.models.roles import build_roles
from diffdistill.sampling.sampler import Sampler
from diffdistill.training.teachers.words import clip_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ("attention", "attention+ff", "all")


def pipeline(dtype: torch.dtype) -> Any:
    """Return a StableDiffusionPipeline of true size with random weights."""
    tokenizer = clip_tokenizer(["a fox in the snow"], 77)
    text = transformers.CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=768,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = (vae, transformers.CLIPTextModel(text), tokenizer, sd15(), scheduler, None, None)
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False).to(dtype)


class Spent(NamedTuple):
    """Wall time of a call, and CPU time of this process and of those it started."""

    wall: float
    cpu: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} s ({self.cpu:.1f} s of CPU time)"


def seconds(function: Any, *args: Any, **options: Any) -> tuple[Spent, Any]:
    """Return what a call cost, and what it returned."""
    wall, cpu = time.perf_counter(), _cpu()
    result = function(*args, **options)
    return Spent(time.perf_counter() - wall, _cpu() - cpu), result


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    """Build, export, verify, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check-size", type=int, help="edge of the images that the check makes, pixels; export's own choice if left out"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    with temporary_folder("export-time-") as folder:
        base = folder / "base"
        torch.manual_seed(0)
        pipeline(dtype).save_pretrained(base)
        spent, teacher = seconds(load_teacher, base, dtype)
        print(f"load {spent}", flush=True)
        spec = LoraSpec(rank=64, targets="all")
        spent, roles = seconds(build_roles, teacher.denoiser, ("student", "fake"), "shared", spec)
        print(f"roles {spent}", flush=True)
        with torch.no_grad():
            for name, parameter in roles.named_parameters("student").items():
                if "lora_B" in name:
                    parameter.normal_(std=1e-3)
        switch(teacher, roles)
        sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 4), "renoise")
        options = {"kind": "lora", "step_counts": (4,), "check_size": arguments.check_size}
        written, manifest = seconds(export, teacher, roles, sampler, folder / "lora", **options)
        size, passed = manifest.check_size, manifest.verification.passed
        print(f"export with its verification on images of {size} pixels {written}, passed: {passed}", flush=True)
        again, verification = seconds(verify, folder / "lora")
        print(f"verify alone {again}, passed: {verification.passed}")


@torch.no_grad()
def switch(teacher: Any, roles: Any) -> None:
    """Print what entering and leaving a role costs beside the smallest pass of the network, one image of 64 pixels."""
    state = torch.randn(1, *teacher.resized(64).denoiser.sample_shape)
    cond, t = teacher.condition(["a fox"]), torch.tensor([500.0], dtype=torch.float64)
    roles["student"](state, t, cond)  # the first call allocates
    forward, _ = seconds(roles["student"], state, t, cond)
    begin = time.perf_counter()
    for _ in range(200):
        with roles["student"].role():
            pass
    once = (time.perf_counter() - begin) / 200
    print(f"role switch {1e6 * once:.0f} us of a pass of {1e3 * forward.wall:.0f} ms: {once / forward.wall:.2%}", flush=True)


if __name__ == "__main__":
    main()
