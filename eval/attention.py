"""Every kernel of attention that a machine has, beside math attention: time, memory, and what is off.

A kernel and SDPA's math back-end run in turns, self-attention without a mask; the ratio of their times is below 1 where the kernel is faster. Memory
is the most alive at once in a forward and a backward pass beyond inputs. Errors are the largest difference of output and gradients from
float64 attention on the same rounded inputs, over the largest value there.

    python eval/attention.py          # CPU, one thread, minutes: float32 and bfloat16
    python eval/attention.py --gpu    # CUDA, minutes: bfloat16, float16 and float32, heads of 40 to 256, 256 to 16384 tokens

Both write eval/results/attention.json, each its own part, and a table of docs/compute.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from diffdistill.bench.page import fill, table
from diffdistill.bench.results import machine
from diffdistill.bench.steps import added
from diffdistill.bench.timing import clock_of, paired_ratio
from diffdistill.files import write_json
from diffdistill.models.attention import KERNELS, Attention, Call

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "attention.json"
PAGE = ROOT / "docs" / "compute.md"
LONGEST_EXACT = 4096  # tokens of which attention in float64 is computed
MIB = 2**20


class Case(NamedTuple):
    """Self-attention of one batch."""

    dtype: torch.dtype
    size: int
    length: int
    heads: int

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Return query, key, value, and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.length, self.size)
        return [torch.randn(shape, generator=generator).to(device, self.dtype) for _ in range(4)]

    def call(self, device: torch.device, gradient: bool) -> Call:
        """Return the kind of call that it is."""
        return Call(device, self.dtype, self.size, self.size, gradient=gradient)


def cases(device: torch.device) -> list[Case]:
    """Return what is measured."""
    if device.type == "cpu":
        return [Case(*each, 2) for each in itertools.product((torch.float32, torch.bfloat16), (64, 128), (256, 1024, 4096))]
    dtypes, sizes = (torch.bfloat16, torch.float16, torch.float32), (40, 64, 128, 256)
    return [Case(*each, 16) for each in itertools.product(dtypes, sizes, (256, 1024, 4096, 16384))]


def attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention by a kernel."""
    with Attention(name).using():
        return functional.scaled_dot_product_attention(query, key, value)


def forward(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output of a pass without gradient."""
    with torch.no_grad():
        return [attend(name, *inputs[:3])]


def both(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return output and gradients."""
    tensors = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = attend(name, *tensors)
    return [output.detach(), *torch.autograd.grad(output, tensors, inputs[3])]


def measure(case: Case, name: str, device: torch.device) -> dict[str, Any]:
    """Return a row of the table; what does not fit into memory, or has no gradient, is left out."""
    inputs, clock = case.inputs(device), clock_of(device)
    is_auto = Attention().choose(case.call(device, gradient=True)).name == name
    row: dict[str, Any] = {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch."), "kernel": name, "auto": is_auto}
    rounds = 20 if device.type == "cuda" else max(3, 4096 // case.length)
    for what, action in (("forward", forward), ("both", both)):
        if KERNELS[name].refuses(case.call(device, gradient=what == "both")):
            continue
        own, math = (partial(action, each, inputs) for each in (name, "math"))
        for _ in range(3 if device.type == "cuda" else 1):
            own()
        if (name, device.type) != ("flex", "cpu"):  # there an operator of a kind whose tensors cannot be counted
            row |= {f"{what}_mib": added(own, device) / MIB}
        try:
            pairs = [(clock(own), clock(math)) for _ in range(rounds)]
            row |= {
                f"{what}_ms": 1000 * statistics.median(time for time, _ in pairs),
                f"{what}_ratio": paired_ratio(*zip(*pairs, strict=True)),
            }
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            row |= {f"{what}_ms": 1000 * statistics.median(clock(own) for _ in range(rounds))}
    if case.length <= LONGEST_EXACT:
        row |= {"errors": errors(case, name, "both" if "both_ms" in row else "forward", inputs)}
    print(row, flush=True)
    return row


def errors(case: Case, name: str, what: str, inputs: list[Tensor]) -> list[float]:
    """Return the largest difference of the output, and of the gradients, from float64, relative to the largest value."""
    action = both if what == "both" else forward
    exact = action("math", [tensor.double() for tensor in inputs])
    off = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(action(name, inputs), exact, strict=True)]
    return [off[0], max(off[1:])] if what == "both" else off


def rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure every kernel that can run a case forward."""
    for case in cases(device):
        for name, kernel in KERNELS.items():
            if kernel.refuses(case.call(device, gradient=False)) is None:
                try:
                    yield measure(case, name, device)
                except torch.OutOfMemoryError:  # math attention of many tokens
                    torch.cuda.empty_cache()
        torch.compiler.reset()  # FlexAttention is compiled for each kind of call


def ratio(row: dict[str, Any], what: str) -> str:
    """Return how a time compares with math attention's."""
    if f"{what}_ms" not in row:
        return "-"
    return f"**{row[f'{what}_ratio'][0]:.2f}**" if f"{what}_ratio" in row else "math does not fit"


def page(parts: dict[str, dict[str, Any]]) -> str:
    """Return the tables of all devices."""
    columns: dict[str, Callable[[dict[str, Any]], object]] = {
        "dtype": lambda row: row["dtype"],
        "heads": lambda row: f"{row['heads']} x {row['size']}",
        "tokens": lambda row: row["length"],
        "kernel": lambda row: f"{row['kernel']} (auto)" if row["auto"] else row["kernel"],
        "forward ms": lambda row: f"{row['forward_ms']:,.2f}",
        "forward / math": lambda row: ratio(row, "forward"),
        "both ms": lambda row: f"{row['both_ms']:,.2f}" if "both_ms" in row else "-",
        "both / math": lambda row: ratio(row, "both"),
        "MiB": lambda row: f"{mib:,.1f}" if (mib := row.get("both_mib", row.get("forward_mib"))) is not None else "-",
        "error: output, gradients": lambda row: ", ".join(f"{value:.0e}" for value in row.get("errors", [])),
    }
    return "\n\n".join(
        f"**{title}**, torch {part['torch']}, {part['threads']} threads.\n\n{table(columns, part['rows'])}"
        for title, part in parts.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    device = torch.device("cuda", 0) if parser.parse_args().gpu else torch.device("cpu")
    torch.set_num_threads(1)
    facts = machine()
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    parts[facts.device] = {"torch": facts.torch, "threads": facts.threads, "rows": list(rows(device))}
    write_json(RESULTS, parts)
    fill(PAGE, "attention", page(parts))


if __name__ == "__main__":
    main()
