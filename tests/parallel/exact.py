"""float64 from end to end: the library computes norms, rotary products and routing in float32 whatever its input.

With `float64()` around forward and backward these stay float64, so that two layouts must agree to rounding of
float64 and a real difference cannot hide behind float32. Tests only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Casts of float64 tensors to float32 do nothing inside this block."""
    functional = torch.nn.functional
    to_float, to, of = Tensor.float, Tensor.to, Tensor.type
    softmax, sample = functional.softmax, functional.grid_sample

    def kept_float(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    def kept_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return to(self, *args, **kwargs)

    def kept_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        return self if self.dtype == torch.float64 and dtype is torch.float32 else of(self, dtype, **kwargs)

    def kept_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    def sampled(table: Tensor, grid: Tensor, **kwargs: Any) -> Tensor:
        return sample(table, grid.to(table.dtype), **kwargs)

    Tensor.float, Tensor.to, Tensor.type = kept_float, kept_to, kept_type  # type: ignore
    functional.softmax, functional.grid_sample = kept_softmax, sampled
    try:
        yield
    finally:
        Tensor.float, Tensor.to, Tensor.type = to_float, to, of  # type: ignore
        functional.softmax, functional.grid_sample = softmax, sample
