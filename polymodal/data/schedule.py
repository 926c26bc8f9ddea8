"""The plan of a run: the samples of each global batch, as a pure function of seed, lengths and recipe.

Nothing of the size of the data set is ever built: an epoch is a virtual list of draws, a keyed bijection
shuffles it, and one window of it is planned at a time.

How an epoch is made
* A dataset without weight gives `repeat` x its usable rows. Of a fractional repeat, the fraction is a fixed,
  seeded, stratified subset (one row of every stretch of the file).
* Datasets with weight are mixed by share: n = weight x max(rows x repeat / weight) draws, so that the one
  that is largest for its weight is used `repeat` times and the others come round again. What an epoch leaves
  over is where the next one goes on: after any number of epochs two rows of a dataset differ by at most one
  use.
* The draws are shuffled by (seed, epoch); with data.shuffle false they keep the order of the recipe and the
  files.

How a window is closed
* No window looks at another one, so a run resumes anywhere by planning one window, and none drops a sample.
* Packed: every window has a whole number of global batches: its fullest packs are cut in two until it has.
  Packs are not padded, so that costs no arithmetic, and no step is made of a few odd packs. A window holds
  at least eight global batches (data.window is raised for that), hence the average batch is at most a
  sixteenth smaller than asked.
* Not packed: windows are multiples of the global batch; only the last batch of an epoch may be smaller.
  by_length: samples of like length come together in a micro-batch, where these are padded to the longest.
* In buckets (samples of one shape to a micro-batch): a window's samples are cut bucket by bucket, so that
  the last micro-batch of a bucket, and the last batch of a window, may be smaller. No bucket is left out.
* Only where a window has fewer samples than a batch has packs (a tiny data set) is a packed batch smaller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.data.packing import cut_to_multiple, first_fit_decreasing, next_fit
from polymodal.data.permute import key_of, permute, scramble
from polymodal.recipe import Data, Train

_BATCHES_A_WINDOW = 8
_ALIKE = 64  # micro-batches among whose samples those of like length are put together

DECIDING_KEYS = (
    "train.seed",
    "train.global_batch_size",
    "train.micro_batch_size",
    "model.source",
    "model.revision",
    "data.datasets",
    "data.attr",
    "data.max_length",
    "data.overlong",
    "data.pack",
    "data.pack_length",
    "data.train_on",
    "train.objective",
    "train.preference.pairs",
    "train.preference.min_gap",
    "train.grpo.group",
    "train.grpo.max_new_tokens",
    "data.on_error",
    "data.image",
    "data.video",
    "data.clip",
    "data.features",
    "data.chat_template",
    "data.template_kwargs",
    "data.shuffle",
    "data.window",
)
"""Keys of the recipe that decide which samples make up a batch: by themselves, or by the samples' lengths."""


