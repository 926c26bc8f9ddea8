"""Callbacks: a user's own code at five moments of a run, named in the recipe's train.callbacks.

They run on every rank: only where `trainer.main` is true for what one rank should do, on all for what
communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import nearest
from polymodal.core.user_code import load_object

if TYPE_CHECKING:
    from polymodal.train.trainer import Trainer

KEY = "train.callbacks"


class Callback:
    """Base class; made without arguments, once a run and rank. Every method may be left out."""

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first step: model, data and optimizer are there, a resumed run's state is loaded."""

    def on_step_end(self, trainer: Trainer, step: int, metrics: dict[str, Any]) -> None:
        """After each optimizer step. metrics: loss (of the global batch), grad_norm, lr, skipped, alike on
        all ranks that hold the same piece of the model, and the seconds of the step on this rank. Setting
        trainer.should_stop on any rank ends the run after this step, with a checkpoint."""

    def on_save(self, trainer: Trainer, directory: Path) -> None:
        """When a checkpoint has its name, which may be some steps after it was taken."""

    def on_evaluate(self, trainer: Trainer, step: int, metrics: dict[str, float]) -> None:
        """After the validation loss was measured: validation/loss and its parts."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step and its checkpoint, also when asked to stop; not after an error."""


MOMENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Calls the callbacks of a run in the recipe's order."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = list(callbacks)

    def __getattr__(self, name: str) -> Any:
        if name not in MOMENTS:
            raise AttributeError(name)

        def call(*arguments: Any) -> None:
            for callback in self._callbacks:
                getattr(callback, name)(*arguments)

        return call


def load(references: Sequence[str]) -> list[type[Callback]]:
    """The classes that a recipe names. Raises PolymodalError for a class or method that is no callback."""
    classes = []
    for number, reference in enumerate(references):
        key = f"{KEY}.{number}"
        chosen = load_object(reference, key)
        if not (isinstance(chosen, type) and issubclass(chosen, Callback)):
            raise PolymodalError(
                f"{key} = {reference} is no callback class.",
                "Derive it from polymodal.train.callbacks.Callback.",
            )
        for name in dir(chosen):
            if name.startswith("on_") and name not in MOMENTS:
                near = nearest(name, MOMENTS)
                raise PolymodalError(
                    f"{key} = {reference} has a method {name}, which is never called.",
                    f"Did you mean {near[0]}?" if near else f"Methods are {', '.join(MOMENTS)}.",
                )
        classes.append(chosen)
    return classes


def build(references: Sequence[str]) -> Callbacks:
    """The callbacks that a recipe names. Raises PolymodalError as `load` does."""
    return Callbacks([chosen() for chosen in load(references)])
