"""The weights of feature networks: which files there can be, and the store of those that a user brought.

A slot is a place for the weights of one network. Nothing is ever downloaded: a slot says which file of which project fills it, and
`diffdistill weights add SLOT FILE` reads the file with the network's own strict loader before it is kept. The store is a folder

    SLOT/manifest.json      what was added: sha256, size and time of each file, fingerprint of the loaded network, note, date
    SLOT/ROLE/NAME          the file (or folder, or a link to either), under the name it came with

Size and time are looked at whenever a file is used, its sha256 by `verify`, the fingerprint by both.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from diffdistill.errors import UserError, unknown_name
from diffdistill.evaluation.networks.clip_towers import TOWERS
from diffdistill.evaluation.networks.pair_scores import HEAD_FILE, HPS_FILES, PICKSCORE
from diffdistill.files import CACHE, atomic_folder, hash_json, sha256, write_json
from diffdistill.mistakes import checked

MANIFEST = "manifest.json"
FOLDER_VARIABLE = "DIFFDISTILL_WEIGHTS"


def weights_folder() -> Path:
    """Return the folder of the store: DIFFDISTILL_WEIGHTS, or ~/.cache/diffdistill/weights."""
    return Path(os.environ.get(FOLDER_VARIABLE) or CACHE / "weights")


class Network(Protocol):
    """What a loader returns: `fingerprint` is the hex sha256 of its weights, whatever file they came from."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the weights."""
        ...


class Part(NamedTuple):
    """One of the files of a slot: its role in the network, and which files of which projects it can be, as a phrase."""

    role: str
    takes: str


