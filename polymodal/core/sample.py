"""The types that all folders share: Record, SampleLengths, Sample, Batch, and the MediaProcessor they come
from.

`data` makes these, `models` and `objectives` read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from polymodal.core.tensors import to_device

IGNORE = -100
"""Label of a token without loss."""

Axis = Literal["batch", "sequence", "patch", "tile", "frame", "codebook", "none"]


@dataclass(frozen=True)
class Media:
    """One picture, video or sound as a row names it: a path, bytes, or a list of frame paths."""

    kind: Literal["image", "video", "audio"]
    source: str | bytes | tuple[str, ...]


class Control(str):
    """Text that the program itself writes: special tokens in it are tokens, elsewhere they are words."""


@dataclass(frozen=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y) of a picture, as a row gives it.

    scale: the picture's width and height in these coordinates (1, 1000), None: pixels, upright.
    """

    values: tuple[float, ...]
    picture: Media
    scale: float | None = None
    label: str | None = None
    at: str = ""  # "objects.bbox[3]": for errors


@dataclass(frozen=True)
class Located:
    """A place in a text for a box, a label, or the list of a row's objects, until it is known how the model
    writes them (data/boxes.py)."""

    kind: Literal["bbox", "ref-object", "objects"]
    boxes: tuple[Box, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. `content` holds the text with each medium as its position in `Record.media`, in reading
    order."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[str | Media | Located, ...]
    weight: float | None = None  # None: by data.train_on; 0: never; else the weight of its tokens
    tool_calls: tuple[dict, ...] = ()
    reasoning: str | None = None


@dataclass(frozen=True)
class Record:
    """A row of a data file, in the one form that every format is read into."""

    messages: tuple[Message, ...]
    where: str  # "file.jsonl, line 12": for errors and reports
    tools: tuple[dict, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)  # id, answer, category...: not trained on
    plain: bool = False  # pretraining text: no chat template, every token trained, end-of-text appended
    alternatives: tuple[tuple[Message, ...], ...] = ()
    """Whole conversations that `messages` is compared with (train.objective dpo, kto)."""
    scores: tuple[float, ...] = ()
    """Of `messages` and of each alternative, higher is better; () where they are in order of preference."""

    @property
    def conversations(self) -> list[Record]:
        """One record for each conversation that is compared: `messages` first."""
        all_of_them = (self.messages, *self.alternatives)
        return [replace(self, messages=each, alternatives=(), scores=()) for each in all_of_them]

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for m in self.messages for part in m.content if isinstance(part, Media))

    @property
    def boxes(self) -> tuple[Box, ...]:
        parts = (p for m in self.messages for p in m.content if isinstance(p, Located))
        return tuple(box for part in parts for box in part.boxes)


@dataclass(frozen=True)
class MediaStream:
    """Media tensors that one tower reads, as a model's processor declares them."""

    name: str  # "vision", "audio"
    tensor: str  # "pixel_values": the tower's input, rows of all media concatenated along dimension 0
    sizes: str  # "grid_thw"
    """Name of an int64 tensor [M, k] with a row for each medium in reading order, whose product is the
    medium's number of rows in `tensor`: (t, h, w) in patches, (tiles,), (frames,)."""
    axes: tuple[Axis, ...] = ("patch", "none")  # of `tensor`

    @property
    def hears(self) -> bool:
        """Whether its rows are frames of sound."""
        return self.axes[0] == "frame"


