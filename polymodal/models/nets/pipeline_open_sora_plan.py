"""Sampling from Open-Sora Plan 1.2 and 1.3: a discrete scheduler of diffusers from noise to a clip.

Conditions: Open-Sora Plan (github.com/PKU-YuanGroup/Open-Sora-Plan, v1.2.0 and main, MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polymodal.models.nets.causal_vae import KLAutoencoder
from polymodal.models.nets.clip_pipeline import ClipPipeline
from polymodal.models.nets.open_sora_plan import OpenSoraPlanTransformer

SPACE = 8  # pixels along a side of a latent cell


def first_frame_condition(vae: KLAutoencoder, pixels: Tensor, time: int) -> Tensor:
    """What I2V sees beside noisy latents, [B, C + time, T', h, w]: the latents of a clip [B, 3, F, H, W]
    whose frames but the first are grey, and the mask of what is to be generated, of `time` video frames
    each latent frame."""
    shown = torch.cat([pixels[:, :, :1], torch.zeros_like(pixels[:, :, 1:])], dim=2)
    latents = vae.normalised(vae.encode(shown.to(vae.dtype)).latent_dist.mode())
    asked = torch.ones_like(pixels[:, :1], dtype=latents.dtype)
    asked[:, :, 0] = 0
    return torch.cat([latents, cells_of_mask(asked, time, latents.shape[3:])], dim=1)


def cells_of_mask(mask: Tensor, time: int, size: tuple[int, ...]) -> Tensor:
    """A mask of pixels [B, 1, F, H, W] as the denoiser sees it, [B, time, T', h, w]: bilinear to the latents'
    size, the video frames of a latent frame side by side; frame 0 stands for `time` of them."""
    frames = torch.nn.functional.interpolate(mask[:, 0], size, mode="bilinear")
    whole = torch.cat([frames[:, :1].expand(-1, time - 1, -1, -1), frames], dim=1)
    return whole.unflatten(1, (-1, time)).transpose(1, 2)


class OpenSoraPlanPipeline(ClipPipeline):
    """Clips and pictures from text."""

    space = SPACE

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

    def pixels(self, latents: Tensor, frames: int) -> Tensor:
        return self.vae.decode(self.vae.denormalised(latents).to(self.vae.dtype)).sample

    def encode_prompt(self, prompt: Sequence[str], max_sequence_length: int = 512) -> tuple[Tensor, Tensor]:
        """mT5's hidden states [B, L, D] and their mask [B, L], padded to the length."""
        ids, mask = self.tokenized(prompt, self.tokenizer, self.text_encoder, max_sequence_length)
        return self.text_encoder(ids, attention_mask=mask)[0], mask

    def captions(
        self, prompt: Any, negative_prompt: Any, guidance_scale: float, length: int
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and mask of the prompts; before them, with guidance, those of what it leads away
        from."""
        prompts, negatives = self.texts(prompt, negative_prompt)
        text, mask = self.encode_prompt([*negatives, *prompts] if guidance_scale > 1 else prompts, length)
        return text.to(self.transformer.device, self.transformer.dtype), mask.to(self.transformer.device)

    def denoised(
        self,
        captions: tuple[Tensor, Tensor],
        size: tuple[int, int, int],
        steps: int,
        guidance_scale: float,
        generator: Any,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Latents of clips of `size` (frames, height, width) from noise. condition: channels beside the
        noisy ones."""
        (text, mask), model, guided = captions, self.transformer, guidance_scale > 1
        count = len(text) // 2 if guided else len(text)
        self.scheduler.set_timesteps(steps, device=model.device)
        cells = (size[0] - 1) // self.vae.time + 1, size[1] // SPACE, size[2] // SPACE
        latents = self.noise((count, model.config.in_channels, *cells), generator)
        latents = latents * self.scheduler.init_noise_sigma
        taken = {"generator": generator} if "Ancestral" in type(self.scheduler).__name__ else {}
        for moment in self.progress_bar(self.scheduler.timesteps):
            seen = self.scheduler.scale_model_input(latents, moment).to(model.dtype)
            if condition is not None:
                seen = torch.cat([seen, condition.expand(count, -1, -1, -1, -1)], dim=1)
            seen = torch.cat([seen, seen]) if guided else seen
            rest = {"timestep": moment.expand(len(seen)), "encoder_attention_mask": mask}
            prediction = model(seen, text, **rest, return_dict=False)[0].float()
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance_scale * (with_text - without)
            latents = self.scheduler.step(prediction, moment, latents, return_dict=False, **taken)[0]
        return latents

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
        captions = self.captions(prompt, negative_prompt, guidance_scale, max_sequence_length)
        size = num_frames, height, width
        latents = self.denoised(captions, size, num_inference_steps, guidance_scale, generator)
        return self.output(latents, num_frames, output_type, return_dict)


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
        captions = self.captions(prompt, negative_prompt, guidance_scale, max_sequence_length)
        shown = self.first_frame(image, height, width)
        clip = torch.cat([shown, shown.new_zeros(*shown.shape[:2], num_frames - 1, height, width)], dim=2)
        time = self.transformer.config.vae_scale_factor_t
        condition = first_frame_condition(self.vae, clip, time).to(self.transformer.dtype)
        size = num_frames, height, width
        latents = self.denoised(captions, size, num_inference_steps, guidance_scale, generator, condition)
        return self.output(latents, num_frames, output_type, return_dict)
