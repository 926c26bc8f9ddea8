"""Where the answers of an evaluation are kept while it runs, and how its ranks meet.

One directory: `settings.json` says what the answers belong to, `parts/rank-*.jsonl` hold them, a line each, written
before the next batch starts. Sees errors and torch.distributed; knows nothing of models, questions and metrics.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file

LAST_BARRIER = timedelta(days=7)
"""Ranks meet once, when all are done: a slow one may take long, and the launcher ends all when one dies."""


class Ranks:
    """The ranks of this evaluation: those of the process group if there is one, else this process alone."""

    def __init__(self, alone: bool):
        import torch.distributed as dist

        joined = not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.group: Any = dist.new_group(backend="gloo", timeout=LAST_BARRIER) if joined else None

    def barrier(self) -> None:
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(self.group)

    def raise_together(self, error: PolymodalError | None) -> None:
        """Raise on every rank what any rank raised: nobody is left waiting."""
        found: list[PolymodalError | None] = [error]
        if self.group is not None:
            import torch.distributed as dist

            found = [None] * self.size
            dist.all_gather_object(found, error, group=self.group)
        first = next((e for e in found if e is not None), None)
        if first is not None:
            raise first

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        found = [value]
        if self.group is not None:
            import torch.distributed as dist

            found = [None] * self.size
            dist.all_gather_object(found, value, group=self.group)
        return found

    def close(self) -> None:
        if self.group is not None:
            import torch.distributed as dist

            dist.destroy_process_group(self.group)


class Store:
    """`out/`: settings.json (what the answers belong to), parts/rank-*.jsonl (answers), and the results."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.settings = out, json.loads(json.dumps(settings))
        self.parts = out / "parts"

    def open(self, restart: bool) -> None:
        """Make the directory, or check that what lies there belongs to these settings. Raises PolymodalError."""
        file = self.out / "settings.json"
        if restart and self.parts.is_dir():
            if not file.is_file():
                raise PolymodalError(
                    f"{self.out} is not an evaluation's directory (it has no settings.json), nothing is deleted there.",
                    "Choose another --out.",
                )
            shutil.rmtree(self.parts)
        if file.is_file() and any(self.parts.glob("*.jsonl")):
            self.check()
            return
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(self.settings, indent=1, ensure_ascii=False))
        except OSError as error:
            raise PolymodalError(
                f"The directory {self.out} cannot be written: {error.strerror}.", "Choose another --out."
            ) from None

    def check(self) -> None:
        file = self.out / "settings.json"
        try:
            before = json.loads(file.read_text())
        except FileNotFoundError:
            raise PolymodalError(
                f"{self.out} is not the same directory on every node.",
                "Give --out on a file system that all nodes share.",
            ) from None
        except (OSError, ValueError) as error:
            raise PolymodalError(
                f"{file} cannot be read: {error}.", "Choose another --out, or --restart."
            ) from None
        before, now = _flat(before), _flat(self.settings)
        different = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if different:
            what = ", ".join(
                f"{k}: {_short(before.get(k))} -> {_short(now.get(k))}" for k in sorted(different)
            )
            raise PolymodalError(
                f"{self.out} holds answers of other settings ({what}).",
                "Choose another --out, or --restart to answer everything anew.",
            )

    def answers(self) -> dict[str, dict[str, Any]]:
        """Every whole line of every part; a line that a killed process left half is passed over, an answer beats an error."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.parts.glob("*.jsonl")):
            with file.open("rb") as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                    except ValueError:
                        continue
                    if (
                        isinstance(entry, dict)
                        and "id" in entry
                        and ("error" not in entry or entry["id"] not in found)
                    ):
                        found[entry["id"]] = entry
        return found

    def writer(self, rank: int) -> Callable[[Mapping[str, Any]], None]:
        file = self.parts / f"rank-{rank:05d}.jsonl"
        handle = file.open("ab")
        if handle.tell():
            with file.open("rb") as old:
                old.seek(-1, os.SEEK_END)
                if old.read(1) != b"\n":  # a killed process left half a line: end it, it is passed over
                    handle.write(b"\n")

        def write(entry: Mapping[str, Any]) -> None:
            try:
                handle.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                handle.flush()
            except OSError as error:
                raise PolymodalError(
                    f"{file} cannot be written: {error.strerror}.",
                    "Free space; the same command goes on from here.",
                ) from None

        return write

    def count(self, sizes: dict[Path, tuple[int, int]]) -> int:
        """Lines in all parts so far; `sizes` remembers what was counted before."""
        for file in self.parts.glob("*.jsonl"):
            at, lines = sizes.get(file, (0, 0))
            with file.open("rb") as handle:
                handle.seek(at)
                chunk = handle.read()
            sizes[file] = (at + len(chunk), lines + chunk.count(b"\n"))
        return sum(lines for _, lines in sizes.values())


class Memory(Store):
    """The same without a directory: for one process that does not want files."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def open(self, restart: bool) -> None: ...

    def check(self) -> None: ...

    def answers(self) -> dict[str, dict[str, Any]]:
        return self.entries

    def writer(self, rank: int) -> Callable[[Mapping[str, Any]], None]:
        return lambda entry: self.entries.update({entry["id"]: dict(entry)})

    def count(self, sizes: dict[Path, tuple[int, int]]) -> int:
        return len(self.entries)


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


class Progress:
    """A bar over all ranks' answers on rank 0's terminal; silent elsewhere."""

    def __init__(self, on: bool, total: int, done: int, store: Store, title: str):
        self.bar: Any = None
        self.store, self.total, self.looked = store, total, 0.0
        self.sizes: dict[Path, tuple[int, int]] = {}
        if on:
            from rich import progress as rich
            from rich.console import Console

            columns = (
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeRemainingColumn(),
            )
            self.bar = rich.Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def update(self) -> None:
        if self.bar and time.perf_counter() - self.looked > 0.5:
            self.looked = time.perf_counter()
            self.bar.update(self.task, completed=min(self.total, self.store.count(self.sizes)))

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.update(self.task, completed=min(self.total, self.store.count(self.sizes)))
            self.bar.stop()
