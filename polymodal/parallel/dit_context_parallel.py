"""Context parallelism of diffusion transformers: all samples are cut alike, by the card's sequence_plan.

Hooks cut the inputs or outputs of modules and gather the prediction. diffusers' attention dispatcher calls
`attention` here, which is Ulysses, ring or both, with any lengths; so does torch's own function inside of
attention layers that do not use the dispatcher. Ranks of the group read whole batches and compute whole
predictions, so each counts its loss as one of `size` copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import to_device
from polymodal.distributed import sequence_sharding
from polymodal.distributed.context_parallel import Context
from polymodal.distributed.sequence_sharding import cut_points, part_sizes
from polymodal.models.card import ModelCard
from polymodal.models.partial import ENTERED, arguments, on_argument
from polymodal.parallel.sequence import HIDDEN
from polymodal.parallel.styles import pattern_of, remember

LENGTHS = "polymodal_cut_lengths"
"""Argument of blocks, beside the library's own: see `remember_lengths`."""
NAME = "polymodal"
"""Name in diffusers' registry of attention backends."""


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, counts: tuple[int, ...], group: Any) -> Tensor:
        ctx.dim, ctx.counts, ctx.rank = dim, counts, group.rank()
        rows, size = tensor.movedim(dim, 0).contiguous(), len(counts)
        whole = rows.new_empty(sum(counts), *rows.shape[1:])
        copies = rows.repeat(size, *[1] * (rows.ndim - 1))
        dist.all_to_all_single(whole, copies, list(counts), [len(rows)] * size, group=group)
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        # every rank's loss is one of `size` equal copies, whose gradients are summed
        start = sum(ctx.counts[: ctx.rank])
        return grad.narrow(ctx.dim, start, ctx.counts[ctx.rank]) * len(ctx.counts), None, None, None


