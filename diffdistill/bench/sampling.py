"""Images of the student in a few steps, by the code of `diffdistill sample`, beside the passes they must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from diffdistill.bench.definition import Cell
from diffdistill.bench.floor import compare_steady
from diffdistill.bench.results import SampleRow
from diffdistill.bench.session import Session
from diffdistill.bench.timing import Clock, clock_of
from diffdistill.math import grids
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Rule, Sampler


def measure_samples(session: Session, cell: Cell, wanted: Sequence[tuple[Rule, int]], seconds: float) -> Iterator[SampleRow]:
    """Measure a student at these rules and numbers of steps; what `image_generator` does is timed in its three parts."""
    device, batch = session.teacher.device, cell.batch
    clock, asked, seeds = clock_of(device), session.teacher.examples(batch), list(range(batch))
    condition = session.teacher.condition(asked, batch)
    with torch.no_grad():
        states = torch.zeros(batch, *session.teacher.denoiser.sample_shape, device=device)
        encoding = _least(lambda: session.teacher.condition(asked, batch), clock)
        decoding = _least(lambda: session.teacher.codec.decode(states), clock)
    for rule, steps in wanted:
        sampler = Sampler(grids.trailing(session.teacher.denoiser.schedule, steps), rule)

        def sample(sampler: Sampler = sampler) -> None:
            with torch.no_grad():
                sampler.sample(session.roles["student"], Noise(seeds, device), condition)

        found = compare_steady(sample, session, clock, seconds)
        yield SampleRow(
            teacher=cell.teacher,
            layout=cell.layout,
            rule=rule,
            steps=steps,
            batch=batch,
            passes=round(sum(what.rows * num for what, num in found.passes.items()) / batch),
            image_ms=1000 * sum(found.times) / found.num / batch,
            ratio=found.ratio,
            rounds=len(found.times),
            condition_ms=1000 * encoding / batch,
            decode_ms=1000 * decoding / batch,
        )


def _least(action: Callable[[], object], clock: Clock) -> float:
    """Return the least time of three: other work only adds to it."""
    return min(clock(action) for _ in range(3))
