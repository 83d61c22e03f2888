"""Teacher and fake network as one batch: the numbers of separate passes, one pass, and when it must not be one."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import replace

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, perturb
from text_pipelines import save

from diffdistill.models.adapters import LoraSpec, RowsError, adapter_layers, rows_context
from diffdistill.models.condition import Condition
from diffdistill.models.guidance import Interval, guided
from diffdistill.models.loading import load_teacher
from diffdistill.models.network import EDMDenoiser
from diffdistill.models.roles import build_roles
from diffdistill.models.together import predict_both

LORA = LoraSpec(rank=3, alpha=6.0, targets="all", ranks={"fake": 5})
ROLES = ("student", "fake")
EXACT = {"rtol": 1e-5, "atol": 1e-5}
PROMPTS = ["a red circle", "blue square left of it"]


def build(base, limit=8, lora=LORA, rows_at_once=None):
    roles = build_roles(base, ROLES, "shared", lora, one_batch_up_to=limit, rows_at_once=rows_at_once)
    for seed, name in enumerate(ROLES):
        perturb(roles.parameters(name), seed)
    return roles


@contextlib.contextmanager
def passes(network):
    """Give the list of the numbers of rows of every pass of a network that is finished while the block runs."""
    rows = []
    handle = network.register_forward_hook(lambda module, args, kwargs, out: rows.append(len(out[0])), with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def both(first, second, batch):
    """What two denoisers say, asked together, and the rows of the passes it took."""
    network = getattr(first, "inner", first).network
    with passes(network) as rows:
        return predict_both(first, second, *batch), rows


def alone(first, second, batch):
    with torch.no_grad():
        return first(*batch), second(*batch)


def assert_same(said, expected, **tolerance):
    for ours, theirs in zip(said, expected, strict=True):
        assert ours.kind == theirs.kind
        for name in ("raw", "x_t", "alpha", "sigma"):  # of which x0 is a formula, with the rounding of raw times sigma / alpha
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **(tolerance or EXACT))


@pytest.mark.parametrize("kind", NETWORKS)
def test_guided_teacher_and_fake_are_one_pass_of_three_rows_a_sample(kind):
    roles, batch = build(denoiser(kind)), inputs()
    base = denoiser(kind)  # the same weights, without adapters
    said, rows = both(guided(roles.teacher, 3.0), roles["fake"], batch)
    assert rows == [6]
    assert_same(said, alone(guided(roles.teacher, 3.0), roles["fake"], batch))
    torch.testing.assert_close(said[0].raw, guided(base, 3.0)(*batch).raw, **EXACT)
    assert float((said[1].raw - base(*batch).raw).abs().max()) > 1e-2  # the fake is another network
    assert float((said[1].raw - roles["student"](*batch).raw).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_two_roles_in_any_order_under_any_guidance(kind):
    roles, batch = build(denoiser(kind)), inputs()
    scales = torch.tensor([1.5, 4.0])
    for first, second, expected in (
        (roles.teacher, roles["fake"], 4),
        (roles["fake"], roles.teacher, 4),
        (roles["student"], guided(roles["fake"], 2.0), 6),
        (guided(roles.teacher, scales, Interval(0.1, 2.0)), guided(roles["fake"], scales), 8),
    ):
        said, rows = both(first, second, batch)
        assert rows == [expected]
        assert_same(said, alone(first, second, batch))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sd", "all"),
        ("sdxl", "all"),
        ("pixart", "attention+ff"),
        ("pixart-sigma", "all"),
        ("sd3", "all"),
        ("flux", "all"),
        ("sana", "all"),
    ],
)
def test_text_families_give_the_numbers_of_separate_passes_in_one(name, targets, tmp_path):
    teacher = load_teacher(save(name, tmp_path), size=32 if name == "sana" else 16)
    roles = build(teacher.denoiser, lora=LoraSpec(rank=3, targets=targets))
    x, t = torch.randn(2, *teacher.denoiser.sample_shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    batch = (x, t * teacher.denoiser.schedule.t_max, teacher.condition(PROMPTS))
    real = guided(roles.teacher, 1.0 if name == "flux" else 3.0)
    said, rows = both(real, roles["fake"], batch)
    assert rows == [4 if name == "flux" else 6]
    assert_same(said, alone(real, roles["fake"], batch))
    assert float((said[1].raw - roles.teacher(*batch).raw).abs().max()) > 1e-2


def test_a_layer_that_folds_more_into_its_rows_is_noticed_and_asked_apart(tmp_path):
    """PixArt-alpha embeds height and width of the image as two rows a sample, by layers that `all` adapts."""
    teacher = load_teacher(save("pixart", tmp_path), size=16)
    roles = build(teacher.denoiser, lora=LoraSpec(rank=3, targets="all"))
    batch = (torch.randn(2, *teacher.denoiser.sample_shape), torch.tensor([30.0, 800.0]).double(), teacher.condition(PROMPTS))
    said, rows = both(guided(roles.teacher, 3.0), roles["fake"], batch)
    assert rows == [4, 2]
    assert_same(said, alone(guided(roles.teacher, 3.0), roles["fake"], batch), rtol=0.0, atol=0.0)


def test_edm_networks_too():
    from diffdistill.math.schedules import EDMSchedule

    net = denoiser("unet")
    roles = build(EDMDenoiser(net.network, net.family, EDMSchedule(0.002, 80.0), net.sample_shape))
    batch = inputs(times=(0.4, 11.0))
    said, rows = both(roles.teacher, roles["fake"], batch)
    assert rows == [4]
    assert_same(said, alone(roles.teacher, roles["fake"], batch))


def test_a_half_precision_base_sums_the_update_as_the_adapter_s_own_forward_does():
    net = denoiser("dit")
    roles = build(net.with_network(net.network.to(torch.bfloat16)))
    assert {parameter.dtype for parameter in roles.parameters("fake")} == {torch.float32}
    said, rows = both(roles.teacher, roles["fake"], inputs())
    assert rows == [4]
    assert_same(said, alone(roles.teacher, roles["fake"], inputs()), rtol=2e-2, atol=2e-2)  # bfloat16 keeps 8 bits


def test_asked_apart_above_the_limit_of_samples_and_in_networks_of_their_own():
    batch, base = inputs(), denoiser("dit")
    for limit, expected in ((0, [2, 2]), (1, [2, 2]), (2, [4])):
        roles = build(copy.deepcopy(base), limit)
        assert both(roles.teacher, roles["fake"], batch)[1] == expected
    others = [build(copy.deepcopy(base)) for _ in range(2)]
    said, rows = both(others[0].teacher, others[1]["fake"], batch)
    assert rows == [2]  # of the first network; the other half is the second's
    assert_same(said, alone(others[0].teacher, others[1]["fake"], batch), rtol=0.0, atol=0.0)
    fake = replace(others[0]["fake"], kind="v_prediction")
    assert both(others[0].teacher, fake, batch)[1] == [2, 2]  # one network, read in another way


def test_no_hook_no_switch_and_no_gradient_flag_stays_behind():
    roles = build(denoiser("unet"))
    roles.train_only(("student",))
    network = roles["fake"].network

    def state():
        layers = [
            (layer._active_adapter, layer._disable_adapters, len(layer._forward_hooks)) for layer in adapter_layers(network)
        ]
        return layers, [parameter.requires_grad for parameter in network.parameters()]

    before = state()
    x, t, cond = inputs()
    predict_both(guided(roles.teacher, 2.0), roles["fake"], x, t, cond)
    assert state() == before
    with pytest.raises(RowsError), torch.no_grad(), rows_context(network, [(None, 1), ("fake", 2)]):
        roles.teacher.with_role(contextlib.nullcontext)(x, t, cond)  # two rows where three are announced
    assert state() == before
    with pytest.raises(ValueError, match="Did you mean 'fake'"), torch.no_grad(), rows_context(network, [("fak", 1)]):
        pass
    assert not any(prediction.raw.requires_grad for prediction in predict_both(roles.teacher, roles["student"], x, t, cond))


def test_conditions_stay_with_their_rows():
    """Labels, times and states of the samples are not mixed up: each row alone gives what it gives in the batch."""
    roles = build(denoiser("unet"))
    x, t, cond = inputs(times=(3.0, 420.0, 900.0))
    together = predict_both(guided(roles.teacher, 2.0), roles["fake"], x, t, cond)
    for k in range(3):
        one = (x[k : k + 1], t[k : k + 1], Condition.labels(cond.values["class_labels"][k : k + 1], 3))
        for whole, single in zip(together, alone(guided(roles.teacher, 2.0), roles["fake"], one), strict=True):
            torch.testing.assert_close(whole.raw[k : k + 1], single.raw, **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 100])
@pytest.mark.parametrize("limit", [0, 8])
def test_passes_of_few_rows_say_the_same(rows, limit):
    roles, (x_t, t, cond) = build(denoiser("dit"), limit, rows_at_once=rows), inputs()
    scales = torch.linspace(1.5, 4.0, len(x_t), dtype=torch.float64)  # of each sample its own, also where its branches part
    first, second = guided(roles.teacher, scales), roles["fake"]
    said, seen = both(first, second, (x_t, t, cond))
    assert_same(said, alone(first, second, (x_t, t, cond)), **EXACT)
    assert max(seen) <= rows and sum(seen) == 3 * len(x_t)
    guided_rows, own_rows = 2 * len(x_t), len(x_t)
    in_one = limit > 0 and rows >= guided_rows + own_rows
    assert len(seen) == (1 if in_one else math.ceil(guided_rows / rows) + math.ceil(own_rows / rows))


@pytest.mark.parametrize(
    ("num", "rows_at_once", "expected"),
    [(16, None, [32, 16]), (17, None, [9, 9, 9, 7, 9, 8]), (17, 51, [34, 17]), (17, 20, [20, 14, 17])],
)
def test_a_batch_that_is_not_small_goes_in_halves_unless_its_rows_are_named(num, rows_at_once, expected):
    roles, (x_t, t, cond) = build(denoiser("unet"), limit=0, rows_at_once=rows_at_once), inputs()
    batch = (x_t[:1].expand(num, -1, -1, -1), t[:1].expand(num), cond.select(torch.zeros(num, dtype=torch.int64)))
    said, seen = both(guided(roles.teacher, 2.0), roles["fake"], batch)
    assert seen == expected
    assert_same(said, alone(guided(roles.teacher, 2.0), roles["fake"], batch))


def test_networks_of_their_own_are_asked_at_once():
    roles = build_roles(denoiser("unet"), ROLES, "copies", LORA, one_batch_up_to=16)
    x_t, t, cond = inputs()
    batch = (x_t[:1].expand(20, -1, -1, -1), t[:1].expand(20), cond.select(torch.zeros(20, dtype=torch.int64)))
    with passes(roles["fake"].network) as seen:
        predict_both(roles.teacher, roles["fake"], *batch)
    assert seen == [20]
