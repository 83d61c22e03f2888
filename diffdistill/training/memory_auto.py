"""`memory: auto`: the settings by which a run fits into memory, those that cost least speed first. Method and layout never change.

Each of these is tried with all before it, from the fourth on with the largest micro-batch that then fits; what turns out needless
is taken back, what costs most first.

    setting                            speed                      result
    nothing                            -                          -
    moments of 8 bits                  about the same             moments are rounded
    the average on the CPU             about the same             the same up to the rounding of its kernels
    teacher and fake asked in parts    about the same             the same up to rounding
    smaller micro-batches              fewer samples at once      other random draws of the same distribution
    activation checkpointing           one more forward pass      the same
    optimisers on the CPU              the bus, once an update    the same up to the rounding of its kernels
    the frozen base in bf16            faster                     the base is rounded, and with it the teacher
    the base in int8, then in nf4      somewhat slower            the same, more of it

What a resumed run does was picked when it was started: another micro-batch would change every random draw.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffdistill.config import RunConfig, with_overrides
from diffdistill.config.combinations import matches_in_shared_layout
from diffdistill.errors import UserError
from diffdistill.memory import MemoryPlan, readable
from diffdistill.models.quantize import PACKAGES
from diffdistill.models.together import usual_rows
from diffdistill.training.data_feed import micro_batch_size
from diffdistill.training.optimizers import EIGHT_BIT
from diffdistill.training.planning import plan_activations, plan_memory

GPU_RESERVE = (
    2**30
)  # and a twentieth: what kernels and the allocator keep for themselves, up to 2 % by measurement, and decoded samples
CPU_RESERVE = 0.2  # of what is free: the plan was 11 % below what a process of true size held


class Room(NamedTuple):
    """What a run may use, in bytes.

    Attributes:
        free: on the device, or, without a GPU, in the memory of the machine.
        usable: of it.
        host: of the memory of the machine beside a GPU, for what is offloaded.
    """

    free: int
    usable: int
    host: int

    def __str__(self) -> str:
        return f"{readable(self.usable)} (of {readable(self.free)} free, {readable(self.free - self.usable)} are held back)"


class Pick(NamedTuple):
    """Settings, as overrides, and what they change."""

    overrides: tuple[str, ...]
    effect: str


@dataclass(frozen=True)
class Choice:
    """What was picked.

    Attributes:
        room: what the run may use.
        picks: none where the run fits as it is configured.
        before, after: the plans without and with them.
    """

    room: Room
    picks: tuple[Pick, ...]
    before: MemoryPlan
    after: MemoryPlan

    @property
    def overrides(self) -> tuple[str, ...]:
        """All settings that were picked."""
        return tuple(override for pick in self.picks for override in pick.overrides)

    def of(self, config: RunConfig) -> RunConfig:
        """Return the run with what was picked."""
        return with_overrides(config, ["memory=null", *self.overrides])

    def lines(self) -> list[str]:
        """Return what was picked and why."""
        start = f"memory: auto may use {self.room}; as configured a step needs {self.before.summary()}"
        if not self.picks:
            return [f"{start}. Nothing had to be picked."]
        picked = [f"  {' '.join(pick.overrides)}: {pick.effect}" for pick in self.picks]
        return [f"{start}. Picked:", *picked, f"With these a step needs {self.after.summary()}."]


def choose(config: RunConfig, device_type: str, room: Room, num_processes: int = 1) -> Choice:
    """Return the settings by which a run fits.

    Args:
        config: of the run; its `memory` does not matter.
        device_type: of the device that it will run on, "cpu" or "cuda"; none is touched.
        room: of one process.
        num_processes: that share the batch.
    Raises:
        UserError: no settings make it fit; says what the smallest plan needs, and what could be changed by hand.
    """
    planner = _Planner(config, device_type, num_processes)
    before = smallest = planner.plan((), planner.sizes[0])
    for picks, sizes in _levels(planner):
        for size in sizes:
            if not planner.may_fit(picks, size, room):
                continue
            plan = planner.plan(picks, size)
            if _fits(plan, room):
                picks = _needed(picks, lambda rest, size=size: _fits(planner.plan(rest, size), room))
                chosen = (*picks, *planner.micro_batch(size))
                return Choice(room, chosen, before, planner.plan(picks, size))
            smallest = min(smallest, plan, key=lambda each: each.peak.bytes)
    raise UserError(
        f"memory: auto found no settings by which this run fits into {room}: as configured a step needs {before.summary()}, and with all "
        f"that it may pick still {smallest.summary()}. Set roles: {{layout: shared, lora: {{rank: 16}}}}, which trains adapters of one "
        "network, or a smaller rank; teacher_options.size; or take a smaller teacher or a larger device."
    )


def available(device_type: str, num_processes: int = 1) -> Room:
    """Return what a process of a run may use on this machine now.

    Args:
        device_type: of the device that it runs on, "cpu" or "cuda" (the current one).
        num_processes: that share this machine's memory.
    """
    free_host = _free_host_bytes() // num_processes
    usable_host = int(free_host * (1 - CPU_RESERVE))
    if device_type == "cpu":
        return Room(free_host, usable_host, 0)
    free, _ = torch.cuda.mem_get_info()
    return Room(free, max(0, int(free * 0.95) - GPU_RESERVE), usable_host)


def least_room(room: Room) -> Room:
    """Return what every process has, the same in all of them."""
    from accelerate.utils import gather_object

    rooms = [Room(*each) for each in gather_object([tuple(room)])]
    return min(rooms, key=lambda each: each.usable)._replace(host=min(each.host for each in rooms))


def _free_host_bytes() -> int:
    """Return the memory that this process can still get: the machine's, or less where a control group says so."""
    import psutil

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return free


