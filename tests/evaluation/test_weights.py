"""The weight store: what is kept is what was read, and anything that is not is said, on a network of three numbers."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffdistill import cli
from diffdistill.errors import UserError
from diffdistill.evaluation import weights
from diffdistill.evaluation.networks.inception import Inception
from diffdistill.evaluation.weights import MANIFEST, SLOTS, Manifest, Part, WeightSlot, WeightStore
from diffdistill.files import hash_json
from diffdistill.models.fingerprint import weights_fingerprint


class Tiny(nn.Module):
    """A network with one weight for each of its files; `scale` tells one of its sizes from another."""

    def __init__(self, name: str, values: list[torch.Tensor], scale: float = 1):
        super().__init__()
        self.name, self.scale = name, scale
        self.values = nn.ParameterList(values)

    @property
    def fingerprint(self) -> str:
        return weights_fingerprint(self)

    @classmethod
    def load(cls, *paths: Path, scale: float = 1) -> Tiny:
        values = []
        for number, path in enumerate(paths):
            try:
                file = path / "part.pt" if path.is_dir() else path
                stored = torch.load(file, weights_only=True)
                values.append(stored[f"part{number}"])
            except Exception as error:  # torch meets foreign bytes with a dozen kinds of error
                raise UserError(f"{path} is no part {number} of Tiny.") from error
        return cls("tiny", values, scale)

    @classmethod
    def random(cls, seed: int, scale: float = 1) -> Tiny:
        generator = torch.Generator().manual_seed(seed)
        return cls(f"tiny-random-{seed}-INVALID", [torch.randn(3, generator=generator)], scale)


def slot(name: str, *roles: str, **options: Any) -> WeightSlot:
    parts = tuple(Part(role, f"{role}.pt (state dict of the tiny project)") for role in roles)
    return WeightSlot(name, "three numbers", parts, f"{__name__}:Tiny", options)


TINY = {
    "tiny-one": slot("tiny-one", "net"),
    "tiny-two": slot("tiny-two", "backbone", "linear", scale=2.0),
    "tiny-three": slot("tiny-three", "net"),
}


@pytest.fixture
def store(tmp_path) -> WeightStore:
    return WeightStore(tmp_path / "store", TINY)


def weight_file(path: Path, part: int = 0, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"part{part}": torch.full((3,), value)}, path)
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return weight_file(tmp_path / "given" / "tiny.pt")


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is added is found again


def test_a_file_that_was_added_gives_the_same_network_wherever_the_original_went(store, file):
    manifest = store.add("tiny-one", [file], note="from a friend")
    fingerprint = Tiny.load(file).fingerprint
    file.unlink()
    (path,) = store.files("tiny-one")
    assert path == store.folder / "tiny-one" / "net" / "tiny.pt" and not path.is_symlink()
    assert store.load("tiny-one").fingerprint == manifest.fingerprint == fingerprint
    assert store.manifest("tiny-one") == manifest and manifest.note == "from a friend"
    assert [check.passed for check in store.verify()] == [True]


def test_parts_reach_the_loader_in_the_order_of_the_slot_with_its_options(store, tmp_path):
    files = [weight_file(tmp_path / "b.pt", 0, 1.0), weight_file(tmp_path / "l.pt", 1, 2.0)]
    store.add("tiny-two", files)
    network = store.load("tiny-two")
    assert [float(value[0]) for value in network.values] == [1, 2] and network.scale == 2
    assert store.load("tiny-two", scale=3.0).scale == TINY["tiny-two"].random(5, scale=3.0).scale == 3
    assert TINY["tiny-two"].random(5).name == "tiny-random-5-INVALID" and TINY["tiny-two"].random(5).scale == 2
    with pytest.raises(UserError, match="is no part 0"):
        store.slots["tiny-two"].load(files[::-1])


def test_parts_of_the_same_name_do_not_overwrite_each_other(store, tmp_path):
    store.add("tiny-two", [weight_file(tmp_path / "a" / "x.pt", 0, 1.0), weight_file(tmp_path / "b" / "x.pt", 1, 2.0)])
    assert [float(value[0]) for value in store.load("tiny-two").values] == [1, 2]


def test_a_folder_is_kept_whole_and_each_of_its_files_is_watched(store, tmp_path):
    weight_file(tmp_path / "given" / "part.pt")
    (tmp_path / "given" / "inner").mkdir()
    (tmp_path / "given" / "inner" / "config.json").write_text("{}")
    manifest = store.add("tiny-one", [tmp_path / "given"])
    assert set(manifest.files) == {"net/given/part.pt", "net/given/inner/config.json"}
    assert store.load("tiny-one").name == "tiny"
    (store.folder / "tiny-one" / "net" / "given" / "inner" / "config.json").write_text("{ }")
    with pytest.raises(UserError, match="config.json"):
        store.files("tiny-one")


def test_a_file_that_is_a_link_itself_keeps_the_name_it_was_given_by(store, file, tmp_path):
    """Caches of hubs hold links with names to files without; loaders go by the ending."""
    (tmp_path / "HPS_v2.1.pt").symlink_to(file)
    for link in (False, True):
        store.add("tiny-one", [tmp_path / "HPS_v2.1.pt"], link=link)
        assert store.files("tiny-one")[0].name == "HPS_v2.1.pt"


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_link_is_watched_as_a_copy_is_and_losing_it_loses_no_original(store, tmp_path, of):
    file = weight_file(tmp_path / "given" / "part.pt")
    store.add("tiny-one", [file if of == "file" else file.parent], link=True)
    (path,) = store.files("tiny-one")
    assert path.is_symlink() and path.samefile(file if of == "file" else file.parent)
    assert [check.passed for check in store.verify()] == [True]
    shutil.rmtree(store.folder)
    assert file.is_file()
    store.add("tiny-one", [file if of == "file" else file.parent], link=True)
    file.unlink()
    with pytest.raises(UserError, match="was moved or removed"):
        store.files("tiny-one")
    assert "was moved or removed" in store.verify()[0].detail


def test_files_are_read_once_more_only_to_verify(store, file, monkeypatch):
    store.add("tiny-one", [file])
    monkeypatch.setattr(weights, "sha256", lambda path: pytest.fail("hashed"))
    assert store.files("tiny-one")


# A slot without weights, and one that there is not


def test_an_empty_slot_names_file_format_project_and_command(store):
    with pytest.raises(UserError) as caught:
        store.files("tiny-two")
    said = str(caught.value)
    for part in ("'tiny-two'", "three numbers", "backbone: backbone.pt (state dict of the tiny project)", "linear: linear.pt"):
        assert part in said
    assert "`diffdistill weights add tiny-two BACKBONE LINEAR`" in said
    assert store.verify(["tiny-two"])[0].passed is False and store.verify() == []


@pytest.mark.parametrize("use", ["files", "manifest", "load", "add", "verify"])
def test_an_unknown_slot_gives_the_nearest_name(store, file, use):
    with pytest.raises(UserError, match="unknown weight slot 'tiny-on'. Did you mean 'tiny-one'"):
        {
            "add": lambda: store.add("tiny-on", [file]),
            "verify": lambda: store.verify(["tiny-on"]),
        }.get(use, lambda: getattr(store, use)("tiny-on"))()


@pytest.mark.parametrize("name", ["../tiny-one", "/tmp", ".", "tiny-one/../.."])
def test_a_slot_name_cannot_leave_the_store(store, file, name):
    with pytest.raises(UserError, match="unknown weight slot"):
        store.add(name, [file])
    assert not store.folder.exists()


# Files that are refused leave nothing behind


def refused_files(tmp_path: Path) -> dict[str, list[Path]]:
    good = weight_file(tmp_path / "good.pt")
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(good.read_bytes()[:-100])
    text = tmp_path / "text.pt"
    text.write_text("a page that says 404")
    return {
        "truncated": [truncated],
        "of another network": [weight_file(tmp_path / "other.pt", part=7)],
        "text": [text],
        "absent": [tmp_path / "absent.pt"],
        "too many": [good, good],
        "none": [],
    }


@pytest.mark.parametrize("which", ["truncated", "of another network", "text", "absent", "too many", "none"])
def test_wrong_files_are_refused_by_name_and_nothing_is_kept(store, tmp_path, which):
    files = refused_files(tmp_path)[which]
    with pytest.raises(UserError) as caught:
        store.add("tiny-one", files)
    assert (str(files[0]) if len(files) == 1 else f"takes 1 file, not {len(files)}") in str(caught.value)
    assert not store.folder.exists()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_add_leaves_what_was_there_before(store, file, monkeypatch, stop, link):
    before = everything(file.parent)

    def interrupted(path: Path) -> str:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(weights, "sha256", interrupted)
        with pytest.raises(stop):
            store.add("tiny-one", [file], link=link)
    assert list(store.folder.iterdir()) == [] and everything(file.parent) == before
    store.add("tiny-one", [file])
    kept = everything(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "sha256", interrupted)
        with pytest.raises(stop):
            store.add("tiny-one", [file], link=link)
    assert everything(store.folder) == kept and store.load("tiny-one")


def test_other_weights_do_not_take_the_place_of_some_but_the_same_may_be_added_again(store, file, tmp_path):
    store.add("tiny-one", [file])
    with pytest.raises(UserError, match="holds other weights"):
        store.add("tiny-one", [weight_file(tmp_path / "other.pt", value=2.0)])
    assert float(store.load("tiny-one").values[0][0]) == 1
    store.add("tiny-one", [weight_file(tmp_path / "renamed.pt")], note="again")
    assert store.files("tiny-one")[0].name == "renamed.pt" and store.manifest("tiny-one").note == "again"


def test_a_file_put_into_the_store_by_hand_is_not_thrown_away(store, file):
    by_hand = weight_file(store.folder / "tiny-one" / "net" / "tiny.pt")
    with pytest.raises(UserError, match="was not added"):
        store.add("tiny-one", [file])
    assert by_hand.is_file()


def test_a_link_from_the_store_into_itself_does_not_lose_the_only_copy(store, file):
    store.add("tiny-one", [file])
    (path,) = store.files("tiny-one")
    with pytest.raises(UserError, match="lies in the store"):
        store.add("tiny-one", [path], link=True)
    assert store.load("tiny-one") and not path.is_symlink()


# What changed afterwards


def test_a_file_of_another_size_is_refused_at_use_and_by_verify(store, file):
    store.add("tiny-one", [file])
    (path,) = store.files("tiny-one")
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="was changed since it was added"):
        store.load("tiny-one")
    assert "something else" in store.verify()[0].detail and not store.verify()[0].passed


def test_a_flipped_bit_under_the_old_size_and_time_is_found_by_verify(store, file):
    store.add("tiny-one", [file])
    (path,) = store.files("tiny-one")
    times, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(torch.ones(3).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.files("tiny-one")
    with pytest.raises(UserError, match="other weights than when it was added"):
        store.load("tiny-one")
    assert not store.verify()[0].passed


def test_verify_takes_note_of_a_new_time_where_the_contents_are_the_same(store, file):
    store.add("tiny-one", [file])
    os.utime(store.files("tiny-one")[0], ns=(1, 1))
    with pytest.raises(UserError, match="diffdistill weights verify tiny-one"):
        store.files("tiny-one")
    assert store.verify()[0].passed and store.files("tiny-one")


def test_a_loader_that_reads_the_same_file_otherwise_is_found(store, file, monkeypatch):
    store.add("tiny-one", [file])
    monkeypatch.setattr(Tiny, "fingerprint", "0" * 64)
    assert "loader has changed" in store.verify()[0].detail
    with pytest.raises(UserError, match="other weights than when it was added"):
        store.load("tiny-one")


def test_no_byte_of_a_manifest_can_change_unnoticed(store, file):
    store.add("tiny-one", [file], note="a note that nothing depends on")
    path = store.folder / "tiny-one" / MANIFEST
    content = path.read_bytes()
    for place in range(len(content) - 1):  # the last byte is the end of the line
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            store.manifest("tiny-one")
    assert store.table()[0]["state"] == "unusable" and not store.verify(["tiny-one"])[0].passed


@pytest.mark.parametrize("place", ["../../secret.pt", "/etc/passwd", "net/../../../secret.pt"])
@pytest.mark.parametrize("where", ["parts", "files"])
def test_a_manifest_cannot_point_out_of_its_slot(store, file, place, where):
    values = store.add("tiny-one", [file]).model_dump(mode="json")
    values[where] = {"net": place} if where == "parts" else {place: next(iter(values["files"].values()))}
    text = json.dumps({**values, "checksum": hash_json(values)})
    (store.folder / "tiny-one" / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="leaves the folder"):
        store.files("tiny-one")


def test_the_manifest_of_another_slot_is_refused(store, file):
    store.add("tiny-one", [file])
    for other in ("tiny-two", "tiny-three"):
        shutil.copytree(store.folder / "tiny-one", store.folder / other)
        with pytest.raises(UserError, match="belongs to another slot"):
            store.files(other)


# The slots that there are


@pytest.mark.parametrize("name", SLOTS)
def test_every_slot_has_a_loader_that_takes_its_files_and_says_which_they_are(name):
    slot = SLOTS[name]
    roles = [part.role for part in slot.parts]
    assert slot.name == name and name in slot.command and slot.what
    assert len(set(roles)) == len(roles) >= 1 and all(role.isidentifier() for role in roles)
    assert all(part.takes and "://" not in part.takes for part in slot.parts)
    with pytest.raises(UserError, match="/nowhere/weights.pt"):
        slot.load([Path("/nowhere/weights.pt")] * len(slot.parts))
    inspect.signature(slot._class().random).bind(0, **slot.options)


# The verbs, on the real slot of FID's network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A state dict under pytorch-fid's names."""
    from diffdistill.evaluation.networks.inception import STATE_DICT

    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(dict(STATE_DICT.parts(Inception.random(0))), path)
    return path


