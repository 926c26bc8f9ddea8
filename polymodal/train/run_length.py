"""Batch size, epochs and length of packs that suit a data set, and the warning about a run of too few steps.

A few samples and a large batch make one step, which is no error and teaches nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polymodal.data.schedule import Schedule
from polymodal.recipe import Recipe

FEW_STEPS = 20
"""Fewer optimizer steps than this get a warning: the learning rate hardly leaves its warm-up."""
ENOUGH_STEPS = 100
"""Optimizer steps to aim at where the data are small."""
PASSES = 3
"""Epochs over small data before the batch is made smaller; more only where FEW_STEPS would not be reached."""
LEAST_BATCH = 4
SHORTEST, LONGEST = 256, 32_768
"""Bounds of a chosen data.max_length, in tokens."""


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
    """data.max_length for samples of so many tokens: the power of two that holds all of them, or 99 % where
    some are very long."""
    longest = int(tokens.max())
    length = longest if longest <= 8192 else int(np.quantile(tokens, 0.99))
    return min(LONGEST, max(SHORTEST, 2 ** math.ceil(math.log2(max(1, length)))))


def units(tokens: float, rows: int, pack_length: int | None) -> float:
    """Packs that samples of so many tokens together fill, or the samples themselves."""
    return max(1.0, tokens / (0.95 * pack_length)) if pack_length else float(rows)


def warning(recipe: Recipe, schedule: Schedule, steps: int, data_ranks: int) -> str | None:
    """The warning about a run with too few steps, with recipe keys that make it longer; None where there are
    enough or
    train.steps sets them. data_ranks: ranks that read different data."""
    if recipe.train.steps is not None or steps >= FEW_STEPS:
        return None
    keys, length = [], None
    if schedule.pack:
        usable = schedule.index.tokens[schedule.index.usable]
        length = min(schedule.pack_length, max_length(usable))
        if length < schedule.pack_length:
            keys.append(f"data.max_length={length}")
            if recipe.data.pack_length is not None:
                keys.append("data.pack_length=null")
    total = schedule.mean_sample().tokens * schedule.draws
    multiple = data_ranks * (1 if schedule.pack else schedule.micro)
    batch = recipe.train.global_batch_size
    longer = choose(units(total, schedule.draws, length), multiple, batch)
    keys += [f"train.global_batch_size={longer.batch}", f"train.epochs={longer.epochs}"]
    return (
        f"The whole run is {steps} optimizer step{'s' * (steps != 1)}, fewer than {FEW_STEPS}: "
        f"{schedule.draws:,} rows fill few batches of {batch}. About {longer.steps}: {' '.join(keys)}"
    )
