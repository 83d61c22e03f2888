"""`load_teacher`: any diffusers pipeline folder, hub id or embedded name, as a frozen `Denoiser` with what belongs to it."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffdistill.errors import UserError
from diffdistill.files import hash_json
from diffdistill.math.schedules import EDMSchedule
from diffdistill.models import conditioning
from diffdistill.models.codec import Codec
from diffdistill.models.condition import Condition
from diffdistill.models.conditioning import Asked, ClassConditioner, Conditioner, PromptConditioner, quiet_dtype
from diffdistill.models.families import FAMILIES
from diffdistill.models.fingerprint import weights_fingerprint
from diffdistill.models.network import Classes, EDMDenoiser, Family, FamilyDenoiser, NetworkDenoiser
from diffdistill.models.own_code import refuse_own_code
from diffdistill.models.quantize import Quantization, quantize
from diffdistill.models.weightless import on_meta

EMBEDDED = ("digits-unet", "digits-dit", "shapes-sd", "shapes-pixart")
INDEX = "model_index.json"


@dataclass(frozen=True)
class Teacher:
    """A pretrained model and what belongs to it.

    Attributes:
        denoiser: the frozen network on its schedule.
        family: the network's calling convention.
        network: the diffusers module, in eval mode, without gradients.
        codec: from images to states and back.
        scheduler_config: the pipeline's scheduler, class name under "_class_name".
        pipeline_class: name of the diffusers pipeline class the folder was saved from.
        path: folder or hub id it was loaded from.
        guidance: the guidance this teacher is usually sampled with, counted from 1.
        steps: the number of steps it is usually sampled with.
        conditioner: makes conditions of labels or prompts.
        quantized: what the network's block weights are rounded to, None for as they are.
    """

    denoiser: FamilyDenoiser
    family: Family
    network: nn.Module
    codec: Codec
    scheduler_config: Mapping[str, Any]
    pipeline_class: str
    path: str
    guidance: float
    steps: int
    conditioner: Conditioner
    quantized: Quantization | None = None

    @property
    def classes(self) -> Classes:
        """Number of classes and null label; both None for a model without classes."""
        return self.conditioner.classes if isinstance(self.conditioner, ClassConditioner) else Classes(None, None)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None for a model without classes."""
        return self.classes.num

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.network.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the decoded images."""
        return self.codec.image_shape(self.denoiser.sample_shape)

    def put_aside(self) -> None:
        """Leave the device to the network: the autoencoder moves to the CPU, text encoders are freed. What is asked next takes them back."""
        self.codec.offload()
        if isinstance(self.conditioner, PromptConditioner):
            self.conditioner.release()

    def fingerprints(self) -> dict[str, str]:
        """Return the hex SHA-256 of each part that decides the teacher's images, under the part's name in the pipeline.

        Call it before roles are built: in the shared layout their adapters live in the same network.
        """
        settings = {name: value for name, value in self.scheduler_config.items() if name != "_diffusers_version"}
        found = {
            self.family.component: weights_fingerprint(self.network),
            "scheduler": hash_json(settings),
            "vae": self.codec.fingerprint,
            "text_encoder": self.conditioner.fingerprint,
        }
        return {part: digest for part, digest in found.items() if digest}

    def state_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the states of images of height and width `size`.

        Raises:
            UserError: a size that the autoencoder or the network cannot take.
        """
        return _state_size(self.family, self.network, self.codec, size, self.path)

    def condition(self, asked: Asked, batch_size: int | None = None) -> Condition:
        """Return the condition of class labels (B,) int64, of B prompts, or of none for `batch_size` unconditional samples.

        Raises:
            UserError: what is asked for is not what this teacher takes, or labels out of range.
        """
        return conditioning.condition(self.conditioner, asked, batch_size)

    def resized(self, size: int) -> Teacher:
        """Return the same teacher of text-to-image making square images of another size, on the schedule that it has.

        Args:
            size: edge in pixels.
        Raises:
            UserError: a size that the autoencoder or the network cannot take.
        """
        assert isinstance(self.conditioner, PromptConditioner), "a class-conditional network has one size"
        shape = (self.denoiser.sample_shape[0], *self.state_size((size, size)))
        denoiser = replace(self.denoiser, sample_shape=shape)
        return replace(self, denoiser=denoiser, conditioner=self.conditioner.resized((size, size)))

    def examples(self, num: int) -> Asked:
        """Return something to ask for in `num` samples: the classes in turn, empty prompts, or nothing."""
        if isinstance(self.conditioner, PromptConditioner):
            return [""] * num
        return None if self.num_classes is None else torch.arange(num) % self.num_classes


def resolve(path: str | Path) -> str:
    """Return the folder of an embedded teacher's name; any other path or hub id as it is."""
    name = str(path)
    return str(files("diffdistill") / "assets" / name) if name in EMBEDDED else name


