"""What the images of a run can be asked for, by number: the teacher's classes, or the encoded texts of the run's data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffdistill.data.batches import DataSource, MicroBatches, derive_seed, keyed_generator, uniform_labels
from diffdistill.models.condition import Condition
from diffdistill.models.loading import Teacher


class Conditions:
    """Conditions on the device, of named values or of numbers.

    A number is a class label, or where the teacher reads text the place of a text in the source. So what is stored for many
    images names its text instead of copying it.

    Args:
        teacher: whose classes these are; has the null value.
        source: holds the texts.
    """

    def __init__(self, teacher: Teacher, source: DataSource) -> None:
        self.teacher, self.source = teacher, source
        self._null, self._device = (
            teacher.conditioner.null,
            teacher.device,
        )  # which looks through the network for its parameters

    def of(self, values: Mapping[str, Tensor], batch_size: int) -> Condition:
        """Return what `teacher.condition` would, without its copies from pageable memory, for which a GPU is waited."""
        moved = {name: self.on_device(value) for name, value in values.items()}
        return Condition(batch_size, moved, self._null if moved else {})

    def at(self, numbers: Tensor | None, batch_size: int) -> Condition:
        """Return the conditions of numbers (B,) int64, of an unconditional teacher those of None."""
        if numbers is None:
            return self.of({}, batch_size)
        if self.teacher.family.reads_text:
            return self.of(self.source.take(numbers, torch.Generator()).values, batch_size)
        return self.of({"class_labels": numbers}, batch_size)

    def draw(self, num: int, seed: int, purpose: str) -> Tensor | None:
        """Return numbers to ask for, (num,) int64: classes drawn uniformly, texts each in turn, in a shuffled order.

        Args:
            num: how many.
            seed: of the run.
            purpose: keeps the draws for different things apart.
        """
        if self.teacher.family.reads_text:
            return MicroBatches(self.source.num_samples, num, num, derive_seed(seed, f"{purpose} texts")).indices(0, 0)
        classes = self.teacher.num_classes
        return None if classes is None else uniform_labels(num, classes, keyed_generator(seed, f"{purpose} labels"))

    def on_device(self, value: Tensor) -> Tensor:
        """Return a tensor of the data where the teacher is."""
        return value.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else value.to(self._device)
