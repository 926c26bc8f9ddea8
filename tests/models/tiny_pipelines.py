"""Tiny random pipelines in diffusers' layout, of the real classes: `pipeline(name, directory)` writes one as the library would.

Shared by the tests of generating models. Weights are random but fixed; a pipeline runs, its pictures mean nothing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "digit",
    "of",
    "the",
    "moving",
    "left",
    "right",
    "up",
    "down",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "zero",
    "video",
    "picture",
]


@functools.cache
def tokenizer(length: int = 512) -> Any:
    """A word-level tokenizer with T5's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def umt5(width: int = 16) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=48, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    return UMT5EncoderModel(config)


def wan_vae(z: int = 4, **changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    config = {
        "base_dim": 4, "z_dim": z, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
        "latents_mean": [0.1 * i for i in range(z)], "latents_std": [1.0 + 0.5 * i for i in range(z)],
    }  # fmt: skip
    return AutoencoderKLWan(**config | changes)


def wan_transformer(z: int = 4, **changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": z, "out_channels": z, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**config | changes)


def wan(**changes: Any) -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=wan_vae(),
        scheduler=scheduler,
        transformer=wan_transformer(**changes),
    )


def wan_i2v(last_frame: bool = False) -> Any:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16 * 16,
            patch_size=16,
        )
    )  # 257 tokens, as the denoiser's attention has it in its code
    more = {"pos_embed_seq_len": 514} if last_frame else {}
    denoiser = wan_transformer(in_channels=4 + 4 + 4, image_dim=16, added_kv_proj_dim=24, **more)
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler, transformer=denoiser, image_encoder=vision,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256}),
    )  # fmt: skip


def kl_vae(z: int = 4, scaling: float = 0.5, shift: float | None = 0.1) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[4, 8, 8],
        layers_per_block=1, norm_num_groups=4, latent_channels=z, scaling_factor=scaling, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def t5(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=48, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def clip_text(width: int = 16, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=48, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        projection_dim=width, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def flux(guidance: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance), vae=kl_vae(), text_encoder=clip_text(),
        tokenizer=tokenizer(77), text_encoder_2=t5(), tokenizer_2=tokenizer(32), transformer=denoiser,
    )  # fmt: skip


def sd3(large: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    more = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if large else {}
    denoiser = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16, **more,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(), text_encoder=clip_text(projected=True),
        tokenizer=tokenizer(77), text_encoder_2=clip_text(projected=True), tokenizer_2=tokenizer(77), text_encoder_3=t5(32),
        tokenizer_3=tokenizer(256),
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    denoiser = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=(2, 2), transformer_layers_per_block=(1, 1), cross_attention_dim=32, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling=0.13, shift=None), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True), tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77), unet=denoiser, scheduler=scheduler,
    )  # fmt: skip


def cogvideox(image: bool = False, newer: bool = False) -> Any:
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8),
        latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    rotary = (
        {"use_rotary_positional_embeddings": True, "attention_head_dim": 32}
        if image or newer
        else {"attention_head_dim": 16}
    )
    more = {"patch_size_t": 2, "patch_bias": False} if newer else {}
    if newer and image:
        more["ofs_embed_dim"] = 8
    denoiser = CogVideoXTransformer3DModel(
        num_attention_heads=2, in_channels=8 if image else 4, out_channels=4, time_embed_dim=8, text_embed_dim=16, num_layers=1,
        sample_width=4, sample_height=4, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=16,
        **rotary, **more,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
        snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip
    cls = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return cls(tokenizer=tokenizer(16), text_encoder=t5(), vae=vae, transformer=denoiser, scheduler=scheduler)


def wan22(image: bool = False) -> Any:
    """A14B: two denoisers; the image-conditioned one has no image tokens."""
    import diffusers
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    more = {"in_channels": 4 + 4 + 4} if image else {}
    cls = diffusers.WanImageToVideoPipeline if image else diffusers.WanPipeline
    return cls(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler, transformer=wan_transformer(**more),
        transformer_2=wan_transformer(**more), boundary_ratio=0.875,
    )  # fmt: skip


def wan22_5b() -> Any:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    vae = wan_vae(
        z=6, is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=4, scale_factor_spatial=16, scale_factor_temporal=4
    )  # fmt: skip
    return WanPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=vae, scheduler=scheduler, transformer=wan_transformer(z=6), expand_timesteps=True
    )  # fmt: skip


MAKERS = {
    "wan2.2-5b": wan22_5b,
    "wan2.2-a14b": wan22,
    "wan2.2-i2v-a14b": lambda: wan22(True),
    "sd3": sd3,
    "sd3.5": lambda: sd3(True),
    "sdxl": sdxl,
    "cogvideox": cogvideox,
    "cogvideox-i2v": lambda: cogvideox(True),
    "cogvideox1.5": lambda: cogvideox(False, True),
    "cogvideox1.5-i2v": lambda: cogvideox(True, True),
    "flux": flux,
    "flux-guided": lambda: flux(True),
    "wan": wan,
    "wan-i2v": wan_i2v,
    "wan-flf2v": lambda: wan_i2v(True),
}


def pipeline(name: str, directory: str | Path) -> Path:
    """Write the tiny pipeline of this name; returns the directory."""
    torch.manual_seed(3)
    made = MAKERS[name]()
    made.save_pretrained(str(directory), safe_serialization=True)
    return Path(directory)


SIZES: dict[str, tuple[int, int]] = {}
"""Frames of a card's tests, (height, width), where not 32 x 32."""

FRAMES = {2: 5}
"""Frames of a clip by the denoiser's patch over frames, where not 9."""
