"""Tokenizers of a small vocabulary: every word of the given texts is one token, other words are spelled."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffdistill.files import write_json

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BLANK = "\u2581"  # the start of a word
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def clip_tokenizer(texts: Iterable[str], length: int) -> Any:
    """Return a transformers CLIPTokenizer learned from the words of `texts` by byte-pair encoding, until each is one token.

    The end token has the highest number, as open_clip's and transformers' text towers expect of it.

    Args:
        texts: lower-case texts; how often a word occurs makes no difference.
        length: tokens a text is padded or cut to, start and end included.
    """
    import transformers
    from tokenizers import Tokenizer, models, trainers

    learned = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    alphabet = [*LETTERS]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    words = sorted({word for text in texts for word in text.split()})
    learned.train_from_iterator(words, trainer)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    pieces = [*LETTERS, *(letter + WORD_END for letter in LETTERS), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: k for k, token in enumerate([*dict.fromkeys(pieces), START, END])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
        return transformers.CLIPTokenizer(
            str(Path(folder) / "vocab.json"), str(Path(folder) / "merges.txt"), model_max_length=length, pad_token=END
        )


def name_fast_tokenizer(index: Path) -> None:
    """Name the fast class in a pipeline's model_index.json, and leave an empty list out of its tokenizer's config.

    transformers 5 calls the fast class as 4 calls the slow one, which reads other files, and 4 wants a dict where 5 writes that list.
    """
    config = json.loads(index.read_text())
    library, name = config["tokenizer"]
    config["tokenizer"] = [library, name if name.endswith("Fast") else f"{name}Fast"]
    write_json(index, config)
    path = index.parent / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    write_json(path, {key: value for key, value in settings.items() if (key, value) != ("extra_special_tokens", [])})


def t5_tokenizer(texts: Iterable[str], length: int) -> Any:
    """Return transformers' T5 tokenizer with the words of `texts` and single letters as pieces; the fast one, which version 4 has too.

    Args:
        texts: lower-case texts.
        length: tokens a text is cut to, the end included.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({word for text in texts for word in text.split()})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"{BLANK}{word}", -1.0) for word in words] + [(piece, -10.0) for piece in (BLANK, *LETTERS)]
    spelled = Tokenizer(models.Unigram([*special, *dict(pieces).items()], unk_id=2, byte_fallback=False))
    blanks = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="always", split=True)
    spelled.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), blanks])
    spelled.decoder = decoders.Metaspace(replacement=BLANK, prepend_scheme="always", split=True)
    spelled.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=spelled, extra_ids=0, model_max_length=length)
