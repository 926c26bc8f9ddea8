"""Sampling from Step-Video T2V and TI2V: Euler's steps from noise (time 0) to a clip (time 1).

Times, guidance and conditions: stepfun-ai/Step-Video-T2V and Step-Video-TI2V (MIT), the report (arXiv
2502.10248).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets.autoencoder_step_video import AutoencoderStepVideo
from polymodal.models.nets.clip_pipeline import ClipPipeline, shifted_levels
from polymodal.models.nets.step_llm import Step1Model, StepTokenizer
from polymodal.models.nets.step_video import StepVideoModel

SHIFT = 13.0  # of the noise levels; 17 for the Turbo weights
MOTION = 5.0  # the motion score that TI2V is told


def condition_of(first: Tensor, frames: int) -> Tensor:
    """What TI2V sees of a first frame: latents [B, C, 1, H, W], zeros behind them, [B, frames, C, H, W]."""
    return torch.nn.functional.pad(first, (0, 0, 0, 0, 0, frames - 1)).transpose(1, 2)


class StepVideoPipeline(ClipPipeline):
    """Clips and pictures from text."""

    def __init__(
        self,
        tokenizer: StepTokenizer,
        text_encoder: Step1Model,
        tokenizer_2: Any,
        text_encoder_2: Any,
        vae: AutoencoderStepVideo,
        transformer: StepVideoModel,
    ) -> None:
        """text_encoder: Step LLM; text_encoder_2: the BertModel of HunyuanCLIP."""
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            vae=vae,
            transformer=transformer,
        )

    @property
    def space(self) -> int:  # type: ignore[override]
        return self.vae.space

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    def encode_prompt(
        self, prompt: Sequence[str], max_sequence_length: int = 320
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step LLM's hidden states [B, L, C], CLIP's [B, M, C2], and the mask of both [B, M + L], CLIP's
        tokens first: all of those are seen."""
        ids, mask = self.tokenized(prompt, self.tokenizer, self.text_encoder, max_sequence_length)
        encoder, length = self.text_encoder_2, min(77, self.text_encoder_2.config.max_position_embeddings)
        ids_2, mask_2 = self.tokenized(prompt, self.tokenizer_2, encoder, length)
        clip = encoder(ids_2, attention_mask=mask_2).last_hidden_state
        seen = torch.cat([torch.ones_like(mask_2).to(mask), mask], dim=1)
        return self.text_encoder(ids).last_hidden_state, clip, seen

    def denoised(
        self,
        texts: list[list[str]],
        size: tuple[int, int, int],
        steps: int,
        guidance_scale: float,
        shift: float,
        generator: Any,
        **condition: Any,
    ) -> Tensor:
        """Latents of clips of `size` (frames, height, width). texts: prompts and negative ones; condition:
        more arguments of the denoiser."""
        model, (prompts, negatives) = self.transformer, texts
        guided = guidance_scale != 1
        language, clip, mask = (
            made.to(model.device)
            for made in self.encode_prompt([*prompts, *negatives] if guided else prompts)
        )
        cells = self.vae.latent_frames(size[0]), size[1] // self.space, size[2] // self.space
        latents = self.noise((len(prompts), model.config.in_channels, *cells), generator)
        given = {"encoder_hidden_states_2": clip.to(model.dtype), "encoder_attention_mask": mask, **condition}

        def velocity(noisy: Tensor, time: Tensor, _: int) -> Tensor:
            seen = noisy.transpose(1, 2).to(model.dtype)
            seen = torch.cat([seen, seen]) if guided else seen
            moment = time.expand(len(seen))
            (made,) = model(seen, moment, language.to(model.dtype), **given, return_dict=False)
            made = made.transpose(1, 2).float()
            if not guided:
                return made
            with_text, without = made.chunk(2)
            return without + guidance_scale * (with_text - without)

        return self.flow(latents, 1 - shifted_levels(steps, shift), velocity)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 544,
        width: int = 992,
        num_frames: int = 204,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        shift: float = SHIFT,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        texts, size = self.texts(prompt, negative_prompt), (num_frames, height, width)
        latents = self.denoised(texts, size, num_inference_steps, guidance_scale, shift, generator)
        return self.output(latents, num_frames, output_type, return_dict)


class StepVideoImageToVideoPipeline(StepVideoPipeline):
    """Clips from text and their first frame (TI2V)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        image: Any,
        negative_prompt: str | list[str] | None = None,
        height: int = 544,
        width: int = 992,
        num_frames: int = 102,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        shift: float = SHIFT,
        motion_score: float = MOTION,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """image: the first frame, one or one a prompt."""
        texts, size = self.texts(prompt, negative_prompt), (num_frames, height, width)
        first = self.vae.encode(self.first_frame(image, height, width)).latent_dist.mode()
        shown = condition_of(first.to(self.transformer.dtype), self.vae.latent_frames(num_frames))
        shown = shown.expand(len(texts[0]), -1, -1, -1, -1)
        latents = self.denoised(
            texts,
            size,
            num_inference_steps,
            guidance_scale,
            shift,
            generator,
            condition_hidden_states=torch.cat([shown, shown]) if guidance_scale != 1 else shown,
            motion_score=motion_score,
        )
        return self.output(latents, num_frames, output_type, return_dict)
