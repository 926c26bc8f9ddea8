"""Commands of a run: train, check, profile, export. Everything heavy is imported inside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.app import command, spread
from polymodal.core.terminal import say

if TYPE_CHECKING:
    from polymodal.recipe import Recipe


@command("train")
def train(
    recipe: Path,
    overrides: list[str] | None = None,
    nproc: str | None = None,
    restarts: int = 0,
    min_nodes: int | None = None,
) -> int:
    """Train as a recipe says. The same command again goes on where it stopped.

    Joins when torchrun, SLURM or Kubernetes started it; --nproc (or NPUS_PER_NODE) starts local processes.
    """
    from polymodal import recipe as recipes

    return start(recipes.load(recipe, overrides or []), nproc, restarts, min_nodes)


def start(read: Recipe, nproc: str | None = None, restarts: int = 0, min_nodes: int | None = None) -> int:
    """Train a recipe that was read, in processes that are started here or in the launcher's."""
    from polymodal.convert import recognise
    from polymodal.runtime import device, environment, launcher, process_group

    recognise.register()
    environment.apply(read.device)
    if launcher.CHILD not in os.environ:
        target = process_group.from_environment(process_group.default_nproc(nproc, read.device.kind))
        starts = isinstance(target, process_group.LaunchRequest)
        if starts or target.rank == 0:
            from polymodal.tools import preflight

            preflight.refuse(read, target.nproc * target.nodes if starts else target.world)
        count = device.count(read.device.kind)
        if not starts and target.launcher == "alone" and count > 1:
            note = f"note: this node has {count} devices and one process trains; --nproc auto uses all"
            say(note, error=True)

    def here() -> int:
        from polymodal.train import trainer

        return trainer.run(read)

    return spread(nproc, read.run_dir, here, read.device.kind, restarts, min_nodes)


@command("check")
def check(
    recipe: Path,
    overrides: list[str] | None = None,
    world: int | None = None,
    data: bool = True,
    as_json: bool = False,
) -> int:
    """What train would refuse, and what it would do: samples, packs, steps, memory, disk. Trains nothing."""
    from polymodal import recipe as recipes
    from polymodal.convert import recognise
    from polymodal.tools import preflight_report

    recognise.register()
    return preflight_report.main(recipes.load(recipe, overrides or []), world, measure=data, as_json=as_json)


@command("export")
def export(
    source: str,
    directory: Path,
    merge_lora: bool = False,
    dtype: str | None = None,
    ema: bool = False,
    base: str | None = None,
    other: str | None = None,
    format: str = "source",
    force: bool = False,
) -> int:
    """Write a run as a hub checkpoint, and prove that the library opens it with the same outputs."""
    from polymodal.train import export as exporting

    return exporting.run(
        source,
        directory,
        merge_lora=merge_lora,
        dtype=dtype,
        ema=ema,
        base=base,
        other=other,
        layout=format,
        force=force,
    )


@command("profile")
def profile(run: Path, steps: int = 2, ranks: str = "0", stacks: bool = False, memory: bool = False) -> int:
    """Trace a few steps of a live run; it starts at the run's next step. Traces open in Perfetto."""
    from polymodal.tools import profile_request

    return profile_request.request_profile(run, steps, ranks, stacks=stacks, memory=memory)
