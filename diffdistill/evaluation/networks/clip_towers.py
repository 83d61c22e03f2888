"""The CLIP networks by our own names: how each is built, which activation it was trained with, how its images are made ready.

A name stands for one training, because a file of weights says neither. OpenAI trained with QuickGELU, x sigmoid(1.702 x), LAION with
GELU; under the other one a network still runs and its scores are wrong. open_clip 3.3 builds GELU for `ViT-L-14`, also around
OpenAI's weights, and forgets mean and deviation where the weights are given as a file. Nothing here is asked of open_clip's tables.

| name | trained by | open_clip's name and tag |
|---|---|---|
| clip-vit-b-32, clip-vit-b-16, clip-vit-l-14 | OpenAI | `ViT-B-32-quickgelu`, ... with `openai` |
| clip-vit-l-14-336px | OpenAI | `ViT-L-14-336-quickgelu` with `openai` |
| clip-vit-b-32-laion | LAION | `ViT-B-32` with `laion2b_s34b_b79k` |
| clip-vit-l-14-laion | LAION | `ViT-L-14` with `laion2b_s32b_b82k` |
| clip-vit-h-14 | LAION | `ViT-H-14` with `laion2b_s32b_b79k` |
| clip-vit-g-14 | LAION | `ViT-g-14` with `laion2b_s12b_b42k`; GigaGAN's and DMD2's "ViT-G/14" |
| clip-vit-bigg-14 | LAION | `ViT-bigG-14` with `laion2b_s39b_b160k` |
| clip-vit-b-32-depicts, clip-vit-g-14-depicts | | as without "-depicts", "A photo depicts" before each caption: GigaGAN, DMD2 |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.normalise import OPENAI_MEAN, OPENAI_STD, RGB

Activation = Literal["gelu", "quick_gelu"]

LAION_L_MEAN: RGB = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Tower:
    """A CLIP network without its weights: an image tower and a text tower that end in one space.

    Attributes:
        name: ours, see the table above.
        activation: of every block of both towers.
        embed_dim: length of an image's and of a caption's vector.
        vision, text: the two towers in open_clip's words; what is not said has open_clip's default.
        mean, std: of the red, green and blue that the images are made ready with, on the scale of 0 to 1.
        interpolation, resize_mode: how the published preprocessing brings an image to `size`: by Pillow's filter of that name on
            bytes, the shorter side first and then the centre ("shortest"), or both sides alike ("squash"). What is really done,
            the protocol says.
        rounded: whether the published matrices are float16 numbers. OpenAI's are and LAION's of the same shapes are not, which
            tells the two apart. None where only one training of these shapes is in the table, or it is not known.
        prefix: words put between the start token and each caption, or None.
        source: which files to give, for messages.
    """

    name: str
    activation: Activation
    embed_dim: int
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    rounded: bool | None = None
    prefix: str | None = None
    source: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """Side of the images that the network takes, pixels."""
        return self.vision["image_size"]

    @property
    def wanted(self) -> str:
        """The end of a message: which file to give."""
        return f"Give the path of {self.source}; nothing is downloaded here."


def _vision(
    patch: int, width: int, layers: int, size: int = 224, head_width: int = 64, mlp_ratio: float = 4.0
) -> dict[str, Any]:
    return dict(image_size=size, patch_size=patch, width=width, layers=layers, head_width=head_width, mlp_ratio=mlp_ratio)


def _text(width: int, heads: int, layers: int) -> dict[str, Any]:
    return dict(context_length=77, vocab_size=49408, width=width, heads=heads, layers=layers)


def _openai(name: str, file: str, folder: str, embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> Tower:
    source = f"OpenAI's {file}, a copy of openai/{folder}, or timm's copy of it for open_clip"
    return Tower(name, "quick_gelu", embed_dim, vision, text, rounded=True, source=source)


def _laion(name: str, folder: str, embed_dim: int, vision: dict[str, Any], text: dict[str, Any], **special: Any) -> Tower:
    source = f"a copy of laion/{folder}, or its open_clip_model.safetensors or open_clip_pytorch_model.bin"
    return Tower(name, "gelu", embed_dim, vision, text, source=source, **special)


def _towers() -> Iterator[Tower]:
    base, large = _text(512, 8, 12), _text(768, 12, 12)
    yield _openai("clip-vit-b-32", "ViT-B-32.pt", "clip-vit-base-patch32", 512, _vision(32, 768, 12), base)
    yield _openai("clip-vit-b-16", "ViT-B-16.pt", "clip-vit-base-patch16", 512, _vision(16, 768, 12), base)
    yield _openai("clip-vit-l-14", "ViT-L-14.pt", "clip-vit-large-patch14", 768, _vision(14, 1024, 24), large)
    yield _openai(
        "clip-vit-l-14-336px", "ViT-L-14-336px.pt", "clip-vit-large-patch14-336", 768, _vision(14, 1024, 24, size=336), large
    )
    yield _laion("clip-vit-b-32-laion", "CLIP-ViT-B-32-laion2B-s34B-b79K", 512, _vision(32, 768, 12), base, rounded=False)
    yield _laion(
        "clip-vit-l-14-laion",
        "CLIP-ViT-L-14-laion2B-s32B-b82K",
        768,
        _vision(14, 1024, 24),
        large,
        mean=LAION_L_MEAN,
        std=LAION_L_MEAN,
        rounded=False,
    )
    yield _laion(
        "clip-vit-h-14", "CLIP-ViT-H-14-laion2B-s32B-b79K", 1024, _vision(14, 1280, 32, head_width=80), _text(1024, 16, 24)
    )
    yield _laion(
        "clip-vit-g-14",
        "CLIP-ViT-g-14-laion2B-s12B-b42K",
        1024,
        _vision(14, 1408, 40, head_width=88, mlp_ratio=4.3637),
        _text(1024, 16, 24),
    )
    yield _laion(
        "clip-vit-bigg-14",
        "CLIP-ViT-bigG-14-laion2B-39B-b160k",
        1280,
        _vision(14, 1664, 48, head_width=104, mlp_ratio=4.9231),
        _text(1280, 20, 32),
    )


def _depicting(tower: Tower) -> Tower:
    """Return the tower with the captions of Hessel et al. 2021 (arXiv:2104.08718), which GigaGAN's scores have too."""
    return dataclasses.replace(tower, name=f"{tower.name}-depicts", prefix="A photo depicts")


