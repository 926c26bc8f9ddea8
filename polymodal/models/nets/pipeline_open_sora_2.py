"""Sampling from Open-Sora 2.0: rectified flow from noise to a clip, from text alone or from a first frame.

Steps, their shift by size and length, guidance by text and by the first frame: Open-Sora 2.0
(hpcaitech/Open-Sora, main, Apache-2.0) and its report (arXiv 2503.09642). Captions end in a motion score and
a frame rate, as those it was trained with do; both encoders read them padded, without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor

from polymodal.models.nets.clip_pipeline import ClipPipeline, shifted_levels
from polymodal.models.nets.open_sora_2 import OpenSora2Transformer

CELLS = 256, 4096
SHIFTS = 1.0, 3.0  # of a picture with so many tokens; between and beyond them linear
OSCILLATES = 10  # from this step on guidance is left out of every second step


def shift_of(frames: int, height: int, width: int) -> float:
    """The shift of noise levels: of a latent frame's tokens, times sqrt(frames). All sizes are latent."""
    tokens = height * width / 4
    slope = (SHIFTS[1] - SHIFTS[0]) / (CELLS[1] - CELLS[0])
    return (SHIFTS[0] + slope * (tokens - CELLS[0])) * math.sqrt(frames)


def packed(latents: Tensor) -> Tensor:
    """[B, C, T, H, W] -> tokens of two by two cells of a frame [B, T * H/2 * W/2, C * 4]."""
    cells = latents.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
    return cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpacked(tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """The way back: [B, T * H/2 * W/2, C * 4] -> [B, C, frames, height, width]."""
    cells = tokens.unflatten(1, (frames, height // 2, width // 2)).unflatten(4, (-1, 2, 2))
    return cells.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


def condition_of(first: Tensor, given: Tensor, like: Tensor) -> Tensor:
    """What the denoiser sees of a first frame: [B, 1 + C, T, H, W], a mask and its latents, zeros behind it.

    first: latents of the frame alone [B, C, 1, H, W]; given: 1 where a sample has it, else 0, [B]; like:
    latents [B, C, T, H, W].
    """
    shown = torch.cat([torch.ones_like(first[:, :1]), first], dim=1) * given.to(first).view(-1, 1, 1, 1, 1)
    return torch.nn.functional.pad(shown, (0, 0, 0, 0, 0, like.shape[2] - 1)).to(like.dtype)


def guidance_at(scale: float, step: int) -> float:
    """The scale of a step, where it oscillates."""
    return 1.0 if step >= OSCILLATES and step % 2 else scale


class OpenSora2Pipeline(ClipPipeline):
    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        tokenizer_2: Any,
        text_encoder_2: Any,
        vae: AutoencoderKLHunyuanVideo,
        transformer: OpenSora2Transformer,
    ) -> None:
        """text_encoder: T5's; text_encoder_2: CLIP's."""
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
        return int(self.vae.config.spatial_compression_ratio)

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def encode_prompt(
        self,
        prompt: Sequence[str],
        max_sequence_length: int = 512,
        motion_score: int | None = 4,
        frame_rate: float = 24,
    ) -> tuple[Tensor, Tensor]:
        """T5's hidden states [B, L, C] and CLIP's pooled ones [B, P]. "" stays as it is: nothing is asked."""
        motion = "" if motion_score is None else f" {motion_score} motion score."
        texts = [f"{text}{motion} {frame_rate:g} FPS." if text else "" for text in prompt]
        ids, _ = self.tokenized(texts, self.tokenizer, self.text_encoder, max_sequence_length)
        encoder, length = self.text_encoder_2, self.text_encoder_2.config.max_position_embeddings
        pooled = self.tokenized(texts, self.tokenizer_2, encoder, length)[0]
        return self.text_encoder(ids)[0], encoder(pooled).pooler_output

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 576,
        width: int = 1024,
        num_frames: int = 129,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 3.0,
        motion_score: int | None = 4,
        frame_rate: float = 24,
        max_sequence_length: int = 512,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """image: the first frame, one or one a prompt. image_guidance_scale: how far away from clips without
        it. Both scales rest at every second of the later steps; the picture's falls over the steps, and is
        least at the first frame."""
        prompts, negatives = self.texts(prompt, negative_prompt)
        model, count = self.transformer, len(prompts)
        device, dtype = model.device, model.dtype
        asked = {"motion_score": motion_score, "frame_rate": frame_rate}
        text, pooled = (
            made.to(device, dtype)
            for made in self.encode_prompt([*prompts, *negatives], max_sequence_length, **asked)
        )
        time = int(self.vae.config.temporal_compression_ratio)
        cells = (num_frames - 1) // time + 1, height // self.space, width // self.space
        latents = self.noise((count, model.config.in_channels // 4, *cells), generator)
        first = torch.zeros_like(latents[:, :, :1])
        if image is not None:
            made = self.vae.encode(self.first_frame(image, height, width)).latent_dist.mode()
            first = (made * self.vae.config.scaling_factor).to(first).expand_as(first)
        guided = guidance_scale != 1 or (image is not None and image_guidance_scale != 1)
        shown = [float(image is not None)] * (1 + guided)
        rows = [*shown, 0.0] if image is not None and guided else shown  # text, none, nor the picture
        condition = packed(
            torch.cat([condition_of(first, latents.new_full((count,), row), latents) for row in rows])
        )
        places = model.places(*cells, device)
        nowhere = places.new_zeros(text.shape[1], 3)
        chosen = [*range(2 * count), *range(count, 2 * count)][: len(rows) * count]

        def velocity(noisy: Tensor, level: Tensor, step: int) -> Tensor:
            tokens = packed(noisy.repeat(len(rows), 1, 1, 1, 1)).to(dtype)
            given = {"img_ids": places, "txt_ids": nowhere, "return_dict": False}
            if model.config.cond_embed:
                given["condition"] = condition.to(dtype)
            moment = level.expand(len(tokens))
            (out,) = model(tokens, moment, text[chosen], pooled[chosen], **given)
            if not guided:
                return unpacked(out, *cells).float()
            seen, without, *neither = unpacked(out, *cells).float().chunk(len(rows))
            made = guidance_at(guidance_scale, step) * (seen - without)
            if not neither:
                return without + made
            scale = guidance_at(image_guidance_scale, step)
            most = scale + (1 - scale) * step / num_inference_steps if scale > 1 else scale
            ramp = torch.linspace(1.0 if scale > 1 else scale, most, cells[0], device=device)
            return neither[0] + ramp.view(-1, 1, 1) * (without - neither[0]) + made

        levels = shifted_levels(num_inference_steps, shift_of(*cells))
        latents = self.flow(latents, levels, velocity)
        if image is not None:
            latents = torch.cat([first, latents[:, :, 1:]], dim=2)
        return self.output(latents, num_frames, output_type, return_dict)
