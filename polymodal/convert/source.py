"""Tensors by name, read box by box: raw files, and views of them under other names and shapes.

`Flat` is what every format on disk comes down to (a path, an offset, strides); `Mapped` renames, joins, cuts and
permutes without copying more than the box that is asked for. `invert` turns such a view round. Sees models/slices.py.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.models.slices import Piece, Stored

Box = tuple[slice, ...]
Layout = Mapping[str, Stored]
"""Tensor name -> the boxes of other tensors that it is made of."""

WINDOW = 4 << 20
"""Bytes that one thread reads at once when a box does not lie in one piece."""
FEW = 16
"""Pieces of a tensor that are gone through one by one."""


class Source(Protocol):
    """Tensors by name: shapes, dtypes, and any box of them. `read` may be called from several threads."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def read(self, key: str, box: Box, into: Tensor) -> None:
        """Copy a box of a tensor into `into` (same shape and dtype)."""


def whole(shape: Iterable[int]) -> Box:
    """The box that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the byte of its first element in the file, strides in elements."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def dense(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    sizes = list(shape)
    return tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def _close(handles: dict[Path, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


class Flat:
    """Tensors that lie in files as plain bytes, whatever the format around them."""

    def __init__(self, places: Mapping[str, Place]):
        self.places = dict(places)
        self.shapes = {key: place.shape for key, place in places.items()}
        self.dtypes = {key: place.dtype for key, place in places.items()}
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, key: str, box: Box, into: Tensor) -> None:
        place = self.places[key]
        if into.numel() == 0:
            return
        size = place.dtype.itemsize
        sizes = [b.stop - b.start for b in box]
        first = sum(b.start * step for b, step in zip(box, place.stride, strict=True))
        span = 1 + sum((n - 1) * step for n, step in zip(sizes, place.stride, strict=True))
        at = place.offset + first * size
        packed = span == into.numel() and all(
            n == 1 or have == want for n, have, want in zip(sizes, place.stride, dense(sizes), strict=True)
        )
        if packed and into.is_contiguous():
            self._bytes(place.path, at, memory(into))
            return
        dim = max((d for d, n in enumerate(sizes) if n > 1), key=lambda d: place.stride[d], default=None)
        begin, end = first, first + span
        if dim is not None:
            # whole rows of the outermost dimension: the other parts of them are asked for next
            extent = 1 + sum((n - 1) * step for n, step in zip(place.shape, place.stride, strict=True))
            steps = zip(box, place.stride, strict=True)
            begin = sum(b.start * step for b, step in steps if step >= place.stride[dim])
            end = max(end, min(begin + sizes[dim] * place.stride[dim], extent))
        if (end - begin) * size > WINDOW:
            begin, end = first, first + span
        if span * size <= WINDOW or dim is None:
            window = self._window(place.path, place.offset + begin * size, (end - begin) * size)
            into.copy_(window.view(place.dtype).as_strided(sizes, place.stride, first - begin))
            return
        half = sizes[dim] // 2
        for start, count in ((0, half), (half, sizes[dim] - half)):
            low = box[dim].start + start
            part = (*box[:dim], slice(low, low + count), *box[dim + 1 :])
            self.read(key, part, into.narrow(dim, start, count))

    def _window(self, path: Path, at: int, count: int) -> Tensor:
        """Bytes of a file; the last window of a thread is kept, since its neighbours are asked for next."""
        held = self._local
        if getattr(held, "where", None) != (path, at, count):
            held.where = None
            if getattr(held, "buffer", None) is None or held.buffer.numel() < count:
                held.buffer = torch.empty(max(count, WINDOW), dtype=torch.uint8)
            self._bytes(path, at, memory(held.buffer[:count]))
            held.where = (path, at, count)
        return held.buffer[:count]

    def _bytes(self, path: Path, at: int, into: memoryview) -> None:
        handle = self._open.get(path)
        if handle is None:
            with self._lock:
                handle = self._open.get(path)
                if handle is None:
                    handle = self._open[path] = os.open(path, os.O_RDONLY)
        done = 0
        while done < len(into):
            count = os.preadv(handle, [into[done:]], at + done)
            if count == 0:
                raise PolymodalError(
                    f"{path} ends before its tensors do.", "The file is cut short: fetch it again."
                )
            done += count


class Mapped:
    """Tensors made of boxes of another source's; what no box fills reads as zero."""

    def __init__(self, source: Source, layout: Layout):
        self.source, self.layout = source, dict(layout)
        self._sorted: dict[str, tuple[list[int], int, list[Piece]]] = {}
        self.shapes = {key: tuple(stored.shape) for key, stored in layout.items()}
        self.dtypes = {key: self._dtype(key, stored) for key, stored in layout.items()}

    def _dtype(self, key: str, stored: Stored) -> torch.dtype:
        kinds = {self.source.dtypes[piece.key] for piece in stored.pieces}
        if len(kinds) != 1:
            names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "none"
            raise PolymodalError(
                f"{key} is put together from tensors of different types ({names}).",
                "Save the checkpoint in one type.",
            )
        return kinds.pop()

    def _near(self, key: str, rows: slice) -> Stored:
        """A tensor with those of its pieces that may lie in some rows, where it has many."""
        stored = self.layout[key]
        if len(stored.pieces) <= FEW:
            return stored
        held = self._sorted.get(key)
        if held is None:
            pieces = sorted(stored.pieces, key=lambda piece: piece.offset[0])
            held = [one.offset[0] for one in pieces], max(one.size[0] for one in pieces), pieces
            self._sorted[key] = held
        starts, longest, pieces = held
        low = bisect_right(starts, rows.start - longest)
        return Stored(stored.shape, pieces[low : bisect_left(starts, rows.stop)])

    def read(self, key: str, box: Box, into: Tensor) -> None:
        stored = self._near(key, box[0]) if box else self.layout[key]
        for dim, part in enumerate(box):
            if part.stop - part.start != stored.shape[dim]:
                stored = stored.narrow(dim, part.start, part.stop - part.start)
        if not stored.complete:
            into.zero_()
        for piece in stored.pieces:
            self.source.read(piece.key, piece.box, piece.view(into))


