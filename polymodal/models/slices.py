"""Which part of a stored tensor belongs where: boxes of files, boxes of parameters, boxes of this rank's shards.

Pure arithmetic on shapes, used by weights.py to read and to write. Imports torch only and touches no file and no
model: `Stored` walks through the library's own conversion operations in place of a tensor and keeps the books.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Spans = list[tuple[int, int]]
"""Half-open ranges of indices along one dimension, in the order in which they lie."""


class NotASlice(Exception):
    """An operation computes with the values or regroups them: its result is not made of boxes of its inputs."""


@dataclass(frozen=True)
class Piece:
    """A box of the stored tensor `key` and the box of the target that it fills.

    start:  where the box begins, for each dimension of the stored tensor.
    offset: where it begins, for each dimension of the target.
    size:   its extent along each dimension of the target.
    dims:   the stored dimension along each target dimension; None for one that the stored tensor lacks (extent 1).
            A stored dimension that is not named has extent 1.
    """

    key: str
    start: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dims: tuple[int | None, ...]

    def narrow(self, dim: int, begin: int, end: int) -> Piece | None:
        """The part inside target indices begin..end of `dim`, in coordinates that start at `begin`."""
        low = max(begin, self.offset[dim])
        high = min(end, self.offset[dim] + self.size[dim])
        if low >= high:
            return None
        start = list(self.start)
        along = self.dims[dim]
        if along is not None:
            start[along] += low - self.offset[dim]
        return replace(
            self,
            start=tuple(start),
            offset=_put(self.offset, dim, low - begin),
            size=_put(self.size, dim, high - low),
        )

    @property
    def box(self) -> tuple[slice, ...]:
        """The stored tensor's slices."""
        extent = [1] * len(self.start)
        for along, size in zip(self.dims, self.size, strict=True):
            if along is not None:
                extent[along] = size
        return tuple(slice(s, s + n) for s, n in zip(self.start, extent, strict=True))

    def view(self, target: Tensor) -> Tensor:
        """The target's box as a view in the stored tensor's own order and number of dimensions."""
        for dim, (offset, size) in enumerate(zip(self.offset, self.size, strict=True)):
            target = target.narrow(dim, offset, size)
        kept = [along for along in self.dims if along is not None]
        for dim in reversed(range(len(self.dims))):
            if self.dims[dim] is None:
                target = target.select(dim, 0)
        target = target.permute([kept.index(along) for along in sorted(kept)])
        for along in range(len(self.start)):
            if along not in kept:
                target = target.unsqueeze(along)
        return target


def _put(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])


