"""Random weights that depend on the seed and the parameter's name only, never on how the model is laid out.

An initialiser of the library is run on stand-ins without memory while its in-place calls are recorded; each rank then
replays them on its own slices, block by block, with one generator a block. Imports torch and slices.py only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polymodal.models.slices import local_spans

BLOCK = 1 << 20
"""Elements drawn from one generator. Part of what a seed means: changing it changes every random weight."""

ELEMENTWISE = frozenset(
    [
        "normal_",
        "uniform_",
        "log_normal_",
        "exponential_",
        "zero_",
        "fill_",
        "add_",
        "sub_",
        "mul_",
        "div_",
        "clamp_",
        "clamp_min_",
        "clamp_max_",
        "erfinv_",
        "exp_",
        "log_",
        "neg_",
        "sqrt_",
        "pow_",
        "copy_",
    ]
)
SAME = frozenset(
    ["detach", "alias", "view", "_unsafe_view", "view_as", "lift_fresh"]
)  # views of all elements, in order


@dataclass(frozen=True)
class InitOp:
    """One in-place call on rows begin..end of a parameter (end None: on all of it); `random`: takes a generator."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    random: bool
    begin: int = 0
    end: int | None = None


class Unknown(Exception):
    """An initialiser did something to a parameter that cannot be replayed on a slice."""


class _Recorder(TorchDispatchMode):
    def __init__(self, stand_ins: dict[str, Tensor]):
        super().__init__()
        self.ops: dict[str, list[InitOp]] = {name: [] for name in stand_ins}
        self._known: dict[int, tuple[Tensor, str, int, int | None]] = {
            id(tensor): (tensor, name, 0, None) for name, tensor in stand_ins.items()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known = self._known.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        if known is None:
            return out
        tensor, name, begin, end = known
        call = func.overloadpacket.__name__
        if call in SAME and out.numel() == tensor.numel():
            self._known[id(out)] = (out, name, begin, end)
        elif call in ("select", "slice") and end is None:
            self._known[id(out)] = (out, name, *_rows(call, tensor, args[1:], kwargs))
        elif call.endswith("_") and not call.startswith("_"):
            if call not in ELEMENTWISE or any(isinstance(a, Tensor) and a.is_meta for a in args[1:]):
                raise Unknown(f"{name}: {call}")
            random = "generator" in {argument.name for argument in func._schema.arguments}
            self.ops[name].append(InitOp(func, args[1:], kwargs, random, begin, end))
        return out

    @contextmanager
    def truncated_normal(self) -> Iterator[None]:
        """torch.nn.init.trunc_normal_ draws again and again until all values fit, and leaves meta tensors alone."""
        draw: Callable[..., Tensor] = torch.nn.init._no_grad_trunc_normal_

        def noted(tensor: Tensor, *args: Any, generator: Any = None) -> Tensor:
            known = self._known.get(id(tensor))
            if known is None:
                return draw(tensor, *args, generator=generator)
            self.ops[known[1]].append(InitOp(draw, args, {}, True, *known[2:]))
            return tensor

        torch.nn.init._no_grad_trunc_normal_ = noted  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.nn.init._no_grad_trunc_normal_ = draw  # type: ignore[assignment]


def _rows(call: str, tensor: Tensor, args: tuple, kwargs: dict) -> tuple[int, int]:
    dim = args[0] if args else 0
    count = tensor.shape[0]
    if dim % tensor.ndim != 0 or kwargs:
        raise Unknown(f"{call} along dimension {dim}")
    if call == "select":
        return args[1] % count, args[1] % count + 1
    start, end, step = (*args[1:], *(None, None, None))[:3]
    if step not in (None, 1):
        raise Unknown("a slice with a step")
    start, end, _ = slice(start, end).indices(count)
    return start, end


@contextmanager
def stand_ins(module: nn.Module, buffers: Collection[str] = ()) -> Iterator[dict[str, Tensor]]:
    """Put meta tensors of the whole shape in the place of a module's own parameters, and of its buffers but `buffers`."""
    parameters, kept = dict(module._parameters), dict(module._buffers)
    fake: dict[str, Tensor] = {
        n: nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=False)
        for n, p in parameters.items()
        if p is not None
    }
    try:
        module._parameters.update(fake)  # type: ignore[arg-type]
        for name, buffer in kept.items():
            if name not in buffers and buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
        yield fake
    finally:
        module._parameters.update(parameters)
        for name, buffer in kept.items():
            if name not in buffers:
                module._buffers[name] = buffer


def record_init(module: nn.Module, initialise: Callable[[nn.Module], Any]) -> dict[str, list[InitOp]]:
    """What `initialise` does to a module's own parameters, by name. Its buffers are shielded.

    Raises Unknown when that depends on more than one element at a time (an orthogonal matrix).
    """
    with torch.no_grad(), stand_ins(module) as fake, _Recorder(fake) as recorder, recorder.truncated_normal():
        initialise(module)
    return recorder.ops


@torch.no_grad()
def replay_init(parameter: Tensor, ops: list[InitOp], name: str, seed: int) -> None:
    """Fill a parameter (or this rank's shard of it) as noted; values depend on `seed`, `name` and the position only."""
    shape = tuple(parameter.shape) or (1,)
    spans = local_spans(parameter) if parameter.ndim else [[(0, 1)]]
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    local = local.view(1) if parameter.ndim == 0 else local
    if local.numel() == 0:
        return
    row = max(1, int(torch.Size(shape[1:]).numel()))
    step = max(1, BLOCK // row)
    columns = [
        torch.cat([torch.arange(b, e) for b, e in one]) if len(one) != 1 else slice(*one[0])
        for one in spans[1:]
    ]
    at = 0
    for begin, end in spans[0]:
        for first in range(begin // step * step, end, step):
            last = min(first + step, shape[0])
            block = _block(ops, name, seed, first, last, shape)
            low, high = max(first, begin), min(last, end)
            part = block[low - first : high - first]
            for dim, chosen in enumerate(columns, 1):
                part = part[(slice(None),) * dim + (chosen,)]
            local[at : at + high - low].copy_(part)
            at += high - low


def _block(ops: list[InitOp], name: str, seed: int, first: int, last: int, shape: tuple[int, ...]) -> Tensor:
    block = torch.empty((last - first, *shape[1:]))
    for number, note in enumerate(ops):
        low, high = max(first, note.begin), min(last, shape[0] if note.end is None else note.end)
        if low >= high:
            continue
        target = block[low - first : high - first]
        args, kwargs = note.args, dict(note.kwargs)
        if note.random:
            digest = blake2b(f"{seed}/{name}/{number}/{first}".encode(), digest_size=7).digest()
            kwargs["generator"] = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        if args and isinstance(args[0], Tensor) and args[0].ndim:
            source = args[0].expand(shape if note.end is None else (note.end - note.begin, *shape[1:]))
            args = (source[low - note.begin : high - note.begin], *args[1:])
        note.function(target, *args, **kwargs)
    return block
