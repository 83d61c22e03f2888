"""Exports of distorted students: the good ones hold in stock diffusers, and each kind of damage is found by the right check."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from safetensors.torch import load_file, save_file

from diffdistill.errors import MachineError, UserError
from diffdistill.export import (
    Manifest,
    VerificationError,
    export,
    plan,
    snippet,
    stock_check,
    verify,
    verify_all,
)
from diffdistill.files import sha256
from diffdistill.math import grids
from diffdistill.math.schedules import RectifiedFlowSchedule
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.extras import add_extra_inputs
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import Roles, build_roles
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler

BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
CHECKS = ("files", "base", "load", "attached", "tensors", "finite", "differs", "network", "timesteps", "stepping", "pipeline")
PREFIX, SCHEDULER = "base_model.model.", "scheduler/scheduler_config.json"
DECLARED = {"num_classes": 10, "guidance": 2.0}


def save_unet(folder: Path, prediction_type: str, num_class_embeds: int | None = 11) -> Path:
    from diffusers import ConsistencyModelPipeline, DDIMScheduler

    torch.manual_seed(0)
    network = small_networks.unet(block_out_channels=(16, 16), norm_num_groups=8, num_class_embeds=num_class_embeds)
    # The class default of the scheduler's spacing is "leading": an export that kept it would start at t = 0.
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction_type)
    return small_networks.save(
        ConsistencyModelPipeline(unet=network, scheduler=scheduler), folder, **(DECLARED if num_class_embeds else {})
    )


def save_dit(folder: Path, num_classes: int = 10, learn_variance: bool = True) -> Path:
    from diffusers import DDIMScheduler, DiTPipeline

    torch.manual_seed(1)
    channels = 2
    network = small_networks.dit(
        in_channels=channels,
        out_channels=channels * (2 if learn_variance else 1),
        sample_size=4,
        num_embeds_ada_norm=num_classes,
    )
    autoencoder = small_networks.vae(channels=1, latent_channels=channels)
    labels = {str(k): f"digit {k}" for k in range(num_classes)}
    pipeline = DiTPipeline(transformer=network, vae=autoencoder, scheduler=DDIMScheduler(**BETAS), id2label=labels)
    pipeline.register_to_config(id2label=labels)
    return small_networks.save(pipeline, folder)


def distorted(teacher: Teacher, lora: LoraSpec | None, layout: str = "copies") -> Roles:
    """Roles whose student has moved away from the teacher in every trained tensor."""
    roles = build_roles(teacher.denoiser, ("student",), layout, lora)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return roles


def trailing(teacher: Teacher, rule: str, num_steps: int = 4, **options: Any) -> Sampler:
    return Sampler(grids.trailing(teacher.denoiser.schedule, num_steps), rule, **options)


LORA = LoraSpec(rank=2, alpha=8.0, targets="all")  # alpha / rank = 4: a lost scale must show


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def unet(place) -> Path:
    return save_unet(place / "unet", "v_prediction")


@pytest.fixture(scope="module")
def dit(place) -> Path:
    return save_dit(place / "dit")


# name -> (architecture, LoRA, layout, rule, options of the sampler, kind that "auto" chooses)
GOOD = {
    "unet-merged-ddim": ("unet", None, "copies", "ddim", {}, "merged"),
    "unet-merged-renoise": ("unet", None, "copies", "renoise", {"clip": 1.0}, "merged"),
    "unet-merged-ddim-clip": ("unet", LORA, "shared", "ddim", {"clip": 1.0}, "merged"),
    "unet-peft-ddim": ("unet", LORA, "copies", "ddim", {}, "peft"),
    "unet-peft-renoise": ("unet", LORA, "shared", "renoise", {"clip": 1.0}, "peft"),
    "dit-merged-ddim": ("dit", LORA, "copies", "ddim", {}, "merged"),
    "dit-merged-renoise": ("dit", None, "copies", "renoise", {}, "merged"),
    "dit-merged-dpmpp": ("dit", None, "copies", "dpmpp_2m", {}, "merged"),
    "dit-peft-ddim": ("dit", LORA, "shared", "ddim", {}, "peft"),
    "dit-peft-renoise": ("dit", LORA, "copies", "renoise", {}, "peft"),
}


def rehash(folder: Path) -> None:
    """Write the present hashes into the manifest, so that only a check of meaning can find the damage."""
    manifest = Manifest.read(folder)
    files = {name: sha256(folder / name) for name in manifest.files if (folder / name).is_file()}
    manifest.model_copy(update={"files": files}).write(folder)


def edit_adapter(rename: Callable[[str], str] = str, scale_of_b: float = 1.0) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        state = {rename(key): scale_of_b * value if "lora_B" in key else value for key, value in load_file(path).items()}
        save_file(state, path, metadata={"format": "pt"})

    return damage


def in_diffusers_spelling(key: str) -> str:
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up") if "to_q" in key else key


def under(prefix: str) -> Callable[[str], str]:
    return lambda key: prefix + key.removeprefix(PREFIX)


def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | values))

    return damage


def truncate(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state.pop("conv_out.bias")
    save_file(state, path, metadata={"format": "pt"})


def use_base_weights(folder: Path) -> None:
    base = Path(Manifest.read(folder).base.path)
    shutil.copy(base / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet")


def half_the_fixture(folder: Path) -> None:
    path = folder / "reference.safetensors"
    tensors = load_file(path)
    tensors["4.final"] = 0.5 * tensors["4.final"]
    save_file(tensors, path)


# name -> (export to damage, damage, the check that must fail)
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "mixed keys": ("dit-peft-ddim", edit_adapter(in_diffusers_spelling), "tensors"),
    "missing prefix": ("dit-peft-ddim", edit_adapter(under("")), "attached"),
    "wrong prefix": ("dit-peft-ddim", edit_adapter(under("transformer.")), "attached"),
    "compiled keys": ("dit-peft-ddim", edit_adapter(under(PREFIX + "_orig_mod.")), "attached"),
    "zero lora_B": ("dit-peft-ddim", edit_adapter(scale_of_b=0.0), "differs"),
    "lost alpha": ("dit-peft-ddim", edit_adapter(scale_of_b=1 / 4), "network"),
    "lost alpha of a UNet": ("unet-peft-ddim", edit_adapter(scale_of_b=1 / 4), "network"),
    "doubled alpha": ("dit-peft-ddim", edit_json("adapter_config.json", lora_alpha=4), "network"),
    "leading": ("unet-merged-ddim", edit_json(SCHEDULER, timestep_spacing="leading"), "timesteps"),
    "leading adapter": ("dit-peft-ddim", edit_json(SCHEDULER, timestep_spacing="leading"), "timesteps"),
    "residual noise": ("unet-merged-ddim", edit_json(SCHEDULER, set_alpha_to_one=False), "stepping"),
    "other betas": ("unet-merged-renoise", edit_json(SCHEDULER, beta_end=0.021), "stepping"),
    "other scheduler": ("unet-merged-ddim", edit_json("model_index.json", scheduler=["diffusers", "DDPMScheduler"]), "load"),
    "truncated weights": ("unet-merged-ddim", truncate, "load"),
    "a missing tensor": ("unet-merged-ddim", drop_a_tensor, "complete"),
    "the base's weights": ("unet-merged-ddim", use_base_weights, "differs"),
    "a forged sample": ("unet-merged-ddim", half_the_fixture, "stepping"),
}


@pytest.fixture(scope="module")
def manifests(place, unet, dit) -> dict[str, Manifest]:
    """Every good export, not yet verified."""
    written = {}
    for name, (architecture, lora, layout, rule, options, kind) in GOOD.items():
        teacher = load_teacher({"unet": unet, "dit": dit}[architecture])
        chosen = "auto" if (kind == "peft") == (lora is not None) else kind
        roles, sampler = distorted(teacher, lora, layout), trailing(teacher, rule, **options)
        written[name] = export(
            teacher,
            roles,
            sampler,
            place / name,
            chosen,
            step_counts=(1, 2, 4),
            method="dmd2",
            metrics={"FID": 1.2345678, "images": 1000},
            verify=False,
        )
    return written


@pytest.fixture(scope="module")
def verified(place, manifests) -> dict[str, Any]:
    """The verdict on every good and every broken export, in one process."""
    folders = {name: place / name for name in manifests}
    for name, (source, damage, _) in BROKEN.items():
        folder = folders[name] = place / f"broken {name}"
        shutil.copytree(place / source, folder)
        damage(folder)
        rehash(folder)
    unhashed = folders["changed file"] = place / "changed file"
    shutil.copytree(place / "unet-merged-ddim", unhashed)
    truncate(unhashed)
    return dict(zip(folders, verify_all(list(folders.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
def test_a_good_export_makes_the_students_images_in_stock_diffusers(name, verified, manifests):
    verification = verified[name]
    assert verification.passed, str(verification)
    expected = [("complete" if check == "attached" and manifests[name].kind == "merged" else check) for check in CHECKS]
    assert [check.name for check in verification.checks] == expected
    assert {check.status for check in verification.checks} == {"passed"}
    assert manifests[name].kind == GOOD[name][-1]


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_found_by_the_right_check(name, verified):
    verification = verified[name]
    assert not verification.passed
    assert verification.failure.name == BROKEN[name][2], str(verification)
    assert verification.failure.detail
    # What comes after the failure is not claimed.
    names = [check.name for check in verification.checks]
    assert {check.status for check in verification.checks[names.index(verification.failure.name) + 1 :]} <= {"not_run"}


def test_a_changed_file_is_found_by_its_hash(verified):
    assert verified["changed file"].failure.name == "files"


def test_the_verdict_is_in_the_manifest(place, verified):
    assert Manifest.read(place / "dit-peft-ddim").verification == verified["dit-peft-ddim"]


@pytest.mark.parametrize("name", GOOD)
def test_manifest_says_how_to_sample(name, manifests):
    manifest = manifests[name]
    assert manifest.timesteps == {"1": [999.0], "2": [999.0, 499.0], "4": [999.0, 749.0, 499.0, 249.0]}
    assert manifest.step_counts == (1, 2, 4)
    assert manifest.pipeline_class == ("ConsistencyModelPipeline" if "unet" in name else "DiTPipeline")
    assert not manifest.pipeline_takes_lora
    assert manifest.num_classes == 10
    assert set(manifest.versions) >= {"torch", "diffusers", "peft", "safetensors"}
    scheduler = {
        "ddim": "DDIMScheduler",
        "renoise": "LCMScheduler",
        "clip": "DPMSolverMultistepScheduler",
        "dpmpp": "DPMSolverMultistepScheduler",
    }[name.split("-")[-1]]
    assert manifest.scheduler.class_name == scheduler
    assert "README.md" in manifest.files and "reference.safetensors" in manifest.files


def test_adapter_folder_is_the_portable_form(place, manifests):
    manifest, folder = manifests["dit-peft-ddim"], place / "dit-peft-ddim"
    assert json.loads((folder / "adapter_config.json").read_text()).keys() == {
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "bias",
        "lora_dropout",
        "inference_mode",
    }
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", name) for name in tensors)
    assert manifest.adapter.num_tensors == len(tensors) == 2 * len(manifest.adapter.targets)
    assert (manifest.adapter.rank, manifest.adapter.alpha, manifest.adapter.scale_folded) == (2, 8.0, True)


def test_merged_folder_has_no_trace_of_adapters_or_of_this_machine(place, manifests):
    folder = place / "dit-merged-ddim"
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in state)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["id2label"]["3"] == "digit 3"  # the stock pipeline forgets it on saving
    for path in folder.rglob("*config.json"):
        assert str(place) not in path.read_text()


def test_a_merged_student_can_be_the_next_teacher(place, manifests):
    student = load_teacher(place / "unet-merged-ddim")
    assert (student.num_classes, student.guidance) == (10, 1.0)
    assert student.scheduler_config["timestep_spacing"] == "trailing"


@pytest.mark.parametrize("name", ["unet-merged-renoise", "unet-peft-ddim", "dit-merged-ddim", "dit-peft-ddim"])
def test_the_lines_on_the_card_make_the_reference_images(name, place, manifests, monkeypatch):
    manifest, folder = manifests[name], place / name
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert code.strip() == snippet(manifest)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert Path("sample.png").is_file()
    Path("sample.png").unlink()
    final = load_file("reference.safetensors")["4.final"]
    vae = getattr(names["pipe"], "vae", None)
    with torch.no_grad():
        wanted = final if vae is None else vae.decode(final / vae.config.scaling_factor).sample
    wanted = ((wanted / 2 + 0.5).clamp(0, 1) * 255).round()[:, 0]
    for image, pixels in zip(names["images"], wanted, strict=True):
        found = torch.tensor(list(image.convert("L").getdata())).reshape(8, 8)
        assert (found - pixels).abs().max() <= 1
    assert type(names["pipe"].scheduler).__name__ == manifest.scheduler.class_name
    assert text.startswith("---\nlibrary_name:") and "| FID | 1.235 |" in text and "diffusers" in text


def test_reference_is_our_own_sampler(place, dit, manifests):
    teacher = load_teacher(dit)
    roles = distorted(teacher, None)
    sampler = trailing(teacher, "renoise")
    labels = torch.tensor([0, 2, 5, 7])
    with torch.no_grad():
        sample = sampler.sample(roles["student"], Noise([0, 1, 2, 3]), teacher.condition(labels))
    reference = load_file(place / "dit-merged-renoise" / "reference.safetensors")
    assert torch.equal(reference["labels"], labels)
    assert torch.equal(reference["4.final"], sample)
    assert reference["4.states"].shape == reference["4.raw"].shape == (4, 4, 2, 4, 4)


def test_script_prints_a_table_and_fails_if_one_folder_fails(place, verified, monkeypatch, capsys):
    folders = [str(place / "unet-merged-ddim"), str(place / "broken zero lora_B")]
    monkeypatch.setattr(sys, "argv", ["stock_check.py", *folders])
    assert stock_check.main() == 1
    table = capsys.readouterr().out
    assert "passed   pipeline" in table and "failed   differs" in table and "not_run  network" in table
    monkeypatch.setattr(sys, "argv", ["stock_check.py", folders[0]])
    assert stock_check.main() == 0


def test_guided_and_unconditional_students_and_moved_bases_are_verified_inside_export(place, checked_in_this_process):
    guided = load_teacher(save_dit(place / "dit1000", num_classes=1000, learn_variance=False))
    manifest = export(guided, distorted(guided, None), trailing(guided, "ddim", 2, guidance=3.0), place / "guided")
    assert manifest.verification.passed and manifest.guidance == 3.0
    assert "guidance_scale=3" in (place / "guided" / "README.md").read_text()

    plain = load_teacher(save_unet(place / "plain", "v_prediction", num_class_embeds=None))
    manifest = export(plain, distorted(plain, LORA), trailing(plain, "renoise", 2), place / "unconditional")
    assert manifest.verification.passed and manifest.kind == "peft" and manifest.num_classes is None

    (place / "plain").rename(place / "moved")
    assert verify(place / "unconditional").failure.name == "base"
    assert verify(place / "unconditional", base=str(place / "moved")).passed


def test_an_export_that_stock_diffusers_does_not_reproduce_is_not_written(place, unet, checked_in_this_process):
    teacher = load_teacher(unet)
    roles = distorted(teacher, None)

    class Lying:
        lora = None

        def __getitem__(self, name):
            return roles[name]

        def network_state(self, name):
            return {key: 1.01 * tensor for key, tensor in roles.network_state(name).items()}

    with pytest.raises(VerificationError, match="'network' failed"):
        export(teacher, Lying(), trailing(teacher, "ddim", 1), place / "lie")
    assert not (place / "lie").exists()
    assert not list(place.glob(".lie*"))


def test_a_full_disk_leaves_the_old_export(place, manifests, unet, monkeypatch):
    teacher = load_teacher(unet)
    output = place / "kept"
    shutil.copytree(place / "unet-merged-ddim", output)
    before = Manifest.read(output)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["diffdistill.export.export"], "write_reference", full)
    with pytest.raises(MachineError, match="no space left"):
        export(teacher, distorted(teacher, None), trailing(teacher, "ddim", 1), output, verify=False)
    assert Manifest.read(output) == before


@pytest.mark.parametrize(
    ("architecture", "make", "options", "message"),
    [
        ("unet", lambda t: trailing(t, "ddim", guidance=2.0), {}, "no guidance"),
        ("dit", lambda t: trailing(t, "ddim", guidance=2.0), {}, "1000"),
        ("unet", lambda t: trailing(t, "heun"), {}, "heun"),
        ("unet", lambda t: trailing(t, "ddim", 4), {"step_counts": (3, 4)}, "must divide"),
        ("unet", lambda t: Sampler(grids.leading(t.denoiser.schedule, 1)), {}, "full noise"),
        ("unet", lambda t: trailing(t, "ddim"), {"kind": "lora"}, "no load_lora_weights.*'peft'.*'merged'"),
        ("unet", lambda t: trailing(t, "ddim"), {"kind": "peft"}, "whole network"),
        ("unet", lambda t: trailing(t, "ddim"), {"kind": "onnx"}, "merged"),
        ("unet", lambda t: trailing(t, "ddim"), {"role": "fake"}, "fake"),
        ("dit", lambda t: trailing(t, "ddim"), {"check_size": 16}, "images of one size"),
        ("unet", lambda t: Sampler(grids.lcm(t.denoiser.schedule, 4), "renoise"), {"step_counts": (4, 100)}, "says nothing"),
    ],
)
def test_what_cannot_leave_is_refused_with_a_reason(architecture, make, options, message, place, unet, dit):
    teacher = load_teacher({"unet": unet, "dit": dit}[architecture])
    with pytest.raises(UserError, match=message):
        export(teacher, distorted(teacher, None), make(teacher), place / "refused", verify=False, **options)
    assert not (place / "refused").exists()


def test_flow_and_extra_inputs_are_refused(place, unet):
    teacher = load_teacher(unet)
    flow = RectifiedFlowSchedule(1.0)
    moved = replace(
        teacher,
        denoiser=replace(teacher.denoiser, schedule=flow),
        scheduler_config={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
    )
    with pytest.raises(UserError, match="init_noise_sigma"):
        plan(moved, Sampler(grids.trailing(flow, 4)))
    roles = distorted(teacher, None)
    add_extra_inputs(roles["student"].network, teacher.family, ("second_time",))
    with pytest.raises(UserError, match="extra inputs"):
        export(teacher, roles, trailing(teacher, "ddim"), place / "refused", verify=False)
    with pytest.raises(UserError, match="takes its guidance as an input"):
        plan(teacher, replace(trailing(teacher, "ddim"), guidance=3.0, guidance_as_input=True))


def test_lcm_grid_serves_several_step_counts(unet):
    teacher = load_teacher(unet)
    planned = plan(teacher, Sampler(grids.lcm(teacher.denoiser.schedule, 4), "renoise"), (1, 2, 4))
    assert planned.scheduler["original_inference_steps"] == 50
    assert planned.samplers[4].grid.times[:-1].tolist() == [999.0, 759.0, 499.0, 259.0]


def test_not_an_export_is_said_so(tmp_path):
    with pytest.raises(UserError, match=re.escape("has no diffdistill.json")):
        verify(tmp_path)
    (tmp_path / "diffdistill.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        verify(tmp_path)
