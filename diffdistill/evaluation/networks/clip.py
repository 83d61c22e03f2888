"""CLIP networks: vectors of images and of captions in one space (Radford et al. 2021, arXiv:2103.00020).

open_clip's modules, built from our own table and filled from a local file. Each kind of file gives the same network, with the same
fingerprint: OpenAI's TorchScript (ViT-L-14.pt), open_clip's .bin and .safetensors, and the folders of open_clip and transformers.

What the packages do with an image before the network, all on bytes and by Pillow: the shorter side to 224 (336) by the bicubic
filter, the centre cut out, then (x / 255 - mean) / std. OpenAI's `clip` computes in float16 on a GPU, open_clip in float32.
GigaGAN and DMD2 first bring the image to 256 by Pillow's Lanczos filter. The score of an image and its caption is made of the
cosine of the two vectors, on one of the scales of `metrics.captions`.

Captions become open_clip's tokens (ftfy, HTML entities, lower case), at most 77 with the start and end tokens.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.evaluation.features import Features
from diffdistill.evaluation.networks.clip_towers import TOWERS, Tower, check_folder, tower_of
from diffdistill.evaluation.networks.normalise import Normalise
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict, widened
from diffdistill.models.fingerprint import weights_fingerprint

if typing.TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

Tokenizer = Callable[[list[str]], Tensor]  # captions to int64 (B, context), the end token the largest of a row


class Clip(nn.Module):
    """A CLIP network, to be had from `load`, `from_folder` or `random`.

    It computes in float32 as far as the caller's context allows: autocast and TF32 are the caller's.

    Attributes:
        name: of the tower; with random weights a name that says INVALID.
        fingerprint: hex sha256 of the weights in open_clip's layout and in float32, whichever kind of file they came from.
        size: side of the images, pixels.
        dim: length of a vector.
        logit_scale: what cosines were multiplied by in training, exp of the stored number; about 100 once trained.
    """

    channels = 3

    def __init__(self, network: typing.Any, tower: Tower, tokenizer: Tokenizer, name: str | None = None) -> None:
        super().__init__()
        self.name = name or tower.name
        self.network = network.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.normalise = Normalise(tower.size, tower.mean, tower.std)
        self.size, self.dim = tower.size, tower.embed_dim
        self.fingerprint = weights_fingerprint(network)
        self.logit_scale = float(self.network.logit_scale.exp())

    def forward(self, images: Tensor) -> Features:
        """Return image vectors (B, dim), not of unit length.

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255]: resized already, by the rule of the protocol.
        Raises:
            ValueError: another shape, or images that are not floating.
        """
        return Features(self.network.encode_image(self.normalise(images)))

    def texts(self, captions: list[str]) -> Tensor:
        """Return the vectors of B captions (B, dim), not of unit length."""
        return self.network.encode_text(self.tokenizer(captions).to(self.normalise.scale.device))

    @classmethod
    def load(cls, path: str | Path, tower: Tower | str) -> Clip:
        """Read the weights of a tower, or of TOWERS by name, from a file, or a folder of open_clip or transformers.

        Nothing is downloaded.

        Raises:
            UserError: the file is absent, damaged or of another network, or the folder says that it is of another network.
        """
        path, tower = Path(path), TOWERS[tower] if isinstance(tower, str) else tower
        if path.is_dir():
            check_folder(path, tower)
        return cls(_read(path, tower), tower, clip_tokenizer(tower.text["context_length"], tower.prefix))

    @classmethod
    def from_folder(cls, folder: str | Path, name: str) -> Clip:
        """Read a network that is in no table from a folder of open_clip, which says everything of it but the name.

        Raises:
            UserError: the folder lacks its configuration, its weights or its tokenizer, or they do not fit.
        """
        folder = Path(folder)
        tower = tower_of(folder, name)
        return cls(_read(folder, tower), tower, _tokenizer_in(folder))

    @classmethod
    def random(cls, seed: int, tower: Tower | str = "clip-vit-b-32") -> Clip:
        """Return a network of random weights for tests: its scores mean nothing, and its name says so."""
        tower = TOWERS[tower] if isinstance(tower, str) else tower
        tokenizer = clip_tokenizer(tower.text["context_length"], tower.prefix)
        return cls(_build(tower, seed), tower, tokenizer, f"{tower.name}-random-{seed}-INVALID")


def clip_tokenizer(context_length: int = 77, prefix: str | None = None) -> Tokenizer:
    """Return OpenAI's tokenizer as open_clip carries it, with words put before each caption where there are some."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=context_length)
    return tokenizer if prefix is None else functools.partial(prefixed_tokens, tokenizer, prefix)


