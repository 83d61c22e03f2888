"""Metrics on what one pass over the images leaves behind, each saying what it needs.

The functions take tensors and are tested against closed forms; the final classes at the end apply them to a `Sample`
and its reference. All is float64: float32 in the square root of a covariance product is off by 0.06 at d = 2048.

Sources: Heusel et al. 2017 (arXiv:1706.08500) for the Frechet distance, Binkowski et al. 2018 (arXiv:1801.01401) for
the kernel distance, Kynkaanniemi et al. 2019 (arXiv:1904.06991) for precision and recall, Busing, Meijer and van der
Leeden 1999 (Statistics and Computing 9) for the jackknife with unequal groups.
"""

from __future__ import annotations

import math
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.evaluation.moments import Moments

ROWS_PER_BLOCK = 1024


class Value(typing.NamedTuple):
    """A number and its standard error, None where the estimator offers none."""

    value: float
    se: float | None = None


@dataclass(frozen=True)
class Sample:
    """What one pass over N images leaves for the metrics.

    Attributes:
        moments: of the features, in jackknife groups of neighbouring images.
        features: float32 (N, d), or None when no metric asked for them.
        logits: float32 (N, K), or None when the extractor is no classifier.
        labels: int64 (N,), the classes asked for, or None when unknown.
        pixels: float64 (N, 2), see `images.pixel_statistics`.
        texts: float32 (N, d), the vectors of the captions asked for, or None without captions or an extractor that reads them.
        obeyed: bool (N, 4), the parts of its caption that an image obeys, see `shapes_detector.Obeyed`, or None.
    """

    moments: Moments
    features: Tensor | None
    logits: Tensor | None
    labels: Tensor | None
    pixels: Tensor
    texts: Tensor | None = None
    obeyed: Tensor | None = None


class Metric(typing.Protocol):
    """Named values of a sample against a reference; `needs` lists the fields of `Sample` that must not be None."""

    needs: frozenset[str]
    absolute: bool  # True: the reference is not used, so the same figure of the reference can stand beside it

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the values by name; `seed` fixes every random choice of the metric."""
        ...


# --- Frechet distance


class Frechet(typing.NamedTuple):
    """The squared Frechet distance and its two parts, value = mean_term + covariance_term, none below zero."""

    value: float
    mean_term: float
    covariance_term: float


def covariance_factor(covariance: Tensor) -> Tensor:
    """Return F with F F' = covariance, from the eigendecomposition.

    Eigenvalues that rounding alone explains (at most d eps of the largest) count as zero, which keeps the distance
    right when there are fewer samples than dimensions: their square roots would be large against them.

    Args:
        covariance: float64 (d, d), symmetric, positive semi-definite up to rounding.
    Returns:
        float64 (d, d).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    floor = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return vectors * torch.where(values > floor, values, 0.0).sqrt()


