"""Small text-to-image pipelines of the real classes with random weights, one builder for each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers

from diffdistill.training.teachers import words

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = 32


def clip_tokenizer(folder: Path) -> Any:
    """Return a CLIPTokenizer whose words are single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12, pad_token="<|endoftext|>"
    )


def t5_tokenizer() -> Any:
    """Return a T5 tokenizer whose words are single letters."""
    return words.t5_tokenizer([], length=512)


def gemma_tokenizer() -> Any:
    """Return a Gemma tokenizer whose words are single letters."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    spelled = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    spelled.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    return transformers.GemmaTokenizerFast(tokenizer_object=spelled)


def clip_text(width: int, projection: int | None = None) -> Any:
    """Return a CLIP text encoder, with a projection of its pooled output where asked for."""
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=projection or width,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(width: int) -> Any:
    """Return a T5 encoder."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def vae(channels: int = 4, shift: float | None = None) -> Any:
    """Return an autoencoder that halves the edges."""
    return diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.7,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
    )


def unet(**options: Any) -> Any:
    """Return a text-conditional UNet."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **({"cross_attention_dim": 16, "attention_head_dim": 2} | options),
    )


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def stable_diffusion(folder: Path, prediction_type: str = "epsilon", **options: Any) -> Any:
    """Return a StableDiffusionPipeline."""
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type=prediction_type, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading"
    )
    return diffusers.StableDiffusionPipeline(
        vae(), clip_text(16), clip_tokenizer(folder), unet(**options), scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_v(folder: Path) -> Any:
    """Return a StableDiffusionPipeline as SD 2.1 is: v prediction."""
    return stable_diffusion(folder, "v_prediction")


def stable_diffusion_w(folder: Path) -> Any:
    """Return a StableDiffusionPipeline whose network takes the guidance scale as an input, as latent consistency models' do."""
    return stable_diffusion(folder, time_cond_proj_dim=32)


def sdxl(folder: Path, zeros: bool = True) -> Any:
    """Return a StableDiffusionXLPipeline."""
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusionXLPipeline(
        vae(), clip_text(16), clip_text(24, 24), tokenizer, tokenizer, network, scheduler, force_zeros_for_empty_prompt=zeros
    )


def pixart(folder: Path, cls: str = "PixArtAlphaPipeline") -> Any:
    """Return a PixArt pipeline; the network also emits a variance, as the real one does."""
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=128,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=cls == "PixArtAlphaPipeline",
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", final_sigmas_type="zero")
    return getattr(diffusers, cls)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(16),
        vae=vae(),
        transformer=network,
        scheduler=scheduler,
    )


def pixart_sigma(folder: Path) -> Any:
    """Return a PixArtSigmaPipeline."""
    return pixart(folder, "PixArtSigmaPipeline")


def sd3(folder: Path) -> Any:
    """Return a StableDiffusion3Pipeline."""
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    tokenizer = clip_tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        network, scheduler, vae(shift=0.1), clip_text(16, 16), tokenizer, clip_text(24, 24), tokenizer, t5(40), t5_tokenizer()
    )


def flux(folder: Path, guidance_embeds: bool = True) -> Any:
    """Return a FluxPipeline whose shift depends on the image size, as FLUX.1-dev's; or FLUX.1-schnell's fixed one."""
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**(dynamic | {"shift": 3.0} if guidance_embeds else {"shift": 1.0}))
    return diffusers.FluxPipeline(
        scheduler, vae(shift=0.1), clip_text(24), clip_tokenizer(folder), t5(16), t5_tokenizer(), network
    )


def flux_schnell(folder: Path) -> Any:
    """Return a FluxPipeline without embedded guidance."""
    return flux(folder, guidance_embeds=False)


def sana(folder: Path, sprint: bool = False) -> Any:
    """Return a SanaPipeline, or a SanaSprintPipeline."""
    extras = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1.0} if sprint else {}
    network = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        patch_size=1,
        **extras,
    )
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    text = transformers.Gemma2Model(
        transformers.Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=8,
            num_key_value_heads=1,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
    )
    tokenizer = gemma_tokenizer()
    if sprint:
        return diffusers.SanaSprintPipeline(tokenizer, text, autoencoder, network, diffusers.SCMScheduler(sigma_data=0.5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.SanaPipeline(tokenizer, text, autoencoder, network, scheduler)


def sana_sprint(folder: Path) -> Any:
    """Return a SanaSprintPipeline."""
    return sana(folder, sprint=True)


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "sd": stable_diffusion,
    "sd-v": stable_diffusion_v,
    "sd-w": stable_diffusion_w,
    "sdxl": sdxl,
    "pixart": pixart,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
    "flux": flux,
    "flux-schnell": flux_schnell,
    "sana": sana,
    "sana-sprint": sana_sprint,
}


def save(name: str, folder: Path) -> Path:
    """Build the pipeline `name` and save it below `folder`."""
    torch.manual_seed(0)
    pipeline = BUILDERS[name](folder / "tokenizer")
    for component in ("unet", "transformer"):
        network = getattr(pipeline, component, None)
        if network is not None:  # adaLN-zero layers start at zero: give every weight a value, or nothing depends on the prompt
            with torch.no_grad():
                for parameter in network.parameters():
                    if not parameter.any():
                        parameter.normal_(std=0.05)
    pipeline.save_pretrained(folder / name)
    return folder / name
