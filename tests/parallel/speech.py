"""A tiny Whisper's global batch for the layouts' tests. Tests only."""

from __future__ import annotations

from typing import Any

import torch

from polymodal.core import padded
from polymodal.core.sample import Batch, Sample, SampleLengths
from tests.models import tiny_speech


def batches(family: Any, dtype: torch.dtype) -> list[Batch]:
    """Four micro-batches of different sizes and lengths, with uneven weights; one row has no label at all."""
    draw = torch.Generator().manual_seed(11)
    out, number = [], 0
    for lengths in ((5, 11), (3,), (16, 7, 4), (9, 2)):
        samples = []
        for length in lengths:
            ids = torch.randint(0, family.config.vocab_size, (length + 1,), generator=draw)
            tensors = {
                "input_ids": ids[:-1],
                "labels": ids[1:],
                "weights": torch.rand(length, generator=draw),
            }
            tensors["weights"] *= number != 5
            heard = torch.randn(family.features_shape(), generator=draw).to(dtype)
            tensors[family.features.tensor] = heard
            measure = SampleLengths(length, length, {family.features.name: family.encoded_shape()[:1]})
            samples.append(Sample(number, tensors, measure, modality="audio", streams=(family.features,)))
            number += 1
        out.append(padded.pad(samples))
    return out


def filler(batch: Batch) -> Batch:
    (stream,) = batch.streams
    return padded.pad([padded.padding_sample(stream, tuple(batch[stream.tensor].shape[1:]))])


def checkpoint(directory: str) -> str:
    return str(tiny_speech.checkpoint(directory))
