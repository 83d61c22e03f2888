"""Protocols: what the hash covers, the seed and label rules, and the errors of their files."""

import pytest
import torch

from diffdistill.errors import UserError
from diffdistill.evaluation.metrics.registry import METRICS
from diffdistill.evaluation.protocol import PROTOCOLS_FOLDER, Protocol, View, load_protocol, protocol_names


def changed(**fields):
    return Protocol(**{**load_protocol("digits-short").model_dump(), **fields})


def seen(metrics=("fid",), **fields):
    return changed(views=[{"extractor": "digits", "metrics": metrics, **fields}])


@pytest.mark.parametrize("name", protocol_names())
def test_shipped_protocols_load_and_are_called_like_their_file(name):
    protocol = load_protocol(name)
    assert protocol.name == name


def test_digits_protocol_has_three_blocks_of_ten_thousand_seeds():
    protocol = load_protocol("digits")
    seeds = [seed for block in range(3) for seed in protocol.seeds(block)]
    assert seeds == list(range(30_000))


def test_hash_covers_every_field_but_name_and_about():
    base = load_protocol("digits-short")
    view = base.views[0].model_dump()
    prompts = {"label_rule": "prompts", "prompts": {"file": "p.txt"}}
    others = {
        "dataset": {"dataset": "other"},
        "num_images": {"num_images": 1000},
        "first_seeds": {"first_seeds": [7]},
        "label_rule": {"label_rule": "random"},
        "num_classes": {"num_classes": 9},
        "prompts": prompts,
        "the file of prompts": {**prompts, "prompts": {"file": "p.txt", "sha256": "0" * 64}},
        "images_per_prompt": {"images_per_prompt": 2},
        "uint8_rule": {"uint8_rule": "trunc127"},
        "transforms": {"transforms": ["center_crop"]},
        "reference": {"reference": "x"},
        "reference_transforms": {"reference_transforms": ["center_crop"]},
        "aggregation": {"aggregation": "best_block"},
        "clip_scale": {"clip_scale": "cos"},
        "jackknife_groups": {"jackknife_groups": 10},
        "metric_seed": {"metric_seed": 1},
        "views": {"views": [view, {**view, "extractor": "x", "metrics": ["sfid"]}]},
        **{
            f"views.{field}": {"views": [{**view, field: value}]}
            for field, value in {
                "extractor": "x",
                "metrics": ["fid"],
                "transforms": ["center_crop"],
                "resize": "pil_bicubic",
                "precision": "tf32",
            }.items()
        },
    }
    assert {name for name in others if " " not in name and "." not in name} | {"name", "about", "numerics"} == set(
        Protocol.model_fields
    )
    assert {name.removeprefix("views.") for name in others if "." in name} == set(View.model_fields)
    hashes = {changed(**fields).hash for fields in others.values()}
    assert len(hashes | {base.hash}) == len(others) + 1
    assert changed(name="other", about="words").hash == base.hash


def test_a_field_at_its_default_does_not_change_the_hash_so_later_fields_will_not():
    text = (PROTOCOLS_FOLDER / "digits-short.yaml").read_text()
    assert "clip_scale" not in text
    assert changed(clip_scale="100cos").hash == load_protocol("digits-short").hash


def test_the_reference_is_shared_by_protocols_that_see_the_same_real_images_in_the_same_way():
    long, short = load_protocol("digits"), load_protocol("digits-short")
    view = short.views[0]
    assert long.reference_hash(long.views[0]) == short.reference_hash(view) == short.reference_hash(seen().views[0])
    for field, value in {"extractor": "x", "resize": "pil_bicubic", "precision": "tf32", "transforms": ["center_crop"]}.items():
        assert short.reference_hash(View(**{**view.model_dump(), field: value})) != short.reference_hash(view), field
    for fields in ({"dataset": "x"}, {"reference": "x"}, {"reference_transforms": ["center_crop"]}):
        assert changed(**fields).reference_hash(view) != short.reference_hash(view)


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
        ({"views": [{"extractor": "digits", "metrics": ["fdi"]}]}, "Did you mean 'fid'"),
        ({"views": [{"extractor": "digits", "metrics": ["fid", "fid"]}]}, "twice"),
        ({"views": [{"extractor": name, "metrics": ["fid"]} for name in "ab"]}, "twice: fid"),
        ({"views": [{"extractor": "a", "metrics": [name]} for name in ("fid", "sfid")]}, "see the same"),
        ({"views": [{"extractor": "digits", "metrics": ["kid", "kid_normalised"]}]}, "keep one"),
        ({"uint8_rule": "truncate"}, "round"),
        ({"transforms": ["center_crp"]}, "Did you mean 'center_crop'"),
        ({"label_rule": "prompts"}, "file of prompts"),
        ({"prompts": {"file": "p.txt"}}, "file of prompts"),
        ({"images_per_prompt": 3}, "must divide"),
        ({"views": [{"extractor": "digits", "metrics": ["prompt_diversity"]}]}, "images_per_prompt to two or more"),
        ({"views": [{"extractor": "digits", "metrics": ["aesthetic"]}]}, "cannot be had of 'digits'"),
    ],
)
def test_impossible_protocols_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        changed(**fields)


def test_every_metric_is_usable_by_name_behind_its_own_network():
    for name, metric in METRICS.items():
        network = getattr(metric, "network", "digits")
        assert changed(images_per_prompt=2, views=[{"extractor": network, "metrics": [name]}]).metrics == (name,)


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
    assert "label_rule: must be 'balanced', 'random', 'shapes', 'prompts' or 'none'; got 'even'." in text


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
