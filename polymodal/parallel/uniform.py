"""Context parallelism of diffusion transformers: every sample of a batch is cut alike, by the card's sequence_plan.

Sees the ground floor and models/card.py. Hooks cut what modules take or give and gather the prediction; diffusers'
attention dispatcher calls `attention` here, which is Ulysses, ring or both, with any lengths. Ranks of the group see
whole batches and compute whole predictions, so each counts its loss as one of `size` copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from polymodal.models.card import ModelCard
from polymodal.parallel import share as shares
from polymodal.parallel.context import Context
from polymodal.parallel.share import cut_points

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


class UniformCut:
    """The cut of one model's sequences; it is also the `_parallel_config` of its attention processors.

    Rank c of the group holds the c-th of `size` consecutive parts of every stream, which differ by at most one row.
    """

    def __init__(self, context: Context, root: Mapping[str | int, int] | None = None):
        """root: the plan of the model's own arguments, name -> dimension (those that have it are cut)."""
        self.context, self.root = context, dict(root or {})
        self.lengths: dict[tuple[str, str | int], int] = {}  # of the streams in the forward that is running

    def counts(self, length: int) -> tuple[int, ...]:
        points = cut_points(length, self.context.size)
        return tuple(stop - start for start, stop in zip(points, points[1:], strict=False))

    def cut(self, tensor: Tensor, dim: int, place: tuple[str, str | int]) -> Tensor:
        self.lengths[place] = tensor.shape[dim]
        points = cut_points(tensor.shape[dim], self.context.size)
        start = points[self.context.rank]
        return tensor.narrow(dim, start, points[self.context.rank + 1] - start)

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

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A library's own forward, which is called without hooks, with the root's arguments cut."""
        if not self.root:
            return forward
        names = list(inspect.signature(forward).parameters)

        def cut(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            for name, dim in self.root.items():
                if isinstance(given.get(name), Tensor) and given[name].ndim > dim:
                    given[name] = self.cut(given[name], dim, ("", name))
            return forward(**given)

        return cut


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, _parallel_config: Any = None,
) -> Tensor:  # fmt: skip
    """diffusers' attention backend: [B, n, H, D] -> [B, n, H, D], over a cut sequence where a processor has a cut."""

    def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)

    if not isinstance(_parallel_config, UniformCut):
        return whole(query, key, value)
    if attn_mask is not None or is_causal or dropout_p:
        raise ValueError("a cut sequence is attended to whole: without a mask, causal order or dropout")
    return _cut_attention(query, key, value, scale, _parallel_config, whole)


@torch.compiler.disable
def _cut_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, cut: UniformCut, whole: Any) -> Tensor:  # fmt: skip
    context = cut.context
    share = shares.even(cut.rows(query.shape[1]), context.ring, query.shape[0])
    return context.attend(query, key, value, share, False, scale, whole)


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


def apply(model: nn.Module, card: ModelCard, context: Context) -> UniformCut:
    """Cut the sequences of a diffusion transformer over the group as the card's sequence_plan and sequence_exit say.

    sequence_plan: module -> {argument name, or index of an output: dimension}. The root "" is cut by whoever calls
    the library's forward, through `model.sequence_cut.around`. sequence_exit: the module that gives [B, n, D].
    """
    cut = UniformCut(context, card.sequence_plan.get("", {}))
    model.sequence_cut = cut
    model.register_forward_pre_hook(lambda *_: cut.lengths.clear())
    modules = dict(model.named_modules())
    for name, places in card.sequence_plan.items():
        if name and name in modules:
            _hook(modules[name], name, places, cut)
    exit = modules[card.sequence_exit]
    exit.register_forward_hook(lambda module, args, out: cut.gather(out, 1))
    backend = register()
    for module in modules.values():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config, processor._attention_backend = cut, backend
    return cut


def _hook(module: nn.Module, name: str, places: Any, cut: UniformCut) -> None:
    arguments = {key: dim for key, dim in places.items() if isinstance(key, str)}
    outputs = {key: dim for key, dim in places.items() if isinstance(key, int)}
    order = list(inspect.signature(type(module).forward).parameters)[1:]

    def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        values = list(args)
        for key, dim in arguments.items():
            at = order.index(key)
            if key in kwargs:
                kwargs = {**kwargs, key: cut.cut(kwargs[key], dim, (name, key))}
            elif at < len(values):
                values[at] = cut.cut(values[at], dim, (name, key))
        return tuple(values), kwargs

    def leave(_: nn.Module, args: tuple, out: Any) -> Any:
        if isinstance(out, Tensor):
            return cut.cut(out, outputs[0], (name, 0))
        return tuple(cut.cut(t, outputs[i], (name, i)) if i in outputs else t for i, t in enumerate(out))

    if arguments:
        module.register_forward_pre_hook(enter, with_kwargs=True)
    if outputs:
        module.register_forward_hook(leave)
