"""Activation checkpointing of every family: fewer bytes, the same bits, and the role of the forward pass in the recomputation."""

import pytest
import torch
from role_networks import denoiser, inputs, perturb
from text_pipelines import save

from diffdistill.memory import LiveBytes
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.families import FAMILIES
from diffdistill.models.loading import load_teacher
from diffdistill.models.roles import build_roles

TEXT = ("sd", "sdxl", "pixart", "sd3", "flux", "sana")
KINDS = ("unet", "dit", *TEXT)
ROLES = ("student", "fake")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpointed")


def asked(kind, place):
    """Return a small denoiser of a kind, and what it is asked: states, times, condition."""
    if kind not in TEXT:
        return denoiser(kind), tuple(inputs())
    folder = place / kind if (place / kind).exists() else save(kind, place)
    teacher = load_teacher(folder, size=32 if kind == "sana" else 16)
    shape, generator = teacher.denoiser.sample_shape, torch.Generator().manual_seed(0)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64) * teacher.denoiser.schedule.t_max
    return teacher.denoiser, (torch.randn(2, *shape, generator=generator), t, teacher.condition(["a", "b"]))


def found(kind, place, checkpointed):
    """Return the student's gradients, where teacher and fake were asked between its passes, and what its graph kept."""
    net, batch = asked(kind, place)
    roles = build_roles(net, ROLES, "shared", LoraSpec(rank=2, targets="all"))
    for seed, name in enumerate(ROLES):
        perturb(roles.parameters(name), seed)
    if checkpointed:
        roles.enable_activation_checkpointing()
    roles.train_only(["student"])
    with LiveBytes() as live:
        raw = roles["student"](*batch).raw
        kept = live.now
    with torch.no_grad():
        target = roles["fake"](*batch).raw - roles.teacher(*batch).raw
    (raw - target).square().mean().backward()
    assert all(parameter.grad is None for parameter in roles.parameters("fake"))
    return {key: parameter.grad for key, parameter in roles.named_parameters("student").items()}, kept


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_keep_their_bits_and_the_graph_is_smaller(kind, place):
    (plain, whole), (recomputed, smaller) = (found(kind, place, checkpointed) for checkpointed in (False, True))
    assert plain.keys() == recomputed.keys() and any(bool(gradient.any()) for gradient in plain.values())
    assert [key for key in plain if not torch.equal(plain[key], recomputed[key])] == []
    assert smaller < 0.6 * whole, smaller / whole


def test_every_family_is_among_these(place):
    assert {type(asked(kind, place)[0].network).__name__ for kind in KINDS} == FAMILIES.keys()
