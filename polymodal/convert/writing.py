"""Files out: the formats' frames first, then the tensors straight into their places, from several threads.

A frame is a whole, valid file whose tensor bytes are holes; values come from a source in slabs that stay in the
processor's cache, so that memory does not grow with the model. Every byte is read back from its file and compared.
"""

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
from polymodal.convert.source import Place, Source, dense, memory
from polymodal.core.errors import PolymodalError

SLAB = 512 << 10
"""Bytes that a thread holds of a tensor at a time: they stay in its processor's cache."""
TASK = 8 << 20
"""Bytes that a thread takes at a time."""
DIRECTORY, PLAIN = 0o750, 0o640
"""Permissions of what is written."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its key in the source, its name in the file, and where its bytes go.

    group: tensors of one group are made of the same rows of the source, and written together."""

    key: str
    name: str
    place: Place
    group: str = ""

    @property
    def bytes(self) -> int:
        return prod(self.place.shape) * self.place.dtype.itemsize


Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype)."""


def safetensors_frame(path: Path, spec: Spec) -> dict[str, Place]:
    """Write a safetensors file without its values; where each tensor's bytes go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # the format wants larger types first, so that every tensor is aligned
    order = sorted(spec, key=lambda name: -spec[name][1].itemsize)
    for name in order:
        shape, dtype = spec[name]
        count = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    begin = 8 + len(text)
    return {
        name: Place(
            path, begin + header[name]["data_offsets"][0], spec[name][0], dense(spec[name][0]), spec[name][1]
        )
        for name in spec
    }


def torch_frame(path: Path, slots: Mapping[str, Spec], extra: Mapping[str, Any]) -> dict[str, Place]:
    """Write a torch file {slot: {name: tensor}, **extra} without its values; where each tensor's bytes go."""
    table: dict[str, Any] = {
        slot: {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()
        }  # memory that is never touched
        for slot, spec in slots.items()
    }
    with torch.serialization.skip_data():
        torch.save({**table, **extra}, path)
    return torch_places(path, slots)


def torch_places(path: Path, slots: Iterable[str]) -> dict[str, Place]:
    """Where the tensors of a torch file lie, by torch's own reader, under slot:name."""
    made = reading.torch_file(path)
    return {
        f"{slot}:{name}": reading.place(path, tensor) for slot in slots for name, tensor in made[slot].items()
    }


# ------------------------------------------------------------------------------------------------------------- values


def _rows(item: Item) -> tuple[int, int]:
    """(number, bytes) of a tensor's rows: along its first dimension of more than one value."""
    dim = next((d for d, n in enumerate(item.place.shape) if n > 1), None)
    if dim is None:
        return 1, item.bytes
    return item.place.shape[dim], item.bytes // item.place.shape[dim]


Slab = tuple[Item, tuple[slice, ...], int]
"""A part of a tensor that lies in one piece: the tensor, its slices, the file's byte where it begins."""


@dataclass(frozen=True)
class Task:
    """Rows first..last of the tensors of a group, `step` rows at a time."""

    group: tuple[Item, ...]
    first: int
    last: int
    step: int

    def slabs(self) -> Iterator[Slab]:
        """Parts of at most SLAB bytes (or one row), the tensors by turns."""
        for begin in range(self.first, self.last, self.step):
            for item in self.group:
                count, size = _rows(item)
                end = min(begin + self.step, count)
                if begin < end:
                    dim = next((d for d, n in enumerate(item.place.shape) if n > 1), -1)
                    box = tuple(
                        slice(begin, end) if d == dim else slice(0, n) for d, n in enumerate(item.place.shape)
                    )
                    yield item, box, item.place.offset + begin * size


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


def _tasks(items: list[Item]) -> list[Task]:
    """All of the tensors in tasks of about TASK bytes; files take turns, so that threads seldom write to the same one."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if item.bytes:
            name = (item.group, "") if item.group else (str(item.place.path), item.name)
            groups.setdefault(name, []).append(item)
    queues: dict[Path, list[Task]] = {}
    for group in groups.values():
        rows, sizes = max(_rows(item)[0] for item in group), [_rows(item)[1] for item in group]
        step = max(1, SLAB // max(sizes))
        each = step * max(1, TASK // (step * sum(sizes)))
        queues.setdefault(group[0].place.path, []).extend(
            Task(tuple(group), first, min(first + each, rows), step) for first in range(0, rows, each)
        )
    lists = list(queues.values())
    return [one[at] for at in range(max(map(len, lists), default=0)) for one in lists if at < len(one)]


def put(handle: int, data: memoryview, at: int) -> None:
    """Write bytes at a place of a file."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)


