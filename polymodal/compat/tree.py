"""--tree: at the end of a run its weights as a Megatron-style tree, or DCP directory, where --save points.

The run's export (`checkpoint.export`) is converted as `polymodal convert` does it: `release/` and the tracker
latest_checkpointed_iteration.txt beside our own checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polymodal.core.terminal import say
from polymodal.train.callbacks import Callback

if TYPE_CHECKING:
    from polymodal.train.trainer import Trainer


class Tree(Callback):
    """A Megatron-style tree at the run's own tp, pp and ep."""

    to: Literal["mm", "dcp"] = "mm"

    def on_train_end(self, trainer: Trainer) -> None:
        if not trainer.main or trainer.state.step < trainer.steps:
            return
        from polymodal.convert import pipeline, recognise
        from polymodal.convert.options import Settings
        from polymodal.convert.tree import TRACKER

        root, hub = Path(trainer.run_dir), Path(trainer.run_dir) / "export"
        parts = pipeline.parts(hub)
        source = hub / parts[0] if len(parts) == 1 else hub
        sizes = {"tp": trainer.recipe.parallel.tp, "ep": trainer.recipe.parallel.ep}
        say(f"saving checkpoint at iteration {trainer.state.step:7d} to {root}")
        recognise.run(source, root, self.to, None, sizes, _layers(trainer), False, Settings())
        say(f"  successfully saved checkpoint from iteration {trainer.state.step:7d} to {root}")
        say(f"{root / TRACKER} points at it: `mm-convert` and --load read it")


class Directory(Tree):
    """A DCP directory, which FSDP2 runs leave there."""

    to = "dcp"


def _layers(trainer: Trainer) -> dict[str, str | None]:
    """Layers of each stage, where the recipe names them; else the tree has one stage."""
    given = trainer.recipe.parallel.pp_layers
    named: dict[str, Any] = given if isinstance(given, dict) and trainer.recipe.parallel.pp > 1 else {}
    lists = {
        "pp": named.get("language") or named.get("blocks"),
        "vit": named.get("vision"),
        "audio": named.get("audio"),
    }
    return {name: json.dumps(layers) if layers else None for name, layers in lists.items()}
