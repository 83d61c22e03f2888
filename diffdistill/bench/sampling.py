"""Images of the student in a few steps, by the code of `diffdistill sample`, beside the passes they must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from diffdistill.bench.floor import compare
from diffdistill.bench.matrix import Cell
from diffdistill.bench.results import SampleRow
from diffdistill.bench.session import Session, open_session
from diffdistill.bench.timing import clock_of
from diffdistill.math import grids
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Rule, Sampler

STEPS = (1, 2, 4, 8)
RULES: Sequence[Rule] = ("renoise", "ddim")
METHOD = "vsd"  # any that has a student in both layouts: how it was trained does not matter


def measure_samples(
    teacher: str, layout: str, batch: int, seconds: float, overrides: Sequence[str] = ()
) -> Iterator[SampleRow]:
    """Measure a student at each number of steps by each rule; what `image_generator` does is timed in its three parts."""
    session = open_session(Cell(teacher, METHOD, layout, batch), overrides)
    device = session.teacher.device
    clock, asked, seeds = clock_of(device), session.teacher.examples(batch), list(range(batch))
    condition = session.teacher.condition(asked, batch)
    with torch.no_grad():
        states = torch.zeros(batch, *session.teacher.denoiser.sample_shape, device=device)
        encoding = _least(lambda: session.teacher.condition(asked, batch), clock)
        decoding = _least(lambda: session.teacher.codec.decode(states), clock)
    for rule in RULES:
        for steps in STEPS:
            sampler = Sampler(grids.trailing(session.teacher.denoiser.schedule, steps), rule)

            def sample(sampler: Sampler = sampler) -> None:
                with torch.no_grad():
                    sampler.sample(session.roles["student"], Noise(seeds, device), condition)

            yield _row(session, sample, clock, seconds, teacher, layout, rule, steps, batch, encoding, decoding)


def _row(
    session: Session,
    sample: Callable[[], None],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
    teacher: str,
    layout: str,
    rule: str,
    steps: int,
    batch: int,
    encoding: float,
    decoding: float,
) -> SampleRow:
    sample()
    found = compare(sample, session, clock, seconds)
    return SampleRow(
        teacher=teacher,
        layout=layout,
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


def _least(action: Callable[[], object], clock: Callable[[Callable[[], object]], float]) -> float:
    """Return the least time of three: other work only adds to it."""
    return min(clock(action) for _ in range(3))
