"""Files of prompts: where they are looked for, their hash, and their number."""

import pytest

from diffdistill.errors import UserError
from diffdistill.evaluation.prompt_sets import FOLDER_VARIABLE, PromptSet
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.files import sha256


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A folder of prompts with p.txt, five lines."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {k}\n" for k in range(5)))
    return path


def protocol(**fields):
    views = [{"extractor": "digits", "metrics": ["fid"]}]
    sizes = {
        "num_images": 4,
        "first_seeds": [0, 4],
        "jackknife_groups": 2,
        "label_rule": "prompts",
        "prompts": {"file": "p.txt"},
    }
    return Protocol(**{**load_protocol("digits-short").model_dump(), **sizes, "views": views, **fields})


def test_each_block_asks_for_the_first_prompts_in_their_order(prompts):
    for block in (0, 1):
        assert protocol().asked(block) == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"]
    assert protocol(images_per_prompt=2).asked(0) == ["prompt 0", "prompt 0", "prompt 1", "prompt 1"]
    assert protocol().asked_of_files(8) == protocol().asked(0) * 2


def test_a_path_comes_before_the_folder(prompts, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert PromptSet(file="p.txt").path == prompts
    (tmp_path / "here" / "p.txt").write_text("mine\n")
    assert PromptSet(file="p.txt").read(1) == ["mine"]


def test_the_hash_of_the_file_that_is_there_goes_into_the_protocol(prompts):
    before = protocol()
    pinned = before.pinned()
    assert pinned.prompts.sha256 == sha256(prompts) and pinned.hash != before.hash
    prompts.write_text(prompts.read_text() + "another\n")
    assert before.pinned().hash != pinned.hash
    with pytest.raises(UserError, match="is not the file of prompts that the protocol names"):
        pinned.asked(0)


def test_fewer_prompts_than_images_are_refused(prompts):
    with pytest.raises(UserError, match="holds 5 prompts; the protocol asks for 6"):
        protocol(num_images=6, first_seeds=[0]).asked(0)


def test_a_missing_file_says_where_to_put_it(prompts):
    prompts.unlink()
    with pytest.raises(UserError, match=f"Put the file at {prompts}"):
        protocol().pinned()
