"""The student's own numbers, which stock diffusers is asked to reproduce."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdistill.export.card import NUM_REFERENCES, reference_labels
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.guidance import guided
from diffdistill.models.loading import Teacher
from diffdistill.models.network import NetworkDenoiser
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler


class _Recorder(Denoiser):
    """A denoiser that keeps what it said."""

    def __init__(self, inner: Denoiser, dtype: torch.dtype) -> None:
        self.inner, self.dtype, self.raw = inner, dtype, []
        self.schedule, self.sample_shape = inner.schedule, inner.sample_shape

    raw: list[Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        said = self.inner(x_t.to(self.dtype), t, cond)
        self.raw.append(said.raw.float())
        return Prediction(said.kind, said.raw.float(), x_t, said.alpha, said.sigma)


@torch.no_grad()
def write_reference(
    path: Path, teacher: Teacher, student: NetworkDenoiser, samplers: Mapping[int, Sampler], prompts: Sequence[str] | None
) -> None:
    """Write states (N, B, ...), raw outputs (N, B, ...) and samples (B, ...) of our own sampler, for every step count.

    The images are of the teacher's size, whatever the student's denoiser says.
    """
    from safetensors.torch import save_file

    seeds, labels = list(range(NUM_REFERENCES)), reference_labels(teacher.num_classes)
    cond = _condition(teacher, prompts).to("cpu")
    tensors = {"seeds": torch.tensor(seeds)} | ({} if labels is None else {"labels": torch.tensor(labels)})
    student = replace(student, sample_shape=teacher.denoiser.sample_shape)
    with _on_cpu(student.network):
        dtype = next(student.network.parameters()).dtype
        for count, sampler in samplers.items():
            if sampler.guidance_as_input:
                asked_once, rest = student, sampler
            else:
                asked_once, rest = guided(student, sampler.guidance), replace(sampler, guidance=1.0)
            recorder = _Recorder(asked_once, dtype)
            states, final = rest.trajectory(recorder, Noise(seeds), cond)
            tensors |= {
                f"{count}.states": torch.stack([state.x_t for state in states]),
                f"{count}.raw": torch.stack(recorder.raw),
                f"{count}.final": final,
            }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def rounding_gap(
    path: Path, teacher: Teacher, trained: NetworkDenoiser, samplers: Mapping[int, Sampler], prompts: Sequence[str] | None
) -> float:
    """Return the root mean square difference of the samples of `trained`, on rounded weights, from the reference's, over theirs.

    In the largest number of steps; on the device the rounded network lives on.
    """
    from safetensors.torch import load_file

    trained = replace(trained, sample_shape=teacher.denoiser.sample_shape)
    count, sampler = max(samplers.items())
    wanted = load_file(path)[f"{count}.final"]
    noise = Noise(range(NUM_REFERENCES), teacher.device)
    found = sampler.sample(trained, noise, _condition(teacher, prompts)).to(wanted.device, wanted.dtype)
    return float((found - wanted).norm() / wanted.norm())


def _condition(teacher: Teacher, prompts: Sequence[str] | None) -> Condition:
    """Return what the reference samples are asked for."""
    labels = reference_labels(teacher.num_classes)
    asked = prompts if prompts is not None else None if labels is None else torch.tensor(labels)
    return teacher.condition(asked, NUM_REFERENCES)


@contextlib.contextmanager
def _on_cpu(network: nn.Module) -> Iterator[None]:
    """Put a network in eval mode on the CPU, where the check will run it: a GPU's matrix units round differently."""
    device, training = next(network.parameters()).device, network.training
    network.to("cpu").eval()
    try:
        yield
    finally:
        network.to(device).train(training)
