"""Runs of text-to-image teachers: prompts or captioned images in, a LoRA that stock diffusers loads out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from PIL import Image

from diffdistill.config import load_config, parse_config
from diffdistill.errors import UserError
from diffdistill.export.export import export
from diffdistill.models.conditioning import PromptConditioner
from diffdistill.models.loading import load_teacher
from diffdistill.training.data_feed import build_source
from diffdistill.training.loading import load_run
from diffdistill.training.run import train
from diffdistill.training.stopping import Stopped
from diffdistill.training.text_data import with_encoded

PROMPTS = ["a fox", "a house", "a tree"]
DMD2 = {"name": "dmd2", "student_steps": 2, "guidance": 3.0, "student_every": 1}
LCM = {"name": "lcm", "solver_steps": 10, "guidance": [2.0, 4.0]}
OF_DIGITS = {"every_steps": 1, "steps": [2], "protocol": "digits-short"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text-runs")
    text_pipelines.save("sd", root)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    images = root / "images"
    images.mkdir()
    for k, caption in enumerate(PROMPTS):
        pixels = np.random.default_rng(k).integers(0, 255, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(caption)
    return root


def config(place: Path, output: str, method: dict[str, Any], data: str = "prompts", steps: int = 6, **changes: Any):
    path = place / ("prompts.txt" if data == "prompts" else "images")
    values: dict[str, Any] = {
        "teacher": str(place / "sd"),
        "teacher_options": {"size": 16},
        "output": str(place / output),
        "data": {"kind": data, "path": str(path), "cache": str(place / "cache")},
        "roles": {"layout": "shared", "lora": {"rank": 2, "targets": "attention"}},
        "stages": [{"steps": steps, "method": method, "optimizers": {"student": {"lr": 1e-2}}}],
        "batch_size": 4,
        "ema": {"decay": 0.5},
        "samples": {"every_steps": 6, "num": 4},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    return parse_config(values | changes)


@pytest.mark.slow
def test_prompts_in_and_a_verified_lora_out(place, checked_in_this_process):
    """DMD2 with guidance on one backbone, data-free; the export is checked by stock diffusers."""
    run = config(place, "dmd2", DMD2)
    train(run, progress=False)
    loaded = load_run(place / "dmd2")
    assert (place / "dmd2" / "samples" / "step_0000006.png").exists()
    manifest = export(loaded.teacher, loaded.roles, loaded.sampler(2), place / "lora")
    assert manifest.kind == "lora" and manifest.verification is not None and manifest.verification.passed
    assert manifest.call["guidance_scale"] == 1 and manifest.timesteps == {"2": [999.0, 499.0]}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "roles.lora.use_dora: unknown key"),
        ({"bias": "lora_only"}, "roles.lora.bias: unknown key"),
        ({"modules_to_save": ["conv_out"]}, "roles.lora.modules_to_save: unknown key"),
        ({"init_lora_weights": "pissa"}, "roles.lora.init_lora_weights: unknown key"),
        ({"targets": ["to_z"]}, "'to_z'.* match no layer of UNet2DConditionModel .*Available endings: .*to_q"),
        ({"targets": ["to_q", "norm1"]}, "'norm1'.* match no layer"),
        ({"targets": "everything"}, "unknown LoRA target preset 'everything'"),
    ],
)
def test_an_adapter_that_stock_pipelines_do_not_load_is_refused_before_the_run_begins(place, lora, message):
    with pytest.raises(UserError, match=message):
        train(config(place, "refused", DMD2, roles={"layout": "shared", "lora": lora}), progress=False)
    assert not (place / "refused" / "config.yaml").exists()


def test_a_student_that_takes_w_trains_the_stock_input_and_leaves_as_a_pipeline(place):
    roles = {"layout": "copies", "lora": {"rank": 2, "targets": "attention"}}
    run = config(place, "lcm-w", LCM | {"guidance_input": 3.0}, "captions", steps=3, roles=roles, ema=None, samples=None)
    train(run, progress=False)
    loaded = load_run(place / "lcm-w")
    assert loaded.roles.state("student")["time_embedding.cond_proj.weight"].any()
    manifest = export(loaded.teacher, loaded.roles, loaded.sampler(2), place / "w", verify=False)
    assert (manifest.kind, manifest.call["guidance_scale"], manifest.guidance_as_input) == ("merged", 3.0, True)


def test_captioned_images_train_lcm_lora_and_the_run_repeats_itself(place):
    for name in ("lcm", "lcm-again"):
        train(config(place, name, LCM, "captions"), progress=False)
    states = [load_run(place / name).roles.adapter_state("student") for name in ("lcm", "lcm-again")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(bool(tensor.any()) for key, tensor in states[0].items() if "lora_B" in key)
    assert load_run(place / "lcm").sampler(4).rule == "renoise"


def test_a_half_precision_base_trains_and_leaves_as_a_verified_lora(place, checked_in_this_process):
    run = config(place, "bf16", DMD2, teacher_options={"size": 16, "dtype": "bf16"})
    train(run, progress=False)
    loaded = load_run(place / "bf16")
    manifest = export(loaded.teacher, loaded.roles, loaded.sampler(2), place / "bf16-lora")
    assert manifest.dtype == "bfloat16" and manifest.verification is not None and manifest.verification.passed


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_base_rounded_to_int8_trains_adapters_that_leave_for_the_base_s_own_weights(place, checked_in_this_process):
    """Adapters move, codes do not; the exports are checked on the weights as they are, and say what they were trained on."""
    train(config(place, "int8", DMD2, teacher_options={"size": 16, "quantize": "int8"}), progress=False)
    loaded, fresh = load_run(place / "int8"), load_teacher(place / "sd", size=16, quantized="int8")
    assert loaded.teacher.quantized == "int8"
    assert all(bool(tensor.any()) for key, tensor in loaded.roles.adapter_state("student").items() if "lora_B" in key)
    own = {key.replace(".base_layer", ""): value for key, value in loaded.teacher.network.named_parameters()}
    for key, parameter in fresh.network.named_parameters():
        parts = [getattr(each, "qdata", each) for each in (parameter, own[key])]
        assert torch.equal(*parts), key

    for kind in ("lora", "merged"):
        manifest = export(loaded.teacher, loaded.roles, loaded.sampler(2), place / f"int8-{kind}", kind)
        assert manifest.verification is not None and manifest.verification.passed, str(manifest.verification)
        assert manifest.trained_on is not None and manifest.trained_on.weights == "int8"
        assert 1e-5 < manifest.trained_on.sample_gap < 0.1
        assert "trained on the base's weights rounded to int8" in (place / f"int8-{kind}" / "README.md").read_text()
    merged = load_teacher(place / "int8-merged", size=16).network.state_dict()
    base = load_teacher(place / "sd", size=16).network.state_dict()
    update = loaded.roles.adapter_state("student")
    name = next(key for key in update if key.endswith("to_q.lora_A.weight")).removesuffix(".lora_A.weight")
    wanted = base[f"{name}.weight"] + update[f"{name}.lora_B.weight"] @ update[f"{name}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-7)


def test_the_readme_s_run_from_prompts_trains_as_it_stands(place, monkeypatch):
    """The YAML of the README, with a small pipeline in the teacher's place, in bf16 as it says."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (place / "run.yaml").write_text(re.search(r"```yaml\n(teacher:.*?)```", readme, re.DOTALL).group(1))
    monkeypatch.chdir(place)  # where prompts.txt is
    smaller = ["teacher_options.size=16", "stages.0.steps=2", "batch_size=4", f"data.cache={place / 'cache'}", "samples.num=2"]
    result = train(load_config("run.yaml", [f"teacher={place / 'sd'}", *smaller]), progress=False)
    assert result.step == 2 and (place / "runs" / "few" / "samples").is_dir()


