"""`diffdistill stats`: the statistics of a protocol's real images, from the images or from another package's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.evaluation.collect import FEATURE_FIELDS
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import FeatureExtractor
from diffdistill.evaluation.image_sources import open_images
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.protocol import Protocol, View, load_protocol
from diffdistill.evaluation.reference import NONE, REFERENCES, Reference, measure, provenance, reference_path, save_reference
from diffdistill.evaluation.statistics_files import Format, Pipeline, read_statistics
from diffdistill.evaluation.transforms import parse_transform, transform_images
from diffdistill.files import sha256
from diffdistill.models.conditioning import Asked

IMAGES_PER_BATCH = 100

Counted = Callable[[int, int], None]


class Comparing(NamedTuple):
    """A view whose metrics compare with real images, and the fields of `Sample` that they read of them."""

    view: View
    extractor: FeatureExtractor
    needs: frozenset[str]


def make_statistics(
    source: str | Path,
    protocol: str | Path,
    format: Format | None = None,
    weights: str | None = None,
    output: str | Path | None = None,
    progress: Counted | None = None,
) -> list[Path]:
    """Write the statistics that a protocol compares with; `eval` finds them by the protocol and the weights.

    Args:
        source: a folder, zip or npz of the real images; or with a format, a file of another package.
        protocol: its name or file.
        format: of the file, one of `statistics_files.READERS`.
        weights: as for `open_extractor`.
        output: folder; None for the store of references.
        progress: called with (images done, images in all).
    Returns:
        The files written, one for each view that compares with real images and that the source is good for.
    Raises:
        UserError: a protocol that compares with no real images or with embedded ones; images or a file that cannot be read, or that
            another network or resize made.
    """
    chosen = load_protocol(protocol)
    if chosen.reference == NONE or chosen.reference in REFERENCES:
        kind = "no real images" if chosen.reference == NONE else f"embedded images ({chosen.reference})"
        raise UserError(f"protocol {chosen.name!r} compares with {kind}; there is nothing to make for it.")
    views = [view for view in chosen.views if needs_of(view)]
    if format is not None:
        made = _imported(Path(source), chosen, views, format, weights)
    else:
        opened = [Comparing(view, open_extractor(view, weights=weights), needs_of(view)) for view in views]
        made = list(zip(opened, _measured(source, chosen, opened, progress), strict=True))
    return [save_reference(reference, reference_path(chosen, each.view, each.extractor, output)) for each, reference in made]


def needs_of(view: View) -> frozenset[str]:
    """Return what the metrics of a view read of the real images; nothing where none compares with them."""
    return frozenset[str]().union(*(METRICS[name].needs for name in view.metrics if not METRICS[name].absolute))


def _measured(source: str | Path, protocol: Protocol, views: Sequence[Comparing], progress: Counted | None) -> list[Reference]:
    images = open_images(source, protocol.reference_transforms)

    def batches() -> Iterator[tuple[Tensor, Asked]]:
        done = 0
        for batch in images.batches(IMAGES_PER_BATCH):
            yield batch, None
            done += len(batch)
            if progress is not None:
                progress(done, len(images))

    found = measure(batches(), len(images), protocol, views, {"source": str(source)})
    return [Reference(reference.sample.as_reference(), reference.provenance) for reference in found]


def _imported(
    path: Path, protocol: Protocol, views: Sequence[View], format: Format, weights: str | None
) -> list[tuple[Comparing, Reference]]:
    """Return the views that a file is good for, and what it says; raises what is wrong where it is good for none."""
    made, wrong = [], []
    for view in views:
        each = Comparing(view, open_extractor(view, weights=weights), needs_of(view))
        try:
            made.append((each, _import(path, protocol, each, format)))
        except UserError as error:
            wrong.append(error)
    if not made:
        raise wrong[0]
    return made


def _import(path: Path, protocol: Protocol, each: Comparing, format: Format) -> Reference:
    view, extractor, needs = each
    if view.transforms:
        raise UserError(
            f"{path}: no format of statistics is of images after {', '.join(view.transforms)}. Make them from images."
        )
    stored = read_statistics(path, Pipeline(view.extractor, view.resize), extractor.dim, format)
    from_images = format == "adm" and "features" in needs
    sample = Sample(
        moments=ReferenceGaussian.from_covariance(stored.mean, stored.covariance, stored.count),
        features=_features_of(path, each) if from_images else stored.features,
        spatial=None if stored.spatial is None else ReferenceGaussian.from_covariance(*stored.spatial, stored.count),
    )
    if missing := sample.missing(needs & FEATURE_FIELDS):
        raise UserError(
            f"{path} holds no {' and '.join(missing)}, which {', '.join(view.metrics)} read. Make them from images."
        )
    facts = {"count": stored.count, "source": str(path), "format": format, "source_sha256": sha256(path)}
    return Reference(sample, {**provenance(protocol, view, extractor), **facts})


def _features_of(path: Path, each: Comparing) -> Tensor:
    """Return the features of the images in a file of ADM."""
    transform = parse_transform(each.view.transforms)
    batches = open_images(path).batches(IMAGES_PER_BATCH)
    return torch.cat([each.extractor(transform_images(batch, transform)).features.cpu() for batch in batches])
