"""A pipeline stage by the model's own forward.

Modules before the blocks of a stage run as `ShapeStub`, the streams enter at the first block that is here,
and leave where a pruned module is called with the last block's output.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polymodal.core.sample import Batch
from polymodal.models.card import Chain, ModelCard, Output, PrunedModule

HIDDEN = "hidden_states"
"""Name of the stream in a carry; of several, the one that the model's end takes."""
WRITTEN = "polymodal_written"
"""Attribute of a module whose output the library's forward writes to in place."""
ENTERED = "polymodal_entered"
"""Attribute of a block where streams of a stage entered: shapes of the zeros they replaced."""


def arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward, in order; of a pruned module too."""
    if isinstance(module, PrunedModule):
        return getattr(module, "names", [HIDDEN])
    return list(inspect.signature(type(module).forward).parameters)[1:]


def on_argument(
    module: nn.Module, name: str, change: Callable[[Any], Any], args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Change one of the arguments of a module's forward by its name; unchanged when it is not given."""
    if name in kwargs:
        return args, {**kwargs, name: change(kwargs[name])} if kwargs[name] is not None else kwargs
    names = arguments(module)
    at = names.index(name) if name in names else len(args)
    if at < len(args) and args[at] is not None:
        args = (*args[:at], change(args[at]), *args[at + 1 :])
    return args, kwargs


class StreamPassthrough(PrunedModule):
    """In the place of a block of several streams: returns them as the block does."""

    def __init__(self, block: nn.Module, streams: tuple[str, ...]):
        super().__init__()
        self.names, self.streams = arguments(block), streams

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        return tuple(given[name] for name in self.streams)


class _Beside(torch.autograd.Function):
    """The first tensor; the others get a gradient of zeros, where a stage does not use them."""

    @staticmethod
    def forward(ctx: Any, main: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(tensor.shape, tensor.dtype) for tensor in others]
        return main.view_as(main)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.others)


def together(main: Tensor, carry: Mapping[str, Tensor] | None) -> Tensor:
    others = [t for name, t in (carry or {}).items() if name != HIDDEN and t.requires_grad]
    return _Beside.apply(main, *others) if others else main


