"""What runs keep in memory on networks of true size: DMD2's roles, a step of each text-to-image recipe, and one step measured.

Networks have the published configurations and no trained weights: only shapes count.

    python eval/memory.py            # plan all, measure Stable Diffusion 1.5, write docs/memory.md and the recipes' headers
    python eval/memory.py --plan     # only print the plans
    python eval/memory.py --gpu      # measure a step of every recipe on this machine's GPU, for the page to be written elsewhere
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch

from diffdistill import recipes
from diffdistill.bench.published import MODELS, SCHEDULE, Published, flux, sd15, sdxl, teacher_of
from diffdistill.config import RunConfig, load_config
from diffdistill.distillers.base import Batch, Loss, Rng, Turn
from diffdistill.distillers.states import noised
from diffdistill.files import write_atomic, write_json
from diffdistill.math.prediction import from_x0
from diffdistill.memory import MemoryPlan, MemoryRow, TurnMemory, memory_rows, total
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.families import FAMILIES
from diffdistill.models.loading import Teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.models.roles import Layout, Roles, build_roles
from diffdistill.models.weightless import as_fakes, on_meta
from diffdistill.training.building import build_accelerator, build_distiller, build_run_roles, open_teacher
from diffdistill.training.engine import Engine, Guard
from diffdistill.training.optimizers import OptimizerConfig, RoleOptimizer
from diffdistill.training.planning import IMAGES, empty_batch, plan_memory, turn_activations

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "memory.md"
ON_GPU = ROOT / "eval" / "results" / "memory_gpu.json"
ROLES = ("student", "fake")
LORA = LoraSpec(rank=32, targets="attention")
OPTIMIZERS = {role: OptimizerConfig() for role in ROLES}
GIB = 2**30


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
    network = on_meta(build, dtype)
    count = sum(parameter.numel() for parameter in network.parameters())
    with torch.device("meta"):
        return count, total(memory_rows(roles_of(network, layout), OPTIMIZERS, averaged=False))


# Recipes


def recipe_names() -> list[str]:
    """Return the recipes of published models."""
    return [name for name in recipes.recipe_names() if name.startswith("text/")]


def model_of(name: str) -> Published:
    """Return the model that a recipe is for."""
    return MODELS[name.removeprefix("text/").partition("-")[0]]


def recipe_plan(
    name: str, activations: Sequence[Mapping[str, int]] | None = None, config: RunConfig | None = None
) -> MemoryPlan:
    """Return the plan of a recipe on a GPU; `activations` by stage and turn, where they are known, `config` in place of its own."""
    model, config = model_of(name), config or load_config(recipes.recipe_path(name))
    assert config.teacher_options.dtype == "bf16"
    network, autoencoder = (on_meta(build, torch.bfloat16) for build in (model.build, model.autoencoder))
    teacher = teacher_of(model, network, model.state, autoencoder)
    rounded = dataclasses.replace(teacher, quantized=config.teacher_options.quantize)
    return plan_memory(config, "cuda", rounded, activations)


# Smaller GPUs

SMALLER: tuple[tuple[str, int, tuple[str, ...]], ...] = (  # recipe, decimal gigabytes of the GPU, overrides
    ("text/sdxl-dmd2-lora", 24, ()),
    ("text/sdxl-dmd2-lora", 24, ("teacher_options.quantize=int8",)),
    ("text/sdxl-dmd2-lora", 24, ("teacher_options.quantize=nf4",)),
    ("text/flux-dmd2-lora", 48, ("teacher_options.quantize=int8",)),
    ("text/flux-dmd2-lora", 48, ("teacher_options.quantize=nf4",)),
)


def smaller_rows() -> list[str]:
    """Return the table of recipes on smaller GPUs, all with micro-batches of one; activations are found once for each recipe."""
    rows, found = [], {}
    for name, gigabytes, overrides in SMALLER:
        settings = ["micro_batch_size=1", *overrides]
        plan = recipe_plan(name, found.get(name), load_config(recipes.recipe_path(name), settings))
        found[name] = [{turn.name: turn.activation_bytes for turn in plan.turns}]
        shown, peak = " ".join(settings), plan.peak.bytes
        rows.append(f"| {name} | {gigabytes} GB | `{shown}` | {peak / GIB:.2f} GiB | {peak / (gigabytes * 1e9):.2f} of it |")
        print(rows[-1], flush=True)
    return rows


# Plain fine-tuning


@dataclass(frozen=True)
class Denoising:
    """Plain fine-tuning of a role: the squared error of what its network emits at a random time."""

    student: Denoiser
    name = "fine-tuning"

    def turns(self, step: int) -> tuple[Turn, ...]:
        """Return the one turn."""
        return (Turn("student", ("student",)),)

    def loss(self, turn: Turn, batch: Batch, rng: Rng, step: int) -> Loss:
        """Return the loss."""
        assert batch.x0 is not None
        state = noised(batch.x0, self.student.schedule, rng)
        prediction = self.student(state.x_t, state.t, batch.cond)
        target = from_x0(prediction.kind, batch.x0, state.x_t, prediction.alpha, prediction.sigma)
        return Loss((prediction.raw.float() - target.float()).square().mean(), {}, {})


def finetuning_plan(config: RunConfig, device_type: str, teacher: Teacher, fakes: bool = True) -> MemoryPlan:
    """Return the plan of plain LoRA fine-tuning with a run's settings: one adapter of the backbone, its optimiser and average.

    Args:
        config: its last stage's optimiser of the student is taken; the layout must be shared.
        teacher: on the meta device, or, without `fakes`, on the CPU, where its step is really taken; changed in place.
    """
    with torch.device("meta") if fakes else contextlib.nullcontext():
        roles = build_roles(teacher.denoiser, ("student",), "shared", config.roles.lora)
    if config.roles.activation_checkpointing:
        roles.enable_activation_checkpointing()
    rows = memory_rows(roles, {"student": config.stages[-1].optimizer("student")}, averaged=config.ema is not None)
    trying = as_fakes(roles, roles.networks.values()) if fakes else roles
    batch = empty_batch(teacher, config.micro_batch_size or config.batch_size, images=True)
    found = turn_activations(config, device_type, trying, Denoising(trying["student"]), 0, batch)
    return MemoryPlan(0, tuple(rows), (TurnMemory("student", ("student",), rows[1].gradient_bytes, found["student"]),))


def against_finetuning(name: str, plan: MemoryPlan) -> str:
    """Return a recipe's row of the table of plain fine-tuning."""
    model = model_of(name)
    teacher = teacher_of(model, on_meta(model.build, torch.bfloat16), model.state)
    config = load_config(recipes.recipe_path(name))
    plain, full = finetuning_plan(config, "cuda", teacher).peak.bytes, plan.peak.bytes
    size = config.micro_batch_size or config.batch_size
    return f"| {name} | | {size} | {plain / GIB:.2f} GiB | {full / GIB:.2f} GiB | {full / plain:.3f} | | |"


