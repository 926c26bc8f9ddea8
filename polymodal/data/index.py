"""The length of every sample, measured once in parallel, without decoding pixels, and cached beside the data
by content.

One process of a node measures while the others wait at a lock file: a lock has no time-out, unlike a
barrier, and is released when its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from typing import Any

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.core.terminal import Bar
from polymodal.data.index_file import Problem, Progress, cache_directory, cache_places, lock, read, write
from polymodal.data.workers import quiet_threads
from polymodal.recipe import Data

VERSION = 3  # of the file's form: part of its key
UNTRAINED = "no token of it is trained on (data.train_on)"
_CHUNK = 256  # records a task
_START_SECONDS = 8.0  # that must be saved by starting processes
Row = tuple[int, int, SampleLengths]
"""Record, piece of it or -1, lengths."""
Measured = tuple[list[Row], list[Problem]]
"""Rows of some records; problems by row among these."""


class Index:
    """Compact lengths of all rows. A row is a record, or one piece of a record that was split.

    tokens, trained: int32 [N]; media: stream -> sum of its lengths in each row, int32 [N]; record int64 [N]
    and piece int32 [N] (-1 = whole), both None without split records; usable bool [N]; problems: the broken
    rows. The arrays are views of the mapped cache file: read-only.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        problems: Sequence[Problem],
        data: Data,
        corpus: Any = None,
        key: str = "",
    ):
        self.tokens, self.trained = columns["tokens"], columns["trained"]
        names = [name.partition("/")[2] for name in columns if name.startswith("media/")]
        self.media = {name: columns[f"media/{name}"] for name in names}
        self._lengths = {name: (columns[f"lengths/{name}"], columns[f"offsets/{name}"]) for name in names}
        self._shapes = columns.get("shape")
        self.record: np.ndarray | None = columns.get("record")
        self.piece: np.ndarray | None = columns.get("piece")
        self.problems = tuple(problems)
        self.max_length = data.max_length
        self.overlong = data.overlong
        self.key = key
        self.corpus = corpus
        self.usable = (self.tokens <= self.max_length) & (self.trained > 0)
        self.usable[[p.row for p in self.problems]] = False

    def __len__(self) -> int:
        return len(self.tokens)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "corpus": None}

    def measure(self, i: int) -> SampleLengths:
        """Lengths of row i."""
        media = {}
        for stream, (values, offsets) in self._lengths.items():
            if offsets[i] < offsets[i + 1]:
                media[stream] = tuple(values[offsets[i] : offsets[i + 1]].tolist())
        shape = () if self._shapes is None else tuple(self._shapes[3 * i : 3 * i + 3].tolist())
        return SampleLengths(int(self.tokens[i]), int(self.trained[i]), media, shape)

    def locate(self, i: int) -> tuple[int, int]:
        """Row -> (record of the corpus, piece of it); piece -1 is the whole record."""
        if self.record is None or self.piece is None:
            return i, -1
        return int(self.record[i]), int(self.piece[i])

    def shapes(self) -> np.ndarray:
        """(frames, height, width) of each row of what is to be generated, int32 [N, 3]; zeros where it is
        broken."""
        return np.zeros((len(self), 3), np.int32) if self._shapes is None else self._shapes.reshape(-1, 3)

    @property
    def too_long(self) -> str:
        cut = " even when split between messages" if self.overlong == "split" else ""
        return f"longer than data.max_length = {self.max_length}{cut}"

    @cached_property
    def dropped(self) -> dict[str, list[str]]:
        """Why rows are not usable -> where they are, complete: the lengths of the lists are the counts."""
        out: dict[str, list[str]] = {}
        broken = np.zeros(len(self), dtype=bool)
        for problem in self.problems:
            broken[problem.row] = True
            out.setdefault(problem.reason, []).append(problem.where)
        longer = (self.tokens > self.max_length) & ~broken
        for reason, rows in ((self.too_long, longer), (UNTRAINED, (self.trained <= 0) & ~broken & ~longer)):
            numbers = np.flatnonzero(rows).tolist()
            if numbers:
                out[reason] = [self.where(i) for i in numbers]
        return out

    def where(self, i: int) -> str:
        """File and line of row i, and its piece if it was split."""
        record, piece = self.locate(i)
        place = self.corpus.where(record) if self.corpus is not None else f"record {record + 1}"
        return place if piece < 0 else f"{place}, piece {piece + 1}"


