"""The student beside the teacher while it trains: image grids from equal noise, drift figures, scores under a protocol."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffdistill.config import RunConfig, TextData
from diffdistill.data.batches import derive_seed
from diffdistill.data.cache import TensorCache
from diffdistill.distillers.base import Distiller
from diffdistill.evaluation.images import to_uint8
from diffdistill.files import write_atomic
from diffdistill.math import grids
from diffdistill.math.prediction import Prediction
from diffdistill.models.condition import Condition
from diffdistill.models.conditioning import Asked
from diffdistill.models.denoiser import Denoiser, View
from diffdistill.models.loading import Teacher
from diffdistill.models.parts import InParts
from diffdistill.models.roles import Roles
from diffdistill.processes import ALONE, Processes
from diffdistill.sampling.generate import Generate, image_generator
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.training import drift, layout
from diffdistill.training.stopping import Diverged, Interrupted
from diffdistill.training.text_data import texts

if TYPE_CHECKING:
    from diffdistill.evaluation.protocol import Protocol

TEACHER_STEPS = 50
COLUMNS = 10
PIXELS = 32  # an image is enlarged by a whole factor to about this edge


class Stoppable(View):
    """Another denoiser until the run is asked to stop, then `Interrupted`: a signal waits for one pass, not for all the images.

    Args:
        inner: that denoiser.
        asked_to_stop: asked before each pass.
    """

    def __init__(self, inner: Denoiser, asked_to_stop: Callable[[], bool]) -> None:
        self.inner, self.schedule, self.sample_shape, self._asked = inner, inner.schedule, inner.sample_shape, asked_to_stop

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        """Answer as the other does; raises Interrupted."""
        if self._asked():
            raise Interrupted
        return self.inner(x_t, t, cond)


class Preview:
    """Samples of the same seeds and labels at every call, so that pictures of different steps can be laid side by side.

    Noise belongs to an image, so what is returned is the same whatever the number of processes; all call the same methods, and each
    gets the whole.

    Args:
        num: images.
        seed: of the run.
        asked: labels or prompts, one for each image.
        rows: most rows of a pass of a network, and most images decoded at once.
        folder: where processes put together what they have made.
        processes: make equal shares of the images; where they say that they are asked to stop, sampling ends in `Interrupted`.
        in_step: whether all must make the same passes. Each makes all images then, where these cannot be shared out evenly.
    """

    def __init__(
        self,
        teacher: Teacher,
        num: int,
        seed: int,
        asked: Asked,
        rows: int,
        folder: Path,
        processes: Processes = ALONE,
        in_step: bool = False,
    ) -> None:
        self.teacher, self.num, self.seed, self.asked, self.rows, self.folder = teacher, num, seed, asked, rows, folder
        self.labels = asked if isinstance(asked, Tensor) else None
        self._cond = teacher.condition(asked, num)  # kept: text encoders are released after it
        self._asked_to_stop = processes.asked_to_stop
        self._processes = processes.sharing(num, in_step)
        self._teacher_images: Tensor | None = None

    @property
    def teacher_images(self) -> Tensor:
        """The teacher's images, DDIM with its usual guidance; (N, C, H, W) in [-1, 1] in the memory of the CPU, made once."""
        if self._teacher_images is None:
            sampler = Sampler(grids.trailing(self.teacher.denoiser.schedule, TEACHER_STEPS), guidance=self.teacher.guidance)
            self._teacher_images = self._shared(lambda some: self._images(self.teacher.denoiser, sampler, some), "teacher")
        return self._teacher_images

    def student_images(self, roles: Roles, sampler: Sampler, step: int) -> Tensor:
        """Return the student's images at a step of the run, as above; raises Diverged when they are not finite."""
        return self._shared(lambda some: _finite(self._images(roles["student"], sampler, some)), "student", step)

    def fake_lag(self, roles: Roles, sampler: Sampler, step: int) -> float:
        """Return `drift.fake_lag` on the student's own outputs, not its average's: it is the student the fake follows."""
        return drift.fake_lag(self._shared(lambda some: self._errors(roles, sampler, some), "lag", step))

    def _shared(self, make: Callable[[slice], Tensor], *what: str | int) -> Tensor:
        """Return the rows (N, ...) that `make` returns of all images, put together from each process's share of these."""
        processes = self._processes
        if processes.count == 1:
            return make(slice(self.num))
        parts = TensorCache(self.folder / layout.parts_of_look(*what), {}, self.num, processes.share(self.num))
        if processes.index < parts.num_shards:
            parts.fill_shard(processes.index, lambda rows: {"made": make(slice(rows[0], rows[-1] + 1))})
        processes.wait()
        made = parts.column("made")
        processes.wait()
        if processes.is_main:
            shutil.rmtree(parts.folder.parent, ignore_errors=True)
        return made

    @torch.no_grad()
    def _images(self, denoiser: Denoiser, sampler: Sampler, some: slice) -> Tensor:
        states = sampler.sample(self._asked_in_parts(denoiser), self._noise("preview", some), self._cond.select(some))
        return torch.cat([self.teacher.codec.decode(part).clamp(-1, 1).cpu() for part in states.split(self.rows)])

    @torch.no_grad()
    def _errors(self, roles: Roles, sampler: Sampler, some: slice) -> Tensor:
        student, fake, teacher = map(self._asked_in_parts, (roles["student"], roles["fake"], roles.teacher))
        cond = self._cond.select(some)
        states, _ = sampler.trajectory(student, self._noise("preview", some), cond)
        return drift.denoising_errors(fake, teacher, [state.x0 for state in states], cond, self._noise("lag", some))

    def _noise(self, purpose: str, some: slice) -> Noise:
        return Noise([derive_seed(self.seed, purpose, k) for k in range(self.num)[some]], self.teacher.device)

    def _asked_in_parts(self, denoiser: Denoiser) -> Denoiser:
        return InParts(Stoppable(denoiser, self._asked_to_stop), self.rows)

    def figures(self, images: Tensor) -> dict[str, float]:
        """Return the drift figures of the student's images and of the teacher's, as "drift/name" and "drift/name_teacher"."""
        student, teacher = drift.figures(images, self.labels), drift.figures(self.teacher_images, self.labels)
        return {f"drift/{name}": value for name, value in student.items()} | {
            f"drift/{name}_teacher": value for name, value in teacher.items()
        }

    def grid(self, images: Tensor) -> Tensor:
        """Return a uint8 picture (C, H, W): a row of the teacher's images above a row of the student's, and so on."""
        from diffdistill.evaluation.figures import image_grid

        rows = [part for pair in zip(self.teacher_images.split(COLUMNS), images.split(COLUMNS), strict=True) for part in pair]
        pixels = to_uint8(_padded(rows)).cpu().numpy()
        scale = max(1, round(PIXELS / pixels.shape[-1]))
        return torch.from_numpy(image_grid(pixels, scale=scale, columns=min(COLUMNS, self.num))).permute(2, 0, 1)

    def save(self, path: Path, images: Tensor) -> Tensor:
        """Write the picture as PNG, atomically, and return it."""
        from diffdistill.evaluation.figures import png

        picture = self.grid(images)
        write_atomic(path, png(picture.permute(1, 2, 0).numpy()))
        return picture


