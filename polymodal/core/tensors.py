"""Tensors by name that are read, drawn or computed only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


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
