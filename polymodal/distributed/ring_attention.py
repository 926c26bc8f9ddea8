"""Ring attention: keys and values are passed around a group, each rank keeps its queries.

The kernel returns, beside its output, the logarithm of the softmax's denominator, so that results over parts
of the keys merge exactly. The backward pass sends keys, values and their gradients around the ring (Liu et
al. 2023, Ring Attention; Dao 2023, FlashAttention-2, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polymodal.distributed import flash_kernels
from polymodal.distributed.sequence_sharding import SequenceSharding

SHORT = 256
"""Segments up to this many tokens are computed in float32 on a CPU (see `widened`)."""


def widened(query: Tensor) -> bool:
    """Whether dense attention of [n, H, L, D] queries is computed in float32 instead of half precision.

    torch's CPU backward in half precision costs 2 to 10 times the float32 one on short segments (measured: 64
    windows of 16 tokens 36 ms against 4; 16 of 64 tokens 95 against 42).
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return half and query.device.type == "cpu" and query.shape[2] <= SHORT


# The local kernel: queries and keys of the same segments, of different lengths --------------------


def _groups(query_runs: Sequence[int], key_runs: Sequence[int]) -> list[tuple[int, int, list[int]]]:
    """(queries, keys, the segments with these counts), without segments that have none of either."""
    groups: dict[tuple[int, int], list[int]] = {}
    for segment, pair in enumerate(zip(query_runs, key_runs, strict=True)):
        if min(pair) > 0:
            groups.setdefault(pair, []).append(segment)
    return [(*pair, segments) for pair, segments in groups.items()]


def _of_segments(rows: Tensor, runs: Sequence[int], segments: list[int]) -> list[Tensor]:
    """Views of some segments' rows; one view when it is all of them."""
    if len(segments) == len(runs):
        return [rows]
    parts = rows.split(list(runs))
    return [parts[segment] for segment in segments]


def _dense(rows: Tensor, runs: Sequence[int], segments: list[int], length: int) -> Tensor:
    """Rows [n, h, D] of some segments, all of the same length -> [segments, h, length, D]."""
    parts = _of_segments(rows, runs, segments)
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.view(-1, length, *rows.shape[1:]).transpose(1, 2)


def _pairs(rows: Tensor, runs: Sequence[int], segments: list[int], values: Tensor) -> Iterator[tuple]:
    """Views of some segments' rows, each with its part of the dense values [segments, h, length, D]."""
    targets = _of_segments(rows, runs, segments)
    values = values.transpose(1, 2).flatten(0, 1)
    return zip(targets, values.split([len(target) for target in targets]), strict=True)


Places = list[slice]


def _filled(query_runs: Sequence[int], key_runs: Sequence[int]) -> tuple[list[list[int]], Places, Places]:
    """The segments that have queries and keys, as fused kernels want them: their runs of both, and the rows
    of either that these are, in as few slices as possible."""
    kept = [min(pair) > 0 for pair in zip(query_runs, key_runs, strict=True)]
    counts, places = [], []
    for runs in (query_runs, key_runs):
        slices: Places = []
        start = 0
        for count, keep in zip(runs, kept, strict=True):
            if keep and slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, start + count)
            elif keep:
                slices.append(slice(start, start + count))
            start += count
        counts.append([count for count, keep in zip(runs, kept, strict=True) if keep])
        places.append(slices)
    return counts, places[0], places[1]


def _taken(rows: Tensor, places: Places) -> Tensor:
    return rows[places[0]] if len(places) == 1 else torch.cat([rows[place] for place in places])


def _each(total: Tensor, places: Places, part: Tensor, do: Callable[[Tensor, Tensor], Any]) -> None:
    """Copy or add a part into its places, which are views."""
    own = part.split([place.stop - place.start for place in places])
    for place, values in zip(places, own, strict=True):
        do(total[place], values)