def _padded(rows: list[Tensor]) -> Tensor:
    """Return the rows end to end, each filled up with black to the length of the first, so that a grid keeps them apart."""
    width = len(rows[0])
    return torch.cat([torch.cat([row, row.new_full((width - len(row), *row.shape[1:]), -1)]) for row in rows])


def finite_generator(teacher: Teacher, student: Denoiser, sampler: Sampler) -> Generate:
    """Return the generator of the student's images, which raises Diverged for images that are not finite."""
    inner = image_generator(teacher, student, sampler)

    def generate(seeds: list[int], asked: Asked) -> Tensor:
        return _finite(inner(seeds, asked))

    return generate


def _finite(images: Tensor) -> Tensor:
    if not images.isfinite().all():
        raise Diverged("the student makes images that are not finite. Lower the learning rate, or clip gradients.")
    return images


def asked_in_samples(config: RunConfig, teacher: Teacher, num: int) -> Asked:
    """Return what `num` sample images are asked for: the first prompts of the data over and over, the classes in turn, or nothing."""
    if not isinstance(config.data, TextData):
        return teacher.examples(num)
    return list(itertools.islice(itertools.cycle(texts(config.data)), num))


class Validation:
    """Scores of the student under a protocol. Its views are opened once, and between scores their networks are on the CPU.

    Args:
        teacher: gives the conditions that the protocol asks for, and the codec.
        protocol: what is made and scored.
        steps: student step counts to score.
        rows: as in `Preview`.
        folder: where processes put together what they have made.
        processes: make equal shares of the images; where they say that they are asked to stop, scoring ends in `Interrupted`.
        in_step: whether all must make the same passes. Each makes all images then, where these cannot be shared out evenly.
    """

    def __init__(
        self,
        teacher: Teacher,
        protocol: Protocol,
        steps: tuple[int, ...],
        rows: int,
        folder: Path,
        processes: Processes = ALONE,
        in_step: bool = False,
    ) -> None:
        from diffdistill.evaluation.reference import references_folder
        from diffdistill.evaluation.views import open_views, put_aside

        self.teacher, self.protocol, self.steps, self.rows, self.folder = teacher, protocol, steps, rows, folder
        self._asked_to_stop = processes.asked_to_stop
        self.views = open_views(self.protocol, cache=references_folder())
        put_aside(self.views)
        prompts = self.protocol.num_images // self.protocol.images_per_prompt
        self._processes = processes.sharing(prompts, in_step)
        self._share = self._processes.share(prompts) * self.protocol.images_per_prompt

    def scores(self, roles: Roles, distiller: Distiller, step: int) -> dict[str, float]:
        """Return "eval/metric@steps" -> value, and as "fid" the FID at the first step count, by which the best is kept.

        Args:
            roles: the student among them.
            distiller: says how it is sampled.
            step: of the run; what processes put together lies under it.
        """
        from diffdistill.evaluation.evaluate import Keeping, evaluate
        from diffdistill.evaluation.parts import IMAGES_PER_PART
        from diffdistill.evaluation.views import at_hand

        shared, found = self._processes.count > 1, dict[str, float]()
        student = InParts(Stoppable(roles["student"], self._asked_to_stop), self.rows)
        with at_hand(self.views, self.teacher.device):
            for count in self.steps:
                sampler = distiller.sampler(count)
                result = evaluate(
                    finite_generator(self.teacher, student, sampler),
                    self.protocol,
                    nfe=sampler.nfe,
                    num_steps=count,
                    batch_size=self.rows,
                    views=self.views,
                    keeping=Keeping(self.folder / layout.parts_of_look("validation", step, count)) if shared else None,
                    processes=self._processes,
                    images_per_part=self._share if shared else IMAGES_PER_PART,
                )
                found |= {f"eval/{name}@{count}": summary.mean for name, summary in result.values.items()}
        return found | ({"fid": found[key]} if (key := f"eval/fid@{self.steps[0]}") in found else {})


def numbers(values: Mapping[str, float]) -> str:
    """Return values for a line on the screen."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
