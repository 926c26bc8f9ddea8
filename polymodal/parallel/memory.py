"""Which activations are kept, recomputed or offloaded to the host, and when FSDP2's shards are freed.

Only the `forward` of a block's instance is replaced, so no parameter changes its name; hooks (FSDP2's,
sequence parallelism's) stay outside of what is recomputed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from polymodal.core.tensors import to_host
from polymodal.runtime import device

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "matmul": ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"),
    "attention": (
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._flash_attention_forward",
        "aten._efficient_attention_forward",
    ),
    "experts": ("aten._grouped_mm", "transformers.grouped_mm_fallback"),
    "exchange": ("_c10d_functional.all_to_all_single",),
}
"""Operators whose results selective recompute keeps, by the values of `parallel.recompute_keep`."""


def kept_overloads(keep: Iterable[str] = tuple(OPERATORS)) -> list[Any]:
    """Operator overloads for keys of OPERATORS; operators that this torch does not have are left out."""
    packets: list[Any] = []
    for word in keep:
        for path in OPERATORS[word]:
            space, name = path.split(".")
            packets.append(getattr(getattr(torch.ops, space), name, None))
        if word == "attention":
            packets += device.fused_attention()
    return [getattr(packet, each) for packet in packets if packet is not None for each in packet.overloads()]


def recompute(
    blocks: Iterable[nn.Module],
    policy: Literal["full", "selective"],
    keep: Sequence[str] = tuple(OPERATORS),
    offload: bool = False,
) -> None:
    """Make each block keep its inputs only ("full"), or the results of the operators in `keep` too
    ("selective").

    Non-reentrant: keyword arguments, several outputs and inputs without gradient are fine. Blocks in eval
    mode and forwards without gradient run as they are. Random state is restored, so dropout is the same.
    offload: offload_activations comes after, and moves the kept results as well as the inputs.
    """
    extra: dict[str, Any] = {}
    if policy == "selective":
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, kept_overloads(keep))
        # torch's own policies for the host recompute instead (2.14); so what is kept goes through offload's
        # hooks
        if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:
            extra["respect_saved_tensors_hooks"] = offload
    for block in blocks:
        block.forward = _recomputed(block, block.forward, extra)


def _recomputed(block: nn.Module, forward: Callable[..., Any], extra: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and block.training):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    return again


# Activations on the host --------------------------------------------------------------------------

SMALLEST = 4096
"""Bytes below which a saved tensor stays where it is."""


def offload_activations(blocks: Iterable[nn.Module]) -> None:
    """Keep what each block saves for backward on the host: everything, or the inputs of a recomputed block.

    Parameters stay where they are, a tensor that is saved twice is copied once. Call after `recompute`.
    """
    for block in blocks:
        block.forward = _offloaded(block, block.forward)


def from_host(tensor: Tensor, to: torch.device) -> Tensor:
    """A copy on the device it came from."""
    return tensor.to(to, non_blocking=True)


def _offloaded(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and block.training):
            return forward(*args, **kwargs)
        copied: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}

        def pack(tensor: Tensor) -> Any:
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes < SMALLEST or isinstance(tensor, DTensor) or _storage(tensor) in _parameters(block):
                return tensor
            place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
            key = (_storage(tensor), tensor.dtype, *place)
            if key not in copied or copied[key][0].expired():
                copied[key] = StorageWeakRef(tensor.untyped_storage()), to_host(tensor)
            return tensor.device, copied[key][1]

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else from_host(packed[1], packed[0])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return offloaded


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _parameters(block: nn.Module) -> set[int]:
    """Storages of a block's parameters now: FSDP2 gathers those of inner units later."""
    return {_storage(p.to_local() if isinstance(p, DTensor) else p) for p in block.parameters()}


# Sharded parameters and gradients over a step (Rajbhandari et al. 2020, ZeRO) ---------------------


def shard_by_stage(model: nn.Module, stage: Literal[1, 2, 3]) -> None:
    """What FSDP2 keeps whole over the micro-batches of a step: nothing (3), parameters (2), gradients too
    (1).

    `model` is the FSDP2 root, sharded with reshard_after_forward False for stages 1 and 2. `before_backward`
    then does the rest.
    """
    object.__setattr__(model, "zero_stage", stage)


def before_backward(model: nn.Module, last: bool) -> None:
    """Before a forward and backward of an FSDP model: whether they are the last of the global batch.

    Gathered parameters are freed (ZeRO-1, ZeRO-2), whole gradients reduced (ZeRO-1) and sums over replicas
    (HSDP) made at the end only.
    """
    if not isinstance(model, FSDPModule):
        return
    stage = getattr(model, "zero_stage", 3)
    if stage < 3:
        model.set_reshard_after_backward(last)
    if stage == 1:
        model.set_requires_gradient_sync(last)
    else:
        model.set_requires_all_reduce(last)


def prefetch(units: Sequence[nn.Module], ahead: int) -> None:
    """Gather the parameters of the next `ahead` FSDP2 units, in the order of their use, while one computes.

    0: none, in backward neither (FSDP2 else gathers one ahead there).
    """
    for index, unit in enumerate(units):
        assert isinstance(unit, FSDPModule)
        if ahead:
            after = list(units[index + 1 : index + 1 + ahead])
            unit.set_modules_to_forward_prefetch(after)  # type: ignore[arg-type]
            before = list(reversed(units[max(0, index - ahead) : index]))
        else:
            before = [unit]  # itself: it is there already, and FSDP2's own choice is off
        if before:
            unit.set_modules_to_backward_prefetch(before)  # type: ignore[arg-type]
