"""Features equal those of a full pass at the cost of part of one, and a fresh head says 0."""

import math

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, perturb

from diffdistill.errors import UserError
from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.guidance import guided
from diffdistill.models.heads import DiscriminatorHead, build_head, features, predict_with_features, tap_module
from diffdistill.models.loading import load_teacher
from diffdistill.models.network import EDMDenoiser
from diffdistill.models.roles import build_roles

each_network = pytest.mark.parametrize("kind", NETWORKS)
FEATURE_SHAPES = {"unet": (16, 4, 4), "dit": (16, 16)}


def modules_run(net, call):
    """Names of the modules whose forward starts during a call."""
    names, handles = [], []
    for name, module in net.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
    call()
    for handle in handles:
        handle.remove()
    return names


@each_network
def test_early_exit_features_equal_those_of_a_full_pass(kind):
    net, batch = denoiser(kind), inputs()
    for tap in net.family.taps(net.network):
        kept = []
        handle = tap_module(net, tap).register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        expected = net(*batch)
        handle.remove()
        early = features(net, *batch, tap=tap)
        prediction, full = predict_with_features(net, *batch, tap=tap)
        assert torch.equal(early, kept[0]) and torch.equal(full, kept[0]) and torch.equal(prediction.raw, expected.raw)
    assert features(net, *batch).shape == (2, *FEATURE_SHAPES[kind])


@each_network
def test_the_rest_of_the_network_is_not_run(kind):
    net, batch = denoiser(kind), inputs()
    after = "conv_out" if kind == "unet" else "proj_out_2"
    assert after in modules_run(net.network, lambda: net(*batch))
    ran = modules_run(net.network, lambda: features(net, *batch))
    assert after not in ran and not any(name.startswith("up_blocks") for name in ran)
    assert not any(module._forward_hooks for module in net.network.modules())  # and the tap is gone


@each_network
@pytest.mark.parametrize("checkpointed", [False, True])
def test_features_are_read_in_a_role_and_carry_its_gradient(kind, checkpointed):
    roles = build_roles(denoiser(kind), ("student", "fake"), "shared", LoraSpec(rank=2, targets="all"))
    for seed, name in enumerate(roles.names):
        perturb(roles.parameters(name), seed)
    x, t, cond = inputs()
    base = features(denoiser(kind), x, t, cond)
    assert torch.equal(features(roles.teacher, x, t, cond), base) and not torch.equal(features(roles["fake"], x, t, cond), base)

    found = []
    for early in (True, False):
        if checkpointed:
            roles.enable_activation_checkpointing()
        roles.train_only(["student"])
        for parameter in roles.parameters("student"):
            parameter.grad = None
        x0 = roles["student"](x, t, cond).x0
        # through the frozen fake and teacher into the student, as in a GAN on their features
        read = features if early else (lambda *args: predict_with_features(*args)[1])
        (read(roles["fake"], x0, t, cond).square().mean() + read(roles.teacher, x0, t, cond).square().mean()).backward()
        found.append([parameter.grad for parameter in roles.parameters("student")])
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*found, strict=True))
    assert all(parameter.grad is None for parameter in roles.parameters("fake"))


def test_features_of_a_view_are_taken_at_the_views_state():
    net, (x, _, cond) = denoiser("dit"), inputs()
    flow = RectifiedFlowSchedule(1.0)
    view, t = net.in_schedule(flow), torch.tensor([0.2, 0.7], dtype=torch.float64)
    alpha, sigma = flow.coefficients(t)
    at = net.schedule.time_of_lambda((alpha / sigma).log())
    scale = (net.schedule.alpha(at) / alpha).float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(features(view, x, t, cond), features(net, x * scale, at, cond), atol=1e-5, rtol=1e-4)
    prediction, read = predict_with_features(view, x, t, cond)
    assert torch.equal(read, features(view, x, t, cond)) and torch.equal(prediction.raw, view(x, t, cond).raw)


def test_an_error_inside_the_network_is_not_swallowed():
    net, (x, t, _) = denoiser("unet"), inputs()
    with pytest.raises(ValueError, match="class_labels"):
        features(net, x, t, Condition.none(2))
    assert not any(module._forward_hooks for module in net.network.modules())


