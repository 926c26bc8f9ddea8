"""What Qwen's omni models make of pictures, videos and sound: token spans, patches, mel frames, positions.

The sound of a video and its frames are one span; their order and their positions are the library's own rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaPart, MediaShape, Span
from polymodal.models.omni.qwen_sound import AUDIO, chunk_tokens, pair_tokens, windows
from polymodal.models.pipelines import quiet
from polymodal.models.understanding.media import TokenMedia
from polymodal.models.understanding.qwen_vl_media import END, PADS, START, VISION, QwenVLMedia, vision_part
from polymodal.recipe import Data


class SoundMedia(TokenMedia):
    """The part of a MediaProcessor that hears: `hear`, `heard` are the marks around a sound's placeholders
    `pad`. Raises PolymodalError."""

    hear, heard, pad = "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"
    longest = 0.0  # seconds taken at once; 0: what the checkpoint's feature extractor says

    def open_sound(self, audio: Any) -> None:
        """Read the feature extractor. audio: the audio tower's config."""
        self.extractor = self.load("AutoFeatureExtractor", "feature extractor")
        if self.extractor.feature_size != audio.num_mel_bins:
            raise PolymodalError(
                f"The feature extractor of {self.directory} makes {self.extractor.feature_size} bands, the "
                f"model takes {audio.num_mel_bins}.",
                "Take the preprocessor_config.json of this very model.",
            )
        self.sample_rate = self.extractor.sampling_rate
        self.window = self.frames_at_once(audio)
        self.sound_ids = {text: self.token_id(text) for text in (self.hear, self.pad, self.heard)}

    def frames_at_once(self, audio: Any) -> int:
        """Mel frames that attend to each other in the tower."""
        return audio.n_window_infer

    def sound_tokens(self, frames: int) -> int:
        """Features of so many mel frames."""
        return chunk_tokens(frames)

    def sound_frames(self, samples: int) -> int:
        """Mel frames of so many samples."""
        return samples // self.extractor.hop_length

    @property
    def sound_settings(self) -> dict[str, Any]:
        return {"audio": self.extractor.to_dict(), "window": self.window}

    def sound_part(self, shape: MediaShape) -> tuple[MediaPart, int]:
        """(a sound's part of the stream AUDIO, its tokens), from its number of samples."""
        seconds = shape.samples / self.sample_rate
        most = self.longest or self.extractor.n_samples / self.sample_rate
        if seconds > most:
            raise PolymodalError(
                f"the sound has {seconds:.1f} s, this model takes {most:g} s at once.",
                "Cut it: into rows with `start` and `end` in seconds, or a video into shorter ones.",
            )
        frames = self.sound_frames(shape.samples)
        tokens = self.sound_tokens(frames)
        if not tokens or shape.samples <= self.extractor.n_fft // 2:
            raise PolymodalError(f"the sound has {seconds:.3f} s, too little to be heard.", "Remove the row.")
        return MediaPart(AUDIO.name, (frames,), windows(frames, self.window)), tokens

    def around_sound(self, tokens: int) -> list[int]:
        hear, pad, heard = (self.sound_ids[text] for text in (self.hear, self.pad, self.heard))
        return [hear, *[pad] * tokens, heard]

    def mel(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Samples float32 [n] -> mel frames [F, bands], as the library's extractor makes them of this sound
        alone, and their number [1, 1]."""
        options = {"sampling_rate": self.sample_rate, "return_tensors": "pt", "padding": False}
        rows = self.extractor(samples, **options)["input_features"][0].T.float().contiguous()
        return rows, torch.tensor([[len(rows)]])


class QwenOmniMedia(SoundMedia, QwenVLMedia):
    """MediaProcessor of Qwen2.5-Omni. Pictures and videos as Qwen2.5-VL; frames of a video have the pixel
    limits of the library's processor, unless data.video has its own. Raises PolymodalError.

    directory: a checkpoint with its tokenizer and processor files; config: the thinker's.
    """

    streams = (VISION, AUDIO)
    start, end = "<|vision_bos|>", "<|vision_eos|>"
    hear, heard, pad = "<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"
    pads = {"image": "<|IMAGE|>", "video": "<|VIDEO|>"}
    processor, thinker = "Qwen2_5OmniProcessor", "Qwen2_5OmniThinkerForConditionalGeneration"
    """transformers' classes whose rules hold."""
    position_type = torch.int64

    def __init__(self, directory: str, config: Any, data: Data):
        self.reads = {kind: self.start + seen + self.end for kind, seen in self.pads.items()}
        self.reads |= {"audio": self.hear + self.pad + self.heard}
        super().__init__(directory, config, "", data)
        self.open_sound(config.audio_config)

    def frames_at_once(self, audio: Any) -> int:
        return 2 * audio.n_window

    def sound_tokens(self, frames: int) -> int:
        return pair_tokens(frames)

    def sound_frames(self, samples: int) -> int:
        return -(-samples // self.extractor.hop_length)

    @quiet()  # the library warns of a published config.json: of the talker's ids beyond its own vocabulary
    def load(self, auto: str, what: str, **options: Any) -> Any:
        return super().load(auto, what, **options)

    def pixel_limits(self, kind: str, frames: int = 1) -> tuple[int, int]:
        low, high = self.limits[kind]
        size = self.video_size() if kind == "video" else self.processors[kind].size
        return low or size["shortest_edge"], high or size["longest_edge"]

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **self.sound_settings}

    def span(self, shape: MediaShape) -> Span:
        """Tokens, patches and mel frames of a medium from its size alone."""
        if shape.kind == "image" or not shape.samples:
            return super().span(shape)
        part, tokens = self.sound_part(shape)
        if shape.kind == "audio":
            return Span(self.around_sound(tokens), (part,), shape)
        grid = self.grid("video", shape.height, shape.width, shape.frames)
        seen = self._interleaved(grid, shape.step, tokens)
        return Span([self.ids[self.start], *seen, self.ids[self.end]], (vision_part(grid), part), shape)

    def pace(self) -> dict[str, float]:
        """Arguments of the library's rule for frames and sound."""
        names = ("seconds_per_chunk", "position_id_per_seconds")
        return {name: getattr(self.config, name) for name in names if hasattr(self.config, name)}

    def _interleaved(self, grid: tuple[int, int, int], step: float, heard: int) -> list[int]:
        """Tokens of frames and sound between the marks of the sound, by the library's rule; step: seconds
        between temporal patches."""
        library = self.library(self.processor)
        names = dict(zip(("audio_bos", "video", "audio", "audio_eos"), "(va)", strict=True))
        tokens = {f"{name}_token": character for name, character in names.items()}
        holder: Any = SimpleNamespace(video_processor=self.processors["video"], **tokens)
        holder.get_chunked_index = partial(library.get_chunked_index, holder)
        seen = {"video_grid_thw": torch.tensor([grid]), "video_second_per_grid": [step]}
        text = library.replace_video_with_audio_token(
            holder, seen, 0, {"num_audio_tokens": [heard]}, 0, **self.pace()
        )
        marks = self.sound_ids
        ids = (marks[self.hear], self.ids[self.pads["video"]], marks[self.pad], marks[self.heard])
        of = dict(zip("(va)", ids, strict=True))
        return [of[character] for character in text]

    @staticmethod
    def library(name: str) -> Any:
        import transformers

        return getattr(transformers, name)

    @classmethod
    def video_size(cls) -> Mapping[str, int]:
        """The library's pixel limits of a frame of a video, which no file of a checkpoint has."""
        return cls.library(cls.processor).videos_kwargs["size"]

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image, frames uint8 [F, H, W, 3], samples float32 [n], or (frames, samples) -> patches and
        grid, mel frames [F, bands] and their number [1, 1]."""
        if shape.kind == "image" or not shape.samples:
            return super().features(shape, decoded)
        if shape.kind == "audio":
            return {AUDIO.name: self.mel(decoded)}
        frames, samples = decoded
        return {**super().features(shape, frames), AUDIO.name: self.mel(samples)}

    def mel(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Frames are as those of the sound with silence up to the extractor's whole length: so much of it
        as a window of the transform sees."""
        extractor, count = self.extractor, len(samples)
        silence = min(2 * extractor.n_fft, extractor.n_samples - count)
        rows = super().mel(np.pad(samples, (0, silence)))[0][: self.sound_frames(count)].contiguous()
        return rows, torch.tensor([[len(rows)]])

    def position_ids(self, input_ids: Tensor, spans: Any) -> Tensor:
        """Positions [4, T] of one sample, `position_type`: tokens from 0, time, height, width. Sound counts
        as text, but in a video its time is that of the frames."""
        own = torch.arange(input_ids.shape[0], dtype=self.position_type)
        grids = {kind: [s.parts[0].size for s in spans if s.shape.kind == kind] for kind in self.pads}
        if not any(grids.values()):
            return own.expand(4, -1).clone()
        library = self.library(self.thinker)
        config = SimpleNamespace(
            **{f"{kind}_token_id": self.ids[pad] for kind, pad in self.pads.items()},
            audio_token_id=self.sound_ids[self.pad],
            vision_start_token_id=self.ids[self.start],
            audio_start_token_id=self.sound_ids[self.hear],
            audio_config=self.config.audio_config,
            **self.pace(),
        )
        merge = self.config.vision_config.spatial_merge_size
        holder: Any = SimpleNamespace(config=config, spatial_merge_size=merge)
        for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
            setattr(holder, name, partial(getattr(library, name), holder))
        heard = [p.size[0] for span in spans for p in span.parts if p.stream == AUDIO.name]
        videos = [span.shape for span in spans if span.shape.kind == "video"]
        positions, _ = library.get_rope_index(
            holder,
            input_ids[None],
            *(torch.tensor(grids[kind]) if grids[kind] else None for kind in self.pads),
            torch.ones_like(input_ids)[None],
            any(shape.samples for shape in videos),
            torch.tensor(heard),
            torch.tensor([shape.step for shape in videos]),
        )
        return torch.cat([own[None], positions[:, 0]])


class Qwen3OmniMedia(QwenOmniMedia):
    """Qwen3-Omni: frames and sound of a video by their times, which are fractions of a position."""

    start, end, pads = START, END, PADS
    hear, heard, pad = SoundMedia.hear, SoundMedia.heard, SoundMedia.pad
    processor, thinker = "Qwen3OmniMoeProcessor", "Qwen3OmniMoeThinkerForConditionalGeneration"
    position_type = torch.float32

    frames_at_once, sound_tokens = SoundMedia.frames_at_once, SoundMedia.sound_tokens
    sound_frames, mel = SoundMedia.sound_frames, SoundMedia.mel
