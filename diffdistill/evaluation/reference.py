"""Statistics of real images, with the provenance that decides whether they may be compared with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.digits import digits
from diffdistill.data.shapes import shapes
from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.collect import collect
from diffdistill.evaluation.features import FeatureExtractor
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.protocol import Protocol
from diffdistill.files import sha256, write_atomic, write_json


class RealImages(NamedTuple):
    """Real images, uint8 (N, C, H, W), and their classes, int64 (N,), or their captions."""

    images: Tensor
    labels: Tensor | None = None
    captions: list[str] | None = None


SAVED = ("features", "logits", "labels", "pixels", "texts", "obeyed")  # fields of a `Sample` beside its moments
MOMENTS = ("moments", "spatial")


@dataclass(frozen=True)
class Reference:
    """What is known of the real images: their sample (one jackknife group) and where it comes from.

    provenance holds `reference`, `reference_hash` (of the protocol), `extractor`, `fingerprint` and `count`.
    """

    sample: Sample
    provenance: dict[str, Any]


def all_digits() -> RealImages:
    """Return all 1,797 embedded digits, quantised by the rule that generated images go through."""
    real = digits()
    return RealImages(to_uint8(real.images), real.labels)


def drawn_shapes() -> RealImages:
    """Return NUM_DRAWN shapes that no training draws, held-out pairs among them, with their captions."""
    drawn = shapes(NUM_DRAWN, seed=1, only_trained=False)
    return RealImages(to_uint8(drawn.images), captions=drawn.scenes.captions())


NUM_DRAWN = 10_000
REFERENCES: dict[str, Callable[[], RealImages]] = {"digits-all": all_digits, "shapes-drawn": drawn_shapes}


def _provenance(protocol: Protocol, extractor: FeatureExtractor) -> dict[str, Any]:
    return {
        "reference": protocol.reference,
        "reference_hash": protocol.reference_hash,
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
    }


def build_reference(protocol: Protocol, extractor: FeatureExtractor) -> Reference:
    """Compute the statistics of the protocol's real images (well under a second for the digits).

    Raises:
        UserError: the protocol names a set of real images that is not in REFERENCES, or another extractor.
    """
    if protocol.reference not in REFERENCES:
        raise unknown_name("reference", protocol.reference, REFERENCES, f"protocol {protocol.name!r}")
    check_extractor(protocol, extractor)
    real = REFERENCES[protocol.reference]()
    provenance = {**_provenance(protocol, extractor), "count": len(real.images)}
    return Reference(collect(extractor, *real), provenance)


def check_extractor(protocol: Protocol, extractor: FeatureExtractor) -> None:
    """Refuse, with a UserError, an extractor other than the one the protocol names."""
    if extractor.name != protocol.extractor:
        raise UserError(
            f"protocol {protocol.name!r} is for extractor {protocol.extractor!r}; got {extractor.name!r}. "
            "Give the protocol that extractor's name, which changes its hash."
        )


def check_reference(reference: Reference, protocol: Protocol, extractor: FeatureExtractor) -> None:
    """Refuse reference statistics made for other images, with another extractor or with other weights.

    Raises:
        UserError: naming each field that differs, with both values.
    """
    check_extractor(protocol, extractor)
    wanted = _provenance(protocol, extractor)
    differing = [
        f"{key}: statistics {reference.provenance.get(key)!r}, wanted {value!r}"
        for key, value in wanted.items()
        if reference.provenance.get(key) != value
    ]
    if differing:
        raise UserError(
            "the reference statistics do not fit this evaluation ("
            + "; ".join(differing)
            + "). Build them again with this protocol and extractor."
        )


def save_reference(reference: Reference, path: str | Path) -> Path:
    """Write PATH (npz) and PATH with suffix .json (provenance and the sha256 of the npz), each atomically."""
    path = Path(path)
    sample = reference.sample
    states = {name: moments.state() for name in MOMENTS if (moments := getattr(sample, name)) is not None}
    tensors = {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    fields = {key: getattr(sample, key) for key in SAVED}
    tensors |= {key: value for key, value in fields.items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value.numpy() for key, value in tensors.items()})
    write_atomic(path, buffer.getvalue())
    write_json(path.with_suffix(".json"), {"schema": 1, "sha256": sha256(path), **reference.provenance})
    return path


def load_reference(path: str | Path, protocol: Protocol, extractor: FeatureExtractor) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        UserError: the sidecar is missing, the npz is not the one it describes, or either does not fit the protocol and
            extractor.
    """
    path = Path(path)
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        raise UserError(f"reference statistics need {path.name} and {sidecar.name} side by side in {path.parent}.")
    provenance = json.loads(sidecar.read_text())
    if provenance.pop("schema", None) != 1 or provenance.pop("sha256", None) != sha256(path):
        raise UserError(f"{path} is not the file that {sidecar.name} describes. Delete both; they are built again.")
    with np.load(path) as stored:
        tensors = {key: torch.from_numpy(stored[key]) for key in stored.files}
    moments = {name: _moments(name, tensors) for name in MOMENTS}
    fields = {key: tensors.get(key) for key in SAVED}
    reference = Reference(Sample(**moments, **fields), provenance)
    check_reference(reference, protocol, extractor)
    return reference


def _moments(name: str, tensors: Mapping[str, Tensor]) -> Moments | None:
    """Return the moments stored as NAME.key, None where there are none."""
    state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return Moments.from_state(state) if state else None


def reference_for(protocol: Protocol, extractor: FeatureExtractor, cache: str | Path | None = None) -> Reference:
    """Return the protocol's reference, from the cache folder when it is there, else built and (given a folder) kept."""
    if cache is None:
        return build_reference(protocol, extractor)
    name = f"{protocol.reference}-{protocol.reference_hash[:12]}-{extractor.fingerprint[:12]}.npz"
    path = Path(cache) / name
    if path.is_file() and path.with_suffix(".json").is_file():
        return load_reference(path, protocol, extractor)
    reference = build_reference(protocol, extractor)
    save_reference(reference, path)
    return reference
