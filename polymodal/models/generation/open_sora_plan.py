"""Open-Sora Plan 1.2 and 1.3: clips and pictures from text, or (1.3 I2V) from a first frame.

Facts, and the arguments of our own nets and pipelines (models/nets). A directory of it is `transformer` and
`vae` of the published repository with mT5-XXL as `text_encoder` and `tokenizer`, and a scheduler of
diffusers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from polymodal.models import pipelines
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import FirstFrameChannels, LatentGrid, discrete_process
from polymodal.models.generation.denoiser_card import attention_plan, denoiser_card, feed_forward_plan
from polymodal.models.nets.pipeline_open_sora_plan import SPACE, first_frame_condition


class OpenSoraPlan(FirstFrameChannels):
    line = "open-sora-plan"
    text = ("encoder_hidden_states", "encoder_attention_mask")
    prompt_outputs = text
    zero = ("pos_embed_masked_hidden_states.1.weight", "pos_embed_mask.1.weight")

    def build(self) -> nn.Module:
        config = {**self.config, "_class_name": "OpenSoraPlanTransformer"}  # published under other names
        return pipelines.empty(config, "polymodal.models.nets.open_sora_plan").train()

    @property
    def conditioned(self) -> bool:
        """The inpainting denoiser, of which we give the first frame."""
        return self.config.get("vae_scale_factor_t") is not None

    @property
    def media(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("condition",) if self.conditioned else ()

    @property
    def max_length(self) -> int:
        """Tokens of a caption: 512 as published, or the tokenizer's if fewer."""
        return int(min(512, self.component_config("tokenizer").get("model_max_length") or 512))

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        channels = int(vae.get("latent_dim") or vae.get("embed_dim") or self.config["in_channels"])
        time = 8 if vae.get("l1_downsample_wavelet") == "HaarWaveletTransform3D" else 4
        patch = int(self.config["patch_size"])
        return LatentGrid(channels, time, SPACE, (1, patch, patch))

    def process(self) -> Process:
        return replace(discrete_process(self.component_config("scheduler")), weighting="min_snr")

    def prompt_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_length}

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "max_sequence_length": self.max_length}

    def encode_media(self, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
        vae = pipeline.vae
        made = {"latents": vae.normalised(vae.encode(pixels.to(vae.dtype)).latent_dist.mode())}
        if self.conditioned:
            made["condition"] = first_frame_condition(vae, pixels, int(self.config["vae_scale_factor_t"]))
        return made

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode(vae.denormalised(latents).to(vae.dtype)).sample

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        made: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (self.max_length, int(self.config["caption_channels"])),
            "encoder_attention_mask": (self.max_length,),
        }
        if self.conditioned:
            channels = int(self.config["in_channels"]) + int(self.config["vae_scale_factor_t"])
            made["condition"] = (channels, *latents[1:])
        return made


CARD = denoiser_card(
    name="open-sora-plan",
    title="Open-Sora Plan 1.2, 1.3",
    family=OpenSoraPlan,
    blocks=("transformer_blocks.*",),
    embedders=(
        "pos_embed",
        "pos_embed_masked_hidden_states?",
        "pos_embed_mask?",
        "adaln_single",
        "caption_projection",
    ),
    output=("norm_out", "proj_out", "scale_shift_table"),
    carry=("adaln_single", "caption_projection"),
    sequence_plan={"rope": {0: 1, 1: 1}, "transformer_blocks.0": {"hidden_states": 1}},
    tensor_plan={
        "": "stream",
        **attention_plan("transformer_blocks.*.attn1", "attention"),
        **attention_plan("transformer_blocks.*.attn2", "attention"),
        **feed_forward_plan("transformer_blocks.*.ff"),
        "norm_out": "end",
    },
    pipelines={
        "text-to-video": "OpenSoraPlanPipeline",
        "image-to-video": "OpenSoraPlanImageToVideoPipeline",
    },
    limits={"ring": "a sequence of every n-th token needs all tokens on a rank"},
    clip={"frames": [93], "fps": 18, "pixels": 352 * 640},
    sizes={
        "1.3-2b": Size("LanguageBind/Open-Sora-Plan-v1.3.0", 2.77, 32),
        "1.2-2b": Size("LanguageBind/Open-Sora-Plan-v1.2.0", 2.77, 32),
    },
    verified="nets and VAEs equal published numbers in float64; trained, exported, opened and sampled",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("opensora-plan", "opensoraplan", "open-sora-plan-1.3", "open-sora-plan-1.2"),
    seeds=("1.3-2b", "1.2-2b"),
)
