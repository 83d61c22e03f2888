"""Each text-to-image family, loaded from its own pipeline's folder, makes the stock pipeline's latents step by step."""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from role_networks import Inputs, attention_calls
from text_pipelines import BUILDERS, save
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.math import grids
from diffdistill.math.schedules import RectifiedFlowSchedule, TrigFlowSchedule, VPSchedule, change_coordinates
from diffdistill.models.adapters import LoraSpec
from diffdistill.models.conditioning import PromptConditioner
from diffdistill.models.families.flux import pack, position_ids, unpack
from diffdistill.models.families.unet2d_condition import guidance_waves
from diffdistill.models.guidance import guided
from diffdistill.models.loading import Teacher, load_teacher
from diffdistill.models.roles import build_roles
from diffdistill.sampling.noise import Noise
from diffdistill.sampling.sampler import Sampler
from diffdistill.sampling.stock_runs import build_scheduler, stock_states

PROMPTS = ["a red circle", "blue square left of it"]
SEEDS = [3, 4]
SIZE = 16  # pixels: 8 x 8 latents
SIZES = {"sana": 32, "sana-sprint": 32}  # SanaPipeline takes multiples of 32
STEPS = 4
GUIDED = ("sd", "sd-v", "sdxl", "pixart", "pixart-sigma", "sd3", "sana")


@cache
def folder(name: str) -> Path:
    import tempfile

    return save(name, Path(tempfile.mkdtemp()))


@cache
def teacher(name: str) -> Teacher:
    return load_teacher(folder(name), size=SIZES.get(name, SIZE))


def stock_latents(name: str, pipeline: Any, guidance: float, **options: Any) -> list[Tensor]:
    """Return the latents (B, 4, 8, 8) after each step of the stock pipeline."""
    seen: list[Tensor] = []

    def on_step_end(pipeline: Any, step: int, t: Any, values: dict) -> dict:
        seen.append(values["latents"])
        return values

    accepts = inspect.signature(pipeline.__call__).parameters
    options |= {"use_resolution_binning": False} if "use_resolution_binning" in accepts else {}
    if "callback_on_step_end" in accepts:
        options |= {"callback_on_step_end": on_step_end}
    else:
        options |= {"callback": lambda step, t, latents: seen.append(latents), "callback_steps": 1}
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        PROMPTS,
        height=SIZES.get(name, SIZE),
        width=SIZES.get(name, SIZE),
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        generator=Noise(SEEDS).generators,
        output_type="latent",
        **options,
    )
    return [unpack(latents, 8, 8) if name.startswith("flux") else latents for latents in seen]


def assert_equal(ours: list[Tensor], stock: list[Tensor]) -> None:
    assert len(ours) == len(stock)
    for step, (a, b) in enumerate(zip(ours, stock, strict=True)):
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1))
        assert error < 1e-4, (step, error)


def sigmas(name: str) -> dict[str, Any]:
    """Return the sigmas of STEPS even steps for the flow pipelines that would otherwise waste the last one."""
    return {"sigmas": list(np.linspace(1, 1 / STEPS, STEPS))} if name in ("sd3", "sana") else {}


ONE_PASS = ("sd-w", "flux", "flux-schnell")  # guidance is an input of the network, or distilled away
OWN_SCALE = {"sd-w": 7.5, "flux": 3.5, "flux-schnell": 3.5}  # of their pipelines' calls


@pytest.mark.parametrize(("name", "guidance"), [*((n, 1.0) for n in (*GUIDED, *ONE_PASS)), *((n, 3.0) for n in GUIDED)])
def test_own_sampler_makes_the_stock_latents(name: str, guidance: float) -> None:
    """DDIM on betas, Euler on flows; the stock pipeline gets the scheduler that the sampler describes, flows keep theirs."""
    loaded, pipeline = teacher(name), diffusers.DiffusionPipeline.from_pretrained(folder(name))
    sampler = Sampler(grids.trailing(loaded.denoiser.schedule, STEPS), guidance=guidance)
    if isinstance(loaded.denoiser.schedule, VPSchedule):
        pipeline.scheduler = build_scheduler(sampler.scheduler_config(loaded.scheduler_config))
    states, last = sampler.trajectory(loaded.denoiser, Noise(SEEDS), loaded.condition(PROMPTS))
    stock = stock_latents(name, pipeline, OWN_SCALE.get(name, guidance), **sigmas(name))
    assert_equal([*(state.x_t for state in states[1:]), last], stock)


