"""What the teacher made before training: stored pairs and trajectories, made once or read, with a note of what they belong to.

They are made in parts of a fixed number of images, each of them a file beside the final one: so all processes can make them,
and a run that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffdistill.config import PairsConfig
from diffdistill.data.batches import DataSource, derive_seed
from diffdistill.data.cache import CachedSource, Compute, TensorCache, content_key
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher
from diffdistill.processes import ALONE, Processes
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import PER_PASS, TrajectorySpec, make_trajectories
from diffdistill.training.conditions import Conditions
from diffdistill.training.progress import Progress

S = TypeVar("S", Pairs, Trajectories)
Origin = Mapping[str, Any]
IMAGES_PER_PART = 128  # made by one process at a time; what a kill can cost
_COMPARED = {"weights": "another teacher, or one loaded in another dtype", "texts": "other texts or text encoders"}


def origin_of(teacher: Teacher, fingerprints: Mapping[str, str], source: DataSource) -> Origin:
    """Return what stored states depend on beside their settings: the teacher, and the texts whose places they name.

    Args:
        teacher: of the run.
        fingerprints: of its parts, see `Teacher.fingerprints`.
        source: of the run.
    Returns:
        "teacher": its path, for people; "weights" and "scheduler": the hashes of its network and of its scheduler's settings;
        "texts": the key of the encoded texts (which encoders, which texts), None for a teacher that reads none.
    """
    texts = source.cache.key if teacher.family.reads_text and isinstance(source, CachedSource) else None
    weights, scheduler = fingerprints[teacher.family.component], fingerprints["scheduler"]
    return {"teacher": teacher.path, "weights": weights, "scheduler": scheduler, "texts": texts}


@dataclass(frozen=True)
class StoredStates:
    """Makes the stored states of a run, or finds them made; every process calls it alike.

    Attributes:
        denoiser: the teacher as the roles see it: its network may hold adapters by now.
        conditions: of the run.
        origin: what `origin_of` said.
        seed: of the run.
        micro_batch_size: of the run; no more images are made at a time, so that what fits in training fits here.
        processes: share the parts, number k made by process k modulo their count.
        show: whether progress is shown.
        between_parts: called by all processes together after each has made a part, with what is done; may raise, to stop.
    """

    denoiser: Denoiser
    conditions: Conditions
    origin: Origin
    seed: int
    micro_batch_size: int
    processes: Processes = ALONE
    show: bool = False
    between_parts: Callable[[str], None] = lambda done: None

    def pairs(self, settings: PairsConfig, path: Path) -> Pairs:
        """Read the pairs that the settings name, or make them and store them at `path`, where a resumed run finds them.

        Raises:
            UserError: pairs of another teacher or of other texts, or a file that holds none.
        """
        if settings.path is not None:
            return self._read(Pairs, settings.path / path.name if settings.path.is_dir() else settings.path)
        num = settings.num or 1
        labels = self.conditions.draw(num, self.seed, "pair")
        sampler = Sampler(grids.trailing(self.denoiser.schedule, settings.steps), guidance=settings.guidance)
        note = {
            "sampler": "ddim, trailing",
            "steps": settings.steps,
            "guidance": settings.guidance,
            "seed": self.seed,
            "num": num,
        }
        return self._found_or_made(Pairs, path, num, note, lambda rows: self._make_pairs(rows, sampler, labels))

    def trajectories(self, spec: TrajectorySpec, path: Path) -> Trajectories:
        """Read the trajectories of a method, or make them and store them at `path`; errors as of `pairs`."""
        if spec.path is not None:
            return self._read(Trajectories, spec.path)
        num = spec.num or 1
        labels, device = self.conditions.draw(num, self.seed, "trajectory"), self.conditions.teacher.device

        def make(rows: list[int]) -> dict[str, Tensor]:
            at = self.conditions.at
            return make_trajectories(self.denoiser, spec, at, labels, self.seed, device, self._per_pass, rows).tensors()

        return self._found_or_made(Trajectories, path, num, spec.origin(self.seed), make)

    @property
    def _per_pass(self) -> int:
        return min(PER_PASS, self.micro_batch_size)

    @torch.no_grad()
    def _make_pairs(self, rows: list[int], sampler: Sampler, labels: Tensor | None) -> dict[str, Tensor]:
        """Return pairs (noise, x0) of a deterministic sampler of the teacher, those of these numbers."""
        noises, samples = [], []
        for some in torch.tensor(rows).split(self._per_pass):
            seeds = [derive_seed(self.seed, "pair", k) for k in some.tolist()]
            cond = self.conditions.at(None if labels is None else labels[some], len(some))
            noises.append(Noise(seeds).draw(self.denoiser.sample_shape))
            noise = Noise(seeds, self.conditions.teacher.device)
            samples.append(sampler.sample(self.denoiser, noise, cond).float().cpu())
        return Pairs(torch.cat(noises), torch.cat(samples), None if labels is None else labels[rows]).tensors()

    def _found_or_made(self, kind: type[S], path: Path, num: int, settings: Origin, make: Compute) -> S:
        """Return what an earlier start of the run stored at `path`, or make it with the same settings and store it there.

        Args:
            kind: of states.
            path: in the run's folder.
            num: images.
            settings: what the states depend on beside `origin`, plain JSON values.
            make: returns the tensors of the images asked for by number.
        """
        origin = {**settings, "shape": list(self.denoiser.sample_shape), **self.origin}
        states = self._read(kind, path) if path.exists() else None
        self.processes.wait()  # all have looked before one writes
        folder = path.with_suffix(".parts")
        if states is None or _deciding(states.origin) != _deciding(origin):
            parts = TensorCache(folder, content_key(**_deciding(origin)), num, IMAGES_PER_PART)
            self._make_parts(parts, make, f"{path.stem} of the teacher")
            if self.processes.is_main:
                _join(kind, parts, origin).save(path)
            self.processes.wait()
            states = self._read(kind, path)
        if self.processes.is_main:
            shutil.rmtree(folder, ignore_errors=True)
        return states

    def _make_parts(self, parts: TensorCache, make: Compute, what: str) -> None:
        """Make the parts that are missing or damaged, in rounds of one part for each process."""
        progress = Progress(parts.num_rows, 0, self.show, "image")
        try:
            for first in range(0, parts.num_shards, self.processes.count):
                made = self._make_part(parts, first + self.processes.index, make)
                done = min((first + self.processes.count) * parts.rows_per_shard, parts.num_rows)
                if made:
                    progress.advance(done - progress.done)
                    progress.report(what)
                else:
                    progress.skip(done - progress.done)
                self.between_parts(f"{done} of {parts.num_rows} {what}")
        finally:
            progress.close()

    @staticmethod
    def _make_part(parts: TensorCache, part: int, make: Compute) -> bool:
        """Make a part unless it is there and good, or there are not so many; return whether it was made."""
        needed = part < parts.num_shards and not parts.is_good(part)
        if needed:
            parts.fill_shard(part, make)
        return needed

    def _read(self, kind: type[S], path: Path) -> S:
        """Return stored states; refuse those of another teacher, or whose numbers name other texts than the run's."""
        states = kind.load(path)
        differing = [what for name, what in _COMPARED.items() if states.origin.get(name) != self.origin[name]]
        if differing:
            raise UserError(
                f"{path} was made with {' and with '.join(differing)} than this run's; its teacher was "
                f"{states.origin.get('teacher', 'not noted')}. Use the teacher, teacher_options and data of the run that made it, or "
                "have new ones made: set num in place of path, or delete the file where it is this run's own."
            )
        return states


def _join(kind: type[S], parts: TensorCache, origin: Origin) -> S:
    tensors = {name: parts.column(name) for name in parts.signature()}
    return kind(**{"labels": None, **tensors}, origin=origin)


def _deciding(origin: Origin) -> Origin:
    """Return what decides the values of states: all that is noted but the teacher's path."""
    return {name: value for name, value in origin.items() if name != "teacher"}
