"""Ulysses: ranks exchange their rows of all heads for all rows of their heads, and back after attention.

Heads need not divide by the group: ranks' query heads differ by at most one, and each is sent the key heads
that these attend to, so a key head may go to several ranks (Jacobs et al. 2023, DeepSpeed Ulysses).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.core.tensors import to_device
from polymodal.distributed.sequence_sharding import cut_points

Heads = Sequence[range]
"""By rank, the consecutive heads it gets."""
Rows = Sequence[int]
"""By rank, the number of rows it holds."""
Group = dist.ProcessGroup


def query_heads(heads: int, size: int) -> list[range]:
    """Query heads of each rank; counts differ by at most one."""
    points = cut_points(heads, size)
    return [range(start, stop) for start, stop in zip(points, points[1:], strict=False)]


def key_heads(heads: int, keys: int, size: int) -> list[range]:
    """The key heads that each rank's query heads attend to; ranks may share one."""
    group = heads // keys
    return [
        range(mine[0] // group, mine[-1] // group + 1) if mine else range(0)
        for mine in query_heads(heads, size)
    ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one flat buffer, in order; each is copied once, a single contiguous one not at all."""
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0].flatten()
    joined = parts[0].new_empty(sum(part.numel() for part in parts))
    for part, place in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
        place.view(part.shape).copy_(part)
    return joined


def _exchange(
    sent: Tensor, sent_sizes: list[int], shapes: list[list[tuple[int, ...]]], group: Group
) -> list[list[Tensor]]:
    """One all-to-all of flat pieces; by source rank, what it sent in these shapes."""
    sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
    received = sent.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, sent, [sum(of_rank) for of_rank in sizes], sent_sizes, group=group)
    parts = iter(received.split([size for of_rank in sizes for size in of_rank]))
    return [[next(parts).view(shape) for shape in of_rank] for of_rank in shapes]


def _to_heads(tensors: Sequence[Tensor], heads: Sequence[Heads], rows: Rows, group: Group) -> list[Tensor]:
    """Each tensor [B, n, H_t, D] -> [B, sum(rows), heads of this rank, D]; one exchange for all of them."""
    rank, size = group.rank(), group.size()
    batch, mine, _, width = tensors[0].shape
    parts = [
        tensor[:, :, of[r].start : of[r].stop]
        for r in range(size)
        for tensor, of in zip(tensors, heads, strict=True)
    ]
    counts = [sum(len(of[r]) for of in heads) * mine * batch * width for r in range(size)]
    shapes = [[(batch, n, len(of[rank]), width) for of in heads] for n in rows]
    received = _exchange(_joined(parts), counts, shapes, group)
    return [torch.cat(pieces, dim=1) for pieces in zip(*received, strict=True)]


def _to_rows(
    tensors: Sequence[Tensor], heads: Sequence[Heads], totals: Sequence[int], rows: Rows, group: Group
) -> list[Tensor]:
    """The inverse: [B, sum(rows), own heads, D] -> [B, n, totals[t], D]; shared heads are summed."""
    rank, size = group.rank(), group.size()
    batch, width, mine = tensors[0].shape[0], tensors[0].shape[-1], rows[group.rank()]
    counts = [sum(len(of[rank]) for of in heads) * n * batch * width for n in rows]
    if len(tensors) == 1 and batch == 1:  # rows of a rank lie together
        sent = _joined(tensors)
    else:
        by_rows = [tensor.split(list(rows), dim=1) for tensor in tensors]
        sent = _joined([part for parts in zip(*by_rows, strict=True) for part in parts])
    shapes = [[(batch, mine, len(of[r]), width) for of in heads] for r in range(size)]
    received = _exchange(sent, counts, shapes, group)
    out = []
    for total, of, pieces in zip(totals, heads, zip(*received, strict=True), strict=True):
        if sum(map(len, of)) == total:
            out.append(torch.cat(pieces, dim=2))
            continue
        whole = pieces[0].new_zeros(batch, mine, total, width)
        for r, piece in enumerate(pieces):
            whole[:, :, of[r].start : of[r].stop] += piece
        out.append(whole)
    return out


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Rows, group: Group) -> tuple:
        count, keys = query.shape[2], key.shape[2]
        of_keys = key_heads(count, keys, group.size())
        ctx.heads, ctx.totals = (query_heads(count, group.size()), of_keys, of_keys), (count, keys, keys)
        ctx.rows, ctx.group = rows, group
        return tuple(_to_heads((query, key, value), ctx.heads, rows, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *_to_rows(grads, ctx.heads, ctx.totals, ctx.rows, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, heads: int, rows: Rows, group: Group) -> Tensor:
        ctx.heads, ctx.rows, ctx.group = (query_heads(heads, group.size()),), rows, group
        return _to_rows((out,), ctx.heads, (heads,), rows, group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _to_heads((grad,), ctx.heads, ctx.rows, ctx.group)[0], None, None, None


@functools.lru_cache(64)  # the same for every layer
def _places(heads: tuple[int, ...], on: torch.device) -> Tensor:
    return to_device(torch.tensor(heads), on)


def scatter_heads(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, group: Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, n, H, D], [B, n, K, D] (n = rows[rank]) -> all rows [B, sum(rows), ...] of own heads.

    The key heads received are those its query heads attend to; when these do not fall into equal groups, keys
    and values are repeated, one a query head.
    """
    heads, keys = query.shape[2], key.shape[2]
    q, k, v = _Scatter.apply(query, key, value, rows, group)
    own, count = query_heads(heads, group.size())[group.rank()], k.shape[2]
    attended = [head * keys // heads - own[0] * keys // heads for head in own]
    even = len(own) % max(1, count) == 0
    if own and not (even and attended == [i // (len(own) // count) for i in range(len(own))]):
        index = _places(tuple(attended), k.device)
        k, v = k.index_select(2, index), v.index_select(2, index)
    return q, k, v


def gather_heads(out: Tensor, heads: int, rows: Rows, group: Group) -> Tensor:
    """All rows of this rank's heads [B, sum(rows), h, D] -> its rows of all heads [B, n, heads, D]."""
    return _Gather.apply(out, heads, rows, group)
