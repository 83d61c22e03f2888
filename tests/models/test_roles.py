"""Roles as views: gradients of the shared form are those of separate copies, the teacher stays, weights travel exactly."""

import copy

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, network, perturb
from small_networks import unet

from diffdistill.errors import UserError
from diffdistill.math.schedules import VPSchedule
from diffdistill.math.transfer import add_noise
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.roles import Roles, Shadow, build_roles
from diffdistill.oracles.affine import AffineDenoiser
from diffdistill.oracles.gaussian import GaussianTeacher

LORA = LoraSpec(rank=3, targets="all", ranks={"fake": 5})
EQUAL_RANKS = LoraSpec(rank=3, targets="attention")
ROLES = ("student", "fake")
LAYOUTS = {"copies": ("copies", None), "copies with lora": ("copies", EQUAL_RANKS), "shared": ("shared", EQUAL_RANKS)}
each_network = pytest.mark.parametrize("kind", NETWORKS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def build(kind="dit", layout="shared", lora=LORA, names=ROLES) -> Roles:
    roles = build_roles(denoiser(kind), names, layout, lora)
    for seed, name in enumerate(names):
        perturb(roles.parameters(name), seed, 0.1 if lora else 0.01)
    return roles


def in_layout(layout, names=ROLES, kind="dit") -> Roles:
    return build(kind, *LAYOUTS[layout], names)


def gradients(roles, name):
    return {key: parameter.grad for key, parameter in roles.named_parameters(name).items()}


# --- losses of the two kinds of graph ---------------------------------------------------------------------------------------


def dmd_loss(roles):
    """The student's turn of DMD: teacher and fake are asked, without gradient, between the student's forward and backward."""
    batch = inputs(1)
    x0 = roles["student"](*batch).x0
    t = torch.tensor([500.0, 80.0], dtype=torch.float64)
    with torch.no_grad():
        x_t = add_noise(x0, inputs(2).x, roles.teacher.schedule.coefficients(t))
        direction = roles["fake"](x_t, t, batch.cond).x0 - roles.teacher(x_t, t, batch.cond).x0
    return 0.5 * (x0 - (x0 - direction).detach()).square().mean()


def joint_loss(roles):
    """A graph in which both roles are live and the teacher passes gradient through its input, as in SiD."""
    batch = inputs(1, times=(300.0, 650.0))
    x0 = roles["student"](*batch).x0
    t = torch.tensor([500.0, 80.0], dtype=torch.float64)
    x_t = add_noise(x0, inputs(2).x, roles.teacher.schedule.coefficients(t))
    fake, teacher = roles["fake"](x_t, t, batch.cond).x0, roles.teacher(x_t, t, batch.cond).x0
    return ((teacher - fake) * (fake - x0)).mean() + roles["student"](x_t, t, batch.cond).x0.square().mean()


@each_network
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("loss, trained", [(dmd_loss, ("student",)), (joint_loss, ROLES)])
def test_gradients_of_shared_roles_equal_those_of_separate_copies(kind, checkpointed, loss, trained):
    shared, copies = build(kind), build(kind, "copies")
    found = []
    for roles in (copies, shared):
        if checkpointed and roles is shared:
            roles.enable_activation_checkpointing()
        roles.train_only(trained)
        loss(roles).backward()
        found.append({name: gradients(roles, name) for name in ROLES})
    for name in ROLES:
        for key, expected in found[0][name].items():
            actual = found[1][name][key]
            if name not in trained:
                assert actual is None and expected is None
            else:
                assert expected.abs().max() > 0, key
                assert torch.equal(actual, expected), key


@pytest.mark.parametrize("kind", NETWORKS)
def test_checkpointing_full_copies_changes_no_gradient(kind):
    found = []
    for checkpointed in (False, True):
        roles = build(kind, "copies", None)
        if checkpointed:
            roles.enable_activation_checkpointing()
        roles.train_only(["student"])
        joint_loss(roles).backward()
        found.append(gradients(roles, "student"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0] if found[0][key] is not None)
    assert sum(grad is not None for grad in found[1].values()) > 10


def test_checkpointing_recomputes_activations():
    roles = build("dit")
    block = roles["student"].network.transformer_blocks[0]
    calls = []
    block.attn1.register_forward_hook(lambda *_: calls.append(1))
    roles.enable_activation_checkpointing()
    roles.train_only(["student"])
    roles["student"](*inputs()).raw.sum().backward()
    assert len(calls) == 2


@each_network
def test_deep_copy_of_a_checkpointed_network_recomputes_itself(kind):
    roles = build(kind, "copies")
    roles.enable_activation_checkpointing()
    net = copy.deepcopy(roles["student"].network)
    functions = {
        module._gradient_checkpointing_func
        for module in net.modules()
        if getattr(module, "_gradient_checkpointing_func", None) is not None
    }
    assert functions and all(function.args[0] is net for function in functions)


@each_network
@pytest.mark.parametrize("checkpointed", [False, True])
def test_teacher_is_bit_equal_to_the_base_before_during_and_after_training(kind, checkpointed):
    base = denoiser(kind)
    reference = base.with_network(copy.deepcopy(base.network))
    roles = build_roles(base, ROLES, "shared", LORA)
    if checkpointed:
        roles.enable_activation_checkpointing()
    batch = inputs(3)
    expected = reference(*batch).raw

    def unmoved():
        with torch.no_grad():
            return torch.equal(roles.teacher(*batch).raw, expected) and torch.equal(base(*batch).raw, expected)

    assert unmoved()
    for name in ROLES:
        perturb(roles.parameters(name), 0)
        optimizer = torch.optim.SGD(roles.parameters(name), lr=0.1)
        for _ in range(2):
            roles.train_only([name])
            loss = (roles[name](*batch).x0 - roles.teacher(*batch).x0.detach()).square().mean()
            assert unmoved()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert unmoved()
    assert not torch.equal(roles["student"](*batch).raw, expected)


def test_the_networks_stay_in_eval_mode_and_the_teacher_frozen():
    for layout in LAYOUTS:
        teacher = denoiser("dit")
        teacher.network.train().requires_grad_(True)
        roles = build_roles(teacher, ROLES, *LAYOUTS[layout])
        trained = {id(parameter) for name in ROLES for parameter in roles.parameters(name)}
        for net in (roles.teacher.network, *(roles[name].network for name in ROLES)):
            assert not any(module.training for module in net.modules())
            assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in net.parameters())