def test_what_has_no_features_is_refused():
    net, batch = denoiser("dit"), inputs()
    with pytest.raises(UserError, match=r"block\.0.*mid"):
        features(net, *batch, tap="middle")
    with pytest.raises(UserError, match="guidance"):
        features(guided(net, 3.0), *batch)


@each_network
def test_a_fresh_head_says_zero_so_the_loss_starts_at_two_log_two(kind):
    net, batch = denoiser(kind), inputs()
    head = build_head(net)
    assert head.feature_shape == FEATURE_SHAPES[kind]
    real, fake = (head(features(net, *inputs(seed))) for seed in (0, 1))
    assert torch.equal(real, torch.zeros(2)) and torch.equal(fake, torch.zeros(2))
    softplus = torch.nn.functional.softplus
    assert (softplus(-real) + softplus(fake)).mean().item() == pytest.approx(2 * math.log(2), abs=1e-6)
    (softplus(-real) + softplus(fake)).sum().backward()
    assert head.logit.bias.grad.abs().sum() == 0 and head.logit.weight.grad.abs().sum() > 0
    assert head(features(net, *batch).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 8, 8), (6, 16, 12), (3, 1, 1), (9, 16), (1, 5)])
def test_a_head_learns_which_half_is_real(shape):
    torch.manual_seed(0)
    head = DiscriminatorHead(shape, width=16)
    # a ramp for tokens: their LayerNorm takes a common shift away
    signal = torch.ones(shape) if len(shape) == 3 else torch.linspace(-2, 2, shape[1]).expand(shape)
    real, fake = torch.randn(16, *shape) + signal, torch.randn(16, *shape) - signal
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    softplus = torch.nn.functional.softplus
    for _ in range(30):
        loss = (softplus(-head(real)) + softplus(head(fake))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in head.parameters())
    assert (head(real) > 0).float().mean() > 0.75 and (head(fake) < 0).float().mean() > 0.75
    one_by_one = torch.cat([head(row[None]) for row in real])
    torch.testing.assert_close(head(real), one_by_one, atol=1e-4, rtol=1e-4)  # one logit per sample, of that sample


def test_a_head_reads_a_map_of_another_shape_averaged_to_its_own():
    """Doubling every pixel changes no average, so the last layers see what they saw."""
    head = DiscriminatorHead((6, 4, 3), width=16)
    torch.nn.init.normal_(head.logit.weight)
    head.trunk = head.trunk[-4:]  # without the convolutions before, which see edges
    x = torch.randn(2, 16, 4, 3)
    torch.testing.assert_close(head(x.repeat_interleave(2, 2).repeat_interleave(2, 3)), head(x))
    assert DiscriminatorHead((6, 16, 12), width=16)(torch.randn(2, 6, 20, 10)).shape == (2,)


def test_a_head_for_an_edm_network_and_other_taps_fits():
    unet = denoiser("unet")
    edm = EDMDenoiser(unet.network, unet.family, EDMSchedule(), unet.sample_shape)
    x, _, cond = inputs()
    head = build_head(edm, "up.1", width=8)
    assert head.feature_shape == (8, 8, 8)
    t = torch.tensor([0.5, 20.0], dtype=torch.float64)
    assert head(features(edm, x, t, cond, "up.1")).shape == (2,)


def test_a_head_refuses_features_it_was_not_made_for():
    with pytest.raises(UserError, match="maps"):
        DiscriminatorHead((3,))
    with pytest.raises(UserError, match="multiple of 4"):
        DiscriminatorHead((3, 4, 4), width=6)
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 4\)"):
        DiscriminatorHead((3, 4, 4), width=8)(torch.zeros(2, 16, 3))


def test_a_head_is_as_wide_as_its_network_and_its_shape_needs_no_weights():
    """Also behind a block of attention, which asks a kernel only where there are numbers."""
    whole = load_teacher("digits-unet", torch.float64)
    shapes = load_teacher("digits-unet", torch.bfloat16, "meta")
    heads = [build_head(each.denoiser, cond=each.condition(each.examples(1), 1)) for each in (whole, shapes)]
    assert heads[0].feature_shape == heads[1].feature_shape
    assert [head.logit.weight.dtype for head in heads] == [torch.float64, torch.float32]
    assert heads[1].logit.weight.is_meta
