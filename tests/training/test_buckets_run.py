"""Training on images of several shapes: what a micro-batch holds, what the network is told, and what cannot be."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from PIL import Image

from diffdistill.config import CaptionsData, parse_config
from diffdistill.data.images import read_image
from diffdistill.errors import UserError
from diffdistill.models.families.unet2d_condition import UNet2DCondition
from diffdistill.models.loading import load_teacher
from diffdistill.processes import ALONE, Processes
from diffdistill.training.data_feed import DataFeed, build_source
from diffdistill.training.engine import Engine
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped
from diffdistill.training.text_data import text_source

BUCKETS = {"edge": 16, "step": 4, "max_aspect": 2.0}  # of height x width 20x12, 16x16 and 12x20
TALL = [(44, 24), (46, 24), (48, 24), (50, 24), (52, 24)]  # each size once, so that it names its image
WIDE = [(24, 44), (24, 46), (24, 48)]
CAPTIONS = {size: f"a fox {'abcdefgh'[k]}" for k, size in enumerate([*TALL, *WIDE])}
DMD2 = {"name": "dmd2", "student_steps": 2, "guidance": 3.0, "student_every": 1, "gan": {}}
LCM = {"name": "lcm", "solver_steps": 10, "guidance": [2.0, 4.0]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    for name in ("sdxl", "sd3"):
        text_pipelines.save(name, root)
    (root / "images").mkdir()
    for (height, width), caption in CAPTIONS.items():
        pixels = np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{height}x{width}.png")
        (root / "images" / f"{height}x{width}.txt").write_text(caption)
    return root


def config(place: Path, method: dict[str, Any], output: str = "run", teacher: str = "sdxl", **changes: Any):
    buckets = changes.pop("buckets", BUCKETS)
    values: dict[str, Any] = {
        "teacher": str(place / teacher),
        "teacher_options": {"size": 16},
        "output": str(place / output),
        "data": {"kind": "captions", "path": str(place / "images"), "buckets": buckets, "cache": str(place / "cache")},
        "roles": {"layout": "shared", "lora": {"rank": 2, "targets": "attention"}},
        "stages": [{"steps": 6, "method": method, "optimizers": {"student": {"lr": 1e-2}}}],
        "batch_size": 4,
        "micro_batch_size": 2,
        "samples": None,
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    return parse_config(values | changes)


def test_a_batch_is_one_bucket_s_and_every_row_its_image_its_caption_and_its_sizes(place, capsys):
    teacher = load_teacher(place / "sdxl", size=16)
    source = build_source(config(place, LCM), teacher)
    assert "images by height x width: 20x12: 5, 12x20: 3; 1 hold less than a batch" in capsys.readouterr().out
    feed = DataFeed(source, None, None, teacher, batch_size=4, size=2, seed=0, stage=0)
    seen = set()
    for step in range(8):
        batches = [feed.batch(step, micro) for micro in range(2)]
        (bucket,) = {tuple(2 * edge for edge in batch.x0.shape[2:]) for batch in batches}  # the autoencoder halves edges
        for batch in batches:
            for row, (height, width, *crop_and_size) in enumerate(batch.cond.values["time_ids"].int().tolist()):
                excess = round((max(height, width) / 2 - 20) / 2)  # half of what is cut off, resized by 1/2
                assert crop_and_size == [*((excess, 0) if bucket == (20, 12) else (0, excess)), *bucket]
                image = read_image(place / "images" / f"{height}x{width}.png", "", *bucket, 3)
                torch.testing.assert_close(batch.x0[row], teacher.codec.encode(image[None])[0], atol=1e-5, rtol=1e-5)
                told = teacher.condition([CAPTIONS[height, width]]).values
                for name in ("encoder_hidden_states", "text_embeds"):
                    torch.testing.assert_close(batch.cond.values[name][row], told[name][0])
                seen.add((height, width))
    assert seen == CAPTIONS.keys()


def test_without_buckets_every_image_is_the_teacher_s_size_and_says_its_own(place):
    teacher = load_teacher(place / "sdxl", size=16)
    source = build_source(config(place, LCM, buckets=None), teacher)
    sample = source.take(torch.arange(8), torch.Generator())
    assert sample.x0.shape == (8, 4, 8, 8)
    original, crop, size = sample.values["time_ids"].int().split(2, dim=1)
    assert {tuple(row) for row in original.tolist()} == CAPTIONS.keys() and size.unique().tolist() == [16]
    resized = original * 16 / 24  # the short edge of every image is 24
    assert torch.equal(crop, ((resized - 16) / 2).round().int())


def test_all_passes_of_a_step_have_the_size_that_their_condition_tells(place, monkeypatch):
    """The student's rollout from noise, the teacher, the fake network and the head that reads the teacher."""
    plain, sizes = UNet2DCondition.forward, []

    def forward(self, network, x, t, cond):
        told = cond.values["time_ids"][:, 4:].int().unique(dim=0).tolist()
        assert told == [[2 * edge for edge in x.shape[2:]]]
        sizes.append(tuple(told[0]))
        return plain(self, network, x, t, cond)

    run = config(place, DMD2, "dmd2")
    teacher_size = [(16, 16)]  # of the pass by which the head learns the shape of what it reads
    monkeypatch.setattr(UNet2DCondition, "forward", forward)
    result = train(run, progress=False)
    assert set(sizes) == {(20, 12), (12, 20), *teacher_size} and sizes.count((16, 16)) == 1
    assert result.skipped == 0 and all(np.isfinite(value) for value in result.metrics.values())


