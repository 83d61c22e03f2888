"""The tables of a report."""

from dataclasses import replace

import pytest
import torch
from evaluations import evaluation, protocol, summary

from diffdistill.evaluation.named import Result
from diffdistill.evaluation.report_tables import all_values_table, by_class, class_tables, part_tables, results_table
from diffdistill.evaluation.result import Cost


def rows(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_results_show_the_main_value_with_its_spread_and_the_real_images_below():
    values = {"fid": summary(3.0, 3.5), "fid_jackknife": summary(2.9, 3.1), "accuracy": summary(0.5, 0.7)}
    found = evaluation(values, 2, cost=Cost(2, 4, latency_ms=1234.5), reference_values={"accuracy": 0.998})
    table = results_table([Result("a", found), Result("b", evaluation(steps=1))])
    assert table.header == ["", "steps", "NFE", "FID ↓", "accuracy ↑", "ms/image ↓", "latency, ms ↓"]
    assert rows(table) == [
        ["a", "2", "4", "3.25 ± 0.35", "60.0%", "", "1,234"],
        ["b", "1", "1", "3.25 ± 0.35", "", "1.5", "10"],
    ]
    same = replace(evaluation(), reference_values={"accuracy": 0.998})
    assert rows(results_table([Result("a", found), Result("b", same)]))[-1] == ["real images", "", "", "", "99.8%", "", ""]


def test_step_counts_of_one_target_are_the_names_of_its_rows():
    table = results_table([Result("m", evaluation(steps=1)), Result("m", evaluation(steps=4))])
    assert [row[0] for row in rows(table)] == ["1 step", "4 steps"]
    assert "steps" not in table.header


@pytest.mark.parametrize(("name", "best"), [("fid", 0), ("inception_score", 1), ("diversity", None)])
def test_the_best_main_value_is_marked_in_the_direction_of_better(name, best):
    table = results_table([Result("m", evaluation({name: summary(value)}, int(value))) for value in (3.0, 7.0)])
    marked = [index for index, row in enumerate(table.rows) for cell in row if cell.is_best]
    assert marked == ([] if best is None else [best])


def test_the_lowest_block_stands_for_all_where_the_protocol_says_so():
    best_of = protocol(aggregation="best_block")
    table = results_table([Result("m", evaluation(of=best_of))])
    assert "3.00 ± 0.35" in rows(table)[0]
    assert "the lowest of the blocks of seeds" in table.note


def test_all_values_have_their_errors_and_blocks():
    found = evaluation({"fid": summary(3.0, 3.5, se=0.3), "contrast": summary(0.25)}, reference_values={"contrast": 0.5})
    assert rows(all_values_table([Result("m", found)])) == [
        ["m", "FID ↓", "3.25", "0.35", "0.3", "3.00 · 3.50", ""],
        ["m", "contrast", "0.250", "", "", "0.250", "0.5"],
    ]


def test_parts_of_a_value_make_a_table_that_ends_in_the_whole():
    shares = {"obeyed_colours": 0.9, "obeyed_shapes": 0.8, "obeyed_sizes": 0.7, "obeyed": 0.6}
    found = evaluation({name: summary(value) for name, value in shares.items()})
    (table,) = part_tables([Result("m", found)])
    assert table.header == ["", "colours", "and shapes", "and sizes", "all"]
    assert [cell.share for cell in table.rows[0]] == [None, 0.9, 0.8, 0.7, 0.6]
    assert part_tables([Result("m", evaluation())]) == []


def test_classes_are_those_that_the_protocol_asked_for():
    each = torch.zeros(2, 20, dtype=torch.float64)
    each[:, 3] = 1  # one of the two images of class 3, in both blocks
    each[1, 14] = 1  # class 4, once in four
    result = Result("m", evaluation(each={"accuracy": each}))
    assert by_class(result, "accuracy").tolist() == [0, 0, 0, 0.5, 0.25, 0, 0, 0, 0, 0]
    (table,) = class_tables([result])
    assert rows(table)[3] == ["class 3", "50.0%"]
    assert table.title == "By class: accuracy"


def test_classes_drawn_by_seed_are_drawn_again():
    random = protocol(label_rule="random")
    each = torch.stack([(random.labels(block) == 7).double() for block in (0, 1)])
    assert by_class(Result("m", evaluation(of=random, each={"accuracy": each})), "accuracy")[7] == 1


def test_of_many_classes_the_lowest_are_shown_worst_first():
    many = protocol(num_classes=100, num_images=200, first_seeds=(0,))
    each = (torch.arange(200) % 100).double()[None] / 100
    (table,) = class_tables([Result("m", evaluation(of=many, each={"accuracy": each}))])
    assert [row[0].text for row in table.rows] == [f"class {index}" for index in range(12)]
    assert table.note.startswith("The 12 lowest of 100 classes.")


def test_captions_have_no_classes():
    result = Result("m", evaluation(of=protocol(label_rule="none"), each={"accuracy": torch.ones(2, 20)}))
    assert class_tables([result]) == []
