"""What watches a run: drift figures on images of known statistics, and the score by which the best checkpoint is kept."""

import math

import pytest
import torch
import yaml
from tiny_runs import run_config, save_teacher

from diffdistill.evaluation.protocol import load_protocol
from diffdistill.math.prediction import Prediction
from diffdistill.math.schedules import RectifiedFlowSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.training import checkpoint, drift
from diffdistill.training.loading import load_run
from diffdistill.training.run import train


def test_saturation_is_the_share_of_values_at_the_ends():
    images = torch.zeros(2, 1, 2, 2)
    images[0, 0, 0] = torch.tensor([1.0, -0.99])
    assert drift.saturation(images) == 2 / 8


def test_contrast_is_the_standard_deviation_inside_an_image():
    flat, striped = torch.full((1, 1, 2, 2), 0.7), torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    assert drift.contrast(flat) == pytest.approx(0, abs=1e-7)
    assert drift.contrast(torch.cat([flat, striped])) == pytest.approx(0.5)


def test_diversity_compares_within_classes_only():
    images = torch.tensor([0.0, 0.0, 1.0, 0.5]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    assert drift.diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.25)  # 0 in one class, 0.5 in the other
    assert drift.diversity(images, None) == pytest.approx((0 + 1 + 0.5 + 1 + 0.5 + 0.5) / 6)
    assert math.isnan(drift.diversity(images[1:3], torch.tensor([0, 1])))


class Shrunk(Denoiser):
    """Says x0 = scale * the constant image 1."""

    schedule, sample_shape = RectifiedFlowSchedule(1.0), (1, 2, 2)

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, x_t, t, cond):
        alpha, sigma = self.schedule.coefficients(t)
        return Prediction("sample", torch.full_like(x_t, self.scale), x_t, alpha, sigma)


def test_fake_lag_is_below_one_for_a_fake_nearer_to_the_student_than_the_teacher():
    samples, cond = [torch.ones(3, 1, 2, 2)], Condition.none(3)
    lag = drift.fake_lag(Shrunk(0.9), Shrunk(0.5), samples, cond, torch.Generator())
    assert lag == pytest.approx(0.1 / 0.5)
    assert drift.fake_lag(Shrunk(0.5), Shrunk(0.9), samples, cond, torch.Generator()) == pytest.approx(5)
    of_every_step = [*samples, 0.6 * samples[0]]  # errors of 0.3 and 0.1 are added before they are divided
    assert drift.fake_lag(Shrunk(0.9), Shrunk(0.5), of_every_step, cond, torch.Generator()) == pytest.approx(0.4 / 0.6)


def test_the_checkpoint_of_lowest_fid_is_kept_and_loaded_as_best(tmp_path, monkeypatch):
    from diffdistill.training import preview

    short = load_protocol("digits-short").model_dump(mode="json")
    protocol = tmp_path / "tiny.yaml"
    protocol.write_text(
        yaml.safe_dump(
            {
                **short,
                "num_images": 200,
                "jackknife_groups": 10,
                "views": [{"extractor": "digits", "metrics": ["fid", "pixels"]}],
            }
        )
    )
    true = preview.Validation.scores

    def rising(self, roles, distiller):
        scores = true(self, roles, distiller)
        assert scores["fid"] == scores["eval/fid@2"] > 0 and 0 <= scores["eval/contrast@2"] <= 1
        rising.calls += 1
        return {**scores, "fid": {1: 5.0, 2: 3.0}.get(rising.calls, 9.0)}

    rising.calls = 0
    monkeypatch.setattr(preview.Validation, "scores", rising)
    config = run_config(
        save_teacher(tmp_path / "t"),
        tmp_path / "run",
        steps=8,
        checkpoint={"every_steps": 4, "keep": 1},
        validation={"every_steps": 2, "steps": [2], "protocol": str(protocol)},
    )
    train(config, progress=False)
    assert rising.calls == 4
    # at step 2 and 4 a new best; 2 falls to 4; 8 is the end
    assert [path.name for path in checkpoint.available(tmp_path / "run" / "checkpoints")] == ["step_0000004", "step_0000008"]
    assert load_run(tmp_path / "run", checkpoint="best").step == 4
