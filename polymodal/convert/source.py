"""Tensors by name, read box by box: those of files, and views of them under other names and shapes.

`FileTensors` serves every format on disk (a path, an offset, strides); `Remapped` renames, joins, cuts and
permutes without copying more than the box that is asked for. `invert` turns such a view round."""

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
"""Bytes that one thread reads at once when a box is not contiguous in its file."""
FEW = 16
"""Pieces of a tensor that are searched one by one."""


class Source(Protocol):
    """Tensors by name: shapes, dtypes, and any box of them. `read` may be called from several threads."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def read(self, key: str, box: Box, into: Tensor) -> None:
        """Copy a box of a tensor into `into` (same shape and dtype)."""


def values(source: Source, key: str, box: Box | None = None) -> Tensor:
    """A tensor of a source, or a box of it, in memory."""
    box = box if box is not None else tuple(slice(0, size) for size in source.shapes[key])
    out = torch.empty([part.stop - part.start for part in box], dtype=source.dtypes[key])
    source.read(key, box, out)
    return out


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class Location:
    """Where a tensor is stored: the byte of its first element in the file, strides in elements."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def contiguous(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    sizes = list(shape)
    return tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))


def pread(handle: int, into: memoryview, at: int) -> bool:
    """Fill a buffer from a byte of a file on; False where the file ends before."""
    done = 0
    while done < len(into) and (count := os.preadv(handle, [into[done:]], at + done)):
        done += count
    return done == len(into)


