"""Random weights that depend on the seed and the parameter's name only, never on how the model is laid out.

The library's own initialiser draws each parameter whole, on the CPU, from torch's generator seeded by (seed,
name); a rank then takes its slices (slices.scatter). Every rank draws the whole model that way, one tensor at
a time: the price is time (about 4 ns an element) and never more memory than the largest parameter in float32.
Imports torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def shielded(
    module: nn.Module, parameters: Collection[str] = (), buffers: Collection[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Put meta tensors in the place of all parameters and buffers of a module and of those below it, so that
    an initialiser changes none of them; it may draw for its children too.

    parameters: of the module itself, that get memory instead, float32 on the CPU, full of NaN: what is
    yielded.
    buffers:    of the module itself, that stay in their places, to be changed.
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
    """One of a module's own parameters, whole, as `rule` (the module's initialiser) draws it from (seed,
    name).

    None when the rule leaves it, or a part of it, without values.
    """
    with shielded(module, (parameter,)) as drawn, seeded(seed, name):
        rule(module)
    value = drawn[parameter]
    return None if value.numel() and bool(torch.aminmax(value).min.isnan()) else value


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """torch's generator of the CPU as (seed, name) sets it, and as it was before afterwards."""
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest, "little"))
        yield
