"""Step-Video T2V and TI2V (30B): clips and pictures from text, or from a first frame.

Facts, and the arguments of our own nets and pipelines (models/nets). A directory of it is `transformer` and
`vae` of the published repository, Step LLM as `text_encoder` and HunyuanCLIP's BertModel as `text_encoder_2`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import ChunkGrid, FirstFrameChannels
from polymodal.models.generation.denoiser_card import denoiser_card, feed_forward_plan
from polymodal.models.nets.pipeline_step_video import MOTION, SHIFT, condition_of

VAE = {"frame_len": 17, "latent_len": 3}
T2V = {"_class_name": "StepVideoModel"}
TI2V = {**T2V, "use_additional_conditions": True}


class StepVideo(FirstFrameChannels):
    line = "step-video"
    text = ("encoder_hidden_states", "encoder_hidden_states_2", "encoder_attention_mask")
    prompt_outputs = text
    zero = ("proj_out.*",)

    @property
    def conditioned(self) -> bool:
        return bool(self.config.get("use_additional_conditions"))

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("first_frame",) if self.conditioned else ()

    def grid(self) -> ChunkGrid:
        vae = self.component_config("vae")
        encoder = vae.get("encoder_config") or {}
        time = 2 ** (len(encoder.get("down_sampling_layer", (1, 2))) + 1)
        space = 2 ** len(encoder.get("ch_mult", (4, 8, 16, 16)))
        patch, channels = int(self.config["patch_size"]), int(encoder.get("z_channels", 64))
        chunk = int(vae.get("frame_len") or 17)
        return ChunkGrid(channels, time, space, (1, patch, patch), chunk=chunk)

    def process(self) -> Process:
        return Process(reversed=True, ascending=True, scale=1.0, shift=SHIFT)

    @property
    def max_length(self) -> int:
        """Tokens of a caption for Step LLM."""
        return 320

    def prompt_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_length}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        def latents(clip: Tensor) -> Tensor:
            return pipeline.vae.encode(clip.to(pipeline.vae.dtype)).latent_dist.mode()

        made = {"latents": latents(pixels)}
        return {**made, "first_frame": latents(pixels[:, :, :1])} if self.conditioned else made

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        return pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        language, clip = self.config["caption_channels"]
        made = {
            "encoder_hidden_states": (self.max_length, int(language)),
            "encoder_hidden_states_2": (77, int(clip)),
            "encoder_attention_mask": (77 + self.max_length,),
        }
        return {**made, "first_frame": (latents[0], 1, *latents[2:])} if self.conditioned else made

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        """latents: [B, F, C, H, W], as the net takes them."""
        given: dict[str, Any] = self.conditions(model, batch, self.text)
        if self.conditioned:
            first = batch["first_frame"].to(latents.dtype)
            given["condition_hidden_states"] = condition_of(first, latents.shape[1])
            given["motion_score"] = torch.full((len(latents),), MOTION, device=latents.device)
        return given

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        return super().denoise(model, latents.transpose(1, 2), timestep, batch).transpose(1, 2)


CARD = denoiser_card(
    name="step-video",
    title="Step-Video T2V, TI2V",
    family=StepVideo,
    blocks=("transformer_blocks.*",),
    embedders=("pos_embed", "adaln_single", "caption_norm", "caption_projection", "clip_projection"),
    output=("norm_out", "proj_out", "scale_shift_table"),
    carry=("adaln_single", "caption_projection", "clip_projection"),
    sequence_plan={"rope": {0: 0, 1: 0, 2: 0}, "transformer_blocks.0": {"hidden_states": 1}},
    tensor_plan={
        "": "stream",
        "transformer_blocks.*.attn1": "attention",
        "transformer_blocks.*.attn1.wqkv": "colwise",
        "transformer_blocks.*.attn1.wo": "rowwise",
        "transformer_blocks.*.attn2": "attention",
        "transformer_blocks.*.attn2.wq": "colwise",
        "transformer_blocks.*.attn2.wkv": "colwise",
        "transformer_blocks.*.attn2.wo": "rowwise",
        **feed_forward_plan("transformer_blocks.*.ff"),
        "norm_out": "end",
    },
    pipelines={"text-to-video": "StepVideoPipeline", "image-to-video": "StepVideoImageToVideoPipeline"},
    clip={"frames": [204], "fps": 25, "pixels": 544 * 992},
    sizes={
        "t2v-30b": Size(
            "stepfun-ai/stepvideo-t2v", 29.34, 48, devices=64, config={"transformer": T2V, "vae": VAE}
        ),
        "ti2v-30b": Size(
            "stepfun-ai/stepvideo-ti2v",
            29.38,
            48,
            devices=64,
            clip={"frames": [102]},
            config={"transformer": TI2V, "vae": VAE},
        ),
    },
    verified="nets, VAE and Step LLM equal published numbers; trained, exported, opened and sampled",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("stepvideo", "step-video-t2v", "step-video-ti2v", "stepvideo-t2v", "stepvideo-ti2v"),
    seeds=("t2v-30b", "ti2v-30b"),
)
