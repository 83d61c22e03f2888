"""Tests run on the CPU whatever the machine has, for what they compare is made there. Those of a GPU are `pytest -m gpu`, by themselves."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nursery import Nursery


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often tests/faults/test_kills.py kills each command")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks; processes that tests start have it too
        os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on the CPU; it asks when it is imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files with slow tests first: one that came last would leave the other processes idle. Before them come tests that fork.

    Autograd works in no fork of a process in which something was compiled.
    """
    import torch

    slow = Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: (item.path.parent.name != "faults", -slow[item.path]))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: make test-gpu"))


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep below pytest's own folder, and remove, what tests and their processes, killed ones too, leave in the temporary directory."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)  # looked up anew
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where processes are born in no time."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def checked_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports be verified here: the imports of a process of its own take longer than everything else in such a test."""
    from diffdistill.export import stock_check

    def run(folders: list[str], base: str | None) -> dict[str, Any]:
        results = [stock_check.check_folder(Path(folder), base) for folder in folders]
        return {"results": results, "versions": {}, "diffdistill_modules": []}

    monkeypatch.setattr(sys.modules["diffdistill.export.verify"], "_run", run)
