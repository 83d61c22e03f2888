"""Against clean-fid on the same machine in one run: from a folder of PNGs, and from a sampler, at 32 and 256 pixels.

    python eval/bench_clean_fid.py

Both sides have one small network of 2,048 features, so this is what surrounds the network. clean-fid ("clean" mode, two workers) reads the
PNGs, resizes, and takes mean and covariance; its distance itself is left out, for its call of scipy fails from scipy 1.18 on. Ours feeds
FID, KID, precision and recall, and the Inception score at once, from the same files with its usual threads. From a sampler, clean-fid needs the files
written first (as Pillow writes them) and read; ours takes the images from memory. The sides take turns; medians of the repeats.
Rates and ratios go to eval/results/bench_clean_fid.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.evaluation.collect import Collector, Seen
from diffdistill.evaluation.extractors import NetworkExtractor
from diffdistill.evaluation.features import Features
from diffdistill.evaluation.image_files import PngWriter
from diffdistill.evaluation.image_sources import open_images
from diffdistill.evaluation.transforms import Transform
from diffdistill.files import write_json

RESULT = Path(__file__).parent / "results" / "bench_clean_fid.json"
COUNTS = {32: 2000, 256: 500}  # images by their side
WORKERS = 2
NEEDS = frozenset({"moments", "features", "logits"})
BATCH = 100


class Tiny(nn.Module):
    """2,048 features of 299-pixel images by one pooling and one product."""

    name, fingerprint, dim, size = "tiny", "0" * 64, 2048, 299

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool, self.linear, self.classify = nn.AvgPool2d(37), nn.Linear(3 * 8 * 8, 2048), nn.Linear(2048, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Return features and logits."""
        features = self.linear(self.pool(images).flatten(1) / 255)
        return Features(features, self.classify(features))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    found = {
        "command": "python eval/bench_clean_fid.py",
        "cores": len(os.sched_getaffinity(0)),
        "workers_of_clean_fid": WORKERS,
    }
    for side, count in COUNTS.items():
        images = drawn(side, count)
        with tempfile.TemporaryDirectory() as folder:
            with PngWriter(Path(folder) / "images") as writer:
                writer.add(images, 0)
            path = str(Path(folder) / "images")
            found[f"folder_{side}"] = compared(
                lambda path=path: clean_fid(path), lambda path=path: from_folder(path), count, repeats
            )
        found[f"sampler_{side}"] = compared(
            lambda images=images: clean_fid_of_images(images), lambda images=images: from_memory(images), count, repeats
        )
        for kind in ("folder", "sampler"):
            print(f"{kind} {side}: {found[f'{kind}_{side}']}", flush=True)
    write_json(RESULT, found)


def drawn(side: int, count: int) -> Tensor:
    """Return smooth images with some noise, uint8 (count, 3, side, side): PNGs of a photograph's size."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(side)[None, :] / rng.uniform(3, 40, (count, 3, 1)) + rng.uniform(0, 6, (count, 3, 1)))
    smooth = 127.5 + 60 * (waves[:, :, :, None] + waves[:, :, None, :])
    return torch.from_numpy((smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))


def compared(theirs: Callable[[], None], ours: Callable[[], None], count: int, repeats: int) -> dict[str, float]:
    """Return the rates of both, images a second, and ours over theirs; the first turn of each is left out."""
    times: dict[str, list[float]] = {"clean_fid": [], "ours": []}
    for repeat in range(repeats + 1):
        for name, side in (("clean_fid", theirs), ("ours", ours)):
            begin = time.perf_counter()
            side()
            if repeat:
                times[name].append(time.perf_counter() - begin)
    rates = {name: count / statistics.median(values) for name, values in times.items()}
    return {**rates, "ratio": rates["ours"] / rates["clean_fid"]}


def clean_fid(folder: str) -> None:
    """Do what clean-fid does before its distance."""
    from cleanfid.fid import get_folder_features

    network = Tiny().eval()
    features = get_folder_features(
        folder,
        lambda images: network(images).features,
        num_workers=WORKERS,
        batch_size=BATCH,
        device=torch.device("cpu"),
        mode="clean",
        verbose=False,
    )
    np.mean(features, axis=0), np.cov(features, rowvar=False)


def clean_fid_of_images(images: Tensor) -> None:
    """Write the images as Pillow does, then score the folder."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(f"{folder}/{index:06d}.png")
        clean_fid(folder)


def collector(count: int) -> Collector:
    extractor = NetworkExtractor(Tiny().eval(), "pil_bicubic", "float32", torch.device("cpu"))
    return Collector([Seen(Transform(), extractor, NEEDS)], torch.arange(count) * 10 // count)


def from_folder(folder: str) -> None:
    source = open_images(folder)
    taking = collector(len(source))
    for batch in source.batches(BATCH):
        taking.add(batch)
    taking.finish()


def from_memory(images: Tensor) -> None:
    taking = collector(len(images))
    for batch in images.split(BATCH):
        taking.add(batch)
    taking.finish()


if __name__ == "__main__":
    main()
