"""Whether the oldest versions that pyproject.toml allows work, and whether old and new read one another's exports.

    make test-oldest                              # the same, in an environment that it makes
    python eval/oldest_versions.py OLD_PYTHON     # test with the old versions, exchange exports, write the table of docs/export.md

The exchange: each side exports students of the tests' small text-to-image pipelines, and the other side checks them with stock
libraries only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from diffdistill.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "export.md"
MARKERS = ("<!-- versions -->\n", "<!-- /versions -->")
LIBRARIES = ("diffusers", "peft", "transformers")
TESTS = ("tests/export", "tests/models", "tests/sampling/test_stock.py", "tests/training/test_text_runs.py")


class Checked(NamedTuple):
    """What one side found in the other's exports."""

    reader: str  # its versions
    verdicts: dict[str, str]  # of every export: the largest error, or the check that failed
    passed: bool


def main() -> int:
    """Test, exchange, write the table; exit status 1 when anything fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, nargs="?", help="the interpreter that has the old versions")
    parser.add_argument(
        "--write", type=Path, nargs=2, metavar=("PLACE", "EXPORTS"), help="only export: what each side is asked for"
    )
    arguments = parser.parse_args()
    if arguments.write:
        write(*arguments.write)
        return 0
    old, new = arguments.old.absolute(), Path(sys.executable)
    tests = run(old, "-m", "pytest", "-rs", *TESTS)
    with tempfile.TemporaryDirectory() as folder:
        place, by_old, by_new = (Path(folder) / name for name in ("place", "by old", "by new"))
        # The old side goes first and so saves the bases: transformers 4 does not read the tokenizers of 5.
        for side, exports in ((old, by_old), (new, by_new)):
            run(side, __file__, "--write", str(place), str(exports)).check_returncode()
        found = [check(old, by_new), check(new, by_old)]
    table = "\n".join(rows(*found)) + "\n"
    print(table)
    head, rest = PAGE.read_text().split(MARKERS[0])
    write_atomic(PAGE, head + MARKERS[0] + table + MARKERS[1] + rest.split(MARKERS[1])[1])
    return int(tests.returncode != 0 or not all(side.passed for side in found))


def run(python: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run an interpreter on this checkout."""
    quiet = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    environment = os.environ | quiet | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([str(python), *arguments], cwd=ROOT, env=environment, text=True, check=False, **options)


def write(place: Path, exports: Path) -> None:
    """Export what the tests of text-to-image students export, and every transformer's whole pipeline; bases are in `place`."""
    builders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["pythonpath"]
    sys.path[:0] = [str(ROOT / folder) for folder in ("tests/export", *builders)]
    from test_text_export import GOOD, write

    merged = {f"{name}-merged": (name, "ddim", "merged", "merged") for name in ("sdxl", "pixart", "sd3", "flux", "sana")}
    for pipeline, rule, kind, written in (GOOD | merged).values():
        write(pipeline, rule, kind, place, exports / f"{pipeline} {written} {rule}")


def check(reader: Path, exports: Path) -> Checked:
    """Let one side's stock libraries check what the other wrote."""
    script = ROOT / "diffdistill" / "export" / "stock_check.py"
    folders = [str(folder) for folder in sorted(exports.iterdir())]
    report = json.loads(run(reader, "-I", str(script), *folders, "--json", stdout=subprocess.PIPE).stdout.splitlines()[-1])
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in LIBRARIES)
    verdicts = {Path(result["folder"]).name: verdict(result) for result in report["results"]}
    return Checked(versions, verdicts, all(result["passed"] for result in report["results"]))


def verdict(result: dict[str, Any]) -> str:
    """Return the largest error of an export's checks, or the check that failed."""
    failed = [f"{check['name']}: {check['detail']}" for check in result["checks"] if check["status"] == "failed"]
    return failed[0] if failed else f"{max(check['error'] or 0.0 for check in result['checks']):.1e}"


def rows(read_by_old: Checked, read_by_new: Checked) -> list[str]:
    """Return the lines of the table."""
    cells = [(*name.rsplit(" ", 2), verdict, read_by_new.verdicts[name]) for name, verdict in read_by_old.verdicts.items()]
    return [
        f"Old: {read_by_old.reader}. New: {read_by_new.reader}.",
        "",
        "| pipeline | kind | rule | by new, read by old | by old, read by new |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


if __name__ == "__main__":
    sys.exit(main())