class DiTContextParallel:
    """The cut of one model's sequences; it is also the `_parallel_config` of its attention processors.

    Rank c holds the c-th of `size` consecutive parts of every stream, which differ by at most one row.
    """

    def __init__(self, context: Context, root: Mapping[str | int, int] | None = None):
        """root: the plan of the model's own arguments, name -> dimension (those that have it are cut)."""
        self.context, self.root = context, dict(root or {})
        self._kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.lengths: dict[tuple[str, str | int], int] = {}  # of the streams in the forward that is running

    def counts(self, length: int) -> tuple[int, ...]:
        return part_sizes(length, self.context.size)

    def bounds(self, length: int) -> tuple[int, int]:
        """First and last row of this rank's part of a stream."""
        points = cut_points(length, self.context.size)
        return points[self.context.rank], points[self.context.rank + 1]

    def cut(self, tensor: Tensor, dim: int, place: tuple[str, str | int]) -> Tensor:
        length = self.lengths[place] = tensor.shape[dim]
        if length < self.context.size:
            raise PolymodalError(
                f"{length} tokens ({place[1]}) cannot be cut over parallel.cp = {self.context.size} ranks.",
                "Lower parallel.cp, or train on larger samples.",
            )
        start, stop = self.bounds(length)
        return tensor.narrow(dim, start, stop - start)

    def leading(self, count: int) -> int:
        """Of so many rows at the beginning of the latents' stream, those that this rank holds."""
        (length,) = {n for (_, key), n in self.lengths.items() if key == HIDDEN}
        start, stop = self.bounds(length)
        return min(max(count - start, 0), stop - start)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """A prediction's rows from all ranks; the length is that of the stream with as many rows here."""
        rows = tensor.shape[dim]
        lengths = [length for length in self._streams() if self._own(length) == rows]
        if not lengths:
            raise ValueError(f"{rows} rows leave the model, no stream of {self._streams()} was cut to them")
        return _GatherRows.apply(tensor, dim, self.counts(lengths[0]), self.context.group)

    def _streams(self) -> list[int]:
        """Lengths of the streams of activations; of whatever was cut in a stage that none enters."""
        found = [n for (_, key), n in self.lengths.items() if isinstance(key, str) and "hidden_states" in key]
        return found or list(dict.fromkeys(self.lengths.values()))

    def _own(self, length: int) -> int:
        return self.counts(length)[self.context.rank]

    def rows(self, own: int) -> tuple[int, ...]:
        """By rank, the rows of attention's sequence, of which `own` are here: one stream, or all joined."""
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

    def whole(self, query: Tensor, key: Tensor, value: Tensor, local: Callable[..., Tensor]) -> Tensor:
        """Attention of this rank's rows [B, n, H, D] that `local` computes over whole sequences of some
        heads: by Ulysses alone."""
        share = sequence_sharding.even(self.rows(query.shape[1]), self.context.ring, query.shape[0])
        return self.context.attend(query, key, value, share, False, None, local)

    def whole_streams(
        self, streams: Sequence[Sequence[Tensor]], local: Callable[..., Sequence[Tensor]]
    ) -> list[Tensor]:
        """The same of several streams, in their order as the model joins them: `local` takes query, key and
        value of each whole stream and gives an output of each."""
        lengths = self._streams()
        places = to_device(torch.tensor(self._by_rank(lengths)), streams[0][0].device)
        order = places.argsort()  # row of the joined whole streams -> row in the order of ranks

        def together(*joined: Tensor) -> Tensor:
            parts = [tensor.index_select(1, order).split(lengths, dim=1) for tensor in joined]
            return torch.cat(list(local(*zip(*parts, strict=True))), dim=1).index_select(1, places)

        query, key, value = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
        own = [stream[0].shape[1] for stream in streams]
        return list(self.whole(query, key, value, together).split(own, dim=1))

    def kept(self, mask: Tensor) -> Tensor:
        """A mask of keys [B, 1, 1, N] over all streams joined -> the same [B, N] in the order of ranks, each
        of which joins its own rows. Computed once a mask."""
        known = self._kept.get(mask)
        if known is None:
            places = self._by_rank(self._streams())
            if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, len(places)):
                shape = f"{mask.dtype} {list(mask.shape)}"
                raise ValueError(f"a cut sequence of {len(places)} rows takes masks of its keys, not {shape}")
            known = mask[:, 0, 0, to_device(torch.tensor(places), mask.device)]
            self._kept[mask] = known
        return known

    def _by_rank(self, lengths: Sequence[int]) -> list[int]:
        """Rows of whole streams, joined, in the order of ranks, each of which joins its own."""
        places: list[int] = []
        points = [cut_points(length, self.context.size) for length in lengths]
        for rank in range(self.context.size):
            start = 0
            for cuts in points:
                places += range(start + cuts[rank], start + cuts[rank + 1])
                start += cuts[-1]
        return places

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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
    rows: tuple[int, ...] | None = None,
) -> Tensor:
    """diffusers' attention backend: [B, n, H, D] -> [B, n, H, D], over a processor's cut sequence.

    rows: of the cut sequence, by rank, where they do not follow from n.
    """
    if isinstance(_parallel_config, DiTContextParallel):
        if is_causal or dropout_p:
            raise ValueError("attention over a cut sequence has neither causal order nor dropout")
        rows = rows or _parallel_config.rows(query.shape[1])
        return _cut_attention(query, key, value, attn_mask, scale, _parallel_config, rows)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if attn_mask is not None and q.device.type != "cpu" and attn_mask.shape == (len(q), 1, 1, k.shape[2]):
        if attn_mask.dtype == torch.bool and not (is_causal or dropout_p):
            return unpadded(q, k, v, attn_mask, scale).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(
        q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


_keys: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of masks that are alive, each sample's keys that are seen: a number of first ones, or their places."""


@torch.compiler.disable
def unpadded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention [B, H, n, D] to the keys that a mask [B, 1, 1, N] leaves, which alone are handed on.

    A mask rules flash attention out on CUDA, and NPUs make it [B, H, n, N]. The host waits once a mask.
    """
    known = _keys.get(mask)
    if known is None:
        known = []
        for row in mask[:, 0, 0].cpu():
            count = int(row.sum())
            places = None if bool(row[:count].all()) else to_device(row.nonzero().flatten(), mask.device)
            known.append(count if places is None else places)
        _keys[mask] = known
    grouped = query.shape[1] != key.shape[1]

    def attend(at: slice, kept: Any) -> Tensor:
        k, v = (
            t[at, :, :kept] if isinstance(kept, int) else t[at].index_select(2, kept) for t in (key, value)
        )
        return scaled_dot_product_attention(query[at], k, v, scale=scale, enable_gqa=grouped)

    if all(isinstance(each, int) for each in known) and len(set(known)) == 1:
        return attend(slice(None), known[0])
    return torch.cat([attend(slice(n, n + 1), kept) for n, kept in enumerate(known)])


@torch.compiler.disable
def _cut_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cut: DiTContextParallel,
    rows: tuple[int, ...],
) -> Tensor:
    share = sequence_sharding.even(rows, cut.context.ring, query.shape[0])
    kept = cut.kept(mask) if mask is not None else None
    own_mask = None if kept is None else kept[:, None, None]
    local = partial(attention, attn_mask=own_mask, scale=scale)
    return cut.context.attend(query, key, value, share, False, scale, local, kept)


class _CutAttention(TorchFunctionMode):
    """Inside, torch's scaled_dot_product_attention is that over a cut sequence. rows: by rank."""

    def __init__(self, cut: DiTContextParallel, rows: tuple[int, ...]):
        super().__init__()
        self.options = {"_parallel_config": cut, "rows": rows}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = (
            inspect.signature(attention).bind(*args, **(kwargs or {})).arguments
        )  # torch's names and order
        given |= {name: given[name].transpose(1, 2) for name in ("query", "key", "value")}
        return attention(**given, **self.options).transpose(1, 2)


def _route(attention: nn.Module, cut: DiTContextParallel) -> None:
    """Let a layer whose processor calls torch itself attend over the cut sequence: of latents, joined with
    text where it is given both."""
    forward = attention.forward

    @wraps(forward)
    def routed(*args: Any, **kwargs: Any) -> Any:
        joined = len(args) > 1 or kwargs.get("encoder_hidden_states") is not None
        with _CutAttention(cut, cut.of_streams(joined)):
            return forward(*args, **kwargs)

    attention.forward = routed


def register() -> Any:
    """Make NAME known to diffusers' dispatcher; returns its backend name. May be called repeatedly."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    known = AttentionBackendName._value2member_map_.get(NAME)
    if known is None:  # the registry's keys are an enumeration that has no public way to extend it
        known = str.__new__(AttentionBackendName, NAME)
        known._name_, known._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[known._name_] = known
        AttentionBackendName._value2member_map_[NAME] = known
        _AttentionBackendRegistry.register(known, supports_context_parallel=True)(attention)
    return known


def apply(model: nn.Module, card: ModelCard, context: Context) -> DiTContextParallel:
    """Cut the sequences of a diffusion transformer over the group, by its sequence_plan and sequence_exit.

    sequence_plan: module -> {argument name, or index of an output: dimension}. The root "" is cut by whoever
    calls the library's forward, through `model.sequence_cut.around`. sequence_exit gives [B, n, D].
    """
    cut = DiTContextParallel(context, card.sequence_plan.get("", {}))
    model.sequence_cut = cut
    model.register_forward_pre_hook(lambda *_: setattr(cut, "lengths", {}))
    modules = dict(model.named_modules())
    for name, places in card.sequence_plan.items():
        if name and name in modules:
            _hook(modules[name], name, places, cut)
    if card.sequence_exit in modules:  # else it is inside of a module of another pipeline stage
        modules[card.sequence_exit].register_forward_hook(lambda module, args, out: cut.gather(out, 1))
    backend = register()
    blocks = [pattern_of(pattern) for pattern in card.blocks]
    inside = [name for name in modules if any(block.fullmatch(name) for block in blocks)]
    for name, module in modules.items():
        processor = getattr(module, "processor", None)
        if processor is None or not f"{name}.".startswith(tuple(f"{block}." for block in inside)):
            continue
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config, processor._attention_backend = cut, backend
        else:
            _route(module, cut)
    for name in inside if card.num_leading_rows else ():
        modules[name].register_forward_pre_hook(
            lambda module, args, kwargs: on_argument(
                module, card.num_leading_rows, cut.leading, args, kwargs
            ),
            with_kwargs=True,
        )
    return cut


def use(model: nn.Module, card: ModelCard) -> None:
    """Let the blocks' attention layers that use diffusers' dispatcher call `attention`, without any cut."""
    backend = register()
    blocks = [pattern_of(pattern) for pattern in card.blocks]
    for name, block in model.named_modules():
        if any(pattern.fullmatch(name) for pattern in blocks):
            for processor in (getattr(module, "processor", None) for module in block.modules()):
                if hasattr(processor, "_attention_backend"):
                    processor._attention_backend = backend


def remember_lengths(block: nn.Module, cut: DiTContextParallel) -> None:
    """For recompute under a pipeline; see styles.remember."""
    remember(block, LENGTHS, lambda: cut.lengths, partial(setattr, cut, "lengths"))


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