@dataclass(frozen=True)
class WeightSlot:
    """A place for the weights of one network.

    Attributes:
        name: as the command line spells it.
        what: the network and what it is for, as one phrase.
        parts: the files it needs, in the order in which the loader takes them.
        loader: "module:attribute" of the network's class. Its `load(*paths, **options)` reads the files on the CPU and refuses
            others with a UserError; its `random(seed, **options)` makes the network that tests use. Imported on first use.
        options: what tells this network from others of its class.
    """

    name: str
    what: str
    parts: tuple[Part, ...]
    loader: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, paths: Sequence[Path], **options: Any) -> Network:
        """Read the network from one path for each part; `options` go before the slot's own.

        Raises:
            UserError: the number of paths is another, or the loader refuses one.
        """
        if len(paths) != len(self.parts):
            raise UserError(
                f"slot {self.name!r} takes {len(self.parts)} file{'s' * (len(self.parts) > 1)}, not {len(paths)}: write `{self.command}` "
                f"with the path of {self.wanted}."
            )
        return self._class().load(*paths, **{**self.options, **options})

    def random(self, seed: int, **options: Any) -> Network:
        """Return the network with random weights, for tests; its name says INVALID."""
        return self._class().random(seed, **{**self.options, **options})

    @property
    def wanted(self) -> str:
        """Which files of which projects, as a phrase."""
        if len(self.parts) == 1:
            return self.parts[0].takes
        return "; ".join(f"{part.role}: {part.takes}" for part in self.parts)

    @property
    def command(self) -> str:
        """How the slot is filled."""
        roles = ["FILE"] if len(self.parts) == 1 else [part.role.upper() for part in self.parts]
        return f"diffdistill weights add {self.name} {' '.join(roles)}"

    def _class(self) -> Any:
        module, _, attribute = self.loader.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _slots() -> Iterator[WeightSlot]:
    networks = "diffdistill.evaluation.networks"
    yield WeightSlot(
        "inception",
        "Inception v3 of 2015-12-05, for FID, sFID, KID, Inception score, precision and recall",
        (
            Part(
                "weights",
                "inception-2015-12-05.pt (TorchScript of StyleGAN and clean-fid), pt_inception-2015-12-05-6726825d.pth (state dict of "
                "pytorch-fid), or weights-inception-2015-12-05-6726825d.pth (state dict of torch-fidelity)",
            ),
        ),
        f"{networks}.inception:Inception",
    )
    for size in "sblg":
        name = f"dinov2-vit-{size}-14"
        file = f"dinov2_vit{size}14_pretrain.pth (state dict of facebookresearch/dinov2, without registers)"
        what = f"DINOv2 ViT-{size.upper() if size != 'g' else size}/14, for FD-DINOv2, precision and recall, Vendi"
        yield WeightSlot(name, what, (Part("weights", file),), f"{networks}.dinov2:DINOv2", {"name": name})
    yield WeightSlot(
        "vgg16",
        "VGG16, for the precision and recall of StyleGAN",
        (Part("weights", "vgg16-397923af.pth (state dict of torchvision), or vgg16.pt (TorchScript of StyleGAN2-ADA)"),),
        f"{networks}.vgg16:VGG16",
    )
    for net, backbone in (("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")):
        yield WeightSlot(
            f"lpips-{net}",
            "LPIPS, for the diversity within a prompt",
            (
                Part("backbone", f"{backbone} (state dict of torchvision)"),
                Part("linear", f"lpips/weights/v0.1/{net}.pth (state dict in the package lpips)"),
            ),
            f"{networks}.lpips:LPIPS",
            {"net": net},
        )
    for tower in TOWERS.values():
        if tower.prefix is None:  # other captions, but the same weights
            what = f"CLIP at {tower.size} pixels, {tower.activation}: CLIP score, CLIP-FID, CMMD"
            yield WeightSlot(tower.name, what, (Part("weights", tower.source),), f"{networks}.clip:Clip", {"tower": tower})
    yield WeightSlot("pickscore", "PickScore", (Part("weights", PICKSCORE.source),), f"{networks}.pair_scores:PickScore")
    for version, file in HPS_FILES.items():
        part = Part("weights", f"{file} (checkpoint of xswu/HPSv2)")
        yield WeightSlot(f"hps-{version}", f"HPS {version}", (part,), f"{networks}.pair_scores:Hps", {"version": version})
    yield WeightSlot(
        "aesthetic",
        "LAION's aesthetic score",
        (Part("clip", TOWERS["clip-vit-l-14"].source), Part("head", f"{HEAD_FILE} (of improved-aesthetic-predictor)")),
        f"{networks}.pair_scores:Aesthetic",
    )
    yield WeightSlot(
        "image-reward",
        "ImageReward",
        (Part("weights", "ImageReward.pt (of THUDM/ImageReward)"), Part("vocabulary", "vocab.txt (of bert-base-uncased)")),
        f"{networks}.image_reward:ImageReward",
    )


SLOTS: dict[str, WeightSlot] = {slot.name: slot for slot in _slots()}


# What is kept


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredFile(_Frozen):
    """A file as it was when it was added."""

    sha256: str = Field(description="hex")
    size: int = Field(description="bytes")
    mtime_ns: int = Field(description="time of its last change, in nanoseconds; that of the target where it is a link")

    @classmethod
    def of(cls, path: Path) -> StoredFile:
        """Read the file whole."""
        return cls(sha256=sha256(path), size=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns)

    def looks_unchanged(self, path: Path) -> bool:
        """Return whether the file has the same size and time, without reading it."""
        return path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (self.size, self.mtime_ns)


class Manifest(_Frozen):
    """What was added to a slot. Its file also holds a checksum of all this, which tells damage."""

    slot: str = Field(description="name of the slot")
    parts: dict[str, str] = Field(description="place of the file or folder of each role, below the slot's folder")
    files: dict[str, StoredFile] = Field(description="every file by its place below the slot's folder")
    linked: bool = Field(description="whether the parts are links to files elsewhere")
    fingerprint: str = Field(description="of the loaded network, see models.fingerprint")
    note: str = Field(description="where the user says that the files come from")
    date: str = Field(description="when they were added, ISO 8601, UTC")

    @field_validator("parts", "files")
    @classmethod
    def _inside(cls, places: dict[str, Any]) -> dict[str, Any]:
        paths = [place if isinstance(place, str) else name for name, place in places.items()]
        for path in map(PurePosixPath, paths):
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{str(path)!r} leaves the folder of the slot")
        return places


