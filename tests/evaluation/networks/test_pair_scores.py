"""PickScore, HPSv2 and the aesthetic score: the formulas of their packages on small networks in their layouts."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from small_clips import HUGE, OPENAI, images, network, transformers_clip, write_openai
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.clip import Clip, clip_tokenizer
from diffdistill.evaluation.networks.clip_towers import TOWERS
from diffdistill.evaluation.networks.pair_scores import PICKSCORE, Aesthetic, Hps, PickScore, score_head, transformers_clean

CAPTIONS = ["a red dog", "Two  cats &amp; a “dog”", "café, it's " + "very " * 90 + "long"]
PICK = dataclasses.replace(HUGE, name=PICKSCORE.name, source=PICKSCORE.source)


def normalised(tower) -> torch.Tensor:
    mean, std = (torch.tensor(value)[:, None, None] for value in (tower.mean, tower.std))
    return (images() / 255 - mean) / std


@pytest.fixture(scope="module")
def transformers_words(tmp_path_factory):
    """transformers' CLIP tokenizer, from the files it reads."""
    from transformers import AutoTokenizer

    folder, theirs = tmp_path_factory.mktemp("words"), clip_tokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(word, word): number for word, number in theirs.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in theirs.bpe_ranks) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    return AutoTokenizer.from_pretrained(folder)


def test_pickscore_is_the_formula_of_its_readme(tmp_path, transformers_words):
    theirs = transformers_clip(HUGE)
    theirs.logit_scale.fill_(4.5)
    theirs.save_pretrained(tmp_path)
    found = PickScore.load(tmp_path, PICK).scores(images(), CAPTIONS)
    tokens = transformers_words(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    output = theirs(**tokens, pixel_values=normalised(HUGE))
    expected = theirs.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=90 * 5e-7)  # cosines in float32, times exp(4.5)
    assert found.shape == (3,) and found.dtype == torch.float32


def test_pickscore_reads_captions_as_transformers_does_and_not_as_open_clip(transformers_words):
    captions = [*CAPTIONS, "tab\tand\nline", "ﬁne ＷＩＤＥ e\u0301", "100% it's 3.5!!! <b>", ""]
    theirs = transformers_words(captions, truncation=True, max_length=77).input_ids
    pick = PickScore.random(0, PICK)
    for caption, expected, ours in zip(captions, theirs, pick.tower.tokenizer(captions), strict=True):
        assert ours[: len(expected)].tolist() == expected, caption
        assert not ours[len(expected) :].any()
    assert not torch.equal(pick.tower.tokenizer(captions)[1], clip_tokenizer()(captions)[1])


def test_cleaning_composes_letters_joins_blanks_and_lowers():
    assert transformers_clean(" E\u0301tude \n in  C ") == "étude in c"


@pytest.mark.parametrize("version, file", [("v2.0", "HPS_v2_compressed.pt"), ("v2.1", "HPS_v2.1_compressed.pt")])
def test_hps_is_a_hundred_cosines_of_its_own_weights(version, file, tmp_path):
    model = network(HUGE, seed=4)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / file)
    hps = Hps.load(tmp_path / file, version, HUGE)
    image, text = model.encode_image(normalised(HUGE)), model.encode_text(clip_tokenizer()(CAPTIONS))
    expected = 100 * (F.normalize(image) * F.normalize(text)).sum(1)
    torch.testing.assert_close(hps.scores(images(), CAPTIONS), expected, rtol=0, atol=1e-4)
    assert hps.name == f"hps-{version}"
    assert hps.tower.logit_scale != pytest.approx(100, rel=1e-3)  # so that the two scales are told apart


def test_hps_computes_with_plain_gelu_and_openais_mean():
    assert Hps.random(0, "v2.0", HUGE).tower.network.visual.transformer.resblocks[0].mlp.gelu.__class__ is torch.nn.GELU
    assert (TOWERS["clip-vit-h-14"].activation, TOWERS["clip-vit-h-14"].mean) == ("gelu", TOWERS["clip-vit-l-14"].mean)


def test_a_file_of_the_other_version_is_refused(tmp_path):
    (tmp_path / "HPS_v2_compressed.pt").touch()
    with pytest.raises(UserError, match=r"is the file of HPS v2.0, not of v2.1. Give HPS_v2.1_compressed.pt"):
        Hps.load(tmp_path / "HPS_v2_compressed.pt", "v2.1", HUGE)


def test_the_aesthetic_score_is_linear_in_the_unit_vector(tmp_path):
    """Nothing stands between its layers, so five matrices and biases make it."""
    model = network(OPENAI)
    head = score_head(8).eval()
    stored = {f"layers.{name}": part for name, part in head.state_dict().items()}
    torch.save(stored, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    clip = write_openai(model, tmp_path / "ViT-L-14.pt")
    aesthetic = Aesthetic.load(clip, tmp_path / "sac+logos+ava1-l14-linearMSE.pth", OPENAI)
    x = F.normalize(model.encode_image(normalised(OPENAI)))
    for layer in (0, 2, 4, 6, 7):
        x = x @ stored[f"layers.{layer}.weight"].T + stored[f"layers.{layer}.bias"]
    torch.testing.assert_close(aesthetic.scores(images(), CAPTIONS), x[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(aesthetic.scores(images(), ["other"] * 3), aesthetic.scores(images(), CAPTIONS))
    vectors = Clip.load(clip, OPENAI)(images()).features
    torch.testing.assert_close(aesthetic.of_vectors(3 * vectors), x[:, 0], rtol=0, atol=1e-6)


def test_the_fingerprint_of_the_aesthetic_score_covers_tower_and_head():
    tower, other = Clip.random(0, OPENAI), Clip.random(1, OPENAI)
    head, second = score_head(8), score_head(8)
    prints = {Aesthetic(a, b).fingerprint for a in (tower, other) for b in (head, second)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"layers.0.weight": torch.zeros(1024, 512)},
            r"0.weight is \(1024, 512\) torch.float32, not \(1024, 8\) torch.float32",
        ),
        ({"layers.8.weight": torch.zeros(1)}, r"8.weight is \(1,\) torch.float32, not absent"),
    ],
)
def test_another_head_is_refused(change, message, tmp_path):
    stored = {f"layers.{name}": part for name, part in score_head(8).state_dict().items()}
    torch.save(stored | change, tmp_path / "head.pth")
    with pytest.raises(UserError, match=f"head.pth does not hold the head .*{message}.*Give the path of sac"):
        Aesthetic.load(tmp_path, tmp_path / "head.pth", OPENAI)


@pytest.mark.parametrize("cls", [PickScore, Hps])
def test_random_networks_are_named_invalid_and_want_one_caption_an_image(cls):
    score = cls.random(3, tower=PICK)
    assert score.name.endswith("-random-3-INVALID") and score.size == 28
    with pytest.raises(UserError, match="3 images but 2 captions"):
        score.scores(images(), CAPTIONS[:2])
    assert Aesthetic.random(3, OPENAI).name == "aesthetic-random-3-INVALID"


def test_a_truncated_or_wrong_pickscore_is_refused(tmp_path):
    stored = {name: part.contiguous() for name, part in transformers_clip(HUGE).state_dict().items()}
    del stored["visual_projection.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="weights of pickscore .*visual.proj is absent.*yuvalkirstain/PickScore_v1"):
        PickScore.load(tmp_path / "model.safetensors", PICK)
