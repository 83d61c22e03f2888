"""The bare pass is the pass that was done: same network, role, inputs and gradient; what it is for is told apart."""

from dataclasses import replace

import bench_cells
import pytest
import torch

from diffdistill.bench import published
from diffdistill.bench.floor import MIN_ROUNDS, compare
from diffdistill.bench.matrix import LAYOUTS, Cell
from diffdistill.bench.passes import Pass, bare, count, recorded
from diffdistill.bench.run import bench
from diffdistill.bench.session import open_session
from diffdistill.bench.steps import footprint
from diffdistill.bench.timing import processor_time
from diffdistill.errors import UserError
from diffdistill.models.heads import features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher") / "small"


@pytest.fixture
def opened(monkeypatch, folder):
    """DMD2 with a discriminator on one network, its roles told apart by adapters that do something."""
    session = bench_cells.session(bench_cells.add_to_table(monkeypatch, folder), "dmd2-gan", "shared")
    for role in session.roles.names:
        for seed, (name, parameter) in enumerate(session.roles.named_parameters(role).items()):
            if "lora_B" in name:
                generator = torch.Generator().manual_seed(seed + len(role))
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return session


@pytest.fixture
def asked(opened):
    """States, times and condition of a batch."""
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, torch.tensor([10.0, 700.0], dtype=torch.float64), opened.teacher.condition(torch.tensor([1, 2]))


@pytest.mark.parametrize("role", ["teacher", "student", "fake"])
def test_the_bare_pass_gives_what_the_network_gave(opened, asked, role):
    denoiser = opened.roles.teacher if role == "teacher" else opened.roles[role]
    with recorded(opened.roles) as calls, torch.no_grad():
        raw = denoiser(*asked).raw
    (call,) = calls
    with torch.no_grad(), call.prepared() as (network, x):
        assert torch.equal(network(x), raw)
    assert call.what == Pass(role, "forward", 2)


def test_a_bare_pass_up_to_a_tap_gives_the_taps_output_and_no_more(opened, asked):
    with recorded(opened.roles) as calls, torch.no_grad():
        output = features(opened.roles["fake"], *asked, tap="mid")
    (call,) = calls
    ran = []
    opened.teacher.network.conv_out.register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad(), call.prepared() as (network, x):
        assert torch.equal(network(x), output)
    assert call.what == Pass("fake", "forward", 2, "mid") and not ran


def backward(opened, denoiser, asked, through_inputs: bool):
    """Call a denoiser, do the backward pass of its raw output, and return what was written down."""
    x, t, cond = asked
    with recorded(opened.roles) as calls:
        raw = denoiser(x.clone().requires_grad_(through_inputs), t, cond).raw
        raw.backward(torch.ones_like(raw))
    return calls[0]


def test_a_bare_pass_into_weights_leaves_their_gradients(opened, asked):
    opened.roles.train_only(("student",))
    call = backward(opened, opened.roles["student"], asked, through_inputs=False)
    own = [parameter.grad.clone() for parameter in opened.roles.parameters("student")]
    bare(call, opened.roles, processor_time)
    assert call.what.kind == "weights"
    assert all(torch.equal(p.grad, grad) for p, grad in zip(opened.roles.parameters("student"), own, strict=True))
    assert any(grad.any() for grad in own)


def test_a_pass_through_a_frozen_network_is_into_its_inputs_alone(opened, asked):
    opened.roles.train_only(("student",))
    call = backward(opened, opened.roles.teacher, asked, through_inputs=True)
    bare(call, opened.roles, processor_time)
    assert call.what == Pass("teacher", "inputs", 2)
    assert all(parameter.grad is None for parameter in opened.teacher.network.parameters())


def test_a_pass_into_weights_and_inputs_is_both(opened, asked):
    opened.roles.train_only(("fake",))
    assert backward(opened, opened.roles["fake"], asked, through_inputs=True).what.kind == "both"


def test_a_graph_that_no_backward_pass_comes_to_counts_as_forward(opened, asked):
    opened.roles.train_only(("student",))
    with recorded(opened.roles) as calls:
        kept = opened.roles["student"](*asked)
    assert kept.raw.requires_grad and count(calls) == {Pass("student", "forward", 2): 1}