# --- who is trained ---------------------------------------------------------------------------------------------------------


@each_layout
def test_train_only_gives_gradient_exactly_where_due(layout):
    roles = build_roles(denoiser("dit"), ROLES, *LAYOUTS[layout], head=torch.nn.Linear(64, 1))
    for name in ROLES:
        perturb(roles.parameters(name), 0)
    for trained in (("student",), ("fake", "head"), ("head",), ROLES):
        roles.train_only(trained)
        for name in (*ROLES, "head"):
            for parameter in roles.parameters(name):
                parameter.grad = None
        x0 = roles["student"](*inputs()).x0
        (roles["fake"](x0, inputs().t, inputs().cond).x0.square().sum() + roles.head(x0.flatten(1)).sum()).backward()
        for name in (*ROLES, "head"):
            # the null row of the label table and the like may stay without; what is trained has gradient somewhere
            got = [parameter.grad is not None for parameter in roles.parameters(name)]
            assert any(got) == all(got) == (name in trained), (trained, name)
        assert all(
            parameter.grad is None
            for parameter in roles.teacher.network.parameters()
            if not any(parameter is own for name in ROLES for own in roles.parameters(name))
        )


def test_whole_copies_do_not_train_the_constants_of_an_architecture():
    one_block = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = unet(**one_block, time_embedding_type="fourier", add_attention=False)
    roles = build_roles(denoiser("unet").with_network(net), ("student",), "copies")
    assert not any(key.startswith("time_proj") for key in roles.named_parameters("student"))
    assert "time_embedding.linear_1.weight" in roles.named_parameters("student")


