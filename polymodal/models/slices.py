"""Boxes of stored tensors, of parameters and of this rank's shards: arithmetic on shapes, no values.

`Stored` goes through the library's conversion operations in place of a tensor and records the boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Spans = list[tuple[int, int]]
"""Half-open ranges of indices along one dimension, in the order in which they lie."""


class NotASlice(Exception):
    """An operation computes with the values or regroups them: the result is no boxes of its inputs."""


@dataclass(frozen=True)
class Piece:
    """A box of the stored tensor `key` and the box of the target that it fills.

    start:  where the box begins, for each dimension of the stored tensor.
    offset: where it begins, for each dimension of the target.
    size:   its extent along each dimension of the target.
    dims:   the stored dimension along each target dimension; None for one that the stored tensor lacks
            (extent 1). A stored dimension that is not named has extent 1.
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
            offset=_replaced(self.offset, dim, low - begin),
            size=_replaced(self.size, dim, high - low),
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


def _replaced(values: Sequence, index: int, *new: Any) -> tuple:
    """`new` in place of the value at an index."""
    return (*values[:index], *new, *values[index + 1 :])


class Stored:
    """In place of a tensor that is made of boxes of stored tensors; no values are read.

    The functions of RELOCATING work on it; all others (arithmetic, reshaping) raise NotASlice.
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
        """Whether every element is in some file (pieces never overlap)."""
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
        return Stored(_replaced(self.shape, dim, length), [piece for piece in cut if piece is not None])

    def _rearranged(self, change: Callable[[Sequence, Any], tuple]) -> Stored:
        """change: values of all dimensions, and of a new one -> the values afterwards."""
        pieces = [
            replace(p, offset=change(p.offset, 0), size=change(p.size, 1), dims=change(p.dims, None))
            for p in self.pieces
        ]
        return Stored(change(self.shape, 1), pieces)

    def squeeze(self, dim: int) -> Stored:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        return self._rearranged(lambda values, new: _replaced(values, dim))

    def unsqueeze(self, dim: int) -> Stored:
        dim %= self.ndim + 1
        return self._rearranged(lambda values, new: (*values[:dim], new, *values[dim:]))

    def transpose(self, dim0: int, dim1: int) -> Stored:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self._rearranged(lambda values, new: tuple(values[i] for i in order))

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

    @staticmethod
    def cat(tensors: Sequence[Stored], dim: int = 0) -> Stored:
        dim %= tensors[0].ndim
        first = tensors[0].shape
        pieces: list[Piece] = []
        at = 0
        for tensor in tensors:
            if _replaced(tensor.shape, dim) != _replaced(first, dim):
                raise ValueError(
                    f"shapes {tuple(first)} and {tuple(tensor.shape)} do not join along dimension {dim}"
                )
            pieces += [replace(p, offset=_replaced(p.offset, dim, p.offset[dim] + at)) for p in tensor.pieces]
            at += tensor.shape[dim]
        return Stored(_replaced(first, dim, at), pieces)

    @staticmethod
    def stack(tensors: Sequence[Stored], dim: int = 0) -> Stored:
        dim %= tensors[0].ndim + 1
        return Stored.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func not in RELOCATING:
            raise NotASlice(name)
        return getattr(Stored, name)(*args, **(kwargs or {}))


RELOCATING = (
    *(torch.cat, torch.stack, torch.chunk, torch.split, torch.narrow),
    *(torch.transpose, torch.squeeze, torch.unsqueeze),
)


def local_spans(tensor: Tensor) -> list[Spans]:
    """For each dimension, which indices of the whole tensor this rank's shard holds, in the shard's order.

    A plain tensor holds everything. Placements are applied from left to right; `_StridedShard` (FSDP over TP)
    cuts into `split_factor` groups first, each like `torch.chunk`, and takes this rank's part of every group.
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
            f"the shard has shape {local}, "
            f"but {extent(spans)} by its placements {tensor.placements} of {tuple(tensor.shape)}"
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
    """Each contiguous box of the whole tensor of a shard: ((begin, end) of each dimension, view of the
    shard)."""
    dimensions = []
    for ranges in spans:
        starts = accumulate((end - begin for begin, end in ranges), initial=0)
        dimensions.append([(*one, at) for one, at in zip(ranges, starts, strict=False)])
    for chosen in product(*dimensions):
        view = local
        for dim, (begin, end, at) in enumerate(chosen):
            view = view.narrow(dim, at, end - begin)
        yield tuple((begin, end) for begin, end, _ in chosen), view


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def copies(stored: Stored, tensor: Tensor) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """All reads for a tensor's shard on this rank: (key, slices of the stored tensor, view of the shard)."""
    return reads(stored, local_spans(tensor), local_part(tensor))


def reads(
    stored: Stored, spans: list[Spans], local: Tensor
) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """The same for any tensor that is to hold these spans."""
    for box, view in boxes(spans, local):
        part = stored
        for dim, (begin, end) in enumerate(box):
            part = part.narrow(dim, begin, end - begin)
        for piece in part.pieces:
            yield piece.key, piece.box, piece.view(view)


@torch.no_grad()
def scatter(whole: Tensor, tensor: Tensor) -> None:
    """Copy this rank's slices of `whole`, cast, into `tensor`, plain or a DTensor of that shape."""
    for box, view in boxes(local_spans(tensor), local_part(tensor)):
        view.copy_(whole[tuple(slice(*one) for one in box)])
