"""Training of the embedded teachers, their autoencoder and the feature network: from a config to a folder of weights.

Three kinds: `diffusion` (UNet on pixels or DiT on latents), `autoencoder` (AutoencoderKL), `classifier` (DigitsNet).
Every draw comes from (seed, step), so a config, a machine and a thread count determine the weights.

The networks stay in eval mode while they train: a DiT's LabelEmbedding would drop labels by itself in train mode. They
are dropped here, with the step's own generator, and none of these networks has batch statistics. A dropout in
network_config would have no effect and is refused.
"""

from __future__ import annotations

import copy
import functools
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffdistill.data.batches import ImageSource, MicroBatches, keyed_generator, load_image_folder
from diffdistill.data.digits import NUM_CLASSES, Digits, digits, digits_split, to_uint8
from diffdistill.errors import UserError, did_you_mean
from diffdistill.evaluation.digits_net import DigitsNet, DigitsNetConfig
from diffdistill.files import atomic_folder, hash_json, sha256, write_json

RECORD = "diffdistill_teacher.json"
NUM_JUDGED = 1000  # samples drawn to measure a diffusion model at the end
ASSETS = Path(__file__).resolve().parent.parent / "assets"


# Configs


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImagesConfig(_Frozen):
    """What to train on."""

    source: str = Field(
        "digits", description="'digits' for the embedded data set, else a folder of images, one subfolder per class"
    )
    size: int = Field(8, gt=0, description="edge of the images in pixels; a folder's images are cropped and resized")
    channels: Literal[1, 3] = Field(1, description="1 for grey, 3 for RGB")


class FitConfig(_Frozen):
    """AdamW with linear warm-up, cosine decay to zero, gradient clipping and an average of the weights."""

    steps: int = Field(gt=0, description="optimiser steps")
    batch_size: int = Field(128, gt=0, description="samples per step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup_steps: int = Field(200, ge=0, description="steps of linear warm-up; 0 for none")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay; 0 for none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay per step of the averaged weights, the ones written; 0 for no average"
    )


class _TrainingConfig(_Frozen):
    images: ImagesConfig = Field(ImagesConfig(), description="what to train on")
    fit: FitConfig = Field(description="optimiser")
    seed: int = Field(0, ge=0, description="seed of the initial weights and of every draw")


class DiffusionConfig(_TrainingConfig):
    """A class-conditional diffusion model."""

    kind: Literal["diffusion"] = "diffusion"
    network: Literal["UNet2DModel", "DiTTransformer2DModel"] = Field(description="diffusers class of the denoiser")
    network_config: dict[str, Any] = Field(description="keyword arguments of that class; no dropout")
    scheduler_config: dict[str, Any] = Field(
        description="keyword arguments of diffusers' DDIMScheduler; its prediction_type is what the network learns"
    )
    vae: str | None = Field(
        None,
        description="folder of the AutoencoderKL whose latents are modelled (a path, or the "
        "shipped digits-dit/vae); null to model pixels. A DiT needs one, a UNet takes none",
    )
    num_classes: int = Field(NUM_CLASSES, gt=0, description="classes; the empty label is index num_classes")
    label_dropout: float = Field(0.1, gt=0, lt=1, description="share of labels replaced by the empty one, for guidance")
    classifier: str | None = Field(
        None,
        description="folder of a DigitsNet that judges samples at the end (a path, or "
        "the shipped digits-classifier); null for no judgement",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DiffusionConfig:
        is_unet = self.network == "UNet2DModel"
        if is_unet != (self.vae is None):
            raise ValueError(
                "the stock pipelines hold a UNet2DModel without a VAE and a DiTTransformer2DModel with "
                f"one; got {self.network} with vae={self.vae!r}"
            )
        key, rows = ("num_class_embeds", self.num_classes + 1) if is_unet else ("num_embeds_ada_norm", self.num_classes)
        if self.network_config.get(key) != rows:
            raise ValueError(
                f"network_config.{key} must be {rows} for num_classes={self.num_classes}"
                f"{' and one empty label' if is_unet else ''}; got {self.network_config.get(key)}"
            )
        if self.network_config.get("dropout"):
            raise ValueError("network_config.dropout has no effect, as networks train in eval mode; leave it out")
        if self.scheduler_config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                "scheduler_config.prediction_type must be epsilon, v_prediction or sample; got "
                f"{self.scheduler_config.get('prediction_type')!r}"
            )
        return self


