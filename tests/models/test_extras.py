"""Extra inputs change nothing at first, then depend on the value, and belong to the network they were added to."""

import copy
from dataclasses import replace

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, perturb

from diffdistill.errors import UserError
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.extras import ExtraInputs, add_extra_inputs, extra_inputs_of, feeding
from diffdistill.models.roles import build_roles

each_network = pytest.mark.parametrize("kind", NETWORKS)
NAMES = ("second_time", "guidance")


class Fed:
    """A family whose calls hold the condition's extra values."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def forward(self, network, x, t, cond):
        with feeding(network, cond):
            return self.inner.forward(network, x, t, cond)


def extended(kind, std=0.0):
    plain = denoiser(kind)
    net = replace(plain, network=copy.deepcopy(plain.network), family=Fed(plain.family))
    extra = add_extra_inputs(net.network, net.family, NAMES)
    if std:
        perturb(extra.parameters(), 0, std)
    return net, plain


def with_values(batch, second_time=None, guidance=None):
    values = dict(batch.cond.values)
    for name, value in (("second_time", second_time), ("guidance", guidance)):
        if value is not None:
            values[name] = torch.tensor(value, dtype=torch.float64)
    return batch._replace(cond=Condition(batch.cond.batch_size, values, batch.cond.null))


@each_network
def test_fresh_extra_inputs_leave_the_output_bit_equal(kind):
    net, plain = extended(kind)
    expected = plain(*inputs()).raw
    assert torch.equal(net(*inputs()).raw, expected)
    assert torch.equal(net(*with_values(inputs(), [10.0, 999.0], [1.0, 7.5])).raw, expected)


@each_network
def test_each_sample_depends_on_its_own_value_and_a_missing_value_adds_nothing(kind):
    net, plain = extended(kind, std=0.1)
    expected = plain(*inputs()).raw
    assert torch.equal(net(*inputs()).raw, expected)
    both = [net(*with_values(inputs(), [10.0, second], [1.0, 4.0])).raw for second in (500.0, 900.0)]
    assert torch.equal(both[0][0], both[1][0]) and not torch.allclose(both[0][1], both[1][1], atol=1e-3)
    for name in NAMES:
        moved = net(*with_values(inputs(), **{name: [10.0, 5.0]})).raw
        assert all(not torch.allclose(moved[k], expected[k], atol=1e-4) for k in range(2))


@each_network
def test_the_time_embedding_is_that_of_the_network_plus_the_mlp_of_waves(kind):
    net, _ = extended(kind, std=0.1)
    module = net.family.time_modules(net.network)[0]
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append(output))  # runs after the one that adds
    net(*inputs())
    net(*with_values(inputs(), guidance=[2.0, 8.0]))
    embedding = extra_inputs_of(net.network).embeddings["guidance"]
    angles = torch.tensor([2.0, 8.0])[:, None] / 16 * 1000 * 10_000 ** -(torch.arange(64) / 63)
    hidden = embedding.linear_in(torch.cat([angles.cos(), angles.sin()], 1))
    expected = embedding.linear_out(hidden * hidden.sigmoid())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(seen[-1] - seen[0], expected, atol=1e-4, rtol=1e-4)


@each_network
@pytest.mark.parametrize("checkpointed", [False, True])
def test_copies_train_their_extra_inputs_with_equal_gradients_under_checkpointing(kind, checkpointed):
    net, _ = extended(kind, std=0.1)
    found = []
    for enable in (False, checkpointed):
        roles = build_roles(net, ("student",), "copies")
        if enable:
            roles.enable_activation_checkpointing()
        first, second = with_values(inputs(), [10.0, 500.0]), with_values(inputs(1), [20.0, 30.0], [3.0, 4.0])
        # two calls with other values in one graph: the recomputation must hold those of its own forward
        (roles["student"](*first).raw.square().mean() + roles["student"](*second).raw.square().mean()).backward()
        found.append({key: p.grad for key, p in roles.named_parameters("student").items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    extra = {key for key in found[0] if key.startswith("extra_inputs.")}
    assert len(extra) == 8 and all(found[0][key].abs().max() > 0 for key in extra)


def test_a_fresh_extra_input_gets_gradient_in_its_last_layer():
    net, _ = extended("dit")
    net(*with_values(inputs(), guidance=[2.0, 8.0])).raw.square().mean().backward()
    embedding = extra_inputs_of(net.network).embeddings["guidance"]
    assert embedding.linear_out.weight.grad.abs().max() > 0 and embedding.linear_in.weight.grad.abs().max() == 0


@each_network
def test_deep_copy_feeds_from_its_own_embeddings(kind):
    net, _ = extended(kind, std=0.1)
    twin = net.with_network(copy.deepcopy(net.network))
    batch = with_values(inputs(), [10.0, 500.0], [1.0, 4.0])
    expected = net(*batch).raw
    assert torch.equal(twin(*batch).raw, expected)
    perturb(extra_inputs_of(twin.network).parameters(), 3)
    assert not torch.allclose(twin(*batch).raw, expected, atol=1e-3)
    assert torch.equal(net(*batch).raw, expected)
    for hook in (hook for module in twin.network.modules() for hook in module._forward_hooks.values()):
        assert hook.__self__ is extra_inputs_of(twin.network)
    twin(*batch).raw.sum().backward()
    assert all(parameter.grad is None for parameter in net.network.parameters())


def test_values_are_gone_after_the_call_also_after_an_exception():
    net, _ = extended("dit")
    extra = extra_inputs_of(net.network)
    with pytest.raises(RuntimeError), feeding(net.network, with_values(inputs(), [1.0, 2.0]).cond):
        assert set(extra.values) == {"second_time"}
        raise RuntimeError
    assert extra.values is None


def test_a_call_past_the_denoiser_is_an_error():
    net, _ = extended("unet")
    with pytest.raises(RuntimeError, match="second_time, guidance"):
        net.network(inputs().x, 3, class_labels=torch.tensor([0, 1]))


def test_adapters_with_extra_inputs_train_both_and_share_no_network():
    net, _ = extended("dit", std=0.1)
    roles = build_roles(net, ("student", "fake"), "copies", LoraSpec(rank=2, targets="all"))
    names = set(roles.named_parameters("student"))
    assert "extra_inputs.embeddings.guidance.linear_out.weight" in names
    assert not any(name.startswith("extra_inputs.") and "lora" in name for name in names)
    perturb(roles.parameters("student"), 1)
    batch = with_values(inputs(), [10.0, 500.0])
    roles.assign("fake", "student")
    assert torch.equal(roles["fake"](*batch).raw, roles["student"](*batch).raw)
    assert not torch.equal(roles["fake"](*batch).raw, roles.teacher(*batch).raw)
    with pytest.raises(UserError, match="layout 'copies'"):
        build_roles(net, ("student",), "shared", LoraSpec(rank=2))


@each_network
@pytest.mark.parametrize("lora", [None, LoraSpec(rank=2, targets="all")])
def test_roles_are_given_extra_inputs_and_the_teacher_is_not(kind, lora):
    teacher = denoiser(kind)
    expected = teacher(*inputs()).raw
    torch.manual_seed(1)
    roles = build_roles(teacher, ("student", "target"), "copies", lora, extra_inputs=("guidance",))
    told = with_values(inputs(), guidance=[1.0, 7.5])
    for role in ("student", "target"):
        assert set(extra_inputs_of(roles[role].network).embeddings) == {"guidance"}
        assert torch.equal(roles[role](*told).raw, expected)
        assert "extra_inputs.embeddings.guidance.linear_out.weight" in roles.named_parameters(role)
    assert extra_inputs_of(teacher.network) is None and roles.teacher is teacher
    torch.manual_seed(2)  # every process of a run has the same initial values
    other = build_roles(teacher, ("student",), "copies", lora, extra_inputs=("guidance",))
    assert all(torch.equal(value, other.state("student")[key]) for key, value in roles.state("student").items())
    with pytest.raises(UserError, match="layout 'copies'"):
        build_roles(teacher, ("student",), "shared", LoraSpec(rank=2), extra_inputs=("guidance",))


def test_values_without_a_null_stay_in_both_branches():
    told = with_values(inputs()).cond.with_values(guidance=torch.tensor([1.0, 7.5]))
    assert told.paired().values["guidance"].tolist() == [1.0, 7.5, 1.0, 7.5]
    assert told.paired().values["class_labels"].tolist() == [0, 1, 3, 3]


def test_full_scale_sets_the_unit_of_the_value():
    values = []
    for scale in (1000.0, 1.0):
        net = extended("dit")[1]
        extra = add_extra_inputs(net.network, net.family, {"second_time": scale})
        perturb(extra.parameters(), 0)
        values.append(extra.embeddings["second_time"](torch.tensor([0.3 * scale, scale], dtype=torch.float64)))
    torch.testing.assert_close(values[0], values[1])


def test_what_cannot_be_added_is_refused():
    net, plain = extended("dit")
    with pytest.raises(UserError, match="already"):
        add_extra_inputs(net.network, net.family, NAMES)
    with pytest.raises(UserError, match="Did you mean 'guidance'"):
        add_extra_inputs(plain.network, plain.family, ("guidence",))
    with pytest.raises(UserError, match="at least one"):
        add_extra_inputs(plain.network, plain.family, ())


def test_a_stock_pipeline_cannot_carry_them_and_the_reason_is_said():
    extra = extra_inputs_of(extended("unet")[0].network)
    assert not extra.stock_pipeline_can_carry and "stock pipeline" in ExtraInputs.reason
