"""How long a run is: the batch, the passes and the length of packs that suit the data, and the warning when
they do not.

Sees data/schedule.py and the recipe. A step is a pack times train.global_batch_size: few rows and a large
batch are one step, which teaches nothing, and no error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polymodal.data.schedule import Schedule
from polymodal.recipe import Recipe

FEW_STEPS = 20
"""A run of fewer optimizer steps is warned of: its learning rate hardly leaves the warm-up."""
ENOUGH_STEPS = 100
"""What is aimed at where the data are small."""
PASSES = 3
"""Epochs over small data before the batch is made smaller; more only where FEW_STEPS would not be reached."""
LEAST_BATCH = 4
SHORTEST, LONGEST = 256, 32_768
"""Bounds of data.max_length that is chosen, in tokens."""


@dataclass(frozen=True)
class RunLength:
    batch: int  # train.global_batch_size
    epochs: int
    steps: int  # about


def choose(units: float, multiple: int, most: int) -> RunLength:
    """Batch and epochs for `units` packs or samples an epoch.

    multiple: what the batch must be a multiple of (data-parallel ranks x micro_batch_size); most: the
    batch for large data.
    """

    def rounded(batch: float) -> int:
        return max(1, round(batch / multiple)) * multiple

    batch, least = rounded(most), rounded(max(multiple, LEAST_BATCH))
    while batch > least and units * PASSES / batch < ENOUGH_STEPS:
        batch = max(least, rounded(batch // 2))
    epochs = min(PASSES, math.ceil(ENOUGH_STEPS * batch / units))
    if units * epochs / batch < FEW_STEPS:
        epochs = math.ceil(FEW_STEPS * batch / units)
    return RunLength(batch, epochs, int(units * epochs / batch))


def max_length(tokens: np.ndarray) -> int:
    """data.max_length for rows of so many tokens: the power of two that holds all, or 99 % where the
    longest are very long."""
    longest = int(tokens.max())
    wanted = longest if longest <= 8192 else int(np.quantile(tokens, 0.99))
    return min(LONGEST, max(SHORTEST, 2 ** math.ceil(math.log2(max(1, wanted)))))


def units(tokens: float, rows: int, pack_length: int | None) -> float:
    """Packs that rows of so many tokens together fill, or the rows themselves."""
    return max(1.0, tokens / (0.95 * pack_length)) if pack_length else float(rows)


def warning(recipe: Recipe, schedule: Schedule, steps: int, data_ranks: int) -> str | None:
    """What to say of a run with too few steps, with numbers that make it longer; None of others, and where
    train.steps asks for them. data_ranks: ranks that see different data."""
    if recipe.train.steps is not None or steps >= FEW_STEPS:
        return None
    said, length = [], None
    if schedule.pack:
        usable = schedule.index.tokens[schedule.index.usable]
        length = min(schedule.pack_length, max_length(usable))
        if length < schedule.pack_length:
            said.append(f"data.max_length={length}")
            said += ["data.pack_length=null"] * (recipe.data.pack_length is not None)
    total = schedule.mean_sample().tokens * schedule.draws
    multiple = data_ranks * (1 if schedule.pack else schedule.micro)
    found = choose(units(total, schedule.draws, length), multiple, recipe.train.global_batch_size)
    said += [f"train.global_batch_size={found.batch}", f"train.epochs={found.epochs}"]
    many = f"{steps} optimizer step{'s' * (steps != 1)}"
    batch = recipe.train.global_batch_size
    why = f"{schedule.draws:,} rows fill few batches of {batch}"
    return f"The whole run is {many}, fewer than {FEW_STEPS}: {why}. About {found.steps}: {' '.join(said)}"
