"""Reference statistics in the files of other packages: read with every check that bare arrays allow, and written for their scripts.

| format | file | holds | made from |
|---|---|---|---|
| `edm` | npz | mu, sigma | inception after tf1_bilinear |
| `edm2` | pickle | num_images; fid, fd_dinov2: mu, sigma each | the same; dinov2-vit-l-14 after torch_bicubic or pil_bicubic_u8 |
| `adm` | npz | mu, sigma, mu_s, sigma_s; arr_0: uint8 images | inception after tf1_bilinear; `_s`: its spatial features, for sFID |
| `clean-fid` | npz | mu, sigma; or feats in the file for KID | what the mode in the file's name says |
| `pytorch-fid` | npz | mu, sigma | inception-pytorch-fid after torch_bilinear |
| `cmmd` | npy | embeddings | clip-vit-l-14-336px after pil_bicubic_u8 |
| `torch-fidelity` | torch | mu, sigma; or one tensor of features | the network in the file's name after tf1_bilinear |

The last column is what the package's own code does; no file carries it, and one network under two resizes gives Frechet distances up
to three percent apart. So the reader must say what turned the evaluated images into features, and is refused where the format implies
something else. `inception` is the network of the TensorFlow graph of 2015-12-05; the other names are torch-fidelity's, the resizes
those of `evaluation.resize` (and torch_bicubic: antialiased, not clipped). `inception` takes bytes as (x - 128) / 128,
`inception-pytorch-fid`, the same network, as x / 127.5 - 1. The images of a reference are not in its statistics: the
10,000 in ADM's `arr_0` are for precision and recall, while mu and sigma are of the whole training set.

EDM2's and torch-fidelity's files are pickles; they are read as `array_pickles` reads them, without running any code.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.array_pickles import STAND_INS, ArraysOnly, asks_for_code, unpickled
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.readable import readable
from diffdistill.files import sha256, write_atomic

Format = Literal["edm", "edm2", "adm", "clean-fid", "pytorch-fid", "cmmd", "torch-fidelity"]
TOLERANCE = 1e-5  # of the largest entry or eigenvalue: sums in float32 leave about 1e-6, a matrix that is no covariance about 1
ROWS_PER_BLOCK = 1000


class Pipeline(NamedTuple):
    """What turned images into features: the network, and the resize before it."""

    extractor: str
    resize: str

    def __str__(self) -> str:
        return f"{self.extractor} after {self.resize}"


class Gaussian(NamedTuple):
    """Mean, float64 (d,), and unbiased covariance, float64 (d, d), exactly symmetric."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Origin:
    """Where statistics come from: the file with its hash, the metric it was made for and what made the features."""

    format: Format
    path: Path
    sha256: str
    metric: str
    pipeline: Pipeline


@dataclass(frozen=True)
class StoredStatistics:
    """What a file says of a set of images.

    Attributes:
        mean: float64 (d,). covariance: float64 (d, d), unbiased, exactly symmetric.
        origin: the file.
        count: number of images, or None where the file does not say.
        features: float32 (N, d), or None where the file has moments only.
        spatial: the moments of Inception's spatial features, for sFID, or None.
    """

    mean: Tensor
    covariance: Tensor
    origin: Origin
    count: int | None = None
    features: Tensor | None = None
    spatial: Gaussian | None = None


