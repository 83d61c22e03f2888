"""What the README says works: its Python blocks run, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from diffdistill.cli import app
from diffdistill.config import load_config
from diffdistill.models.families import FAMILIES
from diffdistill.recipes import recipe_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def in_copy(tmp_path, monkeypatch):
    """A working folder with the recipes, as a checkout has them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_python_blocks_run_in_order(in_copy):
    """Own teacher in ten lines, then the result loaded by stock diffusers."""
    own, stock, method = blocks("python")
    assert "stages.0.steps=50" in own
    values: dict = {}
    exec(own.replace("stages.0.steps=50", "stages.0.steps=2"), values)
    assert values["samples"].images.shape == (10, 1, 8, 8)
    exec(stock, values)
    assert values["images"].shape == (4, 8, 8, 1)
    assert "class Copy(Distiller)" in method


def test_stock_block_imports_nothing_of_ours():
    assert "diffdistill" not in blocks("python")[1]


def test_the_example_method_trains_towards_its_teacher(in_copy, monkeypatch):
    """The file of the README, as another package would register it, run through the real engine."""
    (in_copy / "my_method.py").write_text(blocks("python")[2])
    monkeypatch.syspath_prepend(str(in_copy))
    import my_method

    from diffdistill.distillers.base import Batch, Rng
    from diffdistill.models.loading import load_teacher
    from diffdistill.models.roles import build_roles

    teacher = load_teacher("digits-unet")
    roles = build_roles(teacher.denoiser, ("student",))
    distiller = my_method.Copy(my_method.CopyConfig(), roles.teacher, roles, 10)
    assert distiller.needs(my_method.CopyConfig()).trained == ("student",)
    (turn,) = distiller.turns(0)
    torch.manual_seed(0)
    cond = teacher.condition(torch.arange(16) % 10)
    batch = Batch(cond, torch.randn(16, 1, 8, 8).clamp(-1, 1))

    def loss():
        return distiller.loss(turn, batch, Rng(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)), 0).total

    assert float(loss()) == 0  # the student starts as the teacher
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.mul_(1.05)
    before = loss()
    before.backward()
    optimizer = torch.optim.SGD(roles.parameters("student"), lr=1e-4)
    optimizer.step()
    assert float(loss()) < float(before)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)`?", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def commands(page):
    """Return the diffdistill commands of a page's bash blocks, as words."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("diffdistill ")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_verbs_options_recipes_and_settings_that_exist(page):
    for words in commands(page):
        _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)  # unknown verbs and options raise
        if words[0] == "init":
            assert bound.arguments["recipe"] in recipe_names()
        if words[0] in ("check", "train"):  # a text recipe takes the settings that stand on its command lines
            load_config(ROOT / "configs/text/sd15-dmd2-lora.yaml", bound.arguments.get("overrides", ()))


def test_the_readme_shows_every_step_of_the_way():
    assert {words[0] for words in commands("README.md")} >= {"init", "check", "train", "sample", "eval", "export", "verify"}


def test_the_table_of_families_is_that_of_the_code():
    rows = re.findall(r"^\| (\w+) \| (\w+) \|", (ROOT / "docs/families.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert dict(rows) == {family.name: network for network, family in FAMILIES.items()}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
