"""The steps of one data-parallel rank: samples in the plan's order, prepared ahead by workers.

Tasks of the next steps are submitted when a step is taken; worker processes read, decode and pack while
training computes, one micro-batch per task. A whole step is returned at once, because the objective sums its
denominators over the global batch before the first forward pass.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, Sample, pack, padding_sample
from polymodal.data.permute import key_of
from polymodal.data.schedule import GlobalBatch, Position, Schedule
from polymodal.data.workers import Pool
from polymodal.recipe import Data
from polymodal.runtime import host

log = logging.getLogger("polymodal.data")
_UNIT_BYTES = 6144
"""Of a unit of media length, until the first was seen: 16 x 16 x 2 frames x 3 colours in float32."""


@dataclass
class StepStats:
    """Of one rank's step. Padding samples count only in `broken`."""

    tokens: int = 0
    trained: int = 0  # tokens with a weight
    samples: int = 0
    media: int = 0
    flops: float = 0.0  # forward, as planned: the sum of the packs' cost
    bytes: int = 0
    wait_seconds: float = 0.0  # that training waited for data
    make_seconds: float = 0.0  # sum over workers: reading, decoding, packing
    broken: list[str] = field(default_factory=list)  # why samples were left out, each time


@dataclass
class RankStep:
    """One global batch, this rank's part. Save `next` with a checkpoint: it is where a resumed run begins."""

    position: Position
    next: Position
    micro_batches: list[Batch]
    stats: StepStats


class Task(NamedTuple):
    """A micro-batch to make: for each sample its id, record, piece (-1 = whole) and planned tokens."""

    epoch: int
    samples: tuple[tuple[int, int, int, int], ...]
    filler: bool = False  # of weight 0: for a rank without a micro-batch in this micro-step


class MicroBatchStats(NamedTuple):
    """What a worker returns beside a micro-batch."""

    tokens: int
    trained: int
    samples: int
    media: int
    seconds: float
    broken: list[tuple[int, str]]


class Collator:
    """Task -> packed Batch. Picklable; sent once to each worker process.

    Random draws for a sample use `record.extra["seed"]`, which comes from (seed, epoch, sample id) alone and
    so does not depend on the worker, the rank or the world size.
    """

    def __init__(self, corpus: Any, chat: Any, data: Data, seed: int, rows: int, pixels: bool = True):
        self.corpus = corpus
        self.chat = chat
        self.on_error = data.on_error
        self.seed = seed
        self.rows = rows
        self.pixels = pixels
        self.streams = chat.streams
        self._unit_bytes = {stream.name: float(_UNIT_BYTES) if pixels else 0.0 for stream in self.streams}

    copies = False
    """Whether a filler is a sample of the step once more, without weight; else it is a padding_sample."""

    def padding(self, planned: int, id: int, reason: str | None) -> Sample:
        """A sample without weight; planned: tokens of the one that it replaces."""
        return padding_sample(max(1, min(2, planned)), self.rows, id, broken=reason)

    def join(self, samples: Sequence[Sample]) -> Batch:
        """Samples -> a micro-batch."""
        return pack(samples)

    def filler(self) -> Batch:
        """The batch of a rank without a micro-batch."""
        return self.join([self.padding(2, -1, None)])

    def bytes(self, index: Any, task: Task) -> int:
        """An estimate of the batch's bytes, improved by `learn`."""
        text = sum(s[3] for s in task.samples) * (20 + 8 * self.rows)
        return text + int(sum(n * self._unit_bytes[name] for name, n in self._media(index, task).items()))

    def _media(self, index: Any, task: Task) -> dict[str, int]:
        rows = [s[0] for s in task.samples]
        return {stream.name: int(index.media[stream.name][rows].sum()) for stream in self.streams}

    def learn(self, index: Any, task: Task, batch: Batch) -> None:
        """Take the bytes of a unit of media length from a finished batch."""
        lengths = self._media(index, task)
        for stream in self.streams:
            made = batch.get(stream.tensor)
            if made is not None and lengths[stream.name]:
                self._unit_bytes[stream.name] = made.numel() * made.element_size() / lengths[stream.name]

    def __call__(self, task: Task) -> tuple[Batch, MicroBatchStats]:
        began = time.perf_counter()
        samples: list[Sample] = []
        broken: list[tuple[int, str]] = []
        for id, record, piece, planned in task.samples:
            try:
                samples.append(self._sample(task.epoch, id, record, piece, planned))
            except PolymodalError as error:
                if self.on_error == "fail":
                    raise
                broken.append((id, error.message))
                samples.append(self.padding(planned, id, error.message))
        batch = self.join(samples)
        stats = MicroBatchStats(
            sum(s.measure.tokens for s in samples if not s.broken),
            int((batch["weights"] != 0).sum()),
            len(samples) - len(broken),
            sum(sum(counts) for counts in batch.groups["media"].values()),
            time.perf_counter() - began,
            broken,
        )
        return batch, stats

    def _sample(self, epoch: int, id: int, record: int, piece: int, planned: int) -> Sample:
        row = self.corpus[record]
        if piece >= 0:
            pieces = self.chat.pieces(row)
            row = pieces[min(piece, len(pieces) - 1)]
        row = replace(row, extra={**row.extra, "seed": key_of(self.seed, 5, epoch, id)})
        try:
            sample = self.chat.sample(row, id, self.pixels)
        except MemoryError:
            raise PolymodalError(
                f"{row.where}: too little memory to decode it.",
                "Lower data.workers, or the size of images and videos.",
            ) from None
        if sample.measure.tokens > planned:  # it might no longer fit its pack
            raise PolymodalError(
                f"{row.where}: the sample has {sample.measure.tokens} tokens, its index says {planned}: "
                "a file changed after it was measured.",
                "Remove the index (`.polymodal` beside the data, or data.cache_dir), so that lengths are "
                "measured again.",
            )
        return sample


