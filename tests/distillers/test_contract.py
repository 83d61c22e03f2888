"""What every method owes the engine, on real diffusers networks, as copies and as adapters of one network."""

import itertools

import pytest
import torch
from distiller_support import CLASSES, network_teacher, rng, whole

from diffdistill.distillers import registry
from diffdistill.distillers.base import Batch, PairBatch, TrajectoryBatch
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.condition import Condition
from diffdistill.models.heads import build_head
from diffdistill.models.roles import build_roles

SIZE = 4
METHODS = {
    "guidance": ("guidance", {"guidance": 2.0}),
    "guidance-w": ("guidance", {"guidance": (1.0, 5.0), "guidance_input": 3.0, "guidance_interval": (0.2, 5.0)}),
    "progressive": ("progressive", {"guidance": 2.0}),
    "progressive-w": ("progressive", {"guidance": (1.0, 5.0), "guidance_input": 3.0}),
    "cd": ("consistency", {"solver": "heun", "ema_decay": 0.9, "guidance": (1.0, 3.0), "grid": {"kind": "karras"}}),
    "ict": (
        "consistency",
        {
            "mode": "training",
            "curriculum": {"kind": "ict"},
            "distance": "huber_vector",
            "weighting": "inverse_gap",
            "noise_law": "lognormal",
        },
    ),
    "lcm-like": (
        "consistency",
        {"grid": {"kind": "index"}, "distance": "huber_elementwise", "guidance": 2.0, "guidance_interval": (0.2, 5.0)},
    ),
    "lcm": ("lcm", {"guidance": (1.0, 3.0), "ema_decay": 0.9}),
    "lcm-w": ("lcm", {"guidance": (1.0, 5.0), "guidance_input": 3.0, "ema_decay": 0.9, "distance": "l2"}),
    "dmd2": ("dmd2", {"student_steps": 2, "guidance": 2.0}),
    "dmd2-gan": ("dmd2", {"student_steps": 2, "gan": {"generator_weight": 0.1}}),
    "dmd2-gan-fake": ("dmd2", {"student_steps": 2, "gan": {"features": "fake"}, "initial": "data"}),
    "dmd": ("dmd", {}),
    "vsd": ("vsd", {"guidance": 2.0}),
    "swiftbrush": ("vsd", {"guidance": 2.0, "guided_fake": {"null_share": 0.3}, "fake_loss": "alpha_epsilon"}),
    "diff-instruct": ("vsd", {"weighting": "diff_instruct", "time_law": "lognormal", "student_time_range": (0.0, 1.0)}),
    "agd": ("agd", {"adapters": {"hidden_dim": 8}}),
    "agd-attention": ("agd", {"adapters": {"kind": "cross_attention", "hidden_dim": 8, "gated": True}}),
}


