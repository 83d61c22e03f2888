"""ImageReward: what people would say of an image made for a caption (Xu et al. 2023, arXiv:2304.05977).

BLIP (Li et al. 2022, arXiv:2201.12086): a vision transformer, ViT-L/16 at 224 pixels, and BERT whose every layer also attends to the
image's tokens. The state of BERT's first token goes through five linear layers to one number, which is then standardised.
Written here, in the names of ImageReward.pt, because transformers' BLIP has other names and its interface changes between releases.

The package takes an image as OpenAI's `clip` does (bytes by Pillow, the shorter side to 224 by the bicubic filter, the centre, CLIP's
mean and deviation) and a caption as 35 tokens of bert-base-uncased, which starts with [CLS]: BLIP's own [ENC] is not used. float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.errors import UserError
from diffdistill.evaluation.networks.normalise import OPENAI_MEAN, OPENAI_STD, Normalise, check_captions
from diffdistill.evaluation.networks.pair_scores import score_head
from diffdistill.evaluation.networks.state_dict import fill, read_state_dict, widened
from diffdistill.models.fingerprint import weights_fingerprint

REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072  # of the training set
NUM_TOKENS = 35
WANTED = "Give the path of ImageReward.pt of THUDM/ImageReward; nothing is downloaded here."
WANTED_WORDS = "Give the path of vocab.txt of bert-base-uncased; nothing is downloaded here."
UNUSED = (  # BLIP's projections for its contrastive loss, and the numbers 0, 1, 2, ...
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)
SPECIAL_WORDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102}


@dataclass(frozen=True)
class BlipShape:
    """Sizes of BLIP; the defaults are ImageReward's."""

    size: int = 224
    patch: int = 16
    vision_width: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    num_words: int = 30522 + 2  # BERT's, [DEC] and [ENC]
    num_positions: int = 512


class ImageReward(nn.Module):
    """The score, to be had from `load` or `random`.

    It computes in float32 as far as the caller's context allows: autocast and TF32 are the caller's.

    Attributes:
        name: "image-reward"; with random weights a name that says INVALID.
        fingerprint: hex sha256 of the weights in use.
        size: side of the images, pixels.
        dim: length of the vector that becomes the score.
    """

    channels = 3

    def __init__(self, network: RewardNetwork, tokens: Tokens, name: str = "image-reward") -> None:
        super().__init__()
        self.network, self.tokens, self.name = network.eval().requires_grad_(False), tokens, name
        self.size, self.dim = network.shape.size, network.shape.text_width
        self.normalise = Normalise(self.size, OPENAI_MEAN, OPENAI_STD)
        self.fingerprint = weights_fingerprint(network)

    def scores(self, images: Tensor, captions: list[str]) -> Tensor:
        """Return (reward - 0.167) / 1.033, float32 (B,), higher is better, about -2 to 2.

        Args:
            images: (B, 3, size, size), any floating dtype, in [0, 255].
            captions: B of them; what is beyond 35 tokens is cut off.
        """
        check_captions(images, captions)
        ids, mask = (part.to(self.normalise.scale.device) for part in self.tokens(captions))
        return (self.network(self.normalise(images), ids, mask) - REWARD_MEAN) / REWARD_STD

    @classmethod
    def load(cls, path: str | Path, vocabulary: str | Path, shape: BlipShape = BlipShape()) -> ImageReward:
        """Read ImageReward.pt, and vocab.txt of bert-base-uncased or a folder with it; nothing is downloaded.

        Raises:
            UserError: a file is absent, damaged or of another network or language.
        """
        tokens = bert_tokens(Path(vocabulary), shape.num_words - 2)
        stored = widened(read_state_dict(path, WANTED), UNUSED)
        with torch.device("meta"):
            network = RewardNetwork(shape)
        fill(network, stored, path, "ImageReward", WANTED)
        return cls(network, tokens)

    @classmethod
    def random(cls, seed: int, shape: BlipShape = BlipShape()) -> ImageReward:
        """Return the score with random weights, for tests; the letters of a caption stand in for its words."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = RewardNetwork(shape)
        return cls(network, letter_tokens, f"image-reward-random-{seed}-INVALID")


# Words

Tokens = Callable[[list[str]], tuple[Tensor, Tensor]]


def bert_tokens(vocabulary: Path, num_words: int) -> Tokens:
    """Return the function from B captions to their token ids int64 (B, 35) and what is no padding, bool (B, 35).

    Args:
        vocabulary: vocab.txt of bert-base-uncased, or a folder with it.
        num_words: how many words it must have.
    Raises:
        UserError: the file is absent or another vocabulary.
    """
    from tokenizers import BertWordPieceTokenizer

    path = vocabulary / "vocab.txt" if vocabulary.is_dir() else vocabulary
    try:
        words = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no readable vocabulary: {error}. {WANTED_WORDS}") from error
    numbers = {word: number for number, word in enumerate(words)}
    if len(numbers) != num_words or any(numbers.get(word) != number for word, number in SPECIAL_WORDS.items()):
        raise UserError(
            f"{path} is not the vocabulary of bert-base-uncased ({len(numbers)} words, not {num_words}). {WANTED_WORDS}"
        )
    tokenizer = BertWordPieceTokenizer(numbers, lowercase=True)
    tokenizer.enable_truncation(NUM_TOKENS)
    tokenizer.enable_padding(length=NUM_TOKENS)

    def tokens(captions: list[str]) -> tuple[Tensor, Tensor]:
        encoded = tokenizer.encode_batch(captions)
        return torch.tensor([row.ids for row in encoded]), torch.tensor([row.attention_mask for row in encoded]).bool()

    return tokens


def letter_tokens(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return one token for each of the first 35 bytes of the captions, in the form of `bert_tokens`."""
    rows = [list(caption.encode()[:NUM_TOKENS]) for caption in captions]
    ids = torch.tensor([row + [0] * (NUM_TOKENS - len(row)) for row in rows])
    return ids, torch.arange(NUM_TOKENS) < torch.tensor([[max(1, len(row))] for row in rows])


