"""Context parallelism of diffusion transformers: every sample of a batch is cut alike, by the card's sequence_plan.

Sees the ground floor and models/card.py. Hooks cut what modules take or give and gather the prediction; diffusers'
attention dispatcher calls `attention` here, which is Ulysses, ring or both, with any lengths, and so does torch's own
function inside of attention layers that do not ask the dispatcher. Ranks of the group see whole batches and compute
whole predictions, so each counts its loss as one of `size` copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from polymodal.core.errors import PolymodalError
from polymodal.distributed import sequence_sharding as shares
from polymodal.distributed.context_parallel import Context
from polymodal.distributed.sequence_sharding import cut_points
from polymodal.models.card import ModelCard
from polymodal.models.partial import ENTERED, arguments, on_argument
from polymodal.parallel.sequence import HIDDEN
from polymodal.parallel.styles import pattern_of

LENGTHS = "polymodal_cut_lengths"
"""Argument of blocks, beside the library's own: see `remember`."""
NAME = "polymodal"
"""Name in diffusers' registry of attention backends."""


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, counts: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:  # fmt: skip
        ctx.dim, ctx.counts, ctx.rank = dim, counts, group.rank()
        rows = tensor.movedim(dim, 0).contiguous()
        whole = rows.new_empty(sum(counts), *rows.shape[1:])
        size = len(counts)
        dist.all_to_all_single(
            whole, rows.repeat(size, *[1] * (rows.ndim - 1)), list(counts), [rows.shape[0]] * size, group=group
        )  # fmt: skip
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # every rank's loss is one of `size` equal copies: together they say `size` times what this one says
        start = sum(ctx.counts[: ctx.rank])
        return grad.narrow(ctx.dim, start, ctx.counts[ctx.rank]) * len(ctx.counts), None, None, None


