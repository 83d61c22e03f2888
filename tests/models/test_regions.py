"""Compiled blocks are seen in the role of the call, give the gradients of plain ones, and step aside where a hook looks inside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from role_networks import denoiser, inputs, perturb
from small_networks import dit

from diffdistill.models.adapters import LoraSpec
from diffdistill.models.attention import Attention
from diffdistill.models.compute import compile_networks
from diffdistill.models.heads import features, predict_with_features
from diffdistill.models.regions import Recorded, compile_blocks, is_looked_into, looking_inside
from diffdistill.models.roles import Roles, build_roles
from diffdistill.models.together import predict_both

ROLES = ("teacher", "student", "fake")


def build(attention: Attention) -> Roles:
    """Return roles of one transformer, whose weights and adapters have moved apart."""
    roles = build_roles(
        denoiser("dit").with_attention(attention),
        ROLES[1:],
        "shared",
        LoraSpec(rank=2, targets=("to_q", "to_out.0")),
        one_batch_up_to=8,
    )
    for seed, name in enumerate(ROLES[1:]):
        perturb(roles.parameters(name), seed, 0.3)
    return roles


def view(roles: Roles, name: str):
    return roles.teacher if name == "teacher" else roles[name]


@pytest.fixture(scope="module")
def both():
    """The same roles plain, and with blocks compiled as Python sees them: which graph serves which call is what is tested here."""
    torch._dynamo.reset()
    plain, compiled = build(Attention()), build(Attention())
    compile_networks(compiled, varying_sizes=False, backend="eager")
    yield plain, compiled
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_block_is_in_the_role_of_the_call(both):
    plain, compiled = both
    with torch.no_grad():
        wanted = {name: view(plain, name)(*inputs()).raw for name in ROLES}
        for name in (*ROLES, *reversed(ROLES)):
            assert torch.equal(view(compiled, name)(*inputs()).raw, wanted[name]), name
    assert not torch.equal(wanted["student"], wanted["fake"]) and not torch.equal(wanted["student"], wanted["teacher"])


@pytest.mark.slow
def test_the_attention_of_a_compiled_block_is_chosen_and_said(both):
    _, compiled = both
    with torch.no_grad():
        compiled.teacher(*inputs())
    assert str(compiled.teacher.attention).startswith("auto: flash (torch's first choice) for float32 on cpu")


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["student", "fake"])
def test_a_compiled_block_gives_the_gradients_of_a_plain_one_to_the_role_that_is_trained(both, trained):
    gradients = []
    for roles in both:
        roles.train_only((trained,))
        out = view(roles, trained)(*inputs()).x0
        with torch.no_grad():
            target = roles.teacher(*inputs(1)).x0
        (out - target).square().mean().backward()
        gradients.append({name: [parameter.grad for parameter in roles.parameters(name)] for name in ROLES[1:]})
        for name in ROLES[1:]:
            for parameter in roles.parameters(name):
                parameter.grad = None
    for name in ROLES[1:]:
        for one, other in zip(gradients[0][name], gradients[1][name], strict=True):
            assert (one is None) == (other is None) == (name != trained)
            if one is not None:
                torch.testing.assert_close(other, one)


@pytest.mark.slow
def test_hooks_are_called_where_blocks_are_compiled(both):
    """Taps, also one inside a block, and rows of one batch in several roles, whose updates are added by hooks inside blocks."""
    plain, compiled = both
    with torch.no_grad():
        for roles in both:
            roles.teacher(*inputs())
        wanted = features(plain.teacher, *inputs(), tap="mid")
        assert torch.equal(features(compiled.teacher, *inputs(), tap="mid"), wanted)
        assert torch.equal(predict_with_features(compiled["fake"], *inputs())[1], features(plain["fake"], *inputs()))
        together = [predict_both(roles.teacher, roles["fake"], *inputs()) for roles in both]
    for one, other in zip(*together, strict=True):
        torch.testing.assert_close(other.x0, one.x0)
    assert not torch.equal(together[1][0].x0, together[1][1].x0)


@pytest.mark.slow
def test_blocks_through_the_compiler_s_autograd_give_the_output_and_gradient_of_plain_ones():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = dit(num_layers=1).eval()
    compiled = dit(num_layers=1).eval()
    compiled.load_state_dict(plain.state_dict())
    assert compile_blocks(compiled, ("BasicTransformerBlock",), varying_sizes=False, backend="aot_eager") == 1
    x, _, cond = inputs()
    outs = []
    for network in (plain, compiled):
        raw = network(x, timestep=torch.tensor([3.0, 420.0]), class_labels=cond.values["class_labels"]).sample
        raw.square().mean().backward()
        outs.append((raw.detach(), network.transformer_blocks[0].attn1.to_q.weight.grad))
    for one, other in zip(*outs, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-4)


def test_looking_inside_ends_where_it_began_also_after_an_exception():
    network = torch.nn.Linear(1, 1)
    with pytest.raises(ZeroDivisionError), looking_inside(network):
        with looking_inside(network):
            pass
        assert is_looked_into(network)
        1 / 0
    assert not is_looked_into(network)


class Replayed(Recorded):
    """Counts the passes that would be replayed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __call__(self, forward, x, t, cond):
        self.count += 1
        return forward(x, t, cond)


def test_only_whole_passes_without_gradient_in_the_denoiser_s_own_role_are_recorded():
    recorded = Replayed()
    roles = build(Attention())
    roles.teacher = replace(roles.teacher, recorded=recorded)
    roles.teacher(*inputs())
    with torch.no_grad():
        features(roles.teacher, *inputs())
        predict_with_features(roles.teacher, *inputs())
        predict_both(roles.teacher, roles["fake"], *inputs())
        roles["student"](*inputs())
        assert recorded.count == 0
        roles.teacher(*inputs())
    assert recorded.count == 1


@pytest.mark.gpu
def test_a_recorded_pass_is_the_pass_for_every_input_shape_and_weight():
    net = denoiser("unet")
    net.network.cuda()
    recorded = replace(net, recorded=Recorded())
    x, t, cond = inputs(times=(3.0, 420.0, 700.0))
    x, t, cond = x.cuda(), t.cuda(), cond.to("cuda")
    with torch.no_grad():
        for size in (1, 3, 2, 3):
            for seed in range(3):
                states = x[:size] + seed
                rows = torch.arange(size, device="cuda")
                first = recorded(states, t[:size], cond.select(rows)).raw
                kept = first.clone()
                recorded(states + 1, t[:size], cond.select(rows))
                assert torch.equal(first, kept)  # the next pass does not write into what this one gave
                torch.testing.assert_close(first, net(states, t[:size], cond.select(rows)).raw)
        for parameter in net.network.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(recorded(x, t, cond).raw, net(x, t, cond).raw)
