"""What the teacher made before training: stored pairs and trajectories, made once or read, with a note of what they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffdistill.config import PairsConfig
from diffdistill.data.batches import DataSource, derive_seed
from diffdistill.data.cache import CachedSource
from diffdistill.data.pairs import Pairs
from diffdistill.data.trajectories import Trajectories
from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.models.denoiser import Denoiser
from diffdistill.models.loading import Teacher
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.trajectories import PER_PASS, TrajectorySpec, make_trajectories
from diffdistill.training.conditions import Conditions

Origin = Mapping[str, Any]
_COMPARED = {"weights": "another teacher, or one loaded in another dtype", "texts": "other texts or text encoders"}


def origin_of(teacher: Teacher, fingerprints: Mapping[str, str], source: DataSource) -> Origin:
    """Return what stored states depend on beside their settings: the teacher, and the texts whose places they name.

    Args:
        teacher: of the run.
        fingerprints: of its parts, see `Teacher.fingerprints`.
        source: of the run.
    Returns:
        "teacher": its path, for people; "weights": the hash of its network; "texts": the key of the encoded texts (which
        encoders, which texts), None for a teacher that reads none.
    """
    texts = source.cache.key if teacher.family.reads_text and isinstance(source, CachedSource) else None
    return {"teacher": teacher.path, "weights": fingerprints[teacher.family.component], "texts": texts}


@dataclass(frozen=True)
class StoredStates:
    """Makes the stored states of a run, or finds them made.

    Attributes:
        denoiser: the teacher as the roles see it: its network may hold adapters by now.
        conditions: of the run.
        origin: what `origin_of` said.
        seed: of the run.
        micro_batch_size: of the run; no more images are made at a time, so that what fits in training fits here.
    """

    denoiser: Denoiser
    conditions: Conditions
    origin: Origin
    seed: int
    micro_batch_size: int

    def pairs(self, settings: PairsConfig, path: Path) -> Pairs:
        """Read the pairs that the settings name, or make them and store them at `path`, where a resumed run finds them.

        Raises:
            UserError: pairs of another teacher or of other texts, or a file that holds none.
        """
        if settings.path is not None:
            path = settings.path / path.name if settings.path.is_dir() else settings.path
        elif not path.exists():
            made = self._make_pairs(settings.num or 1, settings.steps, settings.guidance)
            dataclasses.replace(made, origin={**made.origin, **self.origin}).save(path)
        pairs = Pairs.load(path)
        self._refuse_others(pairs.origin, path)
        return pairs

    def trajectories(self, spec: TrajectorySpec, path: Path) -> Trajectories:
        """Read the trajectories of a method, or make them and store them at `path`; errors as of `pairs`."""
        if spec.path is not None:
            path = spec.path
        elif not path.exists():
            labels, device = self.conditions.draw(spec.num or 1, self.seed, "trajectory"), self.conditions.teacher.device
            made = make_trajectories(self.denoiser, spec, self.conditions.at, labels, self.seed, device, self._per_pass)
            dataclasses.replace(made, origin={**made.origin, **self.origin}).save(path)
        trajectories = Trajectories.load(path)
        self._refuse_others(trajectories.origin, path)
        return trajectories

    @property
    def _per_pass(self) -> int:
        return min(PER_PASS, self.micro_batch_size)

    @torch.no_grad()
    def _make_pairs(self, num: int, num_steps: int, guidance: float) -> Pairs:
        """Return pairs (noise, x0) of the teacher's deterministic DDIM sampler on the trailing grid."""
        sampler = Sampler(grids.trailing(self.denoiser.schedule, num_steps), guidance=guidance)
        labels = self.conditions.draw(num, self.seed, "pair")
        noises, samples = [], []
        for start in range(0, num, self._per_pass):
            seeds = [derive_seed(self.seed, "pair", k) for k in range(start, min(num, start + self._per_pass))]
            cond = self.conditions.at(None if labels is None else labels[start : start + len(seeds)], len(seeds))
            noises.append(Noise(seeds).draw(self.denoiser.sample_shape))
            noise = Noise(seeds, self.conditions.teacher.device)
            samples.append(sampler.sample(self.denoiser, noise, cond).float().cpu())
        origin = {"sampler": "ddim, trailing", "steps": num_steps, "guidance": guidance, "seed": self.seed}
        return Pairs(torch.cat(noises), torch.cat(samples), labels, origin)

    def _refuse_others(self, found: Origin, path: Path) -> None:
        """Refuse states of another teacher, or whose numbers name other texts than the run's."""
        differing = [what for name, what in _COMPARED.items() if found.get(name) != self.origin[name]]
        if differing:
            raise UserError(
                f"{path} was made with {' and with '.join(differing)} than this run's; its teacher was "
                f"{found.get('teacher', 'not noted')}. Use the teacher, teacher_options and data of the run that made it, or set num in "
                "place of path to make new ones."
            )