def read_index(folder: str) -> Mapping[str, Any]:
    """Return model_index.json of a pipeline folder or hub id.

    Raises:
        UserError: not a folder and not a hub id, a folder that is not a diffusers pipeline, or a hub id that cannot be read.
    """
    path = Path(folder)
    if path.is_file():
        raise UserError(
            f"{folder} is a file, and a teacher is a diffusers pipeline folder. Make one of it with "
            f"StableDiffusionPipeline.from_single_file({folder!r}).save_pretrained(FOLDER), or with another pipeline class."
        )
    if path.exists() and not (path / INDEX).is_file():
        raise UserError(
            f"{folder} is not a diffusers pipeline folder: it has no {INDEX}. Save one with pipeline.save_pretrained(folder)."
        )
    if not path.exists() and (folder.startswith((".", "/", "~")) or folder.count("/") != 1):
        raise UserError(
            f"there is no teacher at {folder!r}. Give a pipeline folder, a hub id such as 'owner/name', "
            f"or an embedded name: {', '.join(EMBEDDED)}."
        )
    file = path / INDEX if path.exists() else _index_on_hub(folder)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read the pipeline {folder!r}: {file} is not valid JSON ({error}).") from error


def _index_on_hub(name: str) -> Path:
    """Return the path of a hub id's model_index.json, downloaded or from the hub's cache.

    Raises:
        UserError: it cannot be had, with the reason.
    """
    from huggingface_hub import errors, hf_hub_download

    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    try:
        return Path(hf_hub_download(name, INDEX))
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated. Accept its terms at https://huggingface.co/{name}, and {log_in}.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no folder {name} here and no model of that name on the hub. Check the spelling; if it is private, {log_in}."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"there is no folder {name} here, and the hub cannot be reached and has left no copy of it in the cache. Give a "
            "pipeline folder, or connect."
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{name} on the hub is not a diffusers pipeline: it has no {INDEX}.") from error
    except OSError as error:
        raise UserError(f"cannot read {INDEX} of {name} on the hub: {error}") from error


def _network_entry(index: Mapping[str, Any], folder: str) -> tuple[str, str]:
    """Return component name and class name of the pipeline's denoising network."""
    entries = {name: value[1] for name, value in index.items() if isinstance(value, (list, tuple)) and value[1]}
    for name in ("unet", "transformer"):
        if name in entries:
            if entries[name] not in FAMILIES:
                raise UserError(
                    f"{folder}: networks of class {entries[name]} are not supported yet. Supported: "
                    f"{', '.join(sorted(FAMILIES))}. How to add one: docs/families.md."
                )
            return name, entries[name]
    raise UserError(f"{folder}: {index.get('_class_name')} has no component 'unet' or 'transformer' to distil.")


def _scheduler_class(index: Mapping[str, Any], folder: str) -> str:
    """Return the class name of the pipeline's scheduler."""
    name = (index.get("scheduler") or (None, None))[1]
    if name is None:
        raise UserError(
            f"{folder}: {index.get('_class_name')} has no scheduler, which says how noise grows with time. Add one."
        )
    return name


@contextlib.contextmanager
def _loading(folder: str, component: str, class_name: str) -> Iterator[None]:
    try:
        with quiet_dtype():
            yield
    except Exception as error:  # the loaders raise many types; every one means that this folder cannot be used
        raise UserError(f"cannot load {component} ({class_name}) of {folder!r}: {error}") from error


def _load_network(
    folder: str, component: str, class_name: str, variant: str | None, dtype: torch.dtype, device: torch.device
) -> Any:
    """Return a network of the pipeline, frozen and in eval mode; on the meta device its config is all that is read."""
    import diffusers

    network_class = getattr(diffusers, class_name)
    options = {} if variant is None or _lacks_variant(folder, component, variant) else {"variant": variant}
    with _loading(folder, component, class_name):
        if device.type == "meta":
            network = on_meta(lambda: network_class.from_config(network_class.load_config(folder, subfolder=component)), dtype)
        else:
            network = network_class.from_pretrained(folder, subfolder=component, torch_dtype=dtype, **options).to(device)
    return network.eval().requires_grad_(False)


def _lacks_variant(folder: str, component: str, variant: str) -> bool:
    """Return whether a local folder has the part's weights under their plain name only; a hub id is asked for the variant."""
    place = Path(folder) / component
    return place.is_dir() and not any(place.glob(f"*.{variant}*.safetensors"))


def _notes(folder: str) -> Mapping[str, Any]:
    """Return the settings that `diffdistill teacher` wrote beside the pipeline; empty for a pipeline made elsewhere."""
    path = Path(folder) / "diffdistill_teacher.json"
    return json.loads(path.read_text())["config"] if path.is_file() else {}


