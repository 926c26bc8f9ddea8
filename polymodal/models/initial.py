"""Random weights that depend on the seed and the parameter's name only, whatever the layout.

The library's own initialiser draws each parameter whole, on the CPU, from torch's generator seeded by (seed,
name); a rank then takes its slices (slices.scatter). Every rank draws the whole model one tensor at a time:
about 4 ns an element, and never more memory than the largest parameter in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.tensors import has_nan


@contextmanager
def shielded(
    module: nn.Module, parameters: Collection[str] = (), buffers: Collection[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Replace all parameters and buffers of a module and of its children by meta tensors, so that an
    initialiser, which may draw for the children too, changes none of them.

    parameters: of the module itself, that get memory instead, float32 on the CPU, full of NaN: yielded.
    buffers:    of the module itself, that are not replaced.
    """
    held = [(inner, dict(inner._parameters), dict(inner._buffers)) for inner in module.modules()]
    drawn: dict[str, Tensor] = {}
    try:
        for inner, own, tables in held:
            for name, parameter in own.items():
                if parameter is None:
                    continue
                wanted = inner is module and name in parameters
                empty = torch.full(parameter.shape, torch.nan, device="cpu" if wanted else "meta")
                inner._parameters[name] = nn.Parameter(empty, requires_grad=False)
                if wanted:
                    drawn[name] = empty
            for name, buffer in tables.items():
                if buffer is not None and not (inner is module and name in buffers):
                    inner._buffers[name] = torch.empty_like(buffer, device="meta")
        yield drawn
    finally:
        for inner, own, tables in held:
            inner._parameters.update(own)
            kept = buffers if inner is module else ()
            inner._buffers.update({name: buffer for name, buffer in tables.items() if name not in kept})


@torch.no_grad()
def draw(
    module: nn.Module, parameter: str, rule: Callable[[nn.Module], Any], name: str, seed: int
) -> Tensor | None:
    """One of a module's own parameters, whole, as `rule`, its initialiser, draws it from (seed, name).

    None when the rule does not set all of it.
    """
    with shielded(module, (parameter,)) as drawn, seeded(seed, name):
        rule(module)
    value = drawn[parameter]
    return None if has_nan(value) else value


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Inside, torch's generator of the CPU is seeded by (seed, name); afterwards it is as before."""
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield
