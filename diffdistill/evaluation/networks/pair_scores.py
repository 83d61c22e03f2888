"""Scores of an image for its caption, or alone, that were fitted to people's choices: PickScore, HPSv2, aesthetic score.

All are CLIP networks with their own weights or head. What the packages do, and the scale of their numbers:

- PickScore (Kirstain et al. 2023, arXiv:2305.01569): exp(logit_scale) cos(image, caption), about 20; others print it divided by 100
  or by 26. Images through transformers' CLIP processor: bytes by Pillow, the shorter side to 224 by the bicubic filter, the centre.
  Captions through transformers' tokenizer, which leaves HTML entities and curly quotes as they are, unlike open_clip's. float32.
- HPSv2 (Wu et al. 2023, arXiv:2306.09341): cos(image, caption) from `hpsv2.score`, 100 times that from `hpsv2.evaluate` and in tables.
  Images as floats by torchvision, the longer side to 224 bicubic, black margins up to the square; before torchvision 0.17 that resize
  only blended neighbours (no antialias). open_clip's tokenizer. On a GPU autocast to float16, where a cosine near 0.27 moves in steps
  of 2.4e-4, so that two images often get one score. Its network has plain GELU.
- Aesthetic score (LAION's improved-aesthetic-predictor): five linear layers on the image vector of OpenAI's ViT-L/14 at unit length,
  about 1 to 10. Images through OpenAI's `clip`: as for PickScore; on a GPU the vector is float16 and the layers float32.

Here all is computed in float32 as far as the caller's context allows, from images that the protocol has resized.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.clip import Clip
from diffdistill.evaluation.networks.clip_towers import TOWERS, Tower
from diffdistill.evaluation.networks.normalise import check_captions
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict
from diffdistill.models.fingerprint import weights_fingerprint

PICKSCORE = dataclasses.replace(
    TOWERS["clip-vit-h-14"], name="pickscore", source="a copy of yuvalkirstain/PickScore_v1, or its model.safetensors"
)

HpsVersion = Literal["v2.0", "v2.1"]
HPS_FILES: dict[str, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class PickScore(nn.Module):
    """PickScore, to be had from `load` or `random`.

    Attributes:
        name, fingerprint, size, dim: of the tower, see `Clip`.
    """

    channels = 3

    def __init__(self, tower: Clip) -> None:
        super().__init__()
        self.tower = tower
        self.name, self.fingerprint, self.size, self.dim = tower.name, tower.fingerprint, tower.size, tower.dim

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return exp(logit_scale) cos(image, caption), float32 (B,), higher is better.

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255].
            captions: B of them.
        """
        return self.tower.logit_scale * _cosines(self.tower, images, captions)

    @classmethod
    def load(cls, path: str | Path, tower: Tower = PICKSCORE) -> PickScore:
        """Read the folder or file of yuvalkirstain/PickScore_v1; errors as `Clip.load`."""
        return cls(_with_transformers_words(Clip.load(path, tower)))

    @classmethod
    def random(cls, seed: int, tower: Tower = PICKSCORE) -> PickScore:
        """Return PickScore with random weights, for tests."""
        return cls(_with_transformers_words(Clip.random(seed, tower)))


