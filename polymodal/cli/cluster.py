"""Commands about whole clusters: plan, launch. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path

from polymodal.cli.app import command


@command("plan")
def plan(
    recipe: Path,
    overrides: list[str] | None = None,
    world: int | None = None,
    device: str = "h100",
    media: float = 0.25,
    patches: int = 1024,
    sound: float = 0.25,
    frames: int = 1000,
    rank: int | None = None,
    stage: int | None = None,
    search: bool = False,
    out: Path | None = None,
    html: Path | None = None,
    as_json: bool = False,
) -> int:
    """Memory of a rank, collectives, step time and bubble on a cluster, from one process without accelerator.

    Runs the recipe's own code with shapes instead of tensors. Needs the checkpoint's config.json only.
    """
    from polymodal import recipe as recipes
    from polymodal.plan import accelerators, command, planner
    from polymodal.tools import preflight

    read = recipes.load(recipe, overrides or [])
    accelerator = accelerators.named(device)
    asked = planner.Question(
        world or preflight.needs(read), accelerator, media, patches, sound, frames, rank, stage
    )
    base = None if overrides else recipe
    return command.main(read, asked, as_json=as_json, html=html, search=search, out=out, base=base)


@command("launch")
def launch(
    way: str,
    recipe: Path,
    overrides: list[str] | None = None,
    nodes: int = 1,
    nproc: int = 8,
    min_nodes: int | None = None,
    restarts: int = 3,
    out: Path | None = None,
    submit: bool = False,
    setup: str = "",
    option: list[str] | None = None,
    hosts: str = "",
    image: str = "",
    kind: str = "pytorchjob",
    namespace: str = "default",
    claim: str = "",
) -> int:
    """Write what starts a run on a cluster: retries, logs, rendezvous, environment; submit it on request."""
    from polymodal import recipe as recipes
    from polymodal.tools import job_scripts

    job = job_scripts.JobRequest(
        str(recipe),
        tuple(overrides or ()),
        nodes,
        nproc,
        min_nodes,
        restarts,
        tuple(option or ()),
        setup,
        image,
        tuple(host for host in hosts.split(",") if host),
        kind,
        namespace,
        claim,
    )
    return job_scripts.main(way, recipes.load(recipe, overrides or []), job, out, submit)
