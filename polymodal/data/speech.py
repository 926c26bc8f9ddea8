"""Speech with its text -> the encoder's features and the decoder's tokens, for models that transcribe.

A record is one sentence or excerpt of at most what the encoder takes at once; longer audio is cut into rows
with `start` and `end`. What a model knows of speech comes from its family, as a SpeechMedia.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polymodal.core import padded
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import (
    IGNORE,
    Batch,
    Media,
    MediaShape,
    MediaStream,
    Record,
    Sample,
    SampleLengths,
    Span,
)
from polymodal.data import audio
from polymodal.data.loader import Collator
from polymodal.data.media import label
from polymodal.recipe import Data

VERSION = 1  # of what tokens and labels mean here: part of the fingerprint
TIMES = re.compile(r"<\|(\d+\.\d+)\|>")
"""Times within a transcription, in seconds from the beginning of its audio: <|2.40|>."""
SLACK = 0.1  # seconds that audio may be longer than the encoder's: files of 30 s are often a little more


class SpeechMedia(Protocol):
    """A family's knowledge of speech, handed to `data` so that it never imports `models`. Picklable."""

    tokenizer: Any  # a transformers fast tokenizer
    stream: MediaStream  # name and tensor of the encoder's input, [channels, frames] a sample
    shape: tuple[int, int]  # of that input
    positions: int  # of the encoder's output
    sample_rate: int  # in Hz
    seconds: float  # that the encoder takes at once
    max_tokens: int  # of the decoder's input
    end: int  # id of the token that ends a transcription
    settings: dict[str, Any]  # all that lengths or features depend on

    def prompt(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """Tokens that a transcription begins with; the first is the decoder's start, which is not learned.

        Raises PolymodalError for a language or a task that the model does not know, and without a language
        where it needs one."""

    def text(self, text: str, language: str | None) -> str:
        """A stretch of transcription as the model writes it, with the space before it where there is one."""

    def time(self, seconds: float) -> int:
        """Id of the token of a time."""

    def features(self, samples: np.ndarray, augment: int | None = None) -> Tensor:
        """Samples [n] in -1..1 -> the encoder's input. augment: seed of what is masked; None: nothing is."""


def recording(record: Record) -> tuple[Media, str]:
    """(audio, transcription) of a record. Raises PolymodalError where it holds anything but one audio."""
    if [medium.kind for medium in record.media] != ["audio"]:
        kinds = ", ".join(medium.kind for medium in record.media) or "no media"
        raise PolymodalError(
            f"the row holds {kinds}, but one audio a row is transcribed.",
            'Write rows {"audio": "a.wav", "text": "..."}.',
        )
    parts = [part for message in record.messages if message.role == "assistant" for part in message.content]
    return record.media[0], "".join(part for part in parts if isinstance(part, str))


class SpeechProcessor:
    """Turns records of speech into samples for one model. Picklable; used like data/chat.py's ChatProcessor.

    Input tokens are the prompt and the text; labels are the same, shifted by one, and the end. All but the
    decoder's start token is learned, the language too, so that the model still detects it. augment: mask
    features, by a seed that depends on the sample and the epoch.
    """

    def __init__(self, media: SpeechMedia, data: Data, augment: bool = False):
        self.media, self.augment = media, augment
        self.speech = data.speech
        self.max_length = min(data.max_length, media.max_tokens)
        self.streams = (media.stream,)
        self.backend = media.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # a special token that a text happens to hold is spelt out

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids and lengths."""
        state = [VERSION, self.speech.model_dump(), self.media.settings, self.media.max_tokens]
        digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
        digest.update(self.backend.to_str().encode())
        return digest.hexdigest()

    def tokens(self, record: Record) -> list[int]:
        """Prompt, transcription, end. Raises PolymodalError."""
        language = record.extra.get("language") or self.speech.language
        task = record.extra.get("task") or self.speech.task
        parts = TIMES.split(recording(record)[1])
        times = [float(value) for value in parts[1::2]]
        if times != sorted(times) or any(value > self.media.seconds for value in times):
            raise PolymodalError(
                f"the times in its text are not in order, or beyond {self.media.seconds:g} s.",
                "Write <|start|> text <|end|> in seconds from the beginning of the row's audio.",
            )
        ids = self.media.prompt(language, task, bool(times))
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self.media.time(float(part)))
            elif part.strip():
                spelt = self.media.text(part.strip(), language if task == "transcribe" else "en")
                ids += self.backend.encode(spelt, add_special_tokens=False).ids
        return [*ids, self.media.end]

    def span(self, medium: Media, record: Record) -> Span:
        """A recording has no tokens in the decoder's sequence."""
        return Span((), (), MediaShape("audio"))

    # -- the services that index and loader use --------------------------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """Lengths of records from texts and headers; a string says why a record is not usable."""
        out: list[SampleLengths | str] = []
        for record in records:
            try:
                out.append(self._measured(record, self.tokens(record))[0])
            except PolymodalError as error:
                out.append(str(error))
        return out

    def _measured(self, record: Record, ids: list[int]) -> tuple[SampleLengths, audio.AudioHeader]:
        """Raises PolymodalError for what is longer than the encoder or the decoder takes."""
        medium, _ = recording(record)
        header = audio.audio_header(medium.source)  # type: ignore[arg-type]
        seconds = header.excerpt(medium.source, *_excerpt(record))  # type: ignore[arg-type]
        if seconds > self.media.seconds + SLACK:
            raise PolymodalError(
                f"the audio {label(medium.source)} has {seconds:.1f} s, "
                f"this model takes {self.media.seconds:g} s at once.",
                "Cut it into rows with `start` and `end` in seconds, each with its own text.",
            )
        tokens = len(ids) - 1
        if tokens > self.media.max_tokens:
            raise PolymodalError(
                f"its text has {tokens} tokens, this model's decoder takes {self.media.max_tokens}.",
                "Cut the row in two with `start` and `end`.",
            )
        return SampleLengths(tokens, tokens, {self.media.stream.name: (self.media.positions,)}), header

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        """The tensors of a record; pixels: with the features. Raises PolymodalError with its place."""
        try:
            ids = self.tokens(record)
            measure, header = self._measured(record, ids)
            tokens = torch.tensor(ids)
            tensors = {"input_ids": tokens[:-1], "labels": tokens[1:], "weights": torch.ones(len(ids) - 1)}
            weight = next((m.weight for m in reversed(record.messages) if m.role == "assistant"), None)
            if weight is not None:
                tensors["weights"] = tensors["weights"] * weight
                tensors["labels"] = torch.where(tensors["weights"] > 0, tensors["labels"], IGNORE)
            if pixels:
                source: Any = record.media[0].source
                heard = audio.decode_audio(source, header, self.media.sample_rate, *_excerpt(record))
                seed = record.extra.get("seed", 0) if self.augment else None
                tensors[self.media.stream.tensor] = self.media.features(heard, seed)
        except PolymodalError as error:
            raise PolymodalError(f"{record.where}: {error.message}", error.hint) from None
        return Sample(id, tensors, measure, record.where, None, "audio", self.streams)

    def pieces(self, record: Record) -> list[Record]:
        """A transcription is not cut."""
        return [record]


def _excerpt(record: Record) -> tuple[float, float | None]:
    """Its start and stop in seconds."""
    return record.extra.get("start", 0.0), record.extra.get("end")


class SpeechCollator(Collator):
    """Task -> padded Batch. Picklable; it is all that a worker process knows."""

    def __init__(self, corpus: Any, processor: SpeechProcessor, data: Data, seed: int, features: bool = True):
        super().__init__(corpus, processor, data, seed, 1, features)

    def padding(self, planned: int, id: int, reason: str | None) -> Sample:
        media = self.chat.media
        return padded.padding_sample(media.stream, media.shape if self.pixels else None, id, reason)

    def join(self, samples: Sequence[Sample]) -> Batch:
        return padded.pad(samples)

    def bytes(self, index: Any, task: Any) -> int:
        longest = max(s[3] for s in task.samples)
        channels, frames = self.chat.media.shape
        return len(task.samples) * (longest * 20 + channels * frames * 4 * self.pixels)

    def learn(self, index: Any, task: Any, batch: Batch) -> None:
        """Sizes are known before."""
