"""The shapes that cross a room's wall: Record, SampleLengths, Sample, Batch, and the MediaProcessor they come from.

Ground floor: imports torch only. `data` makes these, `models` and `objectives` read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token without loss."""

Axis = Literal["batch", "sequence", "patch", "tile", "frame", "codebook", "none"]


@dataclass(frozen=True)
class Media:
    """One picture, video or sound as a row names it: a path, bytes, or a list of frame paths."""

    kind: Literal["image", "video", "audio"]
    source: str | bytes | tuple[str, ...]


@dataclass(frozen=True)
class Message:
    """One turn. `content` holds the text with each medium as its position in `Record.media`, in reading order."""

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[str | Media, ...]
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

    @property
    def media(self) -> tuple[Media, ...]:
        return tuple(part for m in self.messages for part in m.content if isinstance(part, Media))


@dataclass(frozen=True)
class MediaStream:
    """Media tensors that one tower reads, as a model's processor declares them.

    tensor: name of the tower's input in a Sample and a Batch, rows of all media concatenated along dimension 0;
    sizes:  name of an int64 tensor [M, k], one row a medium in reading order, whose product is the medium's rows of
            `tensor`: (t, h, w) in patches, (tiles,), (frames,).
    axes:   meaning of the dimensions of `tensor`.
    """

    name: str  # "vision", "audio"
    tensor: str  # "pixel_values"
    sizes: str  # "grid_thw"
    axes: tuple[Axis, ...] = ("patch", "none")


@dataclass(frozen=True)
class SampleLengths:
    """What planning needs of a sample, measured without decoding media."""

    tokens: int  # text stream, media tokens included
    trained: int  # tokens with a label
    media: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Media stream -> lengths of what attends to each other in its tower, in reading order: patches (before merging)
    of each picture and of each temporal patch of a video, patches of each tile, frames of each sound."""
    shape: tuple[int, ...] = ()
    """Of what is to be generated: (frames, height, width)."""

    def total(self, stream: str) -> int:
        """Sum of the lengths of a media stream; 0 without any."""
        return sum(self.media.get(stream, ()))


@dataclass
class Sample:
    """One example, ready to be batched. The text stream's tensors are [T]; media are concatenated in reading order.

    input_ids [T] int64; labels [T] int64: the NEXT token at each place, or IGNORE; weights [T] float32: weight of
    that label before normalisation, 0 where there is none; position_ids [R, T] int64: row 0 counts the sample's own
    tokens from 0, further rows (three for mRoPE) are the model's; of each media stream its `tensor` and its `sizes`.
    """

    id: int
    tensors: dict[str, Tensor]
    measure: SampleLengths
    where: str = ""
    broken: str | None = None  # why this is a padding sample without weight
    modality: Literal["text", "image", "video", "audio", "mixed"] = "text"  # for the loss by modality
    streams: tuple[MediaStream, ...] = ()  # that its model has, with media in it or not


@dataclass
class Batch:
    """A micro-batch.

    tensors:  name -> tensor; text streams are packed [1, T] (position_ids [R, 1, T]), media [rows, ...].
    axes:     name -> the meaning of each dimension.
    samples:  ids of the samples inside, in order.
    segments: stream -> cumulative lengths [S + 1] int32 ("text"; families add others if they wish).
    groups:   ties between samples: pairs (DPO), rollouts (GRPO).
    cut:      how the text stream is cut over a context-parallel group (distributed/context_parallel.py), None: it is
              whole. Then input_ids and position_ids hold this rank's rows, `rows` [n] says which; labels and weights
              are whole.
    media:    media stream -> how its media are assigned to ranks (parallel/media.py); without an entry this rank
              computes its own.
    host:     name -> copy on the host of an integer tensor that was moved to a device: lengths and sizes are read
              there, so that nothing waits for the device.
    streams:  the media streams that its samples may have.
    """

    tensors: dict[str, Tensor]
    axes: dict[str, tuple[Axis, ...]]
    samples: tuple[int, ...] = ()
    segments: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    cut: Any = None
    media: Mapping[str, Any] = field(default_factory=dict)
    host: dict[str, Tensor] = field(default_factory=dict)
    streams: tuple[MediaStream, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        tensors = {k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors.items()}
        segments = {k: v.to(device, non_blocking=non_blocking) for k, v in self.segments.items()}
        host = dict(self.host)
        for name, moved in {**tensors, **segments}.items():
            before = self.tensors[name] if name in self.tensors else self.segments[name]
            if not moved.is_floating_point() and moved is not before:
                host.setdefault(name, before)
        return replace(self, tensors=tensors, segments=segments, host=host)

    def pin_memory(self) -> Batch:
        """With its tensors in page-locked memory, from where a copy to the device goes on beside computation."""
        pinned = {k: v.pin_memory() for k, v in self.tensors.items()}
        return replace(self, tensors=pinned, segments={k: v.pin_memory() for k, v in self.segments.items()})

    def on_host(self, name: str) -> Tensor | None:
        """An integer tensor as it was before it was moved to a device; None when the batch has none of that name."""
        found = self.host.get(name, self.tensors.get(name))
        return None if found is None else found.cpu()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


AXES: dict[str, tuple[Axis, ...]] = {
    "input_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "weights": ("batch", "sequence"),
    "position_ids": ("none", "batch", "sequence"),
}


def pack(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples into one packed micro-batch [1, T]; attention is bounded by segments["text"].

    Media are concatenated in reading order; the batch has no tensor of a stream when no sample has such media, or when
    samples were made without. `groups` says of each sample its modality, its number of media a stream and whether it
    is broken.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    lengths = [s.tensors["input_ids"].shape[0] for s in samples]
    tensors = {
        name: torch.cat([s.tensors[name] for s in samples]).unsqueeze(0)
        for name in ("input_ids", "labels", "weights")
    }
    tensors["position_ids"] = torch.cat([s.tensors["position_ids"] for s in samples], dim=1).unsqueeze(1)
    axes = dict(AXES)
    streams = tuple(dict.fromkeys(stream for s in samples for stream in s.streams))
    for stream in streams:
        axes |= {stream.tensor: stream.axes, stream.sizes: ("none", "none")}
        for name in (stream.tensor, stream.sizes):
            parts = [s.tensors[name] for s in samples if name in s.tensors]
            if parts:
                tensors[name] = torch.cat(parts)
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    groups = {
        "modality": tuple(s.modality for s in samples),
        "media": {
            stream.name: tuple(len(s.tensors.get(stream.sizes, ())) for s in samples) for stream in streams
        },
        "broken": tuple(s.broken is not None for s in samples),
    }
    return Batch(
        tensors,
        {k: axes[k] for k in tensors},
        tuple(s.id for s in samples),
        {"text": cu},
        groups,
        streams=streams,
    )


def unpack(batch: Batch) -> list[Sample]:
    """The samples of a packed batch, as `pack` took them, but for their lengths in media streams."""
    cu = batch.segments["text"].tolist()
    samples = []
    for at, id in enumerate(batch.samples):
        text = slice(cu[at], cu[at + 1])
        tensors = {name: batch[name][0, text] for name in ("input_ids", "labels", "weights")}
        tensors["position_ids"] = batch["position_ids"][:, 0, text]
        trained = int((tensors["weights"] != 0).sum())
        broken = "" if batch.groups["broken"][at] else None
        measure = SampleLengths(text.stop - text.start, trained)
        modality = batch.groups["modality"][at]
        samples.append(Sample(id, tensors, measure, "", broken, modality, batch.streams))
    for stream in batch.streams:
        sizes, rows = batch.get(stream.sizes), batch.get(stream.tensor)
        if sizes is None:
            continue
        counts = list(batch.groups["media"][stream.name])
        by_sample = sizes.split(counts)
        by_rows = None if rows is None else rows.split([int(own.prod(dim=1).sum()) for own in by_sample])
        for at, (sample, own) in enumerate(zip(samples, by_sample, strict=True)):
            if counts[at]:
                sample.tensors[stream.sizes] = own
                if by_rows is not None:
                    sample.tensors[stream.tensor] = by_rows[at]
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


def padding_sample(
    tokens: int = 2, rows: int = 1, id: int = -1, where: str = "", broken: str | None = None, token: int = 0
) -> Sample:
    """A sample without weight: for a broken record, or to fill a global batch to a multiple of the ranks."""
    return Sample(
        id,
        {
            "input_ids": torch.full((tokens,), token),
            "labels": torch.full((tokens,), IGNORE),
            "weights": torch.zeros(tokens),
            "position_ids": torch.arange(tokens).expand(rows, tokens).clone(),
        },
        SampleLengths(tokens, 0),
        where,
        broken,
    )


@dataclass(frozen=True)
class MediaShape:
    """What a medium's header says of it, before anything is decoded."""

    kind: Literal["image", "video", "audio"]
    height: int = 0  # pixels
    width: int = 0
    frames: int = 1  # sampled frames of a video
    seconds: tuple[float, ...] = ()  # time of each sampled frame
    step: float = 0.0  # seconds between temporal patches of a video
    samples: int = 0  # of a sound, at the processor's rate