def embedded_row(name: str, teacher: str) -> str:
    """Return a row of the same table for an embedded teacher on a CPU, also with all rows at once and with a quarter."""

    def peak(*overrides: str) -> int:
        config = load_config(recipes.recipe_path(name), [f"teacher={teacher}", "samples=null", *overrides])
        plan = plan_memory(config, "cpu")
        return plan.peak.bytes - sum(row.weights_bytes for row in plan.rows if row.role == "autoencoder")

    config = load_config(recipes.recipe_path(name), [f"teacher={teacher}"])
    size = config.micro_batch_size or config.batch_size
    plain = finetuning_plan(config, "cpu", open_teacher(config, "meta")).peak.bytes
    usual, at_once, quarter = (
        peak(*rows) for rows in ((), (f"roles.rows_at_once={3 * size}",), (f"roles.rows_at_once={size // 4}",))
    )
    return (
        f"| {name} | {teacher} | {size} | {plain / 2**20:.1f} MiB | {usual / 2**20:.1f} MiB | {usual / plain:.3f} "
        f"| {at_once / plain:.3f} | {quarter / plain:.3f} |"
    )


def header(plan: MemoryPlan) -> str:
    """Return the line of a recipe's header."""
    return f"# Memory: planned for a GPU by `python eval/memory.py`, {plan.summary()}"


