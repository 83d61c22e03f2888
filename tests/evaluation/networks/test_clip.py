"""CLIP from local files: the same network from every layout, the right activation or none, and nothing in silence."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file
from small_clips import HUGE, LAION, OPENAI, images, network, transformers_clip, write_open_clip, write_openai
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.evaluation.extractors import SHAPES_FOLDER
from diffdistill.evaluation.networks.clip import Clip, clip_tokenizer
from diffdistill.evaluation.networks.clip_towers import TOWERS
from diffdistill.evaluation.networks.normalise import Normalise
from diffdistill.evaluation.precision import strict_float32

CAPTIONS = ["a dog", "two dogs & a cat", "a " + "very " * 100 + "long caption"]


# The table


@pytest.mark.parametrize(
    "name, theirs, tag",
    [
        ("clip-vit-b-32", "ViT-B-32-quickgelu", "openai"),
        ("clip-vit-b-16", "ViT-B-16-quickgelu", "openai"),
        ("clip-vit-l-14", "ViT-L-14-quickgelu", "openai"),
        ("clip-vit-l-14-336px", "ViT-L-14-336-quickgelu", "openai"),
        ("clip-vit-b-32-laion", "ViT-B-32", "laion2b_s34b_b79k"),
        ("clip-vit-l-14-laion", "ViT-L-14", "laion2b_s32b_b82k"),
        ("clip-vit-h-14", "ViT-H-14", "laion2b_s32b_b79k"),
        ("clip-vit-g-14", "ViT-g-14", "laion2b_s12b_b42k"),
        ("clip-vit-bigg-14", "ViT-bigG-14", "laion2b_s39b_b160k"),
    ],
)
def test_a_tower_is_what_open_clip_builds_for_the_tag(name, theirs, tag):
    from open_clip import get_model_config, get_pretrained_cfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    tower, config, tagged = TOWERS[name], get_model_config(theirs), get_pretrained_cfg(theirs, tag)
    assert CLIPVisionCfg(**tower.vision) == CLIPVisionCfg(**config["vision_cfg"])
    assert CLIPTextCfg(**tower.text) == CLIPTextCfg(**config["text_cfg"])
    assert tower.embed_dim == config["embed_dim"]
    assert (tower.activation == "quick_gelu") == config.get("quick_gelu", False) == tagged.get("quick_gelu", False)
    assert (tower.mean, tower.std) == (tuple(tagged["mean"]), tuple(tagged["std"]))
    assert (tower.interpolation, tower.resize_mode) == (tagged["interpolation"], tagged["resize_mode"])


def test_every_tower_is_in_the_test_above():
    assert len([name for name in TOWERS if not name.endswith("-depicts")]) == 9


# The computation


@pytest.mark.parametrize("tower", [OPENAI, LAION])
def test_vectors_and_scale_are_those_of_transformers(tower, tmp_path):
    """Also the layout of transformers: a slip in names, transposes or the order of q, k, v changes the vectors."""
    theirs = transformers_clip(tower)
    theirs.save_pretrained(tmp_path)
    clip = Clip.load(tmp_path, tower)
    mean, std = (torch.tensor(value)[:, None, None] for value in (tower.mean, tower.std))
    output = theirs(input_ids=clip.tokenizer(CAPTIONS), pixel_values=(images() / 255 - mean) / std)
    ours, texts = clip(images()).features, clip.texts(CAPTIONS)
    torch.testing.assert_close(F.normalize(ours), output.image_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(F.normalize(texts), output.text_embeds, rtol=0, atol=2e-6)
    cosines = F.normalize(ours) @ F.normalize(texts).T
    torch.testing.assert_close(clip.logit_scale * cosines, output.logits_per_image, rtol=0, atol=2e-5)


def test_the_activation_moves_the_vectors():
    """So the test above sees it."""
    quick = Clip(network(OPENAI), OPENAI, clip_tokenizer())
    plain = Clip.random(0, dataclasses.replace(OPENAI, activation="gelu"))
    plain.network.load_state_dict(quick.network.state_dict())
    assert (F.normalize(quick(images()).features) - F.normalize(plain(images()).features)).abs().max() > 1e-3


def test_images_are_normalised_by_mean_and_deviation():
    normalise = Normalise(2, mean=(0.1, 0.2, 0.4), std=(0.5, 0.25, 0.2))
    grey = torch.tensor([0.1, 0.2, 0.4])[:, None, None].expand(1, 3, 2, 2) * 255
    torch.testing.assert_close(normalise(grey), torch.zeros(1, 3, 2, 2), rtol=0, atol=1e-6)
    white = normalise(torch.full((1, 3, 2, 2), 255.0))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([1.8, 3.2, 3.0]))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 28, 28)]
)
def test_images_of_another_size_or_kind_are_refused(wrong):
    with pytest.raises(ValueError, match=r"floating images \(B, 3, 28, 28\) in \[0, 255\]"):
        Clip.random(0, OPENAI)(wrong)


# Captions


def test_tokens_with_a_prefix_are_those_of_gigagan():
    """The rule as GigaGAN and DMD2 compute it, on token tensors."""
    tokenizer = clip_tokenizer()
    tokens = tokenizer(CAPTIONS)
    middle = tokenizer(["A photo depicts "])[:, 1:4].expand(3, -1)
    expected = torch.cat([tokens[:, :1], middle, tokens[:, 1:]], 1)[:, :77]
    expected[:, -1][expected[:, -1] > 0] = 49407
    found = clip_tokenizer(77, "A photo depicts")(CAPTIONS)
    assert torch.equal(found, expected)
    assert found[0, :6].tolist() == [49406, *tokenizer.encode("a photo depicts a"), tokenizer.encode("dog")[0]]
    assert (found == 49407).sum(1).tolist() == [1, 1, 1] and found[2, -1] == 49407


def test_the_end_token_is_kept_where_gigagan_loses_it():
    assert clip_tokenizer(77, "A photo depicts")(["dog " * 72 + "! ! !"])[0, -1] == 49407


def test_a_tower_that_depicts_reads_the_words_before_each_caption(tmp_path):
    torch.save(network(OPENAI).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    plain = Clip.load(tmp_path / "open_clip_pytorch_model.bin", OPENAI)
    depicts = Clip.load(tmp_path / "open_clip_pytorch_model.bin", dataclasses.replace(OPENAI, prefix="A photo depicts"))
    assert torch.equal(depicts.texts(["a dog"]), plain.texts(["a photo depicts a dog"]))
    assert not torch.allclose(depicts.texts(["a dog"]), plain.texts(["a dog"]))
    assert torch.equal(depicts(images()).features, plain(images()).features)


@pytest.mark.parametrize("name", ["clip-vit-b-32", "clip-vit-g-14"])
def test_the_towers_of_gigagan_and_dmd2_differ_from_their_namesakes_in_captions_alone(name):
    depicts = TOWERS[f"{name}-depicts"]
    assert depicts == dataclasses.replace(TOWERS[name], name=f"{name}-depicts", prefix="A photo depicts")
    assert depicts.source == TOWERS[name].source


# Files


def test_the_same_weights_give_one_network_from_every_file(tmp_path):
    model = network(OPENAI)
    folder = write_open_clip(model, tmp_path / "folder", OPENAI)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "epoch_3.pt")
    paths = [folder, folder / "open_clip_model.safetensors", tmp_path / "open_clip_pytorch_model.bin", tmp_path / "epoch_3.pt"]
    clips = [Clip.load(path, OPENAI) for path in paths]
    clips.append(Clip.load(write_openai(model, tmp_path / "ViT-L-14.pt"), OPENAI))
    assert len({clip.fingerprint for clip in clips}) == 1
    vectors = [clip(images()).features for clip in clips]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in clips[-1].parameters())
    assert (clips[0].name, clips[0].dim, clips[0].size, clips[0].channels) == ("clip-vit-l-14", 8, 28, 3)
    assert clips[0].logit_scale == pytest.approx(torch.tensor(4.6).exp().item())


def test_the_shapes_network_is_what_open_clip_makes_of_its_folder():
    import open_clip

    theirs = open_clip.create_model(f"local-dir:{SHAPES_FOLDER}").eval().requires_grad_(False)
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (theirs.visual.image_mean, theirs.visual.image_std))
    captions = ["a small red circle", "a large blue square left of a green triangle"]
    clip = Clip.from_folder(SHAPES_FOLDER, "shapes-clip")
    with strict_float32():
        assert torch.equal(clip(pixels.float()).features, theirs.encode_image(pixels.float() * (1 / (255 * std)) - mean / std))
        tokens = open_clip.get_tokenizer(f"local-dir:{SHAPES_FOLDER}")(captions)
        assert torch.equal(clip.texts(captions), theirs.encode_text(tokens))
    assert (clip.name, clip.dim, clip.size) == ("shapes-clip", 64, 32)


def test_loading_asks_no_network_and_draws_no_global_number(tmp_path, monkeypatch):
    folder = write_open_clip(network(OPENAI), tmp_path / "folder", OPENAI)

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = torch.get_rng_state()
    Clip.load(folder, OPENAI)
    Clip.from_folder(SHAPES_FOLDER, "shapes-clip")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_depend_on_their_seed_alone_and_are_named_invalid():
    first, again, other = (Clip.random(seed, OPENAI) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.name == "clip-vit-l-14-random-0-INVALID"


# Guards


def test_openais_weights_never_run_under_gelu(tmp_path):
    model = network(OPENAI)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for path in (tmp_path / "open_clip_pytorch_model.bin", write_openai(model, tmp_path / "ViT-L-14.pt")):
        with pytest.raises(UserError, match=f"{path.name} does not hold .* clip-vit-l-14-laion.* as if made for quick_gelu"):
            Clip.load(path, LAION)


def test_laions_weights_never_run_under_quick_gelu(tmp_path):
    torch.save(network(LAION).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"clip-vit-l-14, which computes with quick_gelu: .* as if made for gelu.*OpenAI's ViT-L-14.pt"
    ):
        Clip.load(tmp_path / "open_clip_pytorch_model.bin", OPENAI)


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_of_shapes_that_one_training_has_are_taken_in_either_precision(rounded, tmp_path):
    torch.save(network(HUGE, rounded=rounded).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert Clip.load(tmp_path / "open_clip_pytorch_model.bin", HUGE).name == "clip-vit-h-14"


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(quick_gelu=False), "activation of vision gelu, not quick_gelu"),
        (dict(embed_dim=16), "embed_dim 16, not 8"),
        (dict(vision_cfg=dict(OPENAI.vision, head_width=8)), "vision head_width 8, not 16"),  # no shape shows it
        (dict(text_cfg=dict(OPENAI.text, heads=4)), "text heads 4, not 2"),
    ],
)
def test_a_folder_that_says_otherwise_is_refused(config, said, tmp_path):
    folder = write_open_clip(network(OPENAI), tmp_path / "folder", OPENAI, **config)
    with pytest.raises(UserError, match=f"folder is not of clip-vit-l-14: it says {said}"):
        Clip.load(folder, OPENAI)


def test_a_folder_of_other_mean_and_deviation_is_refused(tmp_path):
    folder = write_open_clip(network(LAION), tmp_path / "folder", LAION)
    with pytest.raises(UserError, match=r"it says mean \(0.5, 0.5, 0.5\), not \(0.48145466"):
        Clip.load(folder, dataclasses.replace(LAION, mean=OPENAI.mean))


@pytest.mark.parametrize("tower, act", [(LAION, "quick_gelu"), (OPENAI, "gelu"), (LAION, None)])
def test_a_folder_of_transformers_with_the_other_activation_is_refused(tower, act, tmp_path):
    transformers_clip(tower).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"].pop("hidden_act", None)  # transformers 4 keeps no defaults
    if act:
        config["text_config"]["hidden_act"] = act
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"it says activation of text {act or 'quick_gelu'}, not {tower.activation}"):
        Clip.load(tmp_path, tower)


def test_a_folder_must_say_what_it_is_and_have_weights(tmp_path):
    folder = write_open_clip(network(OPENAI), tmp_path / "folder", OPENAI)
    (folder / "open_clip_config.json").rename(tmp_path / "config")
    with pytest.raises(UserError, match="folder has neither open_clip_config.json nor config.json.*ViT-L-14.pt"):
        Clip.load(folder, OPENAI)
    (tmp_path / "config").rename(folder / "open_clip_config.json")
    (folder / "open_clip_model.safetensors").unlink()  # open_clip alone would take random weights
    for load in (lambda: Clip.load(folder, OPENAI), lambda: Clip.from_folder(folder, "mine")):
        with pytest.raises(UserError, match="no readable folder of open_clip: it has none of open_clip_model.safetensors"):
            load()


def test_a_folder_of_the_shapes_without_a_part_is_one_clear_message(tmp_path):
    for missing in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"):
        shutil.copytree(SHAPES_FOLDER, tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(UserError, match="no readable folder of open_clip"):
            Clip.from_folder(tmp_path / missing, "mine")


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(vision_cfg=dict(OPENAI.vision, timm_model_name="resnet50")), "another network than a CLIP"),
        (dict(text_cfg=dict(hf_model_name="roberta-base")), "another network than a CLIP"),  # would be asked of the hub
        (dict(custom_text=True), "another network than a CLIP"),
        (dict(vision_cfg=dict(colour="red")), "no readable folder of open_clip: .*colour"),
    ],
)
def test_towers_of_other_libraries_are_refused(config, said, tmp_path):
    folder = write_open_clip(network(OPENAI), tmp_path / "folder", OPENAI, **config)
    with pytest.raises(UserError, match=said):
        Clip.from_folder(folder, "mine")


def test_a_file_of_another_network_is_refused_by_the_first_tensor_that_does_not_fit(tmp_path):
    weights = network(OPENAI).state_dict()
    wrong = {
        "missing.safetensors": (
            {name: value for name, value in weights.items() if "blocks.1.mlp" not in name},
            r"\(8 of 62 tensors\): visual.transformer.resblocks.1.mlp.c_fc.weight is absent, not \(128, 32\) torch.float32",
        ),
        "more.safetensors": (weights | {"visual.ls_1": torch.ones(3)}, r"visual.ls_1 is \(3,\) torch.float32, not absent"),
        "other.safetensors": (weights | {"visual.proj": torch.ones(32, 4)}, r"visual.proj is \(32, 4\)"),
        "integers.safetensors": (weights | {"ln_final.bias": torch.ones(16, dtype=torch.long)}, "ln_final.bias is .*int64"),
    }
    for name, (stored, message) in wrong.items():
        save_file(stored, tmp_path / name)
        with pytest.raises(
            UserError, match=f"{name} does not hold the weights of clip-vit-l-14 .*{message}.*nothing is downloaded"
        ):
            Clip.load(tmp_path / name, OPENAI)
    theirs = transformers_clip(OPENAI).state_dict()
    theirs.pop("text_model.encoder.layers.1.self_attn.k_proj.weight")
    save_file({name: value.contiguous() for name, value in theirs.items()}, tmp_path / "transformers.safetensors")
    with pytest.raises(UserError, match="transformer.resblocks.1.attn.in_proj_weight is absent"):
        Clip.load(tmp_path / "transformers.safetensors", OPENAI)
