"""What a network is conditioned on: a small record of tensors that batches, repeats, drops and pairs with its null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Named tensors with one row per sample, and the empty value of each.

    Attributes:
        values: name -> (B, ...), e.g. {"class_labels": (B,) int64}; empty for an unconditional model.
        null: name -> (1, ...), the value that stands for "no condition"; empty when the model was never trained with one.
            Values without an entry (a second time, a guidance scale) are no condition: they stay as they are.
        batch_size: B.
    """

    batch_size: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if value.shape[:1] != (self.batch_size,):
                raise ValueError(f"condition {name!r} must have {self.batch_size} rows; got shape {tuple(value.shape)}.")

    @property
    def has_null(self) -> bool:
        """Whether a value has an empty counterpart, so that guidance is possible."""
        return any(name in self.null for name in self.values)

    def _with(self, values: Mapping[str, Tensor], batch_size: int) -> Condition:
        return Condition(batch_size, values, self.null)

    def _expanded_null(self) -> dict[str, Tensor]:
        if not self.has_null:
            raise ValueError(
                "this condition has no null value, so guidance is impossible; use guidance 1, or a teacher "
                "trained with label dropout."
            )
        return {
            name: self.null[name].to(value.device, value.dtype).expand_as(value) if name in self.null else value
            for name, value in self.values.items()
        }

    def to(self, device: torch.device | str) -> Condition:
        """Return the condition on another device."""
        move = {name: value.to(device, non_blocking=True) for name, value in self.values.items()}
        return Condition(self.batch_size, move, {name: value.to(device) for name, value in self.null.items()})

    def repeat(self, times: int) -> Condition:
        """Return the batch laid end to end `times` times."""
        values = {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in self.values.items()}
        return self._with(values, self.batch_size * times)

    def with_values(self, **values: Tensor) -> Condition:
        """Return the condition with further values, (B, ...) each: a second time, a guidance scale. They have no null."""
        return self._with({**self.values, **values}, self.batch_size)

    def select(self, index: Tensor | slice) -> Condition:
        """Return the rows named by an index tensor, a mask or a slice."""
        values = {name: value[index] for name, value in self.values.items()}
        return self._with(values, len(torch.arange(self.batch_size)[index]))

    def drop(self, mask: Tensor) -> Condition:
        """Return the condition with the rows where mask (B,) is true replaced by the null value."""
        null = self._expanded_null()
        values = {
            name: torch.where(mask.to(value.device).reshape(-1, *[1] * (value.ndim - 1)), null[name], value)
            for name, value in self.values.items()
        }
        return self._with(values, self.batch_size)

    def null_like(self) -> Condition:
        """Return the empty condition of the same batch size."""
        return self._with(self._expanded_null(), self.batch_size)

    def paired(self) -> Condition:
        """Return condition and null laid end to end, (2B, ...): one batch for both branches of guidance."""
        return Condition.cat([self, self.null_like()])

    @staticmethod
    def cat(parts: Sequence[Condition]) -> Condition:
        """Return several batches laid end to end; all must have the same names."""
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return Condition(sum(part.batch_size for part in parts), values, parts[0].null)

    @staticmethod
    def none(batch_size: int) -> Condition:
        """Return the condition of an unconditional model."""
        return Condition(batch_size)

    @staticmethod
    def labels(labels: Tensor, null_label: int | None) -> Condition:
        """Return a class condition from int64 labels (B,), with the label that stands for none."""
        null = {} if null_label is None else {"class_labels": torch.tensor([null_label], device=labels.device)}
        return Condition(labels.shape[0], {"class_labels": labels}, null)
