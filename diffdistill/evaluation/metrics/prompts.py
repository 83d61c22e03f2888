"""How much the images of one prompt differ: what few-step students lose first, and no distance to real images shows.

Source: Zhang et al. 2018 (arXiv:1801.03924) for LPIPS, whose mean over the pairs of a prompt DMD2 (arXiv:2405.14867) reports.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffdistill.evaluation.metrics.captions import mean_value
from diffdistill.evaluation.metrics.distances import unit_rows
from diffdistill.evaluation.metrics.sample import Sample, Value


def prompt_spread(features: Tensor, per_prompt: int) -> Tensor:
    """Return 1 - cos(f_i, f_j), averaged over all pairs of the K images of a prompt, float64 (N / K,).

    With unit vectors u the mean of the pairs' cosines is (|sum u|^2 - K) / (K (K - 1)).

    Args:
        features: (N, d), images of a prompt side by side. Taken to float64.
        per_prompt: K, two or more, a divisor of N.
    Raises:
        ValueError: another K.
    """
    if per_prompt < 2 or len(features) % per_prompt:
        raise ValueError(
            f"two or more images of each prompt are compared; got {len(features)} images, {per_prompt} of a prompt."
        )
    total = unit_rows(features.double()).unflatten(0, (-1, per_prompt)).sum(1)
    return 1 - (total.square().sum(1) - per_prompt) / (per_prompt * (per_prompt - 1))


@dataclass(frozen=True)
class PromptSpreadMetric:
    """`prompt_diversity`: the mean of `prompt_spread` over the prompts; 0 where all images of a prompt are one.

    Attributes:
        per_prompt: images of a prompt, of the protocol.
    """

    per_prompt: int = 1
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error over prompts."""
        return {"prompt_diversity": mean_value(prompt_spread(sample.tensor("features"), self.per_prompt))}


@dataclass(frozen=True)
class LpipsDiversityMetric:
    """`lpips_diversity`: the mean LPIPS over the pairs of a prompt's images, averaged over the prompts."""

    needs: frozenset[str] = frozenset({"diversity"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error over prompts."""
        return {"lpips_diversity": mean_value(sample.tensor("diversity"))}
