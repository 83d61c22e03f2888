"""The end of one process ends the others, and they say which one and why; a good end ends nobody else."""

import pytest

pytestmark = pytest.mark.slow

MEMBER = """
import sys, time, torch
from diffdistill.errors import UserError
from diffdistill.training import lifeline
from diffdistill.training.lifeline import Lifeline
lifeline.GRACE = 1.0
torch.distributed.init_process_group("gloo")
index = torch.distributed.get_rank()
with Lifeline(index, 3, torch.device("cpu"), lambda: "Here is what to do."):
    exec(sys.argv[1 + index])
"""


def outcomes(nursery, folder, *code):
    """Run three processes with a line of code each; return exit status and output of each."""
    logs = [folder / f"log{rank}" for rank in range(3)]
    codes = [nursery.wait(process) for process in nursery.start_group(logs, *code, code=MEMBER)]
    return codes, [log.read_text() for log in logs]


def test_an_error_in_one_process_reaches_those_that_wait_for_it_and_those_that_hang(nursery, tmp_path):
    waits, hangs = "torch.distributed.barrier()", "time.sleep(3000)"
    codes, said = outcomes(nursery, tmp_path, waits, hangs, "raise UserError('no such file.')")
    assert codes == [1, 1, 1]
    for rank in (0, 1):
        assert "process 2 (pid " in said[rank] and " ended with UserError: no such file. What it said last" in said[rank], said[
            rank
        ]
        assert f"is in {tmp_path}/log2. So this run cannot go on. Here is what to do." in said[rank]
    assert "So this run cannot go on" not in said[2]


def test_processes_may_end_well_one_after_another(nursery, tmp_path):
    codes, said = outcomes(
        nursery, tmp_path, "time.sleep(1)", "pass", "time.sleep(2)"
    )  # the first, which keeps the store, in between
    assert codes == [0, 0, 0], said