def test_a_pass_with_a_tangent_is_told_apart_and_can_be_run_again(opened, asked):
    x, t, cond = asked
    with recorded(opened.roles) as calls, torch.no_grad():
        torch.func.jvp(lambda state: opened.roles["student"](state, t, cond).raw, (x,), (torch.ones_like(x),))
    (call,) = calls
    assert call.what == Pass("student", "jvp", 2)
    assert bare(call, opened.roles, processor_time) > 0


def test_nothing_is_observed_any_more_afterwards(opened, asked):
    with recorded(opened.roles) as calls:
        pass
    opened.roles.teacher(*asked)
    assert calls == []


def test_passes_are_counted_over_rounds_that_are_always_done(opened):
    with_time = compare(opened.step, opened, processor_time, seconds=0.0, per_round=2)
    assert len(with_time.times) == len(with_time.floors) == MIN_ROUNDS and with_time.num == 2 * MIN_ROUNDS
    assert with_time.passes[Pass("fake", "weights", 2)] == 1


def kept_footprint(teacher, method):
    """Return the memory columns of a cell once its optimisers have their moments."""
    session = bench_cells.session(teacher, method, "shared")
    session.cycle()
    return footprint(session)


def test_memory_of_plain_training_is_its_floor(monkeypatch, folder):
    """AGD's step is one pass of a student with gradient on a frozen network, so nothing is above the floor but its batch."""
    found = kept_footprint(bench_cells.add_to_table(monkeypatch, folder), "agd")
    assert found["memory"] == pytest.approx(1, abs=0.05) and found["of_plain"] == pytest.approx(1, abs=0.05)


def test_memory_of_two_roles_is_above_that_of_one(monkeypatch, folder):
    found = kept_footprint(bench_cells.add_to_table(monkeypatch, folder), "vsd")
    assert found["of_plain"] > found["memory"] > 1


def test_a_step_costs_little_above_its_passes():
    """The bound is wide, since other work on a machine disturbs the two unequally: a pass done twice is found by the counts."""
    found = bench(["steps"], ["digits-unet"], ["vsd"], ["copies"], batch=16, seconds=0.1)
    (row,) = found.steps
    assert 0.5 < row.ratio.median < 1.5
    assert row.step_ms > 0 and row.first_step_s > 0 and found.machine.threads == 1


def test_an_image_takes_its_steps_and_no_more(monkeypatch):
    monkeypatch.setattr("diffdistill.bench.sampling.STEPS", (1, 4))
    kept = []
    found = bench(["samples"], ["digits-unet"], layouts=["copies"], batch=1, seconds=0.01, keep=kept.append)
    assert [len(each.samples) for each in kept] == [1, 2, 3, 4] and kept[-1] == found
    assert [(row.rule, row.steps, row.passes) for row in found.samples] == [
        ("renoise", 1, 1),
        ("renoise", 4, 4),
        ("ddim", 1, 1),
        ("ddim", 4, 4),
    ]


def small_network():
    """Return a network of Stable Diffusion 1.5's kind."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=4,
        norm_num_groups=4,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["dmd2-gan", "dmd", "agd", "lcm"])
def test_the_published_network_is_measured_as_the_others_are(monkeypatch, method, layout):
    """What a GPU measures at true size, on a small network in its place: bf16, conditions of text, random data."""
    model = replace(published.MODELS["sd15"], build=small_network, state=(4, 8, 8))
    monkeypatch.setitem(published.MODELS, "sd15", model)
    session = bench_cells.session("sd15", method, layout)
    found = compare(session.step, session, processor_time, seconds=0.0)
    assert found.passes[Pass("student", "weights", bench_cells.BATCH)] > 0
    assert all(parameter.isfinite().all() for parameter in session.roles.parameters("student"))


def test_settings_reach_the_networks_that_are_measured():
    cell = Cell("digits-unet", "vsd", "copies", 2)
    assert open_session(cell, ["compute.attention=math"]).teacher.denoiser.attention.name == "math"
    with pytest.raises(UserError, match="attenton"):
        open_session(cell, ["compute.attenton=math"])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lcm", "dmd2", "vsd"])
def test_a_step_of_true_size_costs_little_above_its_passes(method):
    found = bench(["steps"], ["sd15"], [method], ["shared"], seconds=3.0)
    assert found.steps[0].ratio.low < 1.05