class Check(NamedTuple):
    """What `verify` found of one slot."""

    slot: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class WeightStore:
    """The weights in a folder, by slot."""

    folder: Path = field(default_factory=weights_folder)
    slots: Mapping[str, WeightSlot] = field(default_factory=lambda: SLOTS)

    def slot(self, name: str) -> WeightSlot:
        """Return the slot of that name; raises UserError, with the nearest name, where there is none."""
        if name not in self.slots:
            raise unknown_name("weight slot", name, self.slots)
        return self.slots[name]

    def add(self, name: str, paths: Sequence[str | Path], note: str = "", link: bool = False) -> Manifest:
        """Read the network from its files and, if they are its own, keep them: all of them, or nothing.

        Args:
            name: of the slot.
            paths: a file, or a folder where the format is one, for each part in the order of the slot.
            note: where they come from, in the user's words.
            link: keep links to the files instead of copies.
        Raises:
            UserError: unknown slot, files that are not there or not of this network, or a slot that holds other weights.
            MachineError: the disk is full or the folder cannot be written.
        """
        slot, sources = self.slot(name), [Path(path).absolute() for path in paths]
        for source in sources:
            if source.resolve().is_relative_to(self.folder.resolve()):
                raise UserError(f"{source} lies in the store of weights already. Name a file outside of {self.folder}.")
        fingerprint = slot.load(sources).fingerprint
        self._refuse_other(name, fingerprint)
        with atomic_folder(self.folder / name) as folder:
            parts = {part.role: f"{part.role}/{source.name}" for part, source in zip(slot.parts, sources, strict=True)}
            for place, source in zip(parts.values(), sources, strict=True):
                _keep(source, folder / place, link)
            manifest = Manifest(
                slot=name,
                parts=parts,
                files={path.relative_to(folder).as_posix(): StoredFile.of(path) for path in _files(folder, parts)},
                linked=link,
                fingerprint=fingerprint,
                note=note,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _write(manifest, folder)
        return manifest

    def manifest(self, name: str) -> Manifest | None:
        """Return what was added to a slot, None where nothing was; its files are not looked at.

        Raises:
            UserError: unknown slot, or a damaged manifest.
        """
        slot, path = self.slot(name), self.folder / name / MANIFEST
        if not path.exists():
            return None
        again = f"Remove {path.parent} and add the weights again: `{slot.command}`."
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            undamaged = values.pop("checksum") == hash_json(values)
        except (ValueError, KeyError, AttributeError, TypeError):  # of JSON, of text, of something that is no mapping
            undamaged = False
        if not undamaged:
            raise UserError(f"{path} is damaged. {again}")
        manifest = checked(TypeAdapter(Manifest), values, str(path))
        if manifest.slot != name or list(manifest.parts) != [part.role for part in slot.parts]:
            raise UserError(f"{path} belongs to another slot, or to another version of this one. {again}")
        return manifest

    def files(self, name: str) -> tuple[Path, ...]:
        """Return the path of each part of a slot, in its order, after a look at size and time of every file.

        Raises:
            UserError: unknown slot, one without weights (naming the files it takes), damaged or changed since.
        """
        slot, manifest = self.slot(name), self.manifest(name)
        if manifest is None:
            raise UserError(
                f"there are no weights for {name!r} ({slot.what}). Nothing is downloaded here: run `{slot.command}` with the path of "
                f"{slot.wanted}. It keeps them in {self.folder}."
            )
        for place, stored in manifest.files.items():
            path = self.folder / name / place
            if not stored.looks_unchanged(path):
                state = "was changed" if path.exists() else "was moved or removed"
                raise UserError(
                    f"{path} of slot {name!r} {state} since it was added on {manifest.date}. `diffdistill weights verify {name}` "
                    f"compares its contents; remove {self.folder / name} and run `{slot.command}` to add it again."
                )
        return tuple(self.folder / name / place for place in manifest.parts.values())

    def load(self, name: str, **options: Any) -> Network:
        """Return the network of a slot, on the CPU, its weights those that were added.

        Args:
            name: of the slot.
            options: of the network's `load`, where they are not the slot's: the scaling of Inception, a tower with other captions.

        Raises:
            UserError: as `files`, or the network has another fingerprint than when it was added.
        """
        network, manifest = self.slot(name).load(self.files(name), **options), self.manifest(name)
        if manifest is None or network.fingerprint != manifest.fingerprint:
            raise UserError(
                f"slot {name!r} gives other weights than when it was added; `diffdistill weights verify {name}` says why."
            )
        return network

    def verify(self, names: Sequence[str] = ()) -> list[Check]:
        """Hash every file again, load every network again and compare; all slots with weights where no names are given.

        A file whose contents are the same but whose time is not, as after moving the store, is noted with its new time.

        Raises:
            UserError: unknown slot.
        """
        filled = [name for name in self.slots if (self.folder / name / MANIFEST).exists()]
        return [self._verify(self.slot(name)) for name in names or filled]

    def table(self) -> list[dict[str, Any]]:
        """Return a row per slot: name, state (absent, present, unusable), what it is, the file or files, note and date."""
        return [self._row(slot) for slot in self.slots.values()]

    def _row(self, slot: WeightSlot) -> dict[str, Any]:
        row = {"slot": slot.name, "state": "absent", "what": slot.what, "takes": slot.wanted, "files": [], "linked": False}
        row |= {"sha256": [], "fingerprint": None, "note": None, "date": None}
        try:
            manifest = self.manifest(slot.name)
            if manifest is None:
                return row
            row |= manifest.model_dump(include={"linked", "fingerprint", "note", "date"})
            row |= {"files": list(manifest.files), "sha256": [stored.sha256 for stored in manifest.files.values()]}
            self.files(slot.name)
        except UserError as error:
            return row | {"state": "unusable", "problem": str(error)}
        return row | {"state": "present"}

    def _verify(self, slot: WeightSlot) -> Check:
        try:
            manifest = self.manifest(slot.name)
            if manifest is None:
                return Check(slot.name, False, f"no weights; add {slot.wanted}")
            folder = self.folder / slot.name
            found = {}
            for place, stored in manifest.files.items():
                if not (folder / place).is_file():
                    return Check(slot.name, False, f"{folder / place} was moved or removed")
                found[place] = StoredFile.of(folder / place)
                if found[place].sha256 != stored.sha256:
                    return Check(slot.name, False, f"{folder / place} holds something else than when it was added")
            if slot.load([folder / place for place in manifest.parts.values()]).fingerprint != manifest.fingerprint:
                return Check(slot.name, False, "the same files give a network of other weights: its loader has changed")
        except UserError as error:
            return Check(slot.name, False, str(error))
        if found != manifest.files:
            _write(manifest.model_copy(update={"files": found}), folder)
        return Check(slot.name, True, f"fingerprint {manifest.fingerprint[:16]}, {len(found)} file{'s' * (len(found) > 1)}")

    def _refuse_other(self, name: str, fingerprint: str) -> None:
        """Refuse to put other weights in the place of some: numbers measured with the old ones would seem to be of the new ones."""
        old, folder = self.manifest(name), self.folder / name
        if old is None and folder.exists():
            raise UserError(f"{folder} holds something that was not added by `diffdistill weights add`. Move it away first.")
        if old is not None and old.fingerprint != fingerprint:
            raise UserError(
                f"slot {name!r} holds other weights, added on {old.date}. Remove {folder} first if these shall replace them."
            )


def _keep(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir()
    if link:
        target.symlink_to(source)
    elif source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _files(folder: Path, parts: Mapping[str, str]) -> list[Path]:
    """Return every file of the parts, those inside folders in order of their names."""
    paths = [folder / place for place in parts.values()]
    return [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()]


def _write(manifest: Manifest, folder: Path) -> None:
    values = manifest.model_dump(mode="json")
    write_json(folder / MANIFEST, {**values, "checksum": hash_json(values)})