def test_a_stopped_run_goes_on_with_the_same_buckets(place, monkeypatch):
    train(config(place, LCM, "whole"), progress=False)
    plain, left = Engine.step, [1]

    def step(self, k, stop=False):
        if k in left:
            left.remove(k)
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, k, stop)

    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(Stopped):
        train(config(place, LCM, "stopped"), progress=False)
    train(config(place, LCM, "stopped"), resume=True, progress=False)
    states = [load_run(place / name).roles.state("student") for name in ("whole", "stopped")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(bool(value.any()) for key, value in states[0].items() if "lora_B" in key)


def test_two_processes_encode_what_one_does(place, tmp_path):
    def source(folder, processes=ALONE):
        data = CaptionsData(kind="captions", path=place / "images", buckets=BUCKETS, cache=tmp_path / folder)
        return text_source(data, load_teacher(place / "sdxl", size=16), processes)

    alone, shared = source("alone"), source("shared", Processes(0, 2, wait=lambda: source("shared", Processes(1, 2))))
    assert shared.buckets == alone.buckets and shared.sizes == alone.sizes
    for index in (torch.arange(5), torch.arange(5, 8)):
        one, two = (each.take(index, torch.Generator()) for each in (alone, shared))
        assert torch.equal(one.x0, two.x0) and all(torch.equal(one.values[name], two.values[name]) for name in one.values)


def test_an_image_that_cannot_be_read_is_left_out_of_its_bucket_and_named(place, tmp_path, capsys):
    for size in CAPTIONS:
        name = f"{size[0]}x{size[1]}"
        for ending in ("png", "txt"):
            (tmp_path / f"{name}.{ending}").write_bytes((place / "images" / f"{name}.{ending}").read_bytes())
    (tmp_path / "44x24.png").write_bytes(b"no image")  # its header
    whole = (tmp_path / "46x24.png").read_bytes()
    (tmp_path / "46x24.png").write_bytes(whole[: len(whole) // 2])  # its pixels
    data = {"kind": "captions", "path": str(tmp_path), "buckets": BUCKETS, "cache": str(place / "cache")}
    for _ in range(2):  # encoded, then found in the cache
        source = build_source(config(place, LCM, data=data, batch_size=2), load_teacher(place / "sdxl", size=16))
        said = capsys.readouterr().out
        assert "2 of 8 images cannot be read" in said and "44x24.png" in said and "46x24.png" in said
        assert source.sizes == (3, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6},
            r"no bucket fills a batch of 6; images by height x width: 20x12: 5, 12x20: 3\. Set batch_size to at most 5",
        ),
        ({"buckets": {"edge": 15, "step": 5}}, "data.buckets cannot be: .* sizes must be multiples of 2, got 15x15"),
        ({"buckets": {"edge": 16, "step": 64}}, "data.buckets cannot be: size must be a positive multiple of 64; got 16"),
        (
            {"teacher": "sd3", "buckets": {"edge": 48, "step": 16, "max_aspect": 5.5}},
            "positions for edges of 64 pixels; got 80x16",
        ),
    ],
)
def test_buckets_that_cannot_be_are_refused_with_the_way_out(place, changes, message):
    run = config(place, LCM, **{"micro_batch_size": None} | changes)
    with pytest.raises(UserError, match=message):
        build_source(run, load_teacher(run.teacher, size=16))


def test_states_that_are_stored_at_one_size_are_refused_beside_buckets(place):
    dmd = {"name": "dmd", "regression": {}}
    with pytest.raises(
        UserError, match=r"data\.buckets: stage 0 \(dmd\) reads states of the teacher that are stored at one size"
    ):
        config(place, dmd, pairs={"num": 4})