@dataclass(frozen=True)
class SampleLengths:
    """What planning needs of a sample, measured without decoding media."""

    tokens: int  # text stream, media tokens included
    trained: int  # tokens with a label
    media: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Media stream -> lengths of what attends to each other in its tower, in reading order: patches (before
    merging) of each picture and of each temporal patch of a video, patches of each tile, frames of each
    sound."""
    shape: tuple[int, ...] = ()
    """Of what is to be generated: (frames, height, width)."""

    def total(self, stream: str) -> int:
        """Sum of the lengths of a media stream; 0 without any."""
        return sum(self.media.get(stream, ()))


@dataclass
class Sample:
    """One example, ready to be batched. The text stream's tensors are [T]; media are concatenated in reading
    order.

    input_ids [T] int64; labels [T] int64: the NEXT token at each place, or IGNORE; weights [T] float32:
    weight of that label before normalisation, 0 where there is none; position_ids [R, T] int64: row 0 counts
    the sample's own tokens from 0, further rows (three for mRoPE) are the model's; of models that speak
    `codes` [T, K] int64, the codec's tokens at each place, negative where there is none; of each media stream
    its `tensor` and its `sizes`.
    """

    id: int
    tensors: dict[str, Tensor]
    measure: SampleLengths
    where: str = ""
    broken: str | None = None  # why this is a padding sample without weight
    modality: Literal["text", "image", "video", "audio", "mixed"] = "text"  # for the loss by modality
    streams: tuple[MediaStream, ...] = ()  # that its model has, with media in it or not
    sequences: tuple[int, ...] = ()
    """Lengths of several sequences that it consists of and that do not see each other; () is one."""
    pairs: tuple[tuple[int, int, float], ...] = ()
    """(preferred sequence, the other, difference of their scores); of kto (the answer, another prompt's
    answer, 1 if it is desirable, else -1)."""
    shared: bool = False  # all sequences have the same media, which are here once
    row: Mapping[str, Any] | None = None
    """Of a prompt: what rewards are given of its record (data/prompts.py)."""


@dataclass
class Batch:
    """A micro-batch."""

    tensors: dict[str, Tensor]
    """Text streams are packed [1, T] (position_ids [R, 1, T]), media [rows, ...]."""
    axes: dict[str, tuple[Axis, ...]]
    samples: tuple[int, ...] = ()  # ids of the samples inside, in order
    segments: dict[str, Tensor] = field(default_factory=dict)
    """Stream -> cumulative lengths [S + 1] int32 ("text"; families may add others)."""
    groups: dict[str, Any] = field(default_factory=dict)
    """Facts of each sample. Where samples have several sequences, each of which is a segment, of each sample
    `sequences`, `pairs` and `shared`; of prompts `rows`."""
    cut: Any = None
    """How the text stream is cut over a context-parallel group (distributed/context_parallel.py), None: it
    is whole. If cut, input_ids and position_ids hold this rank's rows, numbered by `rows` [n]; labels,
    weights and codes are whole."""
    media: Mapping[str, Any] = field(default_factory=dict)
    """Media stream -> how its media are assigned to ranks (parallel/media.py); without an entry this rank
    computes its own."""
    host: dict[str, Tensor] = field(default_factory=dict)
    """Tensors on the host that were moved to a device: lengths, sizes and labels are read there, so that
    nothing waits for the device."""
    streams: tuple[MediaStream, ...] = ()  # that its samples may have

    def to(self, device: torch.device | str) -> Batch:
        moved = self._each(lambda tensor: to_device(tensor, device))
        after = {**moved.segments, **moved.tensors}
        before = {**self.segments, **self.tensors}
        host = {name: tensor for name, tensor in before.items() if after[name] is not tensor}
        return replace(moved, host={**host, **self.host})

    def pin_memory(self) -> Batch:
        """With its tensors in page-locked memory, from where copies to the device overlap with
        computation."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors, segments = (
            {name: function(tensor) for name, tensor in tensors.items()}
            for tensors in (self.tensors, self.segments)
        )
        return replace(self, tensors=tensors, segments=segments)

    def on_host(self, name: str) -> Tensor | None:
        """A tensor as it was before it was moved to a device; None when the batch has none of that name."""
        tensor = self.host.get(name, self.tensors.get(name))
        return None if tensor is None else tensor.cpu()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


def with_groups(batch: Batch, **groups: Any) -> Batch:
    """The batch with further groups."""
    return replace(batch, groups={**batch.groups, **groups})


AXES: dict[str, tuple[Axis, ...]] = {
    "input_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "weights": ("batch", "sequence"),
    "position_ids": ("none", "batch", "sequence"),
    "codes": ("batch", "sequence", "codebook"),
}


TEXT = ("input_ids", "labels", "weights")


