"""Ulysses: before attention each rank trades its rows of all heads for all rows of its heads, after it back again.

Ground floor: imports torch only. Heads need not divide by the group: a rank's query heads differ by at most one, and
it is sent the key heads that these look at, so a key head may go to several ranks (Jacobs et al. 2023, DeepSpeed
Ulysses).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.distributed.sequence_sharding import cut_points

Heads = Sequence[range]
"""By rank, the consecutive heads it gets."""


def query_heads(heads: int, size: int) -> list[range]:
    """Query heads of each rank; counts differ by at most one."""
    points = cut_points(heads, size)
    return [range(start, stop) for start, stop in zip(points, points[1:], strict=False)]


def key_heads(heads: int, keys: int, size: int) -> list[range]:
    """The key heads that each rank's query heads look at; ranks may share one."""
    group = heads // keys
    return [
        range(mine[0] // group, mine[-1] // group + 1) if mine else range(0)
        for mine in query_heads(heads, size)
    ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one flat buffer, in order; each is copied once, none if they lie so already."""
    if len(parts) == 1 and parts[0].is_contiguous():
        return parts[0].flatten()
    joined = parts[0].new_empty(sum(part.numel() for part in parts))
    for part, place in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
        place.view(part.shape).copy_(part)
    return joined


def _trade(
    sent: Tensor, sent_sizes: list[int], shapes: Sequence[Sequence[tuple[int, ...]]], group: dist.ProcessGroup
) -> list[list[Tensor]]:
    """One exchange of flat pieces; by rank, what it sent in these shapes."""
    sizes = [[math.prod(shape) for shape in of] for of in shapes]
    received = sent.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, sent, [sum(of) for of in sizes], sent_sizes, group=group)
    parts = iter(received.split([size for of in sizes for size in of]))
    return [[next(parts).view(shape) for shape in of] for of in shapes]


def _to_heads(tensors: Sequence[Tensor], heads: Sequence[Heads], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:  # fmt: skip
    """Each tensor [B, n, H_t, D] -> [B, sum(rows), heads of this rank, D]; one exchange for all of them."""
    rank, size = group.rank(), group.size()
    batch, mine, _, width = tensors[0].shape
    parts = [
        tensor[:, :, of[r].start : of[r].stop]
        for r in range(size)
        for tensor, of in zip(tensors, heads, strict=True)
    ]
    counts = [sum(len(of[r]) for of in heads) * mine * batch * width for r in range(size)]
    came = _trade(
        _joined(parts), counts, [[(batch, n, len(of[rank]), width) for of in heads] for n in rows], group
    )
    return [torch.cat(pieces, dim=1) for pieces in zip(*came, strict=True)]


def _to_rows(tensors: Sequence[Tensor], heads: Sequence[Heads], totals: Sequence[int], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:  # fmt: skip
    """The way back: [B, sum(rows), heads of this rank, D] -> [B, n, totals[t], D]; a head that several ranks had is summed."""
    rank, size = group.rank(), group.size()
    batch, width, mine = tensors[0].shape[0], tensors[0].shape[-1], rows[group.rank()]
    counts = [sum(len(of[rank]) for of in heads) * n * batch * width for n in rows]
    if len(tensors) == 1 and batch == 1:  # rows of a rank lie together
        sent = _joined(tensors)
    else:
        by_rows = [tensor.split(list(rows), dim=1) for tensor in tensors]
        sent = _joined([part for parts in zip(*by_rows, strict=True) for part in parts])
    came = _trade(sent, counts, [[(batch, mine, len(of[r]), width) for of in heads] for r in range(size)], group)  # fmt: skip
    out = []
    for total, of, pieces in zip(totals, heads, zip(*came, strict=True), strict=True):
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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int], group: dist.ProcessGroup) -> tuple:  # fmt: skip
        count, keys = query.shape[2], key.shape[2]
        wanted = key_heads(count, keys, group.size())
        ctx.heads, ctx.totals = (query_heads(count, group.size()), wanted, wanted), (count, keys, keys)
        ctx.rows, ctx.group = rows, group
        return tuple(_to_heads((query, key, value), ctx.heads, rows, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *_to_rows(grads, ctx.heads, ctx.totals, ctx.rows, ctx.group), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, heads: int, rows: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.heads, ctx.rows, ctx.group = (query_heads(heads, group.size()),), rows, group
        return _to_rows((out,), ctx.heads, (heads,), rows, group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _to_heads((grad,), ctx.heads, ctx.rows, ctx.group)[0], None, None, None


def scatter_heads(query: Tensor, key: Tensor, value: Tensor, rows: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [B, n, H, D] and [B, n, K, D] (n = rows[rank]) -> all rows [B, sum(rows), ...] of this rank's heads.

    The key heads that come are those its query heads look at; when these do not fall into equal groups, keys and
    values are repeated, one a query head.
    """
    heads, keys = query.shape[2], key.shape[2]
    q, k, v = _Scatter.apply(query, key, value, rows, group)
    mine = query_heads(heads, group.size())[group.rank()]
    looked_at = [head * keys // heads - mine[0] * keys // heads for head in mine]
    count = k.shape[2]
    regular = not mine or (
        len(mine) % count == 0 and looked_at == [i // (len(mine) // count) for i in range(len(mine))]
    )
    if not regular:
        index = torch.tensor(looked_at, device=k.device)
        k, v = k.index_select(2, index), v.index_select(2, index)
    return q, k, v


def gather_heads(out: Tensor, heads: int, rows: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All rows of this rank's heads [B, sum(rows), h, D] -> this rank's rows of all `heads` [B, n, heads, D]."""
    return _Gather.apply(out, heads, rows, group)