class AutoencoderConfig(_TrainingConfig):
    """An AutoencoderKL for latents of unit standard deviation."""

    kind: Literal["autoencoder"] = "autoencoder"
    network_config: dict[str, Any] = Field(
        description="keyword arguments of diffusers' AutoencoderKL, without scaling_factor, which is measured"
    )
    kl_weight: float = Field(
        1e-4, ge=0, description="weight of the KL divergence per latent element, beside the mean squared error per pixel"
    )


class ClassifierConfig(_TrainingConfig):
    """The digits classifier, trained on the training part of the fixed split."""

    kind: Literal["classifier"] = "classifier"
    network_config: DigitsNetConfig = Field(DigitsNetConfig(), description="architecture")
    noise: float = Field(
        0.1, ge=0, description="standard deviation of the noise added while training, on the scale of [-1, 1]; 0 for none"
    )
    shift: bool = Field(True, description="whether images are shifted by up to one pixel while training")

    @model_validator(mode="after")
    def _is_digits(self) -> ClassifierConfig:
        if self.images != ImagesConfig():
            raise ValueError("the classifier is made for the embedded digits; leave `images` out")
        return self


TeacherConfig = Annotated[DiffusionConfig | AutoencoderConfig | ClassifierConfig, Field(discriminator="kind")]
_KINDS: dict[str, type[_TrainingConfig]] = {
    "diffusion": DiffusionConfig,
    "autoencoder": AutoencoderConfig,
    "classifier": ClassifierConfig,
}


def parse_teacher_config(values: Mapping[str, Any], where: str = "the config") -> TeacherConfig:
    """Check a mapping, as read from YAML, against the schema.

    Raises:
        UserError: every mistake at once, each with its place and, for an unknown key, the nearest known one.
    """
    try:
        return TypeAdapter(TeacherConfig).validate_python(dict(values))
    except ValidationError as error:
        lines = [_explain(issue) for issue in error.errors()]
        raise UserError(f"{where} has {len(lines)} mistake(s):\n" + "\n".join(lines)) from None


