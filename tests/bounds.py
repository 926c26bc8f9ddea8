"""How near two computations of one number must come: on every processor, with every number of ranks and threads.

Kernels of another processor (AVX2, AVX-512, NEON), another alignment in memory and another number of ranks add the same
numbers in another order. Equality to the bit is asked only where the same operations run on the same values: what is
saved and loaded, copied, sliced, packed. Tests only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

EXACT = 1e-9
"""float64 throughout, relative: rounding is 1e-16 an operation; a term that is missing or counted twice shows at 1e-3."""
CURVE = 1e-5
"""float32, relative: losses and gradient norms of a few training steps of a tiny model. Another weighting of the loss
parts the first loss of such a model by as little as 4e-5; what kernels part it by stays below 1e-6."""


def assert_near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    """float32 results of one computation: apart by `tolerance` of the largest element at most."""
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance * max(1e-3, float(wanted.detach().abs().max()))
    )


def assert_one_picture(found: Any, wanted: Any) -> None:
    """uint8 pictures made by one model: rounding may part a few values by 1."""
    apart = np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int))
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02, (
        f"up to {apart.max()}, {(apart > 0).mean():.1%} differ"
    )
