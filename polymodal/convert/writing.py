"""Files out: an empty file of the format first, then the tensors straight to their offsets, from several
threads.

Values come from a source in slabs that fit the processor's cache, so that memory does not grow with the
model. Every byte is read back from its file and compared."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.convert import reading
from polymodal.convert.source import Location, Source, contiguous, memory, pread
from polymodal.core.errors import PolymodalError
from polymodal.models.saving import appearing
from polymodal.models.storage import DTYPES

SLAB = 512 << 10
"""Bytes that a thread holds of a tensor at a time: they stay in its processor's cache."""
TASK = 8 << 20
"""Bytes that a thread takes at a time."""
DIRECTORY, PLAIN = 0o750, 0o640
"""Permissions of what is written."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' names of the dtypes."""
DISK = "The disk or its memory is at fault: write to another one."


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its key in the source, its name in the file, and where its bytes go.

    group: tensors of one group are made of the same rows of the source, and written together."""

    key: str
    name: str
    location: Location
    group: str = ""

    @property
    def bytes(self) -> int:
        return prod(self.location.shape) * self.location.dtype.itemsize

    @property
    def row_dim(self) -> int:
        """Its first dimension of more than one value; -1 for a single value."""
        return next((dim for dim, size in enumerate(self.location.shape) if size > 1), -1)

    @property
    def rows(self) -> int:
        return self.location.shape[self.row_dim] if self.row_dim >= 0 else 1


Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype)."""


def spec_of(source: Source, keys: Iterable[str]) -> Spec:
    return {key: (tuple(source.shapes[key]), source.dtypes[key]) for key in keys}


def spec_bytes(spec: Spec) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def empty_safetensors(path: Path, spec: Spec) -> dict[str, Location]:
    """Write a safetensors file without its values; where each tensor's bytes go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # the format wants larger types first, so that every tensor is aligned
    for name, (shape, dtype) in sorted(spec.items(), key=lambda item: -item[1][1].itemsize):
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(data + end)
    return {
        name: Location(path, data + header[name]["data_offsets"][0], shape, contiguous(shape), dtype)
        for name, (shape, dtype) in spec.items()
    }


def empty_torch_file(
    path: Path, slots: Iterable[str], spec: Spec, extra: Mapping[str, Any]
) -> dict[str, Location]:
    """Write a torch file {slot: {name: tensor}, **extra} without its values; where each slot:name's bytes
    go."""
    content: dict[str, Any] = {slot: {} for slot in slots}
    for key, (shape, dtype) in spec.items():
        slot, _, name = key.partition(":")
        content[slot][name] = torch.empty(shape, dtype=dtype)  # memory that is never touched
    with torch.serialization.skip_data():
        torch.save({**content, **extra}, path)
    return torch_locations(path, content)


def torch_locations(path: Path, slots: Iterable[str]) -> dict[str, Location]:
    """Where the tensors of a torch file are stored, by torch's own reader, under slot:name."""
    content = reading.torch_file(path)
    return {
        f"{slot}:{name}": where
        for slot in slots
        for name, where in reading.locations(path, content[slot]).items()
    }


# ----------------------------------------------------------------------------------------------------- values


Slab = tuple[Item, tuple[slice, ...], int]
"""A contiguous part of a tensor: the tensor, its slices, the file's byte where it begins."""