def load_teacher_config(path: str | Path) -> TeacherConfig:
    """Read and check a YAML file.

    Raises:
        UserError: no such file, not YAML, or not according to the schema.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values; got {type(values).__name__}.")
    return parse_teacher_config(values, str(path))


def _explain(issue: Mapping[str, Any]) -> str:
    """One line for one pydantic error: place, message, spelling hint."""
    place = [str(part) for part in issue["loc"]]
    model: Any = _KINDS.get(place[0]) if place else None
    path = place[1:] if model else place
    if issue["type"] != "extra_forbidden" or model is None:
        return f"  {'.'.join(path) or 'top level'}: {issue['msg']}"
    for name in path[:-1]:
        model = model.model_fields[name].annotation
    known = list(model.model_fields)
    return f"  {'.'.join(path)}: unknown key.{did_you_mean(path[-1], known)} Known: {', '.join(known)}."


# The run


def train_teacher(
    config: TeacherConfig, output: str | Path, progress: bool = True, device: str = "cpu", snapshot_every: int | None = None
) -> dict[str, Any]:
    """Train what the config describes and write it to `output`, a folder of the matching stock class.

    A UNet is written as ConsistencyModelPipeline, the one stock pipeline that feeds class labels to UNet2DModel; a DiT
    as DiTPipeline; an autoencoder as AutoencoderKL; a classifier as DigitsNet. `diffdistill_teacher.json` in the folder
    records the config, hashes, results, wall time and versions.

    Args:
        config: one of DiffusionConfig, AutoencoderConfig, ClassifierConfig.
        output: folder to write; replaced as a whole if it exists.
        progress: whether to show a bar on a terminal, or a line every few hundred steps elsewhere.
        device: torch device.
        snapshot_every: also write the folder every so many steps, in the same format; None for only at the end.
    Returns:
        The record, as written.
    Raises:
        UserError: wrong data, a network that cannot be built, or a loss that is no longer finite.
    """
    run = {"diffusion": _diffusion, "autoencoder": _autoencoder, "classifier": _classifier}[config.kind]
    begin = time.perf_counter()
    record: dict[str, Any] = {}
    for result in run(config, torch.device(device), progress, snapshot_every):
        record = _write(config, Path(output), result, device, time.perf_counter() - begin)
        if progress:
            print(f"wrote {output} after {result.steps} steps: {result.measures}", flush=True)
    return record


class _Result(NamedTuple):
    """Trained weights on their way to disk: `save(folder)` writes them."""

    steps: int
    measures: dict[str, Any]
    save: Callable[[Path], None]


def _write(config: TeacherConfig, output: Path, result: _Result, device: str, seconds: float) -> dict[str, Any]:
    resolved = config.model_dump(mode="json")
    with atomic_folder(output) as folder:
        result.save(folder)
        weights = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
        record = {
            "config": resolved,
            "config_hash": hash_json(resolved),
            "sha256": weights,
            "steps": result.steps,
            "results": result.measures,
            "wall_time_sec": round(seconds, 1),
            "machine": {"device": device, "threads": torch.get_num_threads(), "processor": platform.machine()},
            "versions": _versions(),
        }
        write_json(folder / RECORD, record)
    return record


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("diffdistill", "torch", "diffusers", "safetensors", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


# The loop


class _Fitted(NamedTuple):
    """State of a training after `steps` steps."""

    steps: int
    ema: nn.Module  # the averaged weights
    loss: float  # mean training loss over the last tenth of the steps taken


def lr_factor(step: int, warmup_steps: int, steps: int) -> float:
    """Return the learning rate at `step` as a share of its peak: linear from 1/warmup to 1, then half a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the network: ema <- d * ema + (1 - d) * network.

    d = min(decay, (1 + step) / (10 + step)): the bound lets the average forget the initial weights in a short run.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - d)


