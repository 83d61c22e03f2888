"""The quickstart's page: what it shows first."""

from diffdistill.evaluation.report import Tile
from diffdistill.evaluation.table import Row
from diffdistill.quickstart import Entry, tiles


def result(name, steps, fid, accuracy, solver=None):
    return Entry(name, "target", steps, solver), Row(name, steps, steps, fid, accuracy=accuracy)


def test_tiles_are_the_teacher_at_its_full_steps_and_the_best_student_at_each_step_count():
    entries, rows = zip(
        result("teacher, DDIM", 1, 298.0, 1.0, "ddim"),  # the highest accuracy of all
        result("teacher, UniPC", 4, 1.0, 1.0, "unipc"),  # were it this good, it would still be no student
        result("teacher, DDIM", 50, 3.5, 0.996, "ddim"),
        result("progressive", 4, 2.5, 0.994),
        result("progressive", 1, 5.5, 0.98),
        result("consistency", 1, 5.0, 0.97),
        result("consistency", 2, 4.0, 0.975),
        result("consistency", 4, 6.0, 0.999),
        strict=True,
    )
    assert tiles(entries, rows) == [
        Tile("teacher, 50 steps", "FID 3.50", "teacher, DDIM, 50 NFE, accuracy 99.6%"),
        Tile("best student, 1 step", "FID 5.00", "consistency, 1 NFE, accuracy 97.0%"),
        Tile("best student, 2 steps", "FID 4.00", "consistency, 2 NFE, accuracy 97.5%"),
        Tile("best student, 4 steps", "FID 2.50", "progressive, 4 NFE, accuracy 99.4%"),
    ]
