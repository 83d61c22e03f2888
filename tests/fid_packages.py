"""Packages that compute FID, each run through its public functions on weights in its own kind of file. Nothing is downloaded.

`features` is what the package makes of a folder of PNG files; `distance` is its own Frechet distance of two such sets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from inception_files import STATE_DICT, TORCHSCRIPT, write_state_dict, write_torchscript
from PIL import Image
from torch import Tensor
from torchvision.models import Inception3

from diffdistill.evaluation.evaluate import evaluate_images
from diffdistill.evaluation.extractors import open_extractor
from diffdistill.evaluation.features import FeatureExtractor
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.reference import measure
from diffdistill.evaluation.result import Evaluation
from diffdistill.evaluation.views import open_views
from diffdistill.evaluation.weights import FOLDER_VARIABLE, WeightStore

CPU = torch.device("cpu")
PROTOCOLS = {path.stem: load_protocol(path) for path in (Path(__file__).parent / "fid_protocols").glob("*.yaml")}


class Package(NamedTuple):
    """One way in which a package sees images.

    Attributes:
        name, mode: of the package, and what is chosen there.
        protocol: the key of PROTOCOLS that asks for the same here.
        features: from a folder of weights and a folder of PNG files to features, float32 or float64 (N, 2048).
        distance: from two sets of features to the distance, in the package's own arithmetic.
    """

    name: str
    mode: str
    protocol: str
    features: Callable[[Path, Path], Tensor]
    distance: Callable[[Tensor, Tensor], float]

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.name)

    def __str__(self) -> str:
        return f"{self.name} {self.mode}".strip()


def write_weights(network: Inception3, folder: Path) -> Path:
    """Write what the packages look for, where they look for it when `folder` is torch.hub's; and add it to a store of ours."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_torchscript(network, folder / TORCHSCRIPT)
    write_state_dict(network, folder / "checkpoints" / STATE_DICT)
    WeightStore(folder / "store").add("inception", [state_dict_file(folder)], link=True)
    return folder


def state_dict_file(weights: Path) -> Path:
    return weights / "checkpoints" / STATE_DICT


