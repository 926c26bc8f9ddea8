"""Commands about whole clusters: plan, launch. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polymodal.cli.app import AsJson, Overrides, RecipeFile, app, command

# One line an option reads best.
# fmt: off


@command(app, "polymodal plan recipe.yaml --world 512 --device h100", "polymodal plan recipe.yaml --world 64 --device 910b --search -o best.yaml", panel="Clusters")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(metavar="N", min=1, help="Accelerators of the cluster.", show_default="what the layout needs")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="h100, h200, h800, b200, a100, a800, 910b or 910c.")] = "h100",
    media: Annotated[float, typer.Option(metavar="SHARE", help="Share of a micro-batch's tokens that are pictures.")] = 0.25,
    patches: Annotated[int, typer.Option(metavar="N", min=1, help="Patches of one picture.")] = 1024,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Trace this rank only.")] = None,
    stage: Annotated[int | None, typer.Option(metavar="N", help="Trace a rank of this pipeline stage only.", show_default="all")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank the layouts that fit and write the best recipe.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Recipe that --search writes.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with memory and timeline.")] = None,
    as_json: AsJson = False,
) -> int:
    """Memory a rank, collectives, step time and bubble on a cluster that is not there; one process, no accelerator.

    Runs the recipe's own code with shapes instead of tensors. Needs the checkpoint's config.json only.
    """
    from polymodal import recipe as recipes
    from polymodal.plan import command, planner
    from polymodal.tools import preflight

    read = recipes.load(recipe, overrides or [])
    asked = planner.question(world or preflight.needs(read), device, media, patches, rank, stage)
    base = None if overrides else recipe
    return command.main(read, asked, as_json=as_json, html=html, search=search, out=out, base=base)


@command(app, "polymodal launch slurm recipe.yaml --nodes 4 --submit", "polymodal launch kubernetes recipe.yaml --nodes 4 --image registry/polymodal:1", panel="Clusters")
def launch(
    way: Annotated[str, typer.Argument(metavar="slurm|kubernetes|torchrun", help="What is written: an sbatch script, a manifest, or torchrun's line.", show_default=False)],
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes (hosts).")] = 1,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Processes a node, one a device.")] = 8,
    min_nodes: Annotated[int | None, typer.Option(metavar="N", min=1, help="Nodes that are enough to go on with when others die.", show_default="all")] = None,
    restarts: Annotated[int, typer.Option(metavar="N", min=0, help="Times to start again from the newest checkpoint.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write; - = stdout.", show_default="the run's name")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Also submit it (sbatch, kubectl).")] = False,
    setup: Annotated[str, typer.Option(metavar="SHELL", help="Line to run first, e.g. `source .venv/bin/activate`.")] = "",
    option: Annotated[list[str] | None, typer.Option(metavar="--KEY=VALUE", help="slurm: a further sbatch option; may repeat.")] = None,
    hosts: Annotated[str, typer.Option(metavar="A,B,...", help="torchrun: the hosts, first the one that all can reach.")] = "",
    image: Annotated[str, typer.Option(metavar="IMAGE", help="Container image (kubernetes; slurm with pyxis).")] = "",
    kind: Annotated[str, typer.Option(help="kubernetes: pytorchjob or trainjob.")] = "pytorchjob",
    namespace: Annotated[str, typer.Option(help="kubernetes: namespace.")] = "default",
    claim: Annotated[str, typer.Option(metavar="NAME", help="kubernetes: persistent volume claim, mounted as /data and worked in.")] = "",
) -> int:
    """Write what starts a run on a cluster: retries, logs, rendezvous, environment; submit it on request."""
    from polymodal import recipe as recipes
    from polymodal.tools import job_scripts

    wish = job_scripts.JobRequest(
        str(recipe), tuple(overrides or ()), nodes, nproc, min_nodes, restarts, tuple(option or ()), setup, image,
        tuple(host for host in hosts.split(",") if host), kind, namespace, claim,
    )
    return job_scripts.main(way, recipes.load(recipe, overrides or []), wish, out, submit)
