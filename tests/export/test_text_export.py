"""LoRA files, merged pipelines and adapters of text-to-image students, checked by stock diffusers in a new process."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import text_pipelines
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffdistill as dd
from diffdistill.errors import UserError
from diffdistill.evaluation.images import to_uint8
from diffdistill.export.card import snippet
from diffdistill.export.export import export
from diffdistill.export.manifest import Manifest
from diffdistill.export.plan import plan
from diffdistill.export.verify import verify_all
from diffdistill.export.weights import _sort_notes
from diffdistill.files import sha256
from diffdistill.math import grids
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import Roles, build_roles
from diffdistill.sampling.generate import image_generator
from diffdistill.sampling.sampler import Sampler

FILE = "pytorch_lora_weights.safetensors"
# name -> (pipeline, rule, kind asked for, kind written)
GOOD = {
    "sd-lora": ("sd", "renoise", "auto", "lora"),
    "sd-kohya": ("sd", "ddim", "kohya", "kohya"),
    "sd-merged": ("sd", "ddim", "merged", "merged"),
    "sd-peft": ("sd", "ddim", "peft", "peft"),
    "sdxl-lora": ("sdxl", "renoise", "lora", "lora"),
    "pixart-auto": ("pixart", "renoise", "auto", "peft"),
    "sd3-lora": ("sd3", "ddim", "auto", "lora"),
    "flux-lora": ("flux", "renoise", "auto", "lora"),
    "sana-lora": ("sana", "renoise", "auto", "lora"),
    "sana-sprint-lora": ("sana-sprint", "renoise", "auto", "lora"),
    "sana-sprint-merged": ("sana-sprint", "renoise", "merged", "merged"),
    "sd-w-lora": ("sd w", "renoise", "auto", "merged"),
    "sdxl-w": ("sdxl w", "ddim", "auto", "merged"),
}
W = 5.3  # of the students that take w as an input, which are named "... w"


def step_counts(name: str) -> tuple[int, ...]:
    """Numbers of steps that the exports of a pipeline promise."""
    return (1, 2) if name == "sana-sprint" else (4,)


def student(name: str, place: Path) -> tuple[Teacher, Roles]:
    """Return a teacher and roles whose student is not the teacher; alpha / rank is 2."""
    name, _, with_w = name.partition(" ")
    folder = place / "base" / name
    teacher = load_teacher(
        folder if folder.exists() else text_pipelines.save(name, place / "base"), size=32 if name.startswith("sana") else 16
    )
    spec = LoraSpec(rank=4, alpha=8.0, targets="all")
    if with_w:
        roles = build_roles(teacher.denoiser, ("student",), "copies", spec, extra_inputs=("guidance",))
    else:
        roles = build_roles(teacher.denoiser, ("student", "fake"), "shared", spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return teacher, roles


def sampler_of(name: str, teacher: Teacher, rule: str, num_steps: int) -> Sampler:
    """Return the sampler of a pipeline's student."""
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, num_steps), rule)
    return replace(sampler, guidance=W, guidance_as_input=True) if name.endswith(" w") else sampler


def write(pipeline: str, rule: str, kind: Any, place: Path, output: Path) -> Manifest:
    """Export the student of a pipeline in `place`, unchecked."""
    teacher, roles = student(pipeline, place)
    sampler = sampler_of(pipeline, teacher, rule, max(step_counts(pipeline)))
    options = {"method": "dmd2", "step_counts": step_counts(pipeline), "verify": False}
    return export(teacher, roles, sampler, output, kind, **options)


def rename(function: Callable[[str], str], scale_of_b: float = 1.0) -> Callable[[Path], None]:
    """Return a damage: other keys in the LoRA file, or a scaled B."""

    def damage(folder: Path) -> None:
        with safe_open(folder / FILE, "pt") as file:
            metadata = file.metadata()
        state = {
            function(name): tensor * (scale_of_b if ".lora_B." in name else 1.0)
            for name, tensor in load_file(folder / FILE).items()
        }
        save_file(state, folder / FILE, metadata=metadata)

    return damage


def _attention_in_diffusers_spelling(key: str) -> str:
    return (
        re.sub(r"lora_A\.weight$", "lora.down.weight", re.sub(r"lora_B\.weight$", "lora.up.weight", key))
        if "to_" in key
        else key
    )


