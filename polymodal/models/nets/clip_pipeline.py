"""What the pipelines of our own denoisers of clips share: captions, first frames, steps of a flow, pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor


@dataclass
class ClipPipelineOutput(BaseOutput):
    frames: Any  # [B, F, H, W, 3] in 0..1; output_type "latent": [B, C, T, H, W]


class ClipPipeline(DiffusionPipeline):
    """A denoiser `transformer` of clips between text encoders and a `vae`. A subclass has its call."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    space: int  # pixels along a side of a latent cell

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        """Latents as the denoiser sees them -> clips [B, 3, F, H, W] in -1..1."""
        raise NotImplementedError

    @staticmethod
    def texts(prompt: str | Sequence[str], negative: str | Sequence[str] | None = None) -> list[list[str]]:
        """[prompts, as many negative ones], "" where none is given."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if negative is None or isinstance(negative, str):
            negative = [negative or ""] * len(prompts)
        return [prompts, list(negative)]

    @staticmethod
    def tokenized(texts: Sequence[str], tokenizer: Any, encoder: Any, length: int) -> tuple[Tensor, Tensor]:
        """ids and mask [B, length] of texts, cut and padded to the length, where the encoder is."""
        asked = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(list(texts), max_length=length, **asked)
        return tokens["input_ids"].to(encoder.device), tokens["attention_mask"].to(encoder.device)

    def first_frame(self, image: Any, height: int, width: int) -> Tensor:
        """Pictures -> pixels [n, 3, 1, height, width] in -1..1, for the VAE."""
        made = self._processor.preprocess(image, height=height, width=width)
        return made[:, :, None].to(self.transformer.device, self.vae.dtype)

    def noise(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        return randn_tensor(shape, generator=generator, device=self.transformer.device, dtype=torch.float32)

    def flow(
        self, latents: Tensor, levels: Tensor, velocity: Callable[[Tensor, Tensor, int], Tensor]
    ) -> Tensor:
        """Euler's steps from levels[0] to levels[-1]: x += v (s' - s), v = velocity(x, s, number of the
        step)."""
        levels = levels.to(latents)
        pairs = list(zip(levels[:-1], levels[1:], strict=True))
        for number, (now, after) in enumerate(self.progress_bar(pairs)):
            latents = latents + velocity(latents, now, number) * (after - now)
        return latents

    def output(self, latents: Tensor, frames: int, output_type: str, return_dict: bool) -> Any:
        made: Any = latents
        if output_type != "latent":
            pixels = self.pixels(latents, frames).float()
            made = self._processor.postprocess_video(pixels, output_type=output_type)
        return ClipPipelineOutput(frames=made) if return_dict else (made,)

    @property
    def _processor(self) -> VideoProcessor:
        return VideoProcessor(vae_scale_factor=self.space)


def shifted_levels(steps: int, shift: float) -> Tensor:
    """steps + 1 noise levels from 1 to 0, evenly spaced and then shifted: k s / (1 + (k - 1) s). float64."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)