def test_a_role_without_lora_trains_the_whole_copy():
    roles = build("dit", "copies", None)
    assert set(roles.named_parameters("student")) == {name for name, _ in network("dit").named_parameters()}
    nets = [roles.teacher.network, *(roles[name].network for name in ROLES)]
    assert len({parameter.data_ptr() for net in nets for parameter in net.parameters()}) == 3 * len(list(nets[0].parameters()))


def test_shared_roles_hold_one_network():
    roles = build("dit")
    assert roles.teacher.network is roles["student"].network is roles["fake"].network
    assert {parameter.shape[0] for key, parameter in roles.named_parameters("fake").items() if "lora_A" in key} == {5}
    assert not {id(p) for p in roles.parameters("student")} & {id(p) for p in roles.parameters("fake")}


# --- weights ----------------------------------------------------------------------------------------------------------------


@each_layout
def test_the_state_of_one_role_loads_into_another(layout):
    roles = in_layout(layout)
    batch = inputs()
    state = roles.state("student")
    assert not torch.equal(roles["fake"](*batch).raw, roles["student"](*batch).raw)
    roles.load_state("fake", state)
    assert torch.equal(roles["fake"](*batch).raw, roles["student"](*batch).raw)
    perturb(roles.parameters("student"), 5)  # the state is a copy: training on leaves it alone
    assert all(torch.equal(state[key], tensor) for key, tensor in roles.state("fake").items())
    roles.assign("fake", "student")
    assert torch.equal(roles["fake"](*batch).raw, roles["student"](*batch).raw)


def test_the_state_of_a_shared_role_loads_into_a_copy_with_an_adapter():
    shared, copies = build("unet"), build("unet", "copies")
    perturb(shared.parameters("student"), 8)
    copies.load_state("student", shared.state("student"))
    assert torch.equal(copies["student"](*inputs()).raw, shared["student"](*inputs()).raw)


@each_layout
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_lerp_moves_the_target_only(layout, decay):
    roles = in_layout(layout)
    target, source = roles.state("fake"), roles.state("student")
    roles.lerp("fake", "student", decay)
    for key, value in roles.state("fake").items():
        expected = (decay * target[key].double() + (1 - decay) * source[key].double()).float()
        torch.testing.assert_close(value, expected, atol=1e-7, rtol=1e-6)
        if decay in (0.0, 1.0):
            assert torch.equal(value, source[key] if decay == 0 else target[key])
        assert torch.equal(roles.named_parameters("student")[key], source[key])


def test_lerp_of_half_precision_weights_is_computed_in_float32():
    base = denoiser("dit")
    base.network.to(torch.bfloat16)
    roles = build_roles(base, ROLES, "copies")
    perturb(roles.parameters("student"), 0)
    target, source = (torch.cat([v.flatten() for v in roles.state(name).values()]) for name in ("fake", "student"))
    roles.lerp("fake", "student", 0.3)
    actual = torch.cat([value.flatten() for value in roles.state("fake").values()])
    expected = (0.3 * target.double() + 0.7 * source.double()).bfloat16()
    assert actual.dtype == torch.bfloat16
    assert (actual != expected).double().mean() < 0.01  # ties only; a sum formed in bfloat16 differs in far more places
    in_half = target * 0.3 + source * 0.7
    assert (in_half != expected).double().mean() > 0.1


def test_load_state_is_strict_and_writes_nothing_when_it_refuses():
    roles = build()
    before = roles.state("student")
    state = {key: tensor + 1 for key, tensor in before.items()}
    key = next(iter(state))
    short = {name: tensor for name, tensor in state.items() if name != key}
    for wrong, words in [
        (short, "1 tensors are missing"),
        (state | {key + "x": state[key]}, "unknown.*Did you mean"),
        (state | {key: state[key][:1]}, "must have shape"),
        (roles.state("fake"), "same rank"),
    ]:
        with pytest.raises(ValueError, match=words):
            roles.load_state("student", wrong)
        assert all(torch.equal(before[name], tensor) for name, tensor in roles.state("student").items())
    with pytest.raises(ValueError, match="same rank"):
        roles.lerp("student", "fake", 0.5)
    with pytest.raises(ValueError, match="decay"):
        roles.lerp("student", "student", 1.5)