def load_teacher(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    size: int | None = None,
    quantized: Quantization | None = None,
    trust_remote_code: bool = False,
    network: nn.Module | None = None,
) -> Teacher:
    """Load a teacher from a diffusers pipeline folder, a hub id, or an embedded name.

    Text encoders are loaded at the first prompt and can be released: `teacher.conditioner.release()`.

    Args:
        path: folder, hub id ("owner/name"), or one of EMBEDDED.
        dtype: weights of the network and the text encoders; the autoencoder stays float32.
        device: where everything is put; on "meta" no weights are read, and everything has its shape alone (see `weightless`).
        variant: of the weight files, such as "fp16"; parts without it are loaded from their plain files.
        size: edge of the images in pixels; None for the size the network was made for.
        quantized: what the network's block weights are rounded to, see `quantize`; such a teacher carries adapters only.
        trust_remote_code: whether code that comes with the pipeline may run, see `own_code`.
        network: stands for the pipeline's, which is not loaded then; None loads it.
    Returns:
        The frozen teacher, in eval mode.
    Raises:
        UserError: nothing there, not a diffusers folder, a class that is not supported, a size its autoencoder cannot make,
            code of its own, or no package that rounds.
    """
    import diffusers

    folder = resolve(path)
    index = read_index(folder)
    refuse_own_code(index, folder, trust_remote_code)
    component, class_name = _network_entry(index, folder)
    family, device = FAMILIES[class_name], torch.device(device)
    network = _load_network(folder, component, class_name, variant, dtype, device) if network is None else network
    if quantized is not None and device.type != "meta":
        quantize(network, family, quantized)
    scheduler_class = _scheduler_class(index, folder)
    with _loading(folder, "scheduler", scheduler_class):
        scheduler = getattr(diffusers, scheduler_class).from_pretrained(folder, subfolder="scheduler")
    codec = Codec()
    if index.get("vae") and index["vae"][1]:
        codec = Codec(_load_network(folder, "vae", index["vae"][1], variant, torch.float32, device))
    shape = family.sample_shape(network)
    if size is not None:
        shape = (shape[0], *_state_size(family, network, codec, (size, size), folder))
    schedule, kind = family.path(network, scheduler, shape)
    denoiser: FamilyDenoiser
    if isinstance(schedule, EDMSchedule):
        denoiser = EDMDenoiser(network, family, schedule, shape, getattr(scheduler.config, "sigma_data", 0.5))
    else:
        denoiser = NetworkDenoiser(network, family, schedule, kind, shape)
    config = dict(scheduler.config) | {"_class_name": scheduler_class, "_diffusers_version": diffusers.__version__}
    notes = _notes(folder)
    of_pipeline, steps = _usual_sampling(index["_class_name"])
    guidance = float(notes.get("guidance", of_pipeline if family.reads_text else 1.0))
    conditioner: Conditioner = ClassConditioner(family.classes(network, notes.get("num_classes")), str(path), device)
    if family.reads_text:
        plain = variant is None or _lacks_variant(folder, "text_encoder", variant)
        options: dict[str, Any] = {"torch_dtype": dtype} | ({} if plain else {"variant": variant})
        options |= {"trust_remote_code": True} if trust_remote_code else {}
        image_size = codec.image_shape(shape)[1:]
        conditioner = PromptConditioner(
            index["_class_name"], folder, index, family, network, image_size, guidance, str(path), device, options
        )
        guidance = family.usual_guidance(network, guidance)
    return Teacher(
        denoiser,
        family,
        network,
        codec,
        config,
        index["_class_name"],
        str(path),
        guidance,
        steps,
        conditioner,
        quantized,
    )


def _state_size(family: Family, network: nn.Module, codec: Codec, size: tuple[int, int], folder: str) -> tuple[int, int]:
    """Return height and width of the states of images of height and width `size`."""
    patch, longest = family.multiple(network), family.longest_edge(network)
    if any(edge % (codec.downscale * patch) for edge in size):
        raise UserError(
            f"{folder}: the autoencoder divides edges by {codec.downscale} and the network by {patch}; sizes must be multiples of "
            f"{codec.downscale * patch}, got {size[0]}x{size[1]}."
        )
    height, width = (edge // codec.downscale for edge in size)
    if longest is not None and max(height, width) > longest:
        raise UserError(
            f"{folder}: the network has positions for edges of {longest * codec.downscale} pixels; got {size[0]}x{size[1]}."
        )
    return height, width


def _usual_sampling(pipeline_class: str) -> tuple[float, int]:
    """Return the guidance (counted from 1) and the number of steps that a stock pipeline takes when it is told neither."""
    import diffusers

    if not hasattr(diffusers, pipeline_class):
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline {pipeline_class!r}; install a newer one.")
    arguments = inspect.signature(getattr(diffusers, pipeline_class).__call__).parameters
    found = {name: arguments[name].default for name in ("guidance_scale", "num_inference_steps") if name in arguments}
    return float(found.get("guidance_scale", 1.0)), int(found.get("num_inference_steps", 50))
