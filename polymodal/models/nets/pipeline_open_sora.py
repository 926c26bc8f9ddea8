"""Sampling from Open-Sora 1.2: rectified flow from noise to a clip, with frames that are given.

Steps, their shift by size and length, and guidance against the learned null caption: Open-Sora 1.2
(hpcaitech/Open-Sora, branch opensora/v1.2, Apache-2.0). Captions are lower-cased and stripped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from polymodal.models.nets.autoencoder_open_sora_1_2 import AutoencoderOpenSora
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


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    frames: Any  # [B, F, H, W, 3] in 0..1; output_type "latent": [B, C, T, H, W]


class OpenSoraPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: AutoencoderOpenSora, transformer: STDiT3
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer
        )

    def encode_prompt(self, prompt: Sequence[str], max_sequence_length: int = 300) -> tuple[Tensor, Tensor]:
        """T5's hidden states [B, L, C] and their mask [B, L], padded to the length."""
        texts = [text.lower().strip() for text in prompt]
        asked = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, max_length=max_sequence_length, **asked)
        encoder = self.text_encoder
        ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        return encoder(ids, attention_mask=mask)[0], mask

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
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        model, vae, count = self.transformer, self.vae, len(prompts)
        device, dtype = model.x_embedder.proj.weight.device, model.x_embedder.proj.weight.dtype
        text, mask = self.encode_prompt(prompts, model.config.model_max_length)
        text = text.to(device, dtype)
        null = model.y_embedder.y_embedding.to(text).expand_as(text)
        shape = (count, vae.channels, vae.latent_frames(num_frames), height // vae.space, width // vae.space)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        processor = VideoProcessor(vae_scale_factor=vae.space)
        given, frame_mask = None, None
        if image is not None:
            pixels = processor.preprocess(image, height=height, width=width)[:, :, None]
            given = vae.encode(pixels.to(device, vae.dtype))["latents"].to(latents)
            latents[:, :, :1] = given
            frame_mask = torch.ones(count, shape[2], dtype=torch.bool, device=device)
            frame_mask[:, 0] = False
        fps = torch.full((count,), PICTURE_RATE if num_frames == 1 else frame_rate, device=device)
        size = {"height": float(height), "width": float(width)}
        chunk = vae.config.micro_frame_size
        shift = shift_of(num_frames, height, width, chunk, vae.latent_frames(chunk))

        def velocity(moment: Tensor, caption: Tensor) -> Tensor:
            rest = {**size, "fps": fps, "frame_mask": frame_mask, "return_dict": False}
            (made,) = model(latents.to(dtype), moment.expand(count), caption, mask.to(device), **rest)
            return made[:, : shape[1]].float()

        levels = torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64)
        levels = (shift * levels / (1 + (shift - 1) * levels)).float().to(device)
        for now, after in self.progress_bar(list(zip(levels[:-1], levels[1:], strict=True))):
            step = velocity(now * STEPS, text)
            if guidance_scale != 1:
                without = velocity(now * STEPS, null)
                step = without + guidance_scale * (step - without)
            latents = latents + step * (now - after)
            if given is not None:
                latents[:, :, :1] = given
        made: Any = latents
        if output_type != "latent":
            frames = vae.decode(latents.to(vae.dtype), num_frames).sample
            made = processor.postprocess_video(frames.float(), output_type=output_type)
        return OpenSoraPipelineOutput(frames=made) if return_dict else (made,)
