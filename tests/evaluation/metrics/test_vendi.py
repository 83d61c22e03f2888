"""The Vendi score of vectors whose cosines are known."""

import math

import pytest
import torch
from metric_cases import F64, normal, sample_of

from diffdistill.evaluation.metrics.sample import Value
from diffdistill.evaluation.metrics.vendi import VendiMetric, vendi_score


@pytest.mark.parametrize("d", [6, 8])
def test_orthogonal_vectors_of_any_length_score_their_number(d):
    vectors = torch.linalg.qr(normal(d, d)).Q[:6] * torch.tensor([1.0, 2, 3, 4, 0.5, 100])[:, None]
    assert vendi_score(vectors) == pytest.approx(6.0, rel=1e-12)


@pytest.mark.parametrize("n", [3, 50])
def test_equal_directions_score_one(n):
    lengths = torch.linspace(0.5, 7, n, dtype=F64)[:, None]
    assert vendi_score(normal(1, 10) * lengths) == pytest.approx(1.0, rel=1e-10)


def test_two_orthogonal_clusters_score_the_exponential_of_the_entropy_of_their_shares():
    x = torch.cat([torch.eye(3)[:1].expand(7, 3), torch.eye(3)[1:2].expand(3, 3)])
    assert vendi_score(x) == pytest.approx(math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.3)), rel=1e-12)


def test_two_equal_clusters_at_an_angle_have_the_eigenvalues_of_their_two_by_two_matrix():
    angle = 1.1
    x = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=F64).repeat(20, 1)
    shares = (1 + math.cos(angle)) / 2, (1 - math.cos(angle)) / 2
    assert vendi_score(x) == pytest.approx(math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-12)


def test_opposite_directions_are_one_as_the_linear_kernel_of_cosines_has_rank_one():
    assert vendi_score(torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]])) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30), (9, 9)])
def test_the_smaller_matrix_gives_the_definition(monkeypatch, n, d):
    x = normal(n, d) + 0.5
    kernel = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    shares = torch.linalg.eigvalsh(kernel / n)
    shares = shares[shares > 1e-12]
    assert vendi_score(x) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-9)
    assert 1.0 < vendi_score(x) < min(n, d)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: torch.ones(len(gram), dtype=F64) / len(gram))
    assert vendi_score(x) == pytest.approx(min(n, d))  # equal eigenvalues, as many as the matrix has


def test_a_vector_without_direction_is_refused():
    with pytest.raises(ValueError, match="1 of 3 feature vectors are zero"):
        vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))


def test_the_metric_needs_no_reference():
    metric = VendiMetric()
    assert metric.needs == {"features"} and metric.absolute
    assert metric(sample_of(torch.eye(5, dtype=F64)), None, 0) == {"vendi": Value(pytest.approx(5.0))}
