"""Fingerprints: the same weights give the same one, wherever they lie, and every part of a teacher has its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_pipelines import save
from torch import nn

from diffdistill.models.fingerprint import weights_fingerprint
from diffdistill.models.loading import load_teacher


def test_fingerprint_follows_weights_and_names():
    network = nn.Linear(3, 2)
    before = weights_fingerprint(network)
    assert weights_fingerprint(network) == before
    with torch.no_grad():
        network.weight[0, 0] += 1e-6
    assert weights_fingerprint(network) != before
    assert weights_fingerprint(nn.Sequential(network)) != weights_fingerprint(network)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save("sd", tmp_path_factory.mktemp("fingerprint"))


def fingerprints(folder: Path) -> dict[str, str]:
    return load_teacher(folder).fingerprints()


def test_a_teacher_moved_or_loaded_by_another_diffusers_is_the_same(folder, tmp_path):
    before = fingerprints(folder)
    assert fingerprints(shutil.copytree(folder, tmp_path / "moved")) == before
    teacher = load_teacher(folder)
    other = replace(teacher, scheduler_config={**teacher.scheduler_config, "_diffusers_version": "0.1"})
    assert other.fingerprints() == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_change_of_one_part_shows_in_this_part_alone(folder, tmp_path, part):
    before, changed = fingerprints(folder), shutil.copytree(folder, tmp_path / "changed")
    if part == "scheduler":
        file = changed / part / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    else:
        (file,) = (changed / part).glob("*.safetensors")
        tensors = load_file(file)
        save_file(tensors | {name: tensors[name] + 1e-3 for name in sorted(tensors)[:1]}, file, metadata={"format": "pt"})
    after = fingerprints(changed)
    assert set(before) == set(after) == {"unet", "scheduler", "vae", "text_encoder"}
    assert {name for name in before if before[name] != after[name]} == {part}
