"""A text, a voice and the codes of its speech -> the two channels that a model which speaks learns from.

Codes are a codec's tokens, made of recordings once (`polymodal data codes`) or given in the rows. What a
model knows of them comes from its family, as a VoiceMedia.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import (
    IGNORE,
    Media,
    MediaShape,
    MediaStream,
    Record,
    Sample,
    SampleLengths,
    Span,
)
from polymodal.data import audio
from polymodal.data.formats import CODES, REFERENCE
from polymodal.data.media import label
from polymodal.recipe import Data

VERSION = 1  # of what tokens and labels mean here: part of the fingerprint
REFERENCE_SECONDS = (0.5, 60.0)
"""Least and most seconds of the recording of a voice."""
MAKE = "Make them with `polymodal data codes ROWS OUT --model CHECKPOINT`, and train on OUT."


class VoiceMedia(Protocol):
    """A family's knowledge of speech that it makes, handed to `data` so that it never imports `models`.
    Picklable."""

    tokenizer: Any  # a transformers fast tokenizer
    stream: MediaStream  # of the voice: [frames, bands] of each recording
    sample_rate: int  # in Hz
    groups: int  # codes of a frame
    entries: int  # of each codebook
    end: int  # id of the codec that ends the frames
    settings: dict[str, Any]  # all that ids, lengths or features depend on

    def row(
        self, text: str, codes: Tensor, speaker: str | None, reference: bool, language: str | None
    ) -> tuple[Tensor, Tensor]:
        """Text ids [T] and codes [T, K] of a sample; codes [n, K]; reference: whether the voice is a
        recording. Raises PolymodalError."""

    def frames(self, samples: int) -> int:
        """Of the voice's features, of so many samples."""

    def features(self, samples: np.ndarray) -> Tensor:
        """Samples [n] of a voice in -1..1 -> [frames, bands]."""


class SpeechCodesProcessor:
    """Turns records of speech into samples for one model. Picklable; used like data/chat.py's ChatProcessor.

    The label of each place is the codec's id at the next one, of frames and of the end.
    """

    def __init__(self, media: VoiceMedia, data: Data):
        self.media, self.speech, self.max_length = media, data.speech, data.max_length
        self.streams = (media.stream,)
        self.backend = media.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # a special token that a text happens to hold is spelt out

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids and lengths."""
        state = [VERSION, self.speech.model_dump(), self.media.settings]
        digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
        digest.update(self.backend.to_str().encode())
        return digest.hexdigest()

    def row(self, record: Record) -> tuple[Tensor, Tensor]:
        """Text ids [T] and codes [T, K] of a record. Raises PolymodalError."""
        text = written(record)
        speaker, language = record.extra.get("speaker"), record.extra.get("language")
        given = (text, self.codes(record), speaker, self.voice(record) is not None)
        return self.media.row(*given, language or self.speech.language)

    def voice(self, record: Record) -> Media | None:
        """The recording of the voice, where no speaker is named."""
        return None if record.extra.get("speaker") else record.extra.get(REFERENCE)

    def codes(self, record: Record) -> Tensor:
        """Codes [n, K] of a record. Raises PolymodalError."""
        groups, entries = self.media.groups, self.media.entries
        value = record.extra.get(CODES)
        if value is None:
            raise PolymodalError(f"the row has no `{CODES}`, the codes of its audio.", MAKE)
        try:
            made = np.asarray([list(frame) for frame in value])
        except (TypeError, ValueError):
            made = np.zeros(0)
        if made.ndim != 2 or made.shape[1] < groups or made.dtype.kind not in "iu" or not len(made):
            raise PolymodalError(
                f"`{CODES}` is no list of frames of {groups} whole numbers each.",
                f"Write [[c0, ..., c{groups - 1}], ...], a list a frame. {MAKE}",
            )
        made = made[:, :groups]
        if made.min() < 0 or made.max() >= entries:
            wrong = int(made.min() if made.min() < 0 else made.max())
            raise PolymodalError(
                f"`{CODES}` holds {wrong}, this model's codebooks have the entries 0 to {entries - 1}.", MAKE
            )
        return torch.from_numpy(made.astype(np.int64))

    def span(self, medium: Media, record: Record) -> Span:
        """A recording has no tokens of its own."""
        return Span((), (), MediaShape("audio"))

    # -- the services that index and loader use --------------------------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """Lengths of records; a string says why a record is not usable."""
        out: list[SampleLengths | str] = []
        for record in records:
            try:
                ids, codes = self.row(record)
                out.append(self._lengths(ids, codes, self._header(record)))
            except PolymodalError as error:
                out.append(str(error))
        return out

    def _lengths(self, ids: Tensor, codes: Tensor, voice: audio.AudioHeader | None) -> SampleLengths:
        trained = int((codes[:, 1] >= 0).sum()) + 1
        heard: dict[str, tuple[int, ...]] = {}
        if voice is not None:
            length = self.media.frames(voice.samples(self.media.sample_rate))
            heard = {self.media.stream.name: (length,)}
        return SampleLengths(len(ids), trained, heard)

    def _header(self, record: Record) -> audio.AudioHeader | None:
        """Of the recording of the voice. Raises PolymodalError for one that is too short or too long."""
        medium = self.voice(record)
        if medium is None:
            return None
        header = audio.audio_header(medium.source)  # type: ignore[arg-type]
        least, most = REFERENCE_SECONDS
        if not least <= header.seconds <= most:
            raise PolymodalError(
                f"the voice {label(medium.source)} (`{REFERENCE}`) has {header.seconds:.2f} s, "
                f"{least:g} to {most:g} s are heard.",
                "Take a recording of 3 to 10 s of one speaker.",
            )
        return header

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        """The tensors of a record; pixels: with the voice. Raises PolymodalError with its place."""
        try:
            ids, codes = self.row(record)
            header = self._header(record)
            labels = torch.where(codes[:, 1] >= 0, codes[:, 0], IGNORE)
            labels[-1] = self.media.end
            labels = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
            weight = next((m.weight for m in reversed(record.messages) if m.role == "assistant"), None)
            weights = (labels != IGNORE).float() * (1.0 if weight is None else weight)
            tensors = {
                "input_ids": ids,
                "labels": torch.where(weights > 0, labels, IGNORE),
                "weights": weights,
                "position_ids": torch.arange(len(ids))[None],
                "codes": codes,
            }
            medium, stream = self.voice(record), self.media.stream
            if pixels and medium is not None and header is not None:
                source: Any = medium.source
                heard = audio.decode_audio(source, header, self.media.sample_rate)
                tensors[stream.tensor] = self.media.features(heard)
                tensors[stream.sizes] = torch.tensor([[len(tensors[stream.tensor])]])
        except PolymodalError as error:
            raise PolymodalError(f"{record.where}: {error.message}", error.hint) from None
        measure = self._lengths(ids, codes, header)
        return Sample(id, tensors, measure, record.where, None, "audio", self.streams)

    def pieces(self, record: Record) -> list[Record]:
        """Speech is not cut."""
        return [record]


def written(record: Record) -> str:
    """The text of a record. Raises PolymodalError where there is none."""
    parts = [part for message in record.messages if message.role == "assistant" for part in message.content]
    text = "".join(part for part in parts if isinstance(part, str)).strip()
    if not text:
        raise PolymodalError(
            "the row has no text that is spoken.", 'Write rows {"audio": "a.wav", "text": "..."}.'
        )
    return text