def test_text_is_encoded_once_and_the_encoders_leave(place, monkeypatch):
    teacher = load_teacher(place / "sd", size=16)
    run = config(place, "once", DMD2)
    source = build_source(run, teacher)
    assert isinstance(teacher.conditioner, PromptConditioner) and teacher.conditioner._pipeline is None
    assert source.num_samples == 3
    sample = source.take(torch.tensor([2, 0]), torch.Generator())
    assert sample.x0 is None
    torch.testing.assert_close(
        dict(sample.values), dict(load_teacher(place / "sd", size=16).condition([PROMPTS[2], PROMPTS[0]]).values)
    )
    again = load_teacher(place / "sd", size=16)
    monkeypatch.setattr(PromptConditioner, "values", lambda *_: pytest.fail("the prompts are in the cache"))
    build_source(run, again, show=True)


def test_a_teacher_is_asked_for_encoded_prompts_without_its_encoders(place, tmp_path, monkeypatch):
    teacher = load_teacher(place / "sd", size=16)
    wanted = teacher.condition(["a moon", "a fox", "a fox"])
    encoded = with_encoded(teacher, ["a fox", "a moon", "a fox"], tmp_path)
    teacher.put_aside()
    monkeypatch.setattr(PromptConditioner, "_load", lambda *_: pytest.fail("the prompts are in the cache"))
    found = encoded.condition(["a moon", "a fox", "a fox"])
    assert found.batch_size == 3 and not torch.equal(*wanted.values["encoder_hidden_states"][:2])
    for one, other in ((found.values, wanted.values), (found.null, wanted.null)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)
    with_encoded(teacher, ["a fox", "a moon"], tmp_path)  # each is encoded once


