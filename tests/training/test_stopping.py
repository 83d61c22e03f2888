"""A signal to one process ends a piece of work in all of them, at one place."""

import pytest
from thread_processes import in_threads

from diffdistill.processes import ALONE
from diffdistill.training.stopping import Interrupted, stopping_together

CALLS = (3, 1, 0)  # of each process, before it waits


def test_processes_that_are_done_wait_for_those_that_are_not_however_often_these_ask():
    def work(processes):
        together = stopping_together(processes)
        answers = [together.asked_to_stop() for _ in range(CALLS[processes.index])]
        together.wait()
        return answers

    assert in_threads(3, work) == [[False] * calls for calls in CALLS]


@pytest.mark.parametrize("signalled", range(3))
def test_a_signal_to_any_ends_all_at_one_call(signalled):
    """It comes while each is at its second call: process 0 asks, the others wait."""
    seen = [0] * 3

    def asked_to_stop(index):
        seen[index] += 1
        return index == signalled and seen[index] >= 2

    def work(processes):
        together = stopping_together(processes)
        for _ in range(CALLS[processes.index]):
            if together.asked_to_stop():
                raise Interrupted
        together.wait()

    assert [type(end) for end in in_threads(3, work, asked_to_stop)] == [Interrupted] * 3
    assert seen == [2, 2, 2]


def test_one_process_alone_is_interrupted_by_its_own_signal():
    assert not stopping_together(ALONE).asked_to_stop()
    stopping_together(ALONE).wait()
    asked = stopping_together(ALONE._replace(asked_to_stop=lambda: True))
    assert asked.asked_to_stop()
    with pytest.raises(Interrupted):
        asked.wait()