@dataclass(frozen=True, order=True)
class Position:
    """The whole data state of a run: the next global batch to train on. `Position(**asdict(p)) == p` through
    JSON."""

    epoch: int = 0
    window: int = 0
    step: int = 0  # global batch inside the window


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's samples, the same whatever the world size.

    packs: sample ids of each micro-batch; cost: FLOPs of each (the sum over its samples).
    """

    position: Position
    next: Position
    packs: tuple[tuple[int, ...], ...]
    cost: tuple[float, ...]

    def for_rank(self, dp_rank: int, dp_size: int) -> list[tuple[int, ...]]:
        """The micro-batches of one data-parallel rank; all ranks get ceil(packs / dp_size), () is a filler.

        Ranks wait for each other in every micro-step, so a step takes the sum over micro-steps of the
        dearest pack:
        smallest when packs of like cost share a micro-step, hence the cut of the packs sorted by cost.
        Inside a micro-step the rank with the least work so far takes the dearest pack. Fillers fall into the
        last one.
        """
        order = sorted(range(len(self.packs)), key=lambda i: (-self.cost[i], i))
        load = [0.0] * dp_size
        mine: list[tuple[int, ...]] = []
        for start in range(0, len(order), dp_size):
            group = order[start : start + dp_size]
            ranks = sorted(range(dp_size), key=lambda r: (load[r], r))
            pack: tuple[int, ...] = ()
            for rank, i in zip(ranks, group, strict=False):
                load[rank] += self.cost[i]
                if rank == dp_rank:
                    pack = self.packs[i]
            mine.append(pack)
        return mine


class EpochShare(NamedTuple):
    """What one dataset gives to an epoch."""

    name: str
    usable: int  # rows that can be trained on
    draws: int  # samples taken from it in an epoch


class IndexLike(Protocol):
    """What planning and loading need to know of the samples (polymodal.data.index.Index has it)."""

    tokens: np.ndarray  # int32 [N]
    trained: np.ndarray  # int32 [N]
    media: Mapping[str, np.ndarray]  # stream -> sum of its lengths, int32 [N]
    usable: np.ndarray  # bool [N]
    record: np.ndarray | None  # int64 [N], ascending: the corpus' record of each row; None = the row itself

    def measure(self, i: int) -> SampleLengths: ...

    def locate(self, i: int) -> tuple[int, int]: ...  # row -> (record, piece or -1)


class _Plan(NamedTuple):
    rows: np.ndarray  # int64: samples in the order they are trained on
    cuts: np.ndarray  # int64 [packs + 1]: where packs begin and end in `rows`
    per_batch: int  # packs in a global batch

    @property
    def steps(self) -> int:
        return -(-(len(self.cuts) - 1) // self.per_batch)


class Schedule:
    """Endless, random-access generator of global batches. Every process builds the same one.

    index: lengths; parts: the datasets in records of the corpus (name, start, stop, weight, repeat,
    fingerprint); cost: FLOPs of a sample, for the balance between ranks only; by_length: see above. Raises
    PolymodalError when nothing is usable or pack_length is smaller than max_length.
    """

    def __init__(
        self,
        index: IndexLike,
        parts: Sequence[Any],
        data: Data,
        train: Train,
        cost: Callable[[SampleLengths], float],
        by_length: bool = False,
    ):
        self.index = index
        self.seed = train.seed
        self.shuffle = data.shuffle
        self.bucket: np.ndarray | None = getattr(index, "bucket", None)
        self.pack = data.pack and self.bucket is None
        self.pack_length = data.pack_length or data.max_length
        self.batch = train.global_batch_size
        self.micro = train.micro_batch_size
        self.by_length = by_length and data.shuffle and self.micro > 1
        self._cost = cost
        if self.pack and self.pack_length < data.max_length:
            raise PolymodalError(
                f"data.pack_length = {self.pack_length} is smaller than data.max_length = {data.max_length}: "
                "a sample could be longer than its pack.",
                f"Raise data.pack_length to {data.max_length}, or lower data.max_length.",
            )
        self._sources = _sources(index, parts, self.seed)
        self.shares = [EpochShare(s.name, s.usable, s.draws) for s in self._sources]
        self.draws = sum(s.draws for s in self._sources)
        if not self.draws:
            raise PolymodalError(
                "No sample of the data can be trained on.",
                "The list of what was left out (`polymodal check`) says why; often data.max_length is too "
                "small or data.train_on matches no message.",
            )
        self._bounds = np.cumsum([0] + [s.draws for s in self._sources])
        self._window = self._window_size(data.window)
        self.windows = max(1, -(-self.draws // self._window))
        self._steps: dict[int, int] = {}
        self._latest: tuple[tuple[int, int], _Plan] | None = None
        keys: tuple = (
            self.seed,
            self.shuffle,
            self.pack,
            self.pack_length,
            self.batch,
            self.micro,
            self._window,
        )
        keys += ("by length",) * self.by_length
        if self.bucket is not None:
            keys += (hashlib.sha256(self.bucket.tobytes()).hexdigest(),)
        prints = [(p.fingerprint, s.usable, s.draws) for p, s in zip(parts, self._sources, strict=True)]
        self.fingerprint: str = hashlib.sha256(repr((keys, prints)).encode()).hexdigest()[:16]
        """Schedules of equal fingerprints and lengths plan the same batches: a checkpoint keeps both beside
        its position."""
        self.lengths: str = _lengths(index, self.pack)

    def _window_size(self, asked: int) -> int:
        if not self.pack:
            return max(1, asked // self.batch) * self.batch
        tokens = rows = 0  # an estimate from rows evenly spread: a full count would grow with the data
        for s in self._sources:
            chosen = slice(s.first, s.stop, max(1, (s.stop - s.first) >> 14))
            usable = self.index.usable[chosen]
            mean = self.index.tokens[chosen][usable].sum(dtype=np.int64) / max(1, np.count_nonzero(usable))
            tokens += mean * s.draws
            rows += s.draws
        a_pack = max(1.0, self.pack_length * rows / max(1, tokens))  # samples in a full pack
        return max(asked, int(np.ceil(_BATCHES_A_WINDOW * self.batch * a_pack)))

    def batches(self, start: Position = Position(), epochs: int | None = None) -> Iterator[GlobalBatch]:
        """Global batches from `start` on: over all epochs for ever, or until epoch `epochs` would begin."""
        if start.window >= self.windows or min(astuple(start)) < 0:
            raise PolymodalError(
                f"The run to be resumed stopped in window {start.window} of an epoch, but the data now fill "
                f"{self.windows}.",
                "Resume with the data and the data keys the run began with, or start anew from its weights "
                "(checkpoint.init_from).",
            )
        epoch, window, step = astuple(start)
        while epochs is None or epoch < epochs:
            while window < self.windows:
                plan = self._plan(epoch, window)
                while step < plan.steps:
                    yield self._batch(plan, Position(epoch, window, step))
                    step += 1
                window, step = window + 1, 0
            epoch, window = epoch + 1, 0

    def mean_sample(self) -> SampleLengths:
        """The mean sample: of at most 16,384 usable rows of each dataset, evenly spread."""
        rows = [np.arange(s.first, s.stop, max(1, (s.stop - s.first) >> 14)) for s in self._sources]
        chosen = np.concatenate(rows)
        chosen = chosen[self.index.usable[chosen]]

        def mean(column: np.ndarray) -> int:
            return int(np.mean(column[chosen], dtype=np.float64)) if len(chosen) else 0

        media = {stream: (mean(column),) for stream, column in self.index.media.items() if mean(column)}
        return SampleLengths(max(1, mean(self.index.tokens)), mean(self.index.trained), media)

    def steps_in_epoch(self, epoch: int = 0) -> int:
        """Global batches of an epoch, exactly. Packed, this plans every window (about 0.1 s each) and
        remembers."""
        if not self.pack and self.bucket is None:
            return -(-self.draws // self.batch)
        if epoch not in self._steps:
            self._steps[epoch] = sum(self._plan(epoch, w).steps for w in range(self.windows))
        return self._steps[epoch]

    def steps_in(self, epochs: float) -> int:
        """Global batches of so many epochs, a broken one rounded up; at least one."""
        whole, part = int(epochs), epochs - int(epochs)
        steps = sum(self.steps_in_epoch(epoch) for epoch in range(whole))
        return max(1, steps + (math.ceil(part * self.steps_in_epoch(whole)) if part else 0))

    def _batch(self, plan: _Plan, at: Position) -> GlobalBatch:
        last = at.step + 1 == plan.steps
        if not last:
            following = Position(at.epoch, at.window, at.step + 1)
        elif at.window + 1 < self.windows:
            following = Position(at.epoch, at.window + 1, 0)
        else:
            following = Position(at.epoch + 1, 0, 0)
        cuts = plan.cuts[at.step * plan.per_batch : (at.step + 1) * plan.per_batch + 1].tolist()
        packs = tuple(tuple(plan.rows[a:b].tolist()) for a, b in zip(cuts[:-1], cuts[1:], strict=True))
        cost = tuple(float(sum(self._cost(self.index.measure(i)) for i in pack)) for pack in packs)
        return GlobalBatch(at, following, packs, cost)

    def _plan(self, epoch: int, window: int) -> _Plan:
        if self._latest is None or self._latest[0] != (epoch, window):
            self._latest = (epoch, window), self._planned(epoch, window)
        return self._latest[1]

    def _planned(self, epoch: int, window: int) -> _Plan:
        if self.pack:
            return self._packed(epoch, window)
        rows = self._rows(epoch, window * self._window, min((window + 1) * self._window, self.draws))
        if self.bucket is not None:
            return self._bucketed(rows, epoch, window)
        if self.by_length:
            rows = self._sorted_in_stretches(rows, epoch, window)
        batches = np.arange(0, len(rows), self.batch)
        inside = np.arange(0, self.batch, self.micro)
        cuts = (batches[:, None] + inside).ravel()
        return _Plan(rows, np.append(cuts[cuts < len(rows)], len(rows)), len(inside))

    def _packed(self, epoch: int, window: int) -> _Plan:
        start, stop = (self.draws * w // self.windows for w in (window, window + 1))  # windows of equal size
        rows = self._rows(epoch, start, stop)
        lengths = np.maximum(self.index.tokens[rows], 1)
        if not self.shuffle:
            cuts = cut_to_multiple(lengths, next_fit(lengths, self.pack_length), self.batch)
            return _Plan(rows, cuts, self.batch)
        jittered = self._jittered(lengths, epoch, window)
        order, cuts = first_fit_decreasing(lengths, self.pack_length, jittered)
        rows = rows[order]
        cuts = cut_to_multiple(lengths[order], cuts, self.batch)
        packs = self._shuffled(len(cuts) - 1, epoch, window)
        return _Plan(*_reordered(rows, cuts, packs), self.batch)

    def _shuffled(self, count: int, epoch: int, window: int) -> np.ndarray:
        """0..count-1 in this window's random order of its micro-batches."""
        numbers = np.arange(count, dtype=np.uint64) + np.uint64(key_of(self.seed, 2, epoch, window))
        return np.argsort(scramble(numbers), kind="stable")

    def _sorted_in_stretches(self, rows: np.ndarray, epoch: int, window: int) -> np.ndarray:
        """Rows in another order, so that those of a micro-batch have like lengths: sorted within stretches
        of many micro-batches, which then come in random order. The last one, where it is smaller, stays the
        last."""
        stretch = np.arange(len(rows)) // (self.micro * _ALIKE)
        rows = rows[np.lexsort((self.index.tokens[rows], stretch))]
        whole = len(rows) // self.micro
        order = self._shuffled(whole, epoch, window)
        filled = rows[: whole * self.micro].reshape(whole, self.micro)[order].ravel()
        return np.concatenate([filled, rows[whole * self.micro :]])

    def _bucketed(self, rows: np.ndarray, epoch: int, window: int) -> _Plan:
        """Micro-batches of one bucket each, in random order, or without shuffling by their first sample's
        place."""
        assert self.bucket is not None
        bucket = self.bucket[rows]
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.unique(bucket, return_counts=True)[1])
        starts = np.append(0, ends[:-1])
        firsts = [np.arange(a, b, self.micro) for a, b in zip(starts, ends, strict=True)]
        cuts = np.append(np.concatenate(firsts), len(rows))
        if self.shuffle:
            packs = self._shuffled(len(cuts) - 1, epoch, window)
        else:
            packs = np.argsort(order[cuts[:-1]], kind="stable")
        return _Plan(*_reordered(rows[order], cuts, packs), -(-self.batch // self.micro))

    def _jittered(self, lengths: np.ndarray, epoch: int, window: int) -> np.ndarray:
        """Lengths as packing sorts them: up to a tenth longer, at random.

        By its exact length a sample of a small data set would meet the same neighbours in every epoch (four
        fifths of the packs of 300 log-normal samples are alike, with this one in six; packs stay as full).
        """
        key = np.uint64(key_of(self.seed, 4, epoch, window))
        chance = scramble(np.arange(len(lengths), dtype=np.uint64) + key) % np.uint64(1024)
        return lengths.astype(np.int64) * (10240 + chance.astype(np.int64))

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Index rows of the draws start..stop of an epoch, in the epoch's order, int64."""
        draw = np.arange(start, stop, dtype=np.uint64)
        if self.shuffle:
            draw = permute(draw, self.draws, key_of(self.seed, 1, epoch))
        draw = draw.astype(np.int64)
        source = np.searchsorted(self._bounds, draw, side="right") - 1
        rows = np.empty(len(draw), dtype=np.int64)
        for number in np.unique(source):
            here = source == number
            rows[here] = self._sources[number].rows(draw[here] - self._bounds[number], epoch, self.shuffle)
        return rows


def _reordered(rows: np.ndarray, cuts: np.ndarray, packs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, cuts) with the packs in another order."""
    sizes = np.diff(cuts)[packs]
    ends = np.cumsum(sizes)
    places = np.repeat(cuts[:-1][packs] - (ends - sizes), sizes) + np.arange(len(rows))
    return rows[places], np.append(0, ends)


@dataclass
class _Source:
    """One dataset as a virtual list of draws. Holds the positions of its unusable rows (or usable, if
    fewer)."""

    name: str
    first: int
    stop: int
    usable: int
    listed: np.ndarray  # usable positions, or unusable ones each less its number
    lists_usable: bool
    weighted: bool
    repeat: float
    key: int
    draws: int

    def rows(self, draw: np.ndarray, epoch: int, shuffle: bool) -> np.ndarray:
        if self.weighted:
            draw = draw + epoch * self.draws  # one endless walk over the rows, pass after pass
            which = draw % self.usable
            if shuffle:
                keys = scramble((draw // self.usable).astype(np.uint64) + np.uint64(self.key))
                which = permute(which.astype(np.uint64), self.usable, keys).astype(np.int64)
        else:
            which = draw % self.usable
            whole = int(self.repeat) * self.usable
            part = draw >= whole  # the fraction: stretch j of the file gives one row of its own
            if part.any():
                j, count = draw[part] - whole, self.draws - whole
                low, high = j * self.usable // count, (j + 1) * self.usable // count
                chance = scramble(j.astype(np.uint64) + np.uint64(self.key)) % (high - low).astype(np.uint64)
                which[part] = low + chance.astype(np.int64)
        if self.lists_usable:
            return self.first + self.listed[which].astype(np.int64)
        return self.first + which + np.searchsorted(self.listed, which, side="right")


def _sources(index: IndexLike, parts: Sequence[Any], seed: int) -> list[_Source]:
    usable, record = index.usable, getattr(index, "record", None)
    sources = []
    for number, part in enumerate(parts):
        first, stop = part.start, part.stop
        if record is not None:  # parts count records, a split record has several rows
            first, stop = (int(r) for r in np.searchsorted(record, (part.start, part.stop)))
        count = int(np.count_nonzero(usable[first:stop]))
        lists_usable = 2 * count < stop - first
        listed = _positions(usable, first, stop, lists_usable)
        if not lists_usable:
            listed -= np.arange(len(listed))
        weighted, key = part.weight is not None, key_of(seed, 3, number)
        draws = max(1, round(part.repeat * count)) if count and not weighted else 0
        sources.append(
            _Source(part.name, first, stop, count, listed, lists_usable, weighted, part.repeat, key, draws)
        )
    mixed = [(s, p.weight) for s, p in zip(sources, parts, strict=True) if s.weighted and s.usable]
    scale = max((s.usable * s.repeat / weight for s, weight in mixed), default=0.0)
    for s, weight in mixed:
        s.draws = max(1, round(scale * weight))
    return sources


def _lengths(index: IndexLike, pack: bool) -> str:
    """Digest of what the index says of samples that decides the batches: which are usable and, packed, their
    tokens."""
    digest = hashlib.sha256()
    for a in range(0, len(index.usable), 1 << 16):
        rows = slice(a, a + (1 << 16))
        digest.update(np.packbits(index.usable[rows]).tobytes())
        if pack:
            digest.update(np.ascontiguousarray(index.tokens[rows], dtype="<i4").tobytes())
    return digest.hexdigest()[:16]


def _positions(usable: np.ndarray, first: int, stop: int, value: bool) -> np.ndarray:
    """Where usable[first:stop] is `value`, int64; scanned in blocks."""
    starts = range(first, stop, 1 << 16)
    blocks = [np.flatnonzero(usable[a : min(a + (1 << 16), stop)] == value) + (a - first) for a in starts]
    return np.concatenate(blocks) if blocks else np.empty(0, np.int64)
