"""Protocols: what the hash covers, the seed and label rules, and the errors of their files."""

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.evaluation.protocol import PROTOCOLS_FOLDER, Protocol, load_protocol, protocol_names
from diffdistill.evaluation.reference import REFERENCES


def changed(**fields):
    return Protocol(**{**load_protocol("digits-short").model_dump(), **fields})


@pytest.mark.parametrize("name", protocol_names())
def test_shipped_protocols_load_and_are_called_like_their_file(name):
    protocol = load_protocol(name)
    assert protocol.name == name
    assert protocol.reference in REFERENCES


def test_digits_protocol_has_three_blocks_of_ten_thousand_seeds():
    protocol = load_protocol("digits")
    seeds = [seed for block in range(3) for seed in protocol.seeds(block)]
    assert seeds == list(range(30_000))


def test_hash_covers_every_field_but_the_name():
    base = load_protocol("digits-short")
    others = {
        "dataset": "other",
        "num_images": 1000,
        "first_seeds": [7],
        "label_rule": "random",
        "num_classes": 9,
        "extractor": "x",
        "reference": "x",
        "metrics": ["fid"],
        "jackknife_groups": 10,
        "metric_seed": 1,
    }
    assert set(others) | {"name", "uint8_rule", "numerics"} == set(Protocol.model_fields)  # the two have one choice
    hashes = {changed(**{field: value}).hash for field, value in others.items()}
    assert len(hashes | {base.hash}) == len(others) + 1
    assert changed(name="other").hash == base.hash


def test_the_short_protocol_shares_its_reference_with_the_long_one():
    assert load_protocol("digits").reference_hash == load_protocol("digits-short").reference_hash
    assert changed(extractor="x").reference_hash != load_protocol("digits").reference_hash


def test_balanced_labels_cycle_and_random_ones_depend_on_their_seed_only():
    assert torch.equal(load_protocol("digits-short").labels(0), torch.arange(2000) % 10)
    whole = changed(label_rule="random", num_images=200, first_seeds=[0], jackknife_groups=2).labels(0)
    part = changed(label_rule="random", num_images=100, first_seeds=[0, 100], jackknife_groups=2).labels(1)
    assert torch.equal(whole[100:], part)
    assert whole.unique().tolist() == list(range(10))


def test_jackknife_groups_are_neighbours_so_each_holds_all_classes():
    protocol = load_protocol("digits-short")
    groups, labels = protocol.groups(), protocol.labels(0)
    assert groups.bincount().tolist() == [40] * 50
    assert all(labels[groups == group].bincount(minlength=10).tolist() == [4] * 10 for group in (0, 17, 49))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_seeds": [0, 1999]}, "share images"),
        ({"first_seeds": [-1]}, "non-negative"),
        ({"jackknife_groups": 1001}, "num_images / 2"),
        ({"metrics": ["fdi"]}, "Did you mean 'fid'"),
        ({"metrics": ["fid", "fid"]}, "twice"),
        ({"metrics": ["kid", "kid_normalised"]}, "keep one"),
        ({"uint8_rule": "truncate"}, "round"),
    ],
)
def test_impossible_protocols_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)


def test_every_metric_is_usable_by_name():
    for name in METRICS:
        assert changed(metrics=[name]).metrics == (name,)


def test_a_frozen_protocol_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        load_protocol("digits").num_images = 5


def test_errors_of_a_file_come_all_at_once_with_hints(tmp_path):
    text = (PROTOCOLS_FOLDER / "digits.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("num_images:", "num_image:").replace("balanced", "even"))
    with pytest.raises(UserError) as error:
        load_protocol(path)
    text = str(error.value)
    assert text.startswith(f"{path} has 3 mistakes:\n")
    assert "num_image: unknown key. Did you mean 'num_images'?" in text
    assert "num_images: is missing (images in one block of seeds)." in text
    assert "label_rule: must be 'balanced', 'random' or 'shapes'; got 'even'." in text


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_files_that_hold_no_mapping_are_refused(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="mine.yaml"):
        load_protocol(path)


def test_unknown_names_and_missing_files_list_what_there_is(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        load_protocol("digit")
    with pytest.raises(UserError, match="digits-short"):
        load_protocol(tmp_path / "none.yaml")
