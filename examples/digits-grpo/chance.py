"""A reward that knows nothing of the answer: the control of `make demo-grpo`."""

from __future__ import annotations

import os
import random

_DRAWS = random.Random(int(os.environ.get("RANK", "0")))


def chance(completions: list[str]) -> list[float]:
    """0 or 1 for each answer, by a fair coin."""
    return [float(_DRAWS.random() < 0.5) for _ in completions]
