"""What the frozen base keeps in memory with its block weights rounded, on networks of true size, planned on the meta device.

python eval/quantize.py            # write docs/quantize.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from memory import GIB, NETWORKS
from torch import nn

from diffdistill.files import write_atomic
from diffdistill.models.families import FAMILIES
from diffdistill.models.network import Family
from diffdistill.models.quantize import block_linears, quantize, stored_bytes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantize.md"
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # codes; a byte of scale per 64 weights; a float per 256 of these (QLoRA, Sec. 3)


def base_bytes(network: nn.Module) -> int:
    """Return the bytes of all weights."""
    return sum(map(stored_bytes, network.parameters()))


def row(name: str, network: nn.Module, family: Family) -> str:
    """Return one line of the table; the network is rounded in place."""
    weights = [network.get_submodule(layer).weight.numel() for layer in block_linears(network, family)]
    total, whole, rounded = sum(p.numel() for p in network.parameters()), base_bytes(network), sum(weights)
    nf4 = whole - rounded * (2 - NF4_BYTES)
    quantize(network, family, "int8")
    int8 = base_bytes(network)
    sizes = " | ".join(f"{size / GIB:.2f} GiB" for size in (whole, int8, nf4))
    return f"| {name} | {rounded / total:.0%} | {sizes} | {int8 / whole:.2f} | {nf4 / whole:.2f} |"


def main() -> None:
    """Plan, print, write."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for name, build in NETWORKS.items():
        with torch.device("meta"):
            network = build().to(torch.bfloat16)
            rows.append(row(name, network, FAMILIES[type(network).__name__]))
        print(rows[-1], flush=True)
    page = [
        "# A frozen base in fewer bits",
        "",
        "`teacher_options: {quantize: int8}` (torchao) or `{quantize: nf4}` (bitsandbytes, on a GPU) rounds the linear layers of attention and feed-forward "
        "inside the blocks of the frozen network. Convolutions, norms, the embeddings of time, text and patches, and the last layer stay "
        "in `teacher_options.dtype`, and so does arithmetic; adapters are float32 as always. It is for adapters of the shared layout: rounded "
        "weights cannot be trained or merged into.",
        "",
        "Teacher, student and fake network all stand on the rounded base, so the adapter learns to imitate the rounded teacher. It leaves for "
        "the base's own weights: `export` puts it on them, writes the reference of that, and stock diffusers is compared with it; manifest "
        "(`trained_on`) and card say what it was trained on and by how much its samples differ from those of training. Metrics taken "
        "from the run folder are of the rounded student.",
        "",
        "Planned by `python eval/quantize.py` from shapes, the rest of the base in bf16; nf4 by arithmetic (4 bits, a byte of scale per 64 "
        "weights, a float per 256 of these).",
        "",
        "| network | share of weights rounded | bf16 | int8 | nf4 | int8 / bf16 | nf4 / bf16 |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    write_atomic(PAGE, "\n".join(page).encode())


if __name__ == "__main__":
    main()