@pytest.mark.parametrize("name", GUIDED)
def test_own_scheduler_makes_the_stock_latents(name: str) -> None:
    """The teacher's own scheduler, at its own guidance, on our denoiser: the default sampler."""
    loaded, pipeline = teacher(name), diffusers.DiffusionPipeline.from_pretrained(folder(name))
    denoiser = guided(loaded.denoiser, loaded.guidance)
    states = stock_states(denoiser, build_scheduler(loaded.scheduler_config), STEPS, Noise(SEEDS), loaded.condition(PROMPTS))
    assert_equal(states[1:], stock_latents(name, pipeline, loaded.guidance))
    assert loaded.guidance == inspect.signature(pipeline.__call__).parameters["guidance_scale"].default > 1


@pytest.mark.parametrize("w", [1.0, 2.5, 7.3, 14.9])
def test_the_waves_of_w_are_the_stock_pipelines_bit_for_bit(w: float) -> None:
    stock = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor(w - 1).repeat(2), 256)
    assert torch.equal(guidance_waves(torch.full((2,), w, dtype=torch.float64), 256), stock)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_guidance_input_is_the_stock_networks_own(name: str) -> None:
    """Nothing at first; then what the class itself, built with time_cond_proj_dim, makes of the same weights."""
    loaded, w = teacher(name), torch.tensor([3.0, 8.0], dtype=torch.float64)
    roles = build_roles(loaded.denoiser, ("student",), "copies", extra_inputs=("guidance",))
    x, t = Noise(SEEDS).draw(loaded.denoiser.sample_shape), torch.tensor([100.0, 700.0], dtype=torch.float64)
    cond = loaded.condition(PROMPTS)
    told = cond.with_values(guidance=w)
    expected = loaded.denoiser(x, t, cond).raw
    assert torch.equal(roles["student"](x, t, told).raw, expected)
    assert loaded.network.config.time_cond_proj_dim is None and loaded.network.time_embedding.cond_proj is None
    with torch.no_grad():
        roles.named_parameters("student")["time_embedding.cond_proj.weight"].normal_(std=0.5)
    stock = type(loaded.network).from_config(roles["student"].network.config)
    stock.load_state_dict(roles.network_state("student"), strict=True)
    assert stock.config.time_cond_proj_dim == 256
    waves = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w.float() - 1, 256)
    added = {key: cond.values[key] for key in ("text_embeds", "time_ids") if key in cond.values}
    hidden = cond.values["encoder_hidden_states"]
    raw = stock.eval()(x, t.float(), hidden, timestep_cond=waves, added_cond_kwargs=added, return_dict=False)[0]
    ours = roles["student"](x, t, told).raw
    torch.testing.assert_close(ours, raw)
    assert float((ours - expected).detach().abs().max()) > 1e-3
    assert torch.equal(roles["student"](x, t, cond).raw, expected)  # no w, nothing added


def test_a_guidance_input_is_trained_whole_beside_adapters_and_takes_none() -> None:
    loaded = teacher("sd")
    lora = LoraSpec(rank=2, targets=("to_q", "linear_1"))
    roles = build_roles(loaded.denoiser, ("student",), "copies", lora, extra_inputs=("guidance",))
    names = set(roles.named_parameters("student"))
    assert "time_embedding.cond_proj.weight" in names and "time_embedding.linear_1.lora_A.weight" in names
    assert not any("cond_proj.lora" in name for name in names)
    with pytest.raises(UserError, match="LoRA targets .*cond_proj"):
        build_roles(loaded.denoiser, ("student",), "copies", LoraSpec(targets=("cond_proj",)), extra_inputs=("guidance",))
    with pytest.raises(UserError, match="takes its guidance scale as an input already"):
        build_roles(teacher("sd-w").denoiser, ("student",), "copies", extra_inputs=("guidance",))


def test_a_convolution_of_groups_takes_no_adapter() -> None:
    """PEFT adapts it for some ranks and cannot merge it, so such a student could not leave."""
    with pytest.raises(UserError, match="'conv_depth'.*Available endings: conv_inverted, conv_point"):
        build_roles(teacher("sana").denoiser, ("student",), "copies", LoraSpec(rank=80, targets=("conv_depth",)))


