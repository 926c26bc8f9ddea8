"""Open-Sora Plan 1.5: clips and pictures from text, by a U of joint blocks.

Facts, and the arguments of our own net and pipeline (models/nets). A directory of it is `transformer` and
`vae` of the published repository, T5 v1.1 XL and CLIP bigG with its projection.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from polymodal.models import pipelines
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import LatentGrid
from polymodal.models.generation.denoiser_card import attention_plan, denoiser_card, feed_forward_plan
from polymodal.models.generation.open_sora_plan import OpenSoraPlan
from polymodal.models.nets.pipeline_open_sora_plan_1_5 import shift_of

BLOCKS = "transformer_blocks.*.*"
CAPTIONS = ("add_q_proj", "add_k_proj", "add_v_proj")
VAE = {"latent_dim": 32, "l1_downsample_wavelet": "HaarWaveletTransform3D"}


class OpenSoraPlan15(OpenSoraPlan):
    line = "open-sora-plan-1.5"
    text = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    prompt_outputs = text
    conditioned = False
    zero = ("proj_out.*",)

    def build(self) -> nn.Module:
        # the published config names its class otherwise
        return pipelines.empty({**self.config, "_class_name": "OpenSoraPlanUTransformer"}).train()

    def grid(self) -> LatentGrid:
        return replace(super().grid(), time=8)

    def process(self) -> Process:
        return Process(shift="dynamic", by_size=self._shift)

    def _shift(self, frames: int, height: int, width: int) -> float:
        return shift_of(*self.grid().shape(frames, height, width)[2:])

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        pooled = (int(self.config["pooled_projection_dim"]),)
        return {**super().shapes(latents), "pooled_projections": pooled}


CARD = denoiser_card(
    name="open-sora-plan-1.5",
    title="Open-Sora Plan 1.5",
    family=OpenSoraPlan15,
    blocks=(BLOCKS,),
    embedders=("patch_embed", "time_text_embed", "caption_projection"),
    output=("norm_final", "norm_out", "proj_out"),
    towers={
        "blocks": ("transformer_blocks", "skip_norm_linear", "skip_norm_linear_enc"),
        "embedders": ("patch_embed", "time_text_embed", "caption_projection"),
        "output": ("norm_final", "norm_out", "proj_out"),
    },
    block_streams=("hidden_states", "encoder_hidden_states"),
    sequence_plan={
        "rope": {0: 1, 1: 1},
        "transformer_blocks.0.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    },
    sequence_exit="proj_out",
    tensor_plan={
        "": "stream",
        **attention_plan(f"{BLOCKS}.attn1", "joint_attention"),
        **{f"{BLOCKS}.attn1.{name}": "colwise" for name in CAPTIONS},
        f"{BLOCKS}.attn1.to_add_out?": "rowwise",
        **feed_forward_plan(f"{BLOCKS}.ff"),
        f"{BLOCKS}.ff_enc?": "feed_forward",
        f"{BLOCKS}.ff_enc.net.0.proj?": "colwise",
        f"{BLOCKS}.ff_enc.net.2?": "rowwise",
        "skip_norm_linear.*?": "between",
        "skip_norm_linear_enc.*?": "between",
        "norm_final": "end",
    },
    pipelines={"text-to-video": "OpenSoraPlan15Pipeline"},
    limits={
        "pp": "its later stages take what the earlier ones left beside the stream",
        "ring": "a sequence of every n-th token needs all tokens on a rank",
    },
    clip={"frames": [121], "fps": 24, "pixels": 576 * 1024},
    sizes={"8b": Size("LanguageBind/Open-Sora-Plan-v1.5.0", 8.5, 32, config={"transformer": {}, "vae": VAE})},
    verified="the net and its VAE equal published numbers in float64; trained, exported, opened and sampled",
    keywords=("text to video", "video generation"),
    aliases=("opensora-plan-1.5", "opensoraplan1.5", "open-sora-plan-v1.5"),
    seeds=("8b",),
)