def build_index(
    corpus: Any,
    chat: Any,
    data: Data,
    *,
    rank: int = 0,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Index:
    """Lengths of every record of the corpus, from the cache or measured now.

    rank: only rank 0 draws the progress bar; progress(done, total) replaces it. processes: measuring
    processes (default: the cores this process may use). Every rank calls it; one a node measures, no barrier
    is needed. Raises PolymodalError for broken records (data.on_error: fail) and overlong ones
    (data.overlong: error), naming the first and counting all; what was measured is cached even then, so that
    every rank raises the same.
    """
    key = cache_key(corpus, chat, data)
    name = f"{key}.arrow"
    found = next((f for f in (read(place / name, key) for place in cache_places(data)) if f), None)
    if found is None:
        path = cache_directory(data) / name
        with _bar(len(corpus), rank, progress) as report, lock(path.with_suffix(".lock"), report) as publish:
            found = read(path, key)  # another process may have measured it meanwhile
            if found is None:
                columns, problems = _measure_all(corpus, chat, data, publish, processes)
                write(path, key, columns, problems)
                found = read(path, key) or (columns, problems)
    index = Index(*found, data, corpus, key)
    _refuse(index, corpus, data)
    return index


def cache_key(corpus: Any, chat: Any, data: Data) -> str:
    """Hash of all that lengths depend on: the files, the processor, and the data keys that change a
    sample."""
    keys = {
        "version": VERSION,
        "parts": [(p.start, p.stop, p.fingerprint) for p in corpus.parts],
        "chat": chat.fingerprint,
        "train_on": data.train_on,
        "split": data.max_length if data.overlong == "split" else None,
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]


def _refuse(index: Index, corpus: Any, data: Data) -> None:
    if index.problems and data.on_error == "fail":
        count = len(index.problems)
        rest = f" It is the first of {count} broken records among {len(corpus)}." if count > 1 else ""
        raise PolymodalError(
            f"{index.problems[0]}.{rest}",
            "Correct or remove what is broken (`polymodal data check` lists it), or set data.on_error to "
            "skip.",
        )
    if data.overlong == "error":
        longer = np.flatnonzero(index.tokens > data.max_length)
        if len(longer):
            first, most = int(longer[0]), int(index.tokens[longer].max())
            raise PolymodalError(
                f"{index.where(first)}: the sample has {index.tokens[first]} tokens, more than "
                f"data.max_length = {data.max_length}; so have {len(longer)} of {len(index)} samples, "
                f"the longest {most}.",
                f"Set data.max_length to {most}, lower data.image.max_pixels, or set data.overlong to drop "
                "or split.",
            )


# Measuring ------------------------------------------------------------------

_measuring: Any = None  # corpus, chat and data of a measuring process: sent once, not with every task


def _start(*context: Any) -> None:
    global _measuring
    _measuring = context
    import torch

    torch.set_num_threads(1)


def _measure_here(span: tuple[int, int]) -> Measured:
    corpus, chat, data = _measuring
    return _measure_chunk(corpus, chat, data, *span)


def _measure_chunk(corpus: Any, chat: Any, data: Data, start: int, stop: int) -> Measured:
    """Rows of records start..stop."""
    records: dict[int, Any] = {}
    rows: list[Row] = []
    problems: list[Problem] = []

    def add(record: int, piece: int, measure: SampleLengths | str) -> None:
        if isinstance(measure, str):
            where = corpus.where(record)
            reason = measure.removeprefix(f"{where}: ").rstrip(".")
            problems.append(Problem(len(rows), where, reason))
            measure = SampleLengths(0, 0)
        rows.append((record, piece, measure))

    measures: dict[int, SampleLengths | str] = {}
    for i in range(start, stop):
        try:
            records[i] = corpus[i]
        except PolymodalError as error:
            measures[i] = error.message
    measures |= zip(records, chat.measure(list(records.values())), strict=True)
    for i in range(start, stop):
        measure = measures[i]
        if data.overlong != "split" or isinstance(measure, str) or measure.tokens <= data.max_length:
            add(i, -1, measure)
            continue
        try:
            pieces = chat.pieces(records[i])
        except PolymodalError as error:
            add(i, -1, error.message)
            continue
        for number, piece in enumerate(chat.measure(pieces)):
            add(i, number, piece)
    return rows, problems


def _measure_all(
    corpus: Any, chat: Any, data: Data, report: Progress, processes: int | None
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    total = len(corpus)
    streams = [stream.name for stream in chat.streams]
    if processes is None:
        affinity = getattr(os, "sched_getaffinity", None)
        processes = len(affinity(0)) if affinity else os.cpu_count() or 1
    blocks: list[dict[str, np.ndarray]] = []
    problems: list[Problem] = []
    rows_done = 0
    report(0, total)
    for done, (rows, new) in _measured(corpus, chat, data, processes):
        blocks.append(_columns(rows, streams))
        problems += [problem._replace(row=problem.row + rows_done) for problem in new]
        rows_done += len(rows)
        report(done, total)
    blocks = blocks or [_columns([], streams)]
    out = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    for name in [name for name in out if name.startswith("offsets/")]:
        out[name] = np.append(0, np.cumsum(out[name], dtype=np.int64))
    if not out["shape"].any():
        del out["shape"]
    if not (out["piece"] >= 0).any():
        del out["record"], out["piece"]  # every row is its record
    return out, problems


def _measured(corpus: Any, chat: Any, data: Data, processes: int) -> Iterator[tuple[int, Measured]]:
    """(records done, rows of the last of them) in order: here, and by processes where that is worth their
    start."""
    total = len(corpus)
    began = time.monotonic()
    for start in range(0, total, _CHUNK):
        elapsed = time.monotonic() - began
        if start and elapsed / start * (total - start) * (1 - 1 / processes) > _START_SECONDS:
            break
        stop = min(start + _CHUNK, total)
        yield stop, _measure_chunk(corpus, chat, data, start, stop)
    else:
        return
    import torch.multiprocessing as mp

    spans = [(first, min(first + _CHUNK, total)) for first in range(start, total, _CHUNK)]
    with quiet_threads():
        context = mp.get_context("spawn")
        pool = ProcessPoolExecutor(min(processes, len(spans)), context, _start, (corpus, chat, data))
        try:
            for (_, stop), rows in zip(spans, pool.map(_measure_here, spans), strict=True):
                yield stop, rows
        except BrokenProcessPool:
            raise PolymodalError(
                "A process that measured the data was killed, most likely because the machine or container "
                "ran out of memory.",
                "Give the job more memory or fewer cores; what was measured so far is lost.",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _columns(rows: list[Row], streams: Sequence[str]) -> dict[str, np.ndarray]:
    """Rows as arrays; `offsets/<stream>` holds the number of lengths of each row here, their sums later."""
    record, piece, lengths = zip(*rows, strict=True) if rows else ((), (), ())
    out = {
        "record": np.array(record, dtype=np.int64),
        "piece": np.array(piece, dtype=np.int32),
        "tokens": np.array([each.tokens for each in lengths], dtype=np.int32),
        "trained": np.array([each.trained for each in lengths], dtype=np.int32),
        "shape": np.array([x for each in lengths for x in (each.shape or (0, 0, 0))], dtype=np.int32),
    }
    for stream in streams:
        own = [each.media.get(stream, ()) for each in lengths]
        out[f"media/{stream}"] = np.array([sum(values) for values in own], dtype=np.int32)
        out[f"offsets/{stream}"] = np.array([len(values) for values in own], dtype=np.int64)
        out[f"lengths/{stream}"] = np.array([x for values in own for x in values], dtype=np.int32)
    return out


@contextlib.contextmanager
def _bar(total: int, rank: int, progress: Progress | None) -> Iterator[Progress]:
    if progress is not None or rank != 0:
        yield progress or (lambda done, total: None)
        return
    with Bar("Measuring lengths", total) as bar:
        yield bar.update