def build(method, layout, family, one_batch_up_to=0, dtype=torch.float32):
    name, values = METHODS[method]
    cls = registry.get(name)
    config = cls.Config(**values)
    needs = cls.needs(config)
    base = network_teacher(family)
    base.network.to(dtype)
    lora = LoraSpec(rank=2, targets="all") if layout == "shared" and needs.guidance_adapters is None else None
    head = build_head(base, "mid", 8) if needs.head else None
    if head is not None:  # a head that is not blind
        torch.nn.init.normal_(head.logit.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    roles = build_roles(
        base,
        needs.trained + needs.frozen,
        layout,
        lora,
        head=head,
        extra_inputs=needs.extra_inputs,
        guidance_adapters=needs.guidance_adapters,
        one_batch_up_to=one_batch_up_to,
    )
    for role in needs.trained + needs.frozen:  # fresh adapters: B = 0 makes the gradient of A vanish; move off that point
        offset = torch.Generator().manual_seed(len(role))
        for p in roles.parameters(role):
            p.data += 0.02 * torch.randn(p.shape, generator=offset)
    return needs, roles, cls(config, roles.teacher, roles, 100)


def batch(needs, carry=None):
    generator = torch.Generator().manual_seed(1)
    cond = Condition.labels(torch.tensor([0, 1, 2, 0]), CLASSES)
    images, noise = (torch.randn(SIZE, 1, 8, 8, generator=generator).clamp(-1, 1) for _ in range(2))
    times, w = torch.tensor([[900.0, 500.0, 200.0, 50.0], [1.0, 2.0, 4.0, 6.0]], dtype=torch.float64)
    return Batch(
        cond,
        images if needs.data == "images" else None,
        PairBatch(noise, images, cond) if needs.pairs else None,
        carry or {},
        TrajectoryBatch(noise, times, w, images, cond) if needs.trajectories else None,
    )


def weights(roles, needs):
    trained = {name: roles.state(name) for name in (*needs.trained, *needs.frozen, *(("head",) if needs.head else ()))}
    whole = roles.teacher.network.state_dict()
    base = {key: value.clone() for key, value in whole.items() if "lora_" not in key and not key.startswith("extra_inputs.")}
    return base, trained


def answer(roles):
    cond = Condition.labels(torch.tensor([0, 1, 2, 0]), CLASSES)
    x = torch.linspace(-1, 1, SIZE * 64).reshape(SIZE, 1, 8, 8)
    with torch.no_grad():
        return roles.teacher(x, torch.full((SIZE,), 500.0, dtype=torch.float64), cond).raw


def gradients(roles, names):
    return {(name, key): p.grad for name in names for key, p in roles.named_parameters(name).items()}


def has_inputs(method):
    cls = registry.get(METHODS[method][0])
    return bool(cls.needs(cls.Config(**METHODS[method][1])).extra_inputs)


CASES = [  # extra inputs belong to a network, so they need copies
    case
    for case in itertools.product(METHODS, ("copies", "shared"), ("unet2d", "dit"))
    if case[1] == "copies" or not has_inputs(case[0])
]


@pytest.mark.parametrize(("method", "layout", "family"), CASES)
def test_every_method_keeps_the_contract(method, layout, family):
    needs, roles, distiller = build(method, layout, family)
    teacher_before = answer(roles)
    base_before, _ = weights(roles, needs)
    everyone = (*needs.trained, *needs.frozen, *(("head",) if needs.head else ()))
    carry = {}
    for turn in distiller.turns(0):
        roles.train_only(turn.trains)
        assert set(turn.trains) <= {*needs.trained, "head"}

        # Finite, and the same for the same randomness.
        loss = whole(distiller.loss(turn, batch(needs, carry), rng(3), 0))
        again = whole(distiller.loss(turn, batch(needs, carry), rng(3), 0))
        other = whole(distiller.loss(turn, batch(needs, carry), rng(4), 0))
        assert loss.total.ndim == 0 and bool(loss.total.isfinite())
        assert torch.equal(loss.total, again.total)
        assert torch.equal(loss.total, other.total) == bool(needs.trajectories)  # what is stored was drawn before
        assert all(v.ndim == 0 and not v.requires_grad for v in loss.terms.values()) and loss.terms
        assert not any(v.requires_grad for v in loss.carry.values())

        # Gradients where declared and nowhere else.
        loss.total.backward()
        found = gradients(roles, everyone)
        assert all(g is None for (name, _), g in found.items() if name not in turn.trains)
        for name in turn.trains:
            own = [g for (role, _), g in found.items() if role == name]
            assert any(g is not None and float(g.abs().max()) > 0 for g in own), name
            assert all(g is None or bool(g.isfinite().all()) for g in own)

        # A small step down the gradient lowers the loss at the same randomness, by what the gradient says.
        surrogate = distiller.name in ("dmd", "dmd2", "vsd") and turn.name == "student"  # its value is no distance
        square = sum(float((g**2).sum()) for g in found.values() if g is not None)
        rate = min(1e-3, 1e-4 * max(float(loss.total.detach()), 1e-3) / square)
        with torch.no_grad():
            for name in turn.trains:
                for p in roles.parameters(name):
                    if p.grad is not None:
                        p -= rate * p.grad
                        p.grad = None
        if not surrogate:
            fixed = whole(distiller.loss(turn, batch(needs, carry), rng(3), 0))
            assert float(fixed.total) < float(loss.total)
        distiller.after(turn, 0)
        carry = {**carry, **loss.carry}
    distiller.finish()

    # The teacher is what it was, bit for bit.
    base_after, _ = weights(roles, needs)
    assert all(torch.equal(base_before[key], base_after[key]) for key in base_before)
    assert torch.equal(answer(roles), teacher_before)
    sampler = distiller.sampler(2)
    assert sampler.num_steps == sampler.nfe == 2
    takes_w = needs.extra_inputs or needs.guidance_adapters
    assert (sampler.guidance, sampler.guidance_as_input) == ((3.0, True) if takes_w else (1.0, False))


@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_a_blind_discriminator_costs_two_log_two_and_teaches_the_student_nothing(family):
    needs, roles, distiller = build("dmd2-gan", "copies", family)
    torch.nn.init.zeros_(roles.head.logit.weight)
    student, fake = distiller.turns(0)
    roles.train_only(student.trains)
    loss = distiller.loss(student, batch(needs), rng(), 0)
    assert float(loss.terms["adversarial"]) == pytest.approx(torch.log(torch.tensor(2.0)).item())
    loss.total.backward()
    with_gan = [p.grad.clone() if p.grad is not None else None for p in roles.parameters("student")]

    no_weight = type(distiller)(distiller.config.model_copy(update={"gan": None}), roles.teacher, roles, 100)
    for p in roles.parameters("student"):
        p.grad = None
    no_weight.loss(student, batch(needs), rng(), 0).total.backward()
    for g, p in zip(with_gan, roles.parameters("student"), strict=True):
        assert (g is None) == (p.grad is None) and (g is None or torch.equal(g, p.grad))

    roles.train_only(fake.trains)
    loss = distiller.loss(fake, batch(needs), rng(), 0)
    assert float(loss.terms["discriminator"]) == pytest.approx(2 * torch.log(torch.tensor(2.0)).item())


def test_the_adversarial_loss_pulls_the_student_up_the_heads_logit():
    needs, roles, distiller = build("dmd2-gan", "copies", "unet2d")
    student = distiller.turns(0)[0]
    only_gan = distiller.config.model_copy(update={"gan": distiller.config.gan.model_copy(update={"generator_weight": 1e6})})
    distiller = type(distiller)(only_gan, roles.teacher, roles, 100)
    roles.train_only(student.trains)
    before = distiller.loss(student, batch(needs), rng(), 0)
    before.total.backward()
    square = sum(float((p.grad**2).sum()) for p in roles.parameters("student") if p.grad is not None)
    with torch.no_grad():
        for p in roles.parameters("student"):
            if p.grad is not None:
                p -= 1e2 / square * p.grad  # lowers 1e6 x the adversarial term by about 100
    after = distiller.loss(student, batch(needs), rng(), 0)
    gain = float(before.terms["adversarial"] - after.terms["adversarial"])
    assert gain == pytest.approx(1e-4, rel=0.3)


def test_shared_adapters_have_the_gradients_of_copies_with_adapters():
    spec = LoraSpec(rank=2, targets="all")
    found = {}
    for layout in ("copies", "shared"):
        roles = build_roles(network_teacher("unet2d"), ("student", "fake"), layout, spec)
        for role in ("student", "fake"):
            generator = torch.Generator().manual_seed(len(role))
            for p in roles.parameters(role):
                p.data += 0.02 * torch.randn(p.shape, generator=generator)
        cls = registry.get("dmd2")
        distiller = cls(cls.Config(student_steps=2, guidance=2.0), roles.teacher, roles, 10)
        roles.train_only(("student",))
        distiller.loss(distiller.turns(0)[0], batch(cls.needs(distiller.config)), rng(), 0).total.backward()
        found[layout] = {key: p.grad for key, p in roles.named_parameters("student").items()}
    assert found["copies"].keys() == found["shared"].keys()
    for key, gradient in found["copies"].items():
        torch.testing.assert_close(found["shared"][key], gradient, atol=1e-7, rtol=1e-5)


def turns_of(method, family, one_batch_up_to):
    """The gradients of a step's turns, and the rows of their passes with gradient left out, turn by turn."""
    needs, roles, distiller = build(method, "shared", family, one_batch_up_to, torch.float64)
    found, rows, carry = [], [], {}
    roles.teacher.network.register_forward_hook(
        lambda network, inputs, output: None if output[0].requires_grad else rows[-1].append(len(output[0]))
    )
    for turn in distiller.turns(0):
        roles.train_only(turn.trains)
        rows.append([])
        loss = whole(distiller.loss(turn, batch(needs, carry), rng(3), 0))
        loss.total.backward()
        found.append({key: value for key, value in gradients(roles, turn.trains).items() if value is not None})
        carry = loss.carry
        for parameter in (p for name in needs.trained for p in roles.parameters(name)):
            parameter.grad = None
    return found, rows


@pytest.mark.parametrize(
    ("method", "apart", "together"),
    [
        ("dmd", [SIZE, SIZE], [2 * SIZE]),
        ("vsd", [2 * SIZE, SIZE], [3 * SIZE]),
        ("dmd2", [2 * SIZE, SIZE], [3 * SIZE]),
        ("swiftbrush", [2 * SIZE, 2 * SIZE], [4 * SIZE]),
    ],
)
@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_teacher_and_fake_as_one_batch_changes_the_passes_and_no_gradient(method, apart, together, family):
    """In the matching gradient alone: the fake's own step is a pass with graph, as before."""
    (expected, passes), (found, fewer) = (turns_of(method, family, limit) for limit in (SIZE - 1, SIZE))
    assert passes[0][-len(apart) :] == apart and passes[1] == []
    assert fewer[0] == [*passes[0][: -len(apart)], *together] and fewer[1] == []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys() and ours
        for key, gradient in ours.items():
            torch.testing.assert_close(gradient, theirs[key], rtol=1e-6, atol=1e-8 * float(theirs[key].abs().max()))
