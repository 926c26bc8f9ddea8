"""Answers of an evaluation on disk while it runs, and the ranks that write them.

`out/settings.json` holds what the answers belong to, `out/parts/rank-*.jsonl` one answer a line, flushed as
soon as it is made: a run that was killed goes on from there, with any number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import Bar

LAST_BARRIER = timedelta(days=7)
"""Ranks meet once, when all are done: a slow one may take long, and the launcher ends all when one dies."""

Entry = Mapping[str, Any]
"""A line of a part: `id`, `answer`, `error` where there is none, and what else belongs to it."""


class Ranks:
    """The ranks of this evaluation: those of the process group if there is one, else this process alone."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.group: Any = dist.new_group(backend="gloo", timeout=LAST_BARRIER) if joined else None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Collective."""
        if self.group is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A PolymodalError that any rank raises inside is raised on every rank. Collective."""
        error: PolymodalError | None = None
        try:
            yield
        except PolymodalError as caught:
            error = caught
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first


class Store:
    """settings.json and parts/ of one directory."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.settings = out, json.loads(json.dumps(settings))
        self.parts, self.file = out / "parts", out / "settings.json"

    def open(self, restart: bool) -> None:
        """Make the directory, or check that its answers belong to these settings. Raises PolymodalError."""
        if restart and self.parts.is_dir():
            if not self.file.is_file():
                raise PolymodalError(
                    f"{self.out} is not an evaluation's directory (it has no settings.json), "
                    "nothing is deleted there.",
                    "Choose another --out.",
                )
            shutil.rmtree(self.parts)
        if self.file.is_file() and any(self.parts.glob("*.jsonl")):
            self.check()
            return
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, json.dumps(self.settings, indent=1, ensure_ascii=False))
        except OSError as error:
            raise PolymodalError(
                f"The directory {self.out} cannot be written: {error.strerror}.", "Choose another --out."
            ) from None

    def check(self) -> None:
        """Raise PolymodalError where the directory holds answers of other settings."""
        try:
            before = _flat(json.loads(self.file.read_text()))
        except FileNotFoundError:
            raise PolymodalError(
                f"{self.out} is not the same directory on every node.",
                "Give --out on a file system that all nodes share.",
            ) from None
        except (OSError, ValueError) as error:
            raise PolymodalError(
                f"{self.file} cannot be read: {error}.", "Choose another --out, or --restart."
            ) from None
        now = _flat(self.settings)
        different = sorted(k for k in {**before, **now} if before.get(k) != now.get(k))
        if different:
            changes = (f"{k}: {_short(before.get(k))} -> {_short(now.get(k))}" for k in different)
            raise PolymodalError(
                f"{self.out} holds answers of other settings ({', '.join(changes)}).",
                "Choose another --out, or --restart to answer everything anew.",
            )

    def answers(self) -> dict[str, dict[str, Any]]:
        """Entries by id. A line that a killed process left half is passed over, an answer beats an error."""
        entries: dict[str, dict[str, Any]] = {}
        for file in sorted(self.parts.glob("*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    key = entry.get("id") if isinstance(entry, dict) else None
                    if key is not None and ("error" not in entry or key not in entries):
                        entries[key] = entry
        return entries

    def writer(self, rank: int) -> Callable[[Entry], None]:
        """Appends entries to this rank's part. Raises PolymodalError when the disk is full."""
        file = self.parts / f"rank-{rank:05d}.jsonl"
        handle = file.open("ab")
        if handle.tell() and not file.read_bytes().endswith(b"\n"):  # a killed process left half a line
            handle.write(b"\n")

        def write(entry: Entry) -> None:
            try:
                handle.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                handle.flush()
            except OSError as error:
                raise PolymodalError(
                    f"{file} cannot be written: {error.strerror}.",
                    "Free space; the same command goes on from here.",
                ) from None

        return write

    def count(self) -> int:
        """Lines in all parts so far."""
        return sum(file.read_bytes().count(b"\n") for file in self.parts.glob("*.jsonl"))


@contextlib.contextmanager
def store_in(out: str | os.PathLike | None, settings: Mapping[str, Any], world: Ranks) -> Iterator[Store]:
    """The store of a directory; without one, which one process alone may do, its files are temporary."""
    if out is None and world.size > 1:
        raise PolymodalError(
            "An evaluation with several processes needs a directory for their answers.", "Give --out DIR."
        )
    with tempfile.TemporaryDirectory() if out is None else contextlib.nullcontext(out) as directory:
        yield Store(Path(directory), settings)


def deal(costs: Sequence[float], world: int) -> list[list[int]]:
    """Positions dealt to ranks in a snake by falling cost: counts differ by one at most, and costs hardly."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    hands: list[list[int]] = [[] for _ in range(world)]
    for turn, i in enumerate(order):
        lap, seat = divmod(turn, world)
        hands[seat if lap % 2 == 0 else world - 1 - seat].append(i)
    return [sorted(hand) for hand in hands]


def complete(
    store: Store,
    world: Ranks,
    ids: Sequence[str],
    answer: Callable[[list[int]], Iterable[Entry]],
    *,
    cost: Callable[[int], float] = lambda i: 1.0,
    usable: Callable[[Entry], bool] = lambda entry: True,
    restart: bool = False,
    title: str | None = None,
) -> tuple[dict[str, dict[str, Any]], int]:
    """Have the ranks answer what the store lacks of `ids`. Returns (entries by id, how many were there
    before).

    answer: gives the entries of these positions, in any order. cost: of a position, for an even share.
    usable: entries to keep; failed ones are asked again. title: of a progress bar on rank 0. Collective;
    ranks get the same number of positions (one more at most) and meet before the first and after the last
    only. Raises PolymodalError.
    """
    with world.together():  # before any rank writes
        if world.rank == 0:
            store.open(restart)
    with world.together():
        if world.rank != 0:
            store.check()
        before = {key for key, e in store.answers().items() if not e.get("error") and usable(e)}
    todo = [i for i, key in enumerate(ids) if key not in before]
    mine = [todo[i] for i in deal([cost(i) for i in todo], world.size)[world.rank]]
    if mine:
        write = store.writer(world.rank)
        with progress(title if world.rank == 0 else None, len(ids), len(before), store) as update:
            for entry in answer(mine):
                write({**entry, "rank": world.rank})
                update()
    world.gather(None)
    entries = world.gather(store.answers() if world.rank == 0 else None)[0]
    missing = [key for key in ids if key not in entries]
    if missing:
        raise PolymodalError(
            f"{len(missing)} answers are missing in {store.parts} (first: {missing[0]}).",
            "Start the same command again; it makes what is missing.",
        )
    return entries, len(ids) - len(todo)


@contextlib.contextmanager
def progress(title: str | None, total: int, done: int, store: Store) -> Iterator[Callable[[], None]]:
    """A bar over all ranks' answers, to be updated often; none without a title."""
    if title is None:
        yield lambda: None
        return
    looked = time.perf_counter()
    with Bar(title, total, done) as bar:

        def update(after: float = 1.0) -> None:
            nonlocal looked
            if time.perf_counter() - looked >= after:
                looked = time.perf_counter()
                bar.update(min(total, store.count()))

        yield update
        update(0.0)


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