def test_the_verbs_add_list_and_verify(inception_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(tmp_path / "store"))
    assert cli.main(["weights", "list"]) == 0
    assert "absent" in capsys.readouterr().out
    assert cli.main(["weights", "verify", "inception"]) == 1
    assert "inception-2015-12-05.pt (TorchScript of" in capsys.readouterr().out
    assert cli.main(["weights", "add", "inception", str(inception_file), "--note", "made here", "--link"]) == 0
    assert (tmp_path / "store" / "inception" / "weights" / inception_file.name).is_symlink()
    capsys.readouterr()
    assert cli.main(["weights", "list", "--json"]) == 0
    row = next(row for row in json.loads(capsys.readouterr().out) if row["slot"] == "inception")
    assert (row["state"], row["note"], row["linked"]) == ("present", "made here", True)
    assert row["fingerprint"] == Inception.load(inception_file).fingerprint
    assert cli.main(["weights", "verify"]) == 0
    assert "ok" in capsys.readouterr().out
    (tmp_path / "store" / "inception" / "weights" / inception_file.name).unlink()
    assert cli.main(["weights", "verify"]) == 1
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["add", "incepton", "x.pt"], "Did you mean 'inception'?"),
        (["add", "inception"], "weights add inception FILE"),
        (["add", "inception", "absent.pt"], "absent.pt"),
        (["verify", "incepton"], "Did you mean 'inception'?"),
        (["ad"], "Did you mean 'add'? Known: add, list, verify."),
    ],
)
def test_a_wrong_command_is_one_message_and_status_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(tmp_path / "store"))
    assert cli.main(["weights", *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_the_manifest_on_disk_is_what_was_returned(store, file):
    manifest = store.add("tiny-one", [file])
    values = json.loads((store.folder / "tiny-one" / MANIFEST).read_text())
    assert values.pop("checksum") and Manifest.model_validate(values) == manifest
