"""ImageReward: transformers' BLIP as an independent twin, the head's formula, the file's names, and the words."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.image_reward import UNUSED, BlipShape, ImageReward, RewardNetwork, attend, bert_tokens
from diffdistill.evaluation.networks.normalise import OPENAI_MEAN, OPENAI_STD

SHAPE = BlipShape(32, 16, 24, 2, 3, 16, 2, 2, num_words=132, num_positions=40)
CAPTIONS = ["A red dog", "a dog, and " * 30, "Ünknown words"]
WORDS = ["a", "and", "red", "dog", ",", ".", "the", "un", "##known", "word", "##s"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """130 words with the special ones where BERT has them."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", **dict(enumerate(WORDS, 103))}
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("".join(f"{special.get(number, f'[unused{number}]')}\n" for number in range(130)))
    return path


@pytest.fixture(scope="module")
def network() -> RewardNetwork:
    """With weights large enough for every part to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RewardNetwork(SHAPE).eval().requires_grad_(False)
        for name, part in network.named_parameters():
            part.add_(0.3 * torch.randn_like(part) if "mlp.layers" not in name else 0)
    return network


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """ImageReward.pt as the package saves it: with the parts of BLIP that it does not use."""
    unused = {name: torch.arange(40)[None] if "ids" in name else torch.ones(2) for name in UNUSED}
    path = tmp_path_factory.mktemp("reward") / "ImageReward.pt"
    torch.save(network.state_dict() | unused, path)
    return path


def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 255


def blip_states(weights: dict[str, torch.Tensor], pixels, ids, mask) -> torch.Tensor:
    """The last states of BLIP's text encoder by transformers' modules, whose converter for BLIP's own files names the same tensors so."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision_config = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        vocab_size=132,
        hidden_size=16,
        encoder_hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
    )
    renamed = (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^norm\.", "post_layernorm."),
        (r"^blocks", "encoder.layers"),
        (r"norm([12])\.", r"layer_norm\1."),
        (r"attn\.proj", "self_attn.projection"),
        (r"attn\.qkv", "self_attn.qkv"),
    )
    vision, text = BlipVisionModel(vision_config).eval(), BlipTextModel(text_config, add_pooling_layer=False).eval()
    visual = {}
    for name, part in weights.items():
        if name.startswith("blip.visual_encoder."):
            name = name.removeprefix("blip.visual_encoder.")
            for pattern, theirs in renamed:
                name = re.sub(pattern, theirs, name)
            visual[name] = part
    vision.load_state_dict(visual)
    prefix = "blip.text_encoder."
    text.load_state_dict({name.removeprefix(prefix): part for name, part in weights.items() if name.startswith(prefix)})
    with torch.no_grad():
        tokens = vision(pixels).last_hidden_state
        return text(
            ids,
            attention_mask=mask.long(),
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state


def test_the_score_is_transformers_blip_and_five_linear_layers(network, file, vocabulary):
    reward = ImageReward.load(file, vocabulary, SHAPE)
    weights = network.state_dict()
    mean, std = (torch.tensor(value)[:, None, None] for value in (OPENAI_MEAN, OPENAI_STD))
    x = blip_states(weights, (images() / 255 - mean) / std, *reward.tokens(CAPTIONS))[:, 0]
    for layer in (0, 2, 4, 6, 7):
        x = F.linear(x, weights[f"mlp.layers.{layer}.weight"], weights[f"mlp.layers.{layer}.bias"])
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072
    scores = reward.scores(images(), CAPTIONS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert scores.std() > 1e-4 and scores.dtype == torch.float32  # the twins agree on something that varies
    assert (reward.name, reward.size, reward.channels) == ("image-reward", 32, 3)


def test_the_states_of_both_twins_agree_word_by_word(network, vocabulary):
    """Closer than the head lets one see."""
    ids, mask = bert_tokens(vocabulary, 130)(CAPTIONS)
    pixels = images() / 100 - 1
    ours = network.blip["text_encoder"](ids, mask, network.blip["visual_encoder"](pixels))
    theirs = blip_states(network.state_dict(), pixels, ids, mask)
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=2e-5)


def test_attention_is_a_weighted_mean_that_leaves_masked_keys_out():
    query, value = torch.zeros(1, 1, 4), torch.tensor([[[1.0, 2, 3, 4], [3, 4, 5, 6], [90, 90, 90, 90]]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(attend(query, value, value, 2, mask), torch.tensor([[[2.0, 3, 4, 5]]]))


def test_the_names_and_the_size_are_those_of_the_published_file():
    """Its 1,786,880,927 bytes leave no room for another matrix: 625 tensors, each with about 340 bytes of the archive's own."""
    with torch.device("meta"):
        parts = RewardNetwork(BlipShape()).state_dict()
    for name, shape in {
        "blip.visual_encoder.cls_token": (1, 1, 1024),
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
        "blip.visual_encoder.patch_embed.proj.weight": (1024, 3, 16, 16),
        "blip.visual_encoder.blocks.23.attn.qkv.bias": (3072,),
        "blip.visual_encoder.blocks.0.mlp.fc1.weight": (4096, 1024),
        "blip.visual_encoder.norm.bias": (1024,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (30524, 768),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, 768),
        "blip.text_encoder.embeddings.LayerNorm.weight": (768,),
        "blip.text_encoder.encoder.layer.11.attention.self.query.weight": (768, 768),
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight": (768, 1024),
        "blip.text_encoder.encoder.layer.0.crossattention.output.LayerNorm.bias": (768,),
        "blip.text_encoder.encoder.layer.0.intermediate.dense.weight": (3072, 768),
        "blip.text_encoder.encoder.layer.0.output.dense.weight": (768, 3072),
        "mlp.layers.0.weight": (1024, 768),
        "mlp.layers.7.bias": (1,),
    }.items():
        assert tuple(parts[name].shape) == shape, name
    numbers = sum(part.numel() for part in parts.values()) + (1024 + 1) * 256 + (768 + 1) * 256  # with BLIP's projections
    assert 0 < 1_786_880_927 - (4 * numbers + 8 * 512) < 400 * (len(parts) + len(UNUSED))


def test_each_half_normalises_with_its_own_epsilon(network):
    """Those of BLIP's vision transformer and of its med_config.json, too small for the twins to see everywhere."""
    norms = {(name.split(".")[1], part.eps) for name, part in network.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    assert norms == {("visual_encoder", 1e-6), ("text_encoder", 1e-12)}


def test_a_caption_is_35_tokens_of_bert(vocabulary):
    ids, mask = bert_tokens(vocabulary, 130)(CAPTIONS)
    number = {word: 103 + position for position, word in enumerate(WORDS)}
    assert ids[0, :6].tolist() == [101, number["a"], number["red"], number["dog"], 102, 0]
    assert mask.sum(1).tolist() == [5, 35, 6] and ids.shape == mask.shape == (3, 35) and not ids[~mask].any()
    assert ids[1, -1] == 102  # the end stays where a caption is cut
    assert ids[2, :6].tolist() == [
        101,
        number["un"],
        number["##known"],
        number["word"],
        number["##s"],
        102,
    ]  # lower case, no accents


def test_padding_plays_no_part(network, vocabulary):
    ids, mask = bert_tokens(vocabulary, 130)(CAPTIONS[:1])
    pixels = images()[:1] / 255
    torch.testing.assert_close(network(pixels, ids, mask), network(pixels, ids[:, :5], mask[:, :5]), rtol=0, atol=1e-6)


def test_the_words_of_another_language_model_are_refused(vocabulary, tmp_path):
    for content, message in (
        ("a\nb\n", r"\(2 words, not 130\)"),
        (vocabulary.read_text().replace("[CLS]", "[cls]"), "130 words"),
    ):
        (tmp_path / "vocab.txt").write_text(content)
        with pytest.raises(
            UserError, match=f"is not the vocabulary of bert-base-uncased .*{message}.*Give the path of vocab.txt"
        ):
            bert_tokens(tmp_path, 130)  # a folder with the file
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "vocab.txt", tmp_path / "absent.txt"):
        with pytest.raises(UserError, match="no readable vocabulary"):
            bert_tokens(path, 130)


def test_a_file_of_another_network_is_refused(network, vocabulary, tmp_path):
    weights = network.state_dict()
    wrong = {
        "short.pt": {name: part for name, part in weights.items() if "crossattention.self.key" not in name},
        "blip.pt": weights | {"blip.itm_head.weight": torch.ones(2, 16)},
        "base.pt": weights | {"blip.visual_encoder.pos_embed": torch.ones(1, 197, 24)},
    }
    messages = (
        r"\(4 of 96 tensors\): blip.text_encoder.encoder.layer.0.crossattention.self.key.weight is absent",
        r"blip.itm_head.weight is \(2, 16\) torch.float32, not absent",
        r"blip.visual_encoder.pos_embed is \(1, 197, 24\)",
    )
    for (name, stored), message in zip(wrong.items(), messages, strict=True):
        torch.save(stored, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} does not hold ImageReward .*{message}.*Give the path of ImageReward.pt"):
            ImageReward.load(tmp_path / name, vocabulary, SHAPE)


def test_random_weights_depend_on_their_seed_alone_and_are_named_invalid():
    before = torch.get_rng_state()
    first, again, other = (ImageReward.random(seed, dataclasses.replace(SHAPE, num_words=300)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.name == "image-reward-random-0-INVALID"
    scores = first.scores(images(), ["a dog", "a cat", ""])
    assert scores.isfinite().all() and not torch.equal(scores, first.scores(images(), ["a cat"] * 3))
    with pytest.raises(UserError, match="3 images but 1 captions"):
        first.scores(images(), ["a dog"])
