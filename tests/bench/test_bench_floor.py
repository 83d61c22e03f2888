"""The bare pass is the pass that was done: same network, role, inputs and gradient; what it is for is told apart."""

from dataclasses import replace
from functools import partial

import bench_cells
import pytest
import torch

from diffdistill.bench import published, results
from diffdistill.bench.floor import MIN_ROUNDS, compare, compare_steady
from diffdistill.bench.passes import Pass, bare, count, recorded
from diffdistill.bench.run import bench
from diffdistill.bench.session import open_session
from diffdistill.bench.steps import footprint
from diffdistill.bench.timing import processor_time
from diffdistill.cli import main
from diffdistill.errors import UserError
from diffdistill.models.compute import compile_networks
from diffdistill.models.heads import features


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A definition of a small teacher."""
    return bench_cells.with_teacher(bench_cells.small_teacher(tmp_path_factory.mktemp("teacher") / "small"))


@pytest.fixture
def opened(small):
    """DMD2 with a discriminator on one network, its roles told apart by adapters that do something."""
    session = bench_cells.session(small, "dmd2-gan", "shared")
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


def test_nothing_is_observed_while_a_steady_action_is_timed(opened, asked):
    student = opened.roles["student"]
    original = type(student).__call__

    def clock(action):
        assert type(student).__call__ is original
        return processor_time(action)

    found = compare_steady(torch.no_grad()(lambda: [student(*asked), student(*asked)]), opened, clock, seconds=0.0)
    assert found.passes == {Pass("student", "forward", 2): 2}
    assert len(found.times) == len(found.floors) == found.num == MIN_ROUNDS and min(found.floors) > 0


def kept_footprint(small, method):
    """Return the memory columns of a cell once its optimisers have their moments."""
    session = bench_cells.session(small, method, "shared")
    session.cycle()
    return footprint(session)


def test_memory_of_plain_training_is_its_floor(small):
    """AGD's step is one pass of a student with gradient on a frozen network, so nothing is above the floor but its batch."""
    found = kept_footprint(small, "agd")
    assert found["memory"] == pytest.approx(1, abs=0.05) and found["of_plain"] == pytest.approx(1, abs=0.05)


def test_memory_of_two_roles_is_above_that_of_one(small):
    found = kept_footprint(small, "vsd")
    assert found["of_plain"] > found["memory"] > 1


def measured(definition, parts=("steps",), **asked):
    """Measure cells of a definition."""
    return bench(definition.with_options(parts, 0.1), definition.cells(**asked))


def test_a_step_costs_little_above_its_passes(small):
    """The bound is wide, since other work on a machine disturbs the two unequally: a pass done twice is found by the counts."""
    definition = bench_cells.with_teacher("digits-unet", batches=(16,))
    found = measured(definition, methods=["vsd"], layouts=["copies"])
    (row,) = found.steps
    assert 0.5 < row.ratio.median < 1.5
    assert row.step_ms > 0 and row.build_s > 0 and row.warm_up_s >= 0 and found.machine.threads == 1
    assert row.settings == definition.with_options((), 0.1).settings(definition.cells(methods=["vsd"], layouts=["copies"])[0])


def test_an_image_takes_its_steps_and_no_more(small):
    kept = []
    samples = small.samples.model_copy(update={"steps": (1, 4)})
    definition = small.model_copy(update={"samples": samples, "parts": ("samples",), "seconds": 0.01})
    found = bench(definition, definition.cells(layouts=["copies"]), keep=kept.append)
    assert [len(each.samples) for each in kept] == [1, 2, 3, 4] and kept[-1] == found
    assert [(row.rule, row.steps, row.passes) for row in found.samples] == [
        ("renoise", 1, 1),
        ("renoise", 4, 4),
        ("ddim", 1, 1),
        ("ddim", 4, 4),
    ]