@torch.no_grad()
def forward_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_runs: Sequence[int],
    key_runs: Sequence[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of each segment's queries to its keys here: output [n, h, D] float32 (float64 for such
    inputs) and the log of the sum of exponentials [n, h]; 0 and -inf for queries without keys.

    query [n, h, D]; key, value [m, k, D], h a multiple of k; query_runs, key_runs: rows of every segment.
    causal: query i of a segment sees keys 0..i of it (as many keys as queries).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    fused = flash_kernels.kernel(query.device.type, query.dtype, query.shape[-1])
    out = query.new_zeros(query.shape, dtype=wide)
    lse = query.new_full(query.shape[:2], float("-inf"), dtype=wide)
    if fused is not None:
        runs, rows, of = _filled(query_runs, key_runs)
        if runs[0]:
            parts = (_taken(query, rows), _taken(key, of), _taken(value, of))
            for total, part in zip((out, lse), fused.forward(*parts, *runs, causal, scale), strict=True):
                _each(total, rows, part, Tensor.copy_)
        return out, lse
    for queries, keys, segments in _groups(query_runs, key_runs):
        q = _dense(query, query_runs, segments, queries)
        k, v = (_dense(rows, key_runs, segments, keys) for rows in (key, value))
        results = _forward(q, k, v, causal, scale)
        for rows, values in zip((out, lse), results, strict=True):
            for target, own in _pairs(rows, query_runs, segments, values):
                target.copy_(own)
    return out, lse


@torch.no_grad()
def backward_block(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_runs: Sequence[int],
    key_runs: Sequence[int],
    causal: bool,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Add this block's share of the gradients to grad_query [n, h, D], grad_key and grad_value [m, k, D].

    out, lse: of the WHOLE attention of these queries, over all blocks; other arguments as in forward_block.
    """
    fused = flash_kernels.kernel(query.device.type, query.dtype, query.shape[-1])
    if fused is not None:
        counts, rows, of = _filled(query_runs, key_runs)
        if counts[0]:
            g, q, o, norm = (_taken(tensor, rows) for tensor in (grad, query, out, lse))
            k, v = (_taken(tensor, of) for tensor in (key, value))
            parts = fused.backward(g, q, k, v, o, norm, *counts, causal, scale)
            targets = ((grad_query, rows), (grad_key, of), (grad_value, of))
            for (total, where), part in zip(targets, parts, strict=True):
                _each(total, where, part, Tensor.add_)
        return
    for queries, keys, segments in _groups(query_runs, key_runs):
        g, q, o, norm = (
            _dense(rows, query_runs, segments, queries) for rows in (grad, query, out, lse.unsqueeze(-1))
        )
        k, v = (_dense(rows, key_runs, segments, keys) for rows in (key, value))
        parts = _backward(g, q, k, v, o, norm.squeeze(-1), causal, scale)
        totals = ((grad_query, query_runs), (grad_key, key_runs), (grad_value, key_runs))
        for (total, runs), part in zip(totals, parts, strict=True):
            for target, own in _pairs(total, runs, segments, part):
                target.add_(own)


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Dense [n, h, L, D] -> output and [n, h, L] log-sum-exp."""
    if widened(q):
        q, k, v = q.float(), k.float(), v.float()
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return plain_forward(q, k, v, causal, scale)


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if widened(q):
        g, q, k, v, out = g.float(), q.float(), k.float(), v.float(), out.float()
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out.to(q.dtype), lse, 0.0, causal, scale=scale
        )
    return plain_backward(g, q, k, v, out, lse, causal, scale)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """[n, k, g, Lq, Lk]: grouped queries beside their key head, in at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (k.shape[1], -1)).to(wide)
    scores = q @ k.unsqueeze(2).to(wide).transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def plain_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, for devices without a fused kernel that returns its log-sum-exp; scores are whole."""
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v.unsqueeze(2).to(scores.dtype)
    return out.flatten(1, 2), lse.flatten(1, 2)