class Stored:
    """Stands for a tensor made of boxes of stored tensors; `torch.cat` and its kin work on it, values are never read.

    Anything that is not mere placing (arithmetic, reshaping) raises NotASlice.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]):
        self.shape = torch.Size(shape)
        self.pieces = tuple(pieces)

    @classmethod
    def whole(cls, key: str, shape: Sequence[int]) -> Stored:
        rank = len(shape)
        return cls(shape, [Piece(key, (0,) * rank, (0,) * rank, tuple(shape), tuple(range(rank)))])

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(piece.key for piece in self.pieces))

    @property
    def complete(self) -> bool:
        """Whether every element has a place in some file (pieces never overlap)."""
        return sum(prod(piece.size) for piece in self.pieces) == prod(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Stored:
        return self

    def narrow(self, dim: int, start: int, length: int) -> Stored:
        dim %= self.ndim
        cut = [piece.narrow(dim, start, start + length) for piece in self.pieces]
        return Stored(_put(tuple(self.shape), dim, length), [piece for piece in cut if piece is not None])

    def squeeze(self, dim: int) -> Stored:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        return Stored(_drop(self.shape, dim), [
            replace(p, offset=_drop(p.offset, dim), size=_drop(p.size, dim), dims=_drop(p.dims, dim)) for p in self.pieces
        ])  # fmt: skip

    def unsqueeze(self, dim: int) -> Stored:
        dim %= self.ndim + 1
        return Stored(_insert(self.shape, dim, 1), [
            replace(p, offset=_insert(p.offset, dim, 0), size=_insert(p.size, dim, 1), dims=_insert(p.dims, dim, None))
            for p in self.pieces
        ])  # fmt: skip

    def transpose(self, dim0: int, dim1: int) -> Stored:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]

        def swap(values: Sequence) -> tuple:
            return tuple(values[i] for i in order)

        return Stored(swap(self.shape), [
            replace(p, offset=swap(p.offset), size=swap(p.size), dims=swap(p.dims)) for p in self.pieces
        ])  # fmt: skip

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Stored, ...]:
        dim %= self.ndim
        total = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, total - at) for at in range(0, total, sizes)]
        if sum(sizes) != total:
            raise ValueError(f"sizes {list(sizes)} do not add up to {total}")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(self.narrow(dim, end - size, size) for end, size in zip(ends, sizes, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Stored, ...]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def __getitem__(self, index: Any) -> Any:
        raise NotASlice("[]")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else NotASlice(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        known: dict[Any, Callable[..., Any]] = {
            torch.cat: _cat,
            torch.stack: _stack,
            torch.transpose: Stored.transpose,
            torch.chunk: Stored.chunk,
            torch.split: Stored.split,
            torch.squeeze: Stored.squeeze,
            torch.unsqueeze: Stored.unsqueeze,
            torch.narrow: Stored.narrow,
        }
        if func not in known:
            raise NotASlice(getattr(func, "__name__", str(func)))
        return known[func](*args, **(kwargs or {}))


def _drop(values: Sequence, index: int) -> tuple:
    return (*values[:index], *values[index + 1 :])


def _insert(values: Sequence, index: int, value: Any) -> tuple:
    return (*values[:index], value, *values[index:])


def _cat(tensors: Sequence[Stored], dim: int = 0) -> Stored:
    dim %= tensors[0].ndim
    pieces: list[Piece] = []
    at = 0
    for tensor in tensors:
        if _drop(tensor.shape, dim) != _drop(tensors[0].shape, dim):
            raise ValueError(
                f"shapes {tuple(tensors[0].shape)} and {tuple(tensor.shape)} do not join along dimension {dim}"
            )
        pieces += [replace(p, offset=_put(p.offset, dim, p.offset[dim] + at)) for p in tensor.pieces]
        at += tensor.shape[dim]
    return Stored(_put(tuple(tensors[0].shape), dim, at), pieces)


def _stack(tensors: Sequence[Stored], dim: int = 0) -> Stored:
    dim %= tensors[0].ndim + 1
    return _cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def local_spans(tensor: Tensor) -> list[Spans]:
    """For each dimension, which indices of the whole tensor this rank's shard holds, in the shard's order.

    A plain tensor holds everything. Placements are applied from left to right; `_StridedShard` (FSDP over TP) cuts
    into `split_factor` groups first, each like `torch.chunk`, and takes this rank's part of every group.
    Raises ValueError for partial sums and for a shard whose shape is not what its placements say.
    """
    if not isinstance(tensor, DTensor):
        return [[(0, size)] for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    held: dict[int, Tensor] = {}
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", None)
        if dim is None or coordinate is None:
            raise ValueError(f"a tensor placed {tensor.placements} has no slice of its own on this rank")
        indices = held.get(dim, torch.arange(tensor.shape[dim]))
        ranks = tensor.device_mesh.size(axis)
        groups = _chunks(indices, getattr(placement, "split_factor", 1))
        held[dim] = torch.cat([_chunks(group, ranks)[coordinate[axis]] for group in groups])
    spans = [_spans(held[dim]) if dim in held else [(0, size)] for dim, size in enumerate(tensor.shape)]
    local = tuple(tensor.to_local().shape)
    if local != extent(spans):
        raise ValueError(
            f"the shard has shape {local}, its placements {tensor.placements} of {tuple(tensor.shape)} say {extent(spans)}"
        )
    return spans


def _chunks(indices: Tensor, count: int) -> list[Tensor]:
    chunks = list(torch.chunk(indices, count))
    return chunks + [indices[:0]] * (count - len(chunks))


def _spans(indices: Tensor) -> Spans:
    if indices.numel() == 0:
        return []
    breaks = (indices.diff() != 1).nonzero().flatten().tolist()
    starts = [0, *(i + 1 for i in breaks)]
    ends = [*(i + 1 for i in breaks), indices.numel()]
    return [(int(indices[a]), int(indices[b - 1]) + 1) for a, b in zip(starts, ends, strict=True)]


def extent(spans: list[Spans]) -> tuple[int, ...]:
    """Shape of the shard that holds these spans."""
    return tuple(sum(end - begin for begin, end in one) for one in spans)


def boxes(spans: list[Spans], local: Tensor) -> Iterator[tuple[tuple[tuple[int, int], ...], Tensor]]:
    """Each contiguous box of the whole tensor that a shard holds: ((begin, end) for each dimension, the shard's view)."""
    places = []
    for one in spans:
        at, row = 0, []
        for begin, end in one:
            row.append((begin, end, at))
            at += end - begin
        places.append(row)
    for chosen in product(*places):
        view = local
        for dim, (begin, end, at) in enumerate(chosen):
            view = view.narrow(dim, at, end - begin)
        yield tuple((begin, end) for begin, end, _ in chosen), view


def copies(
    stored: Stored, spans: list[Spans], local: Tensor
) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """Everything to be read for a shard: (key, slices of the stored tensor, view of the shard of the same shape)."""
    for box, view in boxes(spans, local):
        part = stored
        for dim, (begin, end) in enumerate(box):
            part = part.narrow(dim, begin, end - begin)
        for piece in part.pieces:
            yield piece.key, piece.box, piece.view(view)


@torch.no_grad()
def scatter(whole: Tensor, tensor: Tensor) -> None:
    """Copy this rank's slices of `whole`, cast, into `tensor`, plain or a DTensor of that shape."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
    for box, view in boxes(local_spans(tensor), local):
        view.copy_(whole[tuple(slice(*one) for one in box)])