def read_statistics(path: str | Path, pipeline: Pipeline, dim: int, format: Format | None = None) -> StoredStatistics:
    """Read a file of reference statistics that another package wrote.

    Args:
        path: the file.
        pipeline: what turns the images that are to be compared into features.
        dim: length of a feature vector of that pipeline.
        format: the package's format; None finds it from the content.
    Raises:
        UserError: the file is missing, cut short, of another format or of several possible ones, or asks for code; its format
            implies another pipeline; or what it holds are no moments of `dim` features (shape, NaN, asymmetry, a negative
            eigenvalue).
    """
    path = Path(path)
    format = _format_of(path, format)
    with readable(path, format):
        held = READERS[format](path, pipeline.extractor)
    _check_pipeline(path, format, held.metric, pipeline)
    origin = Origin(format, path, sha256(path), held.metric, pipeline)
    if held.features is not None:
        features = _features(path, held.features, dim)
        moments = Moments(dim)
        for rows in features.split(ROWS_PER_BLOCK):
            moments.update(rows)
        return StoredStatistics(moments.mean(), moments.covariance(), origin, len(features), features.float())
    mean, covariance = _gaussian(path, *held.gaussian, dim)
    spatial = None if held.spatial is None else _gaussian(path, *held.spatial, np.size(held.spatial[0]), "spatial ")
    return StoredStatistics(mean, covariance, origin, held.num_images, spatial=spatial)


# --- What a format implies

TENSORFLOW = Pipeline("inception", "tf1_bilinear")
CLEAN = Pipeline("inception", "pil_bicubic")
PYTORCH = Pipeline("inception-pytorch-fid", "torch_bilinear")

PIPELINES: dict[tuple[Format, str], tuple[Pipeline, ...]] = {
    ("edm", "fid"): (TENSORFLOW,),
    ("edm2", "fid"): (TENSORFLOW,),
    ("edm2", "fd_dinov2"): (Pipeline("dinov2-vit-l-14", "torch_bicubic"), Pipeline("dinov2-vit-l-14", "pil_bicubic_u8")),
    ("adm", "fid"): (TENSORFLOW,),
    ("pytorch-fid", "fid"): (PYTORCH,),
    ("cmmd", "cmmd"): (Pipeline("clip-vit-l-14-336px", "pil_bicubic_u8"),),
}
EDM2_METRICS = {"inception": "fid", "dinov2-vit-l-14": "fd_dinov2"}  # the extractor of each entry
CLEAN_FID_MODES = {"clean": CLEAN, "legacy_tensorflow": TENSORFLOW, "legacy_pytorch": PYTORCH}
CLEAN_FID_CLIP = Pipeline("clip-vit-b-32", "pil_bicubic_u8")  # whatever the mode: its own resize takes the mode's place
CLEAN_FID_NAME = re.compile(rf".+_({'|'.join(CLEAN_FID_MODES)})(_clip_vit_b_32)?_[a-z0-9]+_(na|\d+)(_kid)?")
TORCH_FIDELITY_NAME = re.compile(
    r".+-(inception-v3-compat|vgg16|clip-(?:rn|vit-)[\w-]+|dinov2-vit-[sblg]-14)-(?:stat-fid|features)-\w+"
)


def implied_pipelines(format: Format, metric: str, path: Path) -> tuple[Pipeline, ...]:
    """Return what may have made the features of a file.

    clean-fid's and torch-fidelity's files say it in their names. Under another name clean-fid's may be of any of its modes, and
    torch-fidelity's are taken to be of its default network.
    """
    if format == "clean-fid":
        named = CLEAN_FID_NAME.fullmatch(path.stem)
        if named is None:
            return (*CLEAN_FID_MODES.values(), CLEAN_FID_CLIP)
        return (CLEAN_FID_CLIP if named[2] else CLEAN_FID_MODES[named[1]],)
    if format == "torch-fidelity":
        named = TORCH_FIDELITY_NAME.fullmatch(path.stem)
        network = "inception" if named is None or named[1] == "inception-v3-compat" else named[1]
        return (Pipeline(network, "tf1_bilinear"),)
    return PIPELINES[format, metric]


def _check_pipeline(path: Path, format: Format, metric: str, pipeline: Pipeline) -> None:
    implied = implied_pipelines(format, metric, path)
    if pipeline not in implied:
        raise UserError(
            f"{path} ({format}, {metric}) is made from features of {' or '.join(map(str, implied))}; this evaluation uses "
            f"{pipeline}. Evaluate with that, or take statistics made with yours: the two do not compare."
        )


# --- The format of a file


