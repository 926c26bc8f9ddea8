"""A part of a model by its own forward: between the blocks that a pipeline stage holds, nothing of it copied.

Ground floor of models/: sees card.py only. What comes before the blocks of a stage runs on stand-ins of the right
shapes (`Hollow`), the stream enters at the first block that is here, and is taken out where a dropped module waits
for the last block's output.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.data.sample import Batch
from polymodal.models.card import Chain, Dropped, Family, Output

HIDDEN = "hidden_states"
"""Name of the stream in a carry."""


class Hollow(Dropped):
    """Stands where a module was that prepares the stream in another stage: gives zeros of its output's shape, which
    take no memory, or what travelled in its place. Other code may look at shapes and unpack tuples as before."""

    def __init__(self, module: nn.Module):
        super().__init__()
        on_meta = all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        self.original = (module if on_meta else copy.deepcopy(module).to("meta"),)  # no child: no parameters
        self.dtype: torch.dtype | None = None
        self.given: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        place = tensors[0].device
        out = self.original[0](*map(_meta, args), **{name: _meta(value) for name, value in kwargs.items()})
        if isinstance(out, Tensor):
            return self._zeros(0, out, place)
        return type(out)(self._zeros(at, value, place) for at, value in enumerate(out))

    def _zeros(self, at: int, like: Any, place: torch.device) -> Any:
        if at in self.given:
            return self.given[at]
        if not isinstance(like, Tensor):
            return like
        dtype = self.dtype if self.dtype is not None and like.is_floating_point() else like.dtype
        return torch.zeros((), dtype=dtype, device=place).expand(like.shape)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


class _Left(Exception):
    """No error: the stream has left the blocks that are here, and the rest of the forward with it."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def blocks(model: nn.Module, chain: Chain) -> list[str]:
    """Names of a chain's blocks, dropped ones too, in order."""
    expression = re.compile(re.escape(chain.blocks).replace(r"\*", "[^.]+"))
    return [name for name, _ in model.named_modules(remove_duplicate=False) if expression.fullmatch(name)]


def run(
    model: nn.Module,
    chain: Chain,
    hidden: Tensor | None,
    call: Callable[[], Any],
    carried: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor | None, Any]:
    """`call()`, a forward around the chain's blocks, for those of them that are here.

    hidden: the stream as the stage before left it, None where the chain begins; carried: outputs of `chain.carry` as
    `<module>.<position>`. Returns (the stream, None) when the chain goes on elsewhere, else (None, what call gave).
    """
    handles = []

    def enter(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, HIDDEN: hidden})

    def leave(_: nn.Module, __: Any, out: Tensor) -> None:
        raise _Left(out)

    end = model.get_submodule(chain.last[0])
    _show_absent(model, chain)
    try:
        if hidden is not None:
            names = blocks(model, chain)
            here = [model.get_submodule(name) for name in names]
            entry = next((block for block in here if not isinstance(block, Dropped)), end)
            handles.append(entry.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            for name in chain.first:
                module = _found(model, name)
                if isinstance(module, Hollow):
                    module.dtype = hidden.dtype
                    module.given = {
                        int(key.rpartition(".")[2]): tensor
                        for key, tensor in (carried or {}).items()
                        if key.rpartition(".")[0] == name
                    }
        if isinstance(end, Dropped):
            handles.append(end.register_forward_hook(leave))
        try:
            return None, call()
        except _Left as left:
            return left.hidden, None
    finally:
        for handle in handles:
            handle.remove()


def drop_parameter(owner: nn.Module, name: str) -> None:
    """Take a parameter of another stage away. Code around it may still look at it: see `run`."""
    shape = owner._parameters[name].shape  # type: ignore[union-attr]
    owner.register_parameter(name, None)
    owner.__dict__[name] = torch.empty(shape, device="meta")


def _show_absent(model: nn.Module, chain: Chain) -> None:
    """Dropped parameters of the chain's end as zeros that take no memory: a forward may look at them on its way out."""
    for name in chain.last:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        absent = owner.__dict__.get(leaf)
        if isinstance(absent, Tensor) and absent.is_meta:
            place = next(model.parameters()).device
            owner.__dict__[leaf] = torch.zeros((), device=place).expand(absent.shape)


def _found(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None for a parameter's."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent)._modules.get(leaf)


def _recorded(model: nn.Module, chain: Chain, into: dict[str, Tensor]) -> list[Any]:
    """Hooks that note the outputs of the modules whose outputs travel."""

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            values = (out,) if isinstance(out, Tensor) else out
            into.update(
                {f"{name}.{at}": value for at, value in enumerate(values) if isinstance(value, Tensor)}
            )

        return hook

    return [
        module.register_forward_hook(note(name))
        for name in chain.carry
        if not isinstance(module := model.get_submodule(name), Dropped)
    ]


def stage(
    family: Family, model: nn.Module, carry: Mapping[str, Tensor] | None, batch: Batch
) -> dict[str, Tensor] | Output:
    """Family.stage for a card with one chain: its own forward (`whole`) between the blocks that are here."""
    chains = list(family.card.pipeline.values())
    if not chains:
        return family.whole(model, batch)
    (chain,) = chains
    carried = {name: tensor for name, tensor in (carry or {}).items() if name != HIDDEN}
    hooks = _recorded(model, chain, carried)
    try:
        hidden = None if carry is None else carry[HIDDEN]
        left, out = run(model, chain, hidden, lambda: family.whole(model, batch), carried)
    finally:
        for hook in hooks:
            hook.remove()
    return out if left is None else {HIDDEN: left, **carried}


@torch.no_grad()
def carry_spec(family: Family, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Family.carry_spec for a card with one chain: the stream before a block and the carried outputs, found by a
    forward on meta tensors up to the first block. Floating tensors travel in `dtype`."""
    known: dict[Any, dict[str, Tensor]] = family.__dict__.setdefault("_carry_specs", {})
    key = (dtype, *((name, tuple(tensor.shape)) for name, tensor in sorted(batch.tensors.items())))
    if key in known:
        return known[key]
    (chain,) = family.card.pipeline.values()
    if "_probe" not in family.__dict__:
        family.__dict__["_probe"] = family.build().trained
    probe: nn.Module = family.__dict__["_probe"]
    carried: dict[str, Tensor] = {}

    def leave(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Left(args[0] if args else kwargs[HIDDEN])

    first = probe.get_submodule(blocks(probe, chain)[0])
    hooks = [*_recorded(probe, chain, carried), first.register_forward_pre_hook(leave, with_kwargs=True)]
    meta = replace(batch, tensors={name: tensor.to("meta") for name, tensor in batch.tensors.items()})
    try:
        family.whole(probe, meta)
        raise RuntimeError(f"The forward of {family.card.name} does not pass through {chain.blocks}.")
    except _Left as left:
        found = {HIDDEN: left.hidden, **carried}
    finally:
        for hook in hooks:
            hook.remove()
    known[key] = {
        name: torch.empty(
            tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="meta"
        )
        for name, tensor in found.items()
    }
    return known[key]
