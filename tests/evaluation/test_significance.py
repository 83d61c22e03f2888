"""Differences of two models: their error, their p value under no difference, and the power that equal seeds give."""

import math

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.frechet import frechet_to_reference, jackknife_frechet
from diffdistill.evaluation.metrics.gaussian import ReferenceGaussian
from diffdistill.evaluation.moments import Moments
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.result import Cost, Evaluation, Summary
from diffdistill.evaluation.significance import Blocks, compare_values, mean_of, sign_test, unpaired

F64 = torch.float64
DIM, NUM_IMAGES, NUM_GROUPS = 6, 240, 12
GROUPS = torch.arange(NUM_IMAGES) * NUM_GROUPS // NUM_IMAGES
REFERENCE = ReferenceGaussian(torch.zeros(DIM, dtype=F64), torch.eye(DIM, dtype=F64))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def moments_of(x):
    moments = Moments(x.shape[1], NUM_GROUPS)
    moments.update(x, GROUPS)
    return moments


def distances(*blocks):
    """The distances of blocks of features to REFERENCE, as an evaluation keeps them."""
    found = [jackknife_frechet(moments_of(x), REFERENCE) for x in blocks]
    values, deleted = [whole.value for whole, _ in found], [deleted for _, deleted in found]
    return Blocks(torch.tensor(values, dtype=F64), torch.tensor(deleted, dtype=F64), (NUM_IMAGES // NUM_GROUPS,) * NUM_GROUPS)


def trials(second, repeats=200):
    """Paired and unpaired p values of a model z + 0.4 e_0 against `second`(z) from equal noise z."""
    paired, separate = [], []
    for seed in range(repeats):
        z = normal(NUM_IMAGES, DIM, seed=seed)
        first = z.clone()
        first[:, 0] += 0.4
        one, two = distances(first), distances(second(z))
        paired.append((two - one).estimate().p)
        separate.append(unpaired(one.estimate(), two.estimate()).p)
    return torch.tensor(paired), torch.tensor(separate)


def test_without_a_difference_five_percent_of_trials_are_significant():
    def as_far_in_another_direction(z):
        z = z.clone()
        z[:, 1] += 0.4
        return z

    paired, _ = trials(as_far_in_another_direction)
    assert 0.01 <= float((paired < 0.05).double().mean()) <= 0.095  # of 200 trials, 5 percent and three of its deviations
    assert 0.38 <= float((paired < 0.5).double().mean()) <= 0.62


def test_equal_seeds_show_a_difference_that_two_errors_would_hide():
    def slightly_farther(z):
        z = z.clone()
        z[:, 0] += 0.44
        return z

    paired, separate = trials(slightly_farther, 50)
    assert float((paired < 0.05).double().mean()) > 0.9
    assert float((separate < 0.05).double().mean()) < 0.1


def test_the_sign_says_which_is_the_larger():
    z = normal(NUM_IMAGES, DIM)
    near, far = distances(z), distances(z * 2)
    estimate = (far - near).estimate()
    assert estimate.value > 0 and estimate.interval().low > 0 and estimate.degrees == NUM_GROUPS - 1
    assert (near - far).estimate().value == pytest.approx(-estimate.value, rel=1e-12)
    assert (near - near).estimate().p == 1


def test_a_distance_is_compared_without_its_bias():
    # Deleting a group raises a distance of F + c / N to F + c / (N - n); with other c for both, only F is left to compare.
    n = NUM_IMAGES // NUM_GROUPS

    def lawful(limit, constant):
        deleted = torch.full((1, NUM_GROUPS), limit + constant / (NUM_IMAGES - n), dtype=F64)
        return Blocks(torch.tensor([limit + constant / NUM_IMAGES], dtype=F64), deleted, (n,) * NUM_GROUPS)

    assert (lawful(3.0, 50.0) - lawful(2.0, 500.0)).estimate().value == pytest.approx(1.0, rel=1e-10)


def test_blocks_of_seeds_combine_as_independent_estimates():
    pairs = [(normal(NUM_IMAGES, DIM, seed=k), normal(NUM_IMAGES, DIM, seed=k) * 1.1) for k in range(3)]
    each = [(distances(two) - distances(one)).estimate() for one, two in pairs]
    found = (distances(*(two for _, two in pairs)) - distances(*(one for one, _ in pairs))).estimate()
    assert found == mean_of(each)
    assert found.value == pytest.approx(sum(part.value for part in each) / 3, rel=1e-12)
    assert found.se == pytest.approx(math.sqrt(sum(part.se**2 for part in each)) / 3, rel=1e-12)
    assert NUM_GROUPS - 1 < found.degrees <= 3 * (NUM_GROUPS - 1)


def test_scores_of_images_are_compared_image_by_image():
    noise, gain = normal(1, 500), normal(1, 500, seed=1)
    one = Blocks(noise.mean(1), each=noise)
    two = Blocks((noise + 0.1 * gain + 0.02).mean(1), each=noise + 0.1 * gain + 0.02)
    difference = 0.1 * gain[0] + 0.02
    estimate = (two - one).estimate()
    assert estimate.value == pytest.approx(float(difference.mean()), rel=1e-9)
    assert estimate.se == pytest.approx(float(difference.std()) / math.sqrt(500), rel=1e-9)
    assert (estimate.unit, estimate.degrees) == ("images", 499)
    assert unpaired(one.estimate(), two.estimate()).se > 10 * estimate.se


def test_images_of_one_prompt_count_as_one():
    per_prompt = normal(1, 50).repeat_interleave(4, 1)
    estimate = Blocks(torch.zeros(1), each=per_prompt, per_prompt=4).estimate()
    assert (estimate.unit, estimate.degrees) == ("prompts", 49)
    assert estimate.se == pytest.approx(float(per_prompt[0, ::4].std()) / math.sqrt(50), rel=1e-9)


def test_shares_are_compared_by_the_exact_test_of_mcnemar():
    # 30 images right in both, 9 only in the second, 1 only in the first: P(at most 1 of 10 heads), twice.
    one = torch.tensor([[1.0] * 30 + [0.0] * 9 + [1.0] + [0.0] * 10], dtype=F64)
    two = torch.tensor([[1.0] * 30 + [1.0] * 9 + [0.0] + [0.0] * 10], dtype=F64)
    estimate = (Blocks(two.mean(1), each=two) - Blocks(one.mean(1), each=one)).estimate()
    assert estimate.value == pytest.approx(8 / 50)
    assert estimate.p == pytest.approx(2 * (1 + 10) / 2**10, rel=1e-12)
    assert sign_test(5, 5) == sign_test(0, 0) == 1


def test_values_that_keep_nothing_of_their_images_are_compared_over_blocks():
    one, two = torch.tensor([1.0, 2.0, 4.0], dtype=F64), torch.tensor([1.5, 2.6, 4.4], dtype=F64)
    estimate = (Blocks(two) - Blocks(one)).estimate()
    assert (estimate.unit, estimate.degrees) == ("blocks of seeds", 2)
    assert estimate.value == pytest.approx(0.5)
    assert estimate.se == pytest.approx(0.1 / math.sqrt(3), rel=1e-6)
    assert Blocks(one[:1]).estimate() is None


def evaluation(x, obeyed, **fields):
    sizes = {"num_images": NUM_IMAGES, "first_seeds": [0], "jackknife_groups": NUM_GROUPS}
    protocol = Protocol(**{**load_protocol("digits").model_dump(), **sizes, **fields})
    kept = distances(x)
    fid = Summary(float(kept.values[0]), None, None, (float(kept.values[0]),))
    share = Summary(float(obeyed.mean()), None, None, (float(obeyed.mean()),))
    return Evaluation(
        protocol=protocol.model_dump(mode="json"),
        protocol_hash=protocol.hash,
        views=[],
        num_images=NUM_IMAGES,
        num_blocks=1,
        values={"fid": fid, "fid_jackknife": fid, "obeyed": share, "kid": fid},
        reference_values={},
        skipped={},
        warnings=[],
        cost=Cost(),
        seconds={},
        device="cpu",
        versions={},
        each={"obeyed": obeyed[None]},
        deleted={"fid": kept.deleted},
    )


def test_two_evaluations_are_compared_in_every_value_that_has_an_error():
    z = normal(NUM_IMAGES, DIM)
    teacher = evaluation(z, (torch.arange(NUM_IMAGES) % 10 > 1).double())
    student = evaluation(z * 1.5, (torch.arange(NUM_IMAGES) % 10 > 0).double())
    found = compare_values(teacher, student)
    assert list(found) == ["fid", "obeyed"]  # the distance once, without its bias; kid has one block and nothing of its images
    expected = frechet_to_reference(moments_of(z * 1.5), REFERENCE).value - frechet_to_reference(moments_of(z), REFERENCE).value
    assert found["fid"].estimate.value == pytest.approx(expected, rel=0.05)
    assert found["fid"].second - found["fid"].first == pytest.approx(found["fid"].estimate.value, rel=1e-9)
    assert found["fid"].sentence("teacher", "student").startswith("fid: student is 1.") and found["fid"].is_significant()
    assert "higher than teacher (95% interval +0.98" in found["fid"].sentence("teacher", "student")
    assert "p < 0.0001, paired over groups of images of equal seeds" in found["fid"].sentence("teacher", "student")
    assert "obeyed: student is 0.1 higher than teacher" in found["obeyed"].sentence("teacher", "student")
    same = compare_values(teacher, teacher)["fid"]
    assert same.sentence("a", "b").startswith("fid: no difference between a and b is shown (+0, 95% interval")


def test_evaluations_under_other_protocols_are_refused():
    z, share = normal(NUM_IMAGES, DIM), torch.ones(NUM_IMAGES, dtype=F64)
    with pytest.raises(UserError, match="first_seeds"):
        compare_values(evaluation(z, share), evaluation(z, share, first_seeds=[NUM_IMAGES]))
