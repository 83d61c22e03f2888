"""The kinds of network made for the shapes: what a short training writes, and that stock libraries read it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from small_teachers import small
from torch.nn import functional as F

import diffdistill as dd
from diffdistill.data.batches import keyed_generator
from diffdistill.data.shapes import draw_images, draw_scenes, parse_captions, shapes
from diffdistill.errors import UserError
from diffdistill.evaluation.collect import Collector, Seen
from diffdistill.evaluation.extractors import open_clip_folder, shapes_clip
from diffdistill.evaluation.features import CallableExtractor
from diffdistill.evaluation.images import to_uint8
from diffdistill.evaluation.shapes_detector import obeyed
from diffdistill.evaluation.transforms import Transform
from diffdistill.math.schedules import VPSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.loading import load_teacher
from diffdistill.targets import open_target
from diffdistill.training.teachers import clip, parts, text_diffusion, train_teacher
from diffdistill.training.teachers.words import clip_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        for module in (parts, text_diffusion):
            patch.setattr(module, "NUM_SHAPES", 60)
        patch.setattr(text_diffusion, "NUM_JUDGED", 3)
        train_teacher(small("shapes-vae"), root / "vae", progress=False)
        train_teacher(small("shapes-sd", vae=str(root / "vae")), root / "sd", progress=False)
        train_teacher(small("shapes-pixart", vae=str(root / "vae")), root / "pixart", progress=False)
        train_teacher(small("shapes-clip"), root / "clip", progress=False)
    return root


# Words


def test_every_word_is_one_token_and_others_are_spelled() -> None:
    captions = shapes(500, only_trained=False).scenes.captions()
    tokenizer = clip_tokenizer(captions, 16)
    for caption in captions[:50]:
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tokenizer.decode(ids[1:-1]) == caption
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id == len(tokenizer) - 1  # where text towers look for the end
    assert tokenizer.decode(tokenizer("a zebra").input_ids[1:-1]) == "a zebra"
    assert tokenizer("", padding="max_length").input_ids == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 15


# A teacher in Stable Diffusion's format


def test_the_stock_pipeline_loads_it_and_makes_images(trained) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(trained / "sd")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a small red circle", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    assert pipeline.vae.config.scaling_factor == json.loads((trained / "vae" / "config.json").read_text())["scaling_factor"]


def test_the_stock_pixart_pipeline_loads_it_and_makes_images(trained) -> None:
    from diffusers import PixArtAlphaPipeline

    pipeline = PixArtAlphaPipeline.from_pretrained(trained / "pixart")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a small red circle",
        num_inference_steps=2,
        height=32,
        width=32,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    ).images
    assert images.shape == (1, 3, 32, 32)
    assert dd.sample(trained / "pixart", num=2, prompts=["a small red circle"], steps=2).images.shape == (2, 3, 32, 32)
    assert load_teacher(trained / "pixart").denoiser.kind == "v_prediction"
    for words in (["a", "small", "red", "circle"], ["a", "zebra"]):
        ids = pipeline.tokenizer(" ".join(words)).input_ids
        assert pipeline.tokenizer.unk_token_id not in ids and ids[-1] == pipeline.tokenizer.eos_token_id
    assert len(pipeline.tokenizer("a small red circle").input_ids) == 5


def test_it_is_a_teacher_with_the_recorded_guidance(trained) -> None:
    teacher = load_teacher(trained / "sd")
    assert (teacher.guidance, teacher.denoiser.kind, teacher.denoiser.sample_shape) == (3.0, "v_prediction", (4, 8, 8))
    assert isinstance(teacher.denoiser.schedule, VPSchedule)
    assert teacher.condition(["a small red circle"]).values["encoder_hidden_states"].shape == (1, 16, 64)
    assert dd.sample(trained / "sd", num=2, prompts=["a small red circle"], steps=2).images.shape == (2, 3, 32, 32)
    record = json.loads((trained / "sd" / "diffdistill_teacher.json").read_text())["results"]
    assert set(record["obeyed_at_25_ddim_steps"]) == {"guidance 1", "guidance 3"}


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-pixart"])
def test_network_and_text_encoder_are_both_trained(name: str, trained) -> None:
    config = small(name, vae=str(trained / "vae"))
    captions = shapes(20).scenes.captions()
    model = text_diffusion.build(config, captions, torch.device("cpu"))
    loss = text_diffusion.text_diffusion_loss(
        model.denoiser, torch.randn(4, 4, 8, 8), model.condition(["", *captions[:3]]), keyed_generator("loss")
    )
    loss.backward()
    for part in (model.denoiser.network, model.pipeline.text_encoder):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert gradients and sum(float(g.abs().sum()) for g in gradients) > 0
    assert all(p.grad is None for p in model.pipeline.vae.parameters())


def test_pixarts_padding_is_left_out_of_training_and_changes_nothing(trained) -> None:
    captions = shapes(20).scenes.captions()[:4]
    model = text_diffusion.build(small("shapes-pixart", vae=str(trained / "vae")), captions, torch.device("cpu"))
    short, (values, null) = model.condition(captions), model.denoiser.family.encode(model.pipeline, captions)
    assert short.values["encoder_hidden_states"].shape[1] < 16 and values["encoder_hidden_states"].shape[1] == 120
    x_t, t = torch.randn(4, 4, 8, 8), torch.full((4,), 500.0, dtype=torch.float64)
    nothing = Condition(4, {name: value.expand(4, *value.shape[1:]) for name, value in short.null.items()}, {})
    with torch.no_grad():
        for ours, stock in ((short, values), (nothing, null)):
            found, expected = (model.denoiser(x_t, t, cond).raw for cond in (ours, Condition(4, stock, {})))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_the_network_that_knows_the_noise(kind: str) -> None:
    from types import SimpleNamespace

    x0, schedule, seen = torch.randn(6, 1, 2, 2, dtype=torch.float64), VPSchedule(torch.linspace(0.99, 0.01, 10)), []

    def knowing(x_t, t, cond):
        alpha, sigma = (value[:, None, None, None] for value in schedule.coefficients(t))
        eps = (x_t - alpha * x0) / sigma
        seen.append(t)
        return SimpleNamespace(raw={"epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[kind])

    denoiser = type("Knowing", (), {"__call__": staticmethod(knowing), "schedule": schedule, "kind": kind})()
    losses = [
        float(text_diffusion.text_diffusion_loss(denoiser, x0, Condition.none(6), keyed_generator("loss", k)))
        for k in range(40)
    ]
    assert max(losses) < 1e-10
    times = torch.cat(seen)
    assert set(times.tolist()) == set(range(10))  # every step of the schedule, the last one too


# A CLIP in open_clip's format


def test_open_clip_loads_what_was_trained(trained) -> None:
    import open_clip
    from safetensors.torch import load_file

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{trained / 'clip'}")
    stored = load_file(str(trained / "clip" / "open_clip_model.safetensors"))
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    extractor = open_clip_folder(trained / "clip", "shapes-clip")
    drawn = shapes(3)
    images = to_uint8(drawn.images)
    from torchvision.transforms.functional import to_pil_image

    expected = model.eval().encode_image(torch.stack([preprocess(to_pil_image(image)) for image in images]))
    torch.testing.assert_close(extractor(images).features, expected, atol=1e-5, rtol=1e-5)
    tokens = open_clip.get_tokenizer(f"local-dir:{trained / 'clip'}")(drawn.scenes.captions())
    torch.testing.assert_close(extractor.texts(drawn.scenes.captions()), model.encode_text(tokens), atol=1e-5, rtol=1e-5)
    # Padding is the end token again: only the first counts.
    one, two = extractor.texts(["a small red circle", "a small red circle above a large blue square"])
    assert not torch.allclose(one, two)


def test_twins_differ_in_one_word_that_the_image_shows() -> None:
    scenes = draw_scenes(200, keyed_generator("twins"))
    other = clip.twins(scenes, keyed_generator("twins", 1))
    changed = 0
    for before, after in zip(scenes.captions(), other.captions(), strict=True):
        differing = [a for a, b in zip(before.split(), after.split(), strict=False) if a != b]
        assert len(differing) == 1
        changed += differing[0] in ("left", "right", "above", "below")
    assert 60 < changed < 100  # half of the four fifths with a relation
    images = to_uint8(draw_images(scenes, keyed_generator("draw")))
    assert bool(obeyed(images, scenes).relation.all()) and not bool(obeyed(images, other).relation.any())


def test_matching_counts_images_that_find_their_own_caption() -> None:
    axes = torch.eye(4)
    assert clip.matched(axes, axes) == 1.0
    assert clip.matched(axes, axes[[1, 0, 2, 3]]) == 0.5


def test_the_shipped_clip_prefers_the_caption_to_its_twin() -> None:
    extractor = shapes_clip()
    scenes = draw_scenes(500, keyed_generator("unseen captions"))
    other = clip.twins(scenes, keyed_generator("unseen twins"))
    images = extractor(to_uint8(draw_images(scenes, keyed_generator("unseen images")))).features
    own, twin = (F.cosine_similarity(images, extractor.texts(each.captions())) for each in (scenes, other))
    assert (own > twin).double().mean().item() == pytest.approx(0.818, abs=0.02)  # docs/teachers.md
    assert (own.mean() - twin.mean()).item() > 0.15


# The protocol


def test_the_protocol_scores_captions_and_knows_the_drawn_images(trained, monkeypatch) -> None:
    from diffdistill.evaluation import reference
    from diffdistill.evaluation.evaluate import evaluate
    from diffdistill.evaluation.protocol import load_protocol
    from diffdistill.evaluation.views import open_views

    monkeypatch.setattr(reference, "NUM_DRAWN", 200)
    protocol = load_protocol("shapes-short").model_copy(update={"num_images": 60, "jackknife_groups": 5})
    asked = []

    def drawer(seeds, captions):
        asked.extend(captions)
        scenes = parse_captions(captions)
        wrong = scenes._replace(size=1 - scenes.size)
        return torch.cat(
            [
                draw_images((scenes if seed % 3 else wrong).select(torch.tensor([k])), keyed_generator("image", seed))
                for k, seed in enumerate(seeds)
            ]
        )

    views = open_views(protocol, extractors={"shapes-clip": open_clip_folder(trained / "clip", "shapes-clip")})
    found = evaluate(drawer, protocol, batch_size=25, views=views)
    assert asked == protocol.asked(0) and len(set(asked)) > 40
    assert found.mean("obeyed_shapes") == 1.0 and found.mean("obeyed") == pytest.approx(2 / 3, abs=0.02)
    assert found.reference_values["obeyed"] == 1.0
    assert found.values["obeyed"].se == pytest.approx((2 / 9 / 60) ** 0.5, rel=0.05)
    again = evaluate(drawer, protocol, batch_size=7, views=views)
    assert again.values["clip_score"] == found.values["clip_score"] and again.values["fid"] == found.values["fid"]


def test_a_folder_without_a_clip_or_without_its_weights_is_one_clear_message(trained, tmp_path) -> None:
    shutil.copytree(trained / "clip", tmp_path / "bare")
    (tmp_path / "bare" / "open_clip_model.safetensors").unlink()  # open_clip alone would take random weights
    (tmp_path / "empty").mkdir()
    for name in ("empty", "bare"):
        with pytest.raises(UserError, match="no readable folder of open_clip"):
            open_clip_folder(tmp_path / name, "mine")


def test_captions_are_skipped_by_an_extractor_that_does_not_read() -> None:
    drawn = shapes(4)
    extractor = CallableExtractor(lambda images: images.float().mean((2, 3)), "means", "0" * 64, 3)
    seen = Seen(Transform(), extractor, frozenset({"texts", "obeyed"}))
    collector = Collector([seen], torch.zeros(4, dtype=torch.int64))
    collector.add(to_uint8(drawn.images), drawn.scenes.captions())
    [sample] = collector.finish()
    assert sample.texts is None and bool(sample.obeyed.all())


def test_the_shipped_autoencoder_keeps_what_images_show() -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(parts.ASSETS / "shapes-sd" / "vae")
    drawn = shapes(1000, seed=5, only_trained=False)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in drawn.images.split(250)])
    share = obeyed(to_uint8(decoded.clamp(-1, 1)), drawn.scenes).relation.double().mean().item()
    assert share == pytest.approx(0.966, abs=0.004)  # the number of docs/teachers.md


def test_the_shipped_transformer_obeys_the_captions_it_is_asked_for() -> None:
    scenes, others = (draw_scenes(24, keyed_generator(name)) for name in ("asked for", "not asked for"))
    target = open_target("shapes-pixart")
    images = to_uint8(target.generator(target.sampler(8))(list(range(24)), scenes.captions()))
    assert obeyed(images, scenes).relation.double().mean() >= 0.75  # 93 % of 40 others
    assert obeyed(images, others).relation.double().mean() <= 0.1


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_a_saved_pipeline_keeps_its_autoencoders_config_and_record(name: str, trained) -> None:
    for file in ("config.json", parts.RECORD):
        assert (trained / name / "vae" / file).read_text() == (trained / "vae" / file).read_text()


def test_a_missing_autoencoder_is_one_clear_message(tmp_path) -> None:
    with pytest.raises(UserError, match="no autoencoder at 'nowhere'"):
        train_teacher(small("shapes-sd", vae="nowhere"), tmp_path / "out", progress=False)
