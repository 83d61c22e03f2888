"""Processes without the seconds that their imports take: forks of an interpreter that has done nothing else."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NURSERY = """
import json, os, sys, traceback
import accelerate, diffusers, safetensors.torch, sklearn.datasets, torch.distributed
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel
import diffdistill.training.run
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1), os.dup2(out, 2)
        os.environ.update(request["environment"])
        sys.argv = ["driver", *request["arguments"]]
        code = 1
        try:
            exec(compile(request["code"], "driver", "exec"), {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(answer, flush=True)
"""


class Nursery:
    """An interpreter that has imported everything and trained nothing; scripts are run in forks of it, at once."""

    def __init__(self) -> None:
        pipes = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", NURSERY], env=environment, cwd=Path(__file__).parent, **pipes)

    def _ask(self, **request) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, output: Path, *arguments: object, code: str, **environment: str) -> int:
        """Start a script, whose output is appended to a file, and return its process id."""
        plain = [str(argument) for argument in arguments]
        return self._ask(output=str(output), arguments=plain, environment=environment, code=code)

    def start_group(self, outputs: Sequence[Path], *arguments: object, code: str, **environment: str) -> list[int]:
        """Start as many processes that work together as there are outputs, without a launcher, and return their ids."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        count = str(len(outputs))
        group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        return [
            self.start(output, *arguments, code=code, **group, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank, output in enumerate(outputs)
        ]

    def wait(self, process: int) -> int:
        """Return the exit code, negative for a signal."""
        return self._ask(wait=process)

    def close(self) -> None:
        """End the interpreter."""
        self._process.stdin.close()
        self._process.wait()


def wait_until(holds: Callable[[], object], seconds: float = 100) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it does not in time.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {seconds} seconds")
        time.sleep(0.02)
