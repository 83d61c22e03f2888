"""The views of a protocol, ready to be used: each with its extractor and the statistics of the real images."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Seen
from diffdistill.evaluation.extractors import NetworkExtractor, open_extractor
from diffdistill.evaluation.features import FeatureExtractor
from diffdistill.evaluation.metrics.registry import metric_of
from diffdistill.evaluation.metrics.sample import Metric
from diffdistill.evaluation.protocol import Protocol, View
from diffdistill.evaluation.reference import Reference, check_reference, reference_for
from diffdistill.evaluation.transforms import parse_transform


@dataclass(frozen=True)
class OpenView:
    """A view with what it needs to run.

    Attributes:
        view: of the protocol.
        extractor: sees the images.
        reference: what it saw of the real images.
        metrics: those of the view that are asked for, by name.
    """

    view: View
    extractor: FeatureExtractor
    reference: Reference
    metrics: Mapping[str, Metric]

    @property
    def seen(self) -> Seen:
        """How the images are seen, and what is kept of it."""
        needs = frozenset[str]().union(*(metric.needs for metric in self.metrics.values()))
        return Seen(parse_transform(self.view.transforms), self.extractor, needs)


def open_views(
    protocol: Protocol,
    metrics: Collection[str] = (),
    cache: str | Path | None = None,
    extractors: Mapping[str, FeatureExtractor] | None = None,
    references: Mapping[str, Reference] | None = None,
    device: str | torch.device | None = None,
    weights: str | None = None,
) -> list[OpenView]:
    """Open the extractors of a protocol and the references they are compared with.

    Args:
        protocol: names them.
        metrics: those wanted; empty for all. A view of which none is wanted is not opened.
        cache: folder in which the statistics of embedded real images are kept.
        extractors: by name, those to be used in place of the ones that `open_extractor` makes.
        references: by name of the extractor, those to be used in place of the ones that `reference_for` finds.
        device, weights: as for `open_extractor`.
    Raises:
        UserError: a metric that the protocol does not have, extractors or references that are missing or do not fit.
    """
    if unknown := [name for name in metrics if name not in protocol.metrics]:
        raise UserError(
            f"protocol {protocol.name!r} does not measure {', '.join(unknown)}. It measures: {', '.join(protocol.metrics)}."
        )
    opened = []
    for view in protocol.views:
        wanted = tuple(name for name in view.metrics if not metrics or name in metrics)
        if wanted:
            extractor = (extractors or {}).get(view.extractor) or open_extractor(view, device, weights)
            reference = (references or {}).get(view.extractor) or reference_for(protocol, view, extractor, cache)
            check_reference(reference, protocol, view, extractor)
            logit_scale = getattr(extractor, "logit_scale", None)
            chosen = {name: metric_of(name, protocol.clip_scale, logit_scale, protocol.images_per_prompt) for name in wanted}
            opened.append(OpenView(view, extractor, reference, chosen))
    return opened


def put_aside(views: Sequence[OpenView]) -> None:
    """Move the feature networks to the CPU."""
    _move(views, torch.device("cpu"))


@contextlib.contextmanager
def at_hand(views: Sequence[OpenView], device: torch.device) -> Iterator[None]:
    """Have the feature networks on a device for a while."""
    _move(views, device)
    try:
        yield
    finally:
        put_aside(views)


def _move(views: Sequence[OpenView], device: torch.device) -> None:
    for view in views:
        if isinstance(view.extractor, NetworkExtractor):
            view.extractor.move(device)
