"""Tiny random pipelines in diffusers' layout, of the real classes: `pipeline(name, directory)` writes one as the library would.

Shared by the tests of generating models. Weights are random but fixed; a pipeline runs, its pictures mean nothing.
"""

from __future__ import annotations

import copy
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


IMAGE = 47
"""Id of the token that pictures take the place of."""


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


def kl_vae(z: int = 4, scaling: float = 0.5, shift: float | None = 0.1, stages: int = 3) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * stages, up_block_types=["UpDecoderBlock2D"] * stages, block_out_channels=[4, 8, 8, 8][:stages],
        layers_per_block=1, norm_num_groups=4, latent_channels=z, scaling_factor=scaling, shift_factor=shift,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def t5(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=48, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def clip_text(width: int = 16, projected: bool = False, positions: int = 77) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=48, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=positions,
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


def unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=(2, 2), transformer_layers_per_block=(1, 1), cross_attention_dim=32, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
        **more,
    )  # fmt: skip


def sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        vae=kl_vae(scaling=0.13, shift=None), text_encoder=clip_text(), text_encoder_2=clip_text(projected=True), tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77), unet=unet(), scheduler=scheduler,
    )  # fmt: skip


def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux(guidance=True).components)


@functools.cache
def chatglm_tokenizer() -> Any:
    """The class of Kolors, over pieces learnt from the words of the tests."""
    import contextlib
    import io
    import os
    import tempfile

    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    pieces = io.BytesIO()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS)] * 50 + WORDS * 20), model_writer=pieces, vocab_size=80, model_type="bpe", minloglevel=2
        )  # fmt: skip
    file = Path(tempfile.mkdtemp()) / "tokenizer.model"
    file.write_bytes(pieces.getvalue())
    return ChatGLMTokenizer(str(file))


def kolors() -> Any:
    from diffusers import EulerDiscreteScheduler, KolorsPipeline
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    text = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2, padded_vocab_size=96, hidden_size=16, ffn_hidden_size=24, kv_channels=8, num_attention_heads=2, seq_length=300,
            multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True, original_rope=True,
        )
    )  # fmt: skip
    for parameter in text.parameters():  # the class leaves them as memory was
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear", steps_offset=1, num_train_timesteps=1100
    )  # fmt: skip
    return KolorsPipeline(
        vae=kl_vae(scaling=0.13, shift=None), text_encoder=text, tokenizer=chatglm_tokenizer(), unet=unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj"), scheduler=scheduler,
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


def vace(experts: bool = False) -> Any:
    from diffusers import UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32, "vace_layers": [0, 1],
        "vace_in_channels": 4 + 4 + 64,
    }  # fmt: skip
    more = {"transformer_2": WanVACETransformer3DModel(**config), "boundary_ratio": 0.875} if experts else {}
    return WanVACEPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=wan_vae(), scheduler=scheduler, transformer=WanVACETransformer3DModel(**config), **more
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


def gemma2(width: int = 16) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(vocab_size=48, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    )  # fmt: skip


def sana() -> Any:
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    denoiser = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=16,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokenizer(), text_encoder=gemma2(), vae=vae, transformer=denoiser, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )  # fmt: skip


def open_sora() -> Any:
    from polymodal.models.nets.autoencoder_open_sora_1_2 import AutoencoderOpenSora
    from polymodal.models.nets.pipeline_open_sora import OpenSoraPipeline
    from polymodal.models.nets.stdit3 import STDiT3

    spatial = {
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [4, 8, 8],
        "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
    }  # fmt: skip
    temporal = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
    return OpenSoraPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=AutoencoderOpenSora(spatial, temporal, micro_frame_size=9),
        transformer=STDiT3(hidden_size=24, depth=2, num_heads=2, caption_channels=16, model_max_length=10),
    )


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False
    )  # fmt: skip


def open_sora_2() -> Any:
    from polymodal.models.nets.open_sora_2 import OpenSora2Transformer
    from polymodal.models.nets.pipeline_open_sora_2 import OpenSora2Pipeline

    denoiser = OpenSora2Transformer(
        in_channels=16, vec_in_dim=8, context_in_dim=16, hidden_size=20, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(2, 4, 4)
    )  # fmt: skip
    return OpenSora2Pipeline(
        tokenizer=tokenizer(16), text_encoder=t5(), tokenizer_2=tokenizer(77), text_encoder_2=clip_text(8), vae=hunyuan_vae(), transformer=denoiser
    )  # fmt: skip


