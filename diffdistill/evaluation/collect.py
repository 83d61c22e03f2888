"""One pass over images that feeds every metric: features in fixed blocks, whatever the caller's batches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffdistill.data.shapes import parse_captions
from diffdistill.evaluation.features import DiversityExtractor, FeatureExtractor, Features, ScoringExtractor, TextExtractor
from diffdistill.evaluation.images import check_uint8_images, pixel_statistics
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.moments import Moments, sums_device
from diffdistill.evaluation.shapes_detector import obeyed
from diffdistill.evaluation.transforms import Transform, transform_images
from diffdistill.models.conditioning import Asked

IMAGES_PER_BLOCK = 500
PIXELS_PER_BLOCK = 1 << 25  # fewer large images: 100 MB of bytes wait at most
FEATURE_FIELDS = frozenset({"moments", "features", "logits", "spatial"})


class Seen(NamedTuple):
    """How the images of a pass are seen once: what is done to them, what sees them, and the fields of `Sample` wanted of it."""

    transform: Transform
    extractor: FeatureExtractor
    needs: frozenset[str]


class Collector:
    """Takes uint8 images in batches of any size and returns one `Sample` for each way in which they are seen.

    The extractors always see blocks of the same consecutive images: kernels of another batch size round float32 sums
    differently, and the result would then depend on how the generator was batched.
    """

    def __init__(self, views: Sequence[Seen], groups: Tensor, per_prompt: int = 1):
        """Prepare for len(groups) images.

        Args:
            views: how they are seen.
            groups: int64 (N,), the jackknife group of each image, numbered from 0.
            per_prompt: neighbouring images that share a prompt; they are always seen together.
        """
        self.groups, self.per_prompt = groups, per_prompt
        self.views = [_ViewCollector(view, int(groups.max()) + 1, per_prompt) for view in views]
        self.needs = frozenset[str]().union(*(view.needs for view in views))
        self.waiting: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.captions: list[str] = []
        self.pixels: list[Tensor] = []
        self.obeyed: list[Tensor] = []
        self.count = 0
        self.done = 0

    def add(self, images: Tensor, asked: Asked = None) -> None:
        """Take the next images, uint8 (B, C, H, W), and what they were asked for: classes (B,), B captions or None.

        Raises:
            ValueError: there are more images than were announced, or a caption of the shapes is not of their grammar.
        """
        check_uint8_images(images)
        if self.count + len(images) > len(self.groups):
            raise ValueError(f"{len(self.groups)} images were announced; got {self.count + len(images)} or more.")
        self.count += len(images)
        if "pixels" in self.needs:
            self.pixels.append(pixel_statistics(images))
        if isinstance(asked, Tensor):
            self.labels.append(asked.cpu())
        elif asked is not None:
            self.captions.extend(asked)
            if "obeyed" in self.needs:
                self.obeyed.append(torch.stack(obeyed(images.cpu(), parse_captions(list(asked))), 1))
        self.waiting.append(images)
        block = min(IMAGES_PER_BLOCK, PIXELS_PER_BLOCK // (images.shape[2] * images.shape[3]))
        block = max(1, block // self.per_prompt) * self.per_prompt
        if sum(map(len, self.waiting)) >= block:
            waiting = torch.cat(self.waiting)
            while len(waiting) >= block:
                self._extract(waiting[:block])
                waiting = waiting[block:]
            self.waiting = [waiting]

    def finish(self) -> list[Sample]:
        """Return the sample of each view. Raises ValueError when images are missing."""
        if self.count < len(self.groups):
            raise ValueError(f"{len(self.groups)} images were announced; got {self.count}.")
        rest, self.waiting = torch.cat(self.waiting), []
        if len(rest):
            self._extract(rest)
        labels, pixels, obeys = _joined(self.labels), _joined(self.pixels), _joined(self.obeyed)
        return [view.sample(labels, pixels, obeys) for view in self.views]

    def _extract(self, images: Tensor) -> None:
        part = slice(self.done, self.done + len(images))
        for view in self.views:
            view.add(images, self.groups[part], self.captions[part] if self.captions else None)
        self.done += len(images)


class _ViewCollector:
    """What one view has seen so far."""

    def __init__(self, view: Seen, num_groups: int, per_prompt: int):
        self.transform, self.extractor, self.needs = view
        self.num_groups, self.per_prompt = num_groups, per_prompt
        self.moments: dict[str, Moments] = {}
        self.kept: dict[str, list[Tensor]] = {}

    def add(self, images: Tensor, groups: Tensor, captions: list[str] | None) -> None:
        images = transform_images(images, self.transform)
        check_uint8_images(images, self.extractor.channels, self.extractor.size)
        if self.needs & FEATURE_FIELDS:
            self._take(self.extractor(images), groups)
        if captions is not None and "texts" in self.needs and isinstance(self.extractor, TextExtractor):
            self._keep("texts", self.extractor.texts(captions))
        if "scores" in self.needs and isinstance(self.extractor, ScoringExtractor) and self._can_score(captions):
            self._keep("scores", self.extractor.scores(images, captions or [""] * len(images)))
        if "diversity" in self.needs and isinstance(self.extractor, DiversityExtractor):
            self._keep("diversity", self.extractor.diversity(images.unflatten(0, (-1, self.per_prompt))))

    def _can_score(self, captions: list[str] | None) -> bool:
        return captions is not None or (isinstance(self.extractor, ScoringExtractor) and not self.extractor.reads)

    def _take(self, found: Features, groups: Tensor) -> None:
        for name, values in (("moments", found.features), ("spatial", found.spatial)):
            if name in self.needs and values is not None:
                if name not in self.moments:
                    self.moments[name] = Moments(values.shape[1], self.num_groups, sums_device(values.device))
                self.moments[name].update(values, groups)
        self._keep("features", found.features)
        self._keep("logits", found.logits)

    def _keep(self, name: str, values: Tensor | None) -> None:
        if name in self.needs and values is not None:
            self.kept.setdefault(name, []).append(values)  # on its device: a copy of each block would wait for it

    def sample(self, labels: Tensor | None, pixels: Tensor | None, obeys: Tensor | None) -> Sample:
        common = {"labels": labels, "pixels": pixels, "obeyed": obeys}
        fields: dict[str, Any] = {name: value for name, value in common.items() if name in self.needs}
        return Sample(**fields | self.moments | {name: torch.cat(parts).cpu() for name, parts in self.kept.items()})


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