class Hps(nn.Module):
    """The second Human Preference Score, to be had from `load` or `random`.

    Attributes:
        name: "hps-v2.0" or "hps-v2.1".
        fingerprint, size, dim: of the tower, see `Clip`.
    """

    channels = 3

    def __init__(self, tower: Clip) -> None:
        super().__init__()
        self.tower = tower
        self.name, self.fingerprint, self.size, self.dim = tower.name, tower.fingerprint, tower.size, tower.dim

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return 100 cos(image, caption), float32 (B,), higher is better: the scale of the benchmark's tables, about 25 to 30.

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255].
            captions: B of them.
        """
        return 100 * _cosines(self.tower, images, captions)

    @classmethod
    def load(cls, path: str | Path, version: HpsVersion, tower: Tower = TOWERS["clip-vit-h-14"]) -> Hps:
        """Read the checkpoint of a version, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.

        Raises:
            UserError: the file bears the name of the other version, and all that `Clip.load` raises.
        """
        others = {file: other for other, file in HPS_FILES.items() if other != version}
        if Path(path).name in others:
            raise UserError(
                f"{path} is the file of HPS {others[Path(path).name]}, not of {version}. Give {HPS_FILES[version]}."
            )
        return cls(Clip.load(path, _hps_tower(version, tower)))

    @classmethod
    def random(cls, seed: int, version: HpsVersion = "v2.1", tower: Tower = TOWERS["clip-vit-h-14"]) -> Hps:
        """Return HPS with random weights, for tests."""
        return cls(Clip.random(seed, _hps_tower(version, tower)))


class Aesthetic(nn.Module):
    """The aesthetic score, to be had from `load` or `random`; captions play no part.

    Attributes:
        name: "aesthetic".
        fingerprint: hex sha256 of the weights of tower and head together.
        size, dim: of the tower, see `Clip`.
    """

    channels = 3
    reads = False

    def __init__(self, tower: Clip, head: nn.Module, name: str = "aesthetic") -> None:
        super().__init__()
        self.tower, self.head = tower, head.eval().requires_grad_(False)
        self.name, self.size, self.dim = name, tower.size, tower.dim
        self.fingerprint = weights_fingerprint(nn.ModuleList([tower.network, head]))

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return the score of each image, float32 (B,), about 1 to 10.

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255].
            captions: not read.
        """
        return self.of_vectors(self.tower(images).features)

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Return the scores (B,) of images by their vectors (B, dim) from the tower, of any length."""
        return self.head(F.normalize(vectors, dim=-1))[:, 0]

    @classmethod
    def load(cls, clip: str | Path, head: str | Path, tower: Tower = TOWERS["clip-vit-l-14"]) -> Aesthetic:
        """Read OpenAI's ViT-L/14 and the head, sac+logos+ava1-l14-linearMSE.pth.

        Raises:
            UserError: a file is absent, damaged or of another network.
        """
        with torch.device("meta"):
            network = score_head(tower.embed_dim)
        wanted = f"Give the path of {HEAD_FILE}; nothing is downloaded here."
        stored = {name.removeprefix("layers."): part for name, part in read_state_dict(head, wanted).items()}
        fill(network, stored, head, "the head", wanted)
        return cls(Clip.load(clip, tower), network)

    @classmethod
    def random(cls, seed: int, tower: Tower = TOWERS["clip-vit-l-14"]) -> Aesthetic:
        """Return the score with random weights, for tests."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = score_head(tower.embed_dim)
        return cls(Clip.random(seed, tower), head, f"aesthetic-random-{seed}-INVALID")


def score_head(dim: int) -> nn.Sequential:
    """Return the head of the aesthetic score and of ImageReward: five layers with nothing but dropout between them, (B, dim) to (B, 1)."""
    return nn.Sequential(
        nn.Linear(dim, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def _cosines(tower: Clip, images: Tensor, captions: list[str]) -> Tensor:
    check_captions(images, captions)
    return F.cosine_similarity(tower(images).features, tower.texts(captions))


def _hps_tower(version: HpsVersion, tower: Tower) -> Tower:
    source = f"{HPS_FILES[version]} of xswu/HPSv2"
    return dataclasses.replace(tower, name=f"hps-{version}", source=source)


def _with_transformers_words(clip: Clip) -> Clip:
    """Let captions be cleaned as transformers' tokenizer does it; the tokens of a clean caption are the same."""
    clip.tokenizer.clean_fn = transformers_clean  # type: ignore[attr-defined]  # of open_clip's SimpleTokenizer
    return clip


def transformers_clean(caption: str) -> str:
    """Return a caption in Unicode's composed form, with single blanks and in lower case."""
    return " ".join(unicodedata.normalize("NFC", caption).split()).lower()