def bert() -> Any:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )  # fmt: skip


@functools.cache
def pieces() -> str:
    """A file of sentencepiece's, made of WORDS."""
    import io
    import tempfile

    import sentencepiece

    made, directory = io.BytesIO(), tempfile.mkdtemp()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 4), model_writer=made, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )  # fmt: skip
    path = Path(directory, "step1_chat_tokenizer.model")
    path.write_bytes(made.getvalue())
    return str(path)


def step_video(image: bool = False) -> Any:
    from polymodal.models.nets import pipeline_step_video as pipelines
    from polymodal.models.nets.autoencoder_step_video import AutoencoderStepVideo
    from polymodal.models.nets.step_llm import Step1Config, Step1Model, StepTokenizer
    from polymodal.models.nets.step_video import StepVideoModel

    sizes = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 4}
    vae = AutoencoderStepVideo(
        {**sizes, "down_sampling_layer": [0]}, {**sizes, "temporal_up_layers": [1], "temporal_downsample": 2}, frame_len=9
    )  # fmt: skip
    denoiser = StepVideoModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, caption_channels=(16, 16), use_additional_conditions=image
    )  # fmt: skip
    cls = pipelines.StepVideoImageToVideoPipeline if image else pipelines.StepVideoPipeline
    return cls(
        tokenizer=StepTokenizer(pieces()), text_encoder=Step1Model(Step1Config(16, 2, 1, 1, 32, 1e-5, 64, 16)), tokenizer_2=tokenizer(77),
        text_encoder_2=bert(), vae=vae, transformer=denoiser,
    )  # fmt: skip


def mt5(width: int = 16) -> Any:
    from transformers import MT5Config, MT5EncoderModel

    return MT5EncoderModel(
        MT5Config(vocab_size=48, d_model=width, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    )


def open_sora_plan(image: bool = False) -> Any:
    from diffusers import EulerAncestralDiscreteScheduler

    from polymodal.models.nets import pipeline_open_sora_plan as pipelines
    from polymodal.models.nets.open_sora_plan import OpenSoraPlanTransformer
    from polymodal.models.nets.wf_vae import WFVAE

    vae = WFVAE(
        latent_dim=4, base_channels=4, encoder_num_resblocks=1, encoder_energy_flow_hidden_size=4, decoder_num_resblocks=1,
        decoder_energy_flow_hidden_size=4, connect_res_layer_num=1, scale=[0.5, 0.6, 0.7, 0.8], shift=[0.1, 0.0, 0.2, 0.0],
    )  # fmt: skip
    denoiser = OpenSoraPlanTransformer(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=4, caption_channels=16,
        sparse1d=True, sparse_n=2, vae_scale_factor_t=4 if image else None,
    )  # fmt: skip
    scheduler = EulerAncestralDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    cls = pipelines.OpenSoraPlanImageToVideoPipeline if image else pipelines.OpenSoraPlanPipeline
    return cls(
        tokenizer=tokenizer(10), text_encoder=mt5(), vae=vae, transformer=denoiser, scheduler=scheduler
    )


def open_sora_plan_15() -> Any:
    from polymodal.models.nets.open_sora_plan_1_5 import OpenSoraPlanUTransformer
    from polymodal.models.nets.pipeline_open_sora_plan_1_5 import OpenSoraPlan15Pipeline
    from polymodal.models.nets.wf_vae import WFVAE

    vae = WFVAE(
        latent_dim=4, base_channels=4, encoder_num_resblocks=1, encoder_energy_flow_hidden_size=4, decoder_num_resblocks=1,
        decoder_energy_flow_hidden_size=4, connect_res_layer_num=1, scale=[0.5, 0.6, 0.7, 0.8], shift=[0.1, 0.0, 0.2, 0.0],
        l1_dowmsample_block="Spatial2xTime2x3DDownsample", l1_downsample_wavelet="HaarWaveletTransform3D", l1_upsample_block="Spatial2xTime2x3DUpsample",
        l1_upsample_wavelet="InverseHaarWaveletTransform3D",
    )  # fmt: skip
    denoiser = OpenSoraPlanUTransformer(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=(1, 2, 1), sparse_n=(1, 2, 1), caption_channels=16,
        pooled_projection_dim=16, timestep_embed_dim=16,
    )  # fmt: skip
    return OpenSoraPlan15Pipeline(
        tokenizer=tokenizer(10), text_encoder=t5(), tokenizer_2=tokenizer(77), text_encoder_2=clip_text(projected=True), vae=vae, transformer=denoiser
    )  # fmt: skip


def lumina2() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    denoiser = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=1, num_kv_heads=1,
        multiple_of=4, axes_dim_rope=(4, 8, 4), axes_lens=(600, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(
        transformer=denoiser,
        scheduler=scheduler,
        vae=kl_vae(stages=4),
        text_encoder=gemma2(),
        tokenizer=tokenizer(),
    )


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1 * i for i in range(4)], latents_std=[1.0 + 0.5 * i for i in range(4)],
    )  # fmt: skip
    denoiser = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    text = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=40, video_token_id=41, vision_start_token_id=42, vision_end_token_id=43)
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        base_shift=0.5,
        max_shift=0.9,
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer(), transformer=denoiser
    )