def write_pngs(images: Tensor, folder: Path) -> Path:
    """Write uint8 images (N, 3, H, W) under names that keep their order."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:05d}.png")
    return folder


def read_pngs(folder: Path) -> Tensor:
    files = [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(files)).permute(0, 3, 1, 2)


def random_images(count: int, size: tuple[int, int], seed: int, contrast: float) -> Tensor:
    """Noise of single pixels, of that standard deviation in [0, 1], over fainter grain of four, uint8 (count, 3, *size).

    Resizes differ on it by a third of the distance; and its features vary in no direction much more than in others, as the
    packages' square roots of singular matrices need.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, *size, generator=generator)
    grain = torch.randn(count, 3, size[0] // 4, size[1] // 4, generator=generator)
    noise = contrast * pixels + 0.05 * torch.nn.functional.interpolate(grain, size, mode="bicubic")
    return (255 * (0.5 + noise)).round().clamp(0, 255).to(torch.uint8)


def our_extractor(protocol: Protocol, weights: Path) -> FeatureExtractor:
    """Open the extractor of a protocol's one view, on the CPU, as `diffdistill eval` does."""
    with mock.patch.dict(os.environ, {FOLDER_VARIABLE: str(weights / "store")}):
        return open_extractor(protocol.views[0], CPU)


def score(
    protocol: Protocol, extractor: FeatureExtractor, generated: Tensor, real: Tensor, metrics: tuple[str, ...] = ()
) -> Evaluation:
    """Evaluate images against others under a protocol of one view."""
    (view,) = protocol.views
    seen = (view, extractor, frozenset({"moments", "features", "logits"}))
    (reference,) = measure([(real, None)], len(real), protocol, [seen])
    name = view.extractor
    views = open_views(protocol, metrics, extractors={name: extractor}, references={name: reference})
    return evaluate_images(generated, None, protocol, views=views)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """|m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2) of the features themselves, in float64.

    With C1 = A'A and C2 = B'B of centred features the last trace is the sum of the singular values of A B', a matrix of
    images by images: exact also where there are fewer images than features, where the root of C1 C2 is not.
    """
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[None]:
    """Let torch.hub find its files in `folder`."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        yield
    finally:
        torch.hub.set_dir(before)


def clean_fid(mode: str) -> Package:
    from cleanfid import fid
    from cleanfid.features import build_feature_extractor
    from cleanfid.inception_torchscript import InceptionV3W

    def features(weights: Path, images: Path) -> Tensor:
        if mode == "legacy_pytorch":
            with hub(weights):
                network = build_feature_extractor(mode, CPU, use_dataparallel=False)
        else:
            network = InceptionV3W(str(weights), download=False, resize_inside=mode == "legacy_tensorflow").eval()
        options = {"num_workers": 0, "batch_size": 32, "device": CPU, "verbose": False}
        return torch.from_numpy(fid.get_folder_features(str(images), network, mode=mode, **options))

    protocol = {"clean": "clean", "legacy_tensorflow": "tensorflow", "legacy_pytorch": "pytorch"}[mode]
    return Package("clean-fid", mode, protocol, features, lambda x, y: float(fid.fid_from_feats(x.numpy(), y.numpy())))


def pytorch_fid() -> Package:
    from pytorch_fid import fid_score
    from pytorch_fid.inception import InceptionV3

    def features(weights: Path, images: Path) -> Tensor:
        with hub(weights):
            network = InceptionV3([3])
        files = sorted(images.glob("*.png"))
        return torch.from_numpy(fid_score.get_activations(files, network, min(50, len(files)), num_workers=0))

    def distance(x: Tensor, y: Tensor) -> float:
        (m1, c1), (m2, c2) = ((z.numpy().mean(0), np.cov(z.numpy(), rowvar=False)) for z in (x, y))
        return float(fid_score.calculate_frechet_distance(m1, c1, m2, c2))

    return Package("pytorch-fid", "", "pytorch", features, distance)


def torch_fidelity() -> Package:
    from torch_fidelity import metric_fid
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    def features(weights: Path, images: Path) -> Tensor:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(state_dict_file(weights)))
        return torch.cat([network(batch)[0] for batch in read_pngs(images).split(32)])

    def distance(x: Tensor, y: Tensor) -> float:
        statistics = [metric_fid.fid_features_to_statistics(z) for z in (x, y)]
        return metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID]

    return Package("torch-fidelity", "", "tensorflow", features, distance)


def torchmetrics(antialias: bool) -> Package:
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    def features(weights: Path, images: Path) -> Tensor:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(state_dict_file(weights)), antialias)
        with torch.no_grad():
            return torch.cat([network(batch) for batch in read_pngs(images).split(32)])

    def distance(x: Tensor, y: Tensor) -> float:
        features_as_they_are = torch.nn.Identity()
        features_as_they_are.num_features = x.shape[1]
        metric = FrechetInceptionDistance(features_as_they_are)
        metric.update(y, real=True)
        metric.update(x, real=False)
        return float(metric.compute())

    protocol = "antialias" if antialias else "tensorflow"
    return Package("torchmetrics", f"antialias={antialias}", protocol, features, distance)


PACKAGES: dict[str, Callable[[], Package]] = {
    "clean-fid clean": partial(clean_fid, "clean"),
    "clean-fid legacy_tensorflow": partial(clean_fid, "legacy_tensorflow"),
    "clean-fid legacy_pytorch": partial(clean_fid, "legacy_pytorch"),
    "torch-fidelity": torch_fidelity,
    "pytorch-fid": pytorch_fid,
    "torchmetrics": partial(torchmetrics, antialias=True),
    "torchmetrics antialias=False": partial(torchmetrics, antialias=False),
}
