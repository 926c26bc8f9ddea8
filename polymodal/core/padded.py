"""Samples of models with an encoder and a decoder as micro-batches [B, T], padded on the right, and back.

Decoders are causal and padding has neither label nor weight, so no mask is needed: tokens before the padding
do not attend to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad as pad_right

from polymodal.core.sample import IGNORE, Axis, Batch, MediaStream, Sample, SampleLengths

TEXT = {"input_ids": 0, "labels": IGNORE, "weights": 0}
"""Text tensors of a sample [T] and what they are padded with; any token will do."""
PADDING_TOKENS = 1
"""Tokens of a sample without weight."""


def padding_sample(
    stream: MediaStream, shape: tuple[int, ...] | None, id: int = -1, broken: str | None = None
) -> Sample:
    """A sample without weight: for a broken record, or to fill a global batch to a multiple of the ranks.

    shape: of the encoder's input, zeros here; None on pipeline stages that do not read it.
    """
    tensors = {name: torch.full((PADDING_TOKENS,), value, dtype=torch.int64) for name, value in TEXT.items()}
    tensors["weights"] = tensors["weights"].float()
    if shape is not None:
        tensors[stream.tensor] = torch.zeros(shape)
    return Sample(id, tensors, SampleLengths(PADDING_TOKENS, 0), "", broken, "text", (stream,))


def pad(samples: Sequence[Sample]) -> Batch:
    """Samples -> input_ids, labels, weights [B, T] with T the longest, and the encoder's input [B, ...].

    segments["text"]: the rows of the flattened [B x T]; groups["lengths"]: tokens of each row before padding.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    (stream,) = samples[0].streams
    lengths = tuple(len(sample.tensors["input_ids"]) for sample in samples)
    longest = max(lengths)
    tensors = {}
    for name, value in TEXT.items():  # not by pad_sequence: in a trace its result has no values
        rows = [
            pad_right(s.tensors[name], (0, longest - n), value=value)
            for s, n in zip(samples, lengths, strict=True)
        ]
        tensors[name] = torch.stack(rows)
    axes: dict[str, tuple[Axis, ...]] = dict.fromkeys(TEXT, ("batch", "sequence"))
    if stream.tensor in samples[0].tensors:
        tensors[stream.tensor] = torch.stack([sample.tensors[stream.tensor] for sample in samples])
        axes[stream.tensor] = ("batch", *stream.axes)
    groups = {
        "modality": tuple(sample.modality for sample in samples),
        "media": {},  # a sample is one recording, which is not counted again
        "broken": tuple(sample.broken is not None for sample in samples),
        "lengths": lengths,
    }
    segments = {"text": torch.arange(len(samples) + 1, dtype=torch.int32) * longest}
    return Batch(tensors, axes, tuple(s.id for s in samples), segments, groups, streams=(stream,))


def unpad(batch: Batch) -> list[Sample]:
    """The samples of a padded batch."""
    (stream,) = batch.streams
    samples = []
    for row, tokens in enumerate(batch.groups["lengths"]):
        tensors = {name: batch[name][row, :tokens] for name in TEXT}
        if stream.tensor in batch.tensors:
            tensors[stream.tensor] = batch[stream.tensor][row]
        measure = SampleLengths(tokens, int((tensors["weights"] != 0).sum()))
        broken = "" if batch.groups["broken"][row] else None
        modality = batch.groups["modality"][row]
        samples.append(Sample(batch.samples[row], tensors, measure, "", broken, modality, (stream,)))
    return samples


def without(batch: Batch, gone: Sequence[bool]) -> tuple[Batch, list[SampleLengths]]:
    """(the batch with padding samples in place of those that are gone, lengths of those that were there)."""
    (stream,) = batch.streams
    features = batch.get(stream.tensor)
    shape = None if features is None else tuple(features.shape[1:])
    left, lost = [], []
    for sample, is_gone in zip(unpad(batch), gone, strict=True):
        if is_gone and sample.broken is None:
            lost.append(sample.measure)
        left.append(padding_sample(stream, shape, sample.id, "") if is_gone else sample)
    return pad(left), lost
