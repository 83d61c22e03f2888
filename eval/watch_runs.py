"""Short runs, healthy and broken on purpose, on which the thresholds of `diffdistill.training.detectors` rest.

    python eval/watch_runs.py runs/watch            trains what is missing there, then prints the table of docs/watch.md
    python eval/watch_runs.py runs/watch --only dmd2-gan lr-huge

Each run is a recipe of configs/ on the digits with small batches and a few hundred steps; all of them take about half an hour
on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffdistill.config import load_config
from diffdistill.training import layout
from diffdistill.training.detectors import DETECTORS, Detector, stage_of
from diffdistill.training.run import train
from diffdistill.training.stopping import Diverged
from diffdistill.yaml_files import read_yaml

CONFIGS = Path(__file__).parent.parent / "configs"
SHORT = (
    "batch_size=32",
    "logging={every_steps: 10, tensorboard: false}",
    "samples={every_steps: 50, num: 40}",
    "checkpoint.every_steps=1000",
)
SLOW_FAKE = ("stages.0.method.student_every=1", "stages.0.method.fake_warmup_steps=0")
GAN = ("data={kind: digits}", "stages.0.method.gan={}")

HEALTHY: dict[str, tuple[str, ...]] = {
    "agd": ("digits-agd", "stages.0.steps=300"),
    **{
        name: (f"digits-{name}", "stages.0.steps=300")
        for recipe in ("consistency", "dmd2", "guidance", "lcm")
        for name in (recipe, f"{recipe}-lora")
    },
    **{
        name: (f"digits-{name}", "stages.0.steps=120", "stages.1.steps=120", "stages.2.steps=120")
        for name in ("progressive", "progressive-lora")
    },
    **{name: (f"digits-{name}", "stages.0.steps=150", "stages.1.steps=250") for name in ("vsd", "vsd-lora")},
    "fake-slow": ("digits-dmd2", "stages.0.steps=260", *SLOW_FAKE, "stages.0.optimizers.fake.lr=1e-5"),
    "dmd2-cold": ("digits-dmd2", "stages.0.steps=200", "stages.0.method.fake_warmup_steps=0"),
    "dmd2-gan": ("digits-dmd2", "stages.0.steps=200", *GAN),
}
BROKEN: dict[str, tuple[str, ...]] = {
    "guidance-huge": ("digits-dmd2", "stages.0.steps=260", "stages.0.method.guidance=15"),
    "fake-idle": ("digits-dmd2", "stages.0.steps=160", *SLOW_FAKE, "stages.0.optimizers.fake.lr=1e-7"),
    "fake-lr-high": ("digits-dmd2", "stages.0.steps=160", "stages.0.optimizers.fake.lr=0.03"),
    "gan-huge": (
        "digits-dmd2",
        "stages.0.steps=300",
        "data={kind: digits}",
        "stages.0.method.gan={features: fake, generator_weight: 100.0, discriminator_weight: 10.0}",
        "stages.0.optimizers.head={lr: 1.0e-3}",
    ),
    "gan-lost": (
        "digits-dmd2",
        "stages.0.steps=160",
        "data={kind: digits}",
        "stages.0.method.gan={features: fake, generator_weight: 1.0, discriminator_weight: 10.0}",
        "stages.0.optimizers.head={lr: 1.0e-3}",
        "stages.0.optimizers.student.lr=0.1",
    ),
    "lr-huge": ("digits-consistency", "stages.0.steps=160", "stages.0.optimizers.student.lr=0.3"),
    "lr-huge-dmd2": ("digits-dmd2", "stages.0.steps=160", "stages.0.optimizers.student.lr=0.1"),
    "fake-lr-huge": ("digits-dmd2", "stages.0.steps=160", "stages.0.optimizers.fake.lr=0.3"),
    "lr-zero": ("digits-consistency", "stages.0.steps=160", "stages.0.optimizers.student.lr=1e-10"),
}


def run(name: str, folder: Path) -> None:
    """Train one of the runs; one that diverges leaves what it had."""
    recipe, *overrides = {**HEALTHY, **BROKEN}[name]
    config = load_config(CONFIGS / f"{recipe}.yaml", [*overrides, *SHORT, f"output={folder / name}"])
    try:
        train(config, progress=False)
    except Diverged as error:
        print(f"{name}: {error}")


def worst(detector: Detector, folder: Path) -> float | None:
    """Return the figure nearest to a warning, or furthest beyond, of all that a detector read as the run went on."""
    lines = [json.loads(line) for line in (folder / layout.METRICS).read_text().splitlines()]
    config = read_yaml(folder / layout.CONFIG)
    readings = [detector.measure(stage_of(lines[: index + 1], config)) for index in range(len(lines))]
    return (max if detector.side == "above" else min)((each.figure for each in readings if each is not None), default=None)


def table(folder: Path) -> str:
    """Return as Markdown, for each detector, its threshold between the worst of the healthy runs and the broken ones that it tells."""
    rows = ["| warning | healthy, worst | threshold | broken |", "|---|---|---|---|"]
    for detector in DETECTORS:
        healthy = {name: figure for name in HEALTHY if (figure := worst(detector, folder / name)) is not None}
        broken = {name: figure for name in BROKEN if (figure := worst(detector, folder / name)) is not None}
        pick = max if detector.side == "above" else min
        of = pick(healthy, key=healthy.__getitem__, default=None)
        told = [
            f"{name} {figure:.3g}"
            for name, figure in broken.items()
            if (figure > detector.threshold if detector.side == "above" else figure < detector.threshold)
        ]
        sign = ">" if detector.side == "above" else "<"
        nearest = "never measured" if of is None else f"{healthy[of]:.3g} ({of})"
        rows.append(f"| {detector.name} | {nearest} | {sign} {detector.threshold:g} | {', '.join(told)} |")
    return "\n".join(rows)


def main() -> None:
    """Train what is missing, and print the table once nothing is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[*HEALTHY, *BROKEN])
    arguments = parser.parse_args()
    for name in arguments.only:
        if not (arguments.folder / name / layout.METRICS).is_file():
            print(name, flush=True)
            run(name, arguments.folder)
    if all((arguments.folder / name / layout.METRICS).is_file() for name in (*HEALTHY, *BROKEN)):
        print(table(arguments.folder))


if __name__ == "__main__":
    main()
