"""What is measured is said in a file, and a mistake in it is told before anything is."""

import pytest

from diffdistill.bench import definition as definitions
from diffdistill.bench.definition import Cell, definition_path, read_definition
from diffdistill.cli import main
from diffdistill.errors import UserError

GOOD = """
seconds: 1
layouts: [shared]
teachers:
  digits-unet: {batches: [4, 8], run: {data: {kind: digits}, precision: bf16}, lora: {rank: 3, targets: attention}}
methods:
  plain: {name: vsd}
  by-adapter: {name: agd}
samples: {method: plain, rules: [ddim], steps: [2]}
"""


@pytest.fixture
def read(tmp_path):
    def of(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return read_definition(path)

    return of


def test_cells_are_the_product_of_what_is_named(read):
    definition = read(GOOD)
    assert [cell.key for cell in definition.cells(methods=["plain"])] == [
        "digits-unet plain shared 4",
        "digits-unet plain shared 8",
    ]
    assert len(definition.cells()) == 4
    with pytest.raises(UserError, match="unknown layout of the benchmark 'copies'. .*Known: shared"):
        definition.cells(layouts=["copies"])


@pytest.mark.parametrize(("images", "batches"), [("", [4, 8]), ("images: [2, 16], ", [2, 16])])
def test_one_students_images_are_measured_by_the_steps_batches_or_by_their_own(read, images, batches):
    definition = read(GOOD.replace("batches:", f"{images}batches:"))
    assert definition.sampled(definition.cells()) == [Cell("digits-unet", "plain", "shared", num) for num in batches]


def test_a_run_has_what_teacher_method_and_layout_say_and_else_the_defaults(read):
    definition = read(GOOD)
    config = definition.run_config(Cell("digits-unet", "plain", "shared", 4), ["clip_grad_norm=3.0"])
    assert (config.teacher, config.batch_size, config.precision, config.clip_grad_norm) == ("digits-unet", 4, "bf16", 3.0)
    assert config.roles.layout == "shared" and config.roles.lora.rank == 3 and config.stages[0].method.name == "vsd"
    assert definition.run_config(Cell("digits-unet", "by-adapter", "shared", 4)).roles.lora is None  # it has its own


def test_a_hash_tells_settings_apart(read):
    definition, cell = read(GOOD), Cell("digits-unet", "plain", "shared", 4)
    others = [
        definition.settings(cell, ["clip_grad_norm=3.0"]),
        definition.settings(cell._replace(batch=8)),
        definition.with_options([], 2.0).settings(cell),
        read(GOOD.replace("rank: 3", "rank: 4")).settings(cell),
    ]
    assert len({definition.settings(cell), *others}) == 5
    assert read(GOOD.replace("seconds: 1", "about: words\nseconds: 1")).settings(cell) == definition.settings(cell)


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("seconds: 1", "secondss: 1", "Did you mean 'seconds'?"),
        ("seconds: 1", "seconds: 0", "seconds: "),
        ("batches: [4, 8]", "batches: []", "teachers.digits-unet.batches: "),
        ("[shared]", "[both]", "layouts.0: "),
        ("{name: vsd}", "{name: vdm}", "methods.plain: "),
        ("{name: vsd}", "{name: vsd, guidanc: 3.0}", "Did you mean 'guidance'?"),
        ("method: plain", "method: plane", "unknown method 'plane' in samples.method. Did you mean 'plain'?"),
        ("precision: bf16", "precison: bf16", "the run of digits-unet plain shared 4 has one mistake"),
        ("batches: [4", "published: true, batches: [4", "unknown published network 'digits-unet' in teachers."),
        ("rules: [ddim]", "rules: [ddpm]", "samples.rules.0: "),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, capsys, good, bad, said):
    assert good in GOOD
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(good, bad))
    assert main(["bench", str(path)]) == 2
    printed = capsys.readouterr().err
    assert said in printed and str(path) in printed


def test_the_definition_is_that_of_the_device_where_none_is_named(monkeypatch):
    import torch

    for device, name in (("cpu", "cpu"), ("cuda", "gpu"), ("mps", "cpu")):
        monkeypatch.setattr(definitions, "usual_device", lambda device=device: torch.device(device))
        assert definition_path().name == f"{name}.yaml"
