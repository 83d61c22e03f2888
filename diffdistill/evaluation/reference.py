"""Statistics of real images, with the provenance that decides whether they may be compared with."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.data.digits import digits
from diffdistill.data.shapes import shapes
from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Collector, Seen
from diffdistill.evaluation.features import FeatureExtractor
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.protocol import Protocol, View
from diffdistill.evaluation.transforms import parse_transform
from diffdistill.files import CACHE, sha256, write_atomic, write_json
from diffdistill.models.conditioning import Asked

EVERYTHING = frozenset(field.name for field in fields(Sample))
FOLDER_VARIABLE = "DIFFDISTILL_REFERENCES"
LAYOUT = 2  # of the file; raised when it changes, so that older files are not found
NONE = "none"  # the reference of a protocol that compares with no real images


class RealImages(NamedTuple):
    """Real images, uint8 (N, C, H, W), and their classes, int64 (N,), or their captions."""

    images: Tensor
    asked: Asked = None


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
    return RealImages(to_uint8(drawn.images), drawn.scenes.captions())


NUM_DRAWN = 10_000
REFERENCES: dict[str, Callable[[], RealImages]] = {"digits-all": all_digits, "shapes-drawn": drawn_shapes}


def references_folder() -> Path:
    """Return where statistics are kept: DIFFDISTILL_REFERENCES, or ~/.cache/diffdistill/references."""
    return Path(os.environ.get(FOLDER_VARIABLE) or CACHE / "references")


def provenance(protocol: Protocol, view: View, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return what statistics must say of themselves to be used for a view."""
    return {
        "reference": protocol.reference,
        "reference_hash": protocol.reference_hash(view),
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
    }


def measure(
    batches: Iterable[tuple[Tensor, Asked]],
    count: int,
    protocol: Protocol,
    views: Sequence[tuple[View, FeatureExtractor, frozenset[str]]],
    source: dict[str, Any] | None = None,
) -> list[Reference]:
    """Return the reference of each view, from one pass over real images.

    Args:
        batches: uint8 (B, C, H, W), with their classes (B,), their captions, or None.
        count: number of images in all.
        protocol: whose reference they are; its transforms of real images must have been applied.
        views: each with its extractor and the fields of `Sample` to be kept.
        source: further facts for the provenance, e.g. the folder.
    Raises:
        UserError: an extractor that is not the view's.
    """
    for view, extractor, _ in views:
        check_extractor(protocol, view, extractor)
    seen = [Seen(parse_transform(view.transforms), extractor, needs) for view, extractor, needs in views]
    collector = Collector(seen, torch.zeros(count, dtype=torch.int64))
    for images, asked in batches:
        collector.add(images, asked)
    samples = zip(views, collector.finish(), strict=True)
    return [
        Reference(sample, {**provenance(protocol, view, extractor), "count": count, **(source or {})})
        for (view, extractor, _), sample in samples
    ]


def build_reference(protocol: Protocol, view: View, extractor: FeatureExtractor) -> Reference:
    """Compute the statistics of a protocol's embedded real images for a view (well under a second for the digits).

    Raises:
        UserError: the protocol's real images are not embedded, or another extractor than the view's.
    """
    if protocol.reference not in REFERENCES:
        raise _absent(protocol, view, extractor)
    real = REFERENCES[protocol.reference]()
    return measure([real], len(real.images), protocol, [(view, extractor, EVERYTHING)])[0]


def _absent(protocol: Protocol, view: View, extractor: FeatureExtractor) -> UserError:
    about = f" {protocol.about}" if protocol.about else ""
    return UserError(
        f"protocol {protocol.name!r} compares with {protocol.reference!r}, of which there are no statistics for {view} "
        f"(weights {extractor.fingerprint[:12]}) in {references_folder()}. Make them with "
        f"`diffdistill stats IMAGES --protocol {protocol.name}`, or take those of another package with "
        f"`diffdistill stats FILE --protocol {protocol.name} --format FORMAT`.{about}"
    )


def check_extractor(protocol: Protocol, view: View, extractor: FeatureExtractor) -> None:
    """Refuse, with a UserError, an extractor other than the one the view names; its own with random weights will do."""
    named = ":" in view.extractor or extractor.name.startswith(f"{view.extractor}-random-")
    if extractor.name != view.extractor and not named:
        raise UserError(
            f"protocol {protocol.name!r} is for extractor {view.extractor!r}; got {extractor.name!r}. "
            "Give the protocol that extractor's name, which changes its hash."
        )


def check_reference(reference: Reference, protocol: Protocol, view: View, extractor: FeatureExtractor) -> None:
    """Refuse reference statistics made for other images, with another extractor or resize, or with other weights.

    Raises:
        UserError: naming each field that differs, with both values.
    """
    check_extractor(protocol, view, extractor)
    wanted = provenance(protocol, view, extractor)
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
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value.numpy() for key, value in reference.sample.tensors().items()})  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())
    write_json(path.with_suffix(".json"), {"schema": 1, "sha256": sha256(path), **reference.provenance})
    return path


def load_reference(path: str | Path, protocol: Protocol, view: View, extractor: FeatureExtractor) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        UserError: the sidecar is missing, the npz is not the one it describes, or either does not fit the protocol and
            extractor.
    """
    path = Path(path)
    sidecar = path.with_suffix(".json")
    if not path.is_file() or not sidecar.is_file():
        raise UserError(f"reference statistics need {path.name} and {sidecar.name} side by side in {path.parent}.")
    facts = json.loads(sidecar.read_text())
    if facts.pop("schema", None) != 1 or facts.pop("sha256", None) != sha256(path):
        raise UserError(f"{path} is not the file that {sidecar.name} describes. Delete both, and make them again.")
    with np.load(path) as stored:
        tensors = {key: torch.from_numpy(stored[key]) for key in stored.files}
    reference = Reference(Sample.from_tensors(tensors), facts)
    check_reference(reference, protocol, view, extractor)
    return reference


def reference_path(protocol: Protocol, view: View, extractor: FeatureExtractor, folder: str | Path | None = None) -> Path:
    """Return where the statistics of a view are kept; protocols that differ elsewhere share them."""
    decided_by = f"{protocol.reference_hash(view)[:12]}-{extractor.fingerprint[:12]}"
    name = f"{protocol.reference}-{decided_by}-{LAYOUT}.npz"
    return Path(folder or references_folder()) / name


def reference_for(protocol: Protocol, view: View, extractor: FeatureExtractor, cache: str | Path | None = None) -> Reference:
    """Return the reference of a view: from its file where there is one, else built of embedded images and kept.

    Args:
        protocol, view, extractor: what it is for.
        cache: folder of the files; None neither reads nor keeps those of embedded images.
    Raises:
        UserError: statistics that are missing or do not fit; the message says how to make them.
    """
    if protocol.reference == NONE:
        return Reference(Sample(), {**provenance(protocol, view, extractor), "count": 0})
    if protocol.reference in REFERENCES and cache is None:
        return build_reference(protocol, view, extractor)
    path = reference_path(protocol, view, extractor, cache)
    if path.is_file() and path.with_suffix(".json").is_file():
        return load_reference(path, protocol, view, extractor)
    reference = build_reference(protocol, view, extractor)
    save_reference(reference, path)
    return reference
