"""Commands of a run: train, check, profile, export. Everything heavy is imported inside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from polymodal.cli.app import (
    AsJson,
    Base,
    Ema,
    Other,
    Overrides,
    Processes,
    RecipeFile,
    app,
    command,
    one_of,
    spread,
)

# One line an option reads best.
# fmt: off


@command(app, "polymodal train recipe.yaml --nproc 8", "polymodal train recipe.yaml train.steps=100 optim.lr=2e-5", "torchrun --nproc-per-node 8 -m polymodal train recipe.yaml", panel="Train")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Processes = None,
    restarts: Annotated[int, typer.Option(metavar="N", min=0, help="Times to start again from the newest checkpoint after a process died.")] = 0,
    min_nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Nodes that are enough to go on with.", show_default="all")] = None,
) -> int:
    """Train as a recipe says. The same command again goes on where it stopped.

    Joins when torchrun, SLURM or Kubernetes started it; starts local processes with --nproc (or NPUS_PER_NODE).
    """
    from polymodal import recipe as recipes
    from polymodal.convert import recognise
    from polymodal.runtime import device, environment, launcher, process_group

    read = recipes.load(recipe, overrides or [])
    recognise.register()
    environment.apply(read.device)
    if launcher.CHILD not in os.environ:
        target = process_group.from_environment(process_group.default_nproc(nproc, read.device.kind))
        if isinstance(target, process_group.LaunchRequest) or target.rank == 0:
            from polymodal.tools import preflight as checks

            checks.refuse(read, target.nproc * target.nodes if isinstance(target, process_group.LaunchRequest) else target.world)
        if isinstance(target, process_group.ProcessInfo) and target.launcher == "alone" and (count := device.count(read.device.kind)) > 1:
            print(f"note: this node has {count} devices and one process trains; --nproc auto uses all", file=sys.stderr)

    def here() -> int:
        from polymodal.train import trainer

        return trainer.run(read)

    return spread(nproc, read.run_dir, here, read.device.kind, restarts, min_nodes)


@command(app, "polymodal check recipe.yaml --world 8", panel="Train")
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes it will be trained on.", show_default="what the layout needs")] = None,
    data: Annotated[bool, typer.Option(help="SampleLengths every sample (headers only).")] = True,
    as_json: AsJson = False,
) -> int:
    """Everything that train would refuse, and what it would do: samples, packs, steps, memory, disk. Trains nothing."""
    from polymodal import recipe as recipes
    from polymodal.convert import recognise
    from polymodal.tools import preflight_report

    recognise.register()
    return preflight_report.main(recipes.load(recipe, overrides or []), world, measure=data, as_json=as_json)


@command(app, "polymodal export runs/mine out/my-model --merge-lora --dtype bf16", panel="Train")
def export(
    source: Annotated[str, typer.Argument(metavar="RUN|CHECKPOINT", help="Run, or one of its checkpoints.", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the hub checkpoint goes.", show_default=False)],
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add adapters into the weights.", show_default="adapters alone")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="the base's")] = None,
    ema: Ema = False,
    base: Base = None,
    other: Other = None,
    format: Annotated[str, typer.Option(help="source (as the base's files) or transformers.")] = "source",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> int:
    """Write a run as a hub checkpoint, and prove that the library opens it with the same outputs."""
    from polymodal.train import export as room

    one_of("--format", format, ("source", "transformers"))
    return room.run(
        source, directory, merge_lora=merge_lora, dtype=dtype, ema=ema, base=base, other=other, layout=format, force=force
    )


@command(app, "polymodal profile runs/mine --steps 3 --ranks 0,1", panel="Train")
def profile(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run that is training.", show_default=False)],
    steps: Annotated[int, typer.Option(min=1, help="Steps to trace.")] = 2,
    ranks: Annotated[str, typer.Option(help="Ranks that write a trace, e.g. 0,1 or 0-7.")] = "0",
    stacks: Annotated[bool, typer.Option("--stacks", help="Record Python stacks and shapes.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Also write a memory snapshot.")] = False,
) -> int:
    """Trace a few steps of a live run; it starts at the run's next step. Traces open in Perfetto."""
    from polymodal.tools import profile_request

    return profile_request.request_profile(run, steps, ranks, stacks=stacks, memory=memory)
