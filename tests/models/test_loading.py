"""load_teacher on real pipeline folders, small and with random weights: our denoiser and sampler make the stock pipeline's images."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import text_pipelines
import torch
from small_networks import dit, save, unet, vae

from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.codec import Codec
from diffdistill.models.condition import Condition
from diffdistill.models.guidance import guided
from diffdistill.models.loading import load_teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler

SEEDS = [3, 4, 5]
LABELS = torch.tensor([1, 2, 0])


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def save_unet(folder, kind="v_prediction", scheduler="DDIMScheduler", classes=None, pipeline="DDIMPipeline", channels=3):
    import diffusers

    torch.manual_seed(0)
    network = unet(attention=False, in_channels=channels, out_channels=channels, num_class_embeds=classes)
    options = dict(prediction_type=kind, clip_sample=False, timestep_spacing="trailing")
    return save(getattr(diffusers, pipeline)(network, getattr(diffusers, scheduler)(**options)), folder)


def save_dit(folder):
    import diffusers

    torch.manual_seed(0)
    network = dit(in_channels=4, out_channels=8, sample_size=4, num_embeds_ada_norm=1000)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", beta_schedule="scaled_linear")
    return save(diffusers.DiTPipeline(network, vae(), scheduler), folder)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("pipeline", ["DDIMPipeline", "DDPMPipeline"])
def test_unconditional_unet_makes_the_stock_pipelines_images(tmp_path, kind, pipeline):
    from diffusers import DDIMPipeline, DDIMScheduler

    folder = save_unet(
        tmp_path / "t", kind, "DDPMScheduler" if pipeline == "DDPMPipeline" else "DDIMScheduler", pipeline=pipeline
    )
    teacher = load_teacher(folder)
    assert (teacher.pipeline_class, teacher.denoiser.kind, teacher.num_classes) == (pipeline, kind, None)
    ours = Sampler(grids.trailing(teacher.denoiser.schedule, 5)).sample(
        teacher.denoiser, Noise(SEEDS), teacher.condition(None, 3)
    )
    stock = DDIMPipeline.from_pretrained(folder)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False, timestep_spacing="trailing")
    images = stock(batch_size=3, num_inference_steps=5, generator=generators(), output_type="np").images
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    # An untrained eps network sends x0 far outside the image range, where both sides clamp: compare what is shown.
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("rule", "scheduler"), [("ddim", "DDIMScheduler"), ("renoise", "LCMScheduler")])
def test_class_conditional_unet_makes_the_stock_pipelines_images(tmp_path, rule, scheduler):
    import diffusers

    folder = save_unet(tmp_path / "t", classes=4, pipeline="ConsistencyModelPipeline", channels=1)
    teacher = load_teacher(folder)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 4), rule)
    ours = sampler.sample(teacher.denoiser, Noise(SEEDS), teacher.condition(LABELS))
    stock = diffusers.ConsistencyModelPipeline.from_pretrained(folder)
    options = {"original_inference_steps": 1000} if rule == "renoise" else {}
    stock.scheduler = getattr(diffusers, scheduler).from_config(stock.scheduler.config, **options)
    images = stock(batch_size=3, class_labels=LABELS, num_inference_steps=4, generator=generators(), output_type="pt").images
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_dit_with_vae_and_guidance_makes_the_stock_pipelines_images(tmp_path, scale):
    from diffusers import DiTPipeline

    folder = save_dit(tmp_path / "t")
    teacher = load_teacher(folder)
    assert teacher.classes == (1000, 1000)
    sampler = Sampler(grids.trailing(teacher.denoiser.schedule, 4), guidance=scale)
    latents = sampler.sample(teacher.denoiser, Noise(SEEDS), teacher.condition(LABELS))
    ours = (teacher.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    stock = DiTPipeline.from_pretrained(folder)
    images = stock(
        LABELS.tolist(), guidance_scale=scale, num_inference_steps=4, generator=generators(), output_type="np"
    ).images
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2), atol=1e-4, rtol=0)


def test_the_autoencoder_waits_on_the_cpu_and_works_where_the_images_are():
    class Autoencoder(torch.nn.Module):
        """Says where it is put; a machine without a second device has no other witness."""

        dtype, config = torch.float32, SimpleNamespace(scaling_factor=2.0)

        def __init__(self):
            super().__init__()
            self.places, self.device = [], torch.device("cpu")

        def to(self, device):
            self.places.append(torch.device(device).type)
            return self

        def decode(self, latents):
            return SimpleNamespace(sample=latents)

    codec = Codec(Autoencoder())
    codec.offload()
    codec.decode(torch.ones(1, 4, 2, 2, device="meta"))
    assert codec.vae.places == ["cpu", "meta"]


def test_codec_decodes_what_it_encodes_at_the_models_scale(tmp_path):
    teacher = load_teacher(save_dit(tmp_path / "t"))
    images = torch.randn(2, 3, 8, 8).clamp(-1, 1)
    latents = teacher.codec.encode(images)
    raw = teacher.codec.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(latents, raw * teacher.codec.vae.config.scaling_factor)
    torch.testing.assert_close(teacher.codec.decode(latents), teacher.codec.vae.decode(raw).sample)
    assert teacher.image_shape == (3, 8, 8)


def test_declared_classes_give_a_unet_its_null_label(tmp_path):
    folder = save_unet(tmp_path / "t", classes=5, pipeline="ConsistencyModelPipeline")
    assert load_teacher(folder).classes == (5, None)
    (Path(folder) / "diffdistill_teacher.json").write_text(json.dumps({"config": {"num_classes": 4, "guidance": 1.5}}))
    teacher = load_teacher(folder)
    assert (teacher.classes, teacher.guidance) == ((4, 4), 1.5)
    cond = teacher.condition(torch.tensor([0, 3]))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([500.0, 20.0], dtype=torch.float64)
    null = teacher.denoiser(x, t, Condition.labels(torch.tensor([4, 4]), 4)).raw
    torch.testing.assert_close(guided(teacher.denoiser, 0.0)(x, t, cond).raw, null)


def test_teacher_is_frozen_and_in_eval_mode(tmp_path):
    network = load_teacher(save_dit(tmp_path / "t")).network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_fractional_times_reach_the_network(tmp_path):
    teacher = load_teacher(save_unet(tmp_path / "t"))
    x = torch.randn(2, 3, 8, 8)
    same, apart = [torch.tensor(pair, dtype=torch.float64) for pair in ([62.0, 62.0], [62.0, 62.5])]
    cond = teacher.condition(None, 2)
    x = x[:1].repeat(2, 1, 1, 1)
    first, second = teacher.denoiser(x, same, cond).raw
    torch.testing.assert_close(first, second)
    first, second = teacher.denoiser(x, apart, cond).raw
    assert not torch.allclose(first, second)


def _empty(folder):
    folder.mkdir()
    return folder


def _indexed(folder, **parts):
    save_unet(folder)
    index = json.loads((folder / "model_index.json").read_text()) | parts
    (folder / "model_index.json").write_text(json.dumps({name: part for name, part in index.items() if part}))
    return folder


def _broken_index(folder):
    save_unet(folder)
    (folder / "model_index.json").write_text("{")
    return folder


def _single_file(folder):
    folder.with_suffix(".safetensors").write_bytes(b"")
    return folder.with_suffix(".safetensors")


def _without_tokenizer(folder):
    folder = text_pipelines.save("sd", folder)
    shutil.rmtree(folder / "tokenizer")
    return folder


def _truncated(folder):
    save_unet(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_empty, ["model_index.json", "save_pretrained"]),
        (_single_file, ["t.safetensors is a file", "from_single_file", "save_pretrained"]),
        (_broken_index, ["model_index.json is not valid JSON"]),
        (lambda folder: _indexed(folder, unet=None), ["unet", "transformer"]),
        (lambda folder: _indexed(folder, scheduler=None), ["DDIMPipeline has no scheduler"]),
        (lambda folder: _indexed(folder, scheduler=[None, None]), ["DDIMPipeline has no scheduler"]),
        (
            lambda folder: _indexed(folder, unet=["diffusers", "UNet3DConditionModel"]),
            ["UNet3DConditionModel", "UNet2DModel", "docs/families.md"],
        ),
        (_truncated, ["cannot load unet"]),
        (lambda folder: folder, ["no teacher", "digits-unet"]),
    ],
)
def test_bad_folder_is_one_clear_message(tmp_path, make, words):
    with pytest.raises(UserError) as error:
        load_teacher(make(tmp_path / "t"))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_text_pipeline_without_its_tokenizer_is_one_clear_message(tmp_path):
    teacher = load_teacher(_without_tokenizer(tmp_path))
    with pytest.raises(UserError, match="lacks tokenizer, which its model_index.json names"):
        teacher.condition(["a fox"])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", ["me/mine is gated", "https://huggingface.co/me/mine", "hf auth login"]),
        ("RepositoryNotFoundError", ["no folder me/mine here", "no model of that name on the hub", "private"]),
        ("HFValidationError", ["no folder me/mine here", "no model of that name on the hub"]),
        ("LocalEntryNotFoundError", ["no folder me/mine here", "the hub cannot be reached"]),
        ("EntryNotFoundError", ["me/mine on the hub is not a diffusers pipeline", "model_index.json"]),
        ("OfflineModeIsEnabled", ["cannot read model_index.json of me/mine on the hub"]),
    ],
)
def test_a_hub_id_that_cannot_be_read_says_why(monkeypatch, kind, words):
    import huggingface_hub

    error = getattr(huggingface_hub.errors, kind)

    def download(name, file):
        raise error.__new__(error)  # they are made with the response of a server, of a library that changes with versions

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(UserError) as caught:
        load_teacher("me/mine")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_labels_must_fit_the_model(tmp_path):
    unconditional = load_teacher(save_unet(tmp_path / "u"))
    with pytest.raises(UserError, match="unconditional"):
        unconditional.condition(LABELS)
    conditional = load_teacher(save_unet(tmp_path / "c", classes=4, pipeline="ConsistencyModelPipeline"))
    with pytest.raises(UserError, match="class-conditional"):
        conditional.condition(None, 3)
    with pytest.raises(UserError, match=r"0\.\.3"):
        conditional.condition(torch.tensor([0, 4]))
