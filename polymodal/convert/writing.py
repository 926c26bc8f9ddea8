"""Files out: the formats' frames first, then the tensors straight into their places, from several threads.

A frame is a whole, valid file whose tensor bytes are holes; values come from a source in slabs of two megabytes, which
stay in the processor's cache, so that memory does not grow with the model. Every byte is read back and compared before
a tree gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from polymodal.convert import reading
from polymodal.convert.source import Flat, Place, Source, dense, memory
from polymodal.errors import PolymodalError

SLAB = 2 << 20
"""Bytes that a thread holds of a tensor at a time."""
DIRECTORY, PLAIN = 0o750, 0o640
"""Permissions of what is written."""
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A tensor to be written: its key in the source, its name in the file, and where its bytes go."""

    key: str
    name: str
    place: Place

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


def torch_frame(
    path: Path, slots: Mapping[str, Spec], extra: Mapping[str, Any]
) -> dict[str, dict[str, Place]]:
    """Write a torch file {slot: {name: tensor}, **extra} without its values; where each tensor's bytes go."""
    table: dict[str, Any] = {
        slot: {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in spec.items()
        }  # memory that is never touched
        for slot, spec in slots.items()
    }
    with torch.serialization.skip_data():
        torch.save({**table, **extra}, path)
    made = reading.torch_file(path)
    return {
        slot: {name: reading.place(path, tensor) for name, tensor in made[slot].items()} for slot in slots
    }


# ------------------------------------------------------------------------------------------------------------- values


def _slabs(item: Item) -> Iterator[tuple[tuple[slice, ...], int]]:
    """(box, first byte) of parts of a tensor that are at most SLAB bytes, or one row, and lie in one piece."""
    shape = item.place.shape
    dim = next((d for d, n in enumerate(shape) if n > 1), None)
    if dim is None or prod(shape) == 0:
        yield tuple(slice(0, n) for n in shape), item.place.offset
        return
    row = prod(shape[dim + 1 :]) * item.place.dtype.itemsize
    step = max(1, SLAB // row)
    for begin in range(0, shape[dim], step):
        end = min(begin + step, shape[dim])
        box = tuple(slice(begin, end) if d == dim else slice(0, n) for d, n in enumerate(shape))
        yield box, item.place.offset + begin * row


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


def _tasks(items: list[Item]) -> list[tuple[Item, tuple[slice, ...], int]]:
    """All slabs; files take turns, so that threads seldom write to the same one."""
    queues: dict[Path, list] = {}
    for item in items:
        queues.setdefault(item.place.path, []).extend((item, *slab) for slab in _slabs(item))
    lists = list(queues.values())
    return [one[at] for at in range(max(map(len, lists), default=0)) for one in lists if at < len(one)]


def fill(
    items: list[Item], source: Source, workers: int, progress: Callable[[int], None] = lambda count: None
) -> None:
    """Write every tensor's values into its place."""
    buffers = _Buffers()
    handles = {path: os.open(path, os.O_RDWR) for path in dict.fromkeys(item.place.path for item in items)}

    def one(task: tuple[Item, tuple[slice, ...], int]) -> None:
        item, box, at = task
        values = buffers.view(0, box, item.place.dtype)
        source.read(item.key, box, values)
        data = memory(values)
        done = 0
        while done < len(data):
            done += os.pwrite(handles[item.place.path], data[done:], at + done)
        progress(len(data))

    try:
        _run(one, _tasks(items), workers)
    finally:
        for handle in handles.values():
            os.close(handle)


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def compare(
    items: list[Item],
    written: Mapping[str, Source],
    source: Source,
    workers: int,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Read every tensor back (written: key -> what reads it, under the item's name) and compare it, bit by bit.

    Raises PolymodalError for the first that differs.
    """
    buffers = _Buffers()

    def one(task: tuple[Item, tuple[slice, ...], int]) -> None:
        item, box, _ = task
        want, have = (buffers.view(number, box, item.place.dtype) for number in (0, 1))
        source.read(item.key, box, want)
        written[item.key].read(item.name, box, have)
        if not torch.equal(_raw(want), _raw(have)):
            raise PolymodalError(
                f"{item.place.path}: {item.name} is not what was written.",
                "The disk or its memory is at fault: write to another one.",
            )
        progress(want.nbytes)

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


def reopened(path: Path) -> Flat:
    """A safetensors file that was written, by the library's own reader."""
    return reading.hub_files(path)[0]
