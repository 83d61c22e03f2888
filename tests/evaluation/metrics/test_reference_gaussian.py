"""The factor of a covariance, also a singular one, and what is stored of a reference."""

import pytest
import torch
from metric_cases import F64, covariance, normal, sample_of

from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian, covariance_factor
from diffdistill.evaluation.metrics.sample import Sample


def test_factor_gives_the_covariance_back():
    c = covariance(9, 0)
    factor = covariance_factor(c)
    assert torch.allclose(factor @ factor.T, c, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [0, 1, 10, 18, 19])
def test_factor_of_a_singular_covariance_is_as_narrow_as_its_rank(rank):
    for seed in range(20):  # at rank 19 of 20 Cholesky often ends, with a last pivot that is rounding alone
        mix = normal(20, rank, seed=seed)
        factor = covariance_factor(mix @ mix.T)
        assert factor.shape == (20, rank)
        assert torch.allclose(factor @ factor.T, mix @ mix.T, rtol=0, atol=1e-13 * max(1, rank))


def test_factor_keeps_variances_that_are_small_but_not_rounding():
    sd = torch.logspace(0, -6, 12, dtype=F64)  # variances down to 1e-12 of the largest
    basis = torch.linalg.qr(normal(12, 12)).Q
    factor = covariance_factor(basis * sd**2 @ basis.T)
    assert factor.shape == (12, 12)
    assert torch.allclose(torch.linalg.svdvals(factor), sd, rtol=1e-3)


def test_what_is_stored_gives_the_gaussian_back():
    moments = sample_of(normal(50, 6)).moments
    for gaussian in (ReferenceGaussian.of(moments), ReferenceGaussian.from_covariance(moments.mean(), moments.covariance())):
        again = ReferenceGaussian.from_state(gaussian.state())
        assert torch.equal(again.mean, moments.mean())
        assert torch.equal(again.factor, covariance_factor(moments.covariance()))
        assert again.count == gaussian.count
    assert ReferenceGaussian.of(moments).count == 50
    assert ReferenceGaussian.from_covariance(moments.mean(), moments.covariance()).count is None


def test_a_stored_sample_may_hold_the_gaussian_in_the_place_of_moments():
    sample = sample_of(normal(50, 6)).as_reference()
    again = Sample.from_tensors(sample.tensors())
    assert isinstance(again.moments, ReferenceGaussian)
    assert torch.equal(again.moments.factor, sample.moments.factor)
    assert torch.equal(again.features, sample.features)
    assert again.as_reference().moments is again.moments


def test_features_that_never_vary_have_no_part_in_the_factor():
    x = torch.zeros(4, 300, dtype=F64)
    x[:, ::10] = normal(4, 30)
    covariance = x.T.cov()
    factor = covariance_factor(covariance)
    assert factor.shape == (300, 3) and bool((factor[1::10] == 0).all())
    torch.testing.assert_close(factor @ factor.T, covariance)
    assert covariance_factor(torch.zeros(5, 5, dtype=F64)).shape == (5, 0)


def test_where_lapack_finds_no_eigenvalues_the_singular_values_serve(monkeypatch):
    x = normal(4, 30)
    expected = covariance_factor(x.T.cov())

    def fail(_):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    found = covariance_factor(x.T.cov())
    assert found.shape == expected.shape == (30, 3)
    torch.testing.assert_close(found @ found.T, expected @ expected.T)