def test_sana_sprint_is_a_flow_behind_its_arc() -> None:
    """Its pipeline's latents are ours in TrigFlow coordinates, times sigma_data; the deterministic arc is DDIM there."""
    loaded, pipeline = teacher("sana-sprint"), diffusers.DiffusionPipeline.from_pretrained(folder("sana-sprint"))
    assert isinstance(loaded.denoiser.schedule, RectifiedFlowSchedule) and loaded.denoiser.schedule.shift == 1
    arc, cond, noise = TrigFlowSchedule(1.0), loaded.condition(PROMPTS), Noise(SEEDS)
    u = torch.tensor([1.2, 0.4], dtype=torch.float64)
    x_arc = noise.draw(loaded.denoiser.sample_shape)
    x0 = loaded.denoiser.in_schedule(arc)(x_arc, u, cond).x0
    # What SanaSprintPipeline does at time u of its latents 0.5 x_arc, written out.
    s = (u.sin() / (u.sin() + u.cos())).float().reshape(-1, 1, 1, 1)
    scale = (s**2 + (1 - s) ** 2).sqrt()
    network_input = x_arc * scale
    values = pipeline.encode_prompt(PROMPTS, complex_human_instruction=_instruction(pipeline))
    guidance = torch.full((2,), 4.5 * pipeline.transformer.config.guidance_embeds_scale)
    raw = pipeline.transformer(
        network_input,
        encoder_hidden_states=values[0],
        encoder_attention_mask=values[1],
        guidance=guidance,
        timestep=s.flatten(),
        return_dict=False,
    )[0]
    velocity = ((1 - 2 * s) * network_input + (1 - 2 * s + 2 * s**2) * raw) / scale
    stock_x0 = u.cos().float().reshape(-1, 1, 1, 1) * x_arc - u.sin().float().reshape(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(x0, stock_x0.detach(), rtol=1e-4, atol=1e-4)
    x_flow, t = change_coordinates(x_arc, u, arc, loaded.denoiser.schedule)
    torch.testing.assert_close(t.float(), s.flatten())
    torch.testing.assert_close(x_flow, network_input)


def _instruction(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default


@pytest.mark.parametrize("name", list(BUILDERS))
def test_prompts_matter_and_null_is_the_stock_one(name: str) -> None:
    loaded = teacher(name)
    cond = loaded.condition(PROMPTS)
    x, t = Noise(SEEDS).draw(loaded.denoiser.sample_shape), torch.full((2,), 0.6, dtype=torch.float64)
    t = t * loaded.denoiser.schedule.t_max
    both = loaded.denoiser(x, t, cond).x0
    assert not torch.allclose(both, loaded.denoiser(x, t, loaded.condition(PROMPTS[::-1])).x0, atol=1e-4)
    if name == "sana-sprint":
        assert not cond.has_null
        return
    null = cond.null_like()
    again = loaded.condition(["", ""])
    for key, value in null.values.items():
        if name != "sdxl" and name != "sana":  # SDXL's null is zeros, Sana's comes without the instruction
            torch.testing.assert_close(value, again.values[key])
    if name == "sdxl":
        assert not null.values["encoder_hidden_states"].any() and not null.values["text_embeds"].any()
        assert torch.equal(null.values["time_ids"], cond.values["time_ids"]) and cond.values["time_ids"][0].tolist() == [
            16,
            16,
            0,
            0,
            16,
            16,
        ]


@pytest.mark.parametrize("name", list(BUILDERS))
def test_half_precision_weights_take_float32_states_in_every_role(name: str) -> None:
    """As a run has them: bf16 base, float32 states and adapters; the raw output is bf16, x0 float32, the adapter gets a gradient."""
    loaded = load_teacher(folder(name), torch.bfloat16, size=SIZES.get(name, SIZE))
    roles = build_roles(loaded.denoiser, ("student",), "shared", LoraSpec(rank=2, targets="all"))
    roles.train_only(("student",))
    x, t = Noise(SEEDS).draw(loaded.denoiser.sample_shape), torch.full((2,), 0.6, dtype=torch.float64)
    t, cond = t * loaded.denoiser.schedule.t_max, loaded.condition(PROMPTS)
    for role in (roles.teacher, roles["student"]):
        prediction = role(x, t, cond)
        assert prediction.raw.dtype == torch.bfloat16 and prediction.x0.dtype == torch.float32
        assert prediction.x0.isfinite().all()
    prediction.x0.square().mean().backward()
    assert any(p.grad is not None and p.dtype == torch.float32 and p.grad.any() for p in roles.parameters("student"))
    plain = teacher(name).denoiser(x, t, cond).x0
    assert float((prediction.x0 - plain).detach().abs().max() / plain.abs().max()) < 0.1


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "sana"])
def test_images_go_through_the_autoencoder_as_in_the_pipeline(name: str) -> None:
    loaded, pipeline = teacher(name), diffusers.DiffusionPipeline.from_pretrained(folder(name))
    size = SIZES.get(name, SIZE)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    states = loaded.codec.encode(images)
    assert tuple(states.shape[1:]) == loaded.denoiser.sample_shape and loaded.image_shape == (3, size, size)
    vae, config = pipeline.vae, pipeline.vae.config
    with torch.no_grad():
        encoded = vae.encode(images)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        shift = getattr(config, "shift_factor", None) or 0
        torch.testing.assert_close(states, (latents - shift) * config.scaling_factor)
        torch.testing.assert_close(loaded.codec.decode(states), vae.decode(latents).sample)