TOWERS: dict[str, Tower] = {tower.name: tower for tower in _towers()}
TOWERS |= {tower.name: tower for tower in map(_depicting, (TOWERS["clip-vit-b-32"], TOWERS["clip-vit-g-14"]))}


def tower_of(folder: Path, name: str) -> Tower:
    """Return the tower that a folder of open_clip describes in its open_clip_config.json.

    Raises:
        UserError: there is no such file, or it describes something else than a CLIP of open_clip's own two towers.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    config = _json(folder / "open_clip_config.json")
    model, preprocess = config.get("model_cfg") or {}, config.get("preprocess_cfg") or {}
    foreign = model.keys() - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    try:
        vision, text = CLIPVisionCfg(**model["vision_cfg"]), CLIPTextCfg(**model["text_cfg"])
        embed_dim = model["embed_dim"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder} is no readable folder of open_clip: model_cfg of open_clip_config.json, {error}") from error
    if foreign or vision.timm_model_name or text.hf_model_name or not isinstance(vision.image_size, int):
        raise UserError(
            f"{folder} describes another network than a CLIP for square images whose two towers are open_clip's own, "
            "and no other is read here. Give a folder whose model_cfg has embed_dim, vision_cfg, text_cfg and quick_gelu alone, "
            "without timm_model_name and hf_model_name."
        )
    return Tower(
        name=name,
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        embed_dim=embed_dim,
        vision=dataclasses.asdict(vision),
        text=dataclasses.asdict(text),
        mean=tuple(preprocess.get("mean") or OPENAI_MEAN),
        std=tuple(preprocess.get("std") or OPENAI_STD),
        interpolation=preprocess.get("interpolation") or "bicubic",
        resize_mode=preprocess.get("resize_mode") or "shortest",
        source="the weights that belong to this open_clip_config.json",
    )


def check_folder(folder: Path, tower: Tower) -> None:
    """Raise UserError where the configuration in a folder, of open_clip or of transformers, describes another network."""
    claims: list[tuple[str, Any]] = []
    if (folder / "open_clip_config.json").is_file():
        claims += _fields(tower_of(folder, tower.name)).items()
    if (folder / "config.json").is_file():
        config = _json(folder / "config.json")
        for part in ("vision", "text"):  # where nothing is said, transformers takes quick_gelu
            claims.append((f"activation of {part}", config.get(f"{part}_config", {}).get("hidden_act", "quick_gelu")))
    if not claims:
        raise UserError(f"{folder} has neither open_clip_config.json nor config.json. {tower.wanted}")
    ours = _fields(tower)
    for name, claim in claims:
        if claim != ours[name]:
            raise UserError(f"{folder} is not of {tower.name}: it says {name} {claim}, not {ours[name]}. {tower.wanted}")


def _fields(tower: Tower) -> dict[str, Any]:
    """Return all that a folder can say of a tower, defaults filled in."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    fields: dict[str, Any] = {f"activation of {part}": tower.activation for part in ("vision", "text")}
    fields |= dict(embed_dim=tower.embed_dim, mean=tower.mean, std=tower.std)
    fields |= {f"vision {name}": value for name, value in dataclasses.asdict(CLIPVisionCfg(**tower.vision)).items()}
    return fields | {f"text {name}": value for name, value in dataclasses.asdict(CLIPTextCfg(**tower.text)).items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.parent} is no readable folder of open_clip: {error}") from error
