"""Records -> token ids, label weights and media tensors; and their lengths without decoding a pixel.

A record is rendered by the checkpoint's own chat template with one placeholder per medium and tokenized
once; every placeholder is then replaced by the medium's span. A span is never cut; the caller decides what
becomes of long samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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
from polymodal.data import media as decoders
from polymodal.data.boxes import BoxWriter
from polymodal.data.counting import WordCounter
from polymodal.data.template import Layout, Template, written
from polymodal.recipe import Data

VERSION = 3  # of what tokens and labels mean here: part of the fingerprint
_SPANS = 4096  # spans of picture sizes remembered
_BATCH = 512  # texts tokenized at a time
_CHECKED = 2  # texts of each batch that are tokenized although they were counted
_PROBES = (
    MediaShape("image", 10, 10),
    MediaShape("image", 777, 333),
    MediaShape("image", 9000, 7000),
    MediaShape("video", 360, 640, 4, (0.0, 0.5, 1.0, 1.5), 1.0),
    MediaShape("video", 1080, 1920, 64, tuple(i / 2 for i in range(64)), 1.0),
    MediaShape("audio", samples=123_457),
)
"""Sizes whose spans go into the fingerprint, so that any setting that changes a length changes it."""


class _Prepared(NamedTuple):
    """A rendered record, before it is tokenized."""

    layout: Layout
    regions: list[tuple[int, int, float]]
    """Trained ranges of characters with their weights, ascending and apart; media inside are not trained."""
    spans: list[Span]  # of the media, in the text's order
    decoders: list[Callable[[], Any]]


class _Encoded(NamedTuple):
    """A text as tokens: their ids and the character that each begins at, both int64 [T]."""

    ids: np.ndarray
    starts: np.ndarray


class ChatProcessor:
    """Turns records into samples for one model. Picklable.

    Labels: by data.train_on, on assistant messages through their end-of-turn token; `all` is every token but
    media; a message's own weight overrules it. Plain text is trained whole and ends with the end-of-text
    token. Raises PolymodalError when data.chat_template cannot be read.
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
        if data.video.sound and not media.sample_rate:
            raise PolymodalError(
                "data.video.sound: this model does not hear.",
                "Set it to false, or choose a model that reads audio (`polymodal models`).",
            )
        self.media = media
        self.video = data.video
        self.train_on, self.special_tokens = data.train_on, data.special_tokens
        self.max_length = data.max_length
        self.backend = backend
        self.template = Template(
            media, _read_template(data.chat_template), data.template_kwargs, data.special_tokens
        )
        self.counter = WordCounter(backend)
        self.boxes = BoxWriter(media.boxes, media.picture_size)
        self.streams = media.streams
        self._begin = _automatic_begin(media.tokenizer)
        self._spans: dict[MediaShape, Span] = {}
        self._literals: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spans": {}}

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides ids, labels and lengths: tokenizer, template, media and video settings."""
        spans: list[Any] = []
        for shape in _PROBES:
            try:
                self.media.placeholder(shape.kind)
                span = self.media.span(shape)
                spans.append([list(span.ids), [(p.stream, p.size, p.lengths) for p in span.parts]])
            except PolymodalError as error:
                spans.append(error.message)
        template, tokenizer = self.template, self.media.tokenizer
        state = [VERSION, template.text, template.kwargs, template.marks, self.train_on, self.special_tokens]
        state += [self.media.frame_multiple, spans, self.video.model_dump()]
        state += [getattr(self.media, "settings", None), str(tokenizer.eos_token), self._begin]
        state += [repr(self.boxes.form)]
        digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
        digest.update(self.backend.to_str().encode())
        return digest.hexdigest()

    # -- text ----------------------------------------------------------------

    def _weights(self, record: Record) -> dict[int, float]:
        """Messages whose place in the text must be known -> weight: those that train, and all that have a
        weight."""
        if record.plain:
            weight = record.messages[0].weight
            return {0: 1.0 if weight is None else weight}
        answers = [i for i, m in enumerate(record.messages) if m.role == "assistant"]
        trained = {"assistant": answers, "last": answers[-1:], "all": []}[self.train_on]
        out = {}
        for i, message in enumerate(record.messages):
            if message.weight is None and i in trained:
                out[i] = 1.0
            elif message.weight is not None and (message.weight > 0 or self.train_on == "all"):
                out[i] = message.weight
        return out

    def _layout(self, record: Record, numbers: Sequence[int]) -> Layout:
        if not record.plain:
            return self.template.layout(record, numbers)
        eos = self.media.tokenizer.eos_token
        if eos is None:
            raise PolymodalError(
                "the tokenizer has no end-of-text token to end plain text with.",
                "Set eos_token in the checkpoint's tokenizer_config.json.",
            )
        text = self._begin + "".join(
            p if isinstance(p, str) else self.template.marks.get(p.kind) or self.media.placeholder(p.kind)
            for p in written(record.messages[0].content, self.template.breaking("assistant"))
        )
        text += "" if record.extra.get("_goes_on") else eos
        span = len(self._begin), len(text)
        return self.template.mended(Layout(text, (span,), self.template.places(text, record.media)))

    def _prepare(self, record: Record, prompt: bool = False) -> _Prepared:
        """Rendered, with the headers of its media read; prompt: up to where the model answers, nothing
        trained."""
        if record.alternatives:
            raise PolymodalError(
                "the row compares answers, which train.objective: dpo learns from.",
                "To learn the preferred answers alone, set data.attr.response=chosen where rows have a "
                "prompt, else data.attr.messages=chosen.",
            )
        record = self.media.conversation(self.boxes.record(record))
        weights = {} if prompt else self._weights(record)
        if prompt and not record.plain:
            layout = self.template.prompt(record)
        else:
            layout = self._layout(record, list(weights))
        for start, stop in layout.literal:
            self._spelt(layout.text[start:stop])
        regions, at = [], 0
        ranges: list[Any] = [(layout.spans[i], weight) for i, weight in weights.items()]
        for (start, stop), weight in sorted(ranges):
            if self.train_on == "all" and not record.plain:
                regions.append((at, start, 1.0))
            regions.append((start, stop, weight))
            at = stop
        if self.train_on == "all" and not record.plain and not prompt:
            regions.append((at, len(layout.text), 1.0))
        regions = [(start, stop, weight) for start, stop, weight in regions if stop > start and weight > 0]
        media = record.media if layout.media else ()
        opened = [self._opened(media[number], record) for _, _, number in layout.media]
        return _Prepared(layout, regions, [span for span, _ in opened], [decode for _, decode in opened])

    def _tokens(self, prepared: _Prepared, encoded: _Encoded) -> tuple[np.ndarray, np.ndarray]:
        """(token ids with the media's spans, the weight of each as a label) of an encoded text."""
        layout, regions, spans, _ = prepared
        ids, starts = encoded
        weights = np.zeros(len(ids), np.float32)
        for start, stop, weight in regions:
            weights[np.searchsorted(starts, start) : np.searchsorted(starts, stop)] = weight
        pieces, kept, at = [], [], 0
        for (start, stop, _), span in zip(layout.media, spans, strict=True):
            before = np.searchsorted(starts, start)
            pieces += [ids[at:before], np.asarray(span.ids, np.int64)]
            kept += [weights[at:before], np.zeros(len(span.ids), np.float32)]
            at = np.searchsorted(starts, stop)
        return np.concatenate([*pieces, ids[at:]]), np.concatenate([*kept, weights[at:]])

    def _encoded(self, layouts: Sequence[Layout]) -> list[_Encoded]:
        """Texts as tokens. Raises PolymodalError for a control token that cannot be ordinary text."""
        whole = [layout.text for layout in layouts if not layout.literal]
        encodings = iter(self.backend.encode_batch(whole, add_special_tokens=False))
        return [
            self._in_pieces(layout) if layout.literal else _encoded(next(encodings)) for layout in layouts
        ]

    def _spelt(self, token: str) -> list[int]:
        """A control token as ordinary text. Raises PolymodalError when the tokenizer cannot write it so."""
        from transformers.utils.chat_template_utils import _encode_chat_piece

        if token not in self._literals:
            tokenizer = self.media.tokenizer
            line_break = self.backend.encode("\n", add_special_tokens=False).ids
            self._literals[token] = _encode_chat_piece(tokenizer, token, True, line_break)
        if self.backend.token_to_id(token) in self._literals[token]:
            raise PolymodalError(
                f"the text holds {token}, which this tokenizer cannot write as ordinary text.",
                "Remove it from the data, or set data.special_tokens: tokens.",
            )
        return self._literals[token]

    def _in_pieces(self, layout: Layout) -> _Encoded:
        """A text with control tokens as ordinary text, in pieces as in transformers' `encode_marked_chat`."""
        line_break = self.backend.encode("\n", add_special_tokens=False).ids
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for start, stop in (*layout.literal, (len(layout.text), len(layout.text))):
            if at < start:  # behind a line break, so that no space is put before it, as before a whole text
                lead = 1 if at else 0
                piece = layout.text[at:start]
                encoding = self.backend.encode("\n" * lead + piece, add_special_tokens=False)
                if lead and encoding.ids[: len(line_break)] != line_break:
                    lead, encoding = 0, self.backend.encode(piece, add_special_tokens=False)
                skipped = len(line_break) if lead else 0
                ids += encoding.ids[skipped:]
                starts += [at - lead + first for first, _ in encoding.offsets[skipped:]]
            spelt = self._spelt(layout.text[start:stop]) if start < stop else []
            ids += spelt
            starts += [start] * len(spelt)
            at = stop
        return _Encoded(np.asarray(ids, np.int64), np.asarray(starts, np.int64))

    # -- media ---------------------------------------------------------------

    def _opened(self, medium: Media, record: Record) -> tuple[Span, Callable[[], Any]]:
        """Tokens of a record's medium from its header, and what decodes it, from its start to its end."""
        self.media.placeholder(medium.kind)  # raises if the model does not read this kind
        source: Any = medium.source
        decode: Callable[[], Any]
        if medium.kind == "video":
            header = decoders.video_header(source, self.video.fps)
            clip = decoders.clip(header, self.video, self.media.frame_multiple)
            step = self.media.frame_multiple / clip.fps
            frames = len(clip.indices)
            shape = MediaShape("video", header.height, header.width, frames, clip.seconds, step)
            decode = partial(decoders.video, source, header, clip.indices)
            if self.video.sound:
                rate = self.media.sample_rate
                shape = replace(shape, samples=audio.sound_samples(source, header, rate))
                decode = partial(_both, decode, partial(audio.sound, source, rate, shape.samples))
        elif medium.kind == "image":
            shape = MediaShape("image", *decoders.image_size(source))
            if getattr(self.media, "counts_pictures", False):
                shape = replace(shape, among=sum(each.kind == "image" for each in record.media))
            decode = partial(decoders.image, source)
        else:
            sound, rate = audio.audio_header(source), self.media.sample_rate
            excerpt = record.extra.get("start", 0.0), record.extra.get("end")
            sound.excerpt(source, *excerpt)
            shape = MediaShape("audio", samples=sound.samples(rate, *excerpt))
            decode = partial(audio.decode_audio, source, sound, rate, *excerpt)
        return self._span(shape, medium), decode

    def _span(self, shape: MediaShape, medium: Media) -> Span:
        span = self._spans.get(shape)
        if span is None:
            name = decoders.label(medium.source)
            try:
                span = self.media.span(shape)
            except (ValueError, ZeroDivisionError) as error:
                raise PolymodalError(
                    f"the {medium.kind} {name} cannot be used: {error}.", "Remove it, or change its size."
                ) from None
            except PolymodalError as error:
                raise error.at(name) from None
            if len(self._spans) >= _SPANS:
                self._spans.clear()
            self._spans[shape] = span
        return span

    def span(self, medium: Media, record: Record) -> Span:
        """What a record's medium becomes, from its header. Raises PolymodalError."""
        return self._opened(medium, record)[0]

    def _lengths(self, spans: Sequence[Span]) -> dict[str, tuple[int, ...]]:
        lengths: dict[str, tuple[int, ...]] = {}
        for stream in self.streams:
            parts = [part for span in spans for part in span.parts if part.stream == stream.name]
            if parts:
                lengths[stream.name] = tuple(n for part in parts for n in part.lengths)
        return lengths

    # -- the four services ---------------------------------------------------

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        """Lengths of records from texts and media headers; a string says why a record is not usable.

        Equal to `sample(record).measure`, without pixels.
        """
        out: list[SampleLengths | str] = [""] * len(records)
        for first in range(0, len(records), _BATCH):
            prepared: dict[int, _Prepared] = {}
            for n in range(first, min(first + _BATCH, len(records))):
                try:
                    prepared[n] = self._prepare(records[n])
                except PolymodalError as error:
                    out[n] = str(error)
            for n, lengths in zip(prepared, self._measured(list(prepared.values())), strict=True):
                out[n] = lengths
        return out

    def _measured(self, prepared: list[_Prepared]) -> list[SampleLengths]:
        counts = [self._counted(each) for each in prepared]
        unknown = [n for n, count in enumerate(counts) if count is None]
        checked = [n for n, count in enumerate(counts) if count is not None][:_CHECKED]
        encoded = self._encoded([prepared[n].layout for n in (*unknown, *checked)])
        for n, each in zip((*unknown, *checked), encoded, strict=True):
            ids, weights = self._tokens(prepared[n], each)
            count = len(ids), int(np.count_nonzero(weights[1:]))
            if counts[n] not in (None, count):
                self.counter.expressions = None  # this tokenizer has a rule that is not known there
                return self._measured(prepared)
            counts[n] = count
        lengths = [self._lengths(each.spans) for each in prepared]
        return [SampleLengths(*count, media) for count, media in zip(counts, lengths, strict=True) if count]

    def _counted(self, prepared: _Prepared) -> tuple[int, int] | None:
        """(tokens, trained tokens) of a sample without tokenizing it; None when that is not possible."""
        layout, regions, spans, _ = prepared
        cuts = sorted({cut for start, stop, _ in (*regions, *layout.media) for cut in (start, stop)})
        counts = self.counter.count(layout.text, cuts)
        if counts is None or layout.literal:
            return None
        before = dict(zip(cuts, counts, strict=False))
        tokens = counts[-1]
        trained = sum(
            before[stop] - before[start] - (before[start] == 0 < before[stop]) for start, stop, _ in regions
        )
        for (start, stop, _), span in zip(layout.media, spans, strict=True):
            placeholder = before[stop] - before[start]
            tokens += len(span.ids) - placeholder
            if any(a <= start < b for a, b, _ in regions):
                trained -= placeholder - (before[start] == 0)
        return tokens, trained

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        """The tensors of a record; pixels: decoded, or only their sizes from the media's headers.

        Raises PolymodalError with the record's file and line.
        """
        try:
            return self._sample(record, id, self._prepare(record), pixels)
        except PolymodalError as error:
            raise error.at(record.where) from None

    def prompt(self, record: Record, id: int = -1) -> Sample:
        """A record up to where the model answers, without labels; a last assistant message is left out."""
        if record.plain:
            record = replace(record, extra={**record.extra, "_goes_on": True})
        try:
            return self._sample(record, id, self._prepare(record, prompt=True))
        except PolymodalError as error:
            raise error.at(record.where) from None

    def _sample(self, record: Record, id: int, prepared: _Prepared, decode: bool = True) -> Sample:
        ids, weights = self._tokens(prepared, *self._encoded([prepared.layout]))
        tokens, loss = torch.from_numpy(ids), torch.from_numpy(weights)
        labels = torch.full_like(tokens, IGNORE)
        shifted = torch.zeros_like(loss)
        labels[:-1] = torch.where(loss[1:] > 0, tokens[1:], IGNORE)
        shifted[:-1] = loss[1:]
        spans = prepared.spans
        tensors = {
            "input_ids": tokens,
            "labels": labels,
            "weights": shifted,
            "position_ids": self.media.position_ids(tokens, spans),
        }
        features = self._features(record, prepared) if decode else {}
        for stream in self.streams:
            sizes = [part.size for span in spans for part in span.parts if part.stream == stream.name]
            if sizes:
                tensors[stream.sizes] = torch.tensor(sizes)
            if stream.name in features:
                tensors[stream.tensor] = torch.cat(features[stream.name])
        measure = SampleLengths(len(tokens), int((labels != IGNORE).sum()), self._lengths(spans))
        kinds = {span.shape.kind for span in spans}
        modality: Any = "mixed" if len(kinds) > 1 else kinds.pop() if kinds else "text"
        return Sample(id, tensors, measure, record.where, modality=modality, streams=self.streams)

    def _features(self, record: Record, prepared: _Prepared) -> dict[str, list[torch.Tensor]]:
        """Stream -> what goes into its tensor, of each medium. Decodes them."""
        out: dict[str, list[torch.Tensor]] = {}
        media = record.media
        for (_, _, number), span, decode in zip(
            prepared.layout.media, prepared.spans, prepared.decoders, strict=True
        ):
            features = self.media.features(span.shape, decode())
            for stream, (_, sizes) in features.items():
                expected = [tuple(part.size) for part in span.parts if part.stream == stream]
                if list(map(tuple, sizes.tolist())) != expected:
                    medium = media[number]
                    raise PolymodalError(
                        f"the {medium.kind} {decoders.label(medium.source)} decodes to another size than its "
                        "header says.",
                        "Fetch it again, or write it anew with a current tool.",
                    )
            for stream, (rows, _) in features.items():
                out.setdefault(stream, []).append(rows)
        return out

    def pieces(self, record: Record) -> list[Record]:
        """A record cut between messages into records of at most max_length tokens; [record] when it fits.

        Each piece begins with the system messages; a user's turn stays with its answer, with the tool calls
        and results between. A turn that is too long alone stays too long. Plain text is cut between tokens,
        media stay whole. Raises PolymodalError for a broken record.
        """
        if self._counts([record])[0] <= self.max_length:
            return [record]
        record = self.boxes.record(record)
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
            candidates, messages = [], list(head)
            for turn in turns[first:]:
                messages += turn
                candidates.append(replace(record, messages=tuple(messages)))
            take, step = 1, 8
            while take < len(candidates):  # measured a few at a time: most turns do not fit anyway
                lengths = self._counts(candidates[take : take + step])
                fit = next((k for k, n in enumerate(lengths) if n > self.max_length), len(lengths))
                take += fit
                if fit < len(lengths):
                    break
            out.append(candidates[take - 1])
            first += take
        return out

    def _counts(self, records: Sequence[Record]) -> list[int]:
        """Tokens of each record. Raises PolymodalError for a broken one."""
        lengths = []
        for record, measure in zip(records, self.measure(records), strict=True):
            if isinstance(measure, str):
                raise PolymodalError(f"{record.where}: {measure}")
            lengths.append(measure.tokens)
        return lengths

    def _plain_pieces(self, record: Record) -> list[Record]:
        atoms: list[tuple[str | Media, int]] = []  # a stretch of text or a medium, and its tokens
        limit = self.max_length - 2 - len(self.backend.encode(self._begin, add_special_tokens=False))
        step = max(1, limit // 4)
        for part in record.messages[0].content:
            if isinstance(part, Media):
                atoms.append((part, len(self.span(part, record).ids)))
                continue
            broken = self.template.breaking("assistant")(part)
            layout = self.template.mended(Layout(broken, (), ()))
            starts = self._encoded([layout])[0].starts.tolist()
            at = 0
            for stop in [*starts[step::step], len(part)]:
                if stop > at:  # a cut inside a character's bytes moves to the next one
                    atoms.append((type(part)(part[at:stop]), step))
                    at = stop
        contents: list[list[str | Media]] = [[]]
        used = 0
        for atom, tokens in atoms:
            if used and used + tokens > limit:
                contents.append([])
                used = 0
            content = contents[-1]
            if type(atom) is str and content and type(content[-1]) is str:
                content[-1] += atom
            else:
                content.append(atom)
            used += tokens
        message = record.messages[0]
        pieces = [replace(record, messages=(replace(message, content=tuple(c)),)) for c in contents]
        goes_on = {**record.extra, "_goes_on": True}
        return [*(replace(piece, extra=goes_on) for piece in pieces[:-1]), pieces[-1]]


def _both(frames: Callable[[], Any], sound: Callable[[], np.ndarray]) -> tuple[Any, np.ndarray]:
    """A video's frames and the mean of its channels of sound."""
    return frames(), sound().mean(axis=0)


def _encoded(encoding: Any) -> _Encoded:
    """A `tokenizers.Encoding`."""
    starts = np.fromiter((start for start, _ in encoding.offsets), np.int64, len(encoding))
    return _Encoded(np.asarray(encoding.ids, np.int64), starts)


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
            f"data.chat_template = {path}, line {error.lineno}: {error.message}.", "Correct the template."
        ) from None
    except RecursionError:
        raise PolymodalError(
            f"data.chat_template = {path} is nested too deep.", "Correct the template."
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