@dataclass(frozen=True)
class Task:
    """Rows first..last of the tensors of a group, `step` rows at a time."""

    group: tuple[Item, ...]
    first: int
    last: int
    step: int

    def slabs(self) -> Iterator[Slab]:
        """Parts of at most SLAB bytes (or one row), the tensors in turn."""
        for begin in range(self.first, self.last, self.step):
            for item in self.group:
                end = min(begin + self.step, item.rows)
                if begin < end:
                    box = [slice(0, size) for size in item.location.shape]
                    if item.row_dim >= 0:
                        box[item.row_dim] = slice(begin, end)
                    yield item, tuple(box), item.location.offset + begin * (item.bytes // item.rows)


class _Buffers(threading.local):
    """Two buffers a thread, as large as its largest slab."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}

    def view(self, number: int, box: tuple[slice, ...], dtype: torch.dtype) -> torch.Tensor:
        sizes = [part.stop - part.start for part in box]
        count = prod(sizes) * dtype.itemsize
        if number not in self.held or self.held[number].numel() < count:
            self.held[number] = torch.empty(max(count, SLAB), dtype=torch.uint8)
        return self.held[number][:count].view(dtype).view(sizes)


def _tasks(items: Iterable[Item]) -> list[Task]:
    """All of the tensors in tasks of about TASK bytes; files take turns, so that threads seldom write to the
    same one."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if item.bytes:
            name = (item.group, "") if item.group else (str(item.location.path), item.name)
            groups.setdefault(name, []).append(item)
    by_file: dict[Path, list[Task]] = {}
    for group in groups.values():
        row_bytes = [item.bytes // item.rows for item in group]
        step = max(1, SLAB // max(row_bytes))
        rows = step * max(1, TASK // (step * sum(row_bytes)))
        total = max(item.rows for item in group)
        by_file.setdefault(group[0].location.path, []).extend(
            Task(tuple(group), first, min(first + rows, total), step) for first in range(0, total, rows)
        )
    longest = max(map(len, by_file.values()), default=0)
    return [tasks[at] for at in range(longest) for tasks in by_file.values() if at < len(tasks)]


def _run(function: Callable[[Task], Any], items: Iterable[Item], workers: int) -> list[Any]:
    """The function's results for all tasks, on several threads; the first failure ends all."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, _tasks(items)))


def pwrite(handle: int, data: memoryview, at: int) -> None:
    """Write bytes to an offset of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)


def write_values(items: list[Item], source: Source, workers: int, verify: bool = True) -> None:
    """Write every tensor's values to its location.

    verify: read each part back from the file as soon as it is written, and compare it with what it was
    written from. Raises PolymodalError for the first that differs."""
    buffers = _Buffers()
    handles = {path: os.open(path, os.O_RDWR) for path in {item.location.path for item in items}}

    def write(task: Task) -> None:
        for item, box, at in task.slabs():
            values = buffers.view(0, box, item.location.dtype)
            source.read(item.key, box, values)
            handle = handles[item.location.path]
            pwrite(handle, memory(values), at)
            if verify:
                again = buffers.view(1, box, item.location.dtype)
                if not pread(handle, memory(again), at) or not equal(values, again):
                    raise PolymodalError(f"{item.location.path}: {item.name} is not what was written.", DISK)

    try:
        _run(write, items, workers)
    finally:
        for handle in handles.values():
            os.close(handle)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type have the same bits."""
    return np.array_equal(*(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (one, other)))


def check_headers(items: list[Item], found: Mapping[Path, Mapping[str, Location]]) -> None:
    """Compare what the formats' own readers find in the files (file -> tensor -> location) after the values
    were written.

    Raises PolymodalError when they would read other bytes than those that were written and compared.
    """
    held = [(name, where) for locations in found.values() for name, where in locations.items()]
    if {(item.name, item.location) for item in items} != set(held) or len(items) != len(held):
        raise PolymodalError(f"{items[0].location.path.parent}: a file does not hold what was written.", DISK)


def first_difference(source: Source, other: Source, names: Mapping[str, str], workers: int) -> str | None:
    """The first tensor of a source that has not the bits of its counterpart (key -> name in `other`); None:
    all have."""
    buffers = _Buffers()
    items = [
        Item(key, name, Location(Path(), 0, tuple(source.shapes[key]), (), source.dtypes[key]))
        for key, name in names.items()
    ]

    def differs(task: Task) -> str | None:
        for item, box, _ in task.slabs():
            one, two = (buffers.view(number, box, item.location.dtype) for number in (0, 1))
            source.read(item.key, box, one)
            other.read(item.name, box, two)
            if not equal(one, two):
                return item.key
        return None

    return next(filter(None, _run(differs, items, workers)), None)


# ------------------------------------------------------------------------------------------------ directories


def need_space(directory: Path, count: int) -> None:
    """Raises PolymodalError when a disk is too small for `count` bytes."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < count * 1.01 + (1 << 20):
        raise PolymodalError(
            f"{directory} needs {count / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free.",
            "Free space there, or choose another disk.",
        )


def protect(directory: Path) -> None:
    """Permissions: directories 0750, files 0640."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(DIRECTORY if path.is_dir() else PLAIN)


@contextmanager
def released(root: Path, tracker: str, release: str) -> Iterator[Path]:
    """A directory that becomes root/release, with the tracker that points at it, when the block ends well.

    Whatever else root holds stays as it is: root may be the source. Raises PolymodalError when root belongs
    to a training run (its tracker names a step)."""
    step = (root / tracker).read_text().strip() if (root / tracker).is_file() else release
    if step != release:
        raise PolymodalError(f"{root} holds a training run (step {step}).", "Choose another directory.")
    created = [path for path in (root, *root.parents) if not path.exists()]
    try:
        with appearing(root / release, overwrite=True) as partial:
            yield partial
            protect(partial)
        note = root / f".{tracker}.partial"
        note.write_text(release)
        note.chmod(PLAIN)
        note.rename(root / tracker)
        if created:
            root.chmod(DIRECTORY)
    finally:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
