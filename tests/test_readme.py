"""What the README says works: its Python blocks run, its commands exist, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def in_copy(tmp_path, monkeypatch):
    """A working folder with the recipes, as a checkout has them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_blocks_run_in_order(in_copy):
    """Own teacher in ten lines, then the result loaded by stock diffusers."""
    own, stock, method = blocks("python")
    values: dict = {}
    exec(own, values)
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


def test_verbs_of_the_command_blocks_exist():
    help_text = subprocess.run(
        [sys.executable, "-m", "diffdistill", "--help"], capture_output=True, text=True, check=True
    ).stdout
    verbs = {verb for block in blocks("bash") for verb in re.findall(r"^diffdistill (\w+)", block, flags=re.MULTILINE)}
    assert verbs >= {"init", "check", "train", "eval", "export", "verify"}
    assert all(re.search(rf"\b{verb}\b", help_text) for verb in verbs)


@pytest.mark.parametrize("page", ["README.md", *[str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")]])
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