@dataclass(frozen=True)
class MediaPart:
    """What one medium gives to one media stream."""

    stream: str  # name of a MediaStream
    size: tuple[int, ...]  # its row of the stream's `sizes`
    lengths: tuple[int, ...]  # what attends to each other, as SampleLengths.media counts


@dataclass(frozen=True)
class Span:
    """What one medium becomes in the token stream, and in the streams of the towers (a video with sound: in two)."""

    ids: (
        tuple[int, ...] | list[int]
    )  # put in place of ALL tokens of `MediaProcessor.placeholder` (start and end marks too)
    parts: tuple[MediaPart, ...]
    shape: MediaShape


class MediaProcessor(Protocol):
    """A family's knowledge of tokens and media, handed to `data` so that it never imports `models`.

    Must be picklable (it travels to data workers). Shapes as in `Sample`.
    """

    tokenizer: Any  # a transformers fast tokenizer
    streams: tuple[MediaStream, ...]
    rows: int  # rows of position_ids (4 with mRoPE, else 1)
    frame_multiple: int  # sampled video frames are a multiple of this (frames a temporal patch joins)
    sample_rate: int  # of sound, in Hz; 0: the model does not take sound

    def placeholder(self, kind: str) -> str:
        """Text that the chat is rendered with where a medium stands, e.g. "<|vision_start|><|image_pad|><|vision_end|>".

        Raises PolymodalError for a kind that the model does not read."""

    def template_content(self, part: str | Media) -> dict:
        """One part of a message in the form the chat template wants."""

    def span(self, shape: MediaShape) -> Span:
        """Tokens of a medium, and its part of each stream, from its size alone."""

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Decoded medium (PIL image; uint8 [F, H, W, 3] for video; float32 [samples] for sound) -> stream name ->
        (rows of the stream's `tensor`, its row of `sizes` [1, k])."""

    def position_ids(self, input_ids: Tensor, spans: Sequence[Span]) -> Tensor:
        """Positions [rows, T] of one sample; spans: of its media in reading order."""