def _format_of(path: Path, named: Format | None) -> Format:
    """Return the format of a file: the named one where the content allows it, else the only one that it can be."""
    if named is not None and named not in READERS:
        raise unknown_name("format of statistics", named, READERS)
    if not path.is_file():
        raise UserError(f"no file of statistics {path}. Write the path of one that exists.")
    with readable(path, "statistics"):
        possible = _possible_formats(path)
    if named is not None and named not in possible:
        raise UserError(f"{path} is no {named} file; it holds {_or(possible)}. Leave format out, or name the right file.")
    if named is None and len(possible) != 1:
        raise UserError(
            f"the format of {path} is not clear from its content: it holds {_or(possible)}, which imply different networks or "
            f"resizes. Write format=..., one of: {', '.join(possible or READERS)}."
        )
    return named or possible[0]


def _or(formats: tuple[Format, ...]) -> str:
    return " or ".join(formats) + " statistics" if formats else "nothing that is known here"


def _possible_formats(path: Path) -> tuple[Format, ...]:
    with open(path, "rb") as file:
        head = file.read(6)
    if head == b"\x93NUMPY":
        return ("cmmd",)
    if head.startswith(b"\x80"):  # a pickle of protocol 2 or later
        return ("edm2",)
    if not head.startswith(b"PK"):
        return ()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    keys = {name.removesuffix(".npy") for name in names}
    if any(PurePosixPath(name).name == "data.pkl" for name in names):
        return ("torch-fidelity",)
    if keys & {"mu_s", "arr_0"}:
        return ("adm",)
    if "feats" in keys:
        return ("clean-fid",)
    return ("edm", "pytorch-fid", "clean-fid") if {"mu", "sigma"} <= keys else ()


# --- Readers


class _Held(NamedTuple):
    """What a file holds, before any check: moments or features, and the metric that they are for."""

    metric: str
    gaussian: tuple[Any, Any] = (None, None)
    features: Any = None
    num_images: int | None = None
    spatial: tuple[Any, Any] | None = None


def _read_moments_npz(path: Path, extractor: str) -> _Held:
    with np.load(path, allow_pickle=False) as stored:
        return _Held("fid", (stored["mu"], stored["sigma"]))


def _read_clean_fid(path: Path, extractor: str) -> _Held:
    with np.load(path, allow_pickle=False) as stored:
        if "feats" in stored.files:
            return _Held("kid", features=stored["feats"])
    return _read_moments_npz(path, extractor)


def _read_adm(path: Path, extractor: str) -> _Held:
    with np.load(path, allow_pickle=False) as stored:
        if "mu" not in stored.files:
            raise UserError(
                f"{path} holds images and no statistics. Run an extractor over open_images({path.name!r}).batches(...)."
            )
        spatial = (stored["mu_s"], stored["sigma_s"]) if "mu_s" in stored.files else None
        return _Held("fid", (stored["mu"], stored["sigma"]), spatial=spatial)


def _read_cmmd(path: Path, extractor: str) -> _Held:
    return _Held("cmmd", features=np.load(path, allow_pickle=False))


def _read_edm2(path: Path, extractor: str) -> _Held:
    with open(path, "rb") as file:
        stored = ArraysOnly(file, path).load()
    if not isinstance(stored, dict):
        raise UserError(
            f"{path} holds a pickled {type(stored).__name__}; EDM2's statistics are a dict of metrics. Name another file."
        )
    metric = EDM2_METRICS.get(extractor, "")
    if metric not in stored:
        known = ", ".join(f"{key} is of {name}" for name, key in EDM2_METRICS.items())
        raise UserError(
            f"{path} has nothing for extractor {extractor!r}; it holds {', '.join(map(str, stored))} ({known}). Name one of those "
            "extractors, or another file."
        )
    count = stored.get("num_images")
    if count is not None and (not isinstance(count, int) or count < 2):
        raise UserError(f"{path} is of num_images = {count!r}; a covariance is of two or more. Make or copy the file again.")
    return _Held(metric, (unpickled(stored[metric]["mu"]), unpickled(stored[metric]["sigma"])), num_images=count)


