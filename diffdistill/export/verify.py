"""Load an export in a new process with stock libraries only, compare it with the student, and write down the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffdistill.errors import MachineError
from diffdistill.export.manifest import Manifest, Verification
from diffdistill.models.own_code import refuse_own_code

SCRIPT = Path(__file__).with_name("stock_check.py")


class VerificationError(MachineError):
    """Stock diffusers does not reproduce the student from the export."""


def verify(folder: str | Path, base: str | None = None) -> Verification:
    """Check one export and record the result in its manifest.

    Args:
        folder: an export.
        base: where its base pipeline is, when that is not where the manifest says.
    Returns:
        every check with its largest error; `passed` says whether all hold.
    Raises:
        UserError: not an export.
        MachineError: the checking process died.
    """
    return verify_all([folder], base)[0]


def verify_all(folders: Sequence[str | Path], base: str | None = None) -> list[Verification]:
    """Check several exports in one process (importing the libraries takes longest); as `verify`."""
    manifests = [Manifest.read(folder) for folder in folders]
    for index in (Path(folder) / "model_index.json" for folder in folders):
        if index.is_file():
            refuse_own_code(json.loads(index.read_bytes()), index.parent)
    report = _run([str(folder) for folder in folders], base)
    assert not report["diffdistill_modules"], f"the check imported {report['diffdistill_modules']}; it must be stock only"
    found = []
    for folder, manifest, result in zip(folders, manifests, report["results"], strict=True):
        verification = Verification(
            passed=result["passed"], checks=result["checks"], seconds=result["seconds"], versions=report["versions"]
        )
        manifest.model_copy(update={"verification": verification}).write(folder)
        found.append(verification)
    return found


def _run(folders: list[str], base: str | None) -> dict[str, Any]:
    command = [sys.executable, "-I", str(SCRIPT), *folders, "--json", *(["--base", base] if base else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode not in (0, 1) or not lines or not lines[-1].startswith("{"):
        raise MachineError(f"the checking process ended with status {done.returncode}: {done.stderr.strip()[-800:]}")
    return json.loads(lines[-1])
