"""Sampling from Open-Sora 1.2: rectified flow from noise to a clip, with frames that are given.

Steps, their shift by size and length, and guidance against the learned null caption: Open-Sora 1.2
(hpcaitech/Open-Sora, branch opensora/v1.2, Apache-2.0). Captions are lower-cased and stripped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets.autoencoder_open_sora_1_2 import AutoencoderOpenSora
from polymodal.models.nets.clip_pipeline import ClipPipeline, shifted_levels
from polymodal.models.nets.stdit3 import STDiT3

STEPS = 1000.0
SIDE = 512  # of the square whose pictures have no shift
PICTURE_RATE = 120.0  # frames a second that stand for a picture


def shift_of(frames: int, height: int, width: int, chunk: int = 17, latents: int = 5) -> float:
    """The shift of noise levels: sqrt(pixels / 512^2) sqrt(latent frames), of whole chunks; 1 of a picture.

    chunk: frames that are coded together, to `latents` latent frames.
    """
    count = 1 if frames == 1 else max(1, latents * (frames // chunk))
    return math.sqrt(height * width / SIDE**2) * math.sqrt(count)


class OpenSoraPipeline(ClipPipeline):
    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: AutoencoderOpenSora, transformer: STDiT3
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer
        )

    @property
    def space(self) -> int:  # type: ignore[override]
        return self.vae.space

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype), frames).sample

    def encode_prompt(self, prompt: Sequence[str], max_sequence_length: int = 300) -> tuple[Tensor, Tensor]:
        """T5's hidden states [B, L, C] and their mask [B, L], padded to the length."""
        texts = [text.lower().strip() for text in prompt]
        ids, mask = self.tokenized(texts, self.tokenizer, self.text_encoder, max_sequence_length)
        return self.text_encoder(ids, attention_mask=mask)[0], mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        height: int = 480,
        width: int = 848,
        num_frames: int = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        frame_rate: float = 24.0,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """image: the first frame, one or one a prompt. frame_rate: what the model is told."""
        prompts, _ = self.texts(prompt)
        model, vae, count = self.transformer, self.vae, len(prompts)
        device, dtype = model.device, model.dtype
        text, mask = self.encode_prompt(prompts, model.config.model_max_length)
        text = text.to(device, dtype)
        null = model.y_embedder.y_embedding.to(text).expand_as(text)
        shape = (count, vae.channels, vae.latent_frames(num_frames), height // vae.space, width // vae.space)
        latents = self.noise(shape, generator)
        given, frame_mask = None, None
        if image is not None:
            given = vae.encode(self.first_frame(image, height, width))["latents"].to(latents)
            frame_mask = torch.ones(count, shape[2], dtype=torch.bool, device=device)
            frame_mask[:, 0] = False
        fps = torch.full((count,), PICTURE_RATE if num_frames == 1 else frame_rate, device=device)
        size = {"height": float(height), "width": float(width)}
        chunk = vae.config.micro_frame_size
        shift = shift_of(num_frames, height, width, chunk, vae.latent_frames(chunk))

        def prediction(seen: Tensor, level: Tensor, caption: Tensor) -> Tensor:
            rest = {**size, "fps": fps, "frame_mask": frame_mask, "return_dict": False}
            moment = (level * STEPS).expand(count)
            (made,) = model(seen.to(dtype), moment, caption, mask.to(device), **rest)
            return made[:, : shape[1]].float()

        def velocity(noisy: Tensor, level: Tensor, _: int) -> Tensor:
            made = prediction(kept(noisy), level, text)
            if guidance_scale != 1:
                without = prediction(kept(noisy), level, null)
                made = without + guidance_scale * (made - without)
            return -made  # the prediction is data - noise

        def kept(clip: Tensor) -> Tensor:
            return clip if given is None else torch.cat([given.expand_as(clip[:, :, :1]), clip[:, :, 1:]], 2)

        latents = kept(self.flow(latents, shifted_levels(num_inference_steps, shift), velocity))
        return self.output(latents, num_frames, output_type, return_dict)