def _read_torch_fidelity(path: Path, extractor: str) -> _Held:
    with torch.serialization.safe_globals(list(STAND_INS.values())):
        if code := torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
            raise asks_for_code(path, *code)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(stored, Tensor):
        return _Held("features", features=stored.numpy())
    return _Held("fid", (unpickled(stored["mu"]), unpickled(stored["sigma"])))


READERS: dict[Format, Callable[[Path, str], _Held]] = {
    "edm": _read_moments_npz,
    "edm2": _read_edm2,
    "adm": _read_adm,
    "clean-fid": _read_clean_fid,
    "pytorch-fid": _read_moments_npz,
    "cmmd": _read_cmmd,
    "torch-fidelity": _read_torch_fidelity,
}


# --- Checks


def _floats(path: Path, name: str, array: np.ndarray) -> Tensor:
    """Return an array as a float64 tensor of its own, all finite."""
    if array.dtype.kind != "f" or not array.size:
        raise UserError(f"{name} of {path} is {array.dtype} {array.shape}; it must hold real floats. Name another file.")
    tensor = torch.from_numpy(array.astype(np.float64))
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name} of {path} holds NaN or infinity: the run that made it diverged. Make or copy the file again.")
    return tensor


def _wrong_shape(path: Path, name: str, tensor: Tensor, wanted: str) -> UserError:
    return UserError(
        f"{name} of {path} is {tuple(tensor.shape)}; the extractor asked for needs {wanted}. Take statistics made with that "
        "extractor, from the layer it returns."
    )


def _features(path: Path, array: Any, dim: int) -> Tensor:
    """Return features, float64 (N, d), of two images or more."""
    features = _floats(path, "the array of features", array)
    if features.ndim != 2 or features.shape[1] != dim or len(features) < 2:
        raise _wrong_shape(path, "the array of features", features, f"(N, {dim}) with N of two or more")
    return features


def _gaussian(path: Path, mean: Any, covariance: Any, dim: int, kind: str = "") -> Gaussian:
    """Return moments that can be those of `dim` features, the covariance made exactly symmetric."""
    name = f"the {kind}covariance"
    mean, covariance = _floats(path, f"the {kind}mean", mean), _floats(path, name, covariance)
    if mean.shape != (dim,):
        raise _wrong_shape(path, f"the {kind}mean", mean, f"({dim},)")
    if covariance.shape != (dim, dim):
        raise _wrong_shape(path, name, covariance, f"({dim}, {dim})")
    asymmetry, largest = float((covariance - covariance.T).abs().max()), float(covariance.abs().max())
    if asymmetry > TOLERANCE * largest:
        raise UserError(
            f"{name} of {path} is not symmetric: two mirrored entries differ by {asymmetry:.3g}, the largest is {largest:.3g}. "
            "It is no covariance; make or copy the file again."
        )
    symmetric = (covariance + covariance.T) / 2
    eigenvalues = torch.linalg.eigvalsh(symmetric)  # ascending
    lowest, highest = float(eigenvalues[0]), float(eigenvalues[-1])
    if lowest < -TOLERANCE * highest:
        raise UserError(
            f"{name} of {path} has the eigenvalue {lowest:.3g}, the largest is {highest:.3g}. A covariance has none below zero; "
            "make or copy the file again."
        )
    return Gaussian(mean, symmetric)


# --- Writers


def write_edm(path: str | Path, mean: Tensor, covariance: Tensor) -> Path:
    """Write moments as EDM's npz (mu, sigma, float64), atomically; EDM's, EDM2's and pytorch-fid's scripts read it.

    Only moments of inception after tf1_bilinear mean there what they mean here. mean is (d,), covariance (d, d).
    """
    content = io.BytesIO()
    np.savez(content, mu=mean.double().cpu().numpy(), sigma=covariance.double().cpu().numpy())
    return write_atomic(path, content.getvalue())
