"""Which activations are kept for backward and which are computed again, by block.

This room may replace the `forward` of a block's instance; it never wraps a module, so no parameter changes its
name. Hooks (FSDP2's, sequence parallelism's) stay outside of what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from polymodal import device

SAVED_OPERATORS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""aten operators whose results selective recompute keeps: the matrix products and the attention kernels."""


def saved_overloads() -> list[Any]:
    """SAVED_OPERATORS as operator overloads of this torch (an operator it does not have is left out)."""
    packets = (getattr(torch.ops.aten, name, None) for name in SAVED_OPERATORS)
    found = [getattr(p, overload) for p in packets if p is not None for overload in p.overloads()]
    fused = device.fused_attention()
    return found + ([getattr(fused, overload) for overload in fused.overloads()] if fused is not None else [])


def recompute(blocks: Iterable[nn.Module], policy: Literal["full", "selective"]) -> None:
    """Make each block keep its inputs only ("full"), or its matrix products and attention too ("selective").

    Non-reentrant: keyword arguments, several outputs and inputs without gradient are fine. Blocks in eval mode and
    forwards without gradient run as they are. Random state is restored, so dropout draws the same mask again.
    """
    extra: dict[str, Any] = {}
    if policy == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, saved_overloads())
    for block in blocks:
        block.forward = _recomputed(block, block.forward, extra)


def _recomputed(block: nn.Module, forward: Callable[..., Any], extra: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and block.training):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    return again
