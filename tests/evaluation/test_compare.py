"""Comparison and the terminal table."""

from dataclasses import replace

import pytest

from diffdistill.errors import UserError
from diffdistill.evaluation.compare import compare
from diffdistill.evaluation.protocol import Protocol, load_protocol
from diffdistill.evaluation.result import Cost, Evaluation, Summary
from diffdistill.evaluation.table import Row, columns_of, table


def evaluation(fid=3.0, fingerprint="0" * 64, num_blocks=2, **fields):
    protocol = Protocol(**{**load_protocol("digits").model_dump(), **fields})
    return Evaluation(
        protocol=protocol.model_dump(mode="json"),
        protocol_hash=protocol.hash,
        views=[{"view": "digits", "extractor": "digits", "fingerprint": fingerprint, "reference": {}}],
        num_images=protocol.num_images,
        num_blocks=num_blocks,
        values={"fid": Summary(fid, 0.25, 0.3, (fid,)), "accuracy": Summary(0.98765, None, None, (0.98765,))},
        reference_values={},
        skipped={},
        warnings=[],
        cost=Cost(num_steps=4, nfe=8, ms_per_image=1.25),
        seconds={},
        device="cpu",
        versions={},
    )


def test_equal_protocols_compare_whatever_they_are_called():
    found = compare({"teacher": evaluation(3.0), "student": evaluation(4.0, name="mine")})
    assert [(row.method, row.fid, row.fid_sd, row.nfe) for row in found.rows] == [
        ("teacher", 3.0, 0.25, 8),
        ("student", 4.0, 0.25, 8),
    ]
    assert found.differences == ()
    assert "do not compare" not in found.text()


def test_different_protocols_are_refused_with_the_fields_that_differ():
    reports = {"a": evaluation(), "b": evaluation(num_images=2000, metric_seed=5)}
    with pytest.raises(UserError) as error:
        compare(reports)
    assert "protocol.num_images: a=10000, b=2000" in str(error.value)
    assert "protocol.metric_seed: a=0, b=5" in str(error.value)
    assert "first_seeds" not in str(error.value)


@pytest.mark.parametrize(
    ("other", "field"), [({"fingerprint": "1" * 64}, "weights of digits"), ({"num_blocks": 1}, "number of blocks")]
)
def test_other_weights_or_blocks_are_a_difference_too(other, field):
    with pytest.raises(UserError, match=field):
        compare({"a": evaluation(), "b": evaluation(**other)})


def test_a_forced_comparison_says_what_differs():
    found = compare({"a": evaluation(), "b": evaluation(num_images=2000)}, force=True)
    assert found.differences == ("protocol.num_images: a=10000, b=2000",)
    assert "do not compare" in found.text()
    assert found.to_json()["rows"][1]["method"] == "b"


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="nothing to compare"):
        compare({})


def test_table_shows_figures_and_leaves_out_empty_columns():
    text = table([Row("teacher", 50, 100, 3.14159, 0.05, 0.98765, 12.3456), Row("a [red]student[/red]", 1, 1, 123.456)])
    assert "3.14 ± 0.05" in text
    assert "98.8%" in text
    assert "123.5" in text
    assert "a [red]student[/red]" in text
    assert "KID" not in text
    assert "recall" not in text
    assert "\x1b" not in text  # no colours: it may go into a file


def test_every_distribution_metric_has_its_own_column():
    figures = {"sfid": 1.5, "cmmd": 0.25, "inception_score": 9.5, "density": 1.125, "coverage": 0.875, "vendi": 4.5}
    report = replace(evaluation(), values={name: Summary(value, None, None, (value,)) for name, value in figures.items()})
    row = Row.from_evaluation("a", report)
    cells = {column.title: column.text(row) for column in columns_of([row])}
    del cells["method"], cells["steps"], cells["NFE"], cells["ms/image ↓"]
    assert cells == {
        "density ↑": "1.125",
        "coverage ↑": "0.875",
        "sFID ↓": "1.50",
        "CMMD ↓": "0.250",
        "IS ↑": "9.50",
        "Vendi ↑": "4.50",
    }


def test_table_fits_the_width_asked_for():
    rows = [Row("a method with quite a long name", 4, 8, 3.1, 0.2, 0.9, 1.5)]
    assert max(map(len, table(rows, width=72).splitlines())) <= 72
