"""Differentiable collectives, and the norm and clipping of gradients over mixed meshes.

Inside a tensor-parallel region activations are whole or cut and gradients are PARTIAL (their sum over the
group is the gradient); outside, both are whole. Each function here enters or leaves such a region, and its
backward is the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from polymodal.distributed.mesh import Mesh

_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# Plain collectives on dimension 0 -----------------------------------------------------------------


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] on every rank -> [n * size, ...], in rank order."""
    tensor = tensor.contiguous()
    whole = tensor.new_empty(tensor.shape[0] * group.size(), *tensor.shape[1:])
    _all_gather_into(whole, tensor, group=group)
    return whole


def on_gloo(group: dist.ProcessGroup) -> bool:
    return dist.get_backend(group) == "gloo"


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n * size, ...] -> [n, ...]: this rank's part of the sum over ranks.

    gloo reduces in a ring that costs twice an exchange followed by a local sum (measured: 32 MiB over two
    processes 52 ms against 27, over four 110 against 43), so there it is the latter.
    """
    tensor = tensor.contiguous()
    size = group.size()
    if on_gloo(group):
        parts = torch.empty_like(tensor)
        dist.all_to_all_single(parts, tensor, group=group)
        return parts.view(size, tensor.shape[0] // size, *tensor.shape[1:]).sum(dim=0)
    part = tensor.new_empty(tensor.shape[0] // size, *tensor.shape[1:])
    _reduce_scatter_into(part, tensor, group=group)
    return part


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, group=group)
    return tensor


# Into and out of a region whose gradients are partial ---------------------------------------------


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def copy_to_region(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole -> whole; the partial gradients of the ranks are summed on the way back."""
    return _Copy.apply(tensor, group)


