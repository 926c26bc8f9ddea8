"""The length of every sample, measured once, cached beside the data by content.

Sees the ground floor and its neighbours in `data`. Measures in parallel, without decoding pixels (that is the chat
processor's craft). One process of a node measures while the others wait at a lock file: a lock has no time-out, unlike
a barrier, and dies with its holder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from typing import Any

import numpy as np

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import SampleLengths
from polymodal.data.index_file import Problem, Progress, cache_directory, cache_places, lock, read, write
from polymodal.data.workers import quiet_threads
from polymodal.recipe import Data

VERSION = 3  # of the file's form: part of its key
UNTRAINED = "no token of it is trained on (data.train_on)"
_CHUNK = 256  # records a task
_START_SECONDS = 8.0  # more than this must be saved by it before processes are started


class Index:
    """Compact lengths of all rows. A row is a record, or one piece of a record that was split.

    tokens, trained: int32 [N]; media: stream -> sum of its lengths in each row, int32 [N]; record int64 [N] and piece int32 [N] (-1 = whole), both None without split records;
    usable bool [N]; problems: the broken rows. The arrays are views of the mapped cache file: read-only.
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
        """(frames, height, width) of each row of what is to be generated, int32 [N, 3]; zeros where it is broken."""
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

    rank: only rank 0 draws the progress bar; progress(done, total) replaces it. processes: measuring processes
    (default: the cores this process may use). Every rank calls it; one a node measures, no barrier is needed.
    Raises PolymodalError for broken records (data.on_error: fail) and overlong ones (data.overlong: error), naming
    the first and counting all; what was measured is cached even then, so that every rank says the same at once.
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
    """Hash of all that lengths depend on: the files, the processor, and the data keys that change a sample."""
    keys = {
        "version": VERSION,
        "parts": [(p.start, p.stop, p.fingerprint) for p in corpus.parts],
        "chat": chat.fingerprint,
        "train_on": data.train_on,
        "split": data.max_length
        if data.overlong == "split"
        else None,  # else lengths do not depend on the limit
    }
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:32]


def _refuse(index: Index, corpus: Any, data: Data) -> None:
    if index.problems and data.on_error == "fail":
        count = len(index.problems)
        rest = f" It is the first of {count} broken records among {len(corpus)}." if count > 1 else ""
        raise PolymodalError(
            f"{index.problems[0]}.{rest}",
            "Mend or remove what is broken (`polymodal data check` lists it all), or set data.on_error to skip.",
        )
    if data.overlong == "error":
        longer = np.flatnonzero(index.tokens > data.max_length)
        if len(longer):
            first, most = int(longer[0]), int(index.tokens[longer].max())
            raise PolymodalError(
                f"{index.where(first)}: the sample has {index.tokens[first]} tokens, more than data.max_length = {data.max_length}; so have {len(longer)} of {len(index)} samples, the longest {most}.",
                f"Set data.max_length to {most}, lower data.image.max_pixels, or set data.overlong to drop or split.",
            )


# Measuring -----------------------------------------------------------------------------------------------------------

_corpus: Any = None  # of a measuring process: sent once, not with every task
_chat: Any = None
_data: Any = None


def _start(corpus: Any, chat: Any, data: Data) -> None:
    global _corpus, _chat, _data
    _corpus, _chat, _data = corpus, chat, data
    import torch

    torch.set_num_threads(1)


Row = tuple[int, int, SampleLengths]
"""Record, piece of it or -1, lengths."""


def _measure_here(start: int, stop: int) -> tuple[list[Row], list[Problem]]:
    return _measure_chunk(_corpus, _chat, _data, start, stop)