def _fit(
    network: nn.Module, loss_at: Callable[[int], Tensor], fit: FitConfig, progress: bool, snapshot_every: int | None
) -> Iterator[_Fitted]:
    """Minimise loss_at(step) over fit.steps steps; yield at each snapshot and at the end."""
    ema = copy.deepcopy(network).requires_grad_(False)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=fit.lr, weight_decay=fit.weight_decay)
    losses: list[float] = []
    for step in _shown(range(fit.steps), losses, progress):
        for group in optimizer.param_groups:
            group["lr"] = fit.lr * lr_factor(step, fit.warmup_steps, fit.steps)
        loss = loss_at(step)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(
                f"the loss is {losses[-1]} at step {step}; its weights are not written. Lower fit.lr (now {fit.lr:g})."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, fit.max_grad_norm)
        optimizer.step()
        update_ema(ema, network, fit.ema_decay, step)
        done = step + 1
        if done == fit.steps or (snapshot_every and done % snapshot_every == 0):
            last = losses[-max(1, done // 10) :]
            yield _Fitted(done, ema, sum(last) / len(last))


def _shown(steps: range, losses: list[float], progress: bool) -> Iterator[int]:
    """Pass the steps through, showing where the training is."""
    if not progress:
        yield from steps
    elif sys.stdout.isatty():
        from rich.progress import track

        yield from track(steps, description="training")
    else:
        begin = time.perf_counter()
        for step in steps:
            yield step
            if (step + 1) % 250 == 0 or step + 1 == len(steps):
                recent = losses[-250:]
                rate = (time.perf_counter() - begin) / (step + 1)
                print(
                    f"step {step + 1}/{len(steps)}  loss {sum(recent) / len(recent):.4f}  {1000 * rate:.0f} ms/step  "
                    f"{rate * (len(steps) - step - 1) / 60:.1f} min left",
                    flush=True,
                )


# Shared pieces


def _images(config: ImagesConfig) -> ImageSource:
    if config.source == "digits":
        if (config.size, config.channels) != (8, 1):
            raise UserError(
                f"the digits are 8x8 with 1 channel; got images.size={config.size}, images.channels={config.channels}."
            )
        data = digits()
        return ImageSource(data.images, data.labels)
    folder = load_image_folder(config.source, config.size, config.channels)
    return ImageSource(folder.images, folder.labels)


def _folder(name: str, what: str) -> Path:
    """Return an existing path, or the shipped folder of that name."""
    for path in (Path(name), ASSETS / name):
        if path.is_dir():
            return path
    raise UserError(f"no {what} at {name!r}, neither as a path nor among the shipped ones in {ASSETS}.")


def _build(kind: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """Build a diffusers model with initial weights from `seed`, leaving the global random state as it was."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return getattr(diffusers, kind)(**arguments).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"network_config does not build a {kind}: {error}") from error


def _num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# Diffusion


def diffusion_loss(
    network: nn.Module,
    scheduler: Any,
    x0: Tensor,
    labels: Tensor,
    null_label: int,
    label_dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the plain mean squared error of the network's own prediction, t uniform over the scheduler's steps; 0-dim.

    Args:
        network: called as network(x_t, timestep=t, class_labels=labels).
        scheduler: gives add_noise, get_velocity and prediction_type.
        x0: clean states (B, C, H, W).
        labels: (B,) int64; a share `label_dropout` becomes `null_label`.
        generator: source of t, noise and dropped labels, on the CPU whatever the device of x0.
    """
    count = len(x0)
    t = torch.randint(scheduler.config.num_train_timesteps, (count,), generator=generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    dropped = (torch.rand(count, generator=generator) < label_dropout).to(x0.device)
    x_t = scheduler.add_noise(x0, eps, t)
    output = network(x_t, timestep=t, class_labels=labels.masked_fill(dropped, null_label)).sample
    targets = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}
    return F.mse_loss(output, targets[scheduler.config.prediction_type])


@torch.no_grad()
def ddim_samples(network: nn.Module, scheduler: Any, labels: Tensor, num_steps: int, seed: int) -> Tensor:
    """Return deterministic DDIM samples at guidance 1 with the stock scheduler, (B, C, H, W), for labels (B,)."""
    batch_size = 250  # of one network call
    size, channels = network.config.sample_size, network.config.in_channels
    x = torch.randn(len(labels), channels, size, size, generator=keyed_generator(seed, "samples")).to(labels.device)
    parts = []
    for x_t, chosen in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps:
            output = network(x_t, timestep=t.expand(len(x_t)).to(x_t.device), class_labels=chosen).sample
            x_t = scheduler.step(output, t, x_t).prev_sample
        parts.append(x_t)
    return torch.cat(parts)


def _diffusion(config: DiffusionConfig, device: torch.device, progress: bool, snapshot_every: int | None) -> Iterator[_Result]:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**config.scheduler_config)
    network = _build(config.network, config.network_config, config.seed).to(device)
    vae = _load_vae(config.vae, device)
    source = _states(_images(config.images), vae, device)
    _check_states(config, source)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss(model: nn.Module, step: int, key: str) -> Tensor:
        generator = keyed_generator(config.seed, key, step)
        x0, labels = source.take(batches.indices(step, 0), generator)
        return diffusion_loss(
            model, scheduler, x0.to(device), labels.to(device), config.num_classes, config.label_dropout, generator
        )

    for fitted in _fit(network, lambda step: loss(network, step, "train"), config.fit, progress, snapshot_every):
        with torch.no_grad():
            ema_losses = [loss(fitted.ema, k, "judge").item() for k in range(64)]
        measures = {
            "num_parameters": _num_parameters(network),
            "train_loss": fitted.loss,
            "ema_loss": sum(ema_losses) / len(ema_losses),
            **_judge(config, fitted.ema, scheduler, vae, source, device),
        }
        yield _Result(fitted.steps, measures, functools.partial(_save_pipeline, config, fitted.ema, scheduler, vae))


def _load_vae(name: str | None, device: torch.device) -> Any | None:
    if name is None:
        return None
    from diffusers import AutoencoderKL

    folder = _folder(name, "autoencoder")
    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a readable AutoencoderKL: {error}") from error


@torch.no_grad()
def _states(images: ImageSource, vae: Any | None, device: torch.device) -> ImageSource:
    """Return what is modelled: the pixels, or the posterior means of the latents times scaling_factor."""
    if vae is None:
        return images
    latents = torch.cat([vae.encode(part.to(device)).latent_dist.mean.cpu() for part in images.x0.split(256)])
    return ImageSource(latents * vae.config.scaling_factor, images.labels, max_abs=100.0)


def _check_states(config: DiffusionConfig, source: ImageSource) -> None:
    if source.labels is None or int(source.labels.max()) >= config.num_classes:
        found = "none" if source.labels is None else int(source.labels.max()) + 1
        raise UserError(f"num_classes={config.num_classes} but the images have {found} classes.")
    expected = (config.network_config.get("in_channels"), config.network_config.get("sample_size"))
    if expected != (source.x0.shape[1], source.x0.shape[2]):
        raise UserError(
            f"network_config has in_channels={expected[0]}, sample_size={expected[1]}; the states are "
            f"{source.x0.shape[1]} channels of {source.x0.shape[2]}x{source.x0.shape[3]}."
        )


@torch.no_grad()
def _judge(
    config: DiffusionConfig, ema: nn.Module, scheduler: Any, vae: Any | None, source: ImageSource, device: torch.device
) -> dict[str, Any]:
    """Measure samples of 50 DDIM steps at guidance 1, classes in equal shares; nothing without a classifier.

    `ddim50_accuracy` is the share that the classifier takes for the class asked for. `nearest_real_distance` is the mean
    Euclidean distance in [-1, 1] pixels from a sample to the nearest image of the data, and from an image to the nearest
    other one: samples much nearer than that would be copies of the data.
    """
    if config.classifier is None:
        return {}
    classifier = DigitsNet.load(_folder(config.classifier, "classifier")).to(device)
    labels = torch.arange(NUM_JUDGED, device=device) % config.num_classes
    samples = ddim_samples(ema, scheduler, labels, num_steps=50, seed=config.seed)
    if vae is not None:
        samples = vae.decode(samples / vae.config.scaling_factor).sample
    agree = classifier(to_uint8(samples)).logits.argmax(dim=1) == labels
    real = _images(config.images).x0.flatten(1)
    distances = torch.cdist(samples.cpu().clamp(-1, 1).flatten(1), real).amin(dim=1)
    between = torch.cdist(real, real).fill_diagonal_(math.inf).amin(dim=1)
    return {
        "ddim50_accuracy": agree.double().mean().item(),
        "ddim50_num_samples": len(labels),
        "nearest_real_distance": {"samples": distances.mean().item(), "real": between.mean().item()},
    }


def _save_pipeline(config: DiffusionConfig, network: Any, scheduler: Any, vae: Any | None, folder: Path) -> None:
    from diffusers import ConsistencyModelPipeline, DiTPipeline

    if vae is None:
        pipeline: Any = ConsistencyModelPipeline(unet=network, scheduler=scheduler)
    else:
        id2label = {str(k): str(k) for k in range(config.num_classes)}
        pipeline = DiTPipeline(transformer=network, vae=vae, scheduler=scheduler, id2label=id2label)
        pipeline.register_to_config(id2label=id2label)  # the class does not do it, and drops the names on saving
    pipeline.save_pretrained(folder, safe_serialization=True)
    if config.vae is not None:
        source = _folder(config.vae, "autoencoder")
        for name in ("config.json", RECORD):  # the config as it was: save_pretrained adds the path it was loaded from
            if (source / name).is_file():
                shutil.copy(source / name, folder / "vae" / name)


# Autoencoder


def autoencoder_loss(vae: Any, images: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Return mean squared error per pixel + kl_weight * KL(posterior, N(0, 1)) per latent element; 0-dim.

    Args:
        vae: AutoencoderKL.
        images: (B, C, H, W) in [-1, 1].
        generator: source of the posterior sample, on the CPU.
    """
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    output = vae.decode(posterior.mean + posterior.std * noise).sample
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return F.mse_loss(output, images) + kl_weight * kl


def _autoencoder(
    config: AutoencoderConfig, device: torch.device, progress: bool, snapshot_every: int | None
) -> Iterator[_Result]:
    if "scaling_factor" in config.network_config:
        raise UserError("leave network_config.scaling_factor out: it is measured, for latents of unit deviation.")
    network = _build("AutoencoderKL", config.network_config, config.seed).to(device)
    source = _images(config.images)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss_at(step: int) -> Tensor:
        generator = keyed_generator(config.seed, "train", step)
        x0, _ = source.take(batches.indices(step, 0), generator)
        return autoencoder_loss(network, x0.to(device), config.kl_weight, generator)

    for fitted in _fit(network, loss_at, config.fit, progress, snapshot_every):
        with torch.no_grad():
            latents = torch.cat([fitted.ema.encode(part.to(device)).latent_dist.mean for part in source.x0.split(256)])
            decoded = torch.cat([fitted.ema.decode(part).sample.cpu() for part in latents.split(256)])
        fitted.ema.register_to_config(scaling_factor=1 / latents.double().std().item())
        measures = {
            "num_parameters": _num_parameters(network),
            "train_loss": fitted.loss,
            "reconstruction_rmse": (decoded - source.x0).double().square().mean().sqrt().item(),
            "scaling_factor": fitted.ema.config.scaling_factor,
            "latent_mean": latents.double().mean().item(),
        }
        yield _Result(fitted.steps, measures, fitted.ema.save_pretrained)


# Classifier


def augment(images: Tensor, shift: bool, noise: float, generator: torch.Generator) -> Tensor:
    """Shift each image (B, 1, H, W) by -1, 0 or 1 pixel along both axes, filling with the background, and add noise."""
    if shift:
        padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # (B, 1, H + 2, W + 2)
        offsets = torch.randint(3, (2, len(images)), generator=generator)
        rows = (offsets[0][:, None] + torch.arange(images.shape[2]))[:, None, :, None]  # (B, 1, H, 1)
        columns = (offsets[1][:, None] + torch.arange(images.shape[3]))[:, None, None, :]  # (B, 1, 1, W)
        images = padded[torch.arange(len(images))[:, None, None, None], 0, rows, columns]
    return images + noise * torch.randn(images.shape, generator=generator)


def _classifier(
    config: ClassifierConfig, device: torch.device, progress: bool, snapshot_every: int | None
) -> Iterator[_Result]:
    data, split = digits(), digits_split()
    train, held_out = (Digits(data.images[part], data.labels[part]) for part in split)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = DigitsNet(config.network_config).eval().to(device)
    source = ImageSource(*train)
    batches = MicroBatches(source.num_samples, config.fit.batch_size, config.fit.batch_size, config.seed)

    def loss_at(step: int) -> Tensor:
        generator = keyed_generator(config.seed, "train", step)
        x0, labels = source.take(batches.indices(step, 0), generator)
        x0 = augment(x0, config.shift, config.noise, generator)
        return F.cross_entropy(network.classify(x0.to(device)).logits, labels.to(device))

    for fitted in _fit(network, loss_at, config.fit, progress, snapshot_every):
        measures = {
            "num_parameters": _num_parameters(network),
            "train_loss": fitted.loss,
            "train_accuracy": classifier_accuracy(fitted.ema, train),
            "held_out_accuracy": classifier_accuracy(fitted.ema, held_out),
            "num_held_out": len(held_out.labels),
        }
        yield _Result(fitted.steps, measures, fitted.ema.save)


@torch.no_grad()
def classifier_accuracy(network: DigitsNet, data: Digits) -> float:
    """Return the share of images whose largest logit is their label, once they are rounded to bytes."""
    device = network.head.weight.device
    agree = network(to_uint8(data.images).to(device)).logits.argmax(dim=1).cpu() == data.labels
    return agree.double().mean().item()