# The six broken exports: name -> (damage, the check that must fail; in old versions the second)
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "mixed keys": (rename(_attention_in_diffusers_spelling), "tensors"),
    "missing prefix": (rename(lambda key: key.removeprefix("unet.")), "attached"),
    "wrong prefix": (rename(lambda key: key.replace("unet.", "transformer.", 1)), "attached"),
    "compiled keys": (rename(lambda key: key.replace("unet.", "unet._orig_mod.", 1)), "attached load"),
    "zero lora_B": (rename(str, scale_of_b=0.0), "differs"),
    "lost alpha": (rename(str, scale_of_b=0.5), "network"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("text-export")


@pytest.fixture(scope="module")
def manifests(place) -> dict[str, Manifest]:
    return {name: write(pipeline, rule, kind, place, place / name) for name, (pipeline, rule, kind, _) in GOOD.items()}


@pytest.fixture(scope="module")
def verified(place, manifests) -> dict[str, Any]:
    folders = {name: place / name for name in manifests}
    for name, (damage, _) in BROKEN.items():
        folder = folders[name] = place / f"broken {name}"
        shutil.copytree(place / "sd-lora", folder)
        damage(folder)
        manifest = Manifest.read(folder)
        manifest.model_copy(update={"files": manifest.files | {FILE: sha256(folder / FILE)}}).write(folder)
    folders["other w"] = place / "other w"
    shutil.copytree(place / "sd-w-lora", folders["other w"])
    manifest = Manifest.read(folders["other w"])
    manifest.model_copy(update={"call": manifest.call | {"guidance_scale": W + 1}}).write(folders["other w"])
    return dict(zip(folders, verify_all(list(folders.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_stock_diffusers_makes_the_students_images(name, verified, manifests):
    assert verified[name].passed, str(verified[name])
    assert manifests[name].kind == GOOD[name][-1]
    names = [check.name for check in verified[name].checks]
    assert ("stacking" in names) == (manifests[name].kind in ("lora", "kohya"))
    assert {check.status for check in verified[name].checks} == {"passed"}


@pytest.mark.parametrize("name", BROKEN)
def test_each_of_the_six_broken_exports_is_named(name, verified):
    assert verified[name].failure is not None and verified[name].failure.name in BROKEN[name][1].split(), str(verified[name])


def test_a_guidance_scale_counted_otherwise_is_found(verified):
    """Stock embeddings count w from 0, ours from 1: one off is another input of the network."""
    assert verified["other w"].failure.name == "network"


def test_a_student_that_takes_w_is_a_stock_pipeline_of_that_kind(place, manifests):
    manifest = manifests["sd-w-lora"]
    assert manifest.guidance_as_input and manifest.guidance == manifest.call["guidance_scale"] == W
    assert json.loads((place / "sd-w-lora" / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256
    as_teacher = load_teacher(place / "sd-w-lora", size=16)
    assert as_teacher.guidance == 1 and as_teacher.condition(["a"]).values["guidance"].tolist() == [W]
    teacher, roles = student("sd w", place)
    for kind in ("lora", "peft"):
        with pytest.raises(UserError, match="also trained an input for its guidance. Use 'merged'"):
            export(teacher, roles, sampler_of("sd w", teacher, "ddim", 4), place / "refused", kind, verify=False)
    images = [dd.sample(place / "sd-w-lora", num=1, prompts=["a cat"], guidance=w).images for w in (None, W, W + 3)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


# The pipelines' autoencoders halve the edges; the UNets halve them again, the others take patches of 2, Sana's of 1.
SMALLEST = {"sd": 8, "sdxl": 8, "pixart": 8, "sd3": 8, "flux": 8, "sana": 32, "sana-sprint": 32}


@pytest.mark.parametrize("name", GOOD)
def test_the_check_is_made_on_the_smallest_images_and_the_card_asks_for_the_own_size(name, place, manifests):
    manifest, size = manifests[name], SMALLEST[GOOD[name][0].removesuffix(" w")]
    assert manifest.check_size == size
    assert manifest.call["height"] == manifest.call["width"] == 2 * manifest.sample_shape[1] >= 16
    states = load_file(place / name / "reference.safetensors")[f"{max(manifest.step_counts)}.states"]
    assert states.shape[-2:] == (size // 2, size // 2)


def test_the_check_is_made_on_images_of_the_size_asked_for(place, checked_in_this_process):
    teacher, roles = student("sdxl", place)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 2), "ddim")
    manifest = export(teacher, roles, sampler, place / "sized", check_size=24)
    assert manifest.check_size == 24 and manifest.call["height"] == 16 and manifest.verification.passed
    assert load_file(place / "sized" / "reference.safetensors")["2.states"].shape[-2:] == (12, 12)
    with pytest.raises(UserError, match="multiple of 8 and at least 8 for .*got 20. Use 16"):
        export(teacher, roles, sampler, place / "refused", check_size=20)


def test_the_lora_file_is_the_portable_form(place, manifests):
    """PEFT's keys under the component's name, the scale inside B, and five fields of metadata, no more."""
    with safe_open(place / "sd-lora" / FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        names = list(file.keys())
    assert all(re.fullmatch(r"unet\..+\.lora_[AB]\.weight", name) for name in names)
    assert metadata.keys() == {f"unet.{key}" for key in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")}
    assert metadata["unet.r"] == metadata["unet.lora_alpha"] == 4
    assert manifests["sd-lora"].adapter.num_tensors == len(names) and manifests["sd-lora"].adapter.alpha == 8
    teacher, roles = student("sd", place)
    state = roles.adapter_state("student")
    stored = load_file(place / "sd-lora" / FILE)
    for name, tensor in state.items():
        torch.testing.assert_close(stored[f"unet.{name}"], tensor * (2.0 if ".lora_B." in name else 1.0))


def test_a_merged_pipeline_keeps_the_tokenizer_of_its_base(place):
    """Transformers 5 would write one file that 4 does not read, under one name for two classes of 4."""
    base = shutil.copytree(place / "base" / "sd", place / "base" / "fast")
    (base / "tokenizer" / "spiece.model").write_text("read by none of these")
    index = json.loads((base / "model_index.json").read_text()) | {"tokenizer": ["transformers", "CLIPTokenizerFast"]}
    (base / "model_index.json").write_text(json.dumps(index))
    teacher = load_teacher(base, size=16)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 1), "ddim")
    manifest = export(teacher, build_roles(teacher.denoiser, ("student",)), sampler, place / "kept", verify=False)
    files = [{path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()} for folder in (base, place / "kept")]
    assert files[0] == files[1] and "tokenizer/spiece.model" in manifest.files
    assert json.loads((place / "kept" / "model_index.json").read_text())["tokenizer"] == index["tokenizer"]


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("sd-lora", None),  # LCM's pipelines hand their generators on
        ("sd3-lora", None),  # deterministic
        ("flux-lora", "does not come from the call's generators: call `torch.manual_seed`"),
        ("sana-lora", "does not come from the call's generators before diffusers 0.39: call `torch.manual_seed`"),
    ],
)
def test_the_card_says_where_the_noise_between_steps_comes_from(name, note, place, manifests):
    card = (place / name / "README.md").read_text()
    assert ("noise between steps" in card) == (note is not None) and (note or "") in card


def test_kohya_spelling(place, manifests):
    names = list(load_file(place / "sd-kohya" / FILE))
    assert all(re.fullmatch(r"lora_unet_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in names)


def test_the_lines_on_the_card_run(place, manifests, monkeypatch):
    """The card's own lines, in a new process that does not know diffdistill, make four images."""
    lines = re.search(r"```python\n(.*?)```", (place / "sd-lora" / "README.md").read_text(), re.S).group(1)
    assert lines.strip() == snippet(manifests["sd-lora"])
    folder = place / "card"
    shutil.copytree(place / "sd-lora", folder)
    script = lines + "\nassert len(images) == 4 and images[0].size == (16, 16)\n"
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "sample.png").exists()


@pytest.mark.parametrize("name", ["sd-lora", "sd-kohya", "sd-merged", "sd-peft", "flux-lora", "sana-sprint-merged", "sdxl-w"])
def test_an_export_is_sampled_by_name_and_prompts(name, place, manifests):
    """`dd.sample` on the folder makes the student's images, whatever form they are in."""
    pipeline, rule = GOOD[name][:2]
    teacher, roles = student(pipeline, place)
    num_steps = max(manifests[name].step_counts)
    sampler = sampler_of(pipeline, teacher, rule, num_steps)
    asked = ["a cat", "a dog"]
    expected = image_generator(teacher, roles["student"], sampler)([5, 6], asked)
    images = dd.sample(place / name, steps=num_steps, num=2, seed=5, prompts=asked).images
    assert int((images.int() - to_uint8(expected).int()).abs().max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "give prompts"), ({"labels": [1]}, "give prompts in place of labels")],
)
def test_sampling_text_to_image_needs_prompts(options, message, place, manifests):
    with pytest.raises(UserError, match=message):
        dd.sample(place / "sd-merged", num=1, **options)


@pytest.mark.parametrize(
    ("name", "kind", "options", "message"),
    [
        ("pixart", "lora", {}, "has no load_lora_weights"),
        ("sd3", "kohya", {}, "spelling of UNets"),
        ("sd", "LORA", {}, "unknown export kind"),
        ("sd", "lora", {"guidance": 2.0}, "guidance built in"),
    ],
)
def test_what_cannot_leave_is_refused(name, kind, options, message, place):
    teacher, roles = student(name, place)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 4), "ddim", **options)
    with pytest.raises(UserError, match=message):
        export(teacher, roles, sampler, place / "refused", kind, verify=False)
    assert not (place / "refused").exists()


def test_sana_sprint_is_told_its_angles(manifests):
    """tan u = sigma / (1 - sigma): pure noise is at pi/2, sigma = 1/2 at pi/4; the guidance scale is the network's own input."""
    manifest = manifests["sana-sprint-lora"]
    assert manifest.timesteps == {"1": [math.pi / 2], "2": [math.pi / 2, math.pi / 4]}
    assert manifest.times_call["1"] == {"max_timesteps": math.pi / 2, "intermediate_timesteps": None}
    assert manifest.times_call["2"] == {"max_timesteps": math.pi / 2, "intermediate_timesteps": math.pi / 4}
    assert manifest.call["guidance_scale"] == 4.5 and "max_timesteps=1.57" in snippet(manifest)


@pytest.mark.parametrize(
    ("num_steps", "options", "message"),
    [
        (2, {"rule": "ddim"}, "draws fresh noise between its steps; got rule 'ddim'.*Use rule 'renoise'"),
        (1, {"rule": "renoise", "clip": 1.0}, "does not clip"),
        (4, {"rule": "renoise"}, "one or two steps.*got 4"),
    ],
)
def test_what_sana_sprints_pipeline_cannot_do_is_refused_with_what_it_can(num_steps, options, message, place, manifests):
    teacher = load_teacher(place / "base" / "sana-sprint", size=32)
    with pytest.raises(UserError, match=message):
        plan(teacher, Sampler(grids.trailing(teacher.denoiser.schedule, num_steps), **options))


def test_a_sana_sprint_student_of_one_step_may_have_any_rule(place, manifests):
    teacher = load_teacher(place / "base" / "sana-sprint", size=32)
    planned = plan(teacher, Sampler(grids.trailing(teacher.denoiser.schedule, 1), "ddim"))
    assert planned.scheduler == {
        "_class_name": "SCMScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "trigflow",
        "sigma_data": 0.5,
    }


def test_an_export_is_the_same_to_the_byte(tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        write("sd", "renoise", "lora", tmp_path, folder)
    one, other = (
        {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()} for folder in folders
    )
    assert one == other and Path(FILE) in one


def test_notes_of_a_file_are_in_the_order_of_their_names_and_nothing_else_changes(tmp_path):
    notes = {f'note {k} of \u00fc "quoted"\n': str(k) for k in range(8)}  # which the library leaves so once in 40,320 times
    state, written = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}, []
    for k in range(2):
        save_file(state, tmp_path / FILE, metadata=dict(reversed(notes.items())) if k else notes)
        _sort_notes(tmp_path / FILE)
        written.append((tmp_path / FILE).read_bytes())
    assert written[0] == written[1]
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata() == notes
    loaded = load_file(tmp_path / FILE)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    at = [written[0].index(f"note {k}".encode()) for k in range(8)]
    assert at == sorted(at)