def _tokenizer_in(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder of open_clip, CLIP's own where the folder names none."""
    import open_clip

    try:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ValueError, TypeError) as error:  # TypeError: transformers 4 without a vocabulary
        raise UserError(f"{folder} is no readable folder of open_clip: its tokenizer, {error}") from error
    words = getattr(
        tokenizer, "tokenizer", None
    )  # of transformers 5, which makes one without a vocabulary where the file is absent
    if words is not None and len(words) <= len(words.all_special_tokens):
        raise UserError(f"{folder} is no readable folder of open_clip: its tokenizer has no words. Is tokenizer.json there?")
    return tokenizer


def prefixed_tokens(tokenizer: SimpleTokenizer, prefix: str, captions: list[str]) -> Tensor:
    """Return tokens int64 (B, context) of "start prefix caption end", cut to the context with the end token kept.

    The rule of GigaGAN and DMD2, but that these lose the end of a caption whose 73rd token is an exclamation mark (token 0).
    """
    head = [tokenizer.sot_token_id, *tokenizer.encode(prefix)]
    tokens = torch.zeros(len(captions), tokenizer.context_length, dtype=torch.long)
    for row, caption in zip(tokens, captions, strict=True):
        kept = (head + tokenizer.encode(caption))[: len(row) - 1] + [tokenizer.eot_token_id]
        row[: len(kept)] = torch.tensor(kept)
    return tokens


def _build(tower: Tower, seed: int = 0) -> nn.Module:
    """Return the network with random weights, the same for the same seed; the global generator stays as it is."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(tower.embed_dim, dict(tower.vision), dict(tower.text), quick_gelu=tower.activation == "quick_gelu")


def _read(path: Path, tower: Tower) -> nn.Module:
    """Return the network of the tower with the weights of a file, or of the file in a folder."""
    file = _weights_in(path) if path.is_dir() else path
    stored = read_state_dict(file, tower.wanted)
    network = _build(tower)
    layout = from_transformers(stored) if TRANSFORMERS_MARK in stored else stored
    fill(network, widened(layout, OPENAI_SIZES), file, f"the weights of {tower.name}", tower.wanted)
    rounded = _is_rounded(network)
    if tower.rounded is not None and rounded != tower.rounded:
        found, made_for = ("float16", "quick_gelu") if rounded else ("finer than float16", "gelu")
        raise UserError(
            f"{file} does not hold the published weights of {tower.name}, which computes with {tower.activation}: "
            f"its matrices are {found} numbers, as if made for {made_for}. OpenAI trained with quick_gelu and published float16, "
            f"LAION trained with gelu and published float32. {tower.wanted}"
        )
    return network


def _weights_in(folder: Path) -> Path:
    """Return the file of weights that open_clip would take from the folder."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} is no readable folder of open_clip: it has none of {', '.join(WEIGHT_FILES)}.")
    return found[0]


def _is_rounded(network: nn.Module) -> bool:
    """Tell whether every matrix of the blocks consists of float16 numbers."""
    matrices = (part for name, part in network.state_dict().items() if "resblocks" in name and part.ndim == 2)
    return all(torch.equal(matrix, matrix.half().to(matrix.dtype)) for matrix in matrices)


WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI stores beside the weights


TRANSFORMERS_MARK = "text_model.final_layer_norm.weight"
TRANSFORMERS_NAMES = (  # of transformers' CLIPModel, and what open_clip and OpenAI call the same tensors
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
)


def from_transformers(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of transformers' CLIPModel in open_clip's layout: other names, projections transposed, q, k and v joined."""
    converted = {}
    for name, tensor in stored.items():
        if name.endswith(".position_ids"):
            continue  # 0, 1, 2, ...
        if name in ("text_projection.weight", "visual_projection.weight"):
            converted["text_projection" if name.startswith("text") else "visual.proj"] = tensor.T
            continue
        for pattern, ours in TRANSFORMERS_NAMES:
            name = re.sub(pattern, ours, name)
        converted[name] = tensor
    for name in [name for name in converted if ".self_attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in converted for part in parts):  # else a part is missing, and whoever wants the whole will say so
            joined = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            converted[joined] = torch.cat([converted.pop(part) for part in parts])
    return converted
