"""The step of a stage: every turn's micro-batches forward and backward, one reduction, clip, update.

The micro-batch is the unit of data and of randomness. Micro-batch m of step k has generators derived from (seed, stage, k, m,
turn), so there is no random state to save, and the number of processes changes nothing but the order of a sum. Process r of
W takes the micro-batches r, r + W, ...; how gradients become those of the whole batch is `reduction`'s.

A step never waits for the device, with three exceptions: `Meter.read` and `Guard.check`, which the caller times, and an
optimiser without a fused kernel on the device (see `optimizers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from diffdistill.data.batches import derive_seed
from diffdistill.distillers.base import Batch, Distiller, Loss, Rng, Turn
from diffdistill.training.optimizers import RoleOptimizer
from diffdistill.training.reduction import Reduction, Replicated
from diffdistill.training.stopping import Diverged


class Feed(Protocol):
    """Where micro-batches come from."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one step, over all processes."""
        ...

    def batch(self, step: int, micro: int) -> Batch:
        """Return a micro-batch; a function of its arguments alone."""
        ...


class Trainable(Protocol):
    """What the engine asks of `Roles`."""

    def train_only(self, names: Sequence[str]) -> None:
        """Let gradients flow into these roles' parameters and no others."""
        ...


class Average(Protocol):
    """An average of a role's weights: `Shadow`."""

    def update(self) -> None:
        """Take in the weights of now."""
        ...


