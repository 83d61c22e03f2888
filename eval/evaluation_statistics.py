"""Do the jackknife's intervals cover the truth, is its bias small, how exact and how fast is the Frechet distance?

    python eval/evaluation_statistics.py            # a quarter of an hour of one core; into docs/statistics.md
    python eval/evaluation_statistics.py --table    # only the page, from eval/results/evaluation_statistics.json

Features are Gaussian with a spectrum i^-1.2, against a reference that is known exactly, so that the true distance is: 200 sets of images
for each setting. Times are of one core, d = 2,048.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.evaluation.metrics.frechet import frechet_distance, frechet_to_reference, jackknife_frechet, quick_frechet
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian, covariance_factor
from diffdistill.evaluation.metrics.jackknife import jackknife
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.student_t import interval
from diffdistill.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "evaluation_statistics.json"
PAGE = ROOT / "docs" / "statistics.md"
TRIALS = 200
SETTINGS = [
    (64, 2000, 10),
    (64, 2000, 20),
    (64, 2000, 50),
    (64, 10_000, 20),
    (256, 10_000, 20),
    (256, 2500, 20),
]  # d, N, groups
F64 = torch.float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        found = {
            "command": "python eval/evaluation_statistics.py",
            "coverage": [],
            "exact": list(exactness()),
            "seconds": seconds(),
        }
        for setting in SETTINGS:
            found["coverage"].append(coverage(*setting))
            print(found["coverage"][-1], flush=True)
        write_json(RESULTS, found)
    write_atomic(PAGE, page(json.loads(RESULTS.read_text())))


def spectrum(d: int) -> Tensor:
    """Return variances i^-1.2 that add up to 100, float64 (d,)."""
    variances = torch.arange(1, d + 1, dtype=F64) ** -1.2
    return variances * 100 / variances.sum()


def coverage(d: int, num_images: int, num_groups: int) -> dict[str, float]:
    """Return the share of 95 % intervals that hold the true distance, and the biases with their errors."""
    variances = spectrum(d)
    reference = ReferenceGaussian(torch.zeros(d, dtype=F64), variances.sqrt().diag())
    mean, scale = torch.full((d,), 0.1, dtype=F64), 1.1  # of the images
    truth = float(mean.square().sum() + variances.sum() * (scale - 1) ** 2)
    groups = torch.arange(num_images) * num_groups // num_images
    plain, corrected, held = [], [], 0
    for trial in range(TRIALS):
        draw = torch.randn(num_images, d, dtype=F64, generator=torch.Generator().manual_seed(trial))
        moments = Moments(d, num_groups)
        moments.update(draw * variances.sqrt() * scale + mean, groups)
        whole, deleted = jackknife_frechet(moments, reference)
        value, se = jackknife(whole.value, deleted, moments.counts.tolist()).estimate
        low, high = interval(value, se or math.inf, num_groups - 1)
        plain.append(whole.value), corrected.append(value)
        held += low <= truth <= high
    biases = {name: torch.tensor(values, dtype=F64) - truth for name, values in (("plain", plain), ("jackknife", corrected))}
    return {
        "d": d,
        "num_images": num_images,
        "num_groups": num_groups,
        "truth": truth,
        "covered": held / TRIALS,
        **{f"{name}_bias": float(values.mean()) for name, values in biases.items()},
        **{f"{name}_bias_se": float(values.std()) / math.sqrt(TRIALS) for name, values in biases.items()},
    }


def exactness() -> Iterator[dict[str, float | str]]:
    """Yield the error of distances that are known: Gaussians with common eigenvectors, of full rank and not, and of few images."""
    for d, rank in ((2048, 2048), (2048, 1000), (2048, 250)):
        generator = torch.Generator().manual_seed(rank)
        basis = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator)).Q
        one, two = (torch.rand(d, dtype=F64, generator=generator) for _ in range(2))
        one[rank:] = 0
        mean = torch.randn(d, dtype=F64, generator=generator)
        exact = float(mean.square().sum() + (one.sqrt() - two.sqrt()).square().sum())
        found = frechet_distance(torch.zeros(d, dtype=F64), basis * one @ basis.T, mean, basis * two @ basis.T).value
        yield {"case": f"d = {d}, ranks {rank} and {d}", "error": abs(found - exact), "distance": exact}
    few = torch.randn(250, 2048, dtype=F64, generator=torch.Generator().manual_seed(0))
    covariance = few.T.cov()
    found = frechet_distance(few.mean(0), covariance, few.mean(0), covariance).value
    yield {"case": "250 images of 2,048 features against themselves", "error": found, "distance": 0.0}


def seconds() -> dict[str, float]:
    """Return the times of a distance at d = 2,048, N = 10,000, on one core."""
    d, num_images = 2048, 10_000
    variances, generator = spectrum(d), torch.Generator().manual_seed(0)
    x, y = (torch.randn(num_images, d, dtype=F64, generator=generator) * variances.sqrt() for _ in range(2))
    ours, real = Moments(d, 10), Moments(d)
    ours.update(x, torch.arange(num_images) * 10 // num_images)
    real.update(y)
    reference = ReferenceGaussian.of(real)
    low_rank = covariance_factor(x[:1000].T.cov())
    few = ReferenceGaussian(x[:1000].mean(0), low_rank, 1000)
    return {
        "distance": timed(lambda: frechet_distance(ours.mean(), ours.covariance(), real.mean(), real.covariance())),
        "with a cached reference": timed(lambda: frechet_to_reference(ours, reference)),
        "with a cached reference of 1,000 images": timed(lambda: frechet_to_reference(ours, few)),
        "each of the jackknife's": timed(lambda: quick_frechet(ours, reference)),
    }


def timed(call) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[1]


def page(found: dict) -> str:
    """Return the page."""
    rows = "\n".join(
        f"| {row['d']} | {row['num_images']:,} | {row['num_groups']} | {row['truth']:.2f} | {row['covered']:.1%} | "
        f"{row['plain_bias']:+.4f} ± {row['plain_bias_se']:.4f} | {row['jackknife_bias']:+.4f} ± {row['jackknife_bias_se']:.4f} |"
        for row in found["coverage"]
    )
    exact = "\n".join(f"| {row['case']} | {row['distance']:.2f} | {row['error']:.1e} |" for row in found["exact"])
    times = "\n".join(f"| {name} | {value:.2f} |" for name, value in found["seconds"].items())
    return f"""# The statistics of a distance

Made by `{found["command"]}`.

## Intervals and bias

{TRIALS} sets of Gaussian features for each line, with a spectrum i^-1.2, against a reference known exactly. A 95 % interval is Student's, with one
degree of freedom less than there are groups. Covered should be 95 %; of {TRIALS} trials 92 to 98 % is what chance allows.

| d | images | groups | true distance | covered | bias of the plain distance | bias of the jackknife's |
|---|---|---|---|---|---|---|
{rows}

## Exactness

| case | distance | error |
|---|---|---|
{exact}

## Time

Seconds of one core, d = 2,048, 10,000 images.

| | s |
|---|---|
{times}
"""


if __name__ == "__main__":
    main()
