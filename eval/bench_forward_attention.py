"""Attention under `torch.func.jvp`: time and memory of ours beside math attention, and what is off.

Compared are value and tangent of self-attention (q, k and v move) and of cross-attention to 77 tokens that stand still:

    math        SDPA's math back-end, the only one of PyTorch's that has forward mode
    two passes  our values, then the rule of the autograd function: what `torch.func.jvp` makes of any function
    ours        value and tangent in one pass: Triton on a GPU, tiles of PyTorch on the CPU
    forward     SDPA's own kernel on values alone, the floor of a pass without tangents

Times are medians, of processor time on one thread, or of CUDA events. Memory is the most alive at once beyond inputs. Errors are
relative to float64 math attention on the same rounded inputs, where that is not too long.

    python eval/bench_forward_attention.py            # CPU, minutes: float32, 256 to 8192 tokens
    python eval/bench_forward_attention.py --gpu      # CUDA, minutes: bf16 and float32, heads of 64 and 128, 1024 to 16384 tokens
    python eval/bench_forward_attention.py --gpu --tune   # minutes: launches of the Triton kernels, printed and not written

Both write eval/results/forward_attention.json, each its own part, and the table of docs/forward_attention.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.files import write_atomic, write_json
from diffdistill.memory import LiveBytes
from diffdistill.models import forward_attention
from diffdistill.models.forward_attention import attention

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "forward_attention.json"
PAGE = ROOT / "docs" / "forward_attention.md"
MARKERS = ("<!-- table -->\n", "<!-- /table -->")
TEXT = 77
Pair = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """Shapes of an attention: one batch of `heads` heads; `text` is cross-attention to TEXT tokens that stand still."""

    length: int
    size: int
    dtype: torch.dtype
    heads: int
    text: bool = False

    def inputs(self, device: str) -> tuple[Tensor, ...]:
        """Return q, k, v and their tangents."""
        generator = torch.Generator().manual_seed(0)
        keys = TEXT if self.text else self.length
        shapes = [(1, self.heads, length, self.size) for length in (self.length, keys, keys)] * 2
        return tuple(torch.randn(shape, generator=generator).to(device, self.dtype) for shape in shapes)


def of_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v)


def in_two_passes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention whose tangents the call does not take off, so that PyTorch applies the rule of the function."""
    return forward_attention._Attention.apply(q, k, v, None, None, None, None, False, 1 / math.sqrt(q.shape[-1]))[0]


def under_jvp(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], text: bool) -> Pair:
    q, k, v, tq, tk, tv = inputs
    with torch.no_grad():
        if text:
            return torch.func.jvp(lambda q: function(q, k, v), (q,), (tq,))
        return torch.func.jvp(function, (q, k, v), (tq, tk, tv))