def test_encoding_is_shown_shard_by_shard_and_only_where_something_is_missing(place, tmp_path, capsys):
    (tmp_path / "many.txt").write_text("".join(f"a fox and {k} trees\n" for k in range(257)))  # one more than a shard holds
    data = {"kind": "prompts", "path": str(tmp_path / "many.txt"), "cache": str(tmp_path / "cache")}
    run, teacher = parse_config(_with_data(place, data)), load_teacher(place / "sd", size=16)
    build_source(run, teacher, show=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"shard {k}/2", "encoding texts and images"] for k in (1, 2)]
    build_source(run, teacher, show=True)
    build_source(parse_config(_with_data(place, data | {"cache": str(tmp_path / "silent")})), teacher)
    assert not capsys.readouterr().out


def test_a_signal_stops_the_encoding_after_its_shard_and_the_same_command_goes_on(place, tmp_path, monkeypatch):
    (tmp_path / "many.txt").write_text("".join(f"fox {k}\n" for k in range(600)))
    data = {"kind": "prompts", "path": str(tmp_path / "many.txt"), "cache": str(tmp_path / "cache")}
    values = _with_data(place, data) | {"output": str(tmp_path / "run")}
    plain, encoded = PromptConditioner.values, []

    def signalled(self, prompts, *sizes):
        encoded.append(len(prompts))
        if len(encoded) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, prompts, *sizes)

    monkeypatch.setattr(PromptConditioner, "values", signalled)
    with pytest.raises(Stopped, match=f"kept in {tmp_path / 'cache'}. Run the same command again"):
        train(parse_config(values), progress=False)
    assert encoded == [256] and not (tmp_path / "run" / "config.yaml").exists()
    train(parse_config(values), progress=False)
    assert encoded[:3] == [256, 256, 88]


def test_other_prompts_or_encoders_are_another_cache(place, tmp_path):
    def folders(path: Path) -> set[str]:
        return {child.name for child in path.iterdir()}

    cache = tmp_path / "cache"
    data = {"kind": "prompts", "path": str(place / "prompts.txt"), "cache": str(cache)}
    build_source(parse_config(_with_data(place, data)), load_teacher(place / "sd", size=16))
    one = folders(cache)
    (tmp_path / "other.txt").write_text("a moon")
    build_source(
        parse_config(_with_data(place, data | {"path": str(tmp_path / "other.txt")})), load_teacher(place / "sd", size=16)
    )
    assert len(one) == 1 and len(folders(cache)) == 2


def _with_data(place: Path, data: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": str(place / "sd"), "output": str(place / "x"), "data": data, "stages": [{"steps": 1, "method": DMD2}]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: config(p, "x", LCM, "prompts"), "learns from images"),
        (lambda p: build_source(config(p, "x", DMD2), load_teacher("digits-unet")), "reads no text"),
        (lambda p: train(config(p, "x", DMD2, validation=OF_DIGITS), progress=False), "'digits-short' asks for no prompts"),
        (
            lambda p: build_source(parse_config(_with_data(p, {"kind": "labels"})), load_teacher(p / "sd")),
            "makes images from text",
        ),
    ],
)
def test_mistakes_are_named(place, make, message):
    with pytest.raises(UserError, match=message):
        make(place)


def test_run_folder_says_how_the_teacher_was_loaded(place):
    run = config(place, "options", DMD2)
    assert json.loads(run.model_dump_json())["teacher_options"] == {
        "dtype": "fp32",
        "variant": None,
        "size": 16,
        "trust_remote_code": False,
        "quantize": None,
    }
