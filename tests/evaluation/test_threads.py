"""Work in threads keeps its order, its bound and its errors."""

import threading
import time

import pytest

from diffdistill.evaluation.threads import ordered_map, usual_threads


def test_results_come_in_the_order_of_the_items():
    def slower_at_first(k):
        time.sleep(0.002 * (8 - k))
        return k * k

    assert list(ordered_map(slower_at_first, range(8), num_threads=4)) == [k * k for k in range(8)]


def test_threads_work_while_the_caller_does():
    started = threading.Event()

    def note(k):
        if k == 1:
            started.set()
        return k

    results = ordered_map(note, range(3), num_threads=1)
    assert next(results) == 0
    assert started.wait(5)


def test_no_more_than_ahead_are_taken_early():
    taken = []

    def items():
        for k in range(100):
            taken.append(k)
            yield k

    results = ordered_map(lambda k: k, items(), num_threads=2, ahead=5)
    assert next(results) == 0 and taken == [0, 1, 2, 3, 4, 5]
    assert next(results) == 1 and taken[-1] == 6


def test_an_error_is_raised_in_its_turn_and_the_rest_is_dropped():
    done = []

    def fail_at_three(k):
        if k == 3:
            raise OSError("three")
        done.append(k)
        return k

    results = ordered_map(fail_at_three, range(1000), num_threads=1, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="three"):
        next(results)
    assert max(done) < 20


def test_leaving_early_ends_the_threads():
    before = threading.active_count()
    results = ordered_map(lambda k: k, range(1000), num_threads=3)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_there_is_at_least_one_thread():
    assert 1 <= usual_threads() <= 16