def plain_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of plain_forward: dS = P * (dO V^T - rowsum(dO * O)), with P = exp(S - lse)."""
    scores = _scores(q, k, causal, scale)
    shape = (k.shape[1], -1)
    wide = scores.dtype
    g, out = g.unflatten(1, shape).to(wide), out.unflatten(1, shape).to(wide)
    p = (scores - lse.unflatten(1, shape).unsqueeze(-1)).exp()
    slope = p * (g @ v.unsqueeze(2).to(wide).transpose(-1, -2) - (g * out).sum(-1, keepdim=True)) * scale
    grad_q = (slope @ k.unsqueeze(2).to(wide)).flatten(1, 2)
    grad_k = (slope.transpose(-1, -2) @ q.unflatten(1, shape).to(wide)).sum(2)
    grad_v = (p.transpose(-1, -2) @ g).sum(2)
    return grad_q, grad_k, grad_v


# The ring -----------------------------------------------------------------------------------------


def exchange(sent: Tensor, to: int, received: Tensor, source: int, group: dist.ProcessGroup) -> list[Any]:
    """Start sending one tensor to a rank of the group and receiving another; `_wait` for what is returned.

    Both in one call: all ranks that only send would wait for each other on an accelerator.
    """
    send = dist.P2POp(dist.isend, sent, group=group, group_peer=to)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=source)
    return dist.batch_isend_irecv([send, receive])


def _wait(work: list[Any]) -> None:
    for each in work:
        each.wait()


def _seen(
    share: SequenceSharding, causal: bool, queries_of: int, keys_of: int
) -> list[tuple[int, slice, int, slice]]:
    """(query piece, its rows, key piece, its rows) of two ring ranks' pieces that attend to each other."""
    return [
        (i, rows, j, keys)
        for i, rows in share.slices(queries_of)
        for j, keys in share.slices(keys_of)
        if (not causal or j <= i) and share.sizes[i] and share.sizes[j]
    ]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        share: Any,
        causal: bool,
        scale: float,
        group: Any,
    ):
        rank, size = group.rank(), group.size()
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=wide)
        lse = query.new_full(query.shape[:2], float("-inf"), dtype=wide)
        held = torch.stack([key, value])
        for step in range(size):
            source = (rank - step) % size
            coming, moving = held, []
            if step < size - 1:
                coming = held.new_empty(2, share.rows_of((source - 1) % size), *key.shape[1:])
                moving = exchange(held, (rank + 1) % size, coming, (rank - 1) % size, group)
            for i, rows, j, keys in _seen(share, causal, rank, source):
                block = (query[rows], held[0, keys], held[1, keys], share.runs[i], share.runs[j])
                _merge(out[rows], lse[rows], *forward_block(*block, causal and i == j, scale))
            _wait(moving)
            held = coming
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.share, ctx.causal, ctx.scale, ctx.group = share, causal, scale, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        query, key, value, out, lse = ctx.saved_tensors
        share, causal, scale, group = ctx.share, ctx.causal, ctx.scale, ctx.group
        rank, size = group.rank(), group.size()
        after, before = (rank + 1) % size, (rank - 1) % size
        wide = lse.dtype
        grad = grad.contiguous()
        held = torch.stack([key, value])
        grad_query = torch.zeros_like(query, dtype=wide)
        own = torch.zeros_like(held, dtype=wide)
        arriving: Tensor | None = None
        sums: list[Any] = []  # gradients of keys and values on their way
        for step in range(size):
            source = (rank - step) % size
            shape = (2, share.rows_of((source - 1) % size), *key.shape[1:])
            coming, moving = held, []
            if step < size - 1:
                coming = held.new_empty(shape)
                moving = exchange(held, after, coming, before, group)
            total = own if step == 0 else torch.zeros_like(held, dtype=wide)
            for i, rows, j, keys in _seen(share, causal, rank, source):
                queries = (grad[rows], query[rows], held[0, keys], held[1, keys], out[rows], lse[rows])
                options = (share.runs[i], share.runs[j], causal and i == j, scale)
                backward_block(*queries, *options, grad_query[rows], total[0, keys], total[1, keys])
            _wait(sums)
            if arriving is not None:  # the sum of the ranks that had these keys before
                total += arriving
            _wait(moving)
            if step > 0:  # to the next rank, from the last one to the rank whose keys they are
                arriving, leaving = held.new_empty(shape), total.to(key.dtype)
                sums = exchange(leaving, after, arriving, before, group)
            held = coming
        _wait(sums)
        if arriving is not None:
            own += arriving
        return grad_query.to(query.dtype), own[0].to(key.dtype), own[1].to(key.dtype), None, None, None, None


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Attention over two sets of keys from that over each: out, lse become those of both, in place."""
    both = torch.logaddexp(lse, more_lse)
    # queries without any key yet: exp(-inf - -inf) is not a number
    safe = both.masked_fill(both == float("-inf"), 0)
    out.mul_((lse - safe).exp_().unsqueeze(-1)).addcmul_(more, (more_lse - safe).exp_().unsqueeze(-1))
    lse.copy_(both)


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    share: SequenceSharding,
    causal: bool,
    scale: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this ring rank's queries [n, h, D] to the keys of all ranks [m, k, D]: [n, h, D].

    Rows are in the order of share.slices; segments attend only to themselves. Gradients are whole: those of
    all ranks' losses with respect to this rank's rows.
    """
    return _Ring.apply(query, key.contiguous(), value.contiguous(), share, causal, scale, group)
