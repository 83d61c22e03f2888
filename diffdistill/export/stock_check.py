"""Check an export with nothing but stock libraries: `python -I stock_check.py FOLDER [FOLDER ...] [--base PATH] --json`.

Imports torch, diffusers, peft and safetensors, and nothing of diffdistill: it may be copied anywhere. For each folder the
checks run in order and stop at the first that fails, since the later ones take the earlier for granted:

    files      every file has the hash in diffdistill.json
    base       the base pipeline's network has the weights that the student started from
    load       the stock classes load the folder
    attached   (not merged) at least one tensor of the file is in the network
    complete   (merged) no missing, unexpected or newly initialised weights
    tensors    as many tensors arrived, with the values of the file, as the file and the network have
    finite     the output is finite
    differs    the output is not the base model's
    network    the output equals the student's at every step of the sampler
    timesteps  the scheduler visits the student's times
    stepping   the scheduler makes the student's states and sample, with a generator per image
    pipeline   the pipeline called as the card says makes the student's images
    stacking   (lora, kohya) beside a second LoRA at weight 0 nothing changes, at weight 1 something does

Where the pipeline reads prompts, it is run as the card says, and what its network says is recorded: those are the outputs and
states that are compared.

The student's numbers come from reference.safetensors. Exit status 0 if all folders hold, 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor

warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)  # the only name diffusers 0.35 knows

NETWORK_TOLERANCE = 1e-4  # relative; merging a LoRA costs about 1e-6
STEPPING_TOLERANCE = 1e-4  # relative
IMAGE_TOLERANCE = 1e-3  # of the range [0, 1]
DIFFERENCE = 1e-6  # relative; less than this is the base model
ROUNDING = 5e-7  # of float32 in one step, before 1/alpha magnifies it
LORA_FILE = "pytorch_lora_weights.safetensors"
NETWORK_ROUNDING = 2e-5  # of a network between devices, likewise


class Failed(Exception):
    """A check that does not hold."""

    def __init__(self, detail: str, error: float | None = None) -> None:
        super().__init__(detail)
        self.error = error


class Skipped(Exception):
    """A check that cannot be made here."""


Outcome = tuple[float | None, str]


def require(holds: bool, detail: str) -> None:
    """Raise Failed unless the condition holds."""
    if not holds:
        raise Failed(detail)


def gap(ours: Tensor, wanted: Tensor) -> float:
    """Return max |ours - wanted| / max(1, max |wanted|); infinite where either is not finite."""
    if ours.shape != wanted.shape:
        raise Failed(f"shape {tuple(ours.shape)} instead of {tuple(wanted.shape)}")
    value = float((ours.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1))
    return value if value == value else float("inf")


def num_equal(in_file: dict[str, Tensor], loaded: dict[str, Tensor]) -> int:
    """Return how many tensors of the file are in the network with the file's values, rounded to the network's dtype."""
    return sum(name in loaded and torch.equal(tensor.to(loaded[name].dtype), loaded[name]) for name, tensor in in_file.items())


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return the hash that the manifest calls weights_sha256."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def kohya_name(component: str, name: str) -> str:
    """Return kohya's spelling of `<module>.lora_A.weight`."""
    module, factor = name.rsplit(".lora_", 1)
    return f"lora_{component}_{module.replace('.', '_')}.lora_{'down' if factor.startswith('A') else 'up'}.weight"


