"""Attention over packed streams, text and vision, causal and full, on every device.

`register` puts the function into transformers' registries under `NAME`, and a model whose config names it
calls it from every attention layer. Segments never attend to each other: they are given as cumulative
lengths, so no [T, T] mask is ever built.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import to_device
from polymodal.distributed.context_parallel import PackedShard
from polymodal.distributed.ring_attention import widened
from polymodal.runtime import device

NAME = "polymodal_flash"
"""Name in transformers' registries. transformers asks whether an implementation takes cumulative lengths by
looking for "flash" in its name: with it the vision towers make one call a layer, without it one call a
window."""

PADDED = "polymodal_padded"
"""Name of torch's own attention without any mask: of batches padded on the right in causal decoders. Under
"sdpa" transformers looks for packed samples in the position ids at every forward, which waits for the
device."""


@dataclass(frozen=True)
class Plan:
    """The lengths of one cu_seqlens tensor on the host, so that no layer waits for a device."""

    lengths: tuple[int, ...]
    sizes: tuple[int, ...]  # tokens of each run of equal lengths, in order
    groups: tuple[tuple[int, tuple[int, ...]], ...]  # (length, the runs that have it)
    longest: int
    total: int


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Plans of cu_seqlens tensors that are alive. The library's layers pass on the tensor alone."""


def plan(cu_seqlens: Tensor, host: Tensor | None = None) -> Plan:
    """The Plan of cumulative lengths [S + 1] (int32, first 0), kept for the tensor: it must not change.

    host: the same on the host, where cu_seqlens was moved to a device: it is then not waited for.
    """
    known = _plans.get(cu_seqlens)
    if known is None:
        ends = (cu_seqlens if host is None else host).tolist()
        known = _plan(tuple(stop - start for start, stop in zip(ends, ends[1:], strict=False)))
        _plans[cu_seqlens] = known
    return known


def cumulative(lengths: list[int] | tuple[int, ...], on: torch.device | str = "cpu") -> Tensor:
    """Lengths -> cu_seqlens [S + 1] int32 on a device, its plan already known to the host."""
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    cu_seqlens = to_device(ends, on)
    _plans[cu_seqlens] = _plan(tuple(lengths))
    return cu_seqlens


def _plan(lengths: tuple[int, ...]) -> Plan:
    sizes: list[int] = []
    runs: dict[int, list[int]] = {}
    before = 0
    for length in lengths:
        if length <= 0:
            if length < 0:
                raise ValueError(f"cumulative lengths must not fall: {lengths}")
            continue
        if length == before:
            sizes[-1] += length
        else:
            runs.setdefault(length, []).append(len(sizes))
            sizes.append(length)
            before = length
    groups = tuple((length, tuple(places)) for length, places in runs.items())
    return Plan(lengths, tuple(sizes), groups, max(lengths, default=0), sum(lengths))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
    cut: PackedShard | None = None,
) -> Tensor:
    """Attention inside each segment of a packed stream.

    query [1, H, T, D]; key, value [1, K, T, D] with H a multiple of K (grouped queries), values perhaps
    narrower (latent attention); cu_seqlens [S + 1] int32. Returns [1, T, H, D] in query's dtype. Raises
    ValueError when cu_seqlens does not end at T. cut: over a context-parallel group: T counts this rank's
    rows, cu_seqlens is the whole stream's.
    """
    known, narrow = plan(cu_seqlens), value.shape[-1] < query.shape[-1]
    if narrow and (
        cut is not None or device.packed_attention(query.device.type, query.dtype, query.shape[-1])
    ):
        wide = pad(value, (0, query.shape[-1] - value.shape[-1]))  # kernels and exchanges have one width
        out = attend(query, key, wide, cu_seqlens, causal, scale, dropout, cut)
        return out[..., : value.shape[-1]]
    if query.shape[0] != 1 or (cut is None and known.total != query.shape[2]):
        raise ValueError(f"cu_seqlens ends at {known.total}, the stream is {tuple(query.shape)}")
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [1, T, heads, D]

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if dropout == 0.0:
            kernel = device.packed_attention(q.device.type, q.dtype, q.shape[-1])
            if kernel is not None:
                out = kernel(q[0], k[0], v[0], cu_seqlens, known.lengths, known.longest, causal, scale)
                return out.unsqueeze(0)
        return _by_length(q[0], k[0], v[0], known, causal, scale, dropout).unsqueeze(0)

    if cut is None:
        return whole(q, k, v)
    if dropout and cut.context.ring_group is not None:
        raise PolymodalError(
            "Attention with dropout cannot run over a ring of ranks.",
            "Set the model's attention_dropout to 0 (model.config), or parallel.ulysses to parallel.cp.",
        )
    return cut.context.attend(q, k, v, cut.share, causal, scale, whole)


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, known: Plan, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """[T, heads, D] -> [T, H, D]: one dense call for all segments of the same length.

    `split` and `cat` rather than slices: the backward of each slice would write a whole stream of zeros.
    """
    parts = [tensor.split(known.sizes) if len(known.sizes) > 1 else (tensor,) for tensor in (q, k, v)]
    pieces: list[Tensor | None] = [None] * len(known.sizes)
    for length, runs in known.groups:
        batch = []
        for split in parts:
            rows = split[runs[0]] if len(runs) == 1 else torch.cat([split[run] for run in runs])
            batch.append(rows.view(-1, length, *rows.shape[1:]).transpose(1, 2))
        out = _kernel(*batch, causal=causal, scale=scale, dropout=dropout).transpose(1, 2).flatten(0, 1)
        for run, piece in zip(runs, out.split([known.sizes[run] for run in runs]), strict=True):
            pieces[run] = piece
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """Dense attention [n, H, L, D], grouped queries allowed."""
    dtype = query.dtype
    if widened(query) and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.device.type != "cpu" and query.dtype not in (torch.float16, torch.bfloat16):
        # accelerators' fused kernels take float32, or grouped queries, not both: whole scores otherwise
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        grouped = False
    out = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.to(dtype)


@torch.compiler.disable
def _packed(*args: Any) -> Tensor:
    """`attend` outside of compiled graphs: its shapes depend on the lengths of every pack."""
    return attend(*args)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    cut: PackedShard | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, D] -> ([B, T, H, D], None).

    With `cu_seq_lens_q` (training, vision towers) it is `attend`, also over a cut stream (`cut`); without
    (generation, padded batches) it is transformers' own SDPA with its mask. Raises PolymodalError for a
    sliding window shorter than a segment.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    longest = plan(cu_seq_lens_q).longest
    if sliding_window is not None and longest > sliding_window:
        raise PolymodalError(
            f"This model attends within a window of {sliding_window} tokens, a sample here has {longest}.",
            "Lower data.max_length to the window, or set model.attention to sdpa.",
        )
    return _packed(query, key, value, cu_seq_lens_q, causal, scaling, dropout, cut), None


def register() -> str:
    """Make NAME known to transformers, for text and vision; returns it. May be called any number of times."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # None without padding, a mask for generation's
    return NAME


def register_padded() -> str:
    """Make PADDED known to transformers, which then builds no mask for it; returns it."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(PADDED, sdpa_attention_forward)
    return PADDED


def use(model: nn.Module, choice: str = "auto", padded: bool = False) -> str:
    """Set recipe.model.attention on a transformers model: auto = `attention`; sdpa, eager = its own.

    padded: batches are padded on the right, not packed. The name is written into every config of the model:
    transformers' own setter would look for a kernel package of that name. Returns the implementation's name.
    """
    name = choice if choice != "auto" else register_padded() if padded else register()
    for part in model.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name
    return name
