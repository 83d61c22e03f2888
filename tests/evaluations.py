"""Small evaluations, made up rather than measured."""

from __future__ import annotations

from typing import Any

import torch

from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.result import Cost, Evaluation, Summary

FINGERPRINT = "ab" * 32


def protocol(**fields: Any) -> Protocol:
    """Return the protocol of the digits at 20 images in each of two blocks."""
    small = {"num_images": 20, "first_seeds": (0, 20), "jackknife_groups": 5}
    return Protocol(**{**load_protocol("digits").model_dump(), **small, **fields})


def summary(*blocks: float, se: float | None = None) -> Summary:
    """Return a value of these blocks."""
    values = torch.tensor(blocks, dtype=torch.float64)
    return Summary(float(values.mean()), float(values.std()) if len(blocks) > 1 else None, se, blocks)


def evaluation(
    values: dict[str, Summary] | None = None,
    steps: int | None = 1,
    of: Protocol | None = None,
    extractor: str = "digits",
    **fields: Any,
) -> Evaluation:
    """Return an evaluation of `steps` steps, of the given values (FID 3 and 3.5 in two blocks when left out)."""
    of = protocol() if of is None else of
    reference = {"reference": of.reference, "reference_hash": "c" * 64, "extractor": extractor, "fingerprint": FINGERPRINT}
    cost = Cost(steps, steps, ms_per_image=1.5 * (steps or 1), latency_ms=10.0 * (steps or 1), batch_size=500)
    known: dict[str, Any] = {
        "protocol": of.model_dump(mode="json"),
        "protocol_hash": of.hash,
        "views": [
            {
                "view": "digits",
                "extractor": extractor,
                "fingerprint": FINGERPRINT,
                "reference": {**reference, "count": 1797},
            }
        ],
        "num_images": of.num_images,
        "num_blocks": len(of.first_seeds),
        "values": {"fid": summary(3.0, 3.5, se=0.3)} if values is None else values,
        "reference_values": {},
        "skipped": {},
        "warnings": [],
        "cost": cost,
        "seconds": {"generate": 2.0, "features": 0.5},
        "device": "cpu",
        "versions": {"torch": "2.0"},
    }
    return Evaluation(**{**known, **fields})