@each_layout
def test_using_puts_other_weights_in_and_restores_bit_for_bit(layout):
    roles, batch = in_layout(layout), inputs()
    before, fake = roles.state("student"), roles.state("fake")
    with pytest.raises(KeyError), roles.using("student", fake):
        assert torch.equal(roles["student"](*batch).raw, roles["fake"](*batch).raw)
        raise KeyError
    assert all(torch.equal(before[key], tensor) for key, tensor in roles.state("student").items())
    with pytest.raises(ValueError), roles.using("student", {}):
        pass
    with roles.using("student", fake):
        assert all(torch.equal(fake[key], tensor) for key, tensor in roles.state("student").items())
    assert all(torch.equal(before[key], tensor) for key, tensor in roles.state("student").items())


@each_layout
def test_shadow_is_the_closed_form_average(layout):
    roles, decay, num_updates = in_layout(layout), 0.9, 5
    shadow = Shadow(roles, "student", decay)
    expected = {key: decay**num_updates * tensor.double() for key, tensor in roles.state("student").items()}
    for k in range(num_updates):
        perturb(roles.parameters("student"), k)
        for key, tensor in roles.state("student").items():
            expected[key] += (1 - decay) * decay ** (num_updates - 1 - k) * tensor.double()
        shadow.update()
    for key, tensor in shadow.state().items():
        torch.testing.assert_close(tensor, expected[key].float(), atol=1e-6, rtol=1e-6)
    other = Shadow(roles, "student", decay)
    other.load_state(shadow.state())
    assert all(torch.equal(tensor, other.state()[key]) for key, tensor in shadow.state().items())
    with pytest.raises(ValueError, match="average"):
        other.load_state({})


@each_layout
def test_an_average_in_the_memory_of_the_cpu_has_the_same_bits_at_any_time(layout):
    roles = in_layout(layout)
    plain, offloaded = Shadow(roles, "student", 0.9), Shadow(roles, "student", 0.9, offload=True)

    def equal():
        states = plain.state(), offloaded.state()
        return all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    for k in range(6):
        perturb(roles.parameters("student"), k)
        plain.update()
        offloaded.update()
        perturb(roles.parameters("student"), 10 + k)  # what comes after the update is not of it
        assert k % 2 or equal()  # looked at, or not, between two updates
    start = Shadow(roles, "student", 0.9).state()
    for shadow in (plain, offloaded):
        shadow.update()
        shadow.load_state(start)  # what was on its way belongs to the old average
    assert equal() and all(torch.equal(tensor, start[key]) for key, tensor in offloaded.state().items())


@pytest.mark.gpu
def test_an_average_of_a_gpu_lies_in_the_memory_of_the_cpu_and_is_the_same_up_to_rounding():
    base = denoiser("dit")
    base.network.cuda()
    roles = build_roles(base, ("student",), "copies")
    plain, offloaded = Shadow(roles, "student", 0.9), Shadow(roles, "student", 0.9, offload=True)
    for k in range(6):
        perturb(roles.parameters("student"), k)
        plain.update()
        offloaded.update()
    for key, tensor in offloaded.state().items():
        assert tensor.device.type == "cpu"
        torch.testing.assert_close(tensor, plain.state()[key].cpu(), atol=1e-7, rtol=1e-6)


def test_shadow_of_half_precision_weights_moves_in_float32():
    base = denoiser("dit")
    base.network.to(torch.bfloat16)
    roles = build_roles(base, ("student",), "copies")
    shadow, start = Shadow(roles, "student", 0.9999), roles.state("student")
    perturb(roles.parameters("student"), 0)
    for _ in range(10):
        shadow.update()
    key = "proj_out_2.weight"
    moved = shadow.state()[key] - start[key].float()
    expected = (1 - 0.9999**10) * (roles.state("student")[key].float() - start[key].float())
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-2)


