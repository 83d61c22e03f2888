"""FID of one network of random weights on the same images, by five packages and by the protocols that ask for the same here.

The packages run on files that are written here, in their own layouts, and on folders of PNG files; here the same images are
evaluated from memory. KID, Inception Score, precision and recall are compared where a package defines them alike.

    python eval/five_packages.py            # about ten minutes of one core for each size; writes the table too
    python eval/five_packages.py --table    # only docs/packages.md, from eval/results/five_packages.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.evaluation.result import Evaluation, versions
from diffdistill.files import temporary_folder, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "five_packages.json"
PAGE = ROOT / "docs" / "packages.md"
sys.path.insert(0, str(ROOT / "tests"))
import fid_packages  # noqa: E402
from fid_packages import PACKAGES, PROTOCOLS, Package, frechet_distance, state_dict_file  # noqa: E402
from inception_files import torchvision_network  # noqa: E402

SIZES = (64, 512)


def compare(size: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each number that a package has for the images of a size."""
    count = PROTOCOLS["clean"].num_images
    generated = fid_packages.random_images(count, (size, size), seed=0, contrast=0.25)
    real = fid_packages.random_images(count, (size, size), seed=1, contrast=0.2)
    weights = fid_packages.write_weights(torchvision_network(), folder / "weights")
    folders = [fid_packages.write_pngs(images, folder / name) for name, images in (("generated", generated), ("real", real))]
    ours = {name: evaluate(name, weights, generated, real) for name in PROTOCOLS}
    for make in PACKAGES.values():
        package = make()

        def row(metric: str, its: float | None, **more: float) -> dict[str, Any]:
            names = {"package": package.name, "version": package.version, "mode": package.mode}  # noqa: B023, used at once
            here = {"protocol": package.protocol, "ours": ours[package.protocol].mean(metric)}  # noqa: B023
            return {"size": size, **names, "metric": metric, **here, "its": its, **more}

        features = [package.features(weights, images) for images in folders]
        yield row("fid", own(package, *features), its_features=frechet_distance(*features))
        if package.name == "clean-fid":
            yield row("kid", clean_fid_kid(*features))
        if package.name == "torch-fidelity":
            for metric, value in torch_fidelity_metrics(state_dict_file(weights), *folders, count).items():
                yield row(metric, value)


def evaluate(name: str, weights: Path, generated: Tensor, real: Tensor) -> Evaluation:
    """Evaluate by a protocol."""
    protocol = PROTOCOLS[name]
    return fid_packages.score(protocol, fid_packages.our_extractor(protocol, weights), generated, real)


def own(package: Package, x: Tensor, y: Tensor) -> float | None:
    """Return the package's own distance; None where its use of scipy's sqrtm does not run, which is so from 1.18 on."""
    try:
        return package.distance(x, y)
    except TypeError:
        return None


def clean_fid_kid(x: Tensor, y: Tensor) -> float:
    """Return clean-fid's KID over one subset that is the whole set."""
    from cleanfid.fid import kernel_distance

    return kernel_distance(x.numpy(), y.numpy(), num_subsets=1)


def torch_fidelity_metrics(weights: Path, generated: Path, real: Path, count: int) -> dict[str, float]:
    """Return what torch-fidelity's main function says of two folders: subsets that are the whole set, images in their order."""
    import torch_fidelity as package

    found = package.calculate_metrics(
        input1=str(generated),
        input2=str(real),
        kid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(weights),
        kid_subsets=1,
        kid_subset_size=count,
        samples_shuffle=False,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    keys = {
        "kid": package.KEY_METRIC_KID_MEAN,
        "inception_score": package.KEY_METRIC_ISC_MEAN,
        "precision": package.KEY_METRIC_PRECISION,
        "recall": package.KEY_METRIC_RECALL,
    }
    return {name: found[key] for name, key in keys.items()}


def page(report: dict[str, Any]) -> str:
    """Return docs/packages.md."""
    rows, used = report["rows"], report["versions"]
    fids = [row for row in rows if row["metric"] == "fid"]
    others = [row for row in rows if row["metric"] != "fid"]
    packages = {row["package"]: row["version"] for row in rows}
    count = PROTOCOLS["clean"].num_images
    lines = [
        "# The same numbers as other packages",
        "",
        f"`python eval/five_packages.py`: one Inception of random weights, written into each package's own kind of file, on {count} generated "
        f"and {count} real images of noise. The packages read folders of PNG files; here the same images are evaluated by the "
        "protocols of `tests/fid_protocols`. The weights are random, so the values mean nothing and only their agreement does. The tests "
        "repeat this with few images and 512 of the features (`tests/evaluation/test_packages.py`).",
        "",
        "With fewer images than features the packages' roots of a singular matrix product are inexact: scipy's `sqrtm` and sums over "
        "`eigvals` of clean-fid, pytorch-fid, torch-fidelity and torchmetrics add rounding of their own. The last two columns are therefore the distance of "
        "the features that the package returns, by the singular values of the product of the centred features in float64.",
        "",
        "| pixels | package | mode | protocol | its FID | ours | relative difference | of its features | relative difference |",
        "|---|---|---|---|---|---|---|---|---|",
        *(fid_line(row) for row in fids),
        "",
        "KID over one subset that holds all images, the Inception Score over ten splits in the order of the images, precision and recall with k = 3. "
        "The packages compute KID's kernels in float32.",
        "",
        "| pixels | package | mode | protocol | metric | its value | ours | relative difference |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"{place(row)} | {row['metric']} | {row['its']:.8g} | {row['ours']:.8g} | {apart(row['ours'], row['its'])} |"
            for row in others
        ),
        "",
        ", ".join(f"{name} {number}" for name, number in {**packages, **used}.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def fid_line(row: dict[str, Any]) -> str:
    """Return a row of the first table."""
    its = "does not run" if row["its"] is None else f"{row['its']:.7f}"
    exact = row["its_features"]
    values = [its, f"{row['ours']:.7f}", apart(row["ours"], row["its"]), f"{exact:.7f}", apart(row["ours"], exact)]
    return f"{place(row)} | {' | '.join(values)} |"


def place(row: dict[str, Any]) -> str:
    """Return the first cells of a row."""
    return f"| {row['size']} | {row['package']} | {row['mode'] or 'the only one'} | {row['protocol']}"


def apart(ours: float, its: float | None) -> str:
    """Return the relative difference."""
    return "" if its is None else "0" if ours == its else f"{abs(ours / its - 1):.1e}"


def main() -> None:
    """Compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="edges of the images, pixels")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else []
    for size in () if options.table else options.sizes:
        with temporary_folder("five-packages-") as folder, torch.no_grad():
            fresh = []
            for row in compare(size, folder):
                print(row, flush=True)
                fresh.append(row)
        rows = sorted([row for row in rows if row["size"] != size] + fresh, key=lambda row: row["size"])
        write_json(RESULTS, {"versions": {**versions(), "scipy": version("scipy"), "Pillow": version("Pillow")}, "rows": rows})
    write_atomic(PAGE, page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
