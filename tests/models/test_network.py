"""EDM preconditioning around a network: the scalings against the table, and the contract kept."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from small_networks import unet

from diffdistill.math.schedules import EDMSchedule, RectifiedFlowSchedule, VPSchedule
from diffdistill.models.condition import Condition
from diffdistill.models.denoiser import network_of
from diffdistill.models.families import FAMILIES
from diffdistill.models.guidance import guided
from diffdistill.models.network import EDMDenoiser, Framing, NetworkDenoiser
from diffdistill.oracles.gaussian import GaussianTeacher

SIGMA_DATA = 0.5


class Recorder(torch.nn.Module):
    """A network that remembers its input and returns three times it."""

    def forward(self, x, t, class_labels=None, return_dict=False):
        self.seen = (x, t)
        return (3 * x,)


def denoiser():
    return EDMDenoiser(Recorder(), FAMILIES["UNet2DModel"], EDMSchedule(), (1, 2, 2), SIGMA_DATA)


def test_edm_network_sees_scaled_input_and_log_sigma_and_gives_the_denoised_sample():
    net, x = denoiser(), torch.randn(2, 1, 2, 2)
    sigma = torch.tensor([0.5, 20.0], dtype=torch.float64)
    x0 = net(x, sigma, Condition.none(2)).x0
    for k, s in enumerate(sigma.tolist()):
        c_in = 1 / (s**2 + SIGMA_DATA**2) ** 0.5
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s * SIGMA_DATA / (s**2 + SIGMA_DATA**2) ** 0.5
        seen, time = net.network.seen
        torch.testing.assert_close(seen[k], c_in * x[k])
        torch.testing.assert_close(float(time[k]), torch.log(torch.tensor(s)).item() / 4, atol=1e-6, rtol=0)
        torch.testing.assert_close(x0[k], c_skip * x[k] + c_out * 3 * c_in * x[k])


def test_edm_network_serves_a_vp_method_through_its_view():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    vp, net = VPSchedule(abar), denoiser()
    t = torch.tensor([300.0, 700.0], dtype=torch.float64)
    alpha, sigma = vp.coefficients(t)
    x = torch.randn(2, 1, 2, 2)
    scale = alpha.float().reshape(-1, 1, 1, 1)
    direct = net(x / scale, sigma / alpha, Condition.none(2)).x0
    torch.testing.assert_close(net.in_schedule(vp)(x, t, Condition.none(2)).x0, direct, atol=1e-5, rtol=1e-5)


def test_flow_network_is_asked_at_a_thousand_sigma_after_the_shift():
    recorder, schedule = Recorder(), RectifiedFlowSchedule(shift=3.0)
    net = NetworkDenoiser(recorder, FAMILIES["UNet2DModel"], schedule, "flow_prediction", (1, 2, 2))
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([1.0, 0.25], dtype=torch.float64)
    x0 = net(x, t, Condition.none(2)).x0
    sigma = [1.0, 0.75 / 1.5]
    torch.testing.assert_close(recorder.seen[1], torch.tensor([1000 * s for s in sigma]))
    for k, s in enumerate(sigma):
        torch.testing.assert_close(x0[k], x[k] - s * 3 * x[k])  # the network returns u = eps - x0 = 3 x


def test_extra_inputs_reach_the_network_and_stay_in_both_branches_of_guidance(tmp_path):
    from diffdistill.models.extras import add_extra_inputs
    from diffdistill.models.guidance import guided

    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.manual_seed(0)
    network = unet(attention=False, num_class_embeds=4).eval()
    net = NetworkDenoiser(network, FAMILIES["UNet2DModel"], VPSchedule(abar), "v_prediction", (1, 8, 8))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([500.0, 20.0], dtype=torch.float64)
    plain = Condition.labels(torch.tensor([0, 2]), 3)
    before = net(x, t, plain).raw
    extras = add_extra_inputs(network, net.family, ["guidance"])
    w = torch.tensor([2.0, 7.0], dtype=torch.float64)
    cond = Condition(2, {**plain.values, "guidance": w}, plain.null)
    assert torch.equal(net(x, t, cond).raw, before)
    assert torch.equal(cond.null_like().values["guidance"], w)
    assert torch.equal(cond.paired().values["guidance"], torch.cat([w, w]))
    for parameter in extras.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(net(x, t, cond).raw, before)
    guided(net, 2.0)(x, t, cond)


def test_the_network_is_found_behind_views_and_an_oracle_has_none():
    net = denoiser()
    assert network_of(net) is net.network
    assert network_of(guided(net.in_schedule(RectifiedFlowSchedule()), 2.0)) is net.network
    oracle = GaussianTeacher(torch.zeros(1, 2, 2), 1.0, EDMSchedule())
    assert network_of(oracle) is network_of(guided(oracle, 2.0)) is None


def test_another_network_keeps_the_role_and_another_role_the_network():
    entered = []

    def role(name):
        return lambda: contextlib.nullcontext(entered.append(name))

    net, batch = denoiser(), (torch.ones(1, 1, 2, 2), torch.ones(1, dtype=torch.float64), Condition.none(1))
    first = net.with_role(role("first"))
    other = first.with_network(Recorder())
    assert first.network is net.network and other.network is not net.network
    assert torch.equal(other(*batch).x0, net(*batch).x0) and entered == ["first"]
    other.with_role(role("second"))(*batch)
    assert entered == ["first", "second"]


@pytest.mark.parametrize(
    ("original", "size", "crop"),
    [
        ((44, 24), (20, 12), (1, 0)),
        ((24, 44), (12, 20), (0, 1)),
        ((40, 24), (20, 12), (0, 0)),
        ((10, 12), (20, 12), (0, 6)),  # a small image grows to 20x24
    ],
)
def test_a_framing_says_where_the_centred_crop_begins_in_the_resized_image(original, size, crop):
    assert Framing.centred(original, size) == (original, crop, size)


def test_the_conditions_of_size_follow_the_image():
    """SDXL: original, crop, size. PixArt-alpha at 1024: resolution and aspect ratio of the size."""
    framing = Framing((44, 24), (1, 0), (20, 12))
    sdxl = SimpleNamespace(config=SimpleNamespace(addition_embed_type="text_time"))
    values = FAMILIES["UNet2DConditionModel"].framed(sdxl, framing)
    assert {name: value.tolist() for name, value in values.items()} == {"time_ids": [[44, 24, 1, 0, 20, 12]]}
    sd = SimpleNamespace(config=SimpleNamespace(addition_embed_type=None))
    assert FAMILIES["UNet2DConditionModel"].framed(sd, framing) == {}
    values = FAMILIES["PixArtTransformer2DModel"].framed(SimpleNamespace(use_additional_conditions=True), framing)
    assert values["resolution"].tolist() == [[20, 12]]
    torch.testing.assert_close(values["aspect_ratio"], torch.tensor([[20 / 12]]))