@dataclass
class _Part:
    """A micro-batch of a planned step. task: None, it is finished; future: None, it is not submitted."""

    task: Task | None
    future: Future | None = None
    estimate: int = 0  # bytes

    @property
    def bytes(self) -> int:
        """Of the finished batch, else the estimate."""
        if self.future is None or not self.future.done() or self.future.exception() is not None:
            return self.estimate
        return _bytes(self.future.result()[0])


class _Step(NamedTuple):
    """A planned step."""

    plan: GlobalBatch
    flops: float
    parts: list[_Part]


LOOK_SECONDS = 30.0
"""Between two looks whether the data's files are as they were."""


def budget(chosen: int | None) -> int:
    """Bytes of prepared samples: of data.memory_budget in MiB, or what the machine has left for this rank."""
    if chosen is not None:
        return chosen << 20
    space, ranks = host.memory(), max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    share = space.free // 8 // ranks if space is not None else 0
    return min(max(share, 1 << 30), 8 << 30)


class Loader:
    """Iterates over RankStep for one data-parallel rank, in the plan's order, prepared ahead. Also a context
    manager.

    start: the first step; stop_after: number of steps (None: endless); rows: rows of position_ids (for
    padding samples); pixels: whether media are decoded, or only their sizes read; make: what makes batches
    of tasks in place of the packed text's Collator; device: an accelerator that the batches will be copied
    to (they are page-locked for it). At most data.prefetch steps are prepared or in work ahead of training;
    after the first of them, only as many as fit into data.memory_budget MiB together with it. Raises
    PolymodalError from __next__: a broken sample (data.on_error: fail), a dead worker.
    """

    def __init__(
        self,
        schedule: Schedule,
        corpus: Any,
        chat: Any,
        data: Data,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        start: Position = Position(),
        stop_after: int | None = None,
        rows: int = 1,
        pixels: bool = True,
        make: Any = None,
        device: torch.device | None = None,
    ):
        self.schedule = schedule
        self.corpus = corpus
        self.rank = dp_rank, dp_size
        self.rows = rows
        self.prefetch = data.prefetch
        self.budget = budget(data.memory_budget)
        self._plans = islice(schedule.batches(start), stop_after)
        self._steps: deque[_Step] = deque()  # planned and not returned yet
        self._warned: set[int | str] = set()  # samples; -1: of the memory budget; files that changed
        self._next_look = time.monotonic() + LOOK_SECONDS
        self._ended = False
        self._make = make if make is not None else Collator(corpus, chat, data, schedule.seed, rows, pixels)
        self._pool = Pool(self._make, data.workers, self._about, device)
        atexit.register(self.close)

    def __iter__(self) -> Iterator[RankStep]:
        return self

    def __next__(self) -> RankStep:
        if self._ended:
            raise StopIteration
        began = time.perf_counter()
        try:
            self._prepare()
            if not self._steps:
                raise StopIteration
            step = self._collect(self._steps[0])
            self._steps.popleft()
            self._prepare()
        except BaseException as error:
            self.close()
            if isinstance(error, PolymodalError) and (changed := self._changed()):
                raise PolymodalError(
                    f"{error.message} Since the run began, {changed}.",
                    "Put the data back as they were and start the same command again; or start a new run.",
                ) from error
            raise
        if self.rank[0] == 0 and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            if (changed := self._changed()) and changed not in self._warned:
                self._warned.add(changed)
                log.warning(
                    "While it is trained on, %s: rows may be others than those that were measured, and a "
                    "resumed run is refused unless they are put back.",
                    changed,
                )
        step.stats.wait_seconds = time.perf_counter() - began
        return step

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads and worker processes. May be called twice, and in the middle of an epoch."""
        self._ended = True
        atexit.unregister(self.close)
        self._pool.close()
        self._steps.clear()

    def _prepare(self) -> None:
        """Plan data.prefetch steps and submit their tasks in order: those of the first step in any case,
        others as far as data.memory_budget allows."""
        for plan in islice(self._plans, self.prefetch - len(self._steps)):
            self._steps.append(self._plan(plan))
        held = 0
        for number, part in enumerate(chain.from_iterable(step.parts for step in self._steps)):
            if part.future is None:
                assert part.task is not None
                part.estimate = self._make.bytes(self.schedule.index, part.task)
                if number >= len(self._steps[0].parts) and held + part.estimate > self.budget:
                    return
                part.future = self._pool.submit(part.task)
            held += part.bytes

    def _plan(self, plan: GlobalBatch) -> _Step:
        packs = plan.for_rank(*self.rank)
        costs = dict(zip(plan.packs, plan.cost, strict=True))
        index = self.schedule.index
        parts = []
        for ids in packs:
            filler = not ids
            if filler and not self._make.copies:
                ready: Future = Future()
                ready.set_result((self._make.filler(), None))
                parts.append(_Part(None, ready))
                continue
            if filler:
                ids = min(zip(plan.cost, plan.packs, strict=True))[1][:1]
            samples = tuple((i, *index.locate(i), int(index.tokens[i])) for i in ids)
            parts.append(_Part(Task(plan.position.epoch, samples, filler)))
        return _Step(plan, sum(costs.get(ids, 0.0) for ids in packs), parts)

    def _collect(self, step: _Step) -> RankStep:
        """Wait for a step's micro-batches."""
        wait([part.future for part in step.parts if part.future], return_when=FIRST_EXCEPTION)
        stats, batches = StepStats(flops=step.flops), []
        for part in step.parts:
            assert part.future is not None
            batch, made = part.future.result()
            batches.append(batch)
            stats.bytes += _bytes(batch)
            if part.task is None:
                continue
            self._make.learn(self.schedule.index, part.task, batch)
            stats.tokens += made.tokens
            stats.trained += made.trained
            stats.samples += made.samples
            stats.media += made.media
            stats.make_seconds += made.seconds
            for id, reason in made.broken:
                stats.broken.append(reason)
                if id not in self._warned:
                    self._warned.add(id)
                    log.warning("Left out, its place in the batch has no weight: %s", reason)
        if stats.bytes > self.budget and -1 not in self._warned:
            self._warned.add(-1)
            message = (
                "One step of this rank takes %d MiB, more than data.memory_budget (%d); nothing is prepared "
                "beyond it."
            )
            log.warning(message, stats.bytes >> 20, self.budget >> 20)
        return RankStep(step.plan.position, step.plan.next, batches, stats)

    def _changed(self) -> str:
        """Which of the data's files are not as they were, in words; "" for none."""
        found = [f"{path} was {how}" for path, how in self.corpus.changed().items()]
        return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")

    def _about(self, task: Task) -> str:
        places = [self.corpus.where(record) for _, record, _, _ in task.samples]
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        return "; ".join(places[:3]) + more


def _bytes(batch: Batch) -> int:
    return sum(t.numel() * t.element_size() for t in (*batch.tensors.values(), *batch.segments.values()))