def ways(inputs: tuple[Tensor, ...], text: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    return {
        "math": lambda: under_jvp(of_math, inputs, text),
        "two passes": lambda: under_jvp(in_two_passes, inputs, text),
        "ours": lambda: under_jvp(attention, inputs, text),
        "forward": lambda: functional.scaled_dot_product_attention(*inputs[:3]),
    }


def timed(device: str, action: Callable[[], Any], repeats: int) -> float:
    """Return the median milliseconds of an action, once warm."""
    for _ in range(3 if device == "cuda" else 1):
        action()
    return statistics.median(_times(device, action, repeats))


def _times(device: str, action: Callable[[], Any], repeats: int) -> Iterator[float]:
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            yield start.elapsed_time(end)
        else:
            before = time.process_time()
            action()
            yield 1e3 * (time.process_time() - before)


def peak(device: str, action: Callable[[], Any]) -> int:
    """Return the bytes alive at once beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        action()
    return live.peak


def errors(case: Case, device: str) -> list[float]:
    """Return the relative errors of value and tangent."""
    inputs = case.inputs(device)
    exact = under_jvp(of_math, tuple(tensor.double() for tensor in inputs), case.text)
    pairs = zip(under_jvp(attention, inputs, case.text), exact, strict=True)
    return [float((actual.double() - wanted).norm() / wanted.norm()) for actual, wanted in pairs]


def measure(case: Case, device: str) -> dict[str, Any]:
    """Return a row of the table."""
    inputs = case.inputs(device)
    repeats = 20 if device == "cuda" else max(3, 4096 // case.length)
    ms, memory = {}, {}
    for name, action in ways(inputs, case.text).items():
        try:
            ms[name] = timed(device, action, repeats)
            memory[name] = peak(device, action)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    row = {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch."), "ms": ms, "bytes": memory}
    print(row, flush=True)
    return row | {"errors": errors(case, device) if case.length <= (4096 if device == "cuda" else 1024) else None}


def cases(device: str) -> list[Case]:
    """Return what is measured."""
    if device == "cpu":
        selves = [Case(length, 64, torch.float32, 2) for length in (256, 1024, 4096, 8192)]
        return [*selves, Case(1024, 64, torch.bfloat16, 2), Case(4096, 64, torch.float32, 2, text=True)]
    settings = itertools.product((torch.bfloat16, torch.float32), (64, 128), (False, True))
    lengths = {False: (1024, 4096, 16384), True: (4096,)}
    return [Case(length, size, dtype, 16, text) for dtype, size, text in settings for length in lengths[text]]


def tune() -> None:
    """Print the times of launches at 4,096 tokens, fastest first."""
    from diffdistill.models import forward_triton
    from diffdistill.models.forward_triton import Launch, Launches

    for dtype, size in itertools.product((torch.bfloat16, torch.float32), (64, 128)):
        inputs = Case(4096, size, dtype, 16).inputs("cuda")
        if not forward_attention.uses_triton(inputs[0], inputs[2]):
            continue
        found = []
        for rows, keys, warps, stages in itertools.product((64, 128), (16, 32, 64), (4, 8), (1, 2)):
            launch = Launch(rows, keys, warps, stages)
            forward_triton.launches = lambda q, v, launch=launch: Launches(launch, launch)
            try:
                found.append((timed("cuda", ways(inputs, False)["ours"], 5), launch))
            except Exception as error:  # a launch that does not fit says so in many ways
                print(f"{dtype}, head {size}, {tuple(launch)}: {type(error).__name__}")
        print(f"{dtype}, head {size}:", *(f"{ms:.2f} ms {tuple(launch)}" for ms, launch in sorted(found)[:6]), sep="\n  ")


def table(parts: dict[str, dict[str, Any]]) -> str:
    """Return the page's table."""
    lines = []
    for device in (device for device in ("cuda", "cpu") if device in parts):
        part = parts[device]
        lines += [f"**{part['machine']}**, torch {part['torch']}.", ""]
        lines += [
            "| keys | tokens | heads | dtype | math ms | two passes ms | ours ms | math / ours | forward ms | math MiB | ours MiB | error: value, tangent |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in part["rows"]]
        lines += [""]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    ms, memory = row["ms"], row["bytes"]
    shown = {name: f"{ms[name]:,.2f}" if name in ms else "out of memory" for name in ("math", "two passes", "ours", "forward")}
    mib = {name: f"{memory[name] / 2**20:,.1f}" if name in memory else "-" for name in ("math", "ours")}
    ratio = f"**{ms['math'] / ms['ours']:.1f}**" if "math" in ms else "-"
    error = ", ".join(f"{value:.0e}" for value in row["errors"]) if row["errors"] else ""
    keys = f"{TEXT} of text" if row["text"] else "self"
    cells = (
        keys,
        row["length"],
        f"{row['heads']} x {row['size']}",
        row["dtype"],
        shown["math"],
        shown["two passes"],
        shown["ours"],
        ratio,
    )
    return "| " + " | ".join(map(str, (*cells, shown["forward"], mib["math"], mib["ours"], error))) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--tune", action="store_true", help="only time the Triton kernel's launches")
    options = parser.parse_args()
    if options.tune:
        tune()
        return
    device = "cuda" if options.gpu else "cpu"
    torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if options.gpu else "One thread of a CPU"
    parts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    parts[device] = {"machine": machine, "torch": torch.__version__, "rows": [measure(case, device) for case in cases(device)]}
    write_json(RESULTS, parts)
    head, _, rest = PAGE.read_text().partition(MARKERS[0])
    write_atomic(PAGE, (head + MARKERS[0] + table(parts) + MARKERS[1] + rest.partition(MARKERS[1])[2]).encode())


if __name__ == "__main__":
    main()