class ShapeStub(PrunedModule):
    """In the place of a module that prepares the stream in another stage: returns zeros of its output's
    shape, which take no memory, or the output that was sent."""

    def __init__(self, module: nn.Module):
        super().__init__()
        on_meta = all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        self.original = (module if on_meta else copy.deepcopy(module).to("meta"),)  # no child: no parameters
        self.dtype: torch.dtype | None = None
        self.given: dict[int, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # of the module: a convolution's stride, a table's size
            return getattr(self.__dict__["original"][0], name)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        device = tensors[0].device
        # under mixed precision other modules' parameters are gathered in half precision, this one's are not
        own = next((p.dtype for p in self.original[0].parameters() if p.is_floating_point()), None)
        meta = {name: _meta(value, own) for name, value in kwargs.items()}
        out = self.original[0](*(_meta(value, own) for value in args), **meta)
        if isinstance(out, Tensor):
            return self._zeros(0, out, device)
        return type(out)(self._zeros(at, value, device) for at, value in enumerate(out))

    def _zeros(self, at: int, like: Any, device: torch.device) -> Any:
        if at in self.given:
            return self.given[at]
        if not isinstance(like, Tensor):
            return like
        dtype = self.dtype if self.dtype is not None and like.is_floating_point() else like.dtype
        zeros = torch.zeros((), dtype=dtype, device=device).expand(like.shape)
        return zeros.clone() if getattr(self.original[0], WRITTEN, False) else zeros


def _meta(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to("meta", dtype if value.is_floating_point() else None)


class _StreamLeft(Exception):
    """No error: the stream has left the blocks that are here, and ends the forward."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def blocks(model: nn.Module, chain: Chain) -> list[str]:
    """Names of a chain's blocks, pruned ones too, in order."""
    patterns = (chain.blocks,) if isinstance(chain.blocks, str) else chain.blocks
    expressions = [re.compile(re.escape(pattern).replace(r"\*", "[^.]+")) for pattern in patterns]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [name for expression in expressions for name in names if expression.fullmatch(name)]


def present(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names of a chain without their `?`; those that end in one only where the model has such a module."""
    there = [name for name in names if not name.endswith("?") or _module(model, name[:-1]) is not None]
    return [name.removesuffix("?") for name in there]


def run(
    model: nn.Module,
    chain: Chain,
    hidden: Tensor | None,
    call: Callable[[], Any],
    carried: Mapping[str, Tensor] | None = None,
    others: dict[str, Tensor | None] | None = None,
    streams: tuple[str, ...] = (HIDDEN,),
) -> tuple[Tensor | None, Any]:
    """`call()`, a forward around the chain's blocks, for those of them that are here.

    hidden: the stream from the stage before, None where the chain begins; carried: outputs of `chain.carry`
    as `<module>.<position>`; streams: the card's; others: those besides `hidden`, as they enter, and
    afterwards as they leave. Returns (the stream, None) when the chain continues elsewhere, else (None,
    result).
    """
    handles = []
    end = model.get_submodule(chain.last[0])
    _show_absent(model, chain)
    here = [model.get_submodule(name) for name in blocks(model, chain)]
    entry = next((block for block in here if not isinstance(block, PrunedModule)), end)
    entering = {HIDDEN: hidden, **({} if entry is end else others or {})}

    def enter(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        shapes: dict[str, Any] = {}

        def replace_by_stream(name: str, came: Tensor) -> Tensor | None:
            shapes[name] = came.shape
            return entering[name]

        if len(entering) == 1 and args:
            args = (replace_by_stream(HIDDEN, args[0]), *args[1:])
        else:
            for name in entering:
                args, kwargs = on_argument(block, name, partial(replace_by_stream, name), args, kwargs)
        setattr(block, ENTERED, shapes)
        return args, kwargs

    def record(_: nn.Module, __: Any, out: tuple) -> None:
        assert others is not None
        others.update({name: part for name, part in zip(streams, out, strict=True) if name != HIDDEN})

    def leave(_: nn.Module, __: Any, out: Tensor) -> None:
        raise _StreamLeft(out)

    try:
        if hidden is not None:
            handles.append(entry.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            for name in present(model, chain.first):
                module = _module(model, name)
                if isinstance(module, ShapeStub):
                    module.dtype = hidden.dtype
                    module.given = {
                        int(key.rpartition(".")[2]): tensor
                        for key, tensor in (carried or {}).items()
                        if key.rpartition(".")[0] == name
                    }
        if isinstance(end, PrunedModule):
            handles.append(end.register_forward_hook(leave))
            if len(streams) > 1:
                handles.append(here[-1].register_forward_hook(record))
        try:
            return None, call()
        except _StreamLeft as left:
            return left.hidden, None
    finally:
        for handle in handles:
            handle.remove()


def drop_parameter(owner: nn.Module, name: str) -> None:
    """Remove a parameter of another stage. Code around it may still look at its shape: see `run`."""
    shape = owner._parameters[name].shape  # type: ignore[union-attr]
    owner.register_parameter(name, None)
    owner.__dict__[name] = torch.empty(shape, device="meta")


def _show_absent(model: nn.Module, chain: Chain) -> None:
    """Pruned parameters of the chain's end as zeros that take no memory: a forward may look at them."""
    for name in chain.last:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        absent = owner.__dict__.get(leaf)
        if isinstance(absent, Tensor) and absent.is_meta:
            device = next(model.parameters()).device
            owner.__dict__[leaf] = torch.zeros((), device=device).expand(absent.shape)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None for a parameter's."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent)._modules.get(leaf)


def _record_carried(model: nn.Module, chain: Chain, into: dict[str, Tensor]) -> list[Any]:
    """Hooks that record the outputs of the modules of `chain.carry` that are here."""

    def record(name: str, _: nn.Module, __: Any, out: Any) -> None:
        outputs = enumerate((out,) if isinstance(out, Tensor) else out)
        into.update({f"{name}.{at}": value for at, value in outputs if isinstance(value, Tensor)})

    modules = {name: model.get_submodule(name) for name in present(model, chain.carry)}
    here = {name: module for name, module in modules.items() if not isinstance(module, PrunedModule)}
    return [module.register_forward_hook(partial(record, name)) for name, module in here.items()]


class WholeModel(Protocol):
    """What this file needs of a family."""

    card: ModelCard

    def build(self) -> nn.Module: ...

    def whole(self, model: nn.Module, batch: Batch) -> Output: ...


def stage(
    family: WholeModel, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
) -> dict[str, Tensor] | Output:
    """Family.stage for a card with one chain: its own forward (`whole`) between the blocks that are here."""
    chains = list(family.card.pipeline.values())
    if not chains:
        return family.whole(model, batch)
    (chain,) = chains
    streams = family.card.block_streams
    carried = {name: tensor for name, tensor in (carry or {}).items() if name not in streams}
    others: dict[str, Tensor | None] = {n: carry[n] for n in streams if n != HIDDEN} if carry else {}
    hooks = _record_carried(model, chain, carried)
    try:
        hidden = None if carry is None else carry[HIDDEN]
        left, out = run(model, chain, hidden, lambda: family.whole(model, batch), carried, others, streams)
    finally:
        for hook in hooks:
            hook.remove()
    if left is None:
        return replace(out, hidden_states=together(out.hidden_states, carry))
    for name, tensor in others.items():
        if tensor is None:  # the last block does not return it, and nothing uses it
            shape = carry_spec(family, batch, left.dtype)[name].shape
            others[name] = _Beside.apply(left.new_zeros(shape, requires_grad=left.requires_grad), left)
    return {HIDDEN: together(left, carry), **others, **carried}  # type: ignore[dict-item]


def probe(family: WholeModel, anew: bool = False) -> nn.Module:
    """The model on meta that finds the shapes that stages send, made once; anew: for another layout.

    What changes the shapes of streams before the first block (cuts over ranks) must be done to it too.
    """
    if anew or "_probe" not in family.__dict__:
        family.__dict__["_carry_specs"] = {}
        family.__dict__["_probe"] = family.build().to("meta")
    return family.__dict__["_probe"]


@torch.no_grad()
def carry_spec(family: WholeModel, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Family.carry_spec for a card with one chain: the stream before a block and the carried outputs, found
    by a forward on meta tensors up to the first block. Floating tensors are sent in `dtype`."""
    known: dict[Any, dict[str, Tensor]] = family.__dict__.setdefault("_carry_specs", {})
    key = (dtype, *((name, tuple(tensor.shape)) for name, tensor in sorted(batch.tensors.items())))
    if key in known:
        return known[key]
    (chain,) = family.card.pipeline.values()
    model = probe(family)
    carried: dict[str, Tensor] = {}

    def leave(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(arguments(block), args, strict=False)) | kwargs
        carried.update({name: given[name] for name in family.card.block_streams if name != HIDDEN})
        raise _StreamLeft(given[HIDDEN])

    first = model.get_submodule(blocks(model, chain)[0])
    hooks = [
        *_record_carried(model, chain, carried),
        first.register_forward_pre_hook(leave, with_kwargs=True),
    ]
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    try:
        family.whole(model, replace(batch, tensors=_empty(batch.tensors, own)))
        raise RuntimeError(f"The forward of {family.card.name} does not pass through {chain.blocks}.")
    except _StreamLeft as left:
        known[key] = _empty({HIDDEN: left.hidden, **carried}, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    return known[key]


def _empty(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Meta tensors of the same shapes; floating ones of this dtype."""
    kinds = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
    return {n: torch.empty(tensors[n].shape, dtype=kind, device="meta") for n, kind in kinds.items()}