def llama(causal: bool = False, width: int = 16, layers: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

    config = LlamaConfig(
        vocab_size=48, hidden_size=width, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, bos_token_id=0, eos_token_id=1,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return (LlamaForCausalLM if causal else LlamaModel)(config)


def hunyuan_video() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=llama(), tokenizer=tokenizer(512), transformer=denoiser, vae=hunyuan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text(8), tokenizer_2=tokenizer(77),
    )  # fmt: skip


def llava() -> Any:
    """CLIP of 576 patches before a small Llama, as HunyuanVideo's image-to-video pipeline counts them."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0, max_position_embeddings=2048
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, pad_token_id=0)
    )


def llava_tokenizer() -> Any:
    """Words and letters: the template's system message comes to as many tokens as Llama 3's and more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"]
    vocabulary = {"<pad>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}
    vocabulary |= {mark: IMAGE - 3 + i for i, mark in enumerate(marks)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=marks, model_max_length=512
    )  # fmt: skip


def hunyuan_video_i2v(kind: str) -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoImageToVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPImageProcessor

    denoiser = HunyuanVideoTransformer3DModel(
        in_channels=9 if kind == "latent_concat" else 4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
        image_condition_type=kind, guidance_embeds=kind == "token_replace",
    )  # fmt: skip
    return HunyuanVideoImageToVideoPipeline(
        text_encoder=llava(), tokenizer=llava_tokenizer(), transformer=denoiser, vae=hunyuan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text(8), tokenizer_2=tokenizer(77),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    )  # fmt: skip


def chatting(words: Any, lead: int) -> Any:
    """The tokenizer with a template that says `lead` words, all messages, and one word at the end."""
    words = copy.deepcopy(words)
    words.chat_template = "a " * lead + "{% for m in messages %}{{ m['content'] }} {% endfor %}a"
    return words


def hunyuan_video15(image: bool = False) -> Any:
    import diffusers
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import (
        Qwen2_5_VLTextConfig,
        Qwen2_5_VLTextModel,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=16, temporal_compression_ratio=4
    )  # fmt: skip
    denoiser = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_refiner_layers=1, text_embed_dim=16,
        text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(2, 4, 4), target_size=32, task_type="i2v" if image else "t2v",
    )  # fmt: skip
    text = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        )
    )  # fmt: skip
    parts = {  # what is said before the prompt has the 108 tokens that the pipeline cuts off
        "text_encoder": text, "tokenizer": chatting(tokenizer(), 18), "transformer": denoiser, "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0), "text_encoder_2": t5(), "tokenizer_2": tokenizer(256),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }  # fmt: skip
    if not image:
        return diffusers.HunyuanVideo15Pipeline(**parts)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=14
    )  # fmt: skip
    return diffusers.HunyuanVideo15ImageToVideoPipeline(
        **parts, image_encoder=SiglipVisionModel(vision), feature_extractor=SiglipImageProcessor(size={"height": 42, "width": 42})
    )  # fmt: skip


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 8,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=45, boi_token_index=44, eoi_token_index=46)
    )  # fmt: skip