def frechet_from_factors(mean_1: Tensor, factor_1: Tensor, mean_2: Tensor, factor_2: Tensor) -> Frechet:
    """Return |m1 - m2|^2 + |F1|^2 + |F2|^2 - 2 |F1' F2|_*, norms Frobenius and nuclear.

    The singular values of F1' F2 are the roots of the eigenvalues of C1 C2, so this is the usual trace formula; it is
    the least |F1 - F2 Q|^2 over rotations Q and so never negative (what rounding leaves below zero is cut).

    Args:
        mean_1, mean_2: float64 (d,).
        factor_1, factor_2: float64 (d, any), F F' the covariance.
    """
    mean_term = (mean_1 - mean_2).square().sum()
    cross = torch.linalg.svdvals(factor_1.T @ factor_2).sum()
    covariance_term = (factor_1.square().sum() + factor_2.square().sum() - 2 * cross).clamp(min=0)
    return Frechet(float(mean_term + covariance_term), float(mean_term), float(covariance_term))


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Frechet:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians; means (d,), covariances (d, d)."""
    return frechet_from_factors(
        mean_1.double(), covariance_factor(covariance_1), mean_2.double(), covariance_factor(covariance_2)
    )


# --- Jackknife


def jackknife(whole: float, parts: Sequence[float], counts: Sequence[int]) -> Value:
    """Return the estimate with its 1/N bias removed, and its standard error, by deleting one group at a time.

    For G equal groups the value is G whole - (G - 1) mean(parts) and the variance (G - 1) mean((parts - their mean)^2).

    Args:
        whole: the estimate from all samples.
        parts: the estimate without group g, for each of G groups.
        counts: the size of each group, all positive.
    Raises:
        ValueError: fewer than two groups, an empty group, or lengths that differ.
    Source: Busing et al. 1999, Eq. 5 and 6.
    """
    if len(parts) < 2 or len(parts) != len(counts) or min(counts) < 1:
        raise ValueError(
            f"the jackknife needs two or more groups, none empty; got {len(parts)} estimates and counts {list(counts)[:10]}."
        )
    theta = torch.tensor(parts, dtype=torch.float64)
    sizes = torch.tensor(counts, dtype=torch.float64)
    h = sizes.sum() / sizes
    value = len(parts) * whole - ((1 - 1 / h) * theta).sum()
    pseudo = h * whole - (h - 1) * theta
    variance = ((pseudo - value).square() / (h - 1)).mean()
    return Value(float(value), math.sqrt(float(variance)))


def jackknife_frechet(moments: Moments, mean: Tensor, factor: Tensor) -> tuple[Frechet, Value]:
    """Return the Frechet distance of grouped moments to a fixed reference, plain and corrected by the jackknife.

    Args:
        moments: of the sample, in two or more groups.
        mean, factor: of the reference, float64 (d,) and (d, d).
    """

    def distance(part: Moments) -> Frechet:
        return frechet_from_factors(part.mean(), covariance_factor(part.covariance()), mean, factor)

    whole = distance(moments)
    parts = [distance(moments.without(group)).value for group in range(moments.num_groups)]
    return whole, jackknife(whole.value, parts, moments.counts.tolist())


# --- Kernel distance


def polynomial_mmd2(x: Tensor, y: Tensor, scale: float | None = None) -> float:
    """Return the unbiased squared MMD under the kernel (x.y / scale + 1)^3; it can fall below zero.

    Args:
        x: (N, d). y: (M, d). Taken to float64.
        scale: None is d, the published choice.
    """
    x, y = x.double(), y.double()
    scale = x.shape[1] if scale is None else scale

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / scale + 1) ** 3

    def off_diagonal_mean(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))

    return float(off_diagonal_mean(kernel(x, x)) + off_diagonal_mean(kernel(y, y)) - 2 * kernel(x, y).mean())


def kernel_distance(
    x: Tensor, y: Tensor, num_subsets: int, subset_size: int, seed: int, scale: float | None = None
) -> tuple[float, float]:
    """Return mean and standard deviation of `polynomial_mmd2` over seeded subsets drawn without replacement.

    The subset size is capped by the smaller set. The deviation is between subsets and no standard error: they overlap.
    """
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise ValueError(f"the kernel distance needs two samples on each side; got {len(x)} and {len(y)}.")
    generator = torch.Generator().manual_seed(seed)

    def subset(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:size]]

    found = [polynomial_mmd2(subset(x), subset(y), scale) for _ in range(num_subsets)]
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


# --- Precision and recall


def _distance_blocks(x: Tensor, y: Tensor) -> typing.Iterator[Tensor]:
    """Yield squared distances of blocks of rows of x to all of y, float64 (rows, M)."""
    y_norms = y.square().sum(1)
    for rows in x.split(ROWS_PER_BLOCK):
        yield (rows.square().sum(1, keepdim=True) + y_norms - 2 * rows @ y.T).clamp(min=0)


def neighbour_radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance of each row of x, float64 (N, d), to its k-th nearest other row, (N,)."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distance_blocks(x, x)])


def coverage(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Return the share of points, (N, d), within the squared radius, (M,), of at least one centre, (M, d)."""
    inside = [(block <= radii).any(1) for block in _distance_blocks(points, centres)]
    return float(torch.cat(inside).double().mean())


