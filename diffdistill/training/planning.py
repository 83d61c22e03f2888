"""What a run will keep in memory, found before anything is loaded: its steps are taken by networks without weights.

Weights, adapters, gradients and optimiser are counted on the meta device; activations are the most bytes alive while the loss of a
turn and its backward pass run on fake tensors of the CPU (see `models.weightless`). Everything else of the step is real: method,
micro-batch, random draws, autocast. For a GPU the operations that its autocast runs in float32 do so here, too.

Between steps, where images are made for samples and validation, there are a pass without gradient, the autoencoder with what it
decodes, and the average's weights in place of the student's; of a step nothing is left then.

Not in a plan: the text encoders, which leave before the first step, when all that data, samples and validation ask for is encoded; the
feature networks of a validation, which are on the CPU at other times; and what kernels and the allocator keep for themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from diffdistill.config import RunConfig, StageConfig
from diffdistill.distillers.base import Batch, Distiller, Loss, PairBatch, Rng, TrajectoryBatch, Turn
from diffdistill.math import grids
from diffdistill.memory import LiveBytes, MemoryPlan, MemoryRow, TurnMemory, memory_rows, nbytes, network_row, without_a_gpu
from diffdistill.models.attention import Attention
from diffdistill.models.codec import Codec
from diffdistill.models.compute import lower_frozen
from diffdistill.models.condition import Condition
from diffdistill.models.loading import Teacher
from diffdistill.models.parts import InParts
from diffdistill.models.quantize import rounding_saves
from diffdistill.models.roles import Roles
from diffdistill.models.weightless import as_fakes
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.training.building import build_distiller, build_run_roles, frozen_roles, open_teacher
from diffdistill.training.data_feed import micro_batch_size

IMAGES = "images"  # beside the turns of a step: what making images takes


def plan_memory(
    config: RunConfig, device_type: str, teacher: Teacher | None = None, activations: Sequence[Mapping[str, int]] | None = None
) -> MemoryPlan:
    """Return the plan of the stage that needs most, for one process.

    Args:
        config: of the run.
        device_type: of the device that it will run on, "cpu" or "cuda"; none is touched.
        teacher: on the meta device, changed in place; None to open the config's.
        activations: by stage, bytes by turn and of making images, where they are known (`plan_activations`); None to find them, which takes a step of every
            stage.
    """
    teacher = open_teacher(config, "meta") if teacher is None else teacher
    teacher = replace(teacher, denoiser=teacher.denoiser.with_attention(Attention(config.compute.attention).planned()))
    saved = 0 if teacher.quantized is None else rounding_saves(teacher.network, teacher.family, teacher.quantized)
    with torch.device("meta"):
        roles = build_run_roles(config, teacher)
    if config.compute.frozen is not None:  # fp8 is taken for bf16, which is what is not in its linear layers
        lower_frozen(roles, frozen_roles(config), "bf16", "cpu")
    if activations is None:
        activations = _all_activations(config, device_type, teacher, roles)
    plans = []
    for index, (stage, found) in enumerate(zip(config.stages, activations, strict=True)):
        rows = _kept(config, stage, device_type, teacher, roles, saved)
        plans.append(_stage_plan(index, stage, rows, roles, found))
    return max(plans, key=lambda plan: plan.peak.bytes)


def plan_activations(config: RunConfig, device_type: str, teacher: Teacher | None = None) -> list[dict[str, int]]:
    """Return, for each stage, turn (or `IMAGES`) -> bytes of activations; the arguments are those of `plan_memory`."""
    teacher = open_teacher(config, "meta") if teacher is None else teacher
    with torch.device("meta"):
        roles = build_run_roles(config, teacher)
    return _all_activations(config, device_type, teacher, roles)


def _kept(
    config: RunConfig, stage: StageConfig, device_type: str, teacher: Teacher, roles: Roles, saved: int
) -> list[MemoryRow]:
    """Return the rows of a stage without activations; `saved`: bytes that rounding takes off the teacher."""
    optimizers = {role: stage.optimizer(role) for role in stage.trained}
    ema = config.ema
    base, *rows = memory_rows(roles, optimizers, averaged=ema is not None, offloaded_average=ema is not None and ema.offload)
    if teacher.codec.vae is not None and device_type == "cpu":  # on a GPU it is put aside
        rows.append(network_row("autoencoder", teacher.codec.vae))
    if device_type == "cpu":
        rows = [without_a_gpu(row) for row in rows]
    return [replace(base, weights_bytes=base.weights_bytes - saved), *rows]


def _stage_plan(
    index: int, stage: StageConfig, rows: list[MemoryRow], roles: Roles, activations: Mapping[str, int]
) -> MemoryPlan:
    """Put together what is kept and what the turns of the stage, and making images, add."""
    gradients = {row.role: row.gradient_bytes for row in rows}
    _, due = _busiest_step(stage, build_distiller(stage, roles))
    turns = tuple(
        TurnMemory(turn.name, turn.trains, sum(gradients[role] for role in turn.trains), activations[turn.name]) for turn in due
    )
    own = {turn.trains[0]: turn.activation_bytes for turn in turns}
    if IMAGES in activations:
        turns = (*turns, TurnMemory(IMAGES, (), 0, activations[IMAGES]))
    return MemoryPlan(index, tuple(replace(row, activation_bytes=own.get(row.role, 0)) for row in rows), turns)


def _busiest_step(stage: StageConfig, distiller: Distiller) -> tuple[int, tuple[Turn, ...]]:
    """Return the first step of the stage with the most turns, and these."""
    step = max(range(stage.steps), key=lambda step: len(distiller.turns(step)))
    return step, distiller.turns(step)


# Activations


def _all_activations(config: RunConfig, device_type: str, teacher: Teacher, roles: Roles) -> list[dict[str, int]]:
    fakes = as_fakes(roles, roles.networks.values())
    images = (
        {} if config.samples is None and config.validation is None else {IMAGES: _images(config, device_type, teacher, fakes)}
    )
    return [_activations(config, stage, device_type, teacher, fakes) | images for stage in config.stages]


def _images(config: RunConfig, device_type: str, teacher: Teacher, roles: Roles) -> int:
    """Return the bytes of making images: a pass under guidance and what is decoded at once, beside the autoencoder and the average."""
    rows = config.sampling_batch_size or _size(config)
    denoiser, vae = InParts(roles.teacher, rows), teacher.codec.vae
    sampler = Sampler(grids.trailing(denoiser.schedule, 1), guidance=teacher.guidance)
    codec = Codec() if vae is None else Codec(as_fakes(vae, [vae]))
    cond = empty_batch(teacher, rows, images=False).cond
    with LiveBytes() as live, torch.no_grad():
        codec.decode(sampler.sample(denoiser, Noise(range(rows)), cond))
    brought = 0 if vae is None or device_type == "cpu" else network_row("autoencoder", vae).weights_bytes
    student = [] if config.ema is None else roles.parameters("student")
    exchanged = sum(nbytes([tensor, tensor.float()]) for tensor in student)  # its weights wait aside for a copy of the average
    return live.peak + brought + exchanged


def _activations(config: RunConfig, stage: StageConfig, device_type: str, teacher: Teacher, roles: Roles) -> dict[str, int]:
    """Return turn -> bytes of activations, of roles without weights."""
    distiller = build_distiller(stage, roles)
    step, _ = _busiest_step(stage, distiller)
    needs = stage.needs
    batch = empty_batch(teacher, _size(config), needs.data == "images", needs.pairs, needs.trajectories is not None)
    return turn_activations(config, device_type, roles, distiller, step, batch)


def _size(config: RunConfig) -> int:
    return micro_batch_size(config.batch_size, config.micro_batch_size, num_processes=1)


def turn_activations(
    config: RunConfig, device_type: str, roles: Roles, distiller: Distiller, step: int, batch: Batch
) -> dict[str, int]:
    """Return turn -> bytes of activations at a step of a method.

    Args:
        config: of the run; says how many micro-batches a step has, and the precision.
        device_type: of the device whose autocast is followed.
        roles: without weights, or with.
        batch: a micro-batch.
    """
    num_micro_batches = config.batch_size // _size(config)
    accumulates = num_micro_batches > 1
    loaded = num_micro_batches * nbytes(_tensors(batch))  # the whole step's lies on the device from its beginning
    found = {}
    for turn in distiller.turns(step):
        roles.train_only(turn.trains)
        trained = [parameter for role in turn.trains for parameter in roles.parameters(role)]
        for parameter in trained:  # from the second micro-batch on, the gradients of the first are there
            parameter.grad = torch.zeros_like(parameter) if accumulates else None
        make: Callable[[], Loss] | None = partial(distiller.loss, turn, batch, _rng(), step)
        with LiveBytes() as live, _rules(device_type):  # in the backward pass, too: it may compute activations again
            while make is not None:
                with _autocast(config.precision):
                    loss = make()
                _backward(loss.total)
                batch, make = replace(batch, carry={**batch.carry, **loss.carry}), loss.then
                del loss
        found[turn.name] = loaded + live.peak - (0 if accumulates else nbytes(trained))
        for parameter in trained:
            parameter.grad = None
    return found


def _backward(total: Tensor) -> None:
    """Do `total.backward()`, which is a function that modes see, and inside which they do not hold: what it recomputes would escape them."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((total,), (torch.ones_like(total),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def empty_batch(teacher: Teacher, size: int, images: bool, pairs: bool = False, trajectories: bool = False) -> Batch:
    """Return a micro-batch of zeros, of the shapes that `DataFeed` gives it."""
    shape = (size, *teacher.denoiser.sample_shape)
    asked = teacher.condition(teacher.examples(1), 1)
    values = {name: torch.zeros(size, *value.shape[1:], dtype=value.dtype) for name, value in asked.values.items()}
    null = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in asked.null.items()}
    cond = Condition(size, values, null)
    times = torch.ones(size, dtype=torch.float64)
    return Batch(
        cond,
        torch.zeros(shape) if images else None,
        PairBatch(torch.zeros(shape), torch.zeros(shape), cond) if pairs else None,
        trajectories=TrajectoryBatch(torch.zeros(shape), times, times, torch.zeros(shape), cond) if trajectories else None,
    )


