"""What Qwen2.5-Omni makes of pictures, videos and sound: token spans, patches, mel frames, positions.

The sound of a video and its frames are one span, in turns of two seconds; turns and positions are the
library's own rules.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.models.pipelines import quiet
from polymodal.models.understanding.qwen_vl_media import VISION, QwenVLMedia, vision_part
from polymodal.recipe import Data

AUDIO = MediaStream("audio", "input_features", "audio_frames", ("frame", "none"))
"""Mel frames [F, bands] float32, 10 ms each, and the number of frames of each sound [M, 1]."""
LOOK, SEEN, HEAR, HEARD = "<|vision_bos|>", "<|vision_eos|>", "<|audio_bos|>", "<|audio_eos|>"


def audio_tokens(frames: int) -> int:
    """Features of so many mel frames: halved by the second convolution, and by the mean of pairs."""
    return (frames + 1) // 2 // 2


def windows(frames: int, window: int) -> tuple[int, ...]:
    """Lengths of the parts of a sound that the audio tower computes independently."""
    return (window,) * (frames // window) + ((frames % window,) if frames % window else ())


class QwenOmniMedia(QwenVLMedia):
    """MediaProcessor of Qwen2.5-Omni. Pictures and videos as Qwen2.5-VL; frames of a video have the pixel
    limits of the library's processor, unless data.video has its own. Raises PolymodalError.

    directory: a checkpoint with its tokenizer and processor files; config: the thinker's.
    """

    streams = (VISION, AUDIO)
    start, end, pad = LOOK, SEEN, "<|AUDIO|>"
    pads = {"image": "<|IMAGE|>", "video": "<|VIDEO|>"}
    reads = {kind: LOOK + seen + SEEN for kind, seen in pads.items()} | {"audio": HEAR + pad + HEARD}

    def __init__(self, directory: str, config: Any, data: Data):
        super().__init__(directory, config, "", data)
        self.extractor = self.load("AutoFeatureExtractor", "feature extractor")
        bands = config.audio_config.num_mel_bins
        if self.extractor.feature_size != bands:
            raise PolymodalError(
                f"The feature extractor of {directory} makes {self.extractor.feature_size} bands, the model "
                f"takes {bands}.",
                "Take the preprocessor_config.json of this very model.",
            )
        self.sample_rate = self.extractor.sampling_rate
        self.window = 2 * config.audio_config.n_window
        self.ids |= {text: self.token_id(text) for text in (HEAR, self.pad, HEARD)}

    @quiet()  # the library warns of a published config.json: of the talker's ids beyond its own vocabulary
    def load(self, auto: str, what: str, **options: Any) -> Any:
        return super().load(auto, what, **options)

    def pixel_limits(self, kind: str, frames: int = 1) -> tuple[int, int]:
        low, high = self.limits[kind]
        size = video_size() if kind == "video" else self.processors[kind].size
        return low or size["shortest_edge"], high or size["longest_edge"]

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "audio": self.extractor.to_dict(), "window": self.window}

    def span(self, shape: MediaShape) -> Span:
        """Tokens, patches and mel frames of a medium from its size alone."""
        if shape.kind == "image" or not shape.samples:
            return super().span(shape)
        self._check_length(shape)
        frames = -(-shape.samples // self.extractor.hop_length)
        heard, pad = audio_tokens(frames), self.ids[self.pad]
        part = MediaPart(AUDIO.name, (frames,), windows(frames, self.window))
        if shape.kind == "audio":
            return Span([self.ids[HEAR], *[pad] * heard, self.ids[HEARD]], (part,), shape)
        grid = self.grid("video", shape.height, shape.width, shape.frames)
        seen = self._interleaved(grid, shape.step, heard)
        return Span([self.ids[self.start], *seen, self.ids[self.end]], (vision_part(grid), part), shape)

    def _check_length(self, shape: MediaShape) -> None:
        seconds, most = shape.samples / self.sample_rate, self.extractor.n_samples / self.sample_rate
        if shape.samples > self.extractor.n_samples:
            raise PolymodalError(
                f"the sound has {seconds:.1f} s, this model takes {most:g} s at once.",
                "Cut it: into rows with `start` and `end` in seconds, or a video into shorter ones.",
            )
        if not audio_tokens(-(-shape.samples // self.extractor.hop_length)):
            raise PolymodalError(f"the sound has {seconds:.3f} s, too little to be heard.", "Remove the row.")

    def _interleaved(self, grid: tuple[int, int, int], step: float, heard: int) -> list[int]:
        """Tokens of frames and sound between the marks of the sound, by the library's rule; step: seconds
        between temporal patches."""
        from transformers import Qwen2_5OmniProcessor as Library

        names = dict(zip(("audio_bos", "video", "audio", "audio_eos"), "(va)", strict=True))
        tokens = {f"{name}_token": character for name, character in names.items()}
        holder: Any = SimpleNamespace(video_processor=self.processors["video"], **tokens)
        holder.get_chunked_index = partial(Library.get_chunked_index, holder)
        seen = {"video_grid_thw": torch.tensor([grid]), "video_second_per_grid": [step]}
        pace = {"seconds_per_chunk": self.config.seconds_per_chunk}
        pace |= {"position_id_per_seconds": self.config.position_id_per_seconds}
        text = Library.replace_video_with_audio_token(
            holder, seen, 0, {"num_audio_tokens": [heard]}, 0, **pace
        )
        ids = dict(zip("(va)", (HEAR, self.pads["video"], self.pad, HEARD), strict=True))
        return [self.ids[ids[character]] for character in text]

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """PIL image, frames uint8 [F, H, W, 3], samples float32 [n], or (frames, samples) -> patches and
        grid, mel frames [F, bands] and their number [1, 1]."""
        if shape.kind == "image" or not shape.samples:
            return super().features(shape, decoded)
        if shape.kind == "audio":
            return {AUDIO.name: self._heard(decoded)}
        frames, samples = decoded
        return {**super().features(shape, frames), AUDIO.name: self._heard(samples)}

    def _heard(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Frames are as those of the sound with silence up to the extractor's whole length: so much of it
        as a window of the transform sees."""
        extractor, count = self.extractor, len(samples)
        silence = min(2 * extractor.n_fft, extractor.n_samples - count)
        options = {"sampling_rate": self.sample_rate, "return_tensors": "pt", "padding": False}
        made = extractor(np.pad(samples, (0, silence)), **options)["input_features"][0]
        rows = made.T[: -(-count // extractor.hop_length)].float().contiguous()
        return rows, torch.tensor([[len(rows)]])

    def position_ids(self, input_ids: Tensor, spans: Any) -> Tensor:
        """Positions [4, T] int64 of one sample: tokens from 0, time, height, width. Sound counts as text,
        but in a video its time is that of the frames."""
        own = torch.arange(input_ids.shape[0])
        grids = {kind: [s.parts[0].size for s in spans if s.shape.kind == kind] for kind in self.pads}
        if not any(grids.values()):
            return own.expand(4, -1).clone()
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Library

        config = SimpleNamespace(
            **{f"{kind}_token_id": self.ids[pad] for kind, pad in self.pads.items()},
            audio_token_id=self.ids[self.pad],
            vision_start_token_id=self.ids[self.start],
            audio_start_token_id=self.ids[HEAR],
            position_id_per_seconds=self.config.position_id_per_seconds,
            seconds_per_chunk=self.config.seconds_per_chunk,
        )
        merge = self.config.vision_config.spatial_merge_size
        holder: Any = SimpleNamespace(config=config, spatial_merge_size=merge)
        for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
            setattr(holder, name, partial(getattr(Library, name), holder))
        heard = [p.size[0] for span in spans for p in span.parts if p.stream == AUDIO.name]
        videos = [span.shape for span in spans if span.shape.kind == "video"]
        positions, _ = Library.get_rope_index(
            holder,
            input_ids[None],
            *(torch.tensor(grids[kind]) if grids[kind] else None for kind in self.pads),
            torch.ones_like(input_ids)[None],
            any(shape.samples for shape in videos),
            torch.tensor(heard),
            torch.tensor([shape.step for shape in videos]),
        )
        return torch.cat([own[None], positions[:, 0]])


def video_size() -> dict[str, int]:
    """The library's pixel limits of a frame of a video, which no file of a checkpoint has."""
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.videos_kwargs["size"]
