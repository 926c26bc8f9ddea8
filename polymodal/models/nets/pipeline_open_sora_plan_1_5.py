"""Sampling from Open-Sora Plan 1.5: a flow from noise to a clip, from text.

Steps and guidance: Open-Sora Plan 1.5 (github.com/PKU-YuanGroup/Open-Sora-Plan, MIT); the guidance is
rescaled (arXiv 2305.08891, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from polymodal.models.nets.clip_pipeline import ClipPipeline, shifted_levels
from polymodal.models.nets.open_sora_plan_1_5 import OpenSoraPlanUTransformer
from polymodal.models.nets.wf_vae import WFVAE

SPACE = 8
TOKENS, LOGARITHMS = (256, 4096), (0.5, 1.15)


def shift_of(height: int, width: int) -> float:
    """The shift of noise levels in training, by the cells of a latent frame: exp of a line in its tokens."""
    slope = (LOGARITHMS[1] - LOGARITHMS[0]) / (TOKENS[1] - TOKENS[0])
    return math.exp(LOGARITHMS[0] + slope * (height * width / 4 - TOKENS[0]))


class OpenSoraPlan15Pipeline(ClipPipeline):
    space = SPACE

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        tokenizer_2: Any,
        text_encoder_2: Any,
        vae: WFVAE,
        transformer: OpenSoraPlanUTransformer,
    ) -> None:
        """text_encoder: T5's; text_encoder_2: CLIP's, with its projection."""
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            vae=vae,
            transformer=transformer,
        )

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        return self.vae.decode(self.vae.denormalised(latents).to(self.vae.dtype)).sample

    def encode_prompt(
        self, prompt: Sequence[str], max_sequence_length: int = 512
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T5's hidden states [B, L, C], CLIP's projected ones [B, P], and T5's mask [B, L]."""
        ids, mask = self.tokenized(prompt, self.tokenizer, self.text_encoder, max_sequence_length)
        encoder, length = self.text_encoder_2, self.text_encoder_2.config.max_position_embeddings
        pooled = self.tokenized(prompt, self.tokenizer_2, encoder, length)[0]
        return self.text_encoder(ids, attention_mask=mask)[0], encoder(pooled).text_embeds, mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 576,
        width: int = 1024,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 8.0,
        guidance_rescale: float = 0.7,
        shift: float = 7.0,
        max_sequence_length: int = 512,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        prompts, negatives = self.texts(prompt, negative_prompt)
        model, guided = self.transformer, guidance_scale > 1
        captions = [*negatives, *prompts] if guided else prompts
        text, pooled, mask = (
            made.to(model.device) for made in self.encode_prompt(captions, max_sequence_length)
        )
        given = {
            "encoder_hidden_states": text.to(model.dtype),
            "pooled_projections": pooled.to(model.dtype),
            "encoder_attention_mask": mask,
        }
        cells = (num_frames - 1) // self.vae.time + 1, height // SPACE, width // SPACE
        latents = self.noise((len(prompts), model.config.in_channels, *cells), generator)

        def velocity(noisy: Tensor, level: Tensor, _: int) -> Tensor:
            seen = (torch.cat([noisy, noisy]) if guided else noisy).to(model.dtype)
            moment = (1000 * level).expand(len(seen))
            made = model(seen, timestep=moment, **given, return_dict=False)[0].float()
            if not guided:
                return made
            without, with_text = made.chunk(2)
            led = without + guidance_scale * (with_text - without)
            return rescale_noise_cfg(led, with_text, guidance_rescale)

        latents = self.flow(latents, shifted_levels(num_inference_steps, shift), velocity)
        return self.output(latents, num_frames, output_type, return_dict)
