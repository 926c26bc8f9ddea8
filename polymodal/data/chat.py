"""Records -> token ids, label weights and media tensors; and their lengths without decoding a pixel.

Part of the data room: sees its neighbours template, counting and media, and a family's MediaProcessor. A record is
rendered by the checkpoint's own chat template with one placeholder a medium, made tokens once, and every placeholder
is then replaced by the medium's span. A span is never cut; whoever plans decides what becomes of long samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import (
    IGNORE,
    Media,
    MediaProcessor,
    MediaShape,
    Message,
    Record,
    Sample,
    SampleLengths,
    Span,
)
from polymodal.data import audio
from polymodal.data import media as files
from polymodal.data.counting import TokenCounter, tokens_before
from polymodal.data.template import Layout, Template
from polymodal.recipe import Data

VERSION = 1  # of what tokens and labels mean here: part of the fingerprint
_SPANS = 4096  # spans of picture sizes remembered
_BATCH = 512  # texts counted at a time


class ChatProcessor:
    """Turns records into samples for one model. Picklable.

    Labels: by data.train_on, on the words of assistant messages through their end-of-turn token; `all` is every token
    but media; a message's own weight overrules it. Plain text is trained whole and ends with the end-of-text token.
    Raises PolymodalError when data.chat_template cannot be read.
    """

    def __init__(self, media: MediaProcessor, data: Data):
        backend = getattr(media.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise PolymodalError(
                "The checkpoint's tokenizer has no tokenizer.json.",
                "Load it once with transformers and save it again: that writes one.",
            )
        backend.no_truncation()
        backend.no_padding()
        self.media = media
        self.video = data.video
        self.train_on = data.train_on
        self.max_length = data.max_length
        self.backend = backend
        self.template = Template(media, _read_template(data.chat_template), data.template_kwargs)
        self.counter = TokenCounter(backend)
        self.streams = media.streams
        self._begin = _automatic_begin(media.tokenizer)
        self._spans: OrderedDict[Any, Span] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spans": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids, labels and lengths: tokenizer, template, media and video settings.

        Media are asked for the spans of a few sizes, so that any setting that changes a length changes the hash.
        """
        spans: list[Any] = []
        halves = tuple(i / 2 for i in range(64))
        for shape in (
            MediaShape("image", 10, 10),
            MediaShape("image", 777, 333),
            MediaShape("image", 9000, 7000),
            MediaShape("video", 360, 640, 4, halves[:4], 1.0),
            MediaShape("video", 1080, 1920, 64, halves, 1.0),
            MediaShape("audio", samples=123_457),
        ):
            try:
                self.media.placeholder(shape.kind)
                span = self.media.span(shape)
                spans.append([list(span.ids), [(p.stream, p.size, p.lengths) for p in span.parts]])
            except PolymodalError as error:
                spans.append(error.message)
        state = [
            VERSION, self.template.text, self.template.kwargs, self.template.marks, self.train_on, self.media.frame_multiple, spans,
            self.video.model_dump(), getattr(self.media, "settings", None), str(self.media.tokenizer.eos_token), self._begin,
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
        digest.update(self.backend.to_str().encode())
        return digest.hexdigest()

    # -- text ---------------------------------------------------------------------------------------------------

    def _layout(self, record: Record, text: str | None = None) -> Layout:
        if not record.plain:
            return self.template.layout(record, self._wanted(record), text)
        eos = self.media.tokenizer.eos_token
        if eos is None:
            raise PolymodalError(
                "the tokenizer has no end-of-text token to end plain text with.",
                "Set eos_token in the checkpoint's tokenizer_config.json.",
            )
        text = self._begin + "".join(
            p if isinstance(p, str) else self.template.marks.get(p.kind) or self.media.placeholder(p.kind)
            for p in record.messages[0].content
        )
        text += "" if record.extra.get("_goes_on") else eos
        return Layout(text, ((len(self._begin), len(text)),), self.template.places(text, record.media))

    def _wanted(self, record: Record) -> list[int]:
        """Messages whose place in the text must be known: those that train, and all that bring a weight."""
        answers = [i for i, m in enumerate(record.messages) if m.role == "assistant" and m.weight is None]
        answers = [] if self.train_on == "all" else answers[-1:] if self.train_on == "last" else answers
        if (
            self.train_on == "last"
            and answers
            and any(m.role == "assistant" for m in record.messages[answers[-1] + 1 :])
        ):
            answers = []  # the last answer has a weight of its own
        own = [
            i
            for i, m in enumerate(record.messages)
            if m.weight is not None and (m.weight > 0 or self.train_on == "all")
        ]
        return sorted({*answers, *own})

    def _regions(self, record: Record, layout: Layout) -> list[tuple[int, int, float]]:
        """Trained ranges of characters with their weights, ascending and apart. Media inside are still to be left out."""
        wanted = [0] if record.plain else self._wanted(record)
        spans = []
        for i in wanted:
            span, weight = layout.spans[i], record.messages[i].weight
            assert span is not None
            spans.append((*span, 1.0 if weight is None else weight))
        spans.sort()
        if self.train_on == "all" and not record.plain:
            whole, at = [], 0
            for start, stop, weight in spans:
                whole += [(at, start, 1.0), (start, stop, weight)]
                at = stop
            spans = [*whole, (at, len(layout.text), 1.0)]
        return [(a, b, w) for a, b, w in spans if b > a and w > 0]

    # -- media --------------------------------------------------------------------------------------------------

    def _opened(self, medium: Media) -> tuple[Span, Callable[[], Any]]:
        """Tokens of a medium from its header, and what decodes it."""
        self.media.placeholder(medium.kind)  # or the model does not read this kind
        decode: Callable[[], Any]
        if medium.kind == "video":
            header = files.video_header(medium.source, self.video.fps)
            clip = files.clip(header, self.video, self.media.frame_multiple)
            step = self.media.frame_multiple / clip.fps
            frames = len(clip.indices)
            shape = MediaShape("video", header.height, header.width, frames, clip.seconds, step)
            decode = partial(files.video, medium.source, header, clip.indices)
        elif medium.kind == "image":
            assert not isinstance(medium.source, tuple)
            shape = MediaShape("image", *files.image_size(medium.source))
            decode = partial(files.image, medium.source)
        else:
            assert not isinstance(medium.source, tuple)
            heard, rate = audio.audio_header(medium.source), self.media.sample_rate
            shape = MediaShape("audio", samples=heard.samples(rate))
            decode = partial(audio.decode_audio, medium.source, heard, rate)
        return self._span(shape, medium), decode

    def _span(self, shape: MediaShape, medium: Media) -> Span:
        span = self._spans.get(shape)
        if span is None:
            try:
                span = self.media.span(shape)
            except (ValueError, ZeroDivisionError) as error:
                raise PolymodalError(
                    f"the {medium.kind} {files.label(medium.source)} cannot be used: {error}.",
                    "Remove it, or mend its size.",
                ) from None
            except PolymodalError as error:
                raise PolymodalError(f"{files.label(medium.source)}: {error.message}", error.hint) from None
            if len(self._spans) >= _SPANS:
                self._spans.popitem(last=False)
            self._spans[shape] = span
        return span

    def span(self, medium: Media) -> Span:
        """What a medium becomes, from its header. Raises PolymodalError."""
        return self._opened(medium)[0]

    def _lengths(self, spans: Sequence[Span]) -> dict[str, tuple[int, ...]]:
        parts = [part for span in spans for part in span.parts]
        return {
            stream.name: tuple(n for part in parts if part.stream == stream.name for n in part.lengths)
            for stream in self.streams
            if any(part.stream == stream.name for part in parts)
        }

    # -- the four services --------------------------------------------------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """Lengths of records from texts and media headers; a string says why a record is not usable.

        Equal to `sample(record).measure`, without pixels.
        """
        out: list[SampleLengths | str] = [""] * len(records)
        for first in range(0, len(records), _BATCH):
            jobs: list[tuple[int, Layout, list[tuple[int, int, float]], list[Span], list[int]]] = []
            texts = self.template.texts(records[first : first + _BATCH])
            for n, text in enumerate(texts, first):
                record = records[n]
                try:
                    layout = self._layout(record, text)
                    media = record.media if layout.media else ()
                    spans = [self._opened(media[k])[0] for _, _, k in layout.media]
                    regions = self._regions(record, layout)
                except PolymodalError as error:
                    out[n] = str(error)
                    continue
                cuts = sorted({c for a, b, _ in (*regions, *layout.media) for c in (a, b)})
                jobs.append((n, layout, regions, spans, cuts))
            counts = self.counter.count([j[1].text for j in jobs], [j[4] for j in jobs])
            for (n, layout, regions, spans, cuts), numbers in zip(jobs, counts, strict=True):
                before = dict(zip(cuts, numbers, strict=False))
                tokens = numbers[-1]
                trained = sum(before[b] - before[a] for a, b, _ in regions) - any(
                    before[a] == 0 < before[b] for a, b, _ in regions
                )
                for (start, stop, _), span in zip(layout.media, spans, strict=True):
                    places = before[stop] - before[start]
                    tokens += len(span.ids) - places
                    if any(a <= start < b for a, b, _ in regions):
                        trained -= places - (before[start] == 0)
                out[n] = SampleLengths(tokens, trained, self._lengths(spans))
        return out

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        """The tensors of a record; pixels: decoded, or only their sizes from the media's headers.

        Raises PolymodalError with the record's place.
        """
        try:
            layout = self._layout(record)
            return self._sample(record, id, layout, self._regions(record, layout), pixels)
        except PolymodalError as error:
            raise PolymodalError(f"{record.where}: {error.message}", error.hint) from None

    def prompt(self, record: Record, id: int = -1) -> Sample:
        """A record up to where the model answers, without labels; a last assistant message is left out."""
        try:
            layout = (
                self._layout(replace(record, extra={**record.extra, "_goes_on": True}))
                if record.plain
                else self.template.prompt(record)
            )
            return self._sample(record, id, layout, [])
        except PolymodalError as error:
            raise PolymodalError(f"{record.where}: {error.message}", error.hint) from None

    def _sample(
        self,
        record: Record,
        id: int,
        layout: Layout,
        regions: list[tuple[int, int, float]],
        decode: bool = True,
    ) -> Sample:
        encoding = self.backend.encode(layout.text, add_special_tokens=False)
        ids = np.asarray(encoding.ids, np.int64)
        weights = np.zeros(len(ids), np.float32)
        length = len(layout.text)
        for start, stop, weight in regions:
            weights[tokens_before(encoding, start, length) : tokens_before(encoding, stop, length)] = weight
        pieces, kept, at = [], [], 0
        features: dict[str, list[torch.Tensor]] = {}
        spans: list[Span] = []
        media = record.media
        for start, stop, number in layout.media:
            a, b = tokens_before(encoding, start, length), tokens_before(encoding, stop, length)
            span, open_medium = self._opened(media[number])
            pieces += [ids[at:a], np.asarray(span.ids, np.int64)]
            kept += [weights[at:a], np.zeros(len(span.ids), np.float32)]
            at = b
            if decode:
                for stream, rows in self._features(media[number], span, open_medium).items():
                    features.setdefault(stream, []).append(rows)
            spans.append(span)
        tokens = torch.from_numpy(np.concatenate([*pieces, ids[at:]]))
        loss = torch.from_numpy(np.concatenate([*kept, weights[at:]]))
        labels = torch.full_like(tokens, IGNORE)
        shifted = torch.zeros_like(loss)
        labels[:-1] = torch.where(loss[1:] > 0, tokens[1:], IGNORE)
        shifted[:-1] = loss[1:]
        tensors = {
            "input_ids": tokens,
            "labels": labels,
            "weights": shifted,
            "position_ids": self.media.position_ids(tokens, spans),
        }
        for stream in self.streams:
            sizes = [part.size for span in spans for part in span.parts if part.stream == stream.name]
            if sizes:
                tensors[stream.sizes] = torch.tensor(sizes)
            if stream.name in features:
                tensors[stream.tensor] = torch.cat(features[stream.name])
        measure = SampleLengths(len(tokens), int((labels != IGNORE).sum()), self._lengths(spans))
        kinds = [span.shape.kind for span in spans]
        modality: Any = "mixed" if len(set(kinds)) > 1 else kinds[0] if kinds else "text"
        return Sample(id, tensors, measure, record.where, modality=modality, streams=self.streams)

    def _features(self, medium: Media, span: Span, decode: Callable[[], Any]) -> dict[str, torch.Tensor]:
        """Stream -> rows of its tensor."""
        found = self.media.features(span.shape, decode())
        for part in span.parts:
            if tuple(found[part.stream][1][0].tolist()) != tuple(part.size):
                raise PolymodalError(
                    f"the {medium.kind} {files.label(medium.source)} decodes to another size than its header says.",
                    "Fetch it again, or write it anew with a current tool.",
                )
        return {stream: rows for stream, (rows, _) in found.items()}

    def pieces(self, record: Record) -> list[Record]:
        """A record cut between messages into records of at most max_length tokens; [record] when it fits.

        Each piece begins with the system messages; a user's turn stays with its answer, with the tool calls and
        results between. A turn that is too long alone stays too long. Plain text is cut between tokens, media stay
        whole. Raises PolymodalError for a broken record.
        """
        if self._tokens([record])[0] <= self.max_length:
            return [record]
        if record.plain:
            return self._plain_pieces(record)
        head = [m for m in record.messages if m.role == "system"]
        turns: list[list[Message]] = []
        for message in record.messages:
            if message.role == "system":
                continue
            if not turns or (message.role == "user" and turns[-1][-1].role != "user"):
                turns.append([])
            turns[-1].append(message)
        out: list[Record] = []
        first = 0
        while first < len(turns):
            ends = range(first + 1, len(turns) + 1)
            candidates = [
                replace(record, messages=(*head, *(m for t in turns[first:e] for m in t))) for e in ends
            ]
            take, step = 1, 8
            while take < len(candidates):  # measured a few at a time: most turns do not fit anyway
                lengths = self._tokens(candidates[take : take + step])
                fit = next((k for k, n in enumerate(lengths) if n > self.max_length), len(lengths))
                take += fit
                if fit < len(lengths):
                    break
            out.append(candidates[take - 1])
            first += take
        return out

    def _tokens(self, records: Sequence[Record]) -> list[int]:
        lengths = []
        for record, measure in zip(records, self.measure(records), strict=True):
            if isinstance(measure, str):
                raise PolymodalError(f"{record.where}: {measure}")
            lengths.append(measure.tokens)
        return lengths

    def _plain_pieces(self, record: Record) -> list[Record]:
        atoms: list[tuple[str | Media, int]] = []  # a stretch of text or a medium, and its tokens
        room = self.max_length - 2 - len(self.backend.encode(self._begin, add_special_tokens=False))
        for part in record.messages[0].content:
            if isinstance(part, Media):
                atoms.append((part, len(self._opened(part)[0].ids)))
                continue
            offsets, step, at = (
                self.backend.encode(part, add_special_tokens=False).offsets,
                max(1, room // 4),
                0,
            )
            for k in range(step, len(offsets) + step, step):
                stop = offsets[k][0] if k < len(offsets) else len(part)
                if stop > at:  # a cut inside a character's bytes moves to the next one
                    atoms.append((part[at:stop], step))
                    at = stop
        out: list[list[str | Media]] = [[]]
        used = 0
        for atom, tokens in atoms:
            if used and used + tokens > room:
                out.append([])
                used = 0
            out[-1].append(atom)
            used += tokens
        records = []
        for n, parts in enumerate(out):
            joined: list[str | Media] = []
            for p in parts:
                if isinstance(p, str) and joined and isinstance(joined[-1], str):
                    joined[-1] += p
                else:
                    joined.append(p)
            extra = {**record.extra, "_goes_on": True} if n + 1 < len(out) else record.extra
            records.append(
                replace(record, messages=(replace(record.messages[0], content=tuple(joined)),), extra=extra)
            )
        return records


def _read_template(path: str | None) -> str | None:
    """A chat template from a Jinja file, or from a chat_template.json as checkpoints have it."""
    if path is None:
        return None
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymodalError(
            f"data.chat_template = {path} cannot be read: {getattr(error, 'strerror', None) or error}.",
            "Name a Jinja file.",
        ) from None
    if path.endswith(".json"):
        try:
            text = json.loads(text)["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise PolymodalError(
                f"data.chat_template = {path} has no key chat_template.",
                "Name a Jinja file, or a checkpoint's chat_template.json.",
            ) from None
    import jinja2

    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
    except jinja2.TemplateSyntaxError as error:
        raise PolymodalError(
            f"data.chat_template = {path}, line {error.lineno}: {error.message}.", "Mend the template."
        ) from None
    return text


def _automatic_begin(tokenizer: Any) -> str:
    """Text of the tokens that the tokenizer puts before every text by itself; "" for most."""
    backend = tokenizer.backend_tokenizer
    plain, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for n in range(len(full) - len(plain) + 1):
        if full[n : n + len(plain)] == plain:
            return "".join(tokenizer.convert_ids_to_tokens(full[:n]))
    return ""