def test_what_is_measured_is_not_measured_again_but_with_other_settings(small):
    definition = small.with_options(["steps"], 0.01)
    cells, said = definition.cells(methods=["agd"], layouts=["shared"]), []
    first = bench(definition, cells)
    again = bench(definition, definition.cells(methods=["agd"]), known=first, say=said.append)
    assert again.steps[1] == first.steps[0] and len(said) == 1 and "agd copies" in said[0]
    bench(definition, cells, ["clip_grad_norm=2.0"], known=first, say=said.append)
    bench(definition.with_options([], 0.02), cells, known=first, say=said.append)
    older = first.model_copy(update={"steps": tuple(row.model_copy(update={"revision": "older"}) for row in first.steps)})
    bench(definition, cells, known=older, say=said.append)
    assert len(said) == 4


def test_a_cell_that_cannot_be_is_told_and_the_others_are_measured(small, monkeypatch):
    definition = small.with_options(["steps"], 0.01)

    def build(config, published):
        if config.roles.layout == "shared":
            raise UserError("not here")
        return open_session(config, published)

    monkeypatch.setattr("diffdistill.bench.run.open_session", build)
    found = bench(definition, definition.cells(methods=["agd"]))
    assert [row.layout for row in found.steps] == ["copies"]
    assert [(row.layout, row.reason) for row in found.refused] == [("shared", "not here")]
    with pytest.raises(UserError, match="agd shared 2 cannot be measured: not here"):
        bench(definition, definition.cells(methods=["agd"], layouts=["shared"]))


@pytest.mark.slow
def test_compiled_blocks_are_measured_and_compiling_is_warm_up(small, monkeypatch):
    """By dynamo alone, which is what could not be: the C++ compiler takes a minute more."""
    monkeypatch.setattr("diffdistill.training.building.compile_networks", partial(compile_networks, backend="eager"))
    definition = small.with_options(["steps"], 0.01)
    found = bench(definition, definition.cells(methods=["progressive"], layouts=["copies"]), ["compute.compile=blocks"])
    assert found.steps[0].warm_up_s > found.steps[0].step_ms / 1000
    assert found.title.endswith(", compute.compile=blocks")


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


@pytest.mark.parametrize("layout", bench_cells.GPU.layouts)
@pytest.mark.parametrize("method", ["dmd2-gan", "dmd", "agd", "lcm"])
def test_the_published_network_is_measured_as_the_others_are(monkeypatch, method, layout):
    """What a GPU measures at true size, on a small network in its place: bf16, conditions of text, random data."""
    model = replace(published.MODELS["sd15"], build=small_network, state=(4, 8, 8))
    monkeypatch.setitem(published.MODELS, "sd15", model)
    sd15 = bench_cells.GPU.teachers["sd15"].model_copy(update={"batches": (bench_cells.BATCH,)})
    session = bench_cells.session(bench_cells.GPU.model_copy(update={"teachers": {"sd15": sd15}}), method, layout)
    found = compare(session.step, session, processor_time, seconds=0.0)
    assert found.passes[Pass("student", "weights", bench_cells.BATCH)] > 0
    assert all(parameter.isfinite().all() for parameter in session.roles.parameters("student"))


def test_settings_reach_the_networks_that_are_measured(small):
    session = bench_cells.session(small, "vsd", "copies", ["compute.attention=math"])
    assert session.teacher.denoiser.attention.name == "math"
    with pytest.raises(UserError, match="attenton"):
        bench_cells.session(small, "vsd", "copies", ["compute.attenton=math"])


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lcm", "dmd2", "vsd"])
def test_a_step_of_true_size_costs_little_above_its_passes(method):
    definition = bench_cells.GPU.with_options(["steps"], 3.0)
    found = bench(definition, definition.cells(["sd15"], [method], ["shared"]))
    assert found.steps[0].ratio.low < 1.05


@pytest.mark.gpu
def test_the_verb_measures_the_published_network_where_there_is_a_gpu(tmp_path):
    """Steps in both layouts, and images, with what a GPU alone has: events, the allocator's peak, and the file of its definition."""
    options = ["--methods", "vsd", "--seconds", "0.5", "-o", str(tmp_path)]
    assert main(["bench", "compute.cuda_graphs=true", *options]) == 0
    (found,) = results.read(tmp_path / "gpu.json").values()
    assert found.machine.device == torch.cuda.get_device_name() and [row.layout for row in found.steps] == ["copies", "shared"]
    assert all(row.peak_mib > 1000 and row.memory >= 0.99 and row.step_ms > 1 for row in found.steps)
    assert len(found.samples) == 16
