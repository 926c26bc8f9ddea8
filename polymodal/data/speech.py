"""Speech with its text -> the encoder's features and the decoder's tokens, for models that transcribe; and their lengths
without decoding a sample.

Part of the data room: sees its neighbour audio, core/padded.py and a family's SpeechMedia. A row is one sentence
or excerpt of at most what the encoder hears at once; longer audio is cut into rows with `start` and `end`.
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
from polymodal.core.sample import IGNORE, Batch, Media, MediaStream, Record, Sample, SampleLengths
from polymodal.data import audio
from polymodal.data.loader import Collator
from polymodal.data.media import label
from polymodal.recipe import Data

VERSION = 1  # of what tokens and labels mean here: part of the fingerprint
TIMES = re.compile(r"<\|(\d+\.\d+)\|>")
"""Times within a transcription, in seconds from the beginning of its audio: <|2.40|>."""
SLACK = (
    0.1  # seconds that audio may be longer than what is heard at once: files of 30 s are often a little more
)


class SpeechMedia(Protocol):
    """A family's knowledge of speech, handed to `data` so that it never imports `models`. Picklable."""

    tokenizer: Any  # a transformers fast tokenizer
    stream: MediaStream  # name and tensor of the encoder's input, [channels, frames] a sample
    shape: tuple[int, int]  # of that input
    positions: int  # of the encoder's output
    sample_rate: int  # in Hz
    seconds: float  # that the encoder hears at once
    max_tokens: int  # of the decoder's input
    end: int  # id of the token that ends a transcription
    settings: dict[str, Any]  # all that lengths or features depend on

    def prompt(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        """Tokens that a transcription begins with; the first is the decoder's start, which is given and not learned.

        Raises PolymodalError for a language or a task that the model does not know, and without a language where it
        needs one."""

    def text(self, text: str, language: str | None) -> str:
        """A stretch of transcription as the model writes it (with the space before it, where there is one)."""

    def time(self, seconds: float) -> int:
        """Id of the token of a time."""

    def features(self, samples: np.ndarray, augment: int | None = None) -> Tensor:
        """Samples [n] in -1..1 -> the encoder's input. augment: seed of what is masked for training, None: nothing."""


class SpeechProcessor:
    """Turns records of speech into samples for one model. Picklable; used like data/chat.py's ChatProcessor.

    Input tokens are the prompt and the text, labels the same one place on with the end: all but the decoder's start
    token is learned, also the language, so that the model goes on telling it. augment: mask features, by a seed that
    depends on the sample and the epoch.
    """

    def __init__(self, media: SpeechMedia, data: Data, augment: bool = False):
        self.media, self.augment = media, augment
        self.speech = data.speech
        self.streams = (media.stream,)
        self.backend = media.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # of a text that happens to hold one, its letters

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids and lengths."""
        state = [VERSION, self.speech.model_dump(), self.media.settings, self.media.max_tokens]
        digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
        digest.update(self.backend.to_str().encode())
        return digest.hexdigest()

    # -- text -----------------------------------------------------------------------------------------------------

    def tokens(self, record: Record) -> list[int]:
        """Prompt, transcription, end. Raises PolymodalError."""
        language = record.extra.get("language") or self.speech.language
        task = record.extra.get("task") or self.speech.task
        text = "".join(
            part
            for message in record.messages
            if message.role == "assistant"
            for part in message.content
            if isinstance(part, str)
        )
        parts = TIMES.split(text)
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

    # -- sound ----------------------------------------------------------------------------------------------------

    def _medium(self, record: Record) -> Media:
        heard = [medium for medium in record.media if medium.kind == "audio"]
        if len(heard) != 1 or len(record.media) != 1:
            raise PolymodalError(
                f"the row holds {len(heard) or 'no'} audio and {len(record.media) - len(heard)} other media, "
                "this model transcribes one audio a row.",
                'Write rows {"audio": "a.wav", "text": "..."}.',
            )
        return heard[0]

    def _excerpt(self, record: Record) -> tuple[Any, audio.AudioHeader, float, float | None]:
        """(source, header, start, stop) in seconds, from the header. Raises PolymodalError for what is too long."""
        medium = self._medium(record)
        header = audio.audio_header(medium.source)  # type: ignore[arg-type]
        start, stop = record.extra.get("start", 0.0), record.extra.get("end")
        seconds = (header.seconds if stop is None else min(stop, header.seconds)) - start
        if seconds > self.media.seconds + SLACK:
            raise PolymodalError(
                f"the audio {label(medium.source)} has {seconds:.1f} s, "
                f"this model hears {self.media.seconds:g} s at once.",
                "Cut it into rows with `start` and `end` in seconds, each with its own text.",
            )
        return medium.source, header, start, stop

    # -- the services that index and loader use -------------------------------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """Lengths of records from texts and headers; a string says why a record is not usable."""
        out: list[SampleLengths | str] = []
        for record in records:
            try:
                out.append(self._lengths(record, self.tokens(record)))
            except PolymodalError as error:
                out.append(str(error))
        return out

    def _lengths(self, record: Record, ids: list[int]) -> SampleLengths:
        self._excerpt(record)
        if len(ids) - 1 > self.media.max_tokens:
            raise PolymodalError(
                f"its text has {len(ids) - 1} tokens, this model's decoder takes {self.media.max_tokens}.",
                "Cut the row in two with `start` and `end`.",
            )
        return SampleLengths(len(ids) - 1, len(ids) - 1, {self.media.stream.name: (self.media.positions,)})

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        """The tensors of a record; pixels: with the features, or the text alone. Raises PolymodalError with its place."""
        try:
            ids = self.tokens(record)
            measure = self._lengths(record, ids)
            tokens = torch.tensor(ids)
            tensors = {"input_ids": tokens[:-1], "labels": tokens[1:], "weights": torch.ones(len(ids) - 1)}
            weight = next((m.weight for m in reversed(record.messages) if m.role == "assistant"), None)
            if weight is not None:
                tensors["weights"] = tensors["weights"] * weight
                tensors["labels"] = torch.where(tensors["weights"] > 0, tensors["labels"], IGNORE)
            if pixels:
                source, header, start, stop = self._excerpt(record)
                heard = audio.decode_audio(source, header, self.media.sample_rate, start, stop)
                seed = record.extra.get("seed", 0) if self.augment else None
                tensors[self.media.stream.tensor] = self.media.features(heard, seed)
        except PolymodalError as error:
            raise PolymodalError(f"{record.where}: {error.message}", error.hint) from None
        return Sample(id, tensors, measure, record.where, None, "audio", self.streams)

    def pieces(self, record: Record) -> list[Record]:
        """A sentence is not cut."""
        return [record]


class SpeechCollator(Collator):
    """Task -> padded Batch. Picklable; it is all that a worker process knows."""

    def __init__(self, corpus: Any, speech: SpeechProcessor, data: Data, seed: int, features: bool = True):
        super().__init__(corpus, speech, data, seed, 1, features)

    def padding(self, planned: int, id: int, reason: str | None) -> Sample:
        media = self.chat.media
        return padded.hole(media.stream, media.shape if self.pixels else None, id, reason)

    def join(self, samples: Sequence[Sample]) -> Batch:
        return padded.pad(samples)

    def bytes(self, index: Any, task: Any) -> int:
        longest = max(s[3] for s in task.samples)
        channels, frames = self.chat.media.shape
        return len(task.samples) * (longest * 20 + channels * frames * 4 * self.pixels)

    def learn(self, index: Any, task: Any, batch: Batch) -> None:
        """Sizes are known before."""