def fill(items: list[Item], source: Source, workers: int, verify: bool = True) -> None:
    """Write every tensor's values into its place.

    verify: read each part back from the file as soon as it is written, and compare it with what it was written from.
    Raises PolymodalError for the first that differs.
    """
    buffers = _Buffers()
    handles = {path: os.open(path, os.O_RDWR) for path in dict.fromkeys(item.place.path for item in items)}

    def one(task: Task) -> None:
        for item, box, at in task.slabs():
            values = buffers.view(0, box, item.place.dtype)
            source.read(item.key, box, values)
            data, handle = memory(values), handles[item.place.path]
            put(handle, data, at)
            if verify:
                again = buffers.view(1, box, item.place.dtype)
                back, done = memory(again), 0
                while done < len(back) and (count := os.preadv(handle, [back[done:]], at + done)):
                    done += count
                if done < len(back) or not equal(values, again):
                    raise _differs(item)

    try:
        _run(one, _tasks(items), workers)
    finally:
        for handle in handles.values():
            os.close(handle)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one type have the same bits."""
    return np.array_equal(*(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (one, other)))


def _differs(item: Item) -> PolymodalError:
    return PolymodalError(
        f"{item.place.path}: {item.name} is not what was written.",
        "The disk or its memory is at fault: write to another one.",
    )


def apart(items: list[Item], found: Mapping[Path, Mapping[str, Place]]) -> None:
    """Check what the formats' own readers found in the files (file -> tensor -> its place) after the values came.

    Raises PolymodalError when they would read other bytes than those that were written and compared.
    """
    if sorted(map(_range, items)) != sorted(
        _range(Item("", name, place)) for held in found.values() for name, place in held.items()
    ):
        raise PolymodalError(
            f"{items[0].place.path.parent}: a file does not hold what was written.",
            "The disk or its memory is at fault: write to another one.",
        )
    ends: dict[Path, int] = {}
    for path, begin, end, *_ in sorted(map(_range, items)):
        if begin < ends.get(path, 0):
            raise PolymodalError(f"{path}: two tensors overlap.", "This is a defect: please report it.")
        ends[path] = max(end, ends.get(path, 0))


def _range(item: Item) -> tuple[Path, int, int, str, tuple[int, ...], str]:
    place = item.place
    return place.path, place.offset, place.offset + item.bytes, item.name, place.shape, str(place.dtype)


def compare(items: list[Item], written: Mapping[str, Source], source: Source, workers: int) -> None:
    """Read tensors from `written` (key -> what reads it, under the item's name) and from their source, and compare them.

    Raises PolymodalError for the first that differs.
    """
    buffers = _Buffers()

    def one(task: Task) -> None:
        for item, box, _ in task.slabs():
            want, have = (buffers.view(number, box, item.place.dtype) for number in (0, 1))
            source.read(item.key, box, want)
            written[item.key].read(item.name, box, have)
            if not equal(want, have):
                raise _differs(item)

    _run(one, _tasks(items), workers)


def _run(one: Callable[[Any], None], tasks: list, workers: int) -> None:
    """Each task once, on `workers` threads that take the next one as they come; the first failure ends all."""
    at = iter(tasks)
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        while not failed.is_set():
            with lock:
                task = next(at, None)
            if task is None:
                return
            try:
                one(task)
            except BaseException:
                failed.set()
                raise

    if workers == 1:
        work()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()


# -------------------------------------------------------------------------------------------------------------- places


def need_space(directory: Path, count: int) -> None:
    """Raises PolymodalError when a disk is too small for `count` bytes."""
    there = directory
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < count * 1.01 + (1 << 20):
        raise PolymodalError(
            f"{directory} needs {count / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free.",
            "Free space there, or choose another disk.",
        )


def protect(directory: Path) -> None:
    """Permissions: directories 0750, files 0640."""
    directory.chmod(DIRECTORY)
    for root, directories, files in os.walk(directory):
        for name in directories:
            (Path(root) / name).chmod(DIRECTORY)
        for name in files:
            (Path(root) / name).chmod(PLAIN)


@contextmanager
def released(root: Path, tracker: str, release: str) -> Iterator[Path]:
    """A directory that becomes root/release, and the tracker that points at it, when the block ends well.

    Whatever else lies in root stays as it is: root may be the source. Raises PolymodalError when root belongs to a
    training run (its tracker names a step).
    """
    said = (root / tracker).read_text().strip() if (root / tracker).is_file() else release
    if said != release:
        raise PolymodalError(f"{root} holds a training run (step {said}).", "Choose another directory.")
    partial, old = root / f".{release}.partial", root / f".{release}.old"
    made = [one for one in (root, *root.parents) if not one.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        protect(partial)
        shutil.rmtree(old, ignore_errors=True)
        if (root / release).exists():
            (root / release).rename(old)
        partial.rename(root / release)
        note = root / f".{tracker}.partial"
        note.write_text(release)
        note.chmod(PLAIN)
        note.rename(root / tracker)
        if made:
            root.chmod(DIRECTORY)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise PolymodalError(
            f"{root} could not be written: {error.strerror or error}.",
            "Free space there, or choose another directory.",
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for one in made:
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()
