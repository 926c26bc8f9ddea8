"""LTX-2: clips with their sound, from text or from a first frame; two streams with cross-attention.

Facts, and the arguments of diffusers' LTX2VideoTransformer3DModel and its pipelines. Sound is noised and
trained beside the pictures; without it (data.clip.sound: false) the library isolates the streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polymodal.core.sample import Batch
from polymodal.models.card import Output, Size
from polymodal.models.diffusion import Generation, LatentGrid
from polymodal.models.generation.denoiser_card import VERIFIED, denoiser_card

RATE = 24.0
"""Frames a second where a sample has none."""
WINDOW, FLOOR = 1024, 1e-5
"""Of the spectrogram that the audio VAE was trained on: samples of a window, and the least magnitude."""


class LTX2(Generation):
    line = "ltx"
    text = ("encoder_hidden_states", "audio_encoder_hidden_states", "encoder_attention_mask")
    media = ("audio_latents", "frame_rate")
    given = ("sound", "rate")
    zero = ("proj_out.*", "audio_proj_out.*")
    noise = {"per_token": True, "streams": ("audio",)}

    def grid(self) -> LatentGrid:
        vae = self.component_config("vae")
        stages = vae.get("spatio_temporal_scaling", True)
        count = len(vae["layers_per_block"]) - 1 if isinstance(stages, bool) else sum(stages)
        patch, joined = int(self.config["patch_size"]), int(self.config["patch_size_t"])
        time = int(vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**count)
        space = int(vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**count)
        sample_rate = int(self.component_config("audio_vae")["sample_rate"])
        channels = int(vae["latent_channels"])
        return LatentGrid(channels, time, space, (joined, patch, patch), sound=sample_rate)

    def encode_text(self, pipeline: Any, captions: Sequence[str]) -> dict[str, Tensor]:
        hidden, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        made = pipeline.connectors(hidden, mask, padding_side=pipeline.tokenizer.padding_side)
        return dict(zip(self.text, made, strict=True))

    def encode_media(
        self, pipeline: Any, pixels: Tensor, sound: Tensor | None = None, rate: Tensor | None = None
    ) -> dict[str, Tensor]:
        """sound: waveforms [1, 2, samples] in -1..1 at the grid's rate, of the clip's length; rate: fps
        [1]."""
        vae = pipeline.vae
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
        statistics = vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        if rate is None:
            rate = torch.full((len(pixels),), RATE, device=pixels.device)
        made = {"latents": pipeline._normalize_latents(latents, *statistics), "frame_rate": rate}
        if sound is not None:
            made["audio_latents"] = self._audio_latents(pipeline, sound, pixels.shape[2] / float(rate))
        return made

    def _audio_latents(self, pipeline: Any, sound: Tensor, seconds: float) -> Tensor:
        """Waveforms -> latents [B, length, channels x bands], normalised, as long as the pipeline's."""
        vae = pipeline.audio_vae
        hop, joined = vae.config.mel_hop_length, vae.temporal_compression_ratio
        length = round(seconds * vae.config.sample_rate / hop / joined)
        short = max(0, (length + 1) * joined * hop - sound.shape[-1])  # up to the last latent's windows
        padded = functional.pad(sound.float(), (0, short))
        bands = spectrogram(padded, vae.config.sample_rate, hop, vae.config.mel_bins)
        latents = vae.encode(bands.to(vae.dtype)).latent_dist.mode()[:, :, :length]
        packed = pipeline._pack_audio_latents(latents)
        return pipeline._normalize_audio_latents(packed, vae.latents_mean, vae.latents_std)

    def decode(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        statistics = vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        latents = pipeline._denormalize_latents(latents, *statistics)
        return vae.decode(latents.to(vae.dtype), None, return_dict=False)[0]

    def trial(self, frames: int) -> dict[str, Tensor]:
        count = round(frames / RATE * self.grid().sound)
        draw = torch.Generator().manual_seed(1)
        return {"sound": torch.rand(1, 2, count, generator=draw) - 0.5, "rate": torch.tensor([RATE])}

    def arguments(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One guidance for both streams; a scale of 1 turns the pipeline's other guidances off, too."""
        out = {**asked}
        scale = out.get("guidance_scale")
        if scale is not None:
            out["audio_guidance_scale"] = scale
        if scale == 1:
            off = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
            out |= {f"{stream}{name}": value for stream in ("", "audio_") for name, value in off.items()}
        return out

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        latents = batch["noisy"].to(self.dtype(model))
        video, audio = self._both(model, latents, batch["timestep"], batch)
        return Output(video, extra={"audio": audio})

    def denoise(self, model: nn.Module, latents: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        return self._both(model, latents, timestep, batch)[0]

    def _both(self, model: Any, latents: Tensor, timestep: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        from diffusers import LTX2Pipeline

        audio, rate, count = batch.get("audio_noisy"), batch["frame_rate"].float(), len(latents)
        without_sound = audio is None
        if audio is None:
            audio = latents.new_zeros(count, 1, int(self.config["audio_in_channels"]))
        length = audio.shape[1]
        frames, height, width = latents.shape[2:]
        joined, patch = int(self.config["patch_size_t"]), int(self.config["patch_size"])
        coords = model.rope.prepare_video_coords(count, frames, height, width, latents.device, fps=1.0)
        coords[:, 0] /= rate.view(-1, 1, 1)
        given: dict[str, Any] = {
            **self.conditions(model, batch, self.text),
            "timestep": timestep,
            "audio_timestep": None,
        }
        clean = batch.get("clean")
        if clean is not None:
            noised = 1 - clean[:, 0, ::joined, ::patch, ::patch].float().flatten(1)
            given |= {"timestep": timestep[:, None] * noised, "audio_timestep": timestep}
        video, sound = self.forward(model)(
            hidden_states=LTX2Pipeline._pack_latents(latents, patch, joined),
            audio_hidden_states=audio.to(latents.dtype),
            sigma=timestep,
            audio_encoder_attention_mask=given["encoder_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            fps=float(batch.on_host("frame_rate")[0]),  # type: ignore[index]
            audio_num_frames=length,
            video_coords=coords,
            audio_coords=model.audio_rope.prepare_audio_coords(count, length, latents.device),
            isolate_modalities=without_sound,
            use_cross_timestep=True,
            return_dict=False,
            **given,
        )
        cells = (frames // joined, height // patch, width // patch)
        return LTX2Pipeline._unpack_latents(video, *cells, patch, joined), sound


def spectrogram(sound: Tensor, rate: int, hop: int, bands: int) -> Tensor:
    """Waveforms [B, C, samples] -> log-mel magnitudes [B, C, frames, bands], float32; Slaney's filters.

    Windows of WINDOW samples, centred, the ends mirrored; magnitudes below FLOOR are FLOOR.
    """
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(WINDOW // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    window = torch.hann_window(WINDOW, device=sound.device)
    waves = sound.flatten(0, 1)
    spectrum = torch.stft(waves, WINDOW, hop, window=window, pad_mode="reflect", return_complex=True)
    weights = torch.as_tensor(filters, dtype=torch.float32, device=sound.device)
    mel = spectrum.abs().transpose(1, 2) @ weights
    return mel.clamp(min=FLOOR).log().unflatten(0, sound.shape[:2])


CARD = denoiser_card(
    name="ltx-2",
    title="LTX-2",
    family=LTX2,
    blocks=("transformer_blocks.*",),
    embedders=(
        "proj_in",
        "audio_proj_in",
        "caption_projection",
        "audio_caption_projection",
        "time_embed",
        "audio_time_embed",
        "av_cross_attn_video_scale_shift",
        "av_cross_attn_audio_scale_shift",
        "av_cross_attn_video_a2v_gate",
        "av_cross_attn_audio_v2a_gate",
    ),
    output=("proj_out", "audio_proj_out", "scale_shift_table", "audio_scale_shift_table"),
    pipelines={"text-to-video": "LTX2Pipeline", "image-to-video": "LTX2ImageToVideoPipeline"},
    clip={"frames": [121], "fps": 24, "pixels": 512 * 768},
    sizes={"19b": Size("Lightricks/LTX-2", 18.88, 48, devices=16)},
    verified=VERIFIED.replace("trained", "trained with and without sound"),
    keywords=("text to video", "image to video", "video generation", "video with sound"),
    aliases=("ltx2", "ltx"),
    seeds=("19b",),
)
