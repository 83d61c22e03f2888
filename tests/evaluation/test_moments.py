"""Streaming moments against numpy, that parts add, and that they stay on the device of the features."""

import numpy as np
import pytest
import torch

from diffdistill.evaluation.moments import Moments, sums_device


def samples(n=300, d=7, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + offset


def streamed(x, groups=None, num_groups=1, batch=41):
    moments = Moments(x.shape[1], num_groups)
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        moments.update(x[part], None if groups is None else groups[part])
    return moments


def assert_same(moments, x, tolerance=1e-12):
    x = x.numpy()
    np.testing.assert_allclose(moments.mean(), x.mean(0), rtol=tolerance, atol=tolerance)
    covariance = np.cov(x, rowvar=False)
    np.testing.assert_allclose(moments.covariance(), covariance, rtol=0, atol=tolerance * np.abs(covariance).max())


@pytest.mark.parametrize("batch", [1, 41, 300])
def test_streamed_moments_equal_numpy(batch):
    x = samples(offset=3.0)
    assert_same(streamed(x, batch=batch), x)


def test_a_mean_a_hundred_million_times_the_spread_costs_no_digits():
    # The data are exact multiples of 1/1024, so adding 1e8 loses nothing and the covariance must not change.
    x = (samples() * 1024).round() / 1024
    plain, far = streamed(x).covariance(), streamed(x + 1e8).covariance()
    assert torch.allclose(far, plain, rtol=0, atol=1e-12 * float(plain.abs().max()))


def test_a_mean_a_million_times_the_spread_equals_a_longer_float_in_every_way_of_summing():
    x = samples(400, 5) / 3
    x = x + 1e6 * x.std(0)
    groups = torch.arange(400) * 8 // 400
    wide = x.numpy().astype(np.longdouble)  # 64 bits of mantissa; raw sums in float64 would keep four digits here
    for keep, moments in [
        (groups >= 0, streamed(x, groups, 8, batch=37)),
        (groups >= 0, streamed(x[:123], groups[:123], 8) + streamed(x[123:], groups[123:], 8)),
        *((groups != k, rest) for k, rest in enumerate(streamed(x, groups, 8).leave_one_out())),
    ]:
        centred = wide[keep.numpy()] - wide[keep.numpy()].mean(0)
        expected = (centred.T @ centred / (len(centred) - 1)).astype(float)
        np.testing.assert_allclose(moments.covariance(), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
        np.testing.assert_allclose(moments.mean(), wide[keep.numpy()].mean(0).astype(float), rtol=1e-15)


def test_groups_may_come_in_any_order():
    x, groups = samples(), torch.arange(300) % 5
    order = groups.argsort(stable=True)
    mixed, sorted_ = streamed(x, groups, 5, batch=300), streamed(x[order], groups[order], 5, batch=300)
    assert mixed.counts.tolist() == [60] * 5
    assert_same(mixed.subset([3]), x[3::5])
    assert torch.allclose(mixed.outers, sorted_.outers, rtol=0, atol=1e-12 * float(mixed.outers.abs().max()))


def test_one_triangle_of_each_group_is_kept():
    assert streamed(samples()).state()["outers"].shape == (1, 7 * 8 // 2)
    assert torch.equal(streamed(samples()).covariance(), streamed(samples()).covariance().T)


def test_parts_add_to_the_whole_although_their_shifts_differ():
    x = torch.cat([samples(100, offset=-50.0), samples(120, offset=80.0, seed=1), samples(30, seed=2)])
    parts = [streamed(part) for part in x.split([100, 120, 30])]
    total = parts[0] + parts[1] + parts[2]
    assert total.count == 250
    assert_same(total, x)


def test_adding_an_empty_part_changes_nothing():
    x = samples()
    for total in (streamed(x) + Moments(7), Moments(7) + streamed(x)):
        assert_same(total, x)


def test_adding_leaves_the_parts_alone():
    one, two = streamed(samples()), streamed(samples(seed=1))
    before = {key: value.clone() for key, value in one.state().items()}
    (one + two).update(samples(seed=2))
    assert all(torch.equal(before[key], value) for key, value in one.state().items())


def test_leaving_out_a_group_equals_the_moments_of_the_others():
    x = samples(offset=5.0)
    groups = torch.arange(300) * 4 // 300
    moments = streamed(x, groups, 4)
    assert_same(moments, x)
    for group, rest in enumerate(moments.leave_one_out()):
        assert_same(rest, x[groups != group])
        assert_same(moments.subset([k for k in range(4) if k != group]), x[groups != group])
    assert moments.counts.tolist() == [75] * 4
    assert moments.pooled().num_groups == 1
    assert_same(moments.pooled(), x)


def test_state_goes_through_tensors():
    x = samples()
    moments = Moments.from_state({key: value.clone() for key, value in streamed(x[:100]).state().items()})
    moments.update(x[100:])
    assert_same(moments, x)
    assert Moments.from_state(Moments(3, 2).state()).num_groups == 2


def test_float32_features_are_summed_in_float64():
    x = samples(offset=1000.0).float()
    assert_same(streamed(x), x.double())


@pytest.mark.parametrize(
    ("features", "groups"),
    [
        (torch.zeros(2, 3), None),
        (torch.full((2, 4), float("nan")), None),
        (torch.zeros(2, 4), torch.tensor([0, 1])),
        (torch.zeros(2, 4), torch.tensor([0])),
    ],
)
def test_wrong_samples_are_refused(features, groups):
    with pytest.raises(ValueError):
        Moments(4).update(features, groups)


def test_what_is_not_finite_is_found_at_the_latest_when_the_moments_are_read():
    # Off the CPU no update waits for the device, so the sums are all there is to see it by.
    moments = streamed(samples())
    moments.sums[0, 2] = float("nan")
    for read in (moments.mean, moments.covariance, moments.state):
        with pytest.raises(ValueError, match="NaN"):
            read()


def test_sums_stay_on_the_device_of_the_features_where_it_has_float64():
    assert [str(sums_device(name)) for name in ("cpu", "cuda:0", "mps")] == ["cpu", "cuda:0", "cpu"]


@pytest.mark.gpu
def test_moments_on_the_gpu_equal_those_on_the_cpu_and_no_update_waits_for_it():
    x, groups = samples(2000, 64, offset=30.0).float(), torch.arange(2000) * 6 // 2000
    expected, moments = streamed(x, groups, 6, batch=300), Moments(64, 6, "cuda")
    moments.update(x[:1].cuda(), groups[:1])  # kernels and the layout of the triangle are loaded here
    moments = Moments(64, 6, "cuda")
    on_gpu = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(0, 2000, 300):
            moments.update(on_gpu[start : start + 300], groups[start : start + 300])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moments.outers.is_cuda
    assert torch.allclose(
        moments.covariance().cpu(), expected.covariance(), rtol=0, atol=1e-12 * float(expected.covariance().max())
    )
    again = Moments.from_state(moments.state())
    assert torch.equal(again.covariance(), again.covariance().T)
    moments.update(torch.full((2, 64), float("inf"), device="cuda"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.mean()


def test_covariance_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        streamed(samples(1)).covariance()
