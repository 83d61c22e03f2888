"""DINOv2 against transformers' model of the same weights, and its positions against their rule, written out."""

import math

import pytest
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.dinov2 import ARCHITECTURES, Architecture, DINOv2, position_table
from diffdistill.evaluation.networks.imagenet import standardise
from diffdistill.evaluation.networks.state_dict import fill

SMALL = ARCHITECTURES["dinov2-vit-s-14"]


def transformers_model(architecture: Architecture, size: int) -> Dinov2Model:
    """transformers' network for images of that size, with random weights that all count."""
    config = Dinov2Config(
        hidden_size=architecture.dim,
        num_hidden_layers=architecture.depth,
        num_attention_heads=architecture.num_heads,
        use_swiglu_ffn=architecture.gated,
        image_size=size,
    )
    model = Dinov2Model(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight", "layernorm.weight", "lambda1")):
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            fan_in = weight[0].numel() if name.endswith("weight") else 10
            weight.normal_(std=1 / math.sqrt(fan_in), generator=generator)
    return model


def official_weights(model: Dinov2Model) -> dict[str, Tensor]:
    """The weights of transformers' network under the names of the official files, found by their order."""
    cls_token, mask_token, positions, *patch = (v for k, v in model.state_dict().items() if k.startswith("embeddings."))
    weights = {"cls_token": cls_token, "pos_embed": positions, "mask_token": mask_token}
    weights |= {"patch_embed.proj.weight": patch[0], "patch_embed.proj.bias": patch[1]}
    for k in range(model.config.num_hidden_layers):
        layer = [v for name, v in model.state_dict().items() if name.startswith(f"encoder.layer.{k}.")]
        norm1, qkv, proj, (ls1, *norm2), mlp, ls2 = layer[:2], layer[2:8], layer[8:10], layer[10:13], layer[13:-1], layer[-1]
        if len(mlp) == 6:  # gate and value apart
            mlp = [torch.cat(mlp[0:4:2]), torch.cat(mlp[1:4:2]), *mlp[4:]]
        hidden = ("w12", "w3") if model.config.use_swiglu_ffn else ("fc1", "fc2")
        parts = {
            "norm1": norm1,
            "attn.qkv": (torch.cat(qkv[0::2]), torch.cat(qkv[1::2])),
            "attn.proj": proj,
            "norm2": norm2,
            f"mlp.{hidden[0]}": mlp[:2],
            f"mlp.{hidden[1]}": mlp[2:],
        }
        weights |= {f"blocks.{k}.{name}.weight": weight for name, (weight, _) in parts.items()}
        weights |= {f"blocks.{k}.{name}.bias": bias for name, (_, bias) in parts.items()}
        weights |= {f"blocks.{k}.ls1.gamma": ls1, f"blocks.{k}.ls2.gamma": ls2}
    return weights | {"norm.weight": model.layernorm.weight.detach(), "norm.bias": model.layernorm.bias.detach()}


def interpolated(learned: Tensor, side: int) -> Tensor:
    """Cubic convolution of a = -3/4 at (i + 1/2) 37 / (side + 0.1) - 1/2, the border repeated; (37, 37, dim) to (side, side, dim)."""

    def cubic(x: float) -> float:
        x, a = abs(x), -0.75
        near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
        return near if x < 1 else far if x < 2 else 0.0

    weights = torch.zeros(side, 37, dtype=torch.float64)
    for i in range(side):
        place = (i + 0.5) * 37 / (side + 0.1) - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            weights[i, min(max(k, 0), 36)] += cubic(place - k)
    return torch.einsum("ik,jl,kld->ijd", weights, weights, learned.double()).float()


@pytest.fixture(scope="module")
def vit_s():
    """transformers' ViT-S at 518 pixels."""
    return transformers_model(SMALL, 518)


@pytest.fixture(scope="module")
def path(vit_s, tmp_path_factory):
    """Its weights in a file like the official one."""
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(official_weights(vit_s), path)
    return path


@pytest.fixture(scope="module")
def ours(path) -> DINOv2:
    return DINOv2.load(path, "dinov2-vit-s-14")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Noise and smooth waves in [0, 255]."""
    waves = (torch.arange(518.0) / torch.tensor([7.0, 19.0, 45.0])[:, None]).sin()
    noise = torch.rand(3, 518, 518, generator=torch.Generator().manual_seed(1))
    return torch.stack([noise, (waves[:, :, None] * waves[:, None, :] + 1) / 2]) * 255


def assert_close(actual: Tensor, expected: Tensor):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_at_the_size_of_the_table_the_class_token_is_that_of_transformers(ours, vit_s, images):
    x = standardise(images[:1])
    assert_close(ours.class_token(x), vit_s(x).last_hidden_state[:, 0])


def test_features_at_224_pixels_are_those_of_transformers_with_the_positions_of_the_original(ours, vit_s, images):
    at_224 = transformers_model(SMALL, 224)  # no interpolation: its table is of 16 x 16 patches
    learned = vit_s.embeddings.position_embeddings
    weights = vit_s.state_dict()
    grid = interpolated(learned[0, 1:].unflatten(0, (37, 37)), 16)
    weights["embeddings.position_embeddings"] = torch.cat([learned[:, :1], grid.flatten(0, 1)[None]], dim=1)
    at_224.load_state_dict(weights)
    cut = images[..., :224, 100:324]
    output = ours(cut)
    assert_close(output.features, at_224(standardise(cut)).last_hidden_state[:, 0])
    assert output.features.shape == (2, ours.dim) == (2, 384) and output.logits is output.spatial is None


@pytest.mark.parametrize("gated", [False, True])
def test_both_kinds_of_hidden_layer_are_those_of_transformers(gated, images):
    architecture = Architecture(48, 2, 3, gated)
    model = transformers_model(architecture, 518)
    with torch.device("meta"):
        network = DINOv2("small", architecture)
    fill(network, official_weights(model), "file", "it", "")
    x = standardise(images[:1])
    assert_close(network.class_token(x), model(x).last_hidden_state[:, 0])


@pytest.mark.parametrize("side", [1, 16, 36, 38])
def test_the_positions_follow_the_rule_of_the_original(side):
    learned = torch.randn(1, 1 + 37 * 37, 5, generator=torch.Generator().manual_seed(0))
    table = position_table(learned, side)
    assert torch.equal(table[:, :1], learned[:, :1])
    expected = interpolated(learned[0, 1:].unflatten(0, (37, 37)), side)
    torch.testing.assert_close(table[0, 1:].unflatten(0, (side, side)), expected, rtol=0, atol=1e-4)  # places in float32


def test_the_table_itself_is_not_interpolated():
    learned = torch.randn(1, 1 + 37 * 37, 2)
    assert torch.equal(position_table(learned, 37), learned)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dinov2-vit-s-14", 22_056_576),
        ("dinov2-vit-b-14", 86_580_480),
        ("dinov2-vit-l-14", 304_368_640),
        ("dinov2-vit-g-14", 1_136_480_768),
    ],
)
def test_each_network_has_the_parameters_of_transformers(name, count):
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        ours = DINOv2(name, architecture)
        theirs = Dinov2Model(
            Dinov2Config(
                hidden_size=architecture.dim,
                num_hidden_layers=architecture.depth,
                num_attention_heads=architecture.num_heads,
                use_swiglu_ffn=architecture.gated,
                image_size=518,
            )
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == count
    official = official_weights(theirs)
    assert {key: p.shape for key, p in ours.state_dict().items()} == {key: p.shape for key, p in official.items()}
    assert architecture.dim / architecture.num_heads == 64


def test_the_fingerprint_is_that_of_the_weights(ours, path):
    assert DINOv2.load(path, "dinov2-vit-s-14").fingerprint == ours.fingerprint != DINOv2.random(0).fingerprint


def test_no_mode_and_no_gradient_changes_the_features(ours, images):
    cut = images[:1, :, :224, :224]
    expected = ours.eval()(cut).features
    assert torch.equal(ours.train()(cut).features, expected) and not expected.requires_grad
    ours.eval()


def test_random_weights_depend_on_their_seed_alone_and_say_invalid(images):
    before = torch.get_rng_state()
    first, again, other = DINOv2.random(3), DINOv2.random(3), DINOv2.random(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.name == "dinov2-vit-s-14-random-3-INVALID"
    features = first(images[..., :224, :224]).features
    assert 0.1 < features.std() < 10 and (features[0] - features[1]).abs().mean() > 0.01  # neither vanishing nor blind


def test_another_file_is_refused_by_the_first_tensor_that_does_not_fit(vit_s, tmp_path):
    hollow = {name: torch.zeros(()).expand(value.shape) for name, value in official_weights(vit_s).items()}
    wrong = {
        "registers": (hollow | {"register_tokens": torch.zeros(1, 4, 384)}, r"register_tokens is \(1, 4, 384\) .*, not absent"),
        "cut": ({name: value for name, value in hollow.items() if "blocks.11" not in name}, "blocks.11.norm1.weight is absent"),
        "half": ({name: value.half() for name, value in hollow.items()}, "cls_token is .*float16, not .*float32"),
    }
    for name, (stored, message) in wrong.items():
        torch.save(stored, tmp_path / name)
        with pytest.raises(
            UserError, match=f"{name} does not hold dinov2-vit-s-14 .*{message}.*path of dinov2_vits14_pretrain.pth"
        ):
            DINOv2.load(tmp_path / name, "dinov2-vit-s-14")
    torch.save(hollow, tmp_path / "small")
    with pytest.raises(UserError, match=r"small does not hold dinov2-vit-l-14 .*path of dinov2_vitl14_pretrain.pth"):
        DINOv2.load(tmp_path / "small", "dinov2-vit-l-14")


def test_an_unknown_network_names_the_nearest(path):
    with pytest.raises(UserError, match="unknown DINOv2 'dinov2-vit-x-14'. Did you mean"):
        DINOv2.load(path, "dinov2-vit-x-14")
    with pytest.raises(UserError, match="unknown DINOv2"):
        DINOv2.random(0, "vits14")
