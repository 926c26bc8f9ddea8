"""Tensors by name, read or computed when they are asked for; checks of values; copies to a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError

DAMAGED = (
    "The file is damaged, or the run that wrote it had diverged: "
    "fetch it again, or take an earlier checkpoint."
)


def has_nan(tensor: Tensor) -> bool:
    return math.isnan(_extremes(tensor)[0])


def require_finite(
    tensors: Iterable[tuple[str, Tensor]], where: object, hint: str = DAMAGED, infinite: bool = False
) -> None:
    """Raises PolymodalError for a tensor with NaN or infinity. One pass over the memory, about 10 GB a second
    a core.

    where: the file or directory, for the message; infinite: infinity may be, as in buffers that are masks.
    """
    for name, tensor in tensors:
        least, most = _extremes(tensor)
        if math.isnan(least):
            raise PolymodalError(f"{where}: {name} holds values that are not numbers (NaN).", hint)
        if not infinite and math.inf in (-least, most):
            raise PolymodalError(f"{where}: {name} holds values that are infinite.", hint)


def _extremes(tensor: Tensor) -> tuple[float, float]:
    """(least, largest) value; both NaN where there is one."""
    if not tensor.numel() or not tensor.is_floating_point() or tensor.is_meta:
        return 0.0, 0.0
    least, most = torch.aminmax(tensor.detach().bfloat16() if tensor.itemsize == 1 else tensor.detach())
    return float(least), float(most)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device that the host does not wait for; on the CPU the tensor itself.

    From page-locked memory: a copy from elsewhere waits for what the device has been given to do.
    """
    if tensor.device.type == "cpu" and torch.device(device).type not in ("cpu", "meta"):
        tensor = tensor if tensor.is_pinned() else tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, laid out alike; from an accelerator page-locked, and not waited for."""
    pinned = tensor.device.type != "cpu"
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)  # of the same strides
    return host.copy_(tensor.detach(), non_blocking=True)


class LazyTensors(Mapping[str, Tensor]):
    """A mapping of names to whole tensors on the CPU; nothing is kept, so each look-up costs a read.

    readers: name -> what gives its tensor, called with the name. `first | second`: the second's tensors win.
    """

    def __init__(self, readers: Mapping[str, Callable[[str], Tensor]]):
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name](name)

    def __contains__(self, name: Any) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __or__(self, other: LazyTensors) -> LazyTensors:
        return LazyTensors(self._readers | other._readers)

    def renamed(self, names: Mapping[str, str]) -> LazyTensors:
        """Those of `names` (this mapping's name -> the new one), under their new names."""
        old_of = {new: old for old, new in names.items()}
        return LazyTensors(dict.fromkeys(old_of, lambda name: self[old_of[name]]))
