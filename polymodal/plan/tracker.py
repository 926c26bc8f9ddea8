"""Counts what a step allocates, multiplies and sends, operator by operator.

It works below autograd: a storage is counted from its first operator until it is freed, so a peak is what an
allocator without fragmentation would report. Tensors may be fake or real.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

KINDS = (
    *("parameters", "gradients", "optimizer", "average", "encoders"),
    *("gathered", "activations", "communication", "temporary", "batch"),
)
"""What a byte is held for. `encoders`: frozen models beside the trained one; `gathered`: parameters put
together from their shards; `activations`: made in a forward pass and kept for the backward pass;
`communication`: buffers of collectives; `temporary`: all else."""

SMALL = 1 << 20
"""Elements up to which integers stay real (positions, masks, lengths): a program that reads them gets
values."""

COLLECTIVES = {
    "all_reduce": ("allreduce_", "all_reduce", "all_reduce_"),
    "all_gather": ("_allgather_base_", "allgather_", "all_gather_into_tensor", "all_gather_into_tensor_out"),
    "reduce_scatter": ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor"),
    "all_to_all": ("alltoall_base_", "alltoall_", "all_to_all_single"),
    "broadcast": ("broadcast_", "broadcast"),
    "send": ("send",),
    "recv": ("recv_", "recv_any_source_"),
}
COLLECTIVE_OF = {operator: kind for kind, operators in COLLECTIVES.items() for operator in operators}
EXCHANGES = (torch.ops.c10d.alltoall_base_.default, torch.ops._c10d_functional.all_to_all_single.default)

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
UNMOVED = ALLOCATIONS | {"_unsafe_view", "wait_tensor", "_wrap_tensor_autograd"}
"""Operators, besides views, that read and write no memory."""
GATHERS = {"gather", "index", "index_select", "embedding"}
SCATTERS = {"scatter_", "scatter_add_", "index_add_", "index_put_", "index_copy_"}
"""Operators that read, or write, only those rows of their first tensor that the others name."""


class Sent(NamedTuple):
    """One collective of a rank: its kind, the ranks that take part, and bytes of the larger of input and
    output."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    backward: bool
    phase: str


@dataclass(eq=False)
class Storage:
    """One storage from its first operator to its end. kind: as marked; sent: part of a collective."""

    phase: str
    backward: bool
    host: bool = False
    bytes: int = 0
    kind: str = ""
    ended: tuple[str, bool] | None = None  # (phase, in backward)
    sent: bool = False
    resized: bool = False

    @property
    def purpose(self) -> str:
        """What it was held for, a word of KINDS: as marked, else as its life shows."""
        if self.kind:
            return self.kind
        if self.resized:
            return "gathered"
        if not self.backward and self.ended is not None and (self.ended[1] or self.ended[0] != self.phase):
            return "activations"
        return "communication" if self.sent else "temporary"


class Change(NamedTuple):
    """A storage grew, shrank or was freed. host: whether it was on the host."""

    storage: Storage
    bytes: int
    phase: str
    host: bool