def _tensors(batch: Batch) -> list[Tensor]:
    stored = [part for part in (batch.pairs, batch.trajectories) if part is not None]
    states = [value for part in (batch, *stored) for value in vars(part).values() if isinstance(value, Tensor)]
    return [*states, *batch.cond.values.values()]


def _rng() -> Rng:
    return Rng(torch.Generator().manual_seed(0), torch.Generator().manual_seed(0))


# Autocast of another device

# Of torch.amp's list of operations that run in float32 on CUDA, those that networks use; on a CPU they keep the type of their input.
_FLOAT32_ON_CUDA = frozenset(
    {
        functional.layer_norm,
        functional.group_norm,
        functional.softmax,
        torch.softmax,
        Tensor.softmax,
        torch.exp,
        torch.pow,
        Tensor.pow,
        torch.rsqrt,
        torch.sum,
        Tensor.sum,
    }
)


class _CudaAutocast(TorchFunctionMode):
    """Runs in float32 what autocast runs in float32 on a GPU but not on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, of the list on widened tensors."""
        kwargs = kwargs or {}
        if func in _FLOAT32_ON_CUDA and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _rules(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Let autocast follow the rules of a kind of device."""
    return _CudaAutocast() if device_type == "cuda" else contextlib.nullcontext()


def _autocast(precision: str) -> contextlib.AbstractContextManager[object]:
    """Compute as the engine does at a precision."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast("cpu", dtype, cache_enabled=False)
