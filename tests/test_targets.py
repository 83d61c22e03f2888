"""What a command is pointed at: the same seeds make the same images, and the way there can be watched."""

import pytest
import torch

from diffdistill.targets import StockSampler, open_target

SEEDS, CLASSES = [3, 1, 4], torch.tensor([0, 5, 9])


@pytest.fixture(scope="module")
def target():
    return open_target("digits-unet")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_watching_a_stock_scheduler_changes_no_image_and_gives_the_predictions_of_our_sampler(target, guidance):
    ours = target.sampler(4, guidance)
    stock = StockSampler(ours.scheduler_config(target.teacher.scheduler_config), 4, guidance)
    own, watched = target.predictions(ours)(SEEDS, CLASSES), target.predictions(stock)(SEEDS, CLASSES)
    assert [step.t for step in watched] == [step.t for step in own] == [999, 749, 499, 249]
    for mine, theirs in zip(own, watched, strict=True):
        torch.testing.assert_close(mine.images, theirs.images, atol=1e-4, rtol=0)
    for sampler, steps in ((ours, own), (stock, watched)):
        torch.testing.assert_close(target.generator(sampler)(SEEDS, CLASSES), steps[-1].images, atol=1e-5, rtol=0)
    assert (own[0].images - own[-1].images).abs().max() > 0.1  # there is something to see
