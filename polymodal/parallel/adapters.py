"""LoRA on stacked experts that a group of ranks shares: each rank adds to its own experts what their adapters say.

peft wraps the module that holds the stacks once for each adapted stack, one wrapper inside of the other; A [r E, in] and
B [out, r E] stay whole parameters like other adapters (FSDP2 shards them), so files, norms and merging know no group.
tensor.py and expert.py ask this room; it sees torch and peft's wrappers only.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


def wrapped(module: nn.Module) -> tuple[nn.Module, list[Any]]:
    """(the module inside of peft's wrappers of its parameters, these wrappers from the inside out)."""
    wrappers: list[Any] = []
    while hasattr(module, "parameter_name"):
        wrappers.insert(0, module)
        module = module.base_layer  # type: ignore[assignment]
    return module, wrappers


def add_own(experts: nn.Module, wrappers: list[Any], start: int, held: int) -> None:
    """Let the forward of `experts`, which sees its stacks [held, ..] in `__dict__`, add the adapters of the experts
    start .. start + held to them: W + scale * B A. The wrappers only pass on from then.

    Call before styles.see_local. A rank's gradients of A and B are those of its own experts: their sum over the ranks
    that share the experts is whole.
    """
    forward = experts.forward

    @wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        for wrapper in wrappers:
            key = wrapper.parameter_name
            for name in () if wrapper.disable_adapters else wrapper.active_adapters:
                left, right, scale = wrapper.get_delta_factors(name)
                own = (_local(factor).narrow(0, start, held) for factor in (left, right))
                experts.__dict__[key] = torch.baddbmm(experts.__dict__[key], *own, alpha=scale)
        return forward(*args, **kwargs)

    experts.forward = adapted  # type: ignore[method-assign]
    for wrapper in wrappers:
        wrapper.forward = _passing(wrapper)


def _passing(wrapper: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapper.base_layer(*args, **kwargs)

    return forward


def _local(factor: Tensor) -> Tensor:
    return factor.to_local(grad_placements=[Partial()]) if isinstance(factor, DTensor) else factor
