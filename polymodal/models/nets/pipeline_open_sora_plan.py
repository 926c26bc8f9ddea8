"""Sampling from Open-Sora Plan 1.2 and 1.3: a discrete scheduler of diffusers from noise to a clip.

Conditions: Open-Sora Plan (github.com/PKU-YuanGroup/Open-Sora-Plan, v1.2.0 and main, MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from polymodal.models.nets.causal_vae import KLAutoencoder
from polymodal.models.nets.open_sora_plan import OpenSoraPlanTransformer

SPACE = 8  # pixels along a side of a latent cell


def first_frame_condition(vae: KLAutoencoder, pixels: Tensor, time: int) -> Tensor:
    """What I2V sees beside noisy latents, [B, C + time, T', h, w]: the latents of a clip [B, 3, F, H, W]
    whose frames but the first are grey, and the mask of what is to be generated, of `time` video frames
    each latent frame."""
    shown = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
    latents = vae.normalised(vae.encode(shown.to(vae.dtype)).latent_dist.mode())
    mask = torch.ones_like(latents[:, :1]).repeat(1, time, 1, 1, 1)
    mask[:, :, 0] = 0
    return torch.cat([latents, mask], dim=1)


@dataclass
class OpenSoraPlanPipelineOutput(BaseOutput):
    frames: Any  # [B, F, H, W, 3] in 0..1


class OpenSoraPlanPipeline(DiffusionPipeline):
    """Clips and pictures from text."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: KLAutoencoder,
        transformer: OpenSoraPlanTransformer,
        scheduler: Any,
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )

    def encode_prompt(self, prompt: Sequence[str], max_sequence_length: int = 512) -> tuple[Tensor, Tensor]:
        """mT5's hidden states [B, L, D] and their mask [B, L], padded to the length."""
        asked = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompt), max_length=max_sequence_length, **asked)
        encoder = self.text_encoder
        ids, mask = (tokens[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        return encoder(ids, attention_mask=mask)[0], mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 352,
        width: int = 640,
        num_frames: int = 93,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        max_sequence_length: int = 512,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        return self._sample(
            prompt,
            negative_prompt,
            (num_frames, height, width),
            num_inference_steps,
            guidance_scale,
            max_sequence_length,
            generator,
            output_type,
            return_dict,
            None,
        )

    def _sample(
        self,
        prompt: Any,
        negative_prompt: Any,
        size: tuple[int, int, int],
        steps: int,
        guidance: float,
        length: int,
        generator: Any,
        output_type: str,
        return_dict: bool,
        image: Any,
    ) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        model, vae = self.transformer, self.vae
        weight = model.pos_embed.proj.weight
        device, dtype = weight.device, weight.dtype
        frames, height, width = size
        guided = guidance > 1
        captions = [*(negatives or [""] * len(prompts)), *prompts] if guided else prompts
        text, mask = self.encode_prompt(captions, length)
        text, mask = text.to(device, dtype), mask.to(device)
        processor = VideoProcessor(vae_scale_factor=SPACE)
        condition = None
        if image is not None:
            picture = processor.preprocess(image, height=height, width=width)[:, :, None].to(
                device, vae.dtype
            )
            clip = torch.cat(
                [picture, picture.new_zeros(*picture.shape[:2], frames - 1, height, width)], dim=2
            )
            condition = first_frame_condition(vae, clip, model.config.vae_scale_factor_t).to(dtype)
            condition = condition.expand(len(prompts), -1, -1, -1, -1)
        self.scheduler.set_timesteps(steps, device=device)
        cells = (frames - 1) // vae.time + 1, height // SPACE, width // SPACE
        shape = (len(prompts), model.config.in_channels, *cells)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents * self.scheduler.init_noise_sigma
        for moment in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(latents, moment).to(dtype)
            seen = seen if condition is None else torch.cat([seen, condition], dim=1)
            seen = torch.cat([seen, seen]) if guided else seen
            rest = {
                "timestep": moment.expand(len(seen)),
                "encoder_attention_mask": mask,
                "return_dict": False,
            }
            prediction = model(seen, text, **rest)[0].float()
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance * (with_text - without)
            taken = {"generator": generator} if "Ancestral" in type(self.scheduler).__name__ else {}
            latents = self.scheduler.step(prediction, moment, latents, return_dict=False, **taken)[0]
        made: Any = latents
        if output_type != "latent":
            decoded = vae.decode(vae.denormalised(latents).to(vae.dtype)).sample
            made = processor.postprocess_video(decoded.float(), output_type=output_type)
        return OpenSoraPlanPipelineOutput(frames=made) if return_dict else (made,)


class OpenSoraPlanImageToVideoPipeline(OpenSoraPlanPipeline):
    """Clips from text and their first frame (1.3 I2V)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str],
        image: Any,
        negative_prompt: str | list[str] | None = None,
        height: int = 352,
        width: int = 640,
        num_frames: int = 93,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        max_sequence_length: int = 512,
        generator: Any = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> Any:
        """image: the first frame, one or one a prompt."""
        return self._sample(
            prompt,
            negative_prompt,
            (num_frames, height, width),
            num_inference_steps,
            guidance_scale,
            max_sequence_length,
            generator,
            output_type,
            return_dict,
            image,
        )