# --- export -----------------------------------------------------------------------------------------------------------------


@each_network
@each_layout
def test_network_state_loads_in_a_fresh_network_and_gives_the_live_output(kind, layout):
    roles, batch = in_layout(layout, kind=kind), inputs()
    fresh = network(kind, seed=9).eval()
    for name in ROLES:
        fresh.load_state_dict(roles.network_state(name), strict=True)
        actual, live = denoiser(kind).with_network(fresh)(*batch).raw, roles[name](*batch).raw
        torch.testing.assert_close(actual, live, atol=1e-6, rtol=1e-6)
        assert not torch.equal(live, roles.teacher(*batch).raw)


def test_adapter_state_loads_in_peft():
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    roles, batch = build("dit", lora=LoraSpec(rank=3, alpha=6.0, targets="attention")), inputs()
    state = roles.adapter_state("student")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    peft = get_peft_model(network("dit").eval(), config)
    result = set_peft_model_state_dict(peft, {f"base_model.model.{key}": tensor for key, tensor in state.items()})
    assert not result.unexpected_keys
    assert torch.equal(denoiser("dit").with_network(peft.model)(*batch).raw, roles["student"](*batch).raw)
    with pytest.raises(UserError, match="no adapters"):
        build("dit", "copies", None).adapter_state("student")


# --- oracles and mistakes ---------------------------------------------------------------------------------------------------


def gaussian():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    return GaussianTeacher(torch.full((1, 2, 2), 0.3), 0.5, VPSchedule(abar))


def test_an_oracle_teacher_takes_trainable_roles_from_a_template():
    teacher = gaussian()
    template = AffineDenoiser.around(teacher, torch.tensor([500.0]))
    roles = build_roles(teacher, ("student",), "copies", template=template)
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([500.0, 500.0], dtype=torch.float64)
    assert roles.teacher is teacher
    torch.testing.assert_close(roles["student"](x, t, Condition.none(2)).x0, teacher(x, t, Condition.none(2)).x0)
    roles["student"](x, t, Condition.none(2)).x0.square().sum().backward()
    assert all(parameter.grad is not None for parameter in roles.parameters("student"))
    assert all(parameter.grad is None for parameter in template.network.parameters())
    with pytest.raises(UserError, match="template"):
        build_roles(teacher, ("student",), "copies")
    with pytest.raises(UserError, match="layout 'copies'"):
        build_roles(teacher, ("student",), "shared", LORA.model_copy(update={"ranks": {}}), template=template)
    with pytest.raises(UserError, match="activation checkpointing"):
        roles.enable_activation_checkpointing()


@pytest.mark.parametrize(
    "names, layout, lora, words",
    [
        (ROLES, "shared", None, "needs lora"),
        (ROLES, "shard", LORA, "Did you mean 'shared'"),
        (("student", "teacher"), "copies", None, "other than"),
        (("student", "student"), "copies", None, "distinct"),
        ((), "copies", None, "distinct"),
        (("student",), "shared", LORA, "lora.ranks"),
        (("student",), "shared", LoraSpec(rank=2, targets=("to_x",)), "Available endings"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_way_out(names, layout, lora, words):
    with pytest.raises(UserError, match=words):
        build_roles(denoiser("dit"), names, layout, lora)


def test_adapters_are_not_stacked_on_adapters():
    teacher = denoiser("dit")
    build_roles(teacher, ROLES, "shared", LORA)
    for layout in ("shared", "copies"):
        with pytest.raises(UserError, match="holds adapters already"):
            build_roles(teacher, ROLES, layout, LORA)


def test_an_unknown_role_names_the_nearest():
    roles = build()
    for call in (roles.__getitem__, roles.parameters, roles.state):
        with pytest.raises(UserError, match="Did you mean 'student'"):
            call("studnt")
    assert roles.names == ROLES and "student" in roles and "head" not in roles