def test_flux_packs_as_the_pipeline_does() -> None:
    x = torch.randn(2, 4, 6, 10)
    packed = diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 10)
    assert torch.equal(pack(x), packed) and torch.equal(unpack(packed, 6, 10), x)
    stock_ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(position_ids(6, 10, torch.device("cpu")), stock_ids)


def test_dynamic_shift_follows_the_image_size() -> None:
    """FLUX.1-dev: mu = 0.5 at 256 tokens and 1.15 at 4096, shift = exp(mu)."""
    shifts = {size: load_teacher(folder("flux"), size=size).denoiser.schedule.shift for size in (64, 256)}
    assert shifts[64] == pytest.approx(math.exp(0.5)) and shifts[256] == pytest.approx(math.exp(1.15))
    assert load_teacher(folder("flux-schnell")).denoiser.schedule.shift == 1


def test_text_encoders_come_with_the_first_prompt_and_go_when_told() -> None:
    loaded = load_teacher(folder("sd"))
    prompts = loaded.conditioner
    assert isinstance(prompts, PromptConditioner) and prompts._pipeline is None
    first = loaded.condition(PROMPTS).values["encoder_hidden_states"]
    assert prompts._pipeline is not None and prompts._pipeline.vae is None
    prompts.release()
    assert prompts._pipeline is None and prompts.null["encoder_hidden_states"].shape == (1, 12, 16)
    torch.testing.assert_close(loaded.condition(PROMPTS).values["encoder_hidden_states"], first)


def test_half_precision_and_variant(tmp_path: Path) -> None:
    diffusers.DiffusionPipeline.from_pretrained(folder("sd")).to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    loaded = load_teacher(tmp_path / "half", torch.bfloat16, variant="fp16")
    assert next(loaded.network.parameters()).dtype == torch.bfloat16
    assert loaded.condition(PROMPTS).values["encoder_hidden_states"].dtype == torch.bfloat16


def test_a_folder_of_plain_files_is_loaded_whatever_variant_a_recipe_asks_for() -> None:
    loaded = load_teacher(folder("sd"), variant="fp16")
    states = loaded.condition(PROMPTS).values["encoder_hidden_states"]
    assert torch.equal(states, teacher("sd").condition(PROMPTS).values["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: teacher("sd").condition(torch.tensor([1, 2])), "give a list of prompts"),
        (lambda: teacher("sd").condition("a circle"), "give a list of prompts"),
        (lambda: teacher("sd").condition(None, 2), "give a list of prompts"),
        (lambda: load_teacher(folder("sd"), size=17), "sizes must be multiples of 2, got 17x17"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux", "sana", "sana-sprint"])
def test_on_the_meta_device_prompts_have_their_shapes_without_any_weights(name):
    shaped = load_teacher(folder(name), device="meta", size=SIZES.get(name, SIZE))
    real, found = (each.condition(PROMPTS) for each in (teacher(name), shaped))
    for values, shapes in ((real.values, found.values), (real.null, found.null)):
        assert {key: (value.shape, value.dtype) for key, value in values.items()} == {
            key: (value.shape, value.dtype) for key, value in shapes.items()
        }
        assert all(value.device.type == "meta" for value in shapes.values())
    assert all(tensor.device.type == "meta" for tensor in shaped.network.parameters())
    assert shaped.denoiser.sample_shape == teacher(name).denoiser.sample_shape


# Layers of the small networks that attend by softmax. SD3's and FLUX's blocks attend once, to image and text together; the
# self-attention of Sana is linear.
ATTENTIONS = {"sd": 8, "sdxl": 8, "pixart": 4, "sd3": 2, "flux": 3, "sana": 2, "sana-sprint": 2}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_switch_reaches_every_attention_of_the_network(name: str, monkeypatch) -> None:
    loaded = teacher(name)
    x, t = torch.zeros(2, *loaded.denoiser.sample_shape), loaded.denoiser.schedule.t_max * torch.ones(2, dtype=torch.float64)
    calls, past_it = attention_calls(loaded.denoiser, Inputs(x, t, loaded.condition(PROMPTS)), monkeypatch)
    assert (calls, past_it) == (ATTENTIONS[name], [])
