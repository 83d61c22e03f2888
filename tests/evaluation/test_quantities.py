"""How values are called, written and drawn."""

from diffdistill.evaluation.quantities import quantity


def test_the_arrow_points_to_better():
    assert quantity("fid").heading == "FID ↓"
    assert quantity("recall").heading == "recall ↑"
    assert quantity("contrast").heading == "contrast"  # better is nearer to the real images


def test_a_corrected_distance_is_written_like_the_plain_one_and_is_a_detail():
    corrected = quantity("sfid_jackknife")
    assert corrected.heading == "sFID without bias ↓"
    assert corrected.text(1.234) == quantity("sfid").text(1.234) == "1.23"
    assert corrected.is_detail and not quantity("sfid").is_detail


def test_a_value_nobody_described_has_its_name_and_no_direction():
    assert quantity("my_own_score") == ("my own score", None, ".4g", False, False, None)
