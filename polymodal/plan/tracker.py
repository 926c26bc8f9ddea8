"""Counts what a step allocates, multiplies and sends, operator by operator, in constant time an operator.

This room may touch torch only. It sees every operator below autograd: a storage is counted when it first appears and
when it is freed, so a peak is what an allocator without fragmentation would report. Tensors may be fake or real.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "average",
    "encoders",
    "gathered",
    "activations",
    "communication",
    "temporary",
    "batch",
)
"""What a byte is held for. `encoders`: frozen models beside the trained one; `gathered`: parameters put together from their shards; `activations`: made in a forward
pass and kept for the backward pass; `communication`: buffers of collectives; `temporary`: all else."""

SMALL = 1 << 20
"""Elements up to which integers stay real (positions, masks, lengths): what a program reads back has then a value."""

COLLECTIVES = {
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "_allgather_base_": "all_gather",
    "allgather_": "all_gather", "all_gather_into_tensor": "all_gather", "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all", "alltoall_": "all_to_all", "all_to_all_single": "all_to_all", "broadcast_": "broadcast",
    "broadcast": "broadcast", "send": "send", "recv_": "recv", "recv_any_source_": "recv",
}  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """One collective as a rank sees it: its kind, the ranks that take part, and bytes of the larger of input and output."""

    kind: str
    ranks: tuple[int, ...]
    bytes: int
    backward: bool
    phase: str


@dataclass
class _Life:
    bytes: int
    phase: str
    backward: bool
    kind: str = ""
    ended: tuple[str, bool] | None = None
    sent: bool = False
    resized: bool = False
    host: bool = False


@dataclass
class Usage:
    """Bytes of the device at its highest moment, by kind, and the course of the total by kind (of every stretch of
    events its highest moment, about `points` of them); bytes of the host at its own; both: of the two together at their common highest moment."""

    peak: int
    at: str  # phase
    parts: dict[str, int]
    end: dict[str, int]
    host: int = 0
    host_parts: dict[str, int] = field(default_factory=dict)
    both: int = 0
    course: list[tuple[str, dict[str, int]]] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Everything under `with Tracker(...)`: allocations, matrix products and collectives of this process.

    fake: floating-point tensors are made in this mode, with shapes and without values; None counts real tensors.
    The caller sets `phase` as it goes and names storages it knows with `mark`.
    """

    def __init__(self, fake: FakeTensorMode | None = None):
        super().__init__()
        self.fake = fake
        self.phase = "build"
        self.lives: list[_Life] = []
        self.events: list[tuple[int, int, str, bool]] = []  # (life, change in bytes, phase, on the host)
        # (phase, in backward, beside the arithmetic) -> bytes between device and host, either way
        self.moved: Counter[tuple[str, bool, bool]] = Counter()
        self.sent: list[Sent] = []
        # (phase, in backward, half precision, FLOPs, bytes read and written) -> operators
        self.work: Counter[tuple[str, bool, bool, float, int]] = Counter()
        self._known: dict[int, tuple[int, weakref.ref]] = {}  # id(storage) -> life
        self._resize: Callable[..., Any] | None = None
        self._hosting = False

    # ---- storages

    def _born(self, storage: torch.UntypedStorage) -> int | None:
        held = self._known.get(id(storage))
        if held is not None and held[1]() is storage:
            return held[0]
        size = storage.nbytes()
        number, key = len(self.lives), id(storage)
        self.lives.append(_Life(0, self.phase, self._backward(), host=self._hosting))
        self._known[key] = (number, weakref.ref(storage, lambda _: self._died(number, key)))
        self._change(number, size)
        return number

    def _change(self, number: int, size: int) -> None:
        life = self.lives[number]
        if size != life.bytes:
            self.events.append((number, size - life.bytes, self.phase, life.host))
            life.bytes = size

    def _died(self, number: int, key: int) -> None:
        if self._known.get(key, (None,))[0] == number:
            del self._known[key]
        self.lives[number].ended = (self.phase, self._backward())
        self._change(number, 0)

    @staticmethod
    def _backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def mark(self, tensors: Any, kind: str) -> None:
        """Name what tensors (any nesting; DTensors by their local part) are held for; counts those not seen yet."""
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                local = getattr(tensor, "_local_tensor", tensor)
                number = self._born(local.untyped_storage())
                if number is not None:
                    self.lives[number].kind = kind

    # ---- the host

    @contextlib.contextmanager
    def hosting(self) -> Iterator[None]:
        """What is made under it lies on the host."""
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
        for tensor in pytree.tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                local = getattr(tensor, "_local_tensor", tensor)
                number = self._born(local.untyped_storage())
                if number is not None and self.lives[number].host != host:
                    life = self.lives[number]
                    size = life.bytes
                    self._change(number, 0)
                    life.host = host
                    self._change(number, size)
                    self.moving(size)

    # ---- operators

    def __enter__(self):
        original = torch.UntypedStorage.resize_
        self._resize = original
        tracker = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            number = tracker._born(storage)
            out = original(storage, size)
            if number is not None:
                tracker.lives[number].resized = True
                tracker._change(number, storage.nbytes())
            return out

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign, assignment]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(
            kind not in (Tensor, FakeTensor, torch.nn.Parameter) and issubclass(kind, Tensor)
            for kind in types
        ):
            return NotImplemented  # a DTensor first becomes operators on its local parts
        kwargs = kwargs or {}
        inner = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if inner is not None and inner is not self.fake:
            return func(*args, **kwargs)  # DTensor asks for shapes in a mode of its own: nothing is allocated
        given = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
        out = self._run(func, given, args, kwargs)
        made = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func._schema.name.rpartition("::")[2] if hasattr(func, "_schema") else str(func)
        for tensor in made:
            if tensor.device.type != "meta":
                self._born(tensor.untyped_storage())
        if size := _workspace(func, given):
            number = len(self.lives)
            self.lives.append(_Life(0, self.phase, self._backward(), "temporary"))
            self._change(number, size)
            self._change(number, 0)
        if name in COLLECTIVES and func.namespace in ("c10d", "_c10d_functional"):
            self._collective(COLLECTIVES[name], func, args, kwargs, given, made)
        else:
            self._count(func, args, kwargs, out, given, made)
        return out

    def _run(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        fake = any(isinstance(tensor, FakeTensor) for tensor in given)
        if fake and func is torch.ops.aten._local_scalar_dense.default and not _whole(args[0]):
            return (
                False if args[0].dtype == torch.bool else 0.0
            )  # a norm, a check for nan: nobody knows its value
        if fake and func is torch.ops.aten.topk.default and self.fake is not None:
            values, chosen = func(*args, **kwargs)
            return values, _balanced(chosen.shape, args[0].shape[-1])
        if func in EXCHANGES and not fake and self.fake is not None:
            return self._echo(func, args, kwargs)
        if fake and func is torch.ops.aten.index.Tensor:
            args = (args[0], _counted(args[1]))
        if fake and func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            # torch multiplies float32 groups on a CPU; its rule for shapes knows only half precision
            half = [
                a.to(torch.bfloat16) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
            ]
            return func(*half, **kwargs).to(torch.float32)
        if self.fake is None or fake:
            return func(*args, **kwargs)
        if given and any(tensor.device.type == "meta" for tensor in given):
            target = kwargs.get("device")
            if target is None or torch.device(target).type == "meta":
                return func(*args, **kwargs)
        elif given:
            if not any(tensor.is_floating_point() and tensor.numel() > SMALL for tensor in given):
                return func(*args, **kwargs)
        elif (
            torch.device(kwargs.get("device") or "cpu").type == "meta"
            or not (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
            or _elements(args) < 2
        ):
            return func(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)

    @staticmethod
    def _echo(func: Any, args: Any, kwargs: Any) -> Any:
        """An exchange of real numbers, such as counts of tokens: every rank is taken to send what this one sends."""
        out = func(*args, **kwargs)
        target, source = (args[0], args[1]) if func is EXCHANGES[0] else (out, args[0])
        if target.shape == source.shape:
            target.copy_(source)
        return out

    def _collective(
        self, kind: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        ranks = _ranks(func, args, kwargs)
        for tensor in (*given, *made):
            number = self._born(tensor.untyped_storage())
            if number is not None:
                self.lives[number].sent = True
        size = max((tensor.numel() * tensor.element_size() for tensor in (*given, *made)), default=0)
        self.sent.append(Sent(kind, ranks, size, self._backward(), self.phase))

    def _count(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        if not made or func.is_view:
            return
        flops = _flops(func, args, kwargs, out)
        touched = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        if touched:
            half = made[0].dtype in (torch.bfloat16, torch.float16)
            self.work[self.phase, self._backward(), half, flops, touched] += 1

    # ---- results

    def kind_of(self, number: int) -> str:
        """What a storage was held for: as marked, else as its life shows."""
        life = self.lives[number]
        if life.kind:
            return life.kind
        if life.resized:
            return "gathered"
        if not life.backward and life.ended is not None and (life.ended[1] or life.ended[0] != life.phase):
            return "activations"
        return "communication" if life.sent else "temporary"

    def usage(
        self, phases: tuple[str, ...], hosted: frozenset[str] = frozenset(), points: int = 400
    ) -> Usage:
        """The highest moment within `phases`, and what was held in it. hosted: kinds that lie on the host all along."""
        kinds = [self.kind_of(number) for number in range(len(self.lives))]
        held, away = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        found = Usage(-1, "", dict(held), held, host=-1)
        inside = sum(1 for event in self.events if event[2] in phases)
        every, seen, total, outside = max(1, inside // points), 0, 0, 0
        highest, point = -1, ("", dict(held))
        for number, change, phase, host in self.events:
            if host or kinds[number] in hosted:
                away[kinds[number]] += change
                outside += change
            else:
                held[kinds[number]] += change
                total += change
            if phase not in phases:
                continue
            if total > found.peak:
                found.peak, found.at, found.parts = total, phase, dict(held)
            if outside > found.host:
                found.host, found.host_parts = outside, dict(away)
            found.both = max(found.both, total + outside)
            seen += 1
            if total > highest:
                highest, point = total, (phase, dict(held))
            if seen % every == 0:
                found.course.append(point)
                highest = -1
        found.host = max(0, found.host)
        return found


EXCHANGES = (torch.ops.c10d.alltoall_base_.default, torch.ops._c10d_functional.all_to_all_single.default)


def _balanced(shape: torch.Size, choices: int) -> Tensor:
    """Indices [..., k] as routers choose that load all experts alike: in turn."""
    return (torch.arange(shape.numel()) % choices).view(shape)


def _whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.dtype != torch.bool


def _counted(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Real masks as the places where they are true: how many those are decides the shape."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _elements(args: Any) -> int:
    shape = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else ()
    count = 1
    for size in shape:
        count *= int(size) if not isinstance(size, Tensor) else 1
    return count


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of a matrix product or an attention kernel; 0 of everything else.

    Causal attention counts half of the square; its backward two and a half times the forward (Dao et al. 2022).
    """
    name = func._schema.name
    if name.startswith("torch_attn::_varlen_attn"):
        backward = name.endswith("backward")
        query, ends = (args[1], args[6]) if backward else (args[0], args[3])
        squares = float(ends.diff().to(torch.float64).square().sum())
        window = kwargs.get("window_size") or next(
            (value for value in args if isinstance(value, (list, tuple)) and len(value) == 2), (-1, -1)
        )
        return (2.5 if backward else 1.0) * (2 if window[1] == 0 else 4) * query[0].numel() * squares
    if name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        backward = name.endswith("backward")
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        causal = kwargs.get("is_causal") or any(value is True for value in args)
        return (2.5 if backward else 1.0) * (2 if causal else 4) * query.numel() * key.shape[-2]
    packet = func._overloadpacket
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


def _workspace(func: Any, given: list[Tensor]) -> int:
    """Bytes that torch's attention kernel for CPUs allocates for itself on one thread: a tile of scores and its sums,
    in float32 and, for half precision, a copy (ATen/native/cpu/FlashAttentionKernel.cpp)."""
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
