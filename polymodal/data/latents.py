"""Micro-batches of one shape for generating models: of encoded features, or of pictures and clips encoded
later.

What the loader's workers run in place of packing text. A sample's draws (its caption, its noise) come from
(seed, epoch, sample id) alone. A filler is a sample of the step once more, with weight 0.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, Record, SampleLengths
from polymodal.data.clips import Clips
from polymodal.data.features import Features
from polymodal.data.loader import MicroBatchStats, StepStats, Task
from polymodal.data.media_pairs import PairClips
from polymodal.data.permute import key_of
from polymodal.recipe import Data


class UniformCollator:
    """Task -> batch of samples of one shape. Picklable.

    datasets: of some records, the number of each one's dataset; factors: of the loss of each dataset's
    samples, () = 1.
    """

    copies = True
    members = 1
    """Items of a sample: 2 where it is a pair, whose halves stand one after the other and share draws."""

    def __init__(self, seed: int, factors: Sequence[float]):
        self.seed, self.factors = seed, factors

    def learn(self, index: Any, task: Task, batch: Batch) -> None:
        """Sizes are known before."""

    def datasets(self, records: list[int]) -> Sequence[int]:
        raise NotImplementedError

    def caption(self, task: Task, id: int, captions: Sequence[Any]) -> Any:
        """The one of several captions that a sample has in this epoch."""
        return captions[key_of(self.seed, 6, task.epoch, id) % len(captions)]

    def batch(self, tensors: dict[str, Tensor], task: Task, shape: Any, weight: list[float]) -> Batch:
        ids = tuple(s[0] for s in task.samples for _ in range(self.members))
        if self.factors:
            records = [record for _, record, _, _ in task.samples for _ in range(self.members)]
            datasets = self.datasets(records)
            tensors["loss_weight"] = torch.tensor([self.factors[d] for d in datasets])
        tensors["weight"] = torch.zeros(len(ids)) if task.filler else torch.tensor(weight)
        axes: dict[str, Any] = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
        if "latents" in tensors and tensors["latents"].ndim == 5:
            axes["latents"] = ("batch", "none", "frame", "none", "none")
        groups = {
            "seeds": tuple(key_of(self.seed, 5, task.epoch, i) for i in ids),
            "tokens": (task.samples[0][3],) * len(ids),  # of an item
            "shape": tuple(int(x) for x in shape),
            "kind": "video" if shape[0] > 1 else "image",
            "members": self.members,
        }
        return Batch(tensors, axes, ids, groups=groups)


def _stats(batch: Batch, began: float, broken: list[tuple[int, str]]) -> MicroBatchStats:
    count = int((batch["weight"] != 0).sum())
    tokens, media = batch.groups["tokens"][0] * count, batch.groups["shape"][0] * count
    samples = count // batch.groups["members"]
    return MicroBatchStats(tokens, tokens, samples, media, time.perf_counter() - began, broken)


class FeatureCollator(UniformCollator):
    """Batches of encoded samples: latents [B, ...], text and media tensors by the denoiser's names.

    One caption of several is drawn per sample and epoch; text of unequal length is padded with zeros.
    """

    def __init__(self, features: Features, seed: int, text: tuple[str, ...], factors: Sequence[float] = ()):
        super().__init__(seed, factors)
        self.features, self.text = features, text
        self.members = 2 if features.pairs else 1

    def bytes(self, index: Any, task: Task) -> int:
        return self.members * int(index.bytes[[s[0] for s in task.samples]].sum())

    def datasets(self, records: list[int]) -> Sequence[int]:
        return self.features.datasets[records].tolist()

    def __call__(self, task: Task) -> tuple[Batch, MicroBatchStats]:
        began = time.perf_counter()
        rows: list[dict[str, Tensor]] = []
        for id, record, _, _ in task.samples:
            for media, captions in self.features.samples(record):
                rows.append({**media, **self.caption(task, id, captions)})
            other = next((row for row in rows[-self.members :] if set(row) != set(rows[0])), None)
            if other is not None:
                raise PolymodalError(
                    f"{self.features.where(record)} holds {', '.join(sorted(other))}, other samples hold "
                    f"{', '.join(sorted(rows[0]))}.",
                    "Encode all data with one recipe.",
                )
        tensors = {n: _stacked([row[n] for row in rows], n in self.text) for n in sorted(rows[0])}
        batch = self.batch(tensors, task, self.features.shapes[task.samples[0][1]], [1.0] * len(rows))
        if self.features.pairs:
            batch.groups["scores"] = tuple(self.features.scores[record] for _, record, _, _ in task.samples)
        return batch, _stats(batch, began, [])


def _stacked(parts: list[Tensor], text: bool) -> Tensor:
    longest = max(p.shape[0] for p in parts) if text and parts[0].ndim else 0
    if longest and any(p.shape[0] != longest for p in parts):
        parts = [torch.cat([p, p.new_zeros(longest - p.shape[0], *p.shape[1:])]) for p in parts]
    return torch.stack(parts)


class ClipCollator(UniformCollator):
    """Batches of frames: pixels uint8 [B, F, H, W, 3], captions in groups, to be encoded on the device.

    groups["given"] has Clips.given of each item; where references are frames of the bucket, pixels are
    black. A broken sample is fatal, or (data.on_error: skip) black frames of weight 0: it is named, and no
    other takes its place.
    """

    def __init__(self, corpus: Any, clips: Clips, data: Data, seed: int, factors: Sequence[float] = ()):
        super().__init__(seed, factors)
        self.corpus, self.clips = corpus, clips
        self.on_error = data.on_error
        self.members = 2 if isinstance(clips, PairClips) else 1

    def bytes(self, index: Any, task: Task) -> int:
        return self.members * len(task.samples) * 3 * math.prod(index.measure(task.samples[0][0]).shape)

    def datasets(self, records: list[int]) -> Sequence[int]:
        starts = [part.start for part in self.corpus.parts]
        return [bisect_right(starts, number) - 1 for number in records]

    def __call__(self, task: Task) -> tuple[Batch, MicroBatchStats]:
        began = time.perf_counter()
        pixels: list[Tensor | None] = []
        captions: list[str] = []
        broken: dict[int, str] = {}
        given: list[dict[str, Tensor]] = []
        scores: list[tuple[float, ...] | None] = []
        shape: tuple[int, ...] = ()
        for id, number, _, _ in task.samples:
            record: Record = self.corpus[number]
            try:
                measure = self.clips.bucket(record)
                if shape and measure.shape != shape:
                    raise PolymodalError(
                        f"{record.where}: its size changed after it was measured.", "Measure again."
                    )
                shape = measure.shape
                made = [self._item(side, measure) for side in record.conversations[: self.members]]
                pixels += [frames for frames, _ in made]
                given += [shown for _, shown in made]
            except PolymodalError as error:
                if self.on_error == "fail":
                    raise
                broken[id] = error.message
                pixels += [None] * self.members
                given += [{} for _ in range(self.members)]
            captions += [self.caption(task, id, record.extra["captions"])] * self.members
            scores.append(record.scores or None)
        tensors, given = _filled(pixels, given, shape, self.clips.grid.side)
        weight = [0.0 if p is None else 1.0 for p in pixels]
        batch = self.batch(tensors, task, tensors["pixels"].shape[1:4], weight)
        batch.groups |= {
            "captions": tuple(captions),
            "given": tuple(given),
            "broken": tuple(id in broken for id in batch.samples),
        }
        if self.members > 1:
            batch.groups["scores"] = tuple(scores)
        return batch, _stats(batch, began, list(broken.items()))

    def _item(self, record: Record, measure: SampleLengths) -> tuple[Tensor, dict[str, Tensor]]:
        """(frames, black where references stand, conditions by role) of one medium."""
        shown = {role: torch.tensor(value) for role, value in self.clips.given(record, measure).items()}
        frames = torch.tensor(self.clips.frames(record, measure))
        ahead = frames.new_zeros(measure.shape[0] - len(frames), *frames.shape[1:])
        return torch.cat([ahead, frames]), shown


def _filled(
    pixels: Sequence[Tensor | None], given: Sequence[dict[str, Tensor]], shape: tuple[int, ...], side: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(pixels [B, F, H, W, 3], `given` of each item) where frames that are None are black.

    A broken item has the same conditions as a good one; without any good item the frames are one black
    square.
    """
    good = next((g for g, p in zip(given, pixels, strict=True) if p is not None and g), {})
    steady = {role: t for role, t in good.items() if t.is_floating_point()}
    if all(p is None for p in pixels):
        shape = (1, side, side)
    black = torch.zeros(*shape, 3, dtype=torch.uint8)
    tensors = {"pixels": torch.stack([black if p is None else p for p in pixels])}
    return tensors, [steady if p is None else g for g, p in zip(given, pixels, strict=True)]


def without(batch: Batch, gone: Sequence[bool], side: int) -> tuple[Batch, StepStats]:
    """(a ClipCollator's batch in which the items that are `gone` are black and without weight, what was
    lost).

    side: least height and width of frames, of the family's grid.
    """
    before, shape = batch.groups["broken"], batch.groups["shape"]
    pixels = [None if out else p for p, out in zip(batch["pixels"], gone, strict=True)]
    tensors, given = _filled(pixels, batch.groups["given"], shape, side)
    weight = batch["weight"].clone()
    lost = torch.tensor(gone) & ~torch.tensor(before) & (weight != 0)
    count = int(lost.sum())
    weight[torch.tensor(gone)] = 0.0
    tokens = batch.groups["tokens"][0] * count
    samples = count // batch.groups["members"]
    stats = StepStats(tokens=tokens, trained=tokens, samples=samples, media=count * shape[0])
    frames = tuple(tensors["pixels"].shape[1:4])
    groups = {**batch.groups, "given": tuple(given), "broken": tuple(bool(out) for out in gone)}
    groups |= {"shape": frames, "kind": "video" if frames[0] > 1 else "image"}
    return replace(batch, tensors={**batch.tensors, **tensors, "weight": weight}, groups=groups), stats