def write_header(name: str, plan: MemoryPlan) -> None:
    """Put the line into a recipe, below its cost."""
    path = recipes.recipe_path(name)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# Memory:")]
    cost = next(index for index, line in enumerate(lines) if line.startswith("# Cost:"))
    lines.insert(cost + 1, header(plan))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


# Measuring


def resident() -> int:
    """Return the bytes this process has in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def alone(measure: Callable[[], T]) -> T:
    """Return what a function measures in a process of its own: memory that plans left free here would be used again unseen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure).result()


def touched(build: Callable[[], Any], device: str = "cpu") -> Any:
    """Return a network in bfloat16 whose weights are zeros, written so that their pages are there."""
    network = on_meta(build, torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    return network


def small() -> Any:
    """Return a network of Stable Diffusion 1.5's kind, by which libraries are loaded and warm before anything is measured."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
    )


def measured_roles() -> int:
    """Return the bytes that base, adapters, gradients and optimiser of the shared layout add to this process for SD 1.5."""
    _build_roles(small)
    before = resident()
    kept = _build_roles(sd15)
    found = resident() - before
    del kept
    return found


def _build_roles(build: Callable[[], Any]) -> Any:
    roles = roles_of(touched(build), "shared")
    optimizers = {role: RoleOptimizer(role, roles.parameters(role), OPTIMIZERS[role], total_steps=10) for role in ROLES}
    update(optimizers)
    return roles, optimizers


def update(optimizers: Mapping[str, RoleOptimizer]) -> None:
    """Take one step of each optimiser, after which moments and gradients are there."""
    for optimizer in optimizers.values():
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(0, torch.zeros((), device=optimizer.parameters[0].device))


STEP = "text/sd15-lcm-lora"  # the recipe of which a step is measured, on smaller states, which the CPU computes in minutes
STEP_STATE = (4, 32, 32)
STEP_SIZE = 2


@dataclass(frozen=True)
class ZeroFeed:
    """Micro-batches of zeros."""

    teacher: Teacher
    size: int
    num_micro_batches: int = 1

    def batch(self, step: int, micro: int) -> Batch:
        """Return one."""
        states = torch.zeros(self.size, *self.teacher.denoiser.sample_shape, device=self.teacher.device)
        return Batch(self.teacher.condition(None, self.size), states)


def measured_step() -> tuple[int, int]:
    """Return bytes planned and measured: what the process held at most during a step, above what it held before the network was built.

    The engine takes the step, of the recipe's method on its roles; moments are there before it.
    """
    sizes = [f"batch_size={STEP_SIZE}", f"micro_batch_size={STEP_SIZE}", "ema=null"]
    config, model = load_config(recipes.recipe_path(STEP), sizes), MODELS["sd15"]
    _resident_peak(_engine(config, 0, teacher_of(model, touched(small), STEP_STATE)))
    before = resident()
    found = _resident_peak(_engine(config, 0, teacher_of(model, touched(sd15), STEP_STATE))) - before
    return plan_memory(config, "cpu", teacher_of(model, on_meta(sd15, torch.bfloat16), STEP_STATE)).peak.bytes, found


def _engine(config: RunConfig, index: int, teacher: Teacher) -> Engine:
    """Return the engine of a stage before its first step, with the optimisers' moments there."""
    stage, roles = config.stages[index], build_run_roles(config, teacher)
    optimizers = {
        role: RoleOptimizer(role, roles.parameters(role), stage.optimizer(role), stage.steps) for role in stage.trained
    }
    update(optimizers)
    size = config.micro_batch_size or config.batch_size
    return Engine(
        build_distiller(stage, roles),
        roles,
        optimizers,
        ZeroFeed(teacher, size, config.batch_size // size),
        build_accelerator(config.precision),
        seed=config.seed,
        stage=index,
        clip_grad_norm=config.clip_grad_norm,
        guard=Guard(config.guard.max_nonfinite_steps),
    )


def _resident_peak(engine: Engine) -> int:
    """Return the most bytes that this process held in memory during a step."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    engine.step(0)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux writes the peak there"
    return 1024 * int(found[1])


def gpu_config(name: str) -> RunConfig:
    """Return a recipe as it is measured: two of its micro-batches a step, no average of the weights."""
    path = recipes.recipe_path(name)
    return load_config(path, [f"batch_size={2 * (load_config(path).micro_batch_size or 1)}", "ema=null"])


def measured_on_gpu(name: str) -> int:
    """Return the most bytes that torch's allocator handed out at once in a step of the recipe's stage that needs most."""
    config, model = gpu_config(name), model_of(name)
    peaks = []
    for index in range(len(config.stages)):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        engine = _engine(config, index, teacher_of(model, touched(model.build, "cuda"), model.state))
        engine.step(0)  # libraries have taken their workspaces after it
        torch.cuda.reset_peak_memory_stats()
        engine.step(0)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del engine
        gc.collect()
    return max(peaks)


def measure_on_gpu(names: Sequence[str]) -> None:
    """Measure recipes, and write what was found after each beside what the same GPU and torch gave before."""
    made_by = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    earlier = json.loads(ON_GPU.read_text()) if ON_GPU.exists() else {}
    found = dict(earlier["bytes"]) if made_by.items() <= earlier.items() else {}
    for name in names:
        found[name] = measured_on_gpu(name)
        print(f"{name}: {found[name] / GIB:.2f} GiB", flush=True)
        write_json(ON_GPU, made_by | {"bytes": found})


# The page


HEAD = """# Memory at true size

Written by `python eval/memory.py`, from networks of the published configurations without their weights. Adapters, their gradients and
moments are float32.

## Roles

DMD2's student and fake, AdamW, adapters of rank {rank} on attention in the shared layout. Gradients of both roles are counted, though
a step has those of one at a time; activations come on top.

| network | base parameters | base | layout | weights + optimiser | of the base | with gradients |
|---|---|---|---|---|---|---|"""

STEPS = """## A step of each recipe

What a step holds at its peak on one GPU, as `diffdistill check` plans it before anything is loaded: all that is kept, and gradients and
activations of the turn that needs most. The autocast of a GPU, which runs norms in float32, is followed on the CPU. Not counted: what
kernels and the allocator keep for themselves, text encoders, which are freed before the first step, and the feature networks of a validation, which are on the CPU at other times. "images" is what making images
adds for samples and validation, between steps: a pass without gradient, the autoencoder, as many images decoded as a micro-batch has samples
(`sampling_batch_size`), and the exchange of the student for its average.

| recipe | micro-batch | turn | weights | adapters | optimizer | gradients | activations | peak | images |
|---|---|---|---|---|---|---|---|---|---|"""

SMALLER_HEAD = """## Smaller GPUs

The same plans for less memory. A part of what is left goes to kernels and the allocator (up to 2 % in the measurements below).

| recipe | GPU | settings | peak | |
|---|---|---|---|---|"""

PLAIN_HEAD = """## Against plain fine-tuning

Plain LoRA fine-tuning of the same backbone by the plan: one adapter, its optimiser and average, a denoising loss, all other settings the
recipe's. DMD2 has the fake network's adapter and its moments besides, and for a while the passes of teacher and fake network, without gradient,
beside the student's graph. Of `digits-unet` nothing else is alive at that peak: the graph is that of plain fine-tuning, and what is more is the two
parts named. `roles.rows_at_once` makes the second small. By default a pass there has at most half of a micro-batch's rows, in place of two
rows a sample under guidance; micro-batches of up to 16 samples, whose passes cost much beside their arithmetic (docs/one_batch.md), go at once.

| recipe | teacher | micro-batch | plain | DMD2 | DMD2 / plain | all rows at once | a quarter at once |
|---|---|---|---|---|---|---|---|"""

EMBEDDED = (  # recipe, its teacher
    ("digits-dmd2-lora", "digits-unet"),
    ("digits-dmd2-lora", "digits-dit"),
    ("shapes/dmd2-4", "shapes-sd"),
    ("shapes/pixart-dmd2-4", "shapes-pixart"),
)

EMBEDDED_NOTE = """
The embedded teachers run on a CPU, in float32, and their activations are most of it. Their autoencoders are in no number. The plan
of `digits-dmd2-lora` equals to the byte what a step on tensors of the CPU had alive (`tests/training/test_plain_finetuning.py`).
"""

SETTINGS = """## Settings that need less

`memory: auto` plans the run, and where it would not fit into what is free of the GPU (less 5 % and 1 GiB; without a GPU four fifths of the
free memory of the machine or its control group, shared by the processes) it picks from this list: each setting with all before it,
from the fourth on with the largest micro-batch that then fits. What turns out needless is taken back, what costs most first. `check` and
`train` say what was picked, from which plan to which; it stands above the config in the run folder, and a resumed run takes it from there. Method and
layout never change. Where nothing fits, the run does not start, and the smallest plan is told.

| setting | costs | changes |
|---|---|---|
| `optimizers.ROLE.name: adamw8bit` (torchao), `adamw8bit_bnb` (bitsandbytes) | one synchronisation a turn | moments are rounded to 8 bits: 2.03 bytes a value in place of 8; within 2 % of AdamW's way on a quadratic. A second moment below 1e-7 of the largest in its block of 256 is lost |
| `ema.offload: true` | little: the average takes in the weights of the step before while the GPU works | rounding of the CPU's kernels |
| `roles.rows_at_once: N` (distribution matching, shared layout) | more passes of fewer rows | rounding |
| `sampling_batch_size: N` (not picked: images need less than a step) | time between steps | rounding of what is shown and scored |
| `micro_batch_size: N` | fewer samples at once | every random draw |
| `roles.activation_checkpointing: true` | one more forward pass of what is trained | nothing |
| `optimizers.ROLE.offload: true` | gradients and weights over the bus, the update on the CPU | rounding of the CPU's kernels; moments, a copy of the weights and gradients lie in the memory of the CPU |
| `teacher_options.dtype: bf16` (adapters) | nothing | the base, and with it the teacher, is rounded |
| `teacher_options.quantize: int8` (torchao), `nf4` (bitsandbytes, a GPU) (shared layout) | weights are widened in each pass | the same, more of it |

Every method runs in the shared layout, with two exceptions: with `guidance_input` the student's network has an input that the teacher's
has not, and the guidance adapters of `agd` are of one role. All seven families recompute their activations
(`tests/models/test_activation_checkpointing.py`). Text encoders are freed before the first step, when all that data, samples and validation ask for
is encoded (prompts of a validation lie in `data.cache` with the others); on a GPU the autoencoder is moved to the CPU then, and after each sample grid and
evaluation.
"""

MEASURED = """## Measured

- Roles of Stable Diffusion 1.5 in the shared layout, with gradients: {roles}, as growth of the resident memory of a process that builds
  the roles and takes one optimiser step.
- A step of `{step}` at Stable Diffusion 1.5's size, on states {state} in a micro-batch of {size}, on the CPU: {peak}, as the most
  resident memory during the step above what there was before the network was built.
- Small networks: the plan is within 15 % of what torch's allocator handed out at most during a step, for a UNet and a transformer that
  read text, DMD2 in both layouts, with and without recomputed activations (`tests/training/test_planning.py`).
"""


def role_rows() -> list[str]:
    """Return the table of the roles."""
    rows = []
    for name, build in NETWORKS.items():
        for layout, dtype in (("shared", torch.bfloat16), ("copies", torch.bfloat16), ("copies", torch.float32)):
            count, summed = planned(build, layout, dtype)
            base = count * dtype.itemsize
            kind = "bf16" if dtype == torch.bfloat16 else "fp32"
            rows.append(
                f"| {name} | {count / 1e6:,.0f} M | {kind}, {base / GIB:.2f} GiB | {layout} | {summed.kept_bytes / GIB:.2f} GiB "
                f"| {summed.kept_bytes / base:.3f} | {(summed.kept_bytes + summed.gradient_bytes) / GIB:.2f} GiB |"
            )
            print(rows[-1], flush=True)
    return rows


def step_row(name: str, plan: MemoryPlan) -> str:
    """Return a recipe's row of the table of steps."""
    peak, config = plan.peak, load_config(recipes.recipe_path(name))
    amounts = [
        peak.weights_bytes,
        peak.adapter_bytes,
        peak.optimizer_bytes,
        peak.gradient_bytes,
        peak.activation_bytes,
        peak.bytes,
        next((turn.bytes for turn in plan.turns if turn.name == IMAGES), 0),
    ]
    cells = [name, str(config.micro_batch_size), plan.heaviest.name, *(f"{amount / GIB:.2f} GiB" for amount in amounts)]
    return f"| {' | '.join(cells)} |"


GPU = """## Measured on a GPU

`python eval/memory.py --gpu` on one {device} with torch {version}: the most bytes that torch's allocator handed out at once in a step
of two micro-batches without an average of the weights, and the plan for the same.

| recipe | planned | measured | planned / measured |
|---|---|---|---|"""


def gpu_rows() -> list[str]:
    """Return the table of what was measured on a GPU, if it was."""
    if not ON_GPU.exists():
        return []
    found = json.loads(ON_GPU.read_text())
    rows = [GPU.format(device=found["device"], version=found["torch"])]
    for name, measured in found["bytes"].items():
        plan = recipe_plan(name, config=gpu_config(name)).peak.bytes
        rows.append(f"| {name} | {plan / GIB:.2f} GiB | {measured / GIB:.2f} GiB | {plan / measured:.3f} |")
        print(rows[-1], flush=True)
    return rows


def compared(found: int, plan: int) -> str:
    """Return a measured number beside the planned one."""
    return f"{found / GIB:.3f} GiB against {plan / GIB:.3f} GiB planned (planned / measured {plan / found:.3f})"


def main() -> None:
    """Plan, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="do not measure or write")
    parser.add_argument("--gpu", nargs="*", metavar="RECIPE", help="only measure on the GPU, these recipes or all")
    options = parser.parse_args()
    if options.gpu is not None:
        measure_on_gpu(options.gpu or recipe_names())
        return
    only_plan = options.plan
    rows, steps, plans = role_rows(), [], {}
    for name in recipe_names():
        plan = plans[name] = recipe_plan(name)
        steps.append(step_row(name, plan))
        print(steps[-1], flush=True)
        if not only_plan:
            write_header(name, plan)
    smaller = smaller_rows()
    plain = [against_finetuning(name, plans[name]) for name in recipe_names() if name.endswith("-dmd2-lora")]
    plain += [embedded_row(*each) for each in EMBEDDED]
    print(*plain, sep="\n", flush=True)
    if only_plan:
        return
    roles_found = alone(measured_roles)
    step_plan, step_found = alone(measured_step)
    measured_note = MEASURED.format(
        roles=compared(roles_found, planned(sd15, "shared", torch.bfloat16)[1].bytes),
        step=STEP,
        state="x".join(map(str, STEP_STATE)),
        size=STEP_SIZE,
        peak=compared(step_found, step_plan),
    )
    print(measured_note)
    parts = [
        HEAD.format(rank=LORA.rank),
        *rows,
        "",
        STEPS,
        *steps,
        "",
        SMALLER_HEAD,
        *smaller,
        "",
        PLAIN_HEAD,
        *plain,
        EMBEDDED_NOTE,
        SETTINGS,
        measured_note,
        *gpu_rows(),
    ]
    write_atomic(PAGE, "\n".join(parts).encode())


if __name__ == "__main__":
    main()
