"""From what a user asks for (class labels, prompts, nothing) to the `Condition` a network is called with."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.files import hash_json, sha256
from diffdistill.models.condition import Condition
from diffdistill.models.network import Classes, Family
from diffdistill.models.weightless import as_fakes, meta_like, on_meta

Asked = Tensor | Sequence[str] | None
"""What images are asked for: class labels (B,) int64, B prompts, or None of an unconditional model."""

Conditioning = Literal["none", "class", "text"]
PROMPTS_PER_PASS = 32
TEXT_PARTS = ("text_encoder", "tokenizer")


class Conditioner(Protocol):
    """Makes conditions, and knows the value that stands for none."""

    @property
    def conditioning(self) -> Conditioning:
        """What is asked for: nothing, class labels, or prompts."""
        ...

    @property
    def null(self) -> Mapping[str, Tensor]:
        """The empty value by name, (1, ...); no entry where the model was never trained with one."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the networks that read what is asked for; empty where none does."""
        ...

    def values(self, asked: Asked, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return the named tensors of what is asked for, (B, ...)."""
        ...


@dataclass(frozen=True)
class ClassConditioner:
    """Class labels, or nothing where the model has no classes.

    Attributes:
        classes: number of classes and the null label.
        path: of the teacher, for messages.
        device: of the labels.
        fingerprint: empty, since no network reads labels.
    """

    classes: Classes
    path: str
    device: torch.device
    fingerprint: ClassVar[str] = ""

    @property
    def conditioning(self) -> Conditioning:
        """Return "class", or "none" for an unconditional model."""
        return "none" if self.classes.num is None else "class"

    @property
    def null(self) -> Mapping[str, Tensor]:
        """Return the null label, (1,) int64, where there is one."""
        label = self.classes.null
        return {} if label is None else {"class_labels": torch.tensor([label], device=self.device)}

    def values(self, asked: Asked, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return the labels on the device.

        Raises:
            UserError: labels for an unconditional model, labels out of range, none for a conditional one, or prompts.
        """
        num = self.classes.num
        if num is None:
            if asked is not None:
                raise UserError(f"{self.path} is unconditional; leave the labels out.")
            return {}
        if not isinstance(asked, Tensor):
            got = "" if asked is None else ", not prompts"
            raise UserError(f"{self.path} is class-conditional; give labels 0..{num - 1}{got}.")
        # Checked where labels are made, on the CPU: on a GPU the check would wait for the device.
        if asked.device.type == "cpu" and asked.numel() and not (int(asked.min()) >= 0 and int(asked.max()) < num):
            raise UserError(f"labels must lie in 0..{num - 1} for {self.path}; got {int(asked.min())}..{int(asked.max())}.")
        return {"class_labels": asked.to(self.device)}


class PromptConditioner:
    """Prompts, encoded by the text encoders of the teacher's own stock pipeline.

    They are loaded at the first prompt and can be released when everything is encoded; a later prompt loads them again.

    Args:
        pipeline_class: name of the stock pipeline class.
        folder: where its text encoders are.
        index: its model_index.json; the parts that text does not need are left out.
        family: turns what the pipeline encodes into named tensors.
        network: the denoising network, of which some pipelines ask the widths.
        image_size: (height, width) of the images in pixels.
        guidance_scale: what the stock pipeline's is to be, for a network that takes it as an input.
        path: of the teacher, for messages.
        device: of the text encoders and of what they encode; on "meta" their configs are all that is read.
        options: further arguments of `from_pretrained` (dtype, variant).
    """

    conditioning: Conditioning = "text"

    def __init__(
        self,
        pipeline_class: str,
        folder: str,
        index: Mapping[str, Any],
        family: Family,
        network: nn.Module,
        image_size: tuple[int, int],
        guidance_scale: float,
        path: str,
        device: torch.device,
        options: Mapping[str, Any],
    ) -> None:
        self.family, self.path, self.device, self._network = family, path, device, network
        self.guidance_scale = guidance_scale
        self.constants = self._constants(image_size)
        self._class_name, self._folder, self._index, self._options = pipeline_class, folder, index, options
        self._pipeline: Any = None
        self._null: dict[str, Tensor] | None = None

    @property
    def null(self) -> Mapping[str, Tensor]:
        """Return the encoded empty prompt, as the stock pipeline has it (zeros where it takes zeros)."""
        if self._null is None:
            self._null = self._encode([""])[1]
        return self._null

    def values(self, asked: Asked, batch_size: int | None = None) -> dict[str, Tensor]:
        """Return the encoded prompts.

        Raises:
            UserError: no prompts or labels in their place; the text encoders cannot be loaded.
        """
        if asked is None or isinstance(asked, (Tensor, str)) or not len(asked):
            raise UserError(f"{self.path} makes images from text; give a list of prompts.")
        parts = [self._encode(asked[k : k + PROMPTS_PER_PASS])[0] for k in range(0, len(asked), PROMPTS_PER_PASS)]
        constants = {name: value.expand(len(asked), *value.shape[1:]) for name, value in self.constants.items()}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | constants

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the text encoders' weights and the tokenizers' files: with the prompts it decides what is encoded."""
        folder = Path(self._folder)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(self._folder, allow_patterns=["text_encoder*/*", "tokenizer*/*"]))
        files = sorted(path for path in folder.glob("*/*") if path.is_file() and path.parent.name.startswith(TEXT_PARTS))
        return hash_json(
            {path.relative_to(folder).as_posix(): sha256(path) for path in files} | {"options": str(self._options)}
        )

    def resized(self, image_size: tuple[int, int]) -> PromptConditioner:
        """Return the conditioner of images (height, width): prompts are encoded as here, inputs that name the size differ."""
        other = copy.copy(self)
        other.constants = self._constants(image_size)
        return other

    def release(self) -> None:
        """Free the text encoders; the null value is kept."""
        self._pipeline = None

    def _constants(self, image_size: tuple[int, int]) -> dict[str, Tensor]:
        """Return further inputs (1, ...) that every prompt gets, and no prompt as well."""
        constants = self.family.constants(self._network, image_size)
        constants |= self.family.guidance_input(self._network, self.guidance_scale)
        return {name: value.to(self.device) for name, value in constants.items()}

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._pipeline is None:
            self._pipeline = self._load()
        values, null = self.family.encode(self._pipeline, list(prompts))
        null = {name: value[:1] for name, value in null.items()}
        if self.device.type == "meta":
            values, null = ({name: meta_like(value) for name, value in part.items()} for part in (values, null))
        return values, null

    def _load(self) -> Any:
        import diffusers

        pipeline_class = getattr(diffusers, self._class_name)
        parts = inspect.signature(pipeline_class.__init__).parameters
        components = {
            name: value[1] for name, value in self._index.items() if isinstance(value, (list, tuple)) and name in parts
        }
        wanted = {name for name, kind in components.items() if kind and name.startswith((*TEXT_PARTS, "scheduler"))}
        missing = sorted(name for name in wanted if not (Path(self._folder) / name).is_dir())
        if missing and Path(self._folder).is_dir():  # from_pretrained makes an empty tokenizer in place of a missing one
            raise UserError(f"the pipeline {self.path!r} lacks {', '.join(missing)}, which its model_index.json names. Add it.")
        left_out = {name: None for name in components if name not in wanted}
        weightless = self.device.type == "meta"
        try:
            with quiet_dtype():
                given = self._fakes(components) if weightless else {self.family.component: self._network}
                pipeline = pipeline_class.from_pretrained(self._folder, **left_out | given, **self._options)
        except Exception as error:  # the loaders raise many types; every one means that prompts cannot be encoded
            raise UserError(f"cannot load the text encoders of {self.path!r}: {error}") from error
        for name in (name for name in parts if name.startswith("text_encoder")):
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).eval().requires_grad_(False)
        return pipeline if weightless else pipeline.to(self.device)

    def _fakes(self, components: Mapping[str, str | None]) -> dict[str, nn.Module]:
        """Return network and text encoders without weights, which encode real tokens into tensors of the right shape."""
        import transformers

        networks = {self.family.component: self._network}
        for name, kind in components.items():
            if name.startswith("text_encoder") and kind is not None:
                encoder_class = getattr(transformers, kind)
                config = encoder_class.config_class.from_pretrained(self._folder, subfolder=name)
                networks[name] = on_meta(partial(encoder_class, config), self._options["torch_dtype"])
        return {name: as_fakes(network, [network]) for name, network in networks.items()}


@contextlib.contextmanager
def quiet_dtype() -> Iterator[None]:
    """Keep diffusers from warning about `torch_dtype`, the only name of it that version 0.35 knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        yield


def condition(conditioner: Conditioner, asked: Asked, batch_size: int | None = None) -> Condition:
    """Return the condition of what is asked for; `batch_size` counts only for an unconditional model."""
    values = conditioner.values(asked, batch_size)
    rows = next((len(value) for value in values.values()), batch_size or 1)
    return Condition(rows, values, conditioner.null if values else {})