def _measure_chunk(corpus: Any, chat: Any, data: Data, start: int, stop: int) -> tuple[list, list[Problem]]:
    """Rows of records start..stop; problems by row here."""
    records: list[Any] = []
    for i in range(start, stop):
        try:
            records.append(corpus[i])
        except PolymodalError as error:
            records.append(error.message)
    good = [r for r in records if not isinstance(r, str)]
    measures = iter(chat.measure(good))
    rows: list[Row] = []
    problems: list[Problem] = []

    def add(record: int, piece: int, where: str, measure: SampleLengths | str) -> None:
        if isinstance(measure, str):
            reason = measure.removeprefix(f"{where}: ").rstrip(".")
            problems.append(Problem(len(rows), where, reason))
            measure = SampleLengths(0, 0)
        rows.append((record, piece, measure))

    for i, record in enumerate(records, start):
        if isinstance(record, str):
            add(i, -1, corpus.where(i), record)
            continue
        measure = next(measures)
        if data.overlong == "split" and not isinstance(measure, str) and measure.tokens > data.max_length:
            try:
                pieces = chat.pieces(record)
            except PolymodalError as error:
                add(i, -1, record.where, error.message)
                continue
            for number, piece in enumerate(chat.measure(pieces)):
                add(i, number, record.where, piece)
        else:
            add(i, -1, record.where, measure)
    return rows, problems


def _measure_all(
    corpus: Any, chat: Any, data: Data, report: Progress, processes: int | None
) -> tuple[dict[str, np.ndarray], list[Problem]]:
    total = len(corpus)
    streams = [stream.name for stream in chat.streams]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes if processes is not None else cores
    blocks: list[dict[str, np.ndarray]] = []
    problems: list[Problem] = []
    rows_done = done = 0
    report(0, total)

    def keep(result: tuple[list, list[Problem]], records: int) -> None:
        nonlocal rows_done, done
        rows, found = result
        blocks.append(_columns(rows, streams))
        problems.extend(p._replace(row=p.row + rows_done) for p in found)
        rows_done += len(rows)
        done += records
        report(done, total)

    began = time.monotonic()
    while done < total:
        elapsed = time.monotonic() - began
        if done and elapsed / done * (total - done) * (1 - 1 / processes) > _START_SECONDS:
            break
        stop = min(done + _CHUNK, total)
        keep(_measure_chunk(corpus, chat, data, done, stop), stop - done)
    if done < total:
        _measure_parallel(corpus, chat, data, done, total, processes, keep)
    blocks = blocks or [_columns([], streams)]
    out = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    for name in [name for name in out if name.startswith("offsets/")]:
        out[name] = np.append(0, np.cumsum(out[name], dtype=np.int64))
    if not out["shape"].any():
        del out["shape"]
    if not (out["piece"] >= 0).any():
        del out["record"], out["piece"]  # every row is its record
    return out, problems


def _measure_parallel(
    corpus: Any,
    chat: Any,
    data: Data,
    start: int,
    total: int,
    processes: int,
    keep: Callable[[Any, int], None],
) -> None:
    import torch.multiprocessing as mp

    spans = deque((a, min(a + _CHUNK, total)) for a in range(start, total, _CHUNK))
    processes = min(processes - 1, len(spans))
    with quiet_threads():
        pool = ProcessPoolExecutor(processes, mp.get_context("spawn"), _start, (corpus, chat, data))
        waiting: deque[tuple[Future, int]] = deque()  # in the order of the data
        try:
            while spans or waiting:
                busy = sum(not f.done() for f, _ in waiting)
                while spans and busy < 2 * processes:
                    a, b = spans.popleft()
                    waiting.append((pool.submit(_measure_here, a, b), b - a))
                    busy += 1
                if spans and len(waiting) < 16 * processes and not waiting[0][0].done():  # lend a hand
                    a, b = spans.popleft()
                    mine: Future = Future()
                    mine.set_result(_measure_chunk(corpus, chat, data, a, b))
                    waiting.append((mine, b - a))
                    continue
                future, records = waiting.popleft()
                keep(future.result(), records)
        except BrokenProcessPool:
            raise PolymodalError(
                "A process that measured the data was killed, most likely because the machine or container ran out of memory.",
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(file=sys.stderr)
    columns = (TextColumn("Measuring lengths"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
