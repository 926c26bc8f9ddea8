"""The iteration line and the closing lines in the documented form, which start scripts read by grep and awk.

Scripts take the fifth field, split at `:`, of lines with `elapsed time per iteration`: the two colons of the
date are part of the form. They mean the last 100 of the first 200 such lines.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from polymodal.core.terminal import say
from polymodal.train.callbacks import Callback

if TYPE_CHECKING:
    from polymodal.train.trainer import Trainer

FIRST, LAST = 200, 100
"""Lines that the scripts' mean looks at, and the last of them that it takes."""


def line(
    step: int,
    steps: int,
    consumed: int,
    milliseconds: float,
    rate: float,
    batch: int,
    tokens: float,
    loss: float,
    norm: float,
    skipped: int,
    scale: float = 1.0,
) -> str:
    """One line. milliseconds: mean of a step since the last line; tokens: of a sample; consumed: samples."""
    parts = [
        f"iteration {step:8d}/{steps:8d}",
        f"consumed samples: {consumed:12d}",
        f"elapsed time per iteration (ms): {milliseconds:.1f}",
        f"learning rate: {rate:.6E}",
        f"global batch size: {batch:5d}",
        f"tokens per sample: {tokens:.6E}",
        f"loss: {loss:.6E}",
        f"loss scale: {scale:.1f}",
        f"grad norm: {norm:.3f}",
        f"number of skipped iterations: {skipped:3d}",
        f"number of nan iterations: {0:3d}",
    ]
    return f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {' | '.join(parts)} |"


class IterationLine(Callback):
    """Prints a line every monitor.every steps, and the two closing lines when the run ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # of the steps since the last line
        self.losses: list[float] = []
        self.skipped = 0
        self.samples = self.tokens = 0  # until the last line
        self.printed: list[float] = []

    def on_train_begin(self, trainer: Trainer) -> None:
        self.samples, self.tokens = trainer.state.samples, trainer.state.tokens

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, Any]) -> None:
        self.seconds.append(metrics["seconds"])
        if metrics["skipped"]:
            self.skipped += 1
        else:
            self.losses.append(metrics["loss"])
        if not trainer.main or step % trainer.recipe.monitor.every:
            return
        state, milliseconds = trainer.state, 1000 * sum(self.seconds) / len(self.seconds)
        samples = max(1, state.samples - self.samples)
        text = line(
            step,
            trainer.steps,
            state.samples,
            milliseconds,
            metrics["lr"],
            trainer.recipe.train.global_batch_size,
            (state.tokens - self.tokens) / samples,
            sum(self.losses) / len(self.losses) if self.losses else metrics["loss"],
            metrics["grad_norm"],
            self.skipped,
            trainer.scaler.scale if trainer.scaler.enabled else 1.0,
        )
        say(text) if trainer.progress is None else trainer.progress.print(text)
        self.printed.append(milliseconds)
        self.seconds, self.losses, self.skipped = [], [], 0
        self.samples, self.tokens = state.samples, state.tokens

    def on_train_end(self, trainer: Trainer) -> None:
        if not trainer.main or not self.printed:
            return
        taken = self.printed[:FIRST][-LAST:]
        mean = sum(taken) / len(taken)
        say(f"Elapsed Time Per iteration: {mean:.1f}")
        say(f"Average Samples per Second: {trainer.recipe.train.global_batch_size * 1000 / mean:.3f}")