class Meter:
    """Means over the steps since the last reading, summed on the device in float64. Skipped turns do not count."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # names -> (len(names) + 1,): the sums, and how many were added

    def add(self, names: tuple[str, ...], values: Tensor, counts: Tensor) -> None:
        """Add values (len(names),) where the 0-dim bool `counts` is true."""
        row = torch.where(counts, torch.cat([values.double(), values.new_ones(1, dtype=torch.float64)]), 0.0)
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def read(self) -> dict[str, float]:
        """Return the means and start again; a name whose every turn was skipped is left out. Waits for the device."""
        totals: dict[str, list[float]] = {}
        for names, row in self.state():
            for name, value in zip(names, row, strict=False):
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += row[-1]
        self._sums = {}
        return {name: value / count for name, (value, count) in totals.items() if count}

    def state(self) -> list[tuple[list[str], list[float]]]:
        """Return what was added so far, for a checkpoint; a resumed run then logs the same line. Waits for the device."""
        if not self._sums:
            return []
        rows = iter(torch.cat(list(self._sums.values())).tolist())
        return [(list(names), [next(rows) for _ in range(len(names) + 1)]) for names in self._sums]

    def load_state(self, state: Sequence[tuple[Sequence[str], Sequence[float]]], device: torch.device) -> None:
        """Take over what `state` returned."""
        self._sums = {tuple(names): torch.tensor(row, dtype=torch.float64, device=device) for names, row in state}


class Guard:
    """Counts turns whose loss or gradient was not finite, on the device. Their updates were skipped.

    Args:
        limit: a turn skipped more than this often in a row stops the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: dict[str, Tensor] = {}  # turn -> (2,) int64: in a row, in all

    def add(self, turn: str, skipped: Tensor, excused: Tensor | None = None) -> None:
        """Count a turn; `excused` (fp16 while its scale is being found) leaves the row of failures as it is."""
        in_a_row, total = self._counts.get(turn, torch.zeros(2, dtype=torch.int64, device=skipped.device)).unbind()
        longer = torch.where(skipped, in_a_row + 1, 0)
        if excused is not None:
            longer = torch.where(skipped & excused, in_a_row, longer)
        self._counts[turn] = torch.stack([longer, total + skipped])

    def read(self) -> dict[str, list[int]]:
        """Return turn -> [skipped in a row, skipped in all]. Waits for the device."""
        if not self._counts:
            return {}
        return dict(zip(self._counts, torch.stack(list(self._counts.values())).tolist(), strict=True))

    def load_state(self, state: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """Take over what `read` returned."""
        self._counts = {turn: torch.tensor(list(row), device=device) for turn, row in state.items()}

    def check(self) -> int:
        """Return the number of turns skipped in all. Waits for the device.

        Raises:
            Diverged: a turn was skipped more than `limit` times in a row.
        """
        counts = self.read()
        for turn, (in_a_row, _) in counts.items():
            if in_a_row > self.limit:
                raise Diverged(
                    f"the loss or a gradient of turn {turn!r} was not finite {in_a_row} times in a row "
                    f"(guard.max_nonfinite_steps is {self.limit}). These updates were skipped, so the weights are "
                    "still finite, but training goes nowhere. Lower the learning rate or the guidance, clip "
                    "gradients, or use precision bf16 or fp32."
                )
        return sum(total for _, total in counts.values())


class Engine:
    """One stage: its method, optimisers and data. `step` trains one step of it.

    Args:
        distiller: the method.
        roles: their gradients are switched by turn.
        optimizers: by role, every role that a turn trains.
        feed: micro-batches.
        accelerator: accelerate's; owns device, processes, autocast and the fp16 loss scale.
        seed, stage: what the generators are derived from, with the step.
        clip_grad_norm: each role's gradient is scaled down to this norm; None for no clipping.
        guard: counts skipped turns.
        averages: role -> its average, updated after each step that trained the role.
        reduction: how gradients are summed over the processes; None for `Replicated`.
    """

    def __init__(
        self,
        distiller: Distiller,
        roles: Trainable,
        optimizers: Mapping[str, RoleOptimizer],
        feed: Feed,
        accelerator: Any,
        *,
        seed: int,
        stage: int,
        clip_grad_norm: float | None,
        guard: Guard,
        averages: Mapping[str, Average] | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self.distiller, self.roles, self.optimizers, self.feed = distiller, roles, optimizers, feed
        self.accelerator, self.device = accelerator, accelerator.device
        self.seed, self.stage, self.clip_grad_norm = seed, stage, clip_grad_norm
        self.guard, self.meter, self.averages = guard, Meter(), averages or {}
        self.reduction = Replicated(accelerator.num_processes) if reduction is None else reduction
        self.micros = range(accelerator.process_index, feed.num_micro_batches, accelerator.num_processes)
        assert len(self.micros) > 0, "every process needs a micro-batch; see data_feed.micro_batch_size"
        self.stop_votes = torch.zeros((), dtype=torch.float64, device=self.device)
        self._checked: set[Turn] = set()
        self._dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]

    def step(self, step: int, stop: bool = False) -> None:
        """Train step `step` of the stage, counted from 0; `stop` tells every process that this one was asked to stop."""
        batches = {micro: self.feed.batch(step, micro) for micro in self.micros}
        trained: set[str] = set()
        for index, turn in enumerate(self.distiller.turns(step)):
            self._turn(index, turn, step, batches, stop and index == 0)
            self.distiller.after(turn, step)
            trained |= set(turn.trains)
        for role in sorted(trained & self.averages.keys()):
            self.averages[role].update()

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which losses are computed: the run's precision.

        Its cache of weights is off: older torch reuses a cast made under no_grad with grad, which cuts the graph.
        """
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._dtype, cache_enabled=False)

    def stop_agreed(self) -> bool:
        """Return whether a process was asked to stop; equal in all of them after a step. Waits for the device."""
        return bool(self.stop_votes > 0)

    def state(self) -> dict[str, Any]:
        """Return counters for the checkpoint, plain numbers; weights and moments are saved apart. Waits for the device."""
        scaler = self.accelerator.scaler
        return {
            "meter": self.meter.state(),
            "guard": self.guard.read(),
            "loss_scale": None if scaler is None else scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.meter.load_state(state["meter"], self.device)
        self.guard.load_state(state["guard"], self.device)
        if state["loss_scale"] is not None:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])

    def _turn(self, index: int, turn: Turn, step: int, batches: dict[int, Batch], stop: bool) -> None:
        optimizers = [self.optimizers[role] for role in turn.trains]
        parameters = [parameter for optimizer in optimizers for parameter in optimizer.whole]
        self.roles.train_only(turn.trains)
        for optimizer in optimizers:
            optimizer.zero_grad()

        # 1. Forward and backward, one graph at a time
        names, values = (), torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in self.micros:
            logged = self._add_gradients(index, turn, step, micro, batches, parameters)
            names = tuple(f"{turn.name}/{term}" for term in logged)
            values = values + torch.stack(list(logged.values())) / self.feed.num_micro_batches
        self._check_reached(turn)

        # 2. Sums over the processes
        self.reduction.after_backward(parameters)
        for optimizer in optimizers:
            optimizer.take_gradients()
        excused = None
        if self.accelerator.scaler is not None:
            excused = self.accelerator.scaler._scale > 1  # an overflow at a larger scale is the scale's, not the loss's
            for optimizer in optimizers:
                self.accelerator.scaler.unscale_(optimizer)
        values = torch.cat([values, values.new_full((1,), float(stop))])
        gradients = [[parameter.grad for parameter in optimizer.parameters] for optimizer in optimizers]
        values, norms = self.reduction.totals(values, gradients)  # type: ignore[arg-type]
        self.stop_votes += values[-1]

        # 3. Update, unless something is not finite; the decision stays on the device
        checked = torch.stack([values[0], *(norm.double() for norm in norms)])
        finite = checked.isfinite().all()
        found_inf = (~finite).to(torch.float32)
        for optimizer, norm in zip(optimizers, norms, strict=True):
            optimizer.step(step, found_inf, self._divisor(norm))
            optimizer.zero_grad()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

        # 4. What is logged
        self.guard.add(turn.name, ~finite, excused)
        names = (*names, *(f"{turn.name}/grad_norm_{role}" for role in turn.trains))
        self.meter.add(names, torch.cat([values[:-1], checked[1:]]), finite)

    def _add_gradients(
        self, index: int, turn: Turn, step: int, micro: int, batches: dict[int, Batch], parameters: Sequence[Parameter]
    ) -> dict[str, Tensor]:
        """Add those of a micro-batch to the parameters', and hand on what it carries; return its total and its terms, 0-dim float64."""
        total, terms = torch.zeros((), dtype=torch.float64, device=self.device), dict[str, Tensor]()
        rng = self._rng(step, micro, index)
        make: Callable[[], Loss] | None = partial(self.distiller.loss, turn, batches[micro], rng, step)
        while make is not None:
            with self.autocast():
                loss = make()
            make = loss.then
            self.reduction.before_backward(parameters, last=make is None and micro == self.micros[-1])
            self.accelerator.backward(loss.total / self.feed.num_micro_batches)
            if loss.carry:
                batches[micro] = dataclasses.replace(batches[micro], carry={**batches[micro].carry, **loss.carry})
            total = total + loss.total.detach()
            terms |= {name: term.double() for name, term in loss.terms.items()}
            del loss  # its graph must be gone before the next one is built
        return {"total": total, **{name: terms[name] for name in sorted(terms)}}

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """Return what a gradient of this norm is divided by to have at most the norm that is allowed."""
        return None if self.clip_grad_norm is None else (norm / self.clip_grad_norm).clamp(min=1)

    def _rng(self, step: int, micro: int, turn: int) -> Rng:
        key = (self.seed, "stage", self.stage, step)
        self._seed_global(derive_seed(*key, "global", micro, turn))  # for a network that draws by itself, e.g. dropout
        local = torch.Generator(self.device).manual_seed(derive_seed(*key, "local", micro, turn))
        return Rng(local, torch.Generator().manual_seed(derive_seed(*key, "shared", turn)))

    def _seed_global(self, seed: int) -> None:
        """Seed the generators that a network may draw from: torch.manual_seed asks every backend it knows, 2 ms a turn."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)

    def _check_reached(self, turn: Turn) -> None:
        """Refuse a role that no gradient reaches, which trains silently into nothing. Once per turn and stage."""
        if turn in self._checked:
            return
        for role in turn.trains:
            if all(parameter.grad is None for parameter in self.optimizers[role].whole):
                raise RuntimeError(
                    f"turn {turn.name!r} of method {self.distiller.name!r} trains {role!r}, but no gradient "
                    "reached it. Either the loss does not use the role, or its graph was cut on the way."
                )
        self._checked.add(turn)
