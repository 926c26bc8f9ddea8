"""Ulysses: before attention each rank trades its rows of all heads for all rows of its heads, after it back again.

Ground floor: imports torch only. Heads need not divide by the group: a rank's query heads differ by at most one, and
it is sent the key heads that these look at, so a key head may go to several ranks (Jacobs et al. 2023, DeepSpeed
Ulysses).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.parallel.share import cut_points

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


def _to_heads(tensors: Sequence[Tensor], heads: Sequence[Heads], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:  # fmt: skip
    """Each tensor [B, n, H_t, D] -> [B, sum(rows), heads of this rank, D]; one exchange for all of them."""
    rank, size = group.rank(), group.size()
    batch, mine, _, width = tensors[0].shape
    counts = [sum(len(of[r]) for of in heads) for r in range(size)]
    packed = [
        tensor[:, :, of[r].start : of[r].stop].permute(2, 0, 1, 3).flatten()
        for r in range(size)
        for tensor, of in zip(tensors, heads, strict=True)
    ]
    sent = torch.cat(packed)
    block = batch * width
    received = sent.new_empty(counts[rank] * sum(rows) * block)
    dist.all_to_all_single(
        received, sent, [counts[rank] * n * block for n in rows], [count * mine * block for count in counts], group=group
    )  # fmt: skip
    out = [received.new_empty(batch, sum(rows), len(of[rank]), width) for of in heads]
    place = row = 0
    for n in rows:
        for tensor, of in zip(out, heads, strict=True):
            size_here = len(of[rank]) * n * block
            part = received[place : place + size_here].view(len(of[rank]), batch, n, width)
            tensor[:, row : row + n] = part.permute(1, 2, 0, 3)
            place += size_here
        row += n
    return out


def _to_rows(tensors: Sequence[Tensor], heads: Sequence[Heads], totals: Sequence[int], rows: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:  # fmt: skip
    """The way back: [B, sum(rows), heads of this rank, D] -> [B, n, totals[t], D]; a head that several ranks had is summed."""
    rank, size = group.rank(), group.size()
    batch, width, mine = tensors[0].shape[0], tensors[0].shape[-1], rows[group.rank()]
    counts = [sum(len(of[r]) for of in heads) for r in range(size)]
    packed, row = [], 0
    for n in rows:
        packed += [tensor[:, row : row + n].permute(2, 0, 1, 3).flatten() for tensor in tensors]
        row += n
    sent = torch.cat(packed)
    block = batch * width
    received = sent.new_empty(sum(counts) * mine * block)
    dist.all_to_all_single(
        received, sent, [count * mine * block for count in counts], [counts[rank] * n * block for n in rows], group=group
    )  # fmt: skip
    out = [
        received.new_empty(batch, mine, total, width)
        if sum(map(len, of)) == total
        else received.new_zeros(batch, mine, total, width)
        for total, of in zip(totals, heads, strict=True)
    ]
    place = 0
    for r in range(size):
        for tensor, of in zip(out, heads, strict=True):
            size_here = len(of[r]) * mine * block
            part = received[place : place + size_here].view(len(of[r]), batch, mine, width)
            target = tensor[:, :, of[r].start : of[r].stop]
            if sum(map(len, of)) == tensor.shape[2]:
                target.copy_(part.permute(1, 2, 0, 3))
            else:
                target.add_(part.permute(1, 2, 0, 3))
            place += size_here
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
