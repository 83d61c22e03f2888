"""How much the images of a prompt differ: against the pairs one by one."""

import itertools

import pytest
import torch
from metric_cases import normal

from diffdistill.evaluation.metrics.prompts import LpipsDiversityMetric, PromptSpreadMetric, prompt_spread
from diffdistill.evaluation.metrics.sample import Sample


def test_the_spread_is_the_mean_over_pairs_of_one_less_their_cosine():
    features = normal(12, 5)
    cosine = torch.nn.functional.cosine_similarity
    for found, images in zip(prompt_spread(features, 4), features.split(4), strict=True):
        pairs = [1 - cosine(a, b, dim=0) for a, b in itertools.combinations(images, 2)]
        assert float(found) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-12)


def test_equal_images_do_not_spread_opposite_ones_do_by_two():
    one = normal(1, 5)
    assert float(prompt_spread(torch.cat([one, 3 * one]), 2)) == pytest.approx(0, abs=1e-12)
    assert float(prompt_spread(torch.cat([one, -one]), 2)) == pytest.approx(2)


def test_the_metrics_average_over_prompts_with_their_error():
    spread = torch.tensor([0.1, 0.3])
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([[0.9, 0.19**0.5], [0.7, 0.51**0.5]])
    features = torch.stack([one, other[0], one, other[1]])
    for metric, sample in (
        (PromptSpreadMetric(per_prompt=2), Sample(features=features)),
        (LpipsDiversityMetric(), Sample(diversity=spread)),
    ):
        [(_, value)] = metric(sample, Sample(), 0).items()
        assert value.estimate == (pytest.approx(0.2), pytest.approx(0.1))
        torch.testing.assert_close(value.each, spread.double())


@pytest.mark.parametrize(("count", "per_prompt"), [(4, 1), (5, 2)])
def test_images_that_make_no_pairs_are_refused(count, per_prompt):
    with pytest.raises(ValueError, match=f"got {count} images, {per_prompt} of a prompt"):
        prompt_spread(normal(count, 3), per_prompt)
