"""Open-Sora 1.2: clips and pictures from text, or from a first frame; STDiT3 with its two-stage VAE.

Facts, and the arguments of our own nets and pipeline (models/nets). A directory of it is three repositories:
`transformer` (hpcai-tech/OpenSora-STDiT-v3), `vae` (hpcai-tech/OpenSora-VAE-v1.2), `text_encoder` and
`tokenizer` (T5 v1.1 XXL).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch, SampleLengths
from polymodal.models import pipelines
from polymodal.models.card import Process, Size
from polymodal.models.diffusion import ChunkGrid, Generation
from polymodal.models.generation.denoiser_card import UNBUILT, denoiser_card
from polymodal.models.nets import autoencoder_open_sora_1_2 as autoencoder
from polymodal.models.nets.pipeline_open_sora import PICTURE_RATE, shift_of
from polymodal.models.storage import Files

RATE = 24.0
"""Frames a second where a sample has none."""
NULL = "y_embedder.y_embedding"


class OpenSora(Generation):
    line = "open-sora"
    text = ("encoder_hidden_states", "encoder_attention_mask")
    kept = ("encoder_attention_mask",)  # a dropped caption is the null caption with its own mask
    prompt_outputs = text
    media = ("fps",)
    given = ("rate",)
    zero = (
        "temporal_blocks.*.attn.proj.weight",
        "temporal_blocks.*.cross_attn.proj.weight",
        "temporal_blocks.*.mlp.fc2.weight",
        "fps_embedder.mlp.2.*",
    )

    def build(self) -> nn.Module:
        # the published config names its class otherwise
        return pipelines.empty({**self.config, "_class_name": "STDiT3"}).train()

    def grid(self) -> ChunkGrid:
        vae = self.component_config("vae")
        temporal = vae.get("temporal") or {}
        spatial = vae.get("spatial") or autoencoder.SPATIAL
        halved = sum(temporal.get("temporal_downsample", (False, True, True)))
        space = 2 ** (len(spatial["block_out_channels"]) - 1)
        patch: Any = tuple(self.config.get("patch_size", (1, 2, 2)))
        chunk = int(vae.get("micro_frame_size") or 17)
        channels = int(temporal.get("embed_dim", 4))
        return ChunkGrid(channels, 2**halved, space, patch, chunk=chunk)

    def process(self) -> Process:
        grid = self.grid()
        latents = -(-grid.chunk // grid.time)
        by_size = partial(shift_of, chunk=grid.chunk, latents=latents)
        return Process(reversed=True, shift="dynamic", by_size=by_size, per_token=True)

    @property
    def max_length(self) -> int:
        return int(self.config.get("model_max_length", 300))

    def prompt_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_length}

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        """As the pipeline does; the empty caption is the denoiser's own null caption."""
        made = super().encode_text(pipeline, captions)
        name = self.text[0]
        empty = torch.tensor([not caption for caption in captions], device=made[name].device)
        if bool(empty.any()):
            made[name] = torch.where(empty[:, None, None], self.null().to(made[name]), made[name])
        return made

    def null(self) -> Tensor:
        """What stands for a dropped caption [L, C]: from the denoiser's files, else as it is built."""
        folder = self.weights_source
        files = Files(folder) if any(folder.glob("*.safetensors")) else None
        if files is not None and NULL in files.shapes:
            return files.whole(NULL)
        return self.build().get_buffer(NULL)

    def encode_media(self, pipeline: Any, pixels: Tensor, rate: Tensor | None = None) -> dict[str, Tensor]:
        vae = pipeline.vae
        if rate is None or pixels.shape[2] == 1:
            fps = PICTURE_RATE if pixels.shape[2] == 1 else RATE
            rate = torch.full((len(pixels),), fps, device=pixels.device)
        return {"latents": vae.encode(pixels.to(vae.dtype))["latents"], "fps": rate.float()}

    def trial(self, frames: int) -> dict[str, Tensor]:
        return {"rate": torch.tensor([RATE])}

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        return vae.decode(latents.to(vae.dtype), vae.pixel_frames(latents.shape[2])).sample

    def shapes(self, latents: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        width = int(self.config.get("caption_channels", 4096))
        length = (self.max_length,)
        return {"encoder_hidden_states": (*length, width), "encoder_attention_mask": length, "fps": ()}

    def inputs(self, model: nn.Module, latents: Tensor, batch: Batch) -> dict[str, Any]:
        space = self.grid().space
        height, width = (float(side * space) for side in latents.shape[-2:])
        given = {"fps": batch["fps"], "height": height, "width": width}
        clean = batch.get("clean")
        if clean is not None:
            given["frame_mask"] = clean[:, 0, :, 0, 0] == 0
        return {**self.conditions(model, batch, self.text), **given}

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        return super().denoise(model, latents, timestep, batch)[:, : latents.shape[1]]

    def cost(self, measure: SampleLengths) -> float:
        """Blocks attend over the places of a frame, or over the frames of a place."""
        layers, width, parameters = self.size()
        frames = self.grid().shape(*measure.shape)[1]
        seen = measure.tokens // frames + frames
        # half of the blocks meet each
        return 2.0 * parameters * measure.tokens + 2.0 * layers * width * measure.tokens * seen

    def width(self) -> int:
        return int(self.config["hidden_size"])


CARD = denoiser_card(
    name="open-sora-1.2",
    title="Open-Sora 1.2",
    family=OpenSora,
    blocks=("spatial_blocks.*", "temporal_blocks.*"),
    embedders=("x_embedder", "t_embedder", "fps_embedder", "t_block", "y_embedder"),
    output=("final_layer",),
    head="final_layer.linear",
    pipelines={"text-to-video": "OpenSoraPipeline", "image-to-video": "OpenSoraPipeline"},
    limits={**UNBUILT},
    clip={"frames": [51], "fps": 24, "pixels": 480 * 848},
    sizes={"1.1b": Size("hpcai-tech/OpenSora-STDiT-v3", 1.21, 56)},
    verified="the net and its VAE equal published numbers in float64; trained, exported, opened and sampled",
    keywords=("text to video", "image to video", "video generation"),
    aliases=("open-sora", "opensora1.2", "opensora"),
    seeds=("1.1b",),
)
