"""VACE on Wan: a clip from a source clip, a mask of what is made anew, and reference pictures, all optional.

Facts, and the arguments of diffusers' WanVACETransformer3DModel and WanVACEPipeline. Blocks of control run
beside Wan's and add to them. Reference pictures are latent frames of their own before the clip's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.models.card import Size
from polymodal.models.diffusion import LatentGrid, one_prompt
from polymodal.models.generation.denoiser_card import denoiser_card
from polymodal.models.generation.wan import CARD as WAN
from polymodal.models.generation.wan2_2 import Wan22


class Vace(Wan22):
    media = ("control_hidden_states",)  # type: ignore[assignment]
    given = ("source", "mask", "references")
    alone = True
    documented = {
        "latents": "video",
        "encoder_hidden_states": "prompt_ids",
        "control_hidden_states": "vace_context",
    }
    zero = ("proj_out.*", "vace_blocks.*.proj_out.*")

    @classmethod
    def claims(cls, index: Mapping[str, Any]) -> bool:
        return True

    @property
    def conditioned(self) -> bool:
        return False

    @property
    def per_token(self) -> bool:
        return False

    def check(self) -> None:
        super().check()
        grid = self.grid()
        made, seen = 2 * grid.channels + grid.space**2, int(self.config["vace_in_channels"])
        if seen != made:
            raise PolymodalError(
                f"{self.source}: its blocks of control see {seen} channels, "
                f"its VAE and the mask make {made}.",
                "The denoiser and the VAE belong to different checkpoints: fetch the pipeline again.",
            )

    def grid(self) -> LatentGrid:
        return replace(super().grid(), references=True)

    def encode_media(
        self,
        pipeline: Any,
        pixels: Tensor,
        source: Tensor | None = None,
        mask: Tensor | None = None,
        references: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """A clip [1, 3, F, H, W] and what it is made from, alike; references [1, 3, N, H, W]. Without a
        source all is made anew; without a mask all of the source is."""
        from diffusers import WanVACEPipeline

        grid, vae, count = self.grid(), pipeline.vae, 0 if references is None else references.shape[2]
        source = torch.zeros_like(pixels) if source is None else source
        mask = torch.ones_like(pixels) if mask is None else ((mask + 1) / 2).clamp(0, 1)
        shown = [[] if references is None else list(references[0].unbind(1))]
        config = SimpleNamespace(patch_size=self.config["patch_size"])
        like: Any = SimpleNamespace(
            transformer=SimpleNamespace(config=config),
            vae_scale_factor_temporal=grid.time,
            vae_scale_factor_spatial=grid.space,
        )
        control = pipeline.prepare_video_latents(source, mask, shown, None, pixels.device)
        masks = WanVACEPipeline.prepare_masks(like, mask, shown)
        latents = self._normalised(vae, vae.encode(pixels.to(vae.dtype)).latent_dist.mode())
        latents = torch.cat([control[:, : grid.channels, :count].to(latents), latents], dim=2)
        return {"latents": latents, "control_hidden_states": torch.cat([control, masks.to(control)], dim=1)}

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        scale = latents.new_ones(len(self.config["vace_layers"]))
        return {**super().inputs(model, latents, batch), "control_hidden_states_scale": scale}

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A clip to start from is the source: what is made has its length and size."""
        grid = self.grid()
        out = one_prompt(super().arguments(asked))
        out["reference_images"] = out.pop("references", None)
        video, mask = out.get("video"), out.get("mask")
        if mask is not None and video is None:
            raise PolymodalError(
                "There is a mask and no clip that it belongs to.", "Give the clip with --video."
            )
        if video is not None:
            count = (len(video) - 1) // grid.time * grid.time + 1
            if isinstance(mask, list) and len(mask) < count:
                raise PolymodalError(
                    f"The mask has {len(mask)} frames, the clip {count}.", "Give a mask of the clip's length."
                )
            width, height = (side // grid.side * grid.side for side in video[0].size)
            video = [frame.resize((width, height)) for frame in video[:count]]
            out |= {"video": video, "num_frames": count, "height": height, "width": width}
            if mask is not None:
                masks = mask[:count] if isinstance(mask, list) else [mask] * count
                out["mask"] = [m.resize((width, height)) for m in masks]
        return out


CARD = denoiser_card(
    name="vace",
    title="Wan VACE",
    family=Vace,
    blocks=("blocks.*", "vace_blocks.*"),
    embedders=("patch_embedding", "condition_embedder"),
    output=("norm_out", "proj_out", "scale_shift_table"),
    towers={"control": ("vace_blocks", "vace_patch_embedding"), **WAN.towers},
    pipelines={"text-to-video": "WanVACEPipeline", "video-to-video": "WanVACEPipeline"},
    clip=WAN.clip,
    sizes={
        "1.3b": Size("Wan-AI/Wan2.1-VACE-1.3B-diffusers", 2.15, 45),
        "14b": Size("Wan-AI/Wan2.1-VACE-14B-diffusers", 17.3, 48, devices=16),
    },
    keywords=("text to video", "video to video", "video editing", "video inpainting", "video generation"),
    aliases=("wan-vace", "wan2.1-vace"),
    seeds=("1.3b", "14b"),
)