class Export:
    """One folder under check. The checks fill in what the later ones need."""

    def __init__(self, folder: Path, base: str | None) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads((folder / "diffdistill.json").read_text())
        self.kind: str = self.manifest["kind"]
        self.dtype = getattr(torch, self.manifest.get("dtype", "float32"))
        self.component: str = self.manifest["component"]
        self.step_counts: list[int] = self.manifest["step_counts"]
        self.guidance: float = self.manifest["guidance"]
        self.base = base or self._base_of_manifest()
        self.base_network: Any = None
        self.pipeline: Any = None
        self.peft_network: Any = None

    def _base_of_manifest(self) -> str | None:
        path, name = self.manifest["base"]["path"], self.manifest["base"]["id"]
        if Path(path).is_dir():
            return path
        return name if name.count("/") == 1 and name[0] not in "./~" else None

    @functools.cached_property
    def reference(self) -> dict[str, Tensor]:
        """The student's numbers."""
        return load_file(self.folder / "reference.safetensors")

    @property
    def seeds(self) -> list[int]:
        """Seed of each image."""
        return self.reference["seeds"].tolist()

    @property
    def labels(self) -> Tensor | None:
        """Class of each image; None for an unconditional model."""
        return self.reference.get("labels")

    @property
    def network(self) -> Any:
        """The network as the pipeline holds it."""
        return getattr(self.pipeline, self.component)

    @property
    def network_class(self) -> Any:
        """The diffusers class of the network."""
        return getattr(diffusers, self.manifest["base"]["component_class"])

    def generators(self) -> list[torch.Generator]:
        """Return one fresh generator per image."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def new_scheduler(self) -> Any:
        """Return the scheduler as the folder describes it."""
        cls = getattr(diffusers, self.manifest["scheduler"]["class_name"])
        return cls.from_pretrained(self.folder, subfolder="scheduler")

    def set_steps(self, scheduler: Any, num_steps: int) -> None:
        """Set the scheduler's times as the pipeline does."""
        if self.manifest.get("gives_sigmas"):
            scheduler.set_timesteps(sigmas=[1 - k / num_steps for k in range(num_steps)])
        else:
            scheduler.set_timesteps(num_steps, **self.times_call(num_steps))

    def times_call(self, num_steps: int) -> dict[str, Any]:
        """Return the arguments of the call by which the pipeline is told the times, where it is."""
        return self.manifest.get("times_call", {}).get(str(num_steps), {})

    @property
    def on_arc(self) -> bool:
        """Whether the pipeline walks on SCMScheduler's arc, whose times are angles."""
        return self.manifest["scheduler"]["class_name"] == "SCMScheduler"

    def magnification(self) -> float:
        """Return by how much a rounding of the output grows in x0: sigma / alpha at the noisiest time for epsilon, else 1."""
        abar = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        if self.manifest["prediction_type"] != "epsilon" or abar is None:
            return 1.0
        first = abar[int(max(times[0] for times in self.manifest["timesteps"].values()))].double()
        return max(1.0, float(((1 - first) / first).sqrt()))

    @torch.no_grad()
    def output(self, network: Any, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's prediction at x_t (B, C, H, W), guided as the pipeline guides, float32."""
        x_t, labels = x_t.to(network.dtype), self.labels
        if self.guidance != 1:
            assert labels is not None
            x_t, labels = torch.cat([x_t, x_t]), torch.cat([labels, torch.full_like(labels, 1000)])
        raw = network(x_t, timestep=t.expand(len(x_t)), class_labels=labels, return_dict=False)[0]
        raw = raw[:, : x_t.shape[1]].float()  # the second half, where there is one, is a variance
        if self.guidance != 1:
            cond, null = raw.chunk(2)
            raw = null + self.guidance * (cond - null)
        return raw

    # The checks, in order.

    def files(self) -> Outcome:
        """Hashes."""
        for name, wanted in self.manifest["files"].items():
            require((self.folder / name).is_file(), f"{name} is missing")
            require(file_sha256(self.folder / name) == wanted, f"{name} has changed since the export")
        return None, f"{len(self.manifest['files'])} files"

    def check_base(self) -> Outcome:
        """The weights the student started from."""
        if self.base is None:
            message = f"the base {self.manifest['base']['id']!r} is not here; give it with --base"
            raise Failed(message) if self.kind != "merged" else Skipped(message)
        self.base_network = self.network_class.from_pretrained(
            self.base, subfolder=self.component, torch_dtype=self.dtype
        ).eval()
        found = state_sha256(self.base_network.state_dict())
        require(found == self.manifest["base"]["weights_sha256"], f"{self.base} has other weights than the student's base")
        return None, self.base

    def load(self) -> Outcome:
        """Stock loading."""
        cls = getattr(diffusers, self.manifest["pipeline_class"])
        if self.kind == "merged":
            index = json.loads((self.folder / "model_index.json").read_text())
            require(index["_class_name"] == cls.__name__, f"model_index.json names {index['_class_name']}, not {cls.__name__}")
            self.pipeline = diffusers.DiffusionPipeline.from_pretrained(self.folder, torch_dtype=self.dtype)
        else:
            self.pipeline = cls.from_pretrained(self.base, torch_dtype=self.dtype)
            self._load_adapter()
            self.pipeline.scheduler = self.new_scheduler()
        self.pipeline.set_progress_bar_config(disable=True)
        found, wanted = type(self.pipeline.scheduler).__name__, self.manifest["scheduler"]["class_name"]
        require(found == wanted, f"the scheduler is {found} instead of {wanted}")
        return None, cls.__name__

    def _load_adapter(self) -> None:
        if self.kind == "peft":
            from peft import PeftModel

            self.peft_network = PeftModel.from_pretrained(self.network, self.folder).eval()
        else:
            self.pipeline.load_lora_weights(self.folder, weight_name=LORA_FILE, adapter_name="few")

    def _adapter(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the adapter's tensors in the file and in the network, under names that can be compared."""
        from peft import get_peft_model_state_dict

        if self.kind == "peft":
            return load_file(self.folder / "adapter_model.safetensors"), get_peft_model_state_dict(self.peft_network)
        loaded = get_peft_model_state_dict(self.network, adapter_name="few")
        if self.kind == "kohya":
            loaded = {kohya_name(self.component, name): tensor for name, tensor in loaded.items()}
            in_file = {
                name: tensor for name, tensor in load_file(self.folder / LORA_FILE).items() if not name.endswith(".alpha")
            }
        else:
            loaded = {f"{self.component}.{name}": tensor for name, tensor in loaded.items()}
            in_file = load_file(self.folder / LORA_FILE)
        return in_file, loaded

    def attached(self) -> Outcome:
        """At least one tensor of the adapter."""
        in_file, loaded = self._adapter()
        arrived = num_equal(in_file, loaded)
        require(arrived > 0, f"none of the file's {len(in_file)} tensors is in the network; its first key is {min(in_file)}")
        return None, f"{arrived} tensors"

    def complete(self) -> Outcome:
        """The loading report of the component."""
        _, report = self.network_class.from_pretrained(self.folder, subfolder=self.component, output_loading_info=True)
        for kind, names in report.items():
            require(not names, f"{kind}: {len(names)}, the first is {sorted(map(str, names))[0] if names else ''}")
        return None, ""

    def tensors(self) -> Outcome:
        """Counts and values."""
        if self.kind != "merged":
            in_file, loaded = self._adapter()
            declared = self.manifest["adapter"]["num_tensors"]
        else:
            in_file = {}
            for path in sorted((self.folder / self.component).glob("*.safetensors")):
                in_file |= load_file(path)
            loaded = self.network.state_dict()
            declared = len(in_file)
        arrived = num_equal(in_file, loaded)
        require(
            arrived == len(in_file) == len(loaded) == declared,
            f"{arrived} of the file's {len(in_file)} tensors arrived; the network has {len(loaded)}, the manifest says "
            f"{declared}",
        )
        if self.kind == "peft":
            setattr(self.pipeline, self.component, self.peft_network.merge_and_unload())
        return None, f"{arrived} tensors"

    def _first(self) -> tuple[Tensor, Tensor]:
        num_steps = self.step_counts[0]
        t = torch.tensor(self.manifest["timesteps"][str(num_steps)][0])
        return self.reference[f"{num_steps}.states"][0], t

    def finite(self) -> Outcome:
        """No NaN or infinity."""
        require(bool(self.output(self.network, *self._first()).isfinite().all()), "the output is not finite")
        return None, ""

    def differs(self) -> Outcome:
        """Not the base."""
        if self.base_network is None:
            raise Skipped("the base is not here")
        difference = gap(self.output(self.network, *self._first()), self.output(self.base_network, *self._first()))
        if difference < DIFFERENCE:
            raise Failed("the output is the base model's: the student's weights have no effect", difference)
        return None, f"by {difference:.1e}"

    def check_network(self) -> Outcome:
        """Output at every step."""
        worst = 0.0
        for num_steps in self.step_counts:
            times = self.manifest["timesteps"][str(num_steps)]
            states, raws = self.reference[f"{num_steps}.states"], self.reference[f"{num_steps}.raw"]
            for t, x_t, raw in zip(times, states, raws, strict=True):
                worst = max(worst, gap(self.output(self.network, x_t, torch.tensor(t)), raw))
        eps = torch.finfo(self.network.dtype).eps
        tolerance = max(NETWORK_TOLERANCE, 4 * eps)
        if worst > tolerance:
            raise Failed(f"the output differs from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e}, relative"

    def timesteps(self) -> Outcome:
        """Times of the scheduler."""
        scheduler = self.pipeline.scheduler
        for num_steps in self.step_counts:
            self.set_steps(scheduler, num_steps)
            found, wanted = scheduler.timesteps.tolist(), self.manifest["timesteps"][str(num_steps)]
            found = found[:-1] if self.on_arc else found  # this scheduler's list goes on to the end, 0
            require(
                len(found) == len(wanted) and all(abs(a - b) <= 1e-5 * wanted[0] for a, b in zip(found, wanted, strict=True)),
                f"{num_steps} steps visit {found} instead of {wanted}",
            )
        return None, ""

    def stepping(self) -> Outcome:
        """States of the scheduler, from the student's own outputs."""
        scheduler, worst = self.pipeline.scheduler, 0.0
        accepts_generator = "generator" in inspect.signature(scheduler.step).parameters
        for num_steps in self.step_counts:
            states, generators = self.reference[f"{num_steps}.states"], self.generators()
            x = randn_tensor(states[0].shape, generator=generators) * getattr(scheduler, "init_noise_sigma", 1.0)
            worst = max(worst, gap(x, states[0]))
            scheduler.set_timesteps(num_steps)
            options = {"generator": generators} if accepts_generator else {}
            following = [*states[1:], self.reference[f"{num_steps}.final"]]
            for t, raw, wanted in zip(scheduler.timesteps, self.reference[f"{num_steps}.raw"], following, strict=True):
                x = scheduler.step(raw, t, x, **options).prev_sample
                worst = max(worst, gap(x, wanted))
        tolerance = STEPPING_TOLERANCE + ROUNDING * self.magnification()
        if not worst <= tolerance:
            raise Failed(f"the scheduler's states differ from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e}, relative"

    def _images(self, final: Tensor) -> Tensor:
        vae = getattr(self.pipeline, "vae", None)
        with torch.no_grad():
            images = final
            if vae is not None:
                shift = getattr(vae.config, "shift_factor", None) or 0.0
                images = vae.decode((final / vae.config.scaling_factor + shift).to(vae.dtype)).sample.float()
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def check_pipeline(self) -> Outcome:
        """The call on the card."""
        name, worst, note = self.manifest["pipeline_class"], 0.0, ""
        for num_steps in self.step_counts:
            generators = self.generators()
            if name == "DiTPipeline":
                scheduler = self.pipeline.scheduler
                if "generator" in inspect.signature(scheduler.step).parameters:
                    # The pipeline leaves the scheduler to the global generator; one per image makes it comparable.
                    scheduler.step = functools.partial(type(scheduler).step, scheduler, generator=generators)
                    note = "; generators handed to scheduler.step here, which this pipeline does not do"
                assert self.labels is not None
                images = self.pipeline(
                    self.labels.tolist(),
                    guidance_scale=self.guidance,
                    generator=generators,
                    num_inference_steps=num_steps,
                    output_type="np",
                ).images
            else:
                labels = {} if self.labels is None else {"class_labels": self.labels.tolist()}
                images = self.pipeline(
                    batch_size=len(generators), generator=generators, num_inference_steps=num_steps, output_type="np", **labels
                ).images
            worst = max(worst, gap(torch.from_numpy(images), self._images(self.reference[f"{num_steps}.final"])))
        tolerance = IMAGE_TOLERANCE + NETWORK_ROUNDING * self.magnification()
        if not worst <= tolerance:
            raise Failed(f"the pipeline's images differ from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e} of [0, 1]{note}"

    def checks(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """Return name and function of every check, in order."""
        weights = ("complete", self.complete) if self.kind == "merged" else ("attached", self.attached)
        return [
            ("files", self.files),
            ("base", self.check_base),
            ("load", self.load),
            weights,
            ("tensors", self.tensors),
            ("finite", self.finite),
            ("differs", self.differs),
            ("network", self.check_network),
            ("timesteps", self.timesteps),
            ("stepping", self.stepping),
            ("pipeline", self.check_pipeline),
        ]


def ignores_generators(scheduler: Any) -> bool:
    """Return whether step draws from the global generator whatever it is given: of a stochastic flow, in diffusers before 0.39."""
    return bool(scheduler.config.get("stochastic_sampling")) and Version(diffusers.__version__) < Version("0.39")


class HeardEnough(Exception):
    """Ends a call of a pipeline whose network has said what was asked for."""


class Run:
    """One call of a prompted pipeline: what its network said, where its latents were after each step, and the images if it ended."""

    def __init__(
        self, pipeline: Any, component: str, arguments: dict[str, Any], prompts: list[str], stop_after: int | None = None
    ) -> None:
        self.stop_after = stop_after
        self.raw: list[Tensor] = []
        self.states: list[Tensor] = []
        accepted = inspect.signature(pipeline.__call__).parameters
        if "callback_on_step_end" in accepted:
            arguments = arguments | {"callback_on_step_end": self._after_step}
        else:
            arguments = arguments | {"callback": self._after_step_of_old, "callback_steps": 1}
        hook, scheduler = getattr(pipeline, component).register_forward_hook(self._heard), pipeline.scheduler
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        hands_on = hasattr(pipeline, "prepare_extra_step_kwargs") and not ignores_generators(scheduler)
        is_global = takes_generator and not hands_on
        if is_global:  # the noise between steps is the global generator's; one per image makes it comparable
            scheduler.step = functools.partial(self._step, pipeline, type(scheduler).step, arguments)
        try:
            with contextlib.suppress(HeardEnough):
                self.images = torch.from_numpy(pipeline(prompts, output_type="np", **arguments).images)
        finally:
            hook.remove()
            vars(scheduler).pop("step", None)
        self.note = "; noise from a generator per image here, where this pipeline takes the global one" if is_global else ""

    @staticmethod
    def _step(pipeline: Any, step: Any, arguments: dict[str, Any], raw: Tensor, t: Any, x: Tensor, **options: Any) -> Any:
        """Step with a generator per image, on unpacked latents where the pipeline packs them."""
        generators = options["generator"] = arguments["generator"]

        def draw(like: Tensor) -> Tensor:
            return randn_tensor(like.shape, generators, dtype=like.dtype)

        with mock.patch.object(torch, "randn_like", draw):  # by which those draw that ignore generators
            if not hasattr(pipeline, "_pack_latents"):
                return step(pipeline.scheduler, raw, t, x, **options)
            size = (arguments["height"], arguments["width"], pipeline.vae_scale_factor)
            raw, x = (pipeline._unpack_latents(tokens, *size) for tokens in (raw, x))
            following = step(pipeline.scheduler, raw, t, x, **options)[0]
            return (pipeline._pack_latents(following, *following.shape),)

    def _heard(self, module: Any, inputs: Any, output: Any) -> None:
        self.raw.append((output[0] if isinstance(output, tuple) else output.sample).float())
        if len(self.raw) == self.stop_after:
            raise HeardEnough

    def _after_step(self, pipeline: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.states.append(values["latents"].float())
        return values

    def _after_step_of_old(self, step: int, t: Any, latents: Tensor) -> None:
        self.states.append(latents.float())


class PromptedExport(Export):
    """An export whose pipeline reads prompts."""

    def run(self, num_steps: int, stop_after: int | None = None, **changes: Any) -> Run:
        """Call the pipeline as the card says, for images of the check's size; `stop_after`: calls of the network to hear."""
        arguments = {"num_inference_steps": num_steps, "generator": self.generators()}
        arguments |= self.manifest["call"] | self.times_call(num_steps)
        if size := self.manifest.get("check_size"):
            arguments |= {"height": size, "width": size}
        return Run(self.pipeline, self.component, arguments | changes, list(self.manifest["prompts"]), stop_after)

    @functools.cached_property
    def runs(self) -> dict[int, Run]:
        """The call with every number of steps."""
        return {num_steps: self.run(num_steps) for num_steps in self.step_counts}

    def packed(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, H, W) as the pipeline hands them round."""
        pack = getattr(self.pipeline, "_pack_latents", None)
        return latents if pack is None else pack(latents, *latents.shape)

    def held(self, latents: Tensor, t: float) -> Tensor:
        """Return the student's latents at the scheduler's time t as the pipeline hands them round between steps."""
        if not self.on_arc:
            return self.packed(latents)
        angle = torch.tensor(t, dtype=torch.float64)
        return (latents * (angle.sin() + angle.cos()) * self.pipeline.scheduler.config.sigma_data).float()

    def finite(self) -> Outcome:
        """No NaN or infinity."""
        require(all(bool(raw.isfinite().all()) for run in self.runs.values() for raw in run.raw), "the output is not finite")
        return None, ""

    def differs(self) -> Outcome:
        """Not the base."""
        if self.base_network is None:
            raise Skipped("the base is not here")
        student, num_steps = self.network, self.step_counts[0]
        ours = self.runs[num_steps].raw[0]
        # A base without an input for guidance would be asked twice at another scale.
        changes = {"guidance_scale": 1.0} if self.manifest.get("guidance_as_input") else {}
        setattr(self.pipeline, self.component, self.base_network)
        try:
            difference = gap(ours, self.run(num_steps, stop_after=1, **changes).raw[0])
        finally:
            setattr(self.pipeline, self.component, student)
        if difference < DIFFERENCE:
            raise Failed("the output is the base model's: the student's weights have no effect", difference)
        return None, f"by {difference:.1e}"

    def check_network(self) -> Outcome:
        """Output at every step."""
        worst = 0.0
        for num_steps, run in self.runs.items():
            wanted = self.reference[f"{num_steps}.raw"]
            require(len(run.raw) == len(wanted), f"the network was called {len(run.raw)} times instead of {len(wanted)}")
            for ours, raw in zip(run.raw, wanted, strict=True):
                target = self.packed(raw)
                worst = max(worst, gap(ours if ours.ndim == 3 else ours[:, : target.shape[1]], target))
        tolerance = max(NETWORK_TOLERANCE + ROUNDING * self.magnification(), 4 * torch.finfo(self.dtype).eps)
        if not worst <= tolerance:
            raise Failed(f"the output differs from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e}, relative"

    def stepping(self) -> Outcome:
        """Latents after every step."""
        worst = 0.0
        for num_steps, run in self.runs.items():
            following = [*self.reference[f"{num_steps}.states"][1:], self.reference[f"{num_steps}.final"]]
            require(len(run.states) == len(following), f"{len(run.states)} steps instead of {len(following)}")
            after = [*self.manifest["timesteps"][str(num_steps)][1:], 0.0]
            wanted = [self.held(latents, t) for latents, t in zip(following, after, strict=True)]
            worst = max(worst, *(gap(a, b) for a, b in zip(run.states, wanted, strict=True)))
        tolerance = STEPPING_TOLERANCE + NETWORK_ROUNDING * self.magnification() + 4 * torch.finfo(self.dtype).eps
        if not worst <= tolerance:
            raise Failed(f"the pipeline's states differ from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e}, relative"

    def check_pipeline(self) -> Outcome:
        """The images of the call on the card."""
        finals = ((run.images, self.reference[f"{num_steps}.final"]) for num_steps, run in self.runs.items())
        worst = max(gap(images, self._images(final)) for images, final in finals)
        tolerance = IMAGE_TOLERANCE + NETWORK_ROUNDING * self.magnification() + 4 * torch.finfo(self.dtype).eps
        if not worst <= tolerance:
            raise Failed(f"the pipeline's images differ from the student's by {worst:.1e} (tolerance {tolerance:.0e})", worst)
        return worst, f"tolerance {tolerance:.0e} of [0, 1]{self.runs[self.step_counts[-1]].note}"

    def stacking(self) -> Outcome:
        """A second LoRA beside this one."""
        from peft import get_peft_model_state_dict

        torch.manual_seed(0)
        few = get_peft_model_state_dict(self.network, adapter_name="few")
        style = {f"{self.component}.{name}": 0.1 * torch.randn_like(tensor) for name, tensor in few.items()}
        self.pipeline.load_lora_weights(style, adapter_name="style")
        num_steps = self.step_counts[0]
        alone = self.runs[num_steps].raw[0]
        self.pipeline.set_adapters(["few", "style"], [1.0, 0.0])
        unchanged = gap(self.run(num_steps, stop_after=1).raw[0], alone)
        self.pipeline.set_adapters(["few", "style"], [1.0, 1.0])
        changed = gap(self.run(num_steps, stop_after=1).raw[0], alone)
        self.pipeline.delete_adapters("style")
        self.pipeline.set_adapters("few")
        require(unchanged <= NETWORK_TOLERANCE, f"a second LoRA at weight 0 changes the output by {unchanged:.1e}")
        require(changed > DIFFERENCE, "a second LoRA at weight 1 changes nothing")
        return unchanged, f"a second LoRA changes the output by {changed:.1e}"

    def checks(self) -> list[tuple[str, Callable[[], Outcome]]]:
        """Return name and function of every check, in order."""
        last = [("stacking", self.stacking)] if self.kind in ("lora", "kohya") else []
        return [*super().checks(), *last]


def open_export(folder: Path, base: str | None) -> Export:
    """Return the export as what its pipeline reads."""
    manifest = json.loads((folder / "diffdistill.json").read_text())
    return (Export if manifest.get("prompts") is None else PromptedExport)(folder, base)


def check_folder(folder: Path, base: str | None) -> dict[str, Any]:
    """Run every check on one folder; an exception of any kind fails the check it happened in."""
    began, results, failed = time.perf_counter(), [], False
    try:
        checks = open_export(folder, base).checks()
    except Exception as error:
        checks, failed = [], True
        results.append({"name": "manifest", "status": "failed", "error": None, "detail": f"{type(error).__name__}: {error}"})
    for name, check in checks:
        if failed:
            results.append({"name": name, "status": "not_run", "error": None, "detail": ""})
            continue
        try:
            error_size, detail = check()
            status = "passed"
        except Skipped as skip:
            status, error_size, detail = "skipped", None, str(skip)
        except Failed as failure:
            status, error_size, detail, failed = "failed", failure.error, str(failure), True
        except Exception as error:  # whatever the stock loaders raise means that this folder does not load
            first_line = (str(error).strip().splitlines() or [""])[0]
            status, error_size, detail, failed = "failed", None, f"{type(error).__name__}: {first_line}", True
        if error_size is not None and error_size == float("inf"):
            error_size = None  # not valid JSON
        results.append({"name": name, "status": status, "error": error_size, "detail": detail})
    return {"folder": str(folder), "passed": not failed, "checks": results, "seconds": round(time.perf_counter() - began, 2)}


def versions() -> dict[str, str]:
    """Return the versions in use."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for package in ("torch", "diffusers", "peft", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def main() -> int:
    """Check the folders on the command line and print what was found."""
    parser = argparse.ArgumentParser(description="Check exports with stock diffusers.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--base", help="where the base pipeline is, when it is not where the manifest says")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    arguments = parser.parse_args()
    results = [check_folder(folder, arguments.base) for folder in arguments.folders]
    foreign = sorted(name for name in sys.modules if name.split(".")[0] == "diffdistill")
    if arguments.json:
        print(json.dumps({"results": results, "versions": versions(), "diffdistill_modules": foreign}))
    else:
        for result in results:
            print(result["folder"])
            for check in result["checks"]:
                error = "" if check["error"] is None else f" {check['error']:.1e}"
                print(f"  {check['status']:8} {check['name']:10}{error} {check['detail']}")
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
