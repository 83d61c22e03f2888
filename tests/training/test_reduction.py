"""Gradients of several processes are summed in buckets that every process sends in one order, each as early as it can."""

import pytest
import torch
from torch.nn import Parameter

from diffdistill.training.reduction import Replicated, buckets


def test_buckets_go_from_the_last_parameter_to_the_first_and_hold_one_dtype():
    sizes = [4, 1, 2, 3, 1]
    parameters = [Parameter(torch.zeros(size)) for size in sizes]
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    assert [[numbers[p] for p in bucket] for bucket in buckets(parameters, 4 * 4)] == [[4, 3], [2, 1], [0]]
    assert [[numbers[p] for p in bucket] for bucket in buckets(parameters, 1)] == [[4], [3], [2], [1], [0]]
    parameters[3] = Parameter(torch.zeros(3, dtype=torch.float64))
    assert [len(bucket) for bucket in buckets(parameters, 10**6)] == [1, 1, 3]


@pytest.fixture
def sent(monkeypatch):
    """The sizes sent so far; the other process has the same gradients as this one."""
    sizes = []

    class Work:
        def wait(self):
            sizes.append("waited")

    def all_reduce(tensor, async_op=False):
        sizes.append(len(tensor))
        tensor.mul_(2)
        return Work() if async_op else None

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return sizes


def test_the_last_pass_sends_full_buckets_while_it_runs_and_the_rest_after_it(sent):
    first, unused, last = (Parameter(torch.full((size,), 3.0)) for size in (1, 2, 3))
    parameters, reduction = [first, unused, last], Replicated(2, bytes_per_bucket=1)
    seen_by_first = []
    first.register_post_accumulate_grad_hook(lambda _: seen_by_first.append(list(sent)))
    for scale, is_last in ((1.0, False), (10.0, True)):
        reduction.before_backward(parameters, is_last)
        (scale * (last.sum() * first.sum())).backward()
    assert seen_by_first[0] == [] and sent == [3]  # nothing in the first pass; `unused` holds back what comes after it
    reduction.after_backward(parameters)
    assert sent == [3, 2, 1, "waited", "waited", "waited"]
    assert first.grad.tolist() == [2 * 11 * 9.0]
    assert unused.grad.tolist() == [0, 0]
    assert last.grad.tolist() == [2 * 11 * 3.0] * 3
    (first.sum() * 1.0).backward()
    assert len(sent) == 6  # the hooks are gone


def test_where_every_parameter_takes_part_all_is_sent_while_the_pass_runs_turn_after_turn(sent):
    parameters, reduction = [Parameter(torch.full((size,), 3.0)) for size in (1, 2, 3)], Replicated(2, bytes_per_bucket=1)
    for _ in range(2):
        reduction.before_backward(parameters, True)
        sum(parameter.sum() for parameter in parameters).backward()
        assert sorted(sent) == [1, 2, 3]
        reduction.after_backward(parameters)
        assert [parameter.grad.tolist() for parameter in parameters] == [[2.0], [2.0] * 2, [2.0] * 3]
        assert sent == [3, 2, 1, "waited", "waited", "waited"]
        sent.clear()
        for parameter in parameters:
            parameter.grad = None


def test_values_are_summed_in_float64_and_norms_are_those_of_the_summed_gradients(sent):
    values, (norm,) = Replicated(2).totals(torch.tensor([1.0, 2.0]), [[torch.tensor([3.0]), torch.tensor([4.0])]])
    assert values.dtype == torch.float64 and values.tolist() == [2, 4]
    assert float(norm) == 5
    assert sent == [2]


def test_one_process_sums_nothing(sent):
    parameter = Parameter(torch.ones(2))
    reduction = Replicated(1)
    reduction.before_backward([parameter], True)
    reduction.after_backward([parameter])
    assert parameter.grad.tolist() == [0, 0]
    assert reduction.totals(torch.ones(1), [[parameter.grad]])[0].tolist() == [1]
    assert sent == []
