"""`diffdistill selfcheck`: does this machine compute what the numbers mean, before any of them is trusted?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from diffdistill.errors import UserError

LARGEST_FID = 0.05  # of real images against their own statistics: JPEG or another resize gives several times this


class Check(NamedTuple):
    """What was looked at, whether it is as it should be, and what was found."""

    name: str
    passed: bool
    detail: str


def selfcheck(protocol: str | Path | None = None, images: str | Path | None = None, weights: str | None = None) -> list[Check]:
    """Compare what this machine computes with answers that are known.

    Args:
        protocol: with it its extractors are opened, and its reference is read.
        images: the real images of that protocol: their distance to its reference must be nearly zero.
        weights: as for `eval`.
    Raises:
        UserError: images without a protocol, or what `eval` refuses.
    """
    if images is not None and protocol is None:
        raise UserError("the images are compared with the reference of a protocol; name it with --protocol.")
    found = [check() for check in CHECKS]
    if protocol is not None:
        found += _of_protocol(protocol, images, weights)
    return found


def _resize() -> Check:
    from diffdistill.evaluation.resize import byte_products, pillow

    generator = torch.Generator().manual_seed(0)
    worst = 0
    for size, target in ((32, 299), (256, 299), (512, 224), (1024, 299)):
        images = torch.randint(256, (1, 3, size, size), dtype=torch.uint8, generator=generator)
        ours, theirs = (resize(images, (target, target), "bicubic") for resize in (byte_products, pillow))
        worst = max(worst, int((ours.int() - theirs.int()).abs().max()))
    return Check("resize", worst == 0, f"matrix products and Pillow differ by {worst} of 255 at most")


def _frechet() -> Check:
    from diffdistill.evaluation.metrics.frechet import frechet_distance

    one, two = (torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one[:100] = 0  # fewer images than dimensions
    zero = torch.zeros(300, dtype=torch.float64)
    exact = float((one.sqrt() - two.sqrt()).square().sum()) + 300
    error = abs(frechet_distance(zero, one.diag(), zero + 1, two.diag()).value - exact)
    return Check("Frechet distance", error < 1e-10, f"off by {error:.1e} where it is known, 100 of 300 dimensions empty")


def _digits() -> Check:
    from diffdistill.evaluation.evaluate import evaluate_images
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.evaluation.reference import all_digits

    real = all_digits()
    found = evaluate_images(real.images, real.asked, load_protocol("digits").with_num_images(len(real.images)))
    fid, accuracy = found.mean("fid") or 0.0, found.mean("accuracy") or 0.0
    detail = f"real digits are {fid:.1e} from themselves, and {accuracy:.1%} in their class"
    return Check("digits", fid < 1e-6 and accuracy > 0.97, detail)


def _devices() -> Check:
    from diffdistill.evaluation.extractors import shapes_clip

    if not torch.cuda.is_available():
        return Check("device", True, "no GPU: everything runs on the CPU")
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (shapes_clip(device)(images).features.cpu() for device in ("cpu", "cuda"))
    error = float((on_cpu - on_gpu).abs().max() / on_cpu.abs().max())
    return Check("device", error < 1e-4, f"features of the GPU and the CPU differ by {error:.1e} of the largest")


CHECKS: tuple[Callable[[], Check], ...] = (_resize, _frechet, _digits, _devices)


def _of_protocol(name: str | Path, images: str | Path | None, weights: str | None) -> Iterator[Check]:
    """Yield what shows that a protocol's weights and reference are those it means."""
    from diffdistill.evaluation.evaluate import evaluate_images
    from diffdistill.evaluation.image_sources import open_images
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.evaluation.reference import references_folder
    from diffdistill.evaluation.views import open_views

    protocol = load_protocol(name)
    views = open_views(protocol, cache=references_folder(), weights=weights)
    for view in views:
        count = view.reference.provenance["count"]
        yield Check(str(view.view), True, f"weights {view.extractor.fingerprint[:12]}, reference of {count} images")
    if images is None:
        return
    source = open_images(images, protocol.reference_transforms)
    found = evaluate_images(source, None, protocol.with_num_images(len(source)), views=views)
    for metric in protocol.metrics:
        if (value := found.mean(metric)) is not None and metric in ("fid", "fd_dinov2", "patch_fid"):
            yield Check(
                metric, value < LARGEST_FID, f"the real images are {value:.2e} from the reference, at most {LARGEST_FID}"
            )