def _close(handles: dict[Path, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


class FileTensors:
    """Tensors stored in files as plain bytes, whatever the format around them."""

    def __init__(self, locations: Mapping[str, Location]):
        self.locations = dict(locations)
        self.shapes = {key: location.shape for key, location in locations.items()}
        self.dtypes = {key: location.dtype for key, location in locations.items()}
        self._handles: dict[Path, int] = {}
        weakref.finalize(self, _close, self._handles)
        self._lock = threading.Lock()
        self._local = threading.local()

    def read(self, key: str, box: Box, into: Tensor) -> None:
        location = self.locations[key]
        if into.numel() == 0:
            return
        itemsize, stride = location.dtype.itemsize, location.stride
        sizes = [part.stop - part.start for part in box]
        first = sum(part.start * step for part, step in zip(box, stride, strict=True))
        span = 1 + sum((size - 1) * step for size, step in zip(sizes, stride, strict=True))
        dense = span == into.numel() and all(
            size == 1 or step == own for size, step, own in zip(sizes, stride, contiguous(sizes), strict=True)
        )
        if dense and into.is_contiguous():
            self._pread(location.path, location.offset + first * itemsize, memory(into))
            return
        dim = max((d for d, size in enumerate(sizes) if size > 1), key=lambda d: stride[d], default=None)
        if dim is not None and span * itemsize > WINDOW:
            half = sizes[dim] // 2
            for start, count in ((0, half), (half, sizes[dim] - half)):
                low = box[dim].start + start
                part = (*box[:dim], slice(low, low + count), *box[dim + 1 :])
                self.read(key, part, into.narrow(dim, start, count))
            return
        begin, end = first, first + span
        if dim is not None:
            # whole rows of the outermost dimension, where they fit: their other columns are asked for next
            extent = 1 + sum((size - 1) * step for size, step in zip(location.shape, stride, strict=True))
            outer = (p.start * step for p, step in zip(box, stride, strict=True) if step >= stride[dim])
            row = sum(outer)
            wide = max(end, min(row + sizes[dim] * stride[dim], extent))
            begin, end = (row, wide) if (wide - row) * itemsize <= WINDOW else (begin, end)
        window = self._window(location.path, location.offset + begin * itemsize, (end - begin) * itemsize)
        into.copy_(window.view(location.dtype).as_strided(sizes, stride, first - begin))

    def _window(self, path: Path, at: int, count: int) -> Tensor:
        """Bytes of a file; each thread keeps its last window."""
        local = self._local
        if getattr(local, "where", None) != (path, at, count):
            local.where = None
            if getattr(local, "buffer", None) is None or local.buffer.numel() < count:
                local.buffer = torch.empty(max(count, WINDOW), dtype=torch.uint8)
            self._pread(path, at, memory(local.buffer[:count]))
            local.where = (path, at, count)
        return local.buffer[:count]

    def _pread(self, path: Path, at: int, into: memoryview) -> None:
        with self._lock:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
        if not pread(self._handles[path], into, at):
            raise PolymodalError(
                f"{path} ends before its tensors do.", "The file is cut short: fetch it again."
            )


def _first_row(piece: Piece) -> int:
    return piece.offset[0]


class Remapped:
    """Tensors made of boxes of another source's; what no box fills reads as zero."""

    def __init__(self, source: Source, layout: Layout):
        self.source, self.layout = source, dict(layout)
        self._sorted: dict[str, tuple[list[Piece], int]] = {}
        self.shapes = {key: tuple(stored.shape) for key, stored in layout.items()}
        self.dtypes = {key: self._dtype(key, stored) for key, stored in layout.items()}

    def _dtype(self, key: str, stored: Stored) -> torch.dtype:
        dtypes = {self.source.dtypes[piece.key] for piece in stored.pieces}
        if len(dtypes) != 1:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "none"
            raise PolymodalError(
                f"{key} is put together from tensors of different types ({names}).",
                "Save the checkpoint in one type.",
            )
        return dtypes.pop()

    def _near(self, key: str, rows: slice) -> Stored:
        """A tensor with those of its pieces that may overlap some rows, where it has many."""
        stored = self.layout[key]
        if len(stored.pieces) <= FEW:
            return stored
        if key not in self._sorted:
            longest = max(piece.size[0] for piece in stored.pieces)
            self._sorted[key] = sorted(stored.pieces, key=_first_row), longest
        pieces, longest = self._sorted[key]
        low = bisect_right(pieces, rows.start - longest, key=_first_row)
        return Stored(stored.shape, pieces[low : bisect_left(pieces, rows.stop, key=_first_row)])

    def read(self, key: str, box: Box, into: Tensor) -> None:
        stored = self._near(key, box[0]) if box else self.layout[key]
        for dim, part in enumerate(box):
            if part.stop - part.start != stored.shape[dim]:
                stored = stored.narrow(dim, part.start, part.stop - part.start)
        if not stored.complete:
            into.zero_()
        for piece in stored.pieces:
            self.source.read(piece.key, piece.box, piece.view(into))


def renamed(source: Source, names: Mapping[str, str]) -> Remapped:
    """Some of a source's tensors under other names: new name -> name."""
    return Remapped(source, {new: Stored.whole(old, source.shapes[old]) for new, old in names.items()})


def subset(source: Source, keys: Iterable[str]) -> Remapped:
    """Some of a source's tensors."""
    return renamed(source, {key: key for key in keys})


class Joined:
    """Several sources as one; their names do not overlap."""

    def __init__(self, *sources: Source):
        self.home = {key: source for source in sources for key in source.shapes}
        self.shapes = {key: tuple(source.shapes[key]) for key, source in self.home.items()}
        self.dtypes = {key: source.dtypes[key] for key, source in self.home.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        self.home[key].read(key, box, into)


class InMemory:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)
        self.shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        self.dtypes = {key: value.dtype for key, value in tensors.items()}

    def read(self, key: str, box: Box, into: Tensor) -> None:
        into.copy_(self.tensors[key][box])


@dataclass(frozen=True)
class Duplicate:
    """A box that a layout holds twice: the tensor and its slices that are used, and the tensor and slices
    that are not."""

    used: str
    used_box: Box
    other: str
    other_box: Box


def invert(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Stored], list[Duplicate]]:
    """The layout of the sources in terms of the targets, and the boxes that several targets hold.

    shapes: of the sources. Raises PolymodalError for a source that the targets do not hold in full.
    """
    found: dict[str, dict[tuple, tuple[Piece, str, Box]]] = {key: {} for key in shapes}
    duplicates: list[Duplicate] = []
    for target, stored in layout.items():
        for piece in stored.pieces:
            inverse = _inverse(piece, target)
            box = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.size, strict=True))
            region = (inverse.offset, inverse.size)
            first = found[piece.key].setdefault(region, (inverse, target, box))
            if first[0] is not inverse:
                duplicates.append(Duplicate(first[1], first[2], target, box))
    out = {}
    for key, shape in shapes.items():
        out[key] = Stored(shape, [inverse for inverse, _, _ in found[key].values()])
        if not out[key].complete:
            held = sum(prod(piece.size) for piece in out[key].pieces)
            raise PolymodalError(
                f"{key} ({list(shape)}) cannot be put together: "
                f"only {held} of its {prod(shape)} values are there.",
                "A file of the tree is missing, or the layout that was given is not the tree's.",
            )
    return out, duplicates


def _inverse(piece: Piece, target: str) -> Piece:
    """A piece with source and target exchanged."""
    dims: list[int | None] = [None] * len(piece.start)
    for along, source_dim in enumerate(piece.dims):
        if source_dim is not None:
            dims[source_dim] = along
    size = tuple(1 if along is None else piece.size[along] for along in dims)
    return Piece(target, piece.offset, piece.start, size, tuple(dims))