def pack(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples into one packed micro-batch [1, T]; attention is bounded by segments["text"].

    Media are concatenated in reading order; the batch has no tensor of a stream when no sample has such
    media, or when samples were made without. `groups`: of each sample its modality, its number of media by
    stream and whether it is broken.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    tensors = {name: torch.cat([s.tensors[name] for s in samples])[None] for name in TEXT}
    tensors["position_ids"] = torch.cat([s.tensors["position_ids"] for s in samples], dim=1).unsqueeze(1)
    spoken = next((s.tensors["codes"] for s in samples if "codes" in s.tensors), None)
    if spoken is not None:  # padding samples have none
        none = [spoken.new_full((len(s.tensors["input_ids"]), spoken.shape[1]), -1) for s in samples]
        own = [s.tensors.get("codes", empty) for s, empty in zip(samples, none, strict=True)]
        tensors["codes"] = torch.cat(own)[None]
    axes = {name: AXES[name] for name in tensors}
    streams = tuple(dict.fromkeys(stream for s in samples for stream in s.streams))
    media = {}
    for stream in streams:
        media[stream.name] = tuple(len(s.tensors.get(stream.sizes, ())) for s in samples)
        for name, meaning in ((stream.tensor, stream.axes), (stream.sizes, ("none", "none"))):
            parts = [s.tensors[name] for s in samples if name in s.tensors]
            if parts:
                tensors[name], axes[name] = torch.cat(parts), meaning
    sequences = [s.sequences or (len(s.tensors["input_ids"]),) for s in samples]
    lengths = [0, *(length for own in sequences for length in own)]
    segments = {"text": torch.tensor(lengths).cumsum(0).to(torch.int32)}
    groups = {
        "modality": tuple(s.modality for s in samples),
        "media": media,
        "broken": tuple(s.broken is not None for s in samples),
    }
    if any(s.sequences for s in samples):
        groups["sequences"] = tuple(sequences)
        groups["pairs"] = tuple(s.pairs for s in samples)
        groups["shared"] = tuple(s.shared for s in samples)
    if any(s.row is not None for s in samples):
        groups["rows"] = tuple(s.row for s in samples)
    return Batch(tensors, axes, tuple(s.id for s in samples), segments, groups, streams=streams)


def unpack(batch: Batch) -> list[Sample]:
    """The samples of a packed batch, as `pack` took them, but for their lengths in media streams."""
    sequences = batch.groups.get("sequences", ())
    lengths = [sum(own) for own in sequences] or batch.segments["text"].diff().tolist()
    text = zip(*(batch[name][0].split(lengths) for name in TEXT), strict=True)
    positions = batch["position_ids"][:, 0].split(lengths, dim=1)
    codes = batch["codes"][0].split(lengths) if "codes" in batch.tensors else None
    samples = []
    for at, (id, own, places) in enumerate(zip(batch.samples, text, positions, strict=True)):
        tensors = {**dict(zip(TEXT, own, strict=True)), "position_ids": places}
        if codes is not None:
            tensors["codes"] = codes[at]
        measure = SampleLengths(lengths[at], int((tensors["weights"] != 0).sum()))
        broken = "" if batch.groups["broken"][at] else None
        sample = Sample(id, tensors, measure, "", broken, batch.groups["modality"][at], batch.streams)
        if sequences:
            sample.sequences = sequences[at]
            sample.pairs, sample.shared = (batch.groups[name][at] for name in ("pairs", "shared"))
        if "rows" in batch.groups:
            sample.row = batch.groups["rows"][at]
        samples.append(sample)
    for stream in batch.streams:
        sizes, rows = batch.get(stream.sizes), batch.get(stream.tensor)
        if sizes is None:
            continue
        by_sample = sizes.split(list(batch.groups["media"][stream.name]))
        counts = [int(own.prod(dim=1).sum()) for own in by_sample]
        by_rows = [None] * len(counts) if rows is None else rows.split(counts)
        for sample, own, part in zip(samples, by_sample, by_rows, strict=True):
            if len(own):
                sample.tensors[stream.sizes] = own
                if part is not None:
                    sample.tensors[stream.tensor] = part
    return samples


def without(batch: Batch, gone: Sequence[bool]) -> tuple[Batch, list[Sample]]:
    """(a packed batch with padding samples in place of the samples that are gone, what was there)."""
    samples, lost = unpack(batch), []
    for at, sample in enumerate(samples):
        if gone[at] and sample.broken is None:
            lost.append(sample)
            tokens = min(2, sample.measure.tokens)
            rows = len(sample.tensors["position_ids"])
            samples[at] = padding_sample(tokens, rows, sample.id, broken="")
    return pack(samples), lost


def padding_sample(tokens: int = 2, rows: int = 1, id: int = -1, broken: str | None = None) -> Sample:
    """A sample without weight: for a broken record, or to fill a global batch to a multiple of the ranks."""
    tensors = {
        "input_ids": torch.zeros(tokens, dtype=torch.int64),
        "labels": torch.full((tokens,), IGNORE),
        "weights": torch.zeros(tokens),
        "position_ids": torch.arange(tokens).expand(rows, tokens).clone(),
    }
    return Sample(id, tensors, SampleLengths(tokens, 0), "", broken)


@dataclass(frozen=True)
class MediaShape:
    """What a medium's header says of it, before anything is decoded."""

    kind: Literal["image", "video", "audio"]
    height: int = 0  # pixels
    width: int = 0
    frames: int = 1  # sampled frames of a video
    seconds: tuple[float, ...] = ()  # time of each sampled frame
    step: float = 0.0  # seconds between temporal patches of a video
    samples: int = 0  # of a sound, at the processor's rate; of a video: with its sound
    among: int = 1  # pictures of the sample, where that decides their size (MediaProcessor.counts_pictures)


@dataclass(frozen=True)
class MediaPart:
    """What one medium gives to one media stream."""

    stream: str  # name of a MediaStream
    size: tuple[int, ...]  # its row of the stream's `sizes`
    lengths: tuple[int, ...]  # what attends to each other, as SampleLengths.media counts


@dataclass(frozen=True)
class Span:
    """What one medium becomes in the token stream, and in the streams of the towers (a video with sound: in
    two)."""

    ids: tuple[int, ...] | list[int]
    """Put in place of ALL tokens of `MediaProcessor.placeholder` (start and end marks too)."""
    parts: tuple[MediaPart, ...]
    shape: MediaShape


class MediaProcessor(Protocol):
    """A family's knowledge of tokens and media, handed to `data` so that it never imports `models`.

    Must be picklable: it is sent to data workers. Shapes as in `Sample`.
    """

    tokenizer: Any  # a transformers fast tokenizer
    streams: tuple[MediaStream, ...]
    boxes: Any  # how it writes boxes (data/boxes.py: BoxFormat); None: not known
    rows: int  # rows of position_ids (4 with mRoPE, else 1)
    frame_multiple: int  # sampled video frames are a multiple of this (frames a temporal patch joins)
    sample_rate: int  # of sound, in Hz; 0: the model does not take sound

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of a picture of this size when the model sees it."""

    def conversation(self, record: Record) -> Record:
        """A record as the model was taught to answer it, where that is more than the row's own words.

        Raises PolymodalError for a record that the model does not take.
        """

    def placeholder(self, kind: str) -> str:
        """Text that the chat is rendered with where a medium stands, e.g.
        "<|vision_start|><|image_pad|><|vision_end|>".

        Raises PolymodalError for a kind that the model does not read.
        """

    def template_content(self, part: str | Media) -> dict:
        """One part of a message in the form the chat template wants."""

    def span(self, shape: MediaShape) -> Span:
        """Tokens of a medium, and its part of each stream, from its size alone."""

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Decoded medium (PIL image; uint8 [F, H, W, 3] for video; float32 [samples] for sound; both for a
        video with sound) -> stream name -> (rows of the stream's `tensor`, its row of `sizes` [1,
        k])."""

    def position_ids(self, input_ids: Tensor, spans: Sequence[Span]) -> Tensor:
        """Positions [rows, T] of one sample; spans: of its media in reading order."""
