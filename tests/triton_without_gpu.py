"""The Triton kernels compiled as for a GPU, where there is none: what the compiler refuses and what does not fit is found here.

python tests/triton_without_gpu.py    # every entry of `LAUNCHES`: shared memory, registers and what spills, per kernel
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from diffdistill.models import forward_triton
from diffdistill.models.forward_attention import LARGE_GPUS, Options, Tangents
from diffdistill.models.forward_triton import LAUNCHES

KERNELS = ("_attend_kernel", "_gradient_of_rows_kernel", "_gradient_of_keys_kernel")


class Compiled(NamedTuple):
    """A kernel's needs: bytes of shared memory per program, registers per thread, bytes that each thread spills."""

    kernel: str
    shared: int
    registers: int
    spilled: int


def compiled(capability: int, dtype: torch.dtype, size: int, mask: str = "none", causal: bool = False) -> Iterator[Compiled]:
    """Yield the three kernels compiled for a compute capability, called as they are called on a GPU."""
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: capability, get_current_stream=lambda device: 0
        )
    )
    done: list[tuple[str, Any]] = []
    kernels = {name: getattr(forward_triton, name) for name in KERNELS}
    launches, forward_triton.launches = (
        forward_triton.launches,
        lambda q, v: LAUNCHES[capability // 10 in LARGE_GPUS, q.element_size(), max(64, triton.next_power_of_2(q.shape[-1]))],
    )

    class Warm:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: done.append((self.name, kernels[self.name].warmup(*args, grid=grid, **constants)))

    try:
        for name in KERNELS:
            setattr(forward_triton, name, Warm(name))
        forward_triton._precision = lambda: "tf32x3"
        q, k, v = (torch.zeros(2, 4, 256, size, dtype=dtype) for _ in range(3))
        masks = {"none": None, "bool": torch.ones(2, 4, 256, 256, dtype=torch.bool), "bias": torch.zeros(2, 4, 256, 256)}
        options = Options(masks[mask], causal, 0.1)
        o, _, lse = forward_triton.attend(q, k, v, Tangents(q, k, v), options)
        forward_triton.gradients(q, k, v, options, o, lse, o)
    finally:
        forward_triton.launches = launches
        for name, kernel in kernels.items():
            setattr(forward_triton, name, kernel)
    for name, kernel in done:
        yield Compiled(name, kernel.metadata.shared, *registers(kernel.asm["ptx"], capability))


def registers(ptx: str, capability: int) -> tuple[int, int]:
    """Return registers per thread and bytes spilled, as the assembler says."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(assembler), "-v", f"-arch={architecture}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


if __name__ == "__main__":
    for large, width, size in LAUNCHES:
        for each in compiled(90 if large else 80, torch.bfloat16 if width == 2 else torch.float32, size):
            print("large" if large else "small", 8 * width, "bits, head", size, *each, flush=True)
