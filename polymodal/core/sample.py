"""The shapes that cross a room's wall: Record, SampleLengths, Sample, Batch, and the MediaProcessor they come from.

Ground floor: imports torch only. `data` makes these, `models` and `objectives` read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Label of a token without loss."""

Axis = Literal["batch", "sequence", "patch", "frame", "codebook", "none"]


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
class SampleLengths:
    """What planning needs of a sample, measured without decoding pixels."""

    tokens: int  # text stream, media tokens included
    trained: int  # tokens with a label
    patches: tuple[int, ...] = ()
    """Vision patches (before merging) that attend to each other: of each picture, and of each temporal patch of each
    video, in reading order. What is to be generated: (frames, height, width)."""


@dataclass
class Sample:
    """One example, ready to be batched. The text stream's tensors are [T]; media are concatenated in reading order.

    input_ids [T] int64; labels [T] int64: the NEXT token at each place, or IGNORE; weights [T] float32: weight of
    that label before normalisation, 0 where there is none; position_ids [R, T] int64: row 0 counts the sample's own
    tokens from 0, further rows (three for mRoPE) are the model's; pixel_values [P, D] float32; grid_thw [M, 3] int64.
    """

    id: int
    tensors: dict[str, Tensor]
    measure: SampleLengths
    where: str = ""
    broken: str | None = None  # why this is a zero-weight padding_sample
    modality: Literal["text", "image", "video", "audio", "mixed"] = "text"  # for the loss by modality


@dataclass
class Batch:
    """A micro-batch.

    tensors:  name -> tensor; text streams are packed [1, T] (position_ids [R, 1, T]), media [P, D].
    axes:     name -> the meaning of each dimension.
    samples:  ids of the samples inside, in order.
    segments: stream -> cumulative lengths [S + 1] int32 ("text"; families add "vision" if they wish).
    groups:   ties between samples: pairs (DPO), rollouts (GRPO).
    cut:      how the text stream is cut over a context-parallel group (distributed/context_parallel.py), None: it is whole. Then
              input_ids and position_ids hold this rank's rows, `rows` [n] says which; labels and weights are whole.
    media:    how pictures are dealt out to ranks (parallel/media.py), None: this rank computes its own.
    """

    tensors: dict[str, Tensor]
    axes: dict[str, tuple[Axis, ...]]
    samples: tuple[int, ...] = ()
    segments: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    cut: Any = None
    media: Any = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        def move(d: dict[str, Tensor]) -> dict[str, Tensor]:
            moved = {k: v.to(device, non_blocking=non_blocking) for k, v in d.items()}
            for name, tensor in moved.items():
                if not tensor.is_floating_point() and tensor is not d[name]:
                    tensor.host = d[name]  # type: ignore[attr-defined]  # lengths and grids are read on the host: no wait for the device
            return moved

        return replace(self, tensors=move(self.tensors), segments=move(self.segments))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


AXES: dict[str, tuple[Axis, ...]] = {
    "input_ids": ("batch", "sequence"),
    "labels": ("batch", "sequence"),
    "weights": ("batch", "sequence"),
    "position_ids": ("none", "batch", "sequence"),
    "pixel_values": ("patch", "none"),
    "grid_thw": ("none", "none"),
}


