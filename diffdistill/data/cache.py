"""Tensors computed once and kept on disk: text embeddings, masks, latents, one row per prompt or image.

A cache is addressed by what decides its content. It lies in shards of a fixed number of rows; each is one safetensors file
that appears whole or not at all and carries the SHA-256 of what it holds. So filling it goes on after a kill where it
stopped, several processes or runs can fill it at once without a lock, and damage is noticed before it is trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.data.batches import Sample
from diffdistill.errors import UserError
from diffdistill.files import hash_json, remove_leftovers, write_atomic, write_json

X0 = "x0"
READABLE = "readable"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LONGEST = 200  # characters of a part that is kept readable in key.json

Compute = Callable[[list[int]], Mapping[str, Tensor]]
Signature = dict[str, tuple[tuple[int, ...], torch.dtype]]


def content_key(**parts: Any) -> dict[str, Any]:
    """Return the parts that decide a cache's content as plain JSON values; a long part is replaced by its SHA-256.

    Args:
        parts: by name: texts, numbers, None, dtypes, and lists or mappings of these (the weights' hash, all prompts, the
            image size, ...).
    Raises:
        TypeError: a part of another kind, which might be written differently next time.
    """
    return {name: _plain(name, value) for name, value in parts.items()}


def _plain(name: str, value: Any) -> Any:
    def convert(part: Any) -> Any:
        if isinstance(part, torch.dtype):
            return str(part).removeprefix("torch.")
        raise TypeError(f"{name} of a content key must hold plain values; got {part!r} of type {type(part).__name__}")

    text = json.dumps(value, sort_keys=True, default=convert)
    return json.loads(text) if len(text) <= _LONGEST else "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class TensorCache:
    """Rows of named tensors on disk, in folder/HASH OF THE KEY/shard-00000.safetensors and so on.

    Args:
        folder: of all caches; key.json in the cache's own folder says what is in it.
        key: what decides the content, from `content_key`; number and layout of rows are added to it.
        num_rows: rows of the whole cache.
        rows_per_shard: rows of one file, the unit of work that a kill can cost.
        dtype: floating tensors are stored in it; None keeps their own. Other tensors stay as they are.
    Raises:
        UserError: no rows, or a dtype that is none of DTYPES.
    """

    def __init__(
        self,
        folder: str | Path,
        key: Mapping[str, Any],
        num_rows: int,
        rows_per_shard: int = 256,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_rows < 1 or rows_per_shard < 1:
            raise UserError(f"a cache needs at least one row, and one per shard; got {num_rows} and {rows_per_shard}.")
        if dtype is not None and dtype not in DTYPES:
            raise UserError(
                f"a cache stores {', '.join(map(_name, DTYPES))}, or null for the tensors' own; got {_name(dtype)}."
            )
        self.num_rows, self.rows_per_shard, self.dtype = num_rows, rows_per_shard, dtype
        layout = content_key(num_rows=num_rows, rows_per_shard=rows_per_shard, stored_dtype=dtype)
        self.key = {**key, **layout}
        self.folder = Path(folder) / hash_json(self.key)
        self._opened: dict[int, Any] = {}
        self._signature: Signature | None = None

    @property
    def num_shards(self) -> int:
        """Files of the whole cache."""
        return -(-self.num_rows // self.rows_per_shard)

    def shard_path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"shard-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """Return the shards that are not there yet."""
        return [shard for shard in range(self.num_shards) if not self.shard_path(shard).exists()]

    def share(self, process_index: int, num_processes: int) -> list[int]:
        """Return the missing shards that are this process's to compute: k with k % num_processes == process_index."""
        return [shard for shard in self.missing() if shard % num_processes == process_index]

    def fill(
        self,
        compute: Compute,
        process_index: int = 0,
        num_processes: int = 1,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> int:
        """Compute this process's share of the missing shards; return how many it has computed.

        The other processes may still be at theirs when it returns: wait for them before reading.

        Args:
            compute: returns the tensors of the rows asked for, name -> (len(rows), ...), on any device.
            process_index, num_processes: of how many processes this is which.
            progress: told after each shard how many of this share are done, of how many.
            stop: asked before each shard whether to leave the others missing.
        Raises:
            ValueError: tensors that have not one row for each row asked for.
            UserError: NaN or infinite values, values beyond the range of the stored dtype, or rows that are not like those of
                finished shards.
            MachineError: the disk is full or cannot be written; finished shards stay.
        """
        missing, share = self.missing(), self.share(process_index, num_processes)
        if share and len(missing) < self.num_shards:
            self._slices(next(shard for shard in range(self.num_shards) if shard not in missing))  # what rows are like
        if process_index == 0:
            remove_leftovers(self.folder)
            write_json(self.folder / "key.json", self.key)
        for done, shard in enumerate(share):
            if stop():
                return done
            self.fill_shard(shard, compute)
            if progress is not None:
                progress(done + 1, len(share))
        return len(share)

    def fill_shard(self, shard: int, compute: Compute) -> None:
        """Compute one shard, over what is there; arguments and errors as of `fill`."""
        rows = list(range(shard * self.rows_per_shard, min(self.num_rows, (shard + 1) * self.rows_per_shard)))
        self._write(shard, {name: self._storable(name, value, rows) for name, value in compute(rows).items()})

    def is_good(self, shard: int) -> bool:
        """Return whether a shard is there, undamaged and like those read before; reads all of it."""
        try:
            self._slices(shard)
        except UserError:
            return False
        return True

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the rows at `indices` (B,) int64, name -> (B, ...); only these are read into memory.

        Raises:
            IndexError: an index is not in 0..num_rows - 1.
            UserError: a shard is missing, damaged, or not like the others.
        """
        wanted = indices.tolist()
        if wanted and not (min(wanted) >= 0 and max(wanted) < self.num_rows):
            raise IndexError(f"rows are 0..{self.num_rows - 1}; got {min(wanted)}..{max(wanted)}")
        places = [divmod(index, self.rows_per_shard) for index in wanted]
        slices = {shard: self._slices(shard) for shard in sorted({shard for shard, _ in places})}
        names = self.signature()
        return {name: torch.cat([slices[shard][name][row : row + 1] for shard, row in places]) for name in names}

    def column(self, name: str) -> Tensor:
        """Return one tensor of all rows, (num_rows, ...), in memory; every shard is read and verified."""
        return torch.cat([self._slices(shard)[name][:] for shard in range(self.num_shards)])

    def signature(self) -> Signature:
        """Return name -> (shape of one row, dtype), from the first shard read so far."""
        if self._signature is None:
            self._slices(0)
        assert self._signature is not None
        return self._signature

    def _storable(self, name: str, value: Tensor, rows: Sequence[int]) -> Tensor:
        if value.shape[:1] != (len(rows),):
            raise ValueError(f"{name!r} must have {len(rows)} rows; got shape {tuple(value.shape)}")
        value = value.detach()
        if not value.is_floating_point():
            return _own(value)
        if not (good := _finite(value)).all():
            raise UserError(
                f"{name!r} of row {rows[_first(~good)]} has NaN or infinite values. Compute it in float32 or bfloat16."
            )
        stored = value if self.dtype is None else value.to(self.dtype)
        if not (good := _finite(stored)).all():
            raise UserError(
                f"{name!r} of row {rows[_first(~good)]} has values up to {float(value.abs().max()):g}, beyond the range of "
                f"{_name(stored.dtype)}. Store it in bfloat16 or float32."
            )
        return _own(stored)

    def _write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        self._check_signature(shard, _signature(tensors))
        write_atomic(self.shard_path(shard), save(dict(tensors), {"sha256": self._digest(shard, tensors)}))

    def _digest(self, shard: int, tensors: Mapping[str, Tensor]) -> str:
        """Return the SHA-256 of a shard's place and of all names, dtypes, shapes and values."""
        digest = hashlib.sha256(f"{self.folder.name}:{shard}".encode())
        for name, value in sorted(tensors.items()):
            digest.update(json.dumps([name, str(value.dtype), value.shape]).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _check_signature(self, shard: int, found: Signature) -> None:
        if self._signature is None:
            self._signature = found
        if found != self._signature:
            raise UserError(
                f"rows of {self.shard_path(shard)} are {_shown(found)}, those of another shard {_shown(self._signature)}; all must "
                "be alike. Delete the folder and run the same command again."
            )

    def _slices(self, shard: int) -> dict[str, Any]:
        """Return lazy slices of a shard's tensors, memory-mapped; verified when it is first opened."""
        if shard not in self._opened:
            self._opened[shard] = self._open(shard)
        return self._opened[shard]

    def _open(self, shard: int) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        path = self.shard_path(shard)
        if not path.exists():
            raise UserError(f"{path} is not there: the cache is not filled. Run the same command again to go on.")
        try:
            opened = safe_open(str(path), framework="pt")  # maps the file; holds no file descriptor
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}. Delete it and run the same command again.") from error
        if (opened.metadata() or {}).get("sha256") != self._digest(shard, tensors):
            raise UserError(
                f"{path} is damaged: its SHA-256 is not the recorded one. Delete it and run the same command again."
            )
        self._check_signature(shard, _signature(tensors))
        return {name: opened.get_slice(name) for name in tensors}


def _signature(tensors: Mapping[str, Tensor]) -> Signature:
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in sorted(tensors.items())}


