"""Guidance adapters change nothing at first, then depend on w, time and class, belong to their network, and travel by file."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from role_networks import NETWORKS, denoiser, inputs, perturb

from diffdistill.errors import UserError
from diffdistill.models.adapters import LoraSpec, target_modules
from diffdistill.models.extras import add_extra_inputs, extra_inputs_of
from diffdistill.models.guidance_adapters import (
    CrossAttentionAdapter,
    GuidanceAdapterSpec,
    OffsetAdapter,
    ScalarEncoder,
    add_guidance_adapters,
    guidance_adapters_of,
    load_guidance_adapters,
    position_code,
    save_guidance_adapters,
)
from diffdistill.models.roles import build_roles

KINDS = ("offset", "cross_attention")
BLOCKS = {
    "unet": ["down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1", "mid_block.attentions.0"],
    "dit": ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"],
}
each_network = pytest.mark.parametrize("network", NETWORKS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def spec(kind="offset", **options):
    return GuidanceAdapterSpec(kind=kind, hidden_dim=16, **options)


def adapted(network, kind="offset", std=0.0, **options):
    plain = denoiser(network)
    net = plain.with_network(copy.deepcopy(plain.network))
    adapters = add_guidance_adapters(net.network, net.family, spec(kind, **options))
    if std:
        perturb(adapters.parameters(), 0, std)
    return net, plain


def told(batch, w):
    return batch._replace(cond=batch.cond.with_values(guidance=torch.tensor(w, dtype=torch.float64)))


@each_network
@each_kind
def test_fresh_adapters_leave_the_output_bit_equal_and_gradient_reaches_their_output_layers_alone(network, kind):
    net, plain = adapted(network, kind)
    expected = plain(*inputs()).raw
    assert torch.equal(net(*inputs()).raw, expected)
    net.network.requires_grad_(False).extra_inputs.requires_grad_(True)
    raw = net(*told(inputs(), [3.0, 7.5])).raw
    assert torch.equal(raw, expected)
    raw.square().sum().backward()
    reached = {name for name, p in net.network.extra_inputs.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {f"blocks.{path.replace('.', '/')}.out.{part}" for path in BLOCKS[network] for part in ("weight", "bias")}
    assert all(p.grad is None for name, p in net.network.named_parameters() if not name.startswith("extra_inputs."))


@each_network
@each_kind
def test_output_depends_on_each_samples_own_w_time_and_class_and_not_at_all_without_w(network, kind):
    net, plain = adapted(network, kind, std=0.3)
    batch = inputs()
    expected = plain(*batch).raw
    assert torch.equal(net(*batch).raw, expected)
    both = [net(*told(batch, [2.0, second])).raw for second in (3.0, 6.0)]
    assert torch.equal(both[0][0], both[1][0]) and not torch.allclose(both[0][1], both[1][1], atol=1e-3)
    assert all(not torch.allclose(both[0][k], expected[k], atol=1e-3) for k in range(2))
    for part in ("time", "label"):  # the embeddings reach the output: without them it is another
        silent, _ = adapted(network, kind, std=0.3)
        for p in getattr(silent.network.extra_inputs, part).parameters():
            p.data.zero_()
        assert not torch.allclose(silent(*told(batch, [2.0, 3.0])).raw, both[0], atol=1e-4), part


@each_network
@each_kind
def test_a_block_gives_what_it_gave_plus_the_adapter_of_its_input_and_the_networks_own_embeddings(network, kind):
    net, _ = adapted(network, kind, std=0.3)
    adapters = net.network.extra_inputs
    path = BLOCKS[network][0]
    block, seen = net.network.get_submodule(path), {}
    net.family.time_modules(net.network)[0].register_forward_hook(lambda m, i, o: seen.update(time=o))
    table = next(m for m in net.network.modules() if isinstance(m, torch.nn.Embedding))
    table.register_forward_hook(lambda m, i, o: seen.update(label=o))
    block.register_forward_hook(lambda m, i, o: seen.update(h=i[0], output=o))  # runs last: sees what was added
    net(*told(inputs(), [2.0, 5.0]))
    with_w = dict(seen)
    before = block.forward(with_w["h"])  # past the hooks
    h = with_w["h"].flatten(2).transpose(1, 2) if with_w["h"].ndim == 4 else with_w["h"]
    tokens = torch.stack(
        [adapters.scale(torch.tensor([2.0, 5.0])), adapters.time(with_w["time"]), adapters.label(with_w["label"])], 1
    )
    expected = adapters.blocks[path.replace(".", "/")](h, tokens, None).expand_as(h)
    change = with_w["output"] - before
    change = change.flatten(2).transpose(1, 2) if change.ndim == 4 else change
    assert float(expected.detach().abs().max()) > 0.1
    torch.testing.assert_close(change, expected, atol=2e-5, rtol=1e-4)


def test_the_two_kinds_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    h, tokens = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 3, 8, generator=generator)
    offset, attention = OffsetAdapter(6, 4, 8, None), CrossAttentionAdapter(6, 4, 8, None)
    perturb([*offset.parameters(), *attention.parameters()], 0, 0.5)
    g = torch.relu(offset.hidden(tokens[:, 0] + tokens[:, 1] + tokens[:, 2]))
    g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    g = g * offset.norm.weight + offset.norm.bias
    torch.testing.assert_close(offset(h, tokens, None), offset.out(g)[:, None])
    code = torch.tensor(
        [
            [math.sin(p / 10_000 ** (k / 4)) for k in range(4)] + [math.cos(p / 10_000 ** (k / 4)) for k in range(4)]
            for p in range(3)
        ]
    )
    torch.testing.assert_close(position_code(3, 8, h.device, h.dtype), code)
    scores = (h @ attention.q.weight.T) @ ((tokens + code) @ attention.k.weight.T).transpose(1, 2) / math.sqrt(8)
    expected = attention.out(scores.softmax(-1) @ ((tokens + code) @ attention.v.weight.T))
    torch.testing.assert_close(attention(h, tokens, None), expected, atol=1e-5, rtol=1e-4)


def test_the_prompts_tokens_join_the_attention_and_their_mean_the_offset():
    generator = torch.Generator().manual_seed(0)
    h, tokens, prompt = (torch.randn(2, n, d, generator=generator) for n, d in ((5, 6), (2, 8), (7, 3)))
    offset, attention = OffsetAdapter(6, 4, 8, 3), CrossAttentionAdapter(6, 4, 8, 3)
    perturb([*offset.parameters(), *attention.parameters()], 0, 0.5)
    same = torch.cat([tokens, offset.prompt(prompt).mean(1, keepdim=True)], 1)
    torch.testing.assert_close(offset(h, tokens, prompt), offset(h, same, None), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        attention(h, tokens, prompt), attention(h, torch.cat([tokens, attention.prompt(prompt)], 1), None), atol=1e-5, rtol=1e-4
    )


def test_padding_of_a_prompt_counts_for_nothing():
    generator = torch.Generator().manual_seed(0)
    h, tokens, prompt = (torch.randn(2, n, d, generator=generator) for n, d in ((5, 6), (2, 8), (7, 3)))
    padding = torch.arange(7).expand(2, 7) >= 4
    for adapter in (OffsetAdapter(6, 4, 8, 3), CrossAttentionAdapter(6, 4, 8, 3)):
        perturb([*adapter.parameters()], 0, 0.5)
        short = adapter(h, tokens, prompt[:, :4])
        torch.testing.assert_close(adapter(h, tokens, prompt, padding), short, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(adapter(h, tokens, prompt), short, atol=1e-3)


def test_the_code_of_w_has_normal_frequencies_and_tells_near_values_apart_smoothly():
    encoder = ScalarEncoder(64)
    seen = []
    encoder.widen.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    encoder(torch.tensor([0.0, 0.02, 3.0], dtype=torch.float64))
    at_zero, near, far = seen[0]
    assert float((at_zero - near).square().mean()) == pytest.approx(0.5 * (2 * math.pi * 0.02) ** 2, rel=0.2)  # E f^2 = 1
    assert float((at_zero - far).square().mean()) == pytest.approx(1.0, abs=0.3)  # two independent cosines


@each_network
@each_kind
def test_gated_adapters_vanish_at_w_of_one(network, kind):
    net, plain = adapted(network, kind, std=0.3, gated=True)
    raw = net(*told(inputs(), [1.0, 3.0])).raw
    expected = plain(*inputs()).raw
    assert torch.equal(raw[0], expected[0]) and not torch.allclose(raw[1], expected[1], atol=1e-3)


@each_network
def test_residual_blocks_may_be_adapted_too(network):
    ending = {"unet": "resnets.0", "dit": "ff"}[network]
    if network == "dit":
        with pytest.raises(UserError, match="how many features"):
            adapted(network, targets=(ending,))
        return
    net, plain = adapted(network, "cross_attention", std=0.3, targets=(ending, "attentions.0"))
    assert len(guidance_adapters_of(net.network).paths) == 5 + 3
    assert not torch.allclose(net(*told(inputs(), [2.0, 3.0])).raw, plain(*inputs()).raw, atol=1e-3)


# Roles ----------------------------------------------------------------------------------------------------------------------


@each_network
@each_kind
@pytest.mark.parametrize("layout", ["copies", "shared"])
def test_a_role_trains_the_adapters_alone_and_the_teacher_is_the_base_bit_for_bit(network, kind, layout):
    base = denoiser(network)
    batch = told(inputs(), [2.0, 5.0])
    expected = base(*inputs()).raw
    roles = build_roles(base, ("student",), layout, guidance_adapters=spec(kind))
    assert (roles["student"].network is base.network) == (layout == "shared")
    assert all(name.startswith("extra_inputs.") for name in roles.named_parameters("student"))
    assert torch.equal(roles["student"](*batch).raw, expected)
    perturb(roles.parameters("student"), 0, 0.3)
    assert torch.equal(roles.teacher(*batch).raw, expected) and torch.equal(roles.teacher(*inputs()).raw, expected)
    student = roles["student"](*batch).raw
    assert not torch.allclose(student, expected, atol=1e-3)
    roles.teacher(*batch)  # asked between the student's forward and backward
    student.square().mean().backward()
    trained = {id(p) for p in roles.parameters("student")}
    assert all(p.grad is not None for p in roles.parameters("student"))
    assert all(p.grad is None for p in roles["student"].network.parameters() if id(p) not in trained)
    assert torch.equal(roles.teacher(*batch).raw, expected)

    state = roles.state("student")
    perturb(roles.parameters("student"), 1, 0.3)
    roles.load_state("student", state)
    assert torch.equal(roles["student"](*batch).raw, student)


@each_network
@each_kind
@pytest.mark.parametrize("layout", ["copies", "shared"])
def test_activation_checkpointing_changes_no_gradient(network, kind, layout):
    found = []
    for enable in (False, True):
        roles = build_roles(denoiser(network), ("student",), layout, guidance_adapters=spec(kind))
        perturb(roles.parameters("student"), 0, 0.3)
        if enable:
            roles.enable_activation_checkpointing()
        first, second = told(inputs(), [2.0, 5.0]), told(inputs(1, (20.0, 900.0)), [1.5, 3.0])
        # two calls with other values in one graph, and the teacher's after them
        loss = roles["student"](*first).raw.square().mean() + roles["student"](*second).raw.square().mean()
        roles.teacher(*second)
        loss.backward()
        found.append([p.grad for p in roles.parameters("student")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(g.abs().max() > 0 for g in found[0])


@each_network
def test_a_deep_copy_feeds_from_its_own_adapters(network):
    net, _ = adapted(network, "cross_attention", std=0.3)
    twin = net.with_network(copy.deepcopy(net.network))
    batch = told(inputs(), [2.0, 5.0])
    expected = net(*batch).raw
    assert torch.equal(twin(*batch).raw, expected)
    perturb(extra_inputs_of(twin.network).parameters(), 3)
    assert not torch.allclose(twin(*batch).raw, expected, atol=1e-3)
    assert torch.equal(net(*batch).raw, expected)
    assert extra_inputs_of(net.network).values is None


def test_half_precision_networks_get_float32_adapters():
    net = denoiser("dit")
    net = net.with_network(net.network.to(torch.bfloat16))
    adapters = add_guidance_adapters(net.network, net.family, spec("cross_attention"))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    batch = told(inputs(), [2.0, 5.0])
    raw = net(batch.x.to(torch.bfloat16), batch.t, batch.cond).raw
    assert raw.dtype == torch.bfloat16 and bool(raw.isfinite().all())


@pytest.mark.parametrize(("widths", "hidden"), [((320, 1280, 640), 320), ((64, 128), 128), ((7,), 6)])
def test_the_usual_width_is_that_of_the_widest_adapted_block_and_even_but_at_most_320(widths, hidden):
    network = copy.deepcopy(denoiser("dit").network)
    for index, width in enumerate(widths):
        network.add_module(f"wide{index}", torch.nn.Linear(4, width))
    targets = tuple(f"wide{index}" for index in range(len(widths)))
    adapters = add_guidance_adapters(network, denoiser("dit").family, GuidanceAdapterSpec(targets=targets))
    assert adapters.spec.hidden_dim == hidden == adapters.time.out_features


# Files ----------------------------------------------------------------------------------------------------------------------


@each_network
@each_kind
def test_a_file_brings_the_adapters_to_the_same_network_and_to_another_finetune(network, kind, tmp_path):
    net, plain = adapted(network, kind, std=0.3)
    path = save_guidance_adapters(net.network, tmp_path / "adapters.safetensors")
    batch = told(inputs(), [2.0, 5.0])
    again = plain.with_network(copy.deepcopy(plain.network))
    load_guidance_adapters(again.network, again.family, path)
    assert torch.equal(again(*batch).raw, net(*batch).raw)

    finetune = plain.with_network(copy.deepcopy(plain.network))
    perturb(finetune.network.parameters(), 5, 0.003)
    expected = finetune(*inputs()).raw
    load_guidance_adapters(finetune.network, finetune.family, path)
    assert torch.equal(finetune(*inputs()).raw, expected)  # without w: the finetune itself
    there, here = finetune(*batch).raw - expected, net(*batch).raw - plain(*inputs()).raw
    assert (
        torch.nn.functional.cosine_similarity(there.flatten(), here.flatten(), 0) > 0.9
    )  # with w: moved in the same direction

    from safetensors.torch import load_file

    keys = load_file(path)
    assert f"{BLOCKS[network][0]}.out.weight" in keys and "shared.time.weight" in keys
    base = set(plain.network.state_dict())
    assert not base & set(keys)


def test_files_of_something_else_are_refused_and_leave_the_network_as_it_was(tmp_path):
    from safetensors.torch import save_file

    net, plain = adapted("dit")
    good = save_guidance_adapters(net.network, tmp_path / "adapters.safetensors")
    with pytest.raises(UserError, match="of a DiTTransformer2DModel; this network is a UNet2DModel"):
        load_guidance_adapters(denoiser("unet").network, denoiser("unet").family, good)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold"):
        load_guidance_adapters(plain.network, plain.family, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        load_guidance_adapters(plain.network, plain.family, tmp_path / "none.safetensors")
    from diffusers import DiTTransformer2DModel

    longer = DiTTransformer2DModel.from_config(dict(plain.network.config) | {"num_layers": 3})
    with pytest.raises(UserError, match="3 blocks|does not fit"):
        load_guidance_adapters(longer, plain.family, good)
    assert extra_inputs_of(longer) is None and not any(m._forward_hooks for m in longer.modules())
    with pytest.raises(UserError, match="already"):
        load_guidance_adapters(net.network, net.family, good)


# What is refused ------------------------------------------------------------------------------------------------------------


class ReadsText:
    """A family that says its network reads text."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return True if name == "reads_text" else getattr(self.__dict__["inner"], name)