class Union:
    """Several sources as one; their names do not overlap."""

    def __init__(self, *sources: Source):
        self.home = {key: source for source in sources for key in source.shapes}
        self.shapes = {key: tuple(source.shapes[key]) for key, source in self.home.items()}
        self.dtypes = {key: source.dtypes[key] for key, source in self.home.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        self.home[key].read(key, box, into)


class Held:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        self.dtypes = {key: value.dtype for key, value in tensors.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        into.copy_(self.tensors[key][box])


@dataclass(frozen=True)
class Copy:
    """A box that a layout holds twice: the tensor and its slices that are used, and the tensor and slices that are not."""

    used: str
    used_box: Box
    other: str
    other_box: Box


def invert(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Stored], list[Copy]]:
    """The layout of the sources in terms of the targets, and the boxes that several targets hold.

    shapes: of the sources. Raises PolymodalError for a source that the targets do not hold in full.
    """
    found: dict[str, dict[tuple, tuple[Piece, str, Box]]] = {key: {} for key in shapes}
    copies: list[Copy] = []
    for target, stored in layout.items():
        for piece in stored.pieces:
            turned, size = _turned(piece, target, len(stored.shape))
            box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))
            place = (turned.offset, size)
            held = found[piece.key].get(place)
            if held is None:
                found[piece.key][place] = (turned, target, box)
            else:
                copies.append(Copy(held[1], held[2], target, box))
    out = {}
    for key, shape in shapes.items():
        stored = Stored(shape, [one[0] for one in found[key].values()])
        if not stored.complete:
            raise PolymodalError(
                f"{key} ({list(shape)}) cannot be put together: only {sum(prod(p.size) for p in stored.pieces)} of its {prod(shape)} values are there.",
                "A file of the tree is missing, or the layout that was given is not the tree's.",
            )
        out[key] = stored
    return out, copies


def _turned(piece: Piece, target: str, rank: int) -> tuple[Piece, tuple[int, ...]]:
    """A piece with source and target exchanged."""
    dims: list[int | None] = [None] * len(piece.start)
    for along, stored in enumerate(piece.dims):
        if stored is not None:
            dims[stored] = along
    size = tuple(1 if along is None else piece.size[along] for along in dims)
    return Piece(target, piece.offset, piece.start, size, tuple(dims)), size
