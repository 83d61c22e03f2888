"""What a run recorded, put in order for the eye: sections of panels of curves, the same in terminal and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from diffdistill.evaluation.quantities import quantity
from diffdistill.training.detectors import Line

Curve = Sequence[tuple[float, float]]
OTHER = ("drift", "lr", "eval")
TEACHER = "teacher"
DRIFT = ("saturation", "contrast", "diversity")
LOSSES_NOTE = "Means over the steps between two lines. A loss against a network that learns as well need not fall."
DRIFT_NOTE = "Student and teacher from equal noise should come to agree; a fake lag far above 1 means that the fake network does not keep up."
SCORES_NOTE = "Under the protocol of the run's validation; differences below its noise say nothing."
GRADIENTS_NOTE = "Norms before clipping."


class Panel(NamedTuple):
    """Curves that are drawn together.

    Attributes:
        title: what they show.
        curves: (step, value), by name.
        is_log: whether values are positive and compared by their ratio.
    """

    title: str
    curves: Mapping[str, Curve]
    is_log: bool = False


class Section(NamedTuple):
    """Panels under a heading, and what to look for in them."""

    title: str
    note: str
    panels: Sequence[Panel]


def sections(lines: Sequence[Line]) -> list[Section]:
    """Return everything that was recorded, as sections without empty ones."""
    curves = _curves(lines)
    turns = {name: curve for name, curve in curves.items() if "/" in name and name.partition("/")[0] not in OTHER}
    norms = {name: curve for name, curve in turns.items() if "/grad_norm_" in name}
    logits = {name: curve for name, curve in turns.items() if "/logit_" in name}
    losses = {name: curve for name, curve in turns.items() if name not in norms and name not in logits}
    any_skipped = any(count for _, count in curves.get("skipped", []))
    named = [
        Section("Losses", LOSSES_NOTE, [_losses(turn, group) for turn, group in _by(losses, "/")]),
        Section("Drift guards", DRIFT_NOTE, [*_drift(curves), *_panel("discriminator's logits", logits, "fake/logit_")]),
        Section("Validation", SCORES_NOTE, [_scores(name, group) for name, group in _by(_of(curves, "eval/"), "@")]),
        Section(
            "Gradients, rates and speed",
            GRADIENTS_NOTE,
            [
                *_panel("gradient norms", {_role(name): curve for name, curve in norms.items()}, "", is_log=True),
                *_panel("learning rates", _of(curves, "lr/"), ""),
                *_panel("steps per second", {"": curves.get("steps_per_sec", [])}, ""),
                *_panel("skipped turns", {"": [point for point in curves.get("skipped", []) if any_skipped]}, ""),
                *_panel("peak memory, GiB", {"": curves.get("peak_memory_gib", [])}, ""),
            ],
        ),
    ]
    return [section for section in named if section.panels]


def thinned(curve: Curve, most: int) -> list[tuple[float, float]]:
    """Return at most so many points: the means of equally many neighbours each."""
    each = -(-len(curve) // most) or 1
    parts = [curve[k : k + each] for k in range(0, len(curve), each)]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def _curves(lines: Iterable[Line]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append((line["step"], value))
    return found


def _of(curves: Mapping[str, Curve], start: str) -> dict[str, Curve]:
    return {name.removeprefix(start): curve for name, curve in curves.items() if name.startswith(start)}


def _by(curves: Mapping[str, Curve], separator: str) -> list[tuple[str, dict[str, Curve]]]:
    """Return (first part of the names, the curves by the rest), by what stands before the separator."""
    split = sorted((name.partition(separator)[::2], curve) for name, curve in curves.items())
    return [(first, {rest: curve for (_, rest), curve in group}) for first, group in groupby(split, lambda item: item[0][0])]


def _losses(turn: str, curves: Mapping[str, Curve]) -> Panel:
    """Return the total of a turn and its terms, without a term that is the total wherever it is logged."""
    total = dict(curves.get("total", []))
    shown = {
        name: curve
        for name, curve in curves.items()
        if name == "total" or any(total.get(step) != value for step, value in curve)
    }
    return Panel(f"{turn}'s turn", dict(sorted(shown.items(), key=lambda item: item[0] != "total")), is_log=_is_positive(shown))


def _drift(curves: Mapping[str, Curve]) -> list[Panel]:
    panels = [
        Panel(name, {"student": curves[f"drift/{name}"], TEACHER: curves.get(f"drift/{name}_teacher", [])})
        for name in DRIFT
        if f"drift/{name}" in curves
    ]
    return [*panels, *_panel("fake lag", {"": curves.get("drift/fake_lag", [])}, "")]


def _scores(name: str, curves: Mapping[str, Curve]) -> Panel:
    return Panel(quantity(name).heading, {f"{steps} steps": curve for steps, curve in curves.items()}, is_log=False)


def _role(norm: str) -> str:
    """Return the role of turn/grad_norm_role, and the turn where that is another's."""
    turn, _, role = norm.partition("/grad_norm_")
    return role if turn == role else f"{role} in {turn}'s turn"


def _panel(title: str, curves: Mapping[str, Curve], start: str, is_log: bool = False) -> list[Panel]:
    shown = {name.removeprefix(start): curve for name, curve in curves.items() if curve}
    return [Panel(title, shown, is_log and _is_positive(shown))] if shown else []


def _is_positive(curves: Mapping[str, Curve]) -> bool:
    return all(value > 0 for curve in curves.values() for _, value in curve)