def test_what_cannot_be_adapted_is_refused():
    plain = denoiser("dit")
    for targets, message in (
        (("nothing",), "match no module"),
        ("all", "'attention' or a list"),
        (("norm1",), "how many features"),
    ):
        with pytest.raises(UserError, match=message):
            add_guidance_adapters(plain.network, plain.family, spec(targets=targets))
    with pytest.raises(UserError, match="sees the prompt"):
        add_guidance_adapters(plain.network, ReadsText(plain.family), spec())
    with pytest.raises(UserError, match="trained alone"):
        build_roles(plain, ("student",), lora=LoraSpec(rank=2), guidance_adapters=spec())
    with pytest.raises(UserError, match="one role"):
        build_roles(plain, ("student", "fake"), "shared", guidance_adapters=spec())
    assert extra_inputs_of(plain.network) is None
    net, _ = adapted("dit")
    with pytest.raises(UserError, match="already"):
        add_extra_inputs(net.network, net.family, ("guidance",))
    with pytest.raises(RuntimeError, match="through its denoiser"):
        net.network(inputs().x, torch.tensor([3.0, 4.0]), class_labels=torch.tensor([0, 1]))


def test_lora_takes_no_adapter_of_guidance_for_a_target():
    net, plain = adapted("dit")
    endings = ("out", "q", "to_q")
    names = target_modules(net.network, ("to_q",), {})
    assert names == target_modules(plain.network, ("to_q",), {})
    with pytest.raises(UserError, match="match no layer"):
        target_modules(net.network, endings, {})