@dataclass
class Usage:
    """Bytes of the device at its highest moment and of the host at its own; both: of the two together at
    their common highest moment. course: the highest moment of every stretch of changes: (phase, bytes by
    kind)."""

    peak: int = -1
    parts: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    host: int = 0
    host_parts: dict[str, int] = field(default_factory=dict)
    both: int = 0
    course: list[tuple[str, dict[str, int]]] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Everything under `with Tracker(...)`: allocations, matrix products and collectives of this process.

    fake: floating-point tensors are made in this mode, with shapes and without values; None counts real
    tensors. The caller sets `phase` as it goes and names storages it knows with `mark`.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake = fake
        self.phase = "build"
        self.changes: list[Change] = []
        # (phase, in backward, beside the arithmetic) -> bytes between device and host, either way
        self.moved: Counter[tuple[str, bool, bool]] = Counter()
        self.sent: list[Sent] = []
        # (phase, in backward, half precision, FLOPs, bytes read and written) -> operators
        self.work: Counter[tuple[str, bool, bool, float, int]] = Counter()
        self._known: dict[int, tuple[Storage, weakref.ref]] = {}  # by id of torch's storage
        self._hosting = False
        self._patches = contextlib.ExitStack()

    # ---- storages

    def _storage(self, storage: torch.UntypedStorage) -> Storage:
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[1]() is storage:
            return known[0]
        made = Storage(self.phase, self._backward(), self._hosting)
        self._known[key] = made, weakref.ref(storage, lambda _: self._freed(made, key))
        self._resize(made, storage.nbytes())
        return made

    def _resize(self, storage: Storage, size: int) -> None:
        if size != storage.bytes:
            self.changes.append(Change(storage, size - storage.bytes, self.phase, storage.host))
            storage.bytes = size

    def _freed(self, storage: Storage, key: int) -> None:
        if self._known.get(key, (None,))[0] is storage:
            del self._known[key]
        storage.ended = (self.phase, self._backward())
        self._resize(storage, 0)

    @staticmethod
    def _backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def _storages(self, tensors: Any) -> Iterator[Storage]:
        """Of tensors in any nesting; of DTensors their local part."""
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                yield self._storage(getattr(tensor, "_local_tensor", tensor).untyped_storage())

    def mark(self, tensors: Any, kind: str) -> None:
        """Name what tensors (any nesting) are held for; counts those not seen yet."""
        for storage in self._storages(tensors):
            storage.kind = kind

    # ---- the host

    @contextlib.contextmanager
    def hosting(self) -> Iterator[None]:
        """What is allocated under it is on the host."""
        self._hosting = True
        try:
            yield
        finally:
            self._hosting = False

    def moving(self, size: int, hidden: bool = False) -> None:
        """Bytes go over the link between device and host; hidden: on a stream beside the arithmetic's."""
        self.moved[self.phase, self._backward(), hidden] += size

    def put(self, tensors: Any, host: bool) -> None:
        """Move tensors (any nesting) to the host or back."""
        for storage in self._storages(tensors):
            if storage.host != host:
                size = storage.bytes
                self._resize(storage, 0)
                storage.host = host
                self._resize(storage, size)
                self.moving(size)

    # ---- operators

    def __enter__(self) -> Tracker:
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            known = self._storage(storage)
            out = original(storage, size)
            known.resized = True
            self._resize(known, storage.nbytes())
            return out

        self._patches.enter_context(replaced((torch.UntypedStorage, "resize_", resize_)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._patches.close()
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = (Tensor, FakeTensor, torch.nn.Parameter)
        if any(kind not in plain and issubclass(kind, Tensor) for kind in types):
            return NotImplemented  # a DTensor first becomes operators on its local parts
        kwargs = kwargs or {}
        inner = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if inner is not None and inner is not self.fake:
            return func(*args, **kwargs)  # DTensor asks for shapes in a mode of its own: nothing is allocated
        given = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        out = self._run(func, given, args, kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            if tensor.device.type != "meta":
                self._storage(tensor.untyped_storage())
        if size := _workspace(func, given):
            workspace = Storage(self.phase, self._backward(), kind="temporary")
            self._resize(workspace, size)
            self._resize(workspace, 0)
        name = func._schema.name.rpartition("::")[2] if hasattr(func, "_schema") else str(func)
        if name in COLLECTIVE_OF and func.namespace in ("c10d", "_c10d_functional"):
            for tensor in (*given, *made):
                self._storage(tensor.untyped_storage()).sent = True
            size = max((tensor.nbytes for tensor in (*given, *made)), default=0)
            ranks = _ranks(func, args, kwargs)
            self.sent.append(Sent(COLLECTIVE_OF[name], ranks, size, self._backward(), self.phase))
        elif made and not func.is_view and name not in UNMOVED:
            if touched := _bytes_touched(name, given, made):
                half = made[0].dtype in (torch.bfloat16, torch.float16)
                flops = _flops(func, args, kwargs, out)
                self.work[self.phase, self._backward(), half, flops, touched] += 1
        return out

    def _run(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """The operator itself, with values where a program may read them."""
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if self.fake is None:
            return func(*args, **kwargs)
        if not fake:
            if func in EXCHANGES:
                return _echo(func, args, kwargs)
            with self.fake if _is_large(given, args, kwargs) else contextlib.nullcontext():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            return 0.0  # a norm: its value is not known
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # a check for nan
        if func is torch.ops.aten.topk.default:
            values, chosen = func(*args, **kwargs)
            # as routers choose that load all experts alike: in turn
            balanced = torch.arange(chosen.numel()) % args[0].shape[-1]
            return values, balanced.view(chosen.shape)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], _counted(args[1]))
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # torch multiplies float32 groups on a CPU; its rule for shapes knows only half precision
            half = [
                a.to(torch.bfloat16) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            ]
            return func(*half, **kwargs).to(torch.float32)
        return func(*args, **kwargs)

    # ---- results

    def usage(
        self, phases: tuple[str, ...], hosted: frozenset[str] = frozenset(), points: int = 400
    ) -> Usage:
        """The highest moment within `phases`, and what was held in it. hosted: kinds that are on the host all
        along; points: of the course, about."""
        held, away = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        usage = Usage(parts=dict(held), end=held)
        every = max(1, sum(change.phase in phases for change in self.changes) // points)
        seen, highest, point = 0, -1, ("", dict(held))
        for storage, change, phase, host in self.changes:
            kind = storage.purpose
            (away if host or kind in hosted else held)[kind] += change
            if phase not in phases:
                continue
            total, outside = sum(held.values()), sum(away.values())
            if total > usage.peak:
                usage.peak, usage.parts = total, dict(held)
            if outside > usage.host or not usage.host_parts:
                usage.host, usage.host_parts = outside, dict(away)
            usage.both = max(usage.both, total + outside)
            seen += 1
            if total > highest:
                highest, point = total, (phase, dict(held))
            if seen % every == 0:
                usage.course.append(point)
                highest = -1
        return usage


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Other values of attributes for a while: (module or class, name, value)."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _is_large(given: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Whether an operator on real tensors makes one that need not be real: of floating point, and not
    small."""
    if any(tensor.device.type == "meta" for tensor in given):
        return torch.device(kwargs.get("device") or "meta").type != "meta"
    if given:
        return any(tensor.is_floating_point() and tensor.numel() > SMALL for tensor in given)
    on_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
    floating = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
    shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
    return not on_meta and floating and math.prod(map(int, shape)) > 1


def _echo(func: Any, args: Any, kwargs: Any) -> Any:
    """An exchange of real numbers, such as counts of tokens: every rank is taken to send what this one
    sends."""
    out = func(*args, **kwargs)
    target, source = (args[0], args[1]) if func is EXCHANGES[0] else (out, args[0])
    if target.shape == source.shape:
        target.copy_(source)
    return out


def _counted(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Real masks as indices of what is true in them: their number decides the shape of the result."""
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            out += index.nonzero().unbind(1)
        else:
            out.append(index)
    return out


def _bytes_touched(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    beside = sum(tensor.nbytes for tensor in given[1:])
    if name in SCATTERS:
        return 2 * beside
    written = sum(tensor.nbytes for tensor in made)
    if name in GATHERS:
        return beside + 2 * written
    return sum(tensor.nbytes for tensor in given) + written


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of a matrix product or an attention kernel; 0 of everything else.

    Causal attention counts half of the square; its backward two and a half times the forward (Dao et al.
    2022).
    """
    name = func._schema.name
    backward = name.endswith("backward")
    if name == "aten::_grouped_mm":
        rows, ends = args[0], args[2] if len(args) > 2 else kwargs.get("offs")
        share = 1.0  # of the rows, what belongs to a group
        if ends is not None and not isinstance(ends, FakeTensor) and args[1].ndim == 3:
            share = float(ends[-1]) / max(1, rows.shape[0])
        return 2.0 * share * rows.numel() * out.shape[-1]
    if name.startswith("torch_attn::_varlen_attn"):
        query, ends = (args[1], args[6]) if backward else (args[0], args[3])
        squares = float(ends.diff().to(torch.float64).square().sum())
        pairs = (value for value in args if isinstance(value, (list, tuple)) and len(value) == 2)
        window = kwargs.get("window_size") or next(pairs, (-1, -1))
        return (2.5 if backward else 1.0) * (2 if window[1] == 0 else 4) * query[0].numel() * squares
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        causal = kwargs.get("is_causal") or any(value is True for value in args)
        return (2.5 if backward else 1.0) * (2 if causal else 4) * query.numel() * key.shape[-2]
    packet = func._overloadpacket
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


def _workspace(func: Any, given: list[Tensor]) -> int:
    """Bytes that torch's attention kernel for CPUs allocates for itself on one thread: a tile of scores and
    its sums, in float32 and, for half precision, a copy (ATen/native/cpu/FlashAttentionKernel.cpp)."""
    name = func._schema.name
    if not name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        return 0
    backward = name.endswith("backward")
    query, key = given[1:3] if backward else given[:2]
    length, width = query.shape[-2:]
    rows = min(length, 256 if length >= 768 else 64 if length >= 192 else 32)
    tile = rows * min(key.shape[-2], 512)
    copy = query.element_size() if query.element_size() < 4 else 0
    if backward:
        return 2 * tile * (4 + copy) + rows * 4
    return tile * (4 + copy) + rows * (2 + width) * 4


def _ranks(func: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Global ranks of a collective's group, by the operator's own argument names."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        kwargs = {**kwargs, argument.name: value}
    if "group_name" in kwargs:
        group = torch._C._distributed_c10d._resolve_process_group(kwargs["group_name"])
    else:
        group = dist.ProcessGroup.unbox(kwargs["process_group"])
    return tuple(dist.get_process_group_ranks(group))