def _shown(signature: Signature) -> str:
    return ", ".join(f"{name} {shape} {_name(dtype)}" for name, (shape, dtype) in signature.items())


def _own(value: Tensor) -> Tensor:
    return value.cpu().clone(memory_format=torch.contiguous_format)  # safetensors refuses tensors that share memory


def _finite(value: Tensor) -> Tensor:
    return value.isfinite().reshape(len(value), -1).all(dim=1)


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CachedSource:
    """Hands out rows of a filled cache: the tensor `x0` as clean states, every other as a value of the condition.

    Rows whose `readable` (bool) is false, because their image could not be read, are left out.
    """

    def __init__(self, cache: TensorCache) -> None:
        self.cache = cache
        names = cache.signature()
        self.rows = cache.column(READABLE).nonzero().squeeze(1) if READABLE in names else torch.arange(cache.num_rows)
        if not len(self.rows):
            raise UserError(f"none of the {cache.num_rows} images in {cache.folder} could be read.")

    @property
    def num_samples(self) -> int:
        """Rows that are handed out."""
        return len(self.rows)

    def take(self, indices: Tensor, generator: torch.Generator) -> Sample:
        """Return the rows at `indices`; nothing is drawn."""
        values = self.cache.rows(self.rows[indices])
        values.pop(READABLE, None)
        x0 = values.pop(X0, None)
        return Sample(None if x0 is None else x0.to(torch.float32), values)