def test_a_text_networks_adapters_sit_at_its_cross_attention_and_see_the_prompt():
    from diffusers import UNet2DConditionModel

    from diffdistill.models.condition import Condition
    from diffdistill.models.families import FAMILIES

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
    ).eval()
    net = replace(denoiser("unet"), network=network, family=FAMILIES["UNet2DConditionModel"])
    adapters = add_guidance_adapters(network, net.family, spec("cross_attention"))
    assert len(adapters.paths) == 1 + 2 + 1 and all(path.endswith(".attn2") for path in adapters.paths)
    perturb(adapters.parameters(), 0, 0.3)
    batch = inputs()
    text = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    cond = Condition(2, {"encoder_hidden_states": text}).with_values(guidance=torch.tensor([2.0, 5.0]))
    raw = net(batch.x, batch.t, cond).raw
    for block in adapters.blocks.values():
        block.prompt.weight.data.zero_()
    assert not torch.allclose(net(batch.x, batch.t, cond).raw, raw, atol=1e-4)


@pytest.mark.parametrize("kind", ["offset", "cross_attention"])
def test_adapters_leave_out_the_tokens_that_the_network_is_told_to(kind):
    from diffusers import PixArtTransformer2DModel

    from diffdistill.models.condition import Condition
    from diffdistill.models.families import FAMILIES

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        cross_attention_dim=8,
        sample_size=8,
        patch_size=2,
        caption_channels=6,
        use_additional_conditions=False,
    ).eval()
    net = replace(denoiser("unet"), network=network, family=FAMILIES["PixArtTransformer2DModel"])
    perturb(add_guidance_adapters(network, net.family, spec(kind)).parameters(), 0, 0.3)
    batch, text = inputs(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))

    def raw(text, told=3):
        mask = (torch.arange(5) < told).expand(2, 5).long()
        values = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "guidance": torch.tensor([2.0, 5.0])}
        return net(batch.x, batch.t, Condition(2, values)).raw

    other = torch.cat([text[:, :3], 3 - text[:, 3:]], dim=1)
    torch.testing.assert_close(raw(text), raw(other), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(raw(text, 5), raw(other, 5), atol=1e-3)
