"""Adapters as views: a fresh one changes nothing, switching touches only the switch, and targets are what was asked for."""

import copy

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, network, perturb

from diffdistill.errors import UserError
from diffdistill.models.adapters import (
    LoraSpec,
    adapter_layers,
    adapter_parameters,
    inject_adapters,
    merged_state,
    role_context,
    target_modules,
)
from diffdistill.models.families import FAMILIES

ROLES = ("student", "fake")


def adapted(kind, spec=None):
    """A denoiser whose network has two perturbed adapters, and a copy of it from before."""
    net = denoiser(kind)
    plain = net.with_network(copy.deepcopy(net.network))
    inject_adapters(net.network, ROLES, spec or LoraSpec(rank=3, targets="all"), net.family.lora_targets)
    for seed, role in enumerate(ROLES):
        perturb(adapter_parameters(net.network, role).values(), seed)
    return net, plain


def run(net, role, batch):
    with torch.no_grad(), role_context(net.network, role):
        return net(*batch).raw


def flags(net):
    return [(layer._active_adapter, layer._disable_adapters) for layer in adapter_layers(net)]


@pytest.mark.parametrize("kind", NETWORKS)
def test_fresh_adapters_and_adapters_off_give_the_base_bit_for_bit(kind):
    net, batch = denoiser(kind), inputs()
    before = net(*batch).raw
    inject_adapters(net.network, ROLES, LoraSpec(rank=3, targets="all"), net.family.lora_targets)
    assert torch.equal(net(*batch).raw, before)  # off until a role is entered
    for role in (*ROLES, None):
        assert torch.equal(run(net, role, batch), before)
    perturb(adapter_parameters(net.network, "student").values(), 0)
    assert torch.equal(run(net, None, batch), before) and torch.equal(run(net, "fake", batch), before)
    assert not torch.equal(run(net, "student", batch), before)


@pytest.mark.parametrize("kind", NETWORKS)
def test_adapter_is_w_plus_scale_b_a(kind):
    net, plain = adapted(kind, LoraSpec(rank=3, alpha=12.0, targets="attention", ranks={"fake": 6}))
    batch = inputs()
    for role, scale in (("student", 12 / 3), ("fake", 12 / 6)):
        factors = adapter_parameters(net.network, role)
        by_hand = copy.deepcopy(plain.network)
        for name, module in by_hand.named_modules():
            if f"{name}.lora_A.weight" in factors:
                module.weight.data += scale * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(run(net, role, batch), plain.with_network(by_hand)(*batch).raw, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_merged_state_loads_in_a_fresh_network_and_gives_the_live_output(kind):
    net, plain = adapted(kind)
    fresh, batch = network(kind, seed=9).eval().double(), inputs()
    net.network.double()
    for role in (*ROLES, None):
        fresh.load_state_dict(merged_state(net.network, role), strict=True)
        torch.testing.assert_close(plain.with_network(fresh)(*batch).raw, run(net, role, batch), atol=1e-6, rtol=1e-6)


def test_role_context_changes_the_switch_only_and_restores_it_after_an_exception():
    net, _ = adapted("dit")
    net = net.network
    for parameter in adapter_parameters(net, "fake").values():
        parameter.requires_grad_(True)
    before = [(name, parameter.requires_grad) for name, parameter in net.named_parameters()]
    outer = flags(net)
    with role_context(net, "student"):
        student = flags(net)
        assert set(map(str, student)) == {"(['student'], False)"}
        with pytest.raises(KeyError), role_context(net, "fake"), role_context(net, None):
            assert all(disabled for _, disabled in flags(net))
            assert [(name, parameter.requires_grad) for name, parameter in net.named_parameters()] == before
            raise KeyError
        assert flags(net) == student
    assert flags(net) == outer
    assert [(name, parameter.requires_grad) for name, parameter in net.named_parameters()] == before


def test_deep_copy_switches_its_own_layers():
    net, _ = adapted("unet")
    twin, batch = net.with_network(copy.deepcopy(net.network)), inputs()
    assert torch.equal(run(twin, "student", batch), run(net, "student", batch))
    with role_context(twin.network, "fake"):
        assert all(disabled for _, disabled in flags(net.network))
    perturb(adapter_parameters(twin.network, "student").values(), 7)
    assert not torch.equal(run(twin, "student", batch), run(net, "student", batch))


def test_adapters_start_equal_for_equal_seed_and_leave_the_global_generator_alone():
    starts = []
    for spec in (LoraSpec(rank=3), LoraSpec(rank=3), LoraSpec(rank=3, seed=1)):
        net = denoiser("dit")
        torch.manual_seed(len(starts))
        before = torch.get_rng_state()
        inject_adapters(net.network, ROLES, spec, net.family.lora_targets)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append([adapter_parameters(net.network, role) for role in ROLES])
    first = next(iter(starts[0][0]))
    assert "lora_A" in first and starts[0][0][first].std() > 0
    assert all(torch.equal(starts[0][0][key], starts[1][1][key]) for key in starts[0][0])
    assert not torch.equal(starts[0][0][first], starts[2][0][first])


def test_adapters_of_a_half_precision_network_are_float32():
    net = denoiser("dit")
    net.network.to(torch.bfloat16)
    inject_adapters(net.network, ROLES, LoraSpec(rank=3), net.family.lora_targets)
    assert {p.dtype for p in adapter_parameters(net.network, "student").values()} == {torch.float32}
    batch = inputs()
    with role_context(net.network, "student"):
        assert net(batch.x.bfloat16(), batch.t, batch.cond).raw.dtype == torch.bfloat16
    state = merged_state(net.network, "student")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_targets_are_whole_endings_of_layer_names():
    net, presets = network("unet"), FAMILIES["UNet2DModel"].lora_targets
    found = target_modules(net, ("conv1", "to_out.0"), presets)
    assert all(name.rsplit(".", 1)[-1] == "conv1" or name.endswith("to_out.0") for name in found)
    assert "mid_block.resnets.0.conv1" in found and "mid_block.attentions.0.to_out.0" in found
    assert target_modules(net, ("conv_in",), presets) == ["conv_in"]
    every = {name for name, module in net.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
    assert set(target_modules(net, "all", presets)) <= every


@pytest.mark.parametrize("targets", [("to_q", "q_proj"), ("norm1",), ()])
def test_a_target_that_matches_nothing_names_the_available_endings(targets):
    presets = FAMILIES["UNet2DModel"].lora_targets
    with pytest.raises(UserError, match=r"conv_in.*to_out\.0.*to_q"):
        target_modules(network("unet"), targets, presets)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'attention'"):
        target_modules(network("unet"), "atention", FAMILIES["UNet2DModel"].lora_targets)


def test_a_second_injection_and_an_unknown_adapter_are_refused():
    net, _ = adapted("dit")
    with pytest.raises(UserError, match="holds adapters already"):
        inject_adapters(net.network, ("other",), LoraSpec(rank=3), net.family.lora_targets)
    with pytest.raises(ValueError, match="Did you mean 'student'"), role_context(net.network, "studnt"):
        pass
    with pytest.raises(ValueError, match="unknown adapter"), role_context(network("dit"), "student"):
        pass