# What can be picked


def eight_bit_moments(config: RunConfig, device_type: str) -> Pick | None:
    """Return AdamW with moments of 8 bits for all that AdamW trains; bitsandbytes' first on a GPU, which compiles nothing."""
    order = ("adamw8bit_bnb", "adamw8bit") if device_type == "cuda" else ("adamw8bit",)
    name = next((name for name in order if _installed(EIGHT_BIT[name])), None)
    places = [place for place, optimizer in _optimizers(config).items() if optimizer.name == "adamw" and not optimizer.offload]
    if name is None or not places:
        return None
    return Pick(tuple(f"{place}.name={name}" for place in places), "moments are rounded to 8 bits")


def average_on_cpu(config: RunConfig, device_type: str) -> Pick | None:
    """Return the average in the memory of the CPU."""
    if config.ema is None or config.ema.offload or device_type == "cpu":
        return None
    return Pick(("ema.offload=true",), "the same up to the rounding of the CPU's kernels")


def asked_in_parts(config: RunConfig, device_type: str) -> Pick | None:
    """Return passes of half the usual rows for teacher and fake network in distribution matching, which lie beside the student's graph."""
    size = config.micro_batch_size or config.batch_size
    rows = max(1, min(size, usual_rows(size)) // 2)
    if config.roles.rows_at_once is not None or not matches_in_shared_layout(config):
        return None
    return Pick((f"roles.rows_at_once={rows}",), "the same up to rounding, in more passes of teacher and fake network")


def checkpointing(config: RunConfig, device_type: str) -> Pick | None:
    """Return activation checkpointing."""
    if config.roles.activation_checkpointing:
        return None
    return Pick(("roles.activation_checkpointing=true",), "the same values, one more forward pass of what is trained")


def optimizers_on_cpu(config: RunConfig, device_type: str) -> Pick | None:
    """Return the offload of every optimiser whose moments are whole, undoing `eight_bit_moments`."""
    found = {} if device_type == "cpu" else _optimizers(config)
    overrides = [
        override
        for place, optimizer in found.items()
        if optimizer.name not in EIGHT_BIT and not optimizer.offload
        for override in (f"{place}.name={optimizer.name}", f"{place}.offload=true")
    ]
    return Pick(tuple(overrides), "the same up to the rounding of the CPU's kernels") if overrides else None


def base_in_bf16(config: RunConfig, device_type: str) -> Pick | None:
    """Return the frozen base of adapters in bf16."""
    if config.roles.lora is None or config.teacher_options.dtype != "fp32":
        return None
    return Pick(("teacher_options.dtype=bf16",), "the frozen base, and with it the teacher, is rounded to bf16")


def rounded_base(kind: str, config: RunConfig, device_type: str) -> Pick | None:
    """Return the base of shared adapters in int8, or, on a GPU, in nf4."""
    possible = config.roles.layout == "shared" and config.roles.lora is not None and config.teacher_options.quantize is None
    if not possible or not _installed(PACKAGES[kind]) or (kind == "nf4" and device_type == "cpu"):
        return None
    return Pick((f"teacher_options.quantize={kind}",), f"the frozen base, and with it the teacher, is rounded to {kind}")


Saver = Callable[[RunConfig, str], Pick | None]
BEFORE_SMALLER: tuple[Saver, ...] = (eight_bit_moments, average_on_cpu, asked_in_parts)
AFTER_SMALLER: tuple[Saver, ...] = (
    checkpointing,
    optimizers_on_cpu,
    base_in_bf16,
    partial(rounded_base, "int8"),
    partial(rounded_base, "nf4"),
)


def _optimizers(config: RunConfig) -> dict[str, Any]:
    """Return the settings of every optimiser of the run by their place."""
    return {
        f"stages.{index}.optimizers.{role}": stage.optimizer(role)
        for index, stage in enumerate(config.stages)
        for role in stage.trained
    }


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# The search


class _Planner:
    """Plans of a run with other settings; a step is taken only where the activations are not known yet."""

    def __init__(self, config: RunConfig, device_type: str, num_processes: int) -> None:
        self.device_type = device_type
        size = micro_batch_size(config.batch_size, config.micro_batch_size, num_processes)
        self.config = with_overrides(config, ["memory=null", f"micro_batch_size={size}"])
        possible = [k for k in range(size, 0, -1) if config.batch_size % k == 0]
        self.sizes = [k for k in possible if config.batch_size // k >= num_processes]
        self._known: dict[tuple[str, ...], dict[int, list[dict[str, int]]]] = {}  # settings that change them -> size -> found

    def plan(self, picks: Sequence[Pick], size: int) -> MemoryPlan:
        """Return the plan with these settings."""
        known = self._known.setdefault(self._kind(picks), {})
        if size not in known:
            known[size] = plan_activations(self._with(picks, size), self.device_type)
        return plan_memory(self._with(picks, size), self.device_type, activations=known[size])

    def may_fit(self, picks: Sequence[Pick], size: int, room: Room) -> bool:
        """Return whether the plan could fit, by a larger micro-batch: activations grow with the size, and no faster."""
        known = self._known.get(self._kind(picks), {})
        if not known:
            return True
        larger = max(known)
        least = [{turn: amount * size // larger for turn, amount in stage.items()} for stage in known[larger]]
        return _fits(plan_memory(self._with(picks, size), self.device_type, activations=least), room)

    def micro_batch(self, size: int) -> tuple[Pick, ...]:
        """Return the pick of a micro-batch, none for the size that was asked for."""
        if size == self.sizes[0]:
            return ()
        return (
            Pick((f"micro_batch_size={size}",), f"smaller than {self.sizes[0]}: other random draws of the same distribution"),
        )

    def _with(self, picks: Sequence[Pick], size: int) -> RunConfig:
        overrides = [override for pick in picks for override in pick.overrides]
        return with_overrides(self.config, [*overrides, f"micro_batch_size={size}"])

    def _kind(self, picks: Sequence[Pick]) -> tuple[str, ...]:
        return tuple(
            override
            for pick in picks
            for override in pick.overrides
            if override.startswith(("roles.", "teacher_options.dtype"))
        )


def _levels(planner: _Planner) -> Iterator[tuple[list[Pick], list[int]]]:
    """Yield settings, each with all before it, and the micro-batches to try with them."""
    config, device_type = planner.config, planner.device_type
    asked, *smaller = planner.sizes
    picks: list[Pick] = []
    yield picks, [asked]
    for saver in BEFORE_SMALLER:
        if (pick := saver(config, device_type)) is not None:
            picks = [*picks, pick]
            yield picks, [asked]
    yield picks, smaller
    for saver in AFTER_SMALLER:
        if (pick := saver(config, device_type)) is not None and _possible(planner, [*picks, pick]):
            picks = [*picks, pick]
            yield picks, [asked, *smaller]


def _possible(planner: _Planner, picks: Sequence[Pick]) -> bool:
    """Return whether these roles can have the settings: not every network recomputes its activations."""
    try:
        planner.plan(picks, planner.sizes[0])
    except UserError:
        return False
    return True


def _needed(picks: Sequence[Pick], fits_with: Callable[[Sequence[Pick]], bool]) -> list[Pick]:
    """Return the picks without those that are not needed; the last ones, which cost most, are taken back first."""
    kept = list(picks)
    for pick in reversed(picks):
        rest = [other for other in kept if other is not pick]
        if fits_with(rest):
            kept = rest
    return kept


def _fits(plan: MemoryPlan, room: Room) -> bool:
    return plan.peak.bytes <= room.usable and plan.peak.offloaded_bytes <= room.host
