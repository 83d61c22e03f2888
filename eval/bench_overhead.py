"""How much of an evaluation's time is not the feature network's (or the sampler's): one run, both sides in turns, medians.

    python eval/bench_overhead.py                # CPU, the network behind FID with random weights, 64-pixel images
    python eval/bench_overhead.py --device cuda --images 4000 --sampler   # a GPU, with a sampler running

The bare side passes equal batches, resized already, through the network and does nothing else. Ours takes uint8 images, resizes them,
passes them through the same network, and sums the moments for FID and sFID in jackknife groups and the features for KID and precision.
With a sampler, both sides also make the images by a few passes of a UNet; the bare side then resizes nothing and keeps nothing.
Results go to eval/results/bench_overhead_DEVICE_SIZE.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffdistill.evaluation.collect import Collector, Seen
from diffdistill.evaluation.extractors import NetworkExtractor
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.networks.inception import SIZE, Inception
from diffdistill.evaluation.precision import strict_float32
from diffdistill.evaluation.transforms import Transform
from diffdistill.files import write_json

RESULTS = Path(__file__).parent / "results"
NEEDS = frozenset({"moments", "spatial", "features", "logits"})
NUM_STEPS = 4
IMAGES_PER_GROUP = 1000  # of the jackknife; protocols of 50,000 images have 2,500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resize", default="pil_bicubic")
    parser.add_argument("--sampler", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    network = Inception.random(0).to(device)
    extractor = NetworkExtractor(network, options.resize, "float32", device, images_per_pass=options.batch)
    sample = sampler(device, options.size) if options.sampler else given(options.size, device)
    sides = {"bare": bare(network, sample, options), "ours": ours(extractor, sample, options)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(options.repeats + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first pays for compilation, allocation and caches
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    share = median["bare"] / median["ours"]
    result = {
        "command": " ".join(["python eval/bench_overhead.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "images_per_second": {name: options.images / value for name, value in median.items()},
        "share_of_the_bare_rate": share,
    }
    write_json(RESULTS / f"bench_overhead_{device.type}_{options.size}{'_sampler' if options.sampler else ''}.json", result)
    print(f"{result['device']}: {share:.1%} of the bare rate; images a second: {result['images_per_second']}")


def given(size: int, device: torch.device) -> Callable[[int], Tensor]:
    """Return what gives B images in [-1, 1] without work."""
    images = torch.rand(512, 3, size, size, device=device) * 2 - 1
    return lambda count: images[:count]


def sampler(device: torch.device, size: int) -> Callable[[int], Tensor]:
    """Return what makes B images by NUM_STEPS passes of a UNet of 60 million parameters."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(size, block_out_channels=(128, 256, 384, 512)).to(device).eval()

    def sample(count: int) -> Tensor:
        x = torch.randn(count, 3, size, size, device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            for step in range(NUM_STEPS):
                x = x - unet(x, 999 - step * 250).sample / NUM_STEPS
        return x.float().clamp(-1, 1)

    return sample


def bare(network: Inception, sample: Callable[[int], Tensor], options: argparse.Namespace) -> Callable[[], None]:
    """Return the network's passes, with the sampler's where there is one, and nothing between them."""
    resized = torch.rand(options.batch, 3, SIZE, SIZE, device=options.device) * 255

    def run() -> None:
        for start in range(0, options.images, options.batch):
            count = min(options.batch, options.images - start)
            sample(count)
            with strict_float32():
                network(resized[:count])

    return run


def ours(extractor: NetworkExtractor, sample: Callable[[int], Tensor], options: argparse.Namespace) -> Callable[[], None]:
    """Return what an evaluation does."""

    def run() -> None:
        collector = Collector([Seen(Transform(), extractor, NEEDS)], torch.arange(options.images) // IMAGES_PER_GROUP)
        for start in range(0, options.images, options.batch):
            collector.add(to_uint8(sample(min(options.batch, options.images - start))))
        collector.finish()

    return run


if __name__ == "__main__":
    main()