def ltx2() -> Any:
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8), down_block_types=("LTX2VideoDownBlock3D",) * 2, decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True), decoder_inject_noise=(False,) * 3, downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2, upsample_residual=(False, False), upsample_factor=(1, 1), patch_size=1, patch_size_t=1,
        decoder_causal=False,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(base_channels=8, num_res_blocks=1, latent_channels=2, mel_bins=16)
    denoiser = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=8,
        audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2,
        caption_channels=16, vae_scale_factors=(4, 4, 4),
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2, video_connector_attention_head_dim=8,
        video_connector_num_layers=1, video_connector_num_learnable_registers=4, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1, audio_connector_num_learnable_registers=4,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]], output_sampling_rate=16000,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096, shift_terminal=0.1
    )  # fmt: skip
    return LTX2Pipeline(
        scheduler=scheduler, vae=vae, audio_vae=audio_vae, text_encoder=gemma3(), tokenizer=copy.deepcopy(tokenizer(1024)), connectors=connectors,
        transformer=denoiser, vocoder=vocoder,
    )  # fmt: skip


def hunyuan_dit() -> Any:
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    denoiser = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=16,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1,
        timestep_spacing="trailing",
    )  # fmt: skip
    return HunyuanDiTPipeline(
        vae=kl_vae(stages=4, shift=None), text_encoder=bert(), tokenizer=tokenizer(77), transformer=denoiser, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=t5(), tokenizer_2=tokenizer(256),
    )  # fmt: skip


def flux2() -> Any:
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2,
        latent_channels=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.2, 0.2)
    vae.bn.running_var.uniform_(0.5, 2.0)
    denoiser = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    text = {
        "model_type": "mistral", "vocab_size": 48, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 31, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4,
    }  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=40)
    )
    words = copy.deepcopy(tokenizer())
    words.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }} {% endfor %}{% endfor %}"
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        base_shift=0.5,
        max_shift=1.15,
    )
    return Flux2Pipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=words, transformer=denoiser
    )


def hidream() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HiDreamImagePipeline,
        HiDreamImageTransformer2DModel,
    )

    denoiser = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[16, 16], text_emb_dim=32, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(128, 128),
        llama_layers=[0, 1],
    )  # fmt: skip
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl_vae(stages=2), text_encoder=clip_text(projected=True, positions=218), tokenizer=tokenizer(218),
        text_encoder_2=clip_text(projected=True, positions=218), tokenizer_2=tokenizer(218), text_encoder_3=t5(), tokenizer_3=tokenizer(),
        text_encoder_4=llama(causal=True), tokenizer_4=tokenizer(), transformer=denoiser,
    )  # fmt: skip


MAKERS = {
    "vace": vace,
    "vace-a14b": lambda: vace(True),
    "wan2.2-5b": wan22_5b,
    "wan2.2-a14b": wan22,
    "wan2.2-i2v-a14b": lambda: wan22(True),
    "sana": sana,
    "lumina2": lumina2,
    "open-sora-1.2": open_sora,
    "open-sora-2": open_sora_2,
    "open-sora-plan": open_sora_plan,
    "open-sora-plan-i2v": lambda: open_sora_plan(True),
    "open-sora-plan-1.5": open_sora_plan_15,
    "step-video": step_video,
    "step-video-i2v": lambda: step_video(True),
    "qwen-image": qwen_image,
    "hunyuan-dit": hunyuan_dit,
    "flux2": flux2,
    "hidream": hidream,
    "ltx2": ltx2,
    "hunyuan-video": hunyuan_video,
    "hunyuan-video-1.5": hunyuan_video15,
    "hunyuan-video-1.5-i2v": lambda: hunyuan_video15(True),
    "hunyuan-video-i2v": lambda: hunyuan_video_i2v("token_replace"),
    "hunyuan-video-i2v-33ch": lambda: hunyuan_video_i2v("latent_concat"),
    "sd3": sd3,
    "sd3.5": lambda: sd3(True),
    "sdxl": sdxl,
    "cogvideox": cogvideox,
    "cogvideox-i2v": lambda: cogvideox(True),
    "cogvideox1.5": lambda: cogvideox(False, True),
    "cogvideox1.5-i2v": lambda: cogvideox(True, True),
    "flux": flux,
    "flux-guided": lambda: flux(True),
    "flux-kontext": flux_kontext,
    "kolors": kolors,
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


SIZES: dict[str, tuple[int, int]] = {
    "sana": (64, 96),
    "hidream": (256, 256),
    "hunyuan-video-1.5": (32, 32),
    "ltx-2": (32, 64),
}
"""Frames of a card's tests, (height, width), where not 32 x 32."""

FRAMES = {2: 5}
"""Frames of a clip by the denoiser's patch over frames, where not 9."""
