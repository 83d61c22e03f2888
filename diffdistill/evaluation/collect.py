"""One pass over images that feeds every metric: features in fixed blocks, whatever the caller's batches are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.data.shapes import parse_captions
from diffdistill.evaluation.features import FeatureExtractor, Features, TextExtractor
from diffdistill.evaluation.images import check_uint8_images, pixel_statistics
from diffdistill.evaluation.metrics.sample import Sample
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.shapes_detector import obeyed

IMAGES_PER_BLOCK = 500
LARGE = frozenset({"features", "spatial"})  # fields of a `Sample` that are left out where no metric reads them


class Collector:
    """Takes uint8 images in batches of any size and returns the `Sample` that they make.

    The extractor always sees blocks of IMAGES_PER_BLOCK consecutive images: kernels of another batch size round float32
    sums differently, and the result would then depend on how the generator was batched.
    """

    def __init__(self, extractor: FeatureExtractor, groups: Tensor, keep: frozenset[str] = LARGE):
        """Prepare for len(groups) images.

        Args:
            extractor: what sees the images.
            groups: int64 (N,), the jackknife group of each image, numbered from 0.
            keep: fields of `Sample` that are wanted; those of LARGE that are not among them will be None.
        """
        self.extractor, self.groups, self.keep = extractor, groups, keep
        self.moments = Moments(extractor.dim, int(groups.max()) + 1)
        self.spatial: Moments | None = None
        self.waiting: list[Tensor] = []
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.pixels: list[Tensor] = []
        self.captions: list[str] = []
        self.obeyed: list[Tensor] = []
        self.count = 0

    def add(self, images: Tensor, captions: Sequence[str] | None = None) -> None:
        """Take the next images, uint8 (B, C, H, W), and their captions of the shapes, if they have any.

        Raises:
            ValueError: there are more images than were announced, or a caption is not of the grammar.
        """
        check_uint8_images(images, self.extractor.channels, self.extractor.size)
        if self.count + len(images) > len(self.groups):
            raise ValueError(f"{len(self.groups)} images were announced; got {self.count + len(images)} or more.")
        self.count += len(images)
        self.pixels.append(pixel_statistics(images))
        if captions is not None:
            self.captions.extend(captions)
            self.obeyed.append(torch.stack(obeyed(images.cpu(), parse_captions(list(captions))), 1))
        self.waiting.append(images)
        waiting = torch.cat(self.waiting)
        while len(waiting) >= IMAGES_PER_BLOCK:
            self._extract(waiting[:IMAGES_PER_BLOCK])
            waiting = waiting[IMAGES_PER_BLOCK:]
        self.waiting = [waiting]

    def finish(self, labels: Tensor | None) -> Sample:
        """Return the sample; labels are int64 (N,) or None. Raises ValueError when images are missing."""
        if self.count < len(self.groups):
            raise ValueError(f"{len(self.groups)} images were announced; got {self.count}.")
        for rest in self.waiting:
            if len(rest):
                self._extract(rest)
        self.waiting = []
        features = torch.cat(self.features) if self.features else None
        logits = torch.cat(self.logits) if self.logits else None
        obeys = torch.cat(self.obeyed) if self.obeyed else None
        return Sample(self.moments, features, logits, labels, torch.cat(self.pixels), self._texts(), obeys, self.spatial)

    def _texts(self) -> Tensor | None:
        """Return the vectors of the captions, (N, d), or None without captions or without an extractor that reads."""
        if not self.captions or not isinstance(self.extractor, TextExtractor):
            return None
        starts = range(0, len(self.captions), IMAGES_PER_BLOCK)
        return torch.cat([self.extractor.texts(self.captions[k : k + IMAGES_PER_BLOCK]).cpu() for k in starts])

    def _extract(self, images: Tensor) -> None:
        result: Features = self.extractor(images)
        features, done = result.features.cpu(), self.moments.count
        groups = self.groups[done : done + len(images)]
        self.moments.update(features, groups)
        if "features" in self.keep:
            self.features.append(features)
        if "spatial" in self.keep and result.spatial is not None:
            if self.spatial is None:
                self.spatial = Moments(result.spatial.shape[1], self.moments.num_groups)
            self.spatial.update(result.spatial.cpu(), groups)
        if result.logits is not None:
            self.logits.append(result.logits.cpu())


def collect(
    extractor: FeatureExtractor, images: Tensor, labels: Tensor | None = None, captions: Sequence[str] | None = None
) -> Sample:
    """Return the sample of one tensor of uint8 images (N, C, H, W), its moments in a single group."""
    collector = Collector(extractor, torch.zeros(len(images), dtype=torch.int64))
    collector.add(images, captions)
    return collector.finish(labels)
