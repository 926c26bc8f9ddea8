"""Sound in Qwen's models: mel frames in windows that an audio tower computes independently.

Shared by Qwen2.5-Omni, Qwen3-Omni and Qwen3-ASR. A model's own file has the call of its tower; what a sound
becomes in the token stream is in qwen_omni_media.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaStream
from polymodal.core.tensors import to_device
from polymodal.distributed import attention as packed_attention
from polymodal.models.understanding.vision_language import VisionLanguage

AUDIO = MediaStream("audio", "input_features", "audio_frames", ("frame", "none"))
"""Mel frames [F, bands] float32, 10 ms each, and the number of frames of each sound [M, 1]."""
TOWER, BLOCKS = "model.audio_tower", "model.audio_tower.layers.*"
CHUNK, CHUNK_TOKENS = 100, 13
"""Frames that Qwen3's convolutions take at once, and the tokens of such a chunk: the library knows no
others."""
BLOCKS_PLAN = {
    TOWER: "stream",
    f"{BLOCKS}.self_attn": "attention",
    **{f"{BLOCKS}.self_attn.{name}_proj": "colwise" for name in "qkv"},
    f"{BLOCKS}.self_attn.out_proj": "rowwise",
    f"{BLOCKS}.fc1": "entering_colwise",
    f"{BLOCKS}.fc2": "leaving_rowwise",
}
QWEN3_FRONT = tuple(f"{TOWER}.{name}" for name in ("conv2d1", "conv2d2", "conv2d3", "conv_out"))


def pair_tokens(frames: int) -> int:
    """Features of so many mel frames in Qwen2.5-Omni: halved by the second convolution, and by the mean of
    pairs."""
    return (frames + 1) // 2 // 2


def chunk_tokens(frames: int) -> int:
    """Features of so many mel frames in Qwen3's tower: chunks are halved three times."""
    return CHUNK_TOKENS * (frames // CHUNK) + (frames % CHUNK + 7) // 8


def windows(frames: int, window: int) -> tuple[int, ...]:
    """Lengths of the parts of a sound that the audio tower computes independently."""
    return (window,) * (frames // window) + ((frames % window,) if frames % window else ())


class AudioBlocks(nn.ModuleList):
    """An audio tower's blocks, and what ends their stream, in the order in which the library calls them.

    The library takes the first of a block's outputs; a module that stands for one of another stage has one.
    """

    behind: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        (tower,) = self.__dict__["tower"]
        for module in (*super().__iter__(), *(getattr(tower, name) for name in self.behind)):
            yield partial(_outputs, module)


def _outputs(module: nn.Module, hidden: Tensor, *more: Any, **arguments: Any) -> tuple[Tensor, ...]:
    out = module(hidden, *more, **arguments)
    return out if isinstance(out, tuple) else (out,)


def iterate_blocks(tower: nn.Module, kind: type[AudioBlocks] = AudioBlocks) -> None:
    """Have the library's loop over an audio tower's blocks go through AudioBlocks."""
    blocks: Any = tower.layers
    blocks.__class__ = kind
    blocks.__dict__["tower"] = (tower,)  # not a submodule of its own part


class QwenSound(VisionLanguage):
    """The stream AUDIO of a family, whose other streams are those of its other base."""

    def sound(self, model: nn.Module, rows: Tensor, frames: Tensor, device: torch.device) -> Tensor:
        """The audio tower and its projector: mel frames [F, bands] of sounds of `frames` [M] (on the host) ->
        features [N, D]."""
        raise NotImplementedError

    def sound_tokens(self, frames: int) -> int:
        """Features of so many mel frames."""
        raise NotImplementedError

    def sound_costs(self, lengths: Sequence[int]) -> dict[str, float]:
        """Forward FLOPs of the audio tower on windows of these lengths in frames, by module pattern."""
        raise NotImplementedError

    def sound_states(self, frames: int) -> int:
        """Rows of the tower's blocks for a window of so many frames."""
        raise NotImplementedError

    @property
    def window(self) -> int:
        """Mel frames that attend to each other."""
        raise NotImplementedError

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        if stream.name != AUDIO.name:
            return super().tower(model, stream, rows, sizes, device)
        return self.sound(model, rows, sizes[:, 0], device)

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        return (self.config.audio_token_id,) if stream.name == AUDIO.name else super().media_ids(stream)

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        if stream.name != AUDIO.name:
            return super().media_parts(stream, sizes)
        return [(part,) for (frames,) in sizes.tolist() for part in windows(frames, self.window)]

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        return self.sound_tokens(*part) if stream.name == AUDIO.name else super().media_tokens(stream, part)

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().media_lengths(stream, part)
        return windows(*part, self.window)

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().medium(stream, length)
        least = next(frames for frames in range(1, CHUNK) if self.sound_tokens(frames))
        return (max(least, length),)

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().row_shape(stream)
        return (self.config.audio_config.num_mel_bins,)

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().tower_state(stream, sizes)
        states = sum(self.sound_states(part) for (part,) in self.media_parts(stream, sizes))
        return states, self.config.audio_config.d_model

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        if stream.name != AUDIO.name:
            return super().tower_costs(stream, lengths)
        return self.sound_costs(lengths)

    def block_costs(self, states: Sequence[int]) -> float:
        """Forward FLOPs of the tower's blocks on windows of so many rows each."""
        audio = self.config.audio_config
        side = audio.d_model
        block = 2.0 * sum(states) * (4 * side**2 + 2 * side * audio.encoder_ffn_dim)
        return audio.encoder_layers * (block + 4.0 * side * sum(n * n for n in states))


class Qwen3Sound(QwenSound):
    """The audio tower of Qwen3-Omni and Qwen3-ASR: three convolutions over chunks of a second, attention
    within windows of several.

    A last chunk that is not whole is filled up with silence in the mel domain to a whole one, always: the
    convolutions reach into it, and the library fills chunks up to the longest of a batch. With any sound of a
    second or more this is the same.
    """

    projector: tuple[str, str]  # its two layers

    @property
    def window(self) -> int:
        return self.config.audio_config.n_window_infer

    def sound_tokens(self, frames: int) -> int:
        return chunk_tokens(frames)

    def sound_states(self, frames: int) -> int:
        return chunk_tokens(frames)

    def chunks(self, rows: Tensor, frames: Tensor) -> tuple[Tensor, list[int]]:
        """(mel frames in chunks [chunks, bands, 100], the frames of each that are sound)."""
        lengths = [part for each in frames.tolist() for part in windows(each, CHUNK)]
        padded = rows.new_zeros(len(lengths), CHUNK, rows.shape[-1])
        filled = torch.cat([torch.arange(n) + CHUNK * i for i, n in enumerate(lengths)])
        padded = padded.flatten(0, 1).index_copy(0, to_device(filled, rows.device), rows)
        return padded.unflatten(0, (-1, CHUNK)).transpose(1, 2), lengths

    def attended(self, frames: Tensor, device: torch.device) -> dict[str, Any]:
        """Arguments of the tower: which rows attend to each other."""
        states = [chunk_tokens(part) for each in frames.tolist() for part in windows(each, self.window)]
        return {"cu_seqlens": packed_attention.cumulative(states, device), "max_seqlen": max(states)}

    def sound_costs(self, lengths: Sequence[int]) -> dict[str, float]:
        audio = self.config.audio_config
        side, channels, bands = audio.d_model, audio.downsample_hidden_size, audio.num_mel_bins
        chunks = sum(-(-frames // CHUNK) for frames in lengths)
        states = [chunk_tokens(frames) for frames in lengths]
        out, before, time = {}, 1, CHUNK
        for name in QWEN3_FRONT[:3]:
            bands, time = (bands + 1) // 2, (time + 1) // 2
            out[name] = 2.0 * chunks * 9 * before * channels * bands * time
            before = channels
        out[QWEN3_FRONT[3]] = 2.0 * chunks * CHUNK_TOKENS * channels * bands * side
        first, second = self.projector
        rows = sum(states)
        return {
            **out,
            BLOCKS: self.block_costs(states),
            first: 2.0 * rows * side * side,
            second: 2.0 * rows * side * audio.output_dim,
        }

    def check_windows(self) -> None:
        """Raise PolymodalError for windows that the library's tower does not have."""
        audio = self.config.audio_config
        if 2 * audio.n_window != CHUNK or audio.n_window_infer % CHUNK:
            raise PolymodalError(
                f"model.config: audio_config.n_window = {audio.n_window} and n_window_infer = "
                f"{audio.n_window_infer}; this tower has chunks of {CHUNK} frames and windows of whole "
                "chunks.",
                "Keep the checkpoint's.",
            )
