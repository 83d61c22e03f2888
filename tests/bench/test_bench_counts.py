"""The passes of a step are those that the method's docstring promises, exactly: for every method, in both layouts."""

from collections import Counter

import bench_cells
import pytest

from diffdistill.bench.passes import count, recorded
from diffdistill.distillers import registry

STEPS = 3  # of DMD2 a whole cycle and the student's next turn

ONCE = {
    "guidance": {"teacher forward": 2, "student weights": 1},
    "progressive": {"source forward": 2, "student weights": 1},
    "consistency": {"teacher forward": 1, "student forward": 1, "student weights": 1},
    "consistency-ema": {"teacher forward": 2, "target forward": 1, "student weights": 1},
    "lcm": {"teacher forward": 2, "student forward": 1, "student weights": 1},
    "dmd": {"student weights": 2, "teacher forward": 2, "fake forward": 1, "fake weights": 1},
    "vsd": {"student weights": 1, "teacher forward": 2, "fake forward": 1, "fake weights": 1},
    "agd": {"student weights": 1},
}
"""Of methods whose steps are all alike: whose network, what for, and batches; a guided teacher counts two."""

GAN = {  # of DMD2's students' turn, and of every fake's
    "dmd2": ({}, {}),
    "dmd2-gan": (
        {"teacher[mid] inputs": 1, "head inputs": 1},
        {"teacher[mid] forward": 2, "head weights": 2},
    ),
    "dmd2-gan-fake": (
        {"fake[mid] inputs": 1, "head inputs": 1},
        {"fake[mid] weights": 2, "head both": 2},
    ),
}


def promised(method: str, layout: str, step: int, simulated: int) -> Counter:
    """Return what a step does, `simulated` being the passes of DMD2's backward simulation."""
    if method in ONCE:
        passes = Counter(ONCE[method])
    elif step % 2 == 0:
        own, every = GAN[method]
        passes = Counter({"student forward": simulated, "student weights": 1, "teacher forward": 2, "fake forward": 1})
        passes += Counter({"fake weights": 1}) + Counter(own) + Counter(every)
    else:
        passes = Counter({"student forward": simulated + 1, "fake weights": 1}) + Counter(GAN[method][1])
    if layout == "shared" and passes["fake forward"]:  # the batch is small, so both are asked at once
        passes["teacher+fake forward"] = passes.pop("teacher forward") + passes.pop("fake forward")
    return +passes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher") / "small"


@pytest.mark.parametrize("layout", bench_cells.CPU.layouts)
@pytest.mark.parametrize("method", bench_cells.CPU.methods)
def test_a_step_does_the_promised_passes_and_no_other(folder, method, layout):
    opened = bench_cells.session(bench_cells.with_teacher(bench_cells.small_teacher(folder)), method, layout)
    for step in range(STEPS if method in GAN else 1):
        simulated = opened.engine._rng(step, 0, 0).shared_integer(4)
        with recorded(opened.roles) as calls:
            opened.step()
        found = Counter()
        for what, num in count(calls).items():
            found[f"{what.role}{f'[{what.tap}]' if what.tap else ''} {what.kind}"] += num * what.rows / bench_cells.BATCH
        assert found == promised(method, layout, step, simulated), step


@pytest.mark.parametrize("definition", [bench_cells.CPU, bench_cells.GPU], ids=["cpu", "gpu"])
def test_every_method_is_in_the_definitions(definition):
    assert {method.name for method in definition.methods.values()} >= registry.DISTILLERS.keys()


def test_the_docstrings_name_what_a_step_costs():
    for method in registry.DISTILLERS.values():
        module = __import__(method.__module__, fromlist=["_"])
        assert "step costs" in " ".join((module.__doc__ or "").split()), method.name