def reduce_from_region(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial values -> their sum on every rank; the whole gradient passes through on the way back."""
    return _Reduce.apply(tensor, group)


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values; the gradient is multiplied by factor (1 / size: from whole to partial)."""
    return _Scale.apply(tensor, factor)


# Along the sequence, dimension -2 of [..., T, D]: each rank holds ceil(T / size) rows, zeros at the end


def rows_per_rank(length: int, size: int) -> int:
    """Rows of a rank's slice of a sequence of `length`."""
    return -(-length // size)


def _padded(rows: Tensor, length: int) -> Tensor:
    """[T, ...] -> [length, ...], zeros at the end."""
    missing = length - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _own(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., T, D] -> this rank's rows."""
    rows = tensor.movedim(-2, 0)
    count = rows_per_rank(rows.shape[0], group.size())
    start = min(rows.shape[0], count * group.rank())
    return _padded(rows[start : start + count], count).movedim(0, -2)


def _gathered(tensor: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """The inverse: every rank's rows, of which the first `length` count."""
    return all_gather(tensor.movedim(-2, 0), group)[:length].movedim(0, -2)


def _own_of_sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial [..., T, D] -> this rank's rows of the sum over ranks."""
    rows, size = tensor.movedim(-2, 0), group.size()
    whole = _padded(rows, rows_per_rank(rows.shape[0], size) * size)
    return reduce_scatter(whole, group).movedim(0, -2)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, tensor.shape[-2]
        return _own(tensor, group).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.length, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, length: int, group: dist.ProcessGroup, partial: bool) -> Tensor:
        ctx.group, ctx.partial = group, partial
        return _gathered(tensor, length, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        own = _own_of_sum(grad, ctx.group) if ctx.partial else _own(grad, ctx.group)
        return own, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.length = group, tensor.shape[-2]
        return _own_of_sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.length, ctx.group), None


def cut_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole [..., T, D] -> this rank's slice [..., ceil(T / size), D]; gradients are gathered."""
    return _Cut.apply(tensor, group)


def gather_sequence(tensor: Tensor, length: int, group: dist.ProcessGroup, partial: bool) -> Tensor:
    """Slices [..., ceil(T / size), D] -> whole [..., T, D] with T = length.

    partial: gradients come back partial (from a region: they are summed and cut), else whole (cut).
    """
    return _Gather.apply(tensor, length, group, partial)


def reduce_scatter_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial [..., T, D] -> this rank's slice of the sum [..., ceil(T / size), D]."""
    return _ReduceScatter.apply(tensor, group)


# Layers that are cut over the vocabulary or over fused parts --------------------------------------


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, tensor.shape[-1]
        return all_gather(tensor.movedim(-1, 0), group).movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.width * ctx.group.rank(), ctx.width), None


def gather_last(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., n] on every rank -> [..., n * size]; the whole gradient is cut on the way back."""
    return _GatherLast.apply(tensor, group)


def fused_exchange(parts: Sequence[int], size: int, rank: int) -> tuple[list[int], list[int], list[int]]:
    """How to turn a contiguous cut of fused rows into one cut of each part.

    A fused weight has sum(parts) rows: those of q, then k, then v. It is kept as the natural cut (rank s
    holds rows [s, s + 1) * sum(parts) / size), and computed with as rank r's share of every part. Returns
    (local rows in the order they are sent, number sent to each rank, number received from each rank); what is
    received, in rank order, is already in the order of the parts.
    """
    held = sum(parts) // size
    starts = [sum(parts[:at]) for at in range(len(parts))]

    def overlap(source: int, target: int) -> list[int]:
        rows: list[int] = []
        first = source * held
        for begin, part in zip(starts, parts, strict=True):
            start = max(begin + target * part // size, first)
            stop = min(begin + (target + 1) * part // size, first + held)
            rows += range(start - first, stop - first)
        return rows

    sent = [overlap(rank, target) for target in range(size)]
    received = [len(overlap(source, rank)) for source in range(size)]
    return [i for piece in sent for i in piece], [len(piece) for piece in sent], received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor, sent: list[int], received: list[int], group: Any):
        ctx.save_for_backward(index)
        ctx.sent, ctx.received, ctx.group, ctx.rows = sent, received, group, len(tensor)
        out = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(out, tensor[index], received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (index,) = ctx.saved_tensors
        back = grad.new_empty(sum(ctx.sent), *grad.shape[1:])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        if len(index) > ctx.rows:  # some rows went to several ranks
            out = back.new_zeros(ctx.rows, *back.shape[1:]).index_add_(0, index, back)
        else:
            out = torch.empty_like(back)
            out[index] = back
        return out, None, None, None, None


def exchange_rows(
    tensor: Tensor, index: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows moved between ranks as `fused_exchange` plans it; gradients move back."""
    return _Exchange.apply(tensor, index, sent, received, group)


def rms_norm_across(hidden: Tensor, weight: Tensor, eps: float | None, group: dist.ProcessGroup) -> Tensor:
    """Root-mean-square norm over features that are cut over the group: hidden [..., D / size] with weight [D
    / size].

    x / sqrt(mean(x^2) + eps) * weight over all D (Zhang and Sennrich 2019, arXiv:1910.07467). The mean square
    is summed over ranks, and so is its gradient on the way back: every rank's output depends on it. eps None:
    that of the dtype.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    own = wide.square().sum(dim=-1, keepdim=True)
    total = copy_to_region(reduce_from_region(own, group), group)
    mean = total / (hidden.shape[-1] * group.size())
    scaled = wide * torch.rsqrt(mean + (torch.finfo(hidden.dtype).eps if eps is None else eps))
    return scaled.to(hidden.dtype) * weight


def embed(ids: Tensor, weight: Tensor, rows: int, padding: int | None, group: dist.ProcessGroup) -> Tensor:
    """Embedding of ids [...] in a table of `rows` rows cut over the group -> [..., D], whole on every rank.

    weight [rows of this rank, D]; padding: the row that takes no gradient, or None.
    """
    start = min(rows, rows_per_rank(rows, group.size()) * group.rank())
    local = ids - start
    elsewhere = (local < 0) | (local >= weight.shape[0])
    here = padding is not None and start <= padding < start + weight.shape[0]
    found = torch.nn.functional.embedding(
        local.masked_fill(elsewhere, 0), weight, padding - start if here and padding is not None else None
    )
    return reduce_from_region(found.masked_fill(elsewhere.unsqueeze(-1), 0), group)


# Gradients of a whole model -----------------------------------------------------------------------


def with_local(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of a tensor, or of a DTensor's part of this rank, on whatever device it then is.

    Not DTensor.from_local, which moves parts that were offloaded to the mesh's device.
    """
    if not isinstance(tensor, DTensor):
        return change(tensor)
    return DTensor(change(tensor.to_local()), tensor._spec, requires_grad=False)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _shards(tensor: Tensor) -> int:
    """In how many pieces a parameter is cut; further ranks have copies of them."""
    if not isinstance(tensor, DTensor):
        return 1
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return math.prod(tensor.device_mesh.size(dim) for dim in cut)


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor], mesh: Mesh, dtype: torch.dtype | None = None) -> Tensor:
    """L2 norm of the gradient of the whole model, the same scalar (float32, or float64) everywhere.

    parameters: plain tensors or DTensors, sharded or replicated over any part of the mesh, with or without a
    gradient on this rank; of a tied weight with copies on several pipeline stages, the owner only. One
    all-reduce: a piece that k ranks hold is counted 1 / k times by each. dtype: of the sum, for ranks that
    may hold no parameters.
    """
    parameters = list(parameters)
    ranks = mesh.sizes.world // mesh.sizes.pp
    by_shards: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_shards.setdefault(_shards(parameter), []).append(_local(parameter.grad))
    if dtype is None:
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        dtype = torch.float64 if wide else torch.float32
    device = _local(parameters[0]).device if parameters else torch.device(mesh.device_type)
    total = torch.zeros((), dtype=dtype, device=device)
    for shards, grads in sorted(by_shards.items()):
        norms = torch._foreach_norm(grads, 2, dtype=dtype)
        total += torch.stack(norms).square().sum() * (shards / ranks)
    if mesh.sizes.world > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place by min(1, max_norm / norm), without waiting for the device."""
    grads = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if not grads:
        return
    scale = (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
    for dtype in {grad.dtype for grad in grads}:
        torch._foreach_mul_([g for g in grads if g.dtype == dtype], scale.to(dtype))