def pack(samples: Sequence[Sample]) -> Batch:
    """Concatenate samples into one packed micro-batch [1, T]; attention is bounded by segments["text"].

    Media are concatenated in reading order; the batch has no pixel_values when no sample has media, or when samples
    were made without. `groups` says of each sample its modality, its number of media and whether it is broken.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    lengths = [s.tensors["input_ids"].shape[0] for s in samples]
    tensors = {
        name: torch.cat([s.tensors[name] for s in samples]).unsqueeze(0)
        for name in ("input_ids", "labels", "weights")
    }
    tensors["position_ids"] = torch.cat([s.tensors["position_ids"] for s in samples], dim=1).unsqueeze(1)
    for name in ("pixel_values", "grid_thw"):
        parts = [s.tensors[name] for s in samples if name in s.tensors]
        if parts:
            tensors[name] = torch.cat(parts)
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    groups = {
        "modality": tuple(s.modality for s in samples),
        "media": tuple(len(s.tensors.get("grid_thw", ())) for s in samples),
        "broken": tuple(s.broken is not None for s in samples),
    }
    return Batch(tensors, {k: AXES[k] for k in tensors}, tuple(s.id for s in samples), {"text": cu}, groups)


def without(batch: Batch, gone: Sequence[bool]) -> tuple[Batch, list[SampleLengths]]:
    """(a packed batch with holes in place of the samples that are gone, the lengths of what was there)."""
    cu, media = batch.segments["text"].tolist(), batch.groups["media"]
    grids, first = batch.get("grid_thw"), [0]
    for number in media:
        first.append(first[-1] + number)
    patches = [0, *(grids.prod(dim=1).cumsum(0).tolist() if grids is not None else ())]
    samples, lost = [], []
    for at, id in enumerate(batch.samples):
        text = slice(cu[at], cu[at + 1])
        tensors = {name: batch[name][0, text] for name in ("input_ids", "labels", "weights")}
        tensors["position_ids"] = batch["position_ids"][:, 0, text]
        own = slice(first[at], first[at + 1])
        if grids is not None and media[at]:
            tensors["grid_thw"] = grids[own]
            if "pixel_values" in batch.tensors:
                tensors["pixel_values"] = batch["pixel_values"][patches[own.start] : patches[own.stop]]
        broken = "" if batch.groups["broken"][at] else None
        sample = Sample(
            id, tensors, SampleLengths(text.stop - text.start, 0), "", broken, batch.groups["modality"][at]
        )
        if gone[at] and broken is None:
            trained = int((tensors["weights"] != 0).sum())
            lost.append(SampleLengths(sample.measure.tokens, trained, (1,) * media[at]))
            sample = padding_sample(
                min(2, sample.measure.tokens), len(tensors["position_ids"]), id, broken=""
            )
        samples.append(sample)
    return pack(samples), lost


def padding_sample(
    tokens: int = 2, rows: int = 1, id: int = -1, where: str = "", broken: str | None = None, token: int = 0
) -> Sample:
    """A sample without weight: stands for a broken row, or fills a global batch to a multiple of the ranks."""
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
class Span:
    """What one medium becomes in the token stream."""

    ids: (
        tuple[int, ...] | list[int]
    )  # put in place of ALL tokens of `MediaProcessor.placeholder` (start and end marks too)
    patches: int  # vision patches before merging
    grid: tuple[int, int, int]  # (t, h, w) in patches

    @property
    def frames(self) -> tuple[int, ...]:
        """Patches of each temporal patch, as `SampleLengths.patches` counts them."""
        return (self.grid[1] * self.grid[2],) * self.grid[0]


class MediaProcessor(Protocol):
    """A family's knowledge of tokens and pixels, handed to `data` so that it never imports `models`.

    Must be picklable (it travels to data workers). Shapes as in `Sample`.
    """

    tokenizer: Any  # a transformers fast tokenizer
    rows: int  # rows of position_ids (4 with mRoPE, else 1)
    frame_multiple: int = 2  # sampled video frames are a multiple of this (frames a temporal patch joins)

    def placeholder(self, kind: str) -> str:
        """Text that the chat is rendered with where a medium stands, e.g. "<|vision_start|><|image_pad|><|vision_end|>"."""

    def template_content(self, part: str | Media) -> dict:
        """One part of a message in the form the chat template wants."""

    def span(
        self, kind: str, height: int, width: int, frames: int = 1, seconds: Sequence[float] = ()
    ) -> Span:
        """Tokens and patches of a medium from its size alone (pixels; `seconds`: time of each sampled frame)."""

    def pixels(self, kind: str, frames: Any) -> tuple[Tensor, Tensor]:
        """Decoded medium (PIL image, or uint8 [F, H, W, 3] for video) -> pixel_values [P, D], grid [1, 3]."""

    def position_ids(
        self,
        input_ids: Tensor,
        kinds: Sequence[str],
        grids: Sequence[tuple[int, int, int]],
        seconds_per_grid: Sequence[float],
    ) -> Tensor:
        """Positions [rows, T] of one sample; seconds_per_grid: seconds between temporal patches of a video, 0 for an image."""