# The network, in the names of ImageReward.pt


class RewardNetwork(nn.Module):
    """BLIP and the head: images (B, 3, size, size) and token ids (B, L) to rewards (B,)."""

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        self.shape = shape
        self.blip = nn.ModuleDict(dict(visual_encoder=VisionEncoder(shape), text_encoder=TextEncoder(shape)))
        self.mlp = nn.ModuleDict(dict(layers=score_head(shape.text_width)))

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return rewards (B,), not standardised; `mask` (B, L) is False at padding."""
        image_tokens = self.blip["visual_encoder"](images)
        states = self.blip["text_encoder"](ids, mask, image_tokens)
        return self.mlp["layers"](states[:, 0])[:, 0]


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k' / sqrt(d)) v of each head, (B, L, width); `mask` (B, K) is False at keys to leave out."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))  # (B, heads, L, d)
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class VisionEncoder(nn.Module):
    """Vision transformer: images to their tokens (B, 1 + patches, width), the class token first."""

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        width = shape.vision_width
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, shape.patch, stride=shape.patch)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (shape.size // shape.patch) ** 2, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, shape.vision_heads) for _ in range(shape.vision_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens of the images."""
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


class VisionBlock(nn.Module):
    """Attention and a layer of neurons, each on the normalised input and added to it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(width, 3 * width), proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after the block."""
        query, key, value = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](attend(query, key, value, self.num_heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class TextEncoder(nn.Module):
    """BERT that also attends to an image: token ids (B, L) to states (B, L, width)."""

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        width = shape.text_width
        self.embeddings = nn.ModuleDict(
            dict(
                word_embeddings=nn.Embedding(shape.num_words, width),
                position_embeddings=nn.Embedding(shape.num_positions, width),
                LayerNorm=nn.LayerNorm(width, eps=1e-12),
            )
        )
        layers = (TextLayer(width, shape.text_heads, shape.vision_width) for _ in range(shape.text_layers))
        self.encoder = nn.ModuleDict(dict(layer=nn.ModuleList(layers)))

    def forward(self, ids: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the states of the last layer."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"](positions)
        x = self.embeddings["LayerNorm"](x)
        for layer in self.encoder["layer"].children():
            x = layer(x, mask, image_tokens)
        return x


class TextLayer(nn.Module):
    """Attention among the words, attention to the image, a layer of neurons; each added to its input, then normalised."""

    def __init__(self, width: int, num_heads: int, image_width: int) -> None:
        super().__init__()
        self.attention = TextAttention(width, num_heads, width)
        self.crossattention = TextAttention(width, num_heads, image_width)
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(width, 4 * width)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(4 * width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)))

    def forward(self, x: Tensor, mask: Tensor, image_tokens: Tensor) -> Tensor:
        """Return the states after the layer."""
        x = self.attention(x, x, mask)
        x = self.crossattention(x, image_tokens)
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class TextAttention(nn.Module):
    """Attention of the states to a context, added to them, then normalised."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        projections = dict(
            query=nn.Linear(width, width), key=nn.Linear(context_width, width), value=nn.Linear(context_width, width)
        )
        self.self = nn.ModuleDict(projections)
        self.output = nn.ModuleDict(dict(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=1e-12)))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the states after the attention; `mask` (B, K) is False at tokens of the context to leave out."""
        found = attend(self.self["query"](x), self.self["key"](context), self.self["value"](context), self.num_heads, mask)
        return self.output["LayerNorm"](x + self.output["dense"](found))
