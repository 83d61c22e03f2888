import errno
import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffdistill.data.batches import Sample
from diffdistill.data.cache import CachedSource, TensorCache, content_key
from diffdistill.errors import MachineError, UserError

KEY = content_key(teacher="abc", prompts=["a cat", "a dog"], size=8)


def row(index: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(index))


def compute(rows: list[int]) -> dict[str, torch.Tensor]:
    """Embeddings and masks that depend on the row alone."""
    embeds = torch.stack([row(index) for index in rows])
    return {"encoder_hidden_states": embeds, "mask": embeds[:, :, 0] > 0, "index": torch.tensor(rows)}


class Counted:
    """`compute` that notes what was asked for, and stops like a killed process at a given call."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.stop_at = stop_at

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(rows)
        return compute(rows)


def make(folder, num_rows: int = 10, **options) -> TensorCache:
    return TensorCache(folder, KEY, num_rows, **({"rows_per_shard": 4} | options))


def files_of(cache: TensorCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.folder.iterdir())}


def test_rows_are_handed_out_in_the_order_asked_for(tmp_path):
    cache = make(tmp_path)
    assert cache.missing() == [0, 1, 2] and cache.fill(compute) == 3 and cache.missing() == []
    wanted = torch.tensor([9, 0, 4, 3, 9])
    for reader in (cache, make(tmp_path)):
        rows = reader.rows(wanted)
        for name, value in compute(wanted.tolist()).items():
            assert torch.equal(rows[name], value) and rows[name].dtype == value.dtype
    assert torch.equal(cache.column("index"), torch.arange(10))
    with pytest.raises(IndexError, match=r"rows are 0\.\.9; got -1\.\.2"):
        cache.rows(torch.tensor([2, -1]))
    with pytest.raises(IndexError, match=r"rows are 0\.\.9; got 10\.\.10"):
        cache.rows(torch.tensor([10]))


def test_a_reader_can_change_what_it_got_and_the_cache_stays(tmp_path):
    cache = make(tmp_path)
    cache.fill(compute)
    cache.rows(torch.tensor([1]))["index"].zero_()
    cache.column("index").zero_()
    assert cache.rows(torch.tensor([1]))["index"].item() == 1
    assert make(tmp_path).rows(torch.tensor([1]))["index"].item() == 1


def test_a_shard_is_a_plain_safetensors_file_of_its_rows(tmp_path):
    cache = make(tmp_path)
    cache.fill(compute)
    assert [name for name in files_of(cache) if name != "key.json"] == [f"shard-0000{k}.safetensors" for k in range(3)]
    assert torch.equal(load_file(str(cache.shard_path(2)))["index"], torch.tensor([8, 9]))
    assert json.loads((cache.folder / "key.json").read_text()) == {
        **KEY,
        "num_rows": 10,
        "rows_per_shard": 4,
        "stored_dtype": None,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_rows_are_stored_in_the_asked_dtype_and_others_as_they_are(tmp_path, dtype):
    cache = make(tmp_path, dtype=dtype)
    cache.fill(compute)
    rows = cache.rows(torch.arange(10))
    assert torch.equal(rows["encoder_hidden_states"], compute(list(range(10)))["encoder_hidden_states"].to(dtype))
    assert rows["mask"].dtype == torch.bool and rows["index"].dtype == torch.int64


def test_a_filled_cache_is_never_computed_again(tmp_path):
    make(tmp_path).fill(compute)
    before, again = files_of(make(tmp_path)), Counted()
    assert make(tmp_path).fill(again) == 0 and again.asked == []
    assert files_of(make(tmp_path)) == before


def test_filling_goes_on_where_it_was_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path).fill(Counted(stop_at=2))
    assert make(tmp_path).missing() == [2]
    rest = Counted()
    assert make(tmp_path).fill(rest) == 1 and rest.asked == [[8, 9]]
    make(tmp_path / "whole").fill(compute)
    stopped = {name: hashlib.sha256(content).digest() for name, content in files_of(make(tmp_path)).items()}
    whole = {name: hashlib.sha256(content).digest() for name, content in files_of(make(tmp_path / "whole")).items()}
    assert stopped == whole


def test_a_process_killed_while_it_writes_leaves_no_shard(tmp_path):
    """kill -9 in the middle of the second shard's file; the next run computes the second shard and the third."""
    child = os.fork()
    if child == 0:
        real = os.fsync

        def killed(handle: int) -> None:
            if ".shard-00001" in os.readlink(f"/proc/self/fd/{handle}"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = killed
        try:
            make(tmp_path).fill(compute)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    cache = make(tmp_path)
    assert [path.name for path in cache.folder.glob(".shard*")] and cache.missing() == [1, 2]
    cache.fill(compute)
    assert torch.equal(cache.column("index"), torch.arange(10))


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_the_work_by_shard_and_together_fill_the_cache(tmp_path, num_processes):
    asked = []
    for index in reversed(range(num_processes)):
        counted = Counted()
        make(tmp_path).fill(counted, index, num_processes)
        assert [rows[0] // 4 % num_processes for rows in counted.asked] == [index] * len(counted.asked)
        asked += counted.asked
    assert sorted(asked) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert torch.equal(make(tmp_path).column("index"), torch.arange(10))


def test_another_number_of_processes_computes_only_what_is_missing(tmp_path):
    make(tmp_path, 20).fill(compute, 1, 2)
    rest = Counted()
    for index in range(3):
        make(tmp_path, 20).fill(rest, index, 3)
    assert sorted(rows[0] for rows in rest.asked) == [0, 8, 16]


def test_progress_counts_the_shards_of_this_process(tmp_path):
    told = []
    make(tmp_path, 20).fill(compute, 0, 2, lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_whatever_decides_the_content_decides_the_folder(tmp_path):
    caches = [
        TensorCache(tmp_path, key, num_rows, per_shard, dtype)
        for key, num_rows, per_shard, dtype in [
            (KEY, 10, 4, None),
            (KEY, 11, 4, None),
            (KEY, 10, 5, None),
            (KEY, 10, 4, torch.float16),
            (KEY, 10, 4, torch.bfloat16),
            (content_key(teacher="abd", prompts=["a cat", "a dog"], size=8), 10, 4, None),
            (content_key(teacher="abc", prompts=["a dog", "a cat"], size=8), 10, 4, None),
            (content_key(teacher="abc", prompts=["a cat", "a dog"], size=16), 10, 4, None),
        ]
    ]
    assert len({cache.folder for cache in caches}) == len(caches)
    order = content_key(size=8, prompts=["a cat", "a dog"], teacher="abc")
    assert TensorCache(tmp_path, order, 10, 4).folder == caches[0].folder


def test_a_key_is_readable_where_it_is_short_and_a_hash_where_it_is_long():
    assert content_key(teacher="sd15", size=(512, 768), dtype=torch.float16, null=None) == {
        "teacher": "sd15",
        "size": [512, 768],
        "dtype": "float16",
        "null": None,
    }
    prompts = [f"prompt {k}" for k in range(100)]
    key = content_key(prompts=prompts)
    assert key["prompts"].startswith("sha256:") and len(key["prompts"]) == 71
    assert content_key(prompts=list(prompts)) == key != content_key(prompts=prompts[::-1])
    with pytest.raises(TypeError, match="teacher of a content key must hold plain values; got .* of type object"):
        content_key(teacher=object())


def damage(path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def refused(cache: TensorCache, shard: int) -> str:
    with pytest.raises(UserError) as caught:
        cache.column("index")
    assert str(cache.shard_path(shard)) in str(caught.value)
    return str(caught.value).replace(str(cache.shard_path(shard)), "SHARD")


def test_a_damaged_shard_is_named_and_running_again_after_deleting_it_repairs_the_cache(tmp_path):
    make(tmp_path).fill(compute)
    path = make(tmp_path).shard_path(1)
    damage(path, -1)
    assert make(tmp_path).rows(torch.tensor([0, 9]))["index"].tolist() == [0, 9]  # the other shards are good
    mistake = "SHARD is damaged: its SHA-256 is not the recorded one. Delete it and run the same command again."
    assert refused(make(tmp_path), 1) == mistake
    path.unlink()
    assert refused(make(tmp_path), 1) == "SHARD is not there: the cache is not filled. Run the same command again to go on."
    assert make(tmp_path).fill(compute) == 1
    assert torch.equal(make(tmp_path).column("index"), torch.arange(10))


def test_damage_in_any_byte_is_noticed(tmp_path):
    make(tmp_path, num_rows=2).fill(compute)
    path = make(tmp_path, num_rows=2).shard_path(0)
    whole = path.read_bytes()
    values = load_file(str(path))
    for where in range(0, len(whole), 7):
        damage(path, where)
        try:
            loaded = make(tmp_path, num_rows=2).rows(torch.arange(2))
        except UserError as error:
            assert "Delete it and run the same command again" in str(error)
        else:  # a byte that means nothing, such as a space that pads the header
            assert all(torch.equal(loaded[name], value) for name, value in values.items())
        path.write_bytes(whole)
    with safe_open(str(path), framework="pt") as opened:
        recorded = opened.metadata()
    save_file(values | {"index": values["index"].view(torch.float64)}, str(path), recorded)  # the same bytes
    assert "its SHA-256 is not the recorded one" in refused(make(tmp_path, num_rows=2), 0)
    path.write_bytes(whole[:-5])
    assert refused(make(tmp_path, num_rows=2), 0).startswith("SHARD is damaged: ")


def test_a_shard_in_anothers_place_is_noticed(tmp_path):
    make(tmp_path).fill(compute)
    cache = make(tmp_path)
    cache.shard_path(1).write_bytes(cache.shard_path(0).read_bytes())
    assert "its SHA-256 is not the recorded one" in refused(cache, 1)
    other = TensorCache(tmp_path, content_key(teacher="other"), 10, 4)
    other.fill(compute)
    cache.shard_path(1).write_bytes(other.shard_path(1).read_bytes())
    assert "its SHA-256 is not the recorded one" in refused(make(tmp_path), 1)
    save_file({"index": torch.arange(4, 8)}, str(cache.shard_path(1)))
    assert "its SHA-256 is not the recorded one" in refused(make(tmp_path), 1)


def test_a_shard_is_verified_once(tmp_path, monkeypatch):
    make(tmp_path).fill(compute)
    cache, digested = make(tmp_path), []
    real = TensorCache._digest
    monkeypatch.setattr(
        TensorCache, "_digest", lambda self, shard, tensors: digested.append(shard) or real(self, shard, tensors)
    )
    for _ in range(3):
        cache.rows(torch.tensor([0, 1, 9]))
    assert digested == [0, 2]


def test_rows_that_are_not_alike_are_refused(tmp_path):
    def ragged(rows):
        return {"embeds": torch.zeros(len(rows), 2 + rows[0] // 8)}

    message = (
        r"^rows of .*shard-00002\.safetensors are embeds \(3,\) float32, those of another shard embeds \(2,\) float32; "
        "all must be alike. Delete the folder and run the same command again.$"
    )
    with pytest.raises(UserError, match=message):
        make(tmp_path).fill(ragged)
    assert make(tmp_path).missing() == [2]
    with pytest.raises(UserError, match=message):  # a later run compares with what is on disk
        make(tmp_path).fill(ragged)
    with pytest.raises(ValueError, match=r"'a' must have 4 rows; got shape \(3, 2\)"):
        make(tmp_path / "other").fill(lambda rows: {"a": torch.zeros(3, 2)})


def test_values_that_cannot_be_stored_are_refused_naming_the_row(tmp_path):
    def with_value(value):
        return lambda rows: {"embeds": torch.where(torch.tensor(rows) == 5, value, 0.0)[:, None].expand(-1, 3)}

    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError) as caught:
            make(tmp_path).fill(with_value(value))
        assert str(caught.value) == "'embeds' of row 5 has NaN or infinite values. Compute it in float32 or bfloat16."
    with pytest.raises(UserError) as caught:
        make(tmp_path, dtype=torch.float16).fill(with_value(7e4))
    assert str(caught.value) == (
        "'embeds' of row 5 has values up to 70000, beyond the range of float16. Store it in bfloat16 or float32."
    )
    make(tmp_path, dtype=torch.bfloat16).fill(with_value(7e4))


def test_tensors_that_share_memory_or_are_views_are_stored(tmp_path):
    base = torch.arange(20.0).reshape(10, 2)
    make(tmp_path).fill(
        lambda rows: {"a": base[rows[0] : rows[-1] + 1], "b": base[rows[0] : rows[-1] + 1], "c": base[rows].mT.contiguous().mT}
    )
    rows = make(tmp_path).rows(torch.arange(10))
    assert all(torch.equal(rows[name], base) for name in "abc")


def test_a_full_disk_is_a_fault_of_the_machine_and_finished_shards_stay(tmp_path, monkeypatch):
    real, cache = os.fsync, make(tmp_path)

    def full(handle):
        if "shard-00001" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"^no space left while writing .*shard-00001\.safetensors; .*run the same command"):
        cache.fill(compute)
    monkeypatch.undo()
    assert cache.missing() == [1, 2] and not list(cache.folder.glob(".*"))
    assert make(tmp_path).fill(compute) == 2


def test_layouts_that_cannot_be_are_refused(tmp_path):
    for num_rows, per_shard in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="^a cache needs at least one row, and one per shard; got"):
            TensorCache(tmp_path, KEY, num_rows, per_shard)
    with pytest.raises(UserError, match="^a cache stores float16, bfloat16, float32, or null for the tensors' own; got int8"):
        TensorCache(tmp_path, KEY, 4, dtype=torch.int8)


def test_a_cache_is_mapped_not_read_into_memory(tmp_path):
    """Eight rows of a cache of 32 MB: the process owns little more than what it was handed."""
    cache = TensorCache(tmp_path, KEY, 64, rows_per_shard=8)
    cache.fill(lambda rows: {"big": torch.ones(len(rows), 1 << 17)})

    def owned() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before, reader = owned(), TensorCache(tmp_path, KEY, 64, rows_per_shard=8)
    rows = reader.rows(torch.arange(0, 64, 8))
    assert rows["big"].eq(1).all() and owned() - before < 12 << 10  # 4 MB handed out


def test_a_source_hands_out_conditions_and_clean_states(tmp_path):
    cache = make(tmp_path, dtype=torch.float16)
    cache.fill(
        lambda rows: {"x0": torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2)} | compute(rows)
    )
    source = CachedSource(cache)
    sample = source.take(torch.tensor([7, 2]), torch.Generator())
    assert isinstance(sample, Sample) and source.num_samples == 10
    assert sample.x0.dtype == torch.float32 and sample.x0[:, 0, 0, 0].tolist() == [7, 2]
    assert sample.values.keys() == {"encoder_hidden_states", "mask", "index"} and sample.values["index"].tolist() == [7, 2]
    assert sample.values["encoder_hidden_states"].dtype == torch.float16


def test_a_source_of_prompts_has_no_states(tmp_path):
    cache = make(tmp_path)
    cache.fill(compute)
    assert CachedSource(cache).take(torch.tensor([3]), torch.Generator()).x0 is None


def test_rows_whose_image_could_not_be_read_are_never_handed_out(tmp_path):
    cache = make(tmp_path)
    cache.fill(lambda rows: {"readable": torch.tensor(rows) % 3 != 0, "index": torch.tensor(rows)})
    source = CachedSource(cache)
    sample = source.take(torch.arange(source.num_samples), torch.Generator())
    assert sample.values.keys() == {"index"} and sample.values["index"].tolist() == [1, 2, 4, 5, 7, 8]
    none = make(tmp_path / "none")
    none.fill(lambda rows: {"readable": torch.zeros(len(rows), dtype=torch.bool)})
    with pytest.raises(UserError, match="^none of the 10 images in .* could be read"):
        CachedSource(none)