class DiTContextParallel:
    """The cut of one model's sequences; it is also the `_parallel_config` of its attention processors.

    Rank c of the group holds the c-th of `size` consecutive parts of every stream, which differ by at most one row.
    """

    def __init__(self, context: Context, root: Mapping[str | int, int] | None = None):
        """root: the plan of the model's own arguments, name -> dimension (those that have it are cut)."""
        self.context, self.root = context, dict(root or {})
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.lengths: dict[tuple[str, str | int], int] = {}  # of the streams in the forward that is running

    def counts(self, length: int) -> tuple[int, ...]:
        points = cut_points(length, self.context.size)
        return tuple(stop - start for start, stop in zip(points, points[1:], strict=False))

    def cut(self, tensor: Tensor, dim: int, place: tuple[str, str | int]) -> Tensor:
        length = self.lengths[place] = tensor.shape[dim]
        if length < self.context.size:
            raise PolymodalError(
                f"{length} tokens ({place[1]}) cannot be cut over parallel.cp = {self.context.size} ranks.",
                "Lower parallel.cp, or train on larger samples.",
            )
        points = cut_points(length, self.context.size)
        start = points[self.context.rank]
        return tensor.narrow(dim, start, points[self.context.rank + 1] - start)

    def leading(self, count: int) -> int:
        """Of so many rows at the beginning of the latents' stream, those that this rank holds."""
        (length,) = {n for (_, key), n in self.lengths.items() if key == HIDDEN}
        points = cut_points(length, self.context.size)
        start, stop = points[self.context.rank], points[self.context.rank + 1]
        return min(max(count - start, 0), stop - start)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """A prediction's rows from all ranks; the length is that of the stream with as many rows here."""
        lengths = [length for length in self._streams() if self._own(length) == tensor.shape[dim]]
        if not lengths:
            raise ValueError(
                f"{tensor.shape[dim]} rows leave the model, no stream of {self._streams()} was cut to them"
            )
        return _GatherRows.apply(tensor, dim, self.counts(lengths[0]), self.context.group)

    def _streams(self) -> list[int]:
        """Lengths of the streams of activations; of whatever was cut when a later pipeline stage saw none enter."""
        found = [n for (_, key), n in self.lengths.items() if isinstance(key, str) and "hidden_states" in key]
        return found or list(dict.fromkeys(self.lengths.values()))

    def _own(self, length: int) -> int:
        return self.counts(length)[self.context.rank]

    def rows(self, own: int) -> tuple[int, ...]:
        """By rank, the rows of attention's sequence, of which this rank has `own`: one stream, or all joined."""
        streams = self._streams()
        if sum(map(self._own, streams)) == own:
            return tuple(map(sum, zip(*map(self.counts, streams), strict=True)))
        alike = [length for length in dict.fromkeys(streams) if self._own(length) == own]
        near = [n for n in streams for m in alike if n != m and abs(n - m) < self.context.size]
        if alike and not near:  # lengths this close look the same on some ranks
            return self.counts(alike[0])
        raise ValueError(f"attention over {own} rows, the streams {streams} were cut to others")

    def of_streams(self, joined: bool) -> tuple[int, ...]:
        """By rank, the rows of the latents' stream, or of all streams joined."""
        streams = [n for (_, key), n in self.lengths.items() if key == HIDDEN][:1]
        return tuple(map(sum, zip(*map(self.counts, self._streams() if joined else streams), strict=True)))

    def kept(self, mask: Tensor) -> Tensor:
        """A mask of keys [B, 1, 1, N] over all streams joined -> the same [B, N] in the order of ranks, each of which
        joins its own rows. Worked out once a mask."""
        known = self._kept.get(mask)
        if known is None:
            places, start = [], 0
            points = [cut_points(length, self.context.size) for length in self._streams()]
            for rank in range(self.context.size):
                start = 0
                for cuts in points:
                    places += range(start + cuts[rank], start + cuts[rank + 1])
                    start += cuts[-1]
            if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, start):
                raise ValueError(
                    f"a cut sequence of {start} rows knows masks of its keys, not {mask.dtype} {list(mask.shape)}"
                )
            known = mask[:, 0, 0, torch.tensor(places, device=mask.device)]
            self._kept[mask] = known
        return known

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A library's own forward, which is called without hooks, with the root's arguments cut."""
        if not self.root:
            return forward
        names = list(inspect.signature(forward).parameters)

        def cut(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            for name, dim in self.root.items():
                value = given.get(name)
                if isinstance(value, tuple):
                    given[name] = tuple(self.cut(tensor, dim, ("", name)) for tensor in value)
                elif isinstance(value, Tensor) and value.ndim > dim:
                    given[name] = self.cut(value, dim, ("", name))
            return forward(**given)

        return cut


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, _parallel_config: Any = None,
) -> Tensor:  # fmt: skip
    """diffusers' attention backend: [B, n, H, D] -> [B, n, H, D], over a cut sequence where a processor has a cut."""

    if isinstance(_parallel_config, DiTContextParallel):
        if is_causal or dropout_p:
            raise ValueError("a cut sequence is attended to whole: without causal order or dropout")
        rows = _parallel_config.rows(query.shape[1])
        return _cut_attention(query, key, value, attn_mask, scale, _parallel_config, rows)
    return _whole(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _whole(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:  # fmt: skip
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = scaled_dot_product_attention(
        q, k, v, mask, dropout, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


@torch.compiler.disable
def _cut_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, cut: DiTContextParallel, rows: tuple[int, ...]
) -> Tensor:  # fmt: skip
    context = cut.context
    share = shares.even(rows, context.ring, query.shape[0])
    kept = cut.kept(mask) if mask is not None else None

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _whole(query, key, value, None if kept is None else kept[:, None, None], 0.0, False, scale)

    return context.attend(query, key, value, share, False, scale, whole, kept)


class _Attending(TorchFunctionMode):
    """Inside, torch's scaled_dot_product_attention is that over a cut sequence. rows: by rank."""

    def __init__(self, cut: DiTContextParallel, rows: tuple[int, ...]):
        super().__init__()
        self.cut, self.rows = cut, rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, mask, scale = _of_attention(*args, **(kwargs or {}))
        return _cut_attention(query, key, value, mask, scale, self.cut, self.rows).transpose(1, 2)


def _of_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:  # fmt: skip
    """Arguments of torch's function, [B, H, n, D] -> those of a cut one, [B, n, H, D]."""
    if is_causal or dropout_p:
        raise ValueError("a cut sequence is attended to whole: without causal order or dropout")
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, scale


def _route(attention: nn.Module, cut: DiTContextParallel) -> None:
    """Let a layer whose processor calls torch itself attend over the cut sequence: of latents, joined with text where
    it is given both."""
    forward = attention.forward

    @wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        joined = len(args) > 1 or kwargs.get("encoder_hidden_states") is not None
        with _Attending(cut, cut.of_streams(joined)):
            return forward(*args, **kwargs)

    attention.forward = routed


def register() -> Any:
    """Make NAME known to diffusers' dispatcher; returns its backend name. May be called any number of times."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = AttentionBackendName._value2member_map_.get(NAME)
    if known is None:  # the registry's keys are an enumeration without a place for others
        known = str.__new__(AttentionBackendName, NAME)
        known._name_, known._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[known._name_] = known
        AttentionBackendName._value2member_map_[NAME] = known
        _AttentionBackendRegistry.register(known, supports_context_parallel=True)(attention)
    return known


def apply(model: nn.Module, card: ModelCard, context: Context) -> DiTContextParallel:
    """Cut the sequences of a diffusion transformer over the group as the card's sequence_plan and sequence_exit say.

    sequence_plan: module -> {argument name, or index of an output: dimension}. The root "" is cut by whoever calls
    the library's forward, through `model.sequence_cut.around`. sequence_exit: the module that gives [B, n, D].
    """
    cut = DiTContextParallel(context, card.sequence_plan.get("", {}))
    model.sequence_cut = cut
    model.register_forward_pre_hook(lambda *_: setattr(cut, "lengths", {}))
    modules = dict(model.named_modules())
    for name, places in card.sequence_plan.items():
        if name and name in modules:
            _hook(modules[name], name, places, cut)
    exit = modules[card.sequence_exit]
    exit.register_forward_hook(lambda module, args, out: cut.gather(out, 1))
    backend = register()
    blocks = [pattern_of(pattern) for pattern in card.blocks]
    inside = [name for name in modules if any(block.fullmatch(name) for block in blocks)]
    for name, module in modules.items():
        processor = getattr(module, "processor", None)
        if processor is None or not name.startswith(tuple(f"{block}." for block in inside)):
            continue
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config, processor._attention_backend = cut, backend
        else:
            _route(module, cut)
    for name in inside if card.num_leading_rows else ():
        modules[name].register_forward_pre_hook(_count_own(cut, card.num_leading_rows), with_kwargs=True)
    return cut


def remember(block: nn.Module, cut: DiTContextParallel) -> None:
    """Let a block that is computed again know the lengths of its own batch: under a pipeline others came after it."""
    forward = block.forward

    @wraps(forward)
    def told(*args: Any, **kwargs: Any) -> Any:
        cut.lengths = kwargs.pop(LENGTHS, cut.lengths)
        return forward(*args, **kwargs)

    block.forward = told
    # a hook, which recompute does not repeat
    block.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, LENGTHS: cut.lengths}), with_kwargs=True
    )


def _count_own(cut: DiTContextParallel, name: str) -> Any:
    def count(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return on_argument(module, name, cut.leading, args, kwargs)

    return count


def _hook(module: nn.Module, name: str, places: Any, cut: DiTContextParallel) -> None:
    taken = {key: dim for key, dim in places.items() if isinstance(key, str)}
    outputs = {key: dim for key, dim in places.items() if isinstance(key, int)}
    order = arguments(module)

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values, entered = list(args), block.__dict__.pop(ENTERED, {})
        for key, dim in taken.items():
            at = order.index(key)
            if key in entered:  # an earlier pipeline stage cut it
                cut.lengths[name, key] = entered[key][dim]
            elif key in kwargs:
                kwargs = {**kwargs, key: cut.cut(kwargs[key], dim, (name, key))}
            elif at < len(values):
                values[at] = cut.cut(values[at], dim, (name, key))
        return tuple(values), kwargs

    def leave(_: nn.Module, args: tuple, out: Any) -> Any:
        if isinstance(out, Tensor):
            return cut.cut(out, outputs[0], (name, 0))
        return tuple(cut.cut(t, outputs[i], (name, i)) if i in outputs else t for i, t in enumerate(out))

    if taken:
        module.register_forward_pre_hook(enter, with_kwargs=True)
    if outputs:
        module.register_forward_hook(leave)
