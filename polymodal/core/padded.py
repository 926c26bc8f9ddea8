"""Samples of models with an encoder and a decoder as micro-batches [B, T], padded on the right, and back.

Decoders are causal and padding has neither label nor weight, so no mask is needed: what stands before the
padding never sees it. Sees core/sample.py and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import IGNORE, Axis, Batch, MediaStream, Sample, SampleLengths

TEXT = {"input_ids": 0, "labels": IGNORE, "weights": 0}
"""Text tensors of a sample [T] and what they are padded with; any token will do where nothing looks."""
HOLE = 1
"""Tokens of a sample without weight."""


def hole(
    stream: MediaStream, shape: tuple[int, ...] | None, id: int = -1, broken: str | None = None
) -> Sample:
    """A sample without weight: for a broken record, or to fill a global batch to a multiple of the ranks.

    shape: of the encoder's input, zeros here; None: where only its size is looked at (a later pipeline stage).
    """
    tensors = {name: torch.full((HOLE,), value, dtype=torch.int64) for name, value in TEXT.items()}
    tensors["weights"] = tensors["weights"].float()
    if shape is not None:
        tensors[stream.tensor] = torch.zeros(shape)
    return Sample(id, tensors, SampleLengths(HOLE, 0), "", broken, "text", (stream,))


def pad(samples: Sequence[Sample]) -> Batch:
    """Samples -> input_ids, labels, weights [B, T] with T the longest, and the encoder's input [B, ...].

    segments["text"]: the rows of the flattened [B x T]; groups["lengths"]: tokens of each row before padding.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    lengths = tuple(len(sample.tensors["input_ids"]) for sample in samples)
    longest = max(lengths)
    tensors: dict[str, Tensor] = {
        name: torch.stack(
            [
                nn.functional.pad(s.tensors[name], (0, longest - n), value=value)
                for s, n in zip(samples, lengths, strict=True)
            ]
        )
        for name, value in TEXT.items()
    }
    axes: dict[str, tuple[Axis, ...]] = dict.fromkeys(TEXT, ("batch", "sequence"))
    streams = tuple(dict.fromkeys(stream for sample in samples for stream in sample.streams))
    for stream in streams:
        rows = [sample.tensors[stream.tensor] for sample in samples if stream.tensor in sample.tensors]
        if rows:
            tensors[stream.tensor] = torch.stack(rows)
            axes[stream.tensor] = ("batch", *stream.axes)
    groups = {
        "modality": tuple(sample.modality for sample in samples),
        "media": {
            stream.name: tuple(int(bool(s.measure.media.get(stream.name))) for s in samples)
            for stream in streams
        },
        "broken": tuple(sample.broken is not None for sample in samples),
        "lengths": lengths,
    }
    segments = {"text": torch.arange(len(samples) + 1, dtype=torch.int32) * longest}
    return Batch(tensors, axes, tuple(s.id for s in samples), segments, groups, streams=streams)


def without(batch: Batch, gone: Sequence[bool]) -> tuple[Batch, list[SampleLengths]]:
    """(a padded batch with holes in place of the samples that are gone, lengths of those that were there)."""
    (stream,) = batch.streams
    samples, lost = [], []
    for at, (id, tokens) in enumerate(zip(batch.samples, batch.groups["lengths"], strict=True)):
        tensors = {name: batch[name][at, :tokens] for name in TEXT}
        features = batch.get(stream.tensor)
        if features is not None:
            tensors[stream.tensor] = features[at]
        media = {stream.name: (1,)} if batch.groups["media"][stream.name][at] else {}
        measure = SampleLengths(tokens, int((tensors["weights"] != 0).sum()), media)
        broken = batch.groups["broken"][at]
        sample = Sample(
            id, tensors, measure, "", "" if broken else None, batch.groups["modality"][at], (stream,)
        )
        if gone[at]:
            sample = hole(stream, None if features is None else tuple(features.shape[1:]), id, "")
            if not broken:
                lost.append(measure)
        samples.append(sample)
    return pad(samples), lost


def repeated(batch: Batch, count: int) -> Batch:
    """A batch of one sample -> one of `count` samples alike."""
    tensors = {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in batch.tensors.items()}
    groups: dict[str, Any] = {
        n: value * count for n, value in batch.groups.items() if isinstance(value, tuple)
    }
    groups["media"] = {name: values * count for name, values in batch.groups["media"].items()}
    tokens = batch["input_ids"].shape[1]
    segments = {"text": torch.arange(count + 1, dtype=torch.int32) * tokens}
    return replace(batch, tensors=tensors, samples=tuple(range(count)), segments=segments, groups=groups)