def precision_recall(sample: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of samples inside the reference's k-nearest-neighbour balls, and the reverse.

    Args:
        sample: (N, d). reference: (M, d). Both longer than k; taken to float64.
    """
    if min(len(sample), len(reference)) <= k:
        raise ValueError(f"precision and recall need more than k={k} images; got {len(sample)} and {len(reference)}.")
    x, y = sample.double(), reference.double()
    return coverage(x, y, neighbour_radii(y, k)), coverage(y, x, neighbour_radii(x, k))


def seeded_subset(x: Tensor, size: int, seed: int) -> Tensor:
    """Return `size` rows of x drawn without replacement in their old order, or x itself when it is no longer."""
    if len(x) <= size:
        return x
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]
    return x[chosen.sort().values]


# --- Labels


def label_accuracy(logits: Tensor, labels: Tensor) -> Value:
    """Return the share of images whose class by the classifier, logits (N, K), is the one asked for, labels (N,)."""
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"one label per image: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}.")
    share = float((logits.argmax(1) == labels).double().mean())
    return Value(share, math.sqrt(share * (1 - share) / len(labels)))


def within_class_variance(features: Tensor, labels: Tensor) -> float:
    """Return the trace of the unbiased covariance inside each class, averaged over the classes with two images or more.

    Args:
        features: (N, d), taken to float64. labels: int64 (N,).
    """
    classes = [features[labels == label].double() for label in labels.unique().tolist()]
    traces = [members.var(0).sum() for members in classes if len(members) > 1]
    if not traces:
        raise ValueError("within-class variance needs a class with two images or more.")
    return float(torch.stack(traces).mean())


# --- The metrics a protocol can name


@dataclass(frozen=True)
class FrechetMetric:
    """`fid`: Frechet distance, lower is better; `fid_jackknife`: the same without its 1/N bias, with standard error."""

    needs: frozenset[str] = frozenset({"moments"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return fid (its se is the jackknife's) and fid_jackknife; warns when images are fewer than dimensions."""
        smallest = min(sample.moments.count, reference.moments.count)
        if smallest <= sample.moments.dim:
            warnings.warn(
                f"{smallest} images for {sample.moments.dim} features: the covariance is singular and the "
                "Frechet distance mostly bias.",
                stacklevel=2,
            )
        factor = covariance_factor(reference.moments.covariance())
        whole, corrected = jackknife_frechet(sample.moments, reference.moments.mean(), factor)
        return {"fid": Value(whole.value, corrected.se), "fid_jackknife": corrected}


@dataclass(frozen=True)
class KernelMetric:
    """`kid`: mean over subsets of the unbiased squared kernel distance; `kid_subset_sd`: its spread over them.

    normalised puts the mean squared norm of the reference's features in the place of d in the kernel. The published form
    suits features of about unit size; with larger ones the cubic term rules and the estimate is mostly noise.
    """

    normalised: bool = False
    num_subsets: int = 50
    subset_size: int = 1000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return kid and kid_subset_sd."""
        scale = float(reference.features.double().square().sum(1).mean()) if self.normalised else None
        mean, spread = kernel_distance(sample.features, reference.features, self.num_subsets, self.subset_size, seed, scale)
        return {"kid": Value(mean), "kid_subset_sd": Value(spread)}


@dataclass(frozen=True)
class PrecisionRecallMetric:
    """`precision` and `recall` with k = 3, on equal numbers of both sets: recall grows with the number of samples."""

    k: int = 3
    max_images: int = 10_000
    needs: frozenset[str] = frozenset({"features"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return precision and recall on seeded subsets of the size of the smaller set, at most `max_images`."""
        size = min(self.max_images, len(sample.features), len(reference.features))
        sets = (seeded_subset(side.features, size, seed) for side in (sample, reference))
        precision, recall = precision_recall(*sets, k=self.k)
        return {"precision": Value(precision), "recall": Value(recall)}


@dataclass(frozen=True)
class AccuracyMetric:
    """`accuracy`: the share of images that the extractor's own classifier puts into the class asked for."""

    needs: frozenset[str] = frozenset({"logits", "labels"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return accuracy with its binomial standard error."""
        return {"accuracy": label_accuracy(sample.logits, sample.labels)}


@dataclass(frozen=True)
class DiversityMetric:
    """`diversity`: feature variance within a class over that of the reference; 1 is as diverse as real, 0 collapsed."""

    needs: frozenset[str] = frozenset({"features", "labels"})
    absolute: bool = False

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return diversity."""
        real = within_class_variance(reference.features, reference.labels)
        return {"diversity": Value(within_class_variance(sample.features, sample.labels) / real)}


@dataclass(frozen=True)
class PixelMetric:
    """`saturated` and `contrast`: means of `images.pixel_statistics`, to be read beside those of the reference."""

    needs: frozenset[str] = frozenset({"pixels"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return both means with their standard errors."""
        means = sample.pixels.mean(0).tolist()
        errors = (sample.pixels.std(0) / math.sqrt(len(sample.pixels))).tolist()
        return {name: Value(*pair) for name, *pair in zip(("saturated", "contrast"), means, errors, strict=True)}


@dataclass(frozen=True)
class ObeyedMetric:
    """`obeyed`: the share of images that show all that their caption says, and of those that show its first parts."""

    needs: frozenset[str] = frozenset({"obeyed"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the four shares, each with its binomial standard error."""
        shares = sample.obeyed.double().mean(0).tolist()
        names = ("obeyed_colours", "obeyed_shapes", "obeyed_sizes", "obeyed")
        count = len(sample.obeyed)
        return {name: Value(share, math.sqrt(share * (1 - share) / count)) for name, share in zip(names, shares, strict=True)}


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Return 100 max(cos(image, text), 0) of each row, (N,) float64. Source: Hessel et al. 2021 (arXiv:2104.08718), without w = 2.5."""
    return 100 * torch.nn.functional.cosine_similarity(images.double(), texts.double()).clamp(min=0)


@dataclass(frozen=True)
class ClipScoreMetric:
    """`clip_score`: the mean of `clip_score`, on the scale of 0 to 100."""

    needs: frozenset[str] = frozenset({"features", "texts"})
    absolute: bool = True

    def __call__(self, sample: Sample, reference: Sample, seed: int) -> dict[str, Value]:
        """Return the mean with its standard error."""
        scores = clip_score(sample.features, sample.texts)
        return {"clip_score": Value(float(scores.mean()), float(scores.std()) / math.sqrt(len(scores)))}


METRICS: dict[str, Metric] = {
    "fid": FrechetMetric(),
    "kid": KernelMetric(),
    "kid_normalised": KernelMetric(normalised=True),
    "precision_recall": PrecisionRecallMetric(),
    "accuracy": AccuracyMetric(),
    "diversity": DiversityMetric(),
    "pixels": PixelMetric(),
    "obeyed": ObeyedMetric(),
    "clip_score": ClipScoreMetric(),
}
