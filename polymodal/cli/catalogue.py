"""Commands before a run: models, init, download, doctor. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polymodal.cli.app import AsJson, Revision, app, command

# One line an option reads best.
# fmt: off


@command(app, "polymodal models", "polymodal models qwen2.5-vl", 'polymodal models --for "fine-tune a model that reads receipts"', panel="Begin")
def models(
    name: Annotated[str | None, typer.Argument(help="Model, or model with size.", show_default=False)] = None,
    wish: Annotated[str | None, typer.Option("--for", metavar="TEXT", help="What you want to do, in plain words (English or Chinese).")] = None,
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/models.md.")] = False,
) -> int:
    """The models: sizes, tasks, status, which parallelism each supports. With --for: which one, and the commands."""
    from polymodal.tools import models_command

    if markdown:
        print(models_command.page(), end="")
        return 0
    return models_command.main(name, wish, as_json)


@command(app, "polymodal init qwen2.5-vl --task lora --size 7b --devices 8 -o recipe.yaml", panel="Begin")
def init(
    model: Annotated[str, typer.Argument(help="Model, model with size, hub id or directory.", show_default=False)],
    task: Annotated[str, typer.Option(help="sft, lora, pretrain or dreambooth.")] = "sft",
    size: Annotated[str | None, typer.Option(help="Size, when MODEL names none.")] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", min=1, help="Accelerators of the run.", show_default="recommended")] = None,
    data: Annotated[str, typer.Option(metavar="FILE", help="Data file; when it is there, batch, epochs and lengths are chosen for it.")] = "data/train.json",
    device: Annotated[str, typer.Option(metavar="NAME", help="Accelerator that the layout is for, as `polymodal plan --device`.")] = "910b",
    search: Annotated[bool, typer.Option("--search", help="Trace the best layouts before one is recommended; takes minutes.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write it.", show_default="stdout")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> int:
    """Write a commented recipe with the recommended layout."""
    from polymodal.tools import init_recipe as writer

    return writer.main(model, task, size, devices, data, out, force, device, search)


@command(app, "polymodal download qwen2.5-vl-3b", "HF_ENDPOINT=https://mirror.example polymodal download Qwen/Qwen2.5-VL-3B-Instruct --to weights/qwen", panel="Begin")
def download(
    model: Annotated[str, typer.Argument(help="Model with size, or hub id.", show_default=False)],
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Directory.", show_default="the hub's cache")] = None,
    revision: Revision = None,
) -> int:
    """Fetch a checkpoint from the hub; resumes. Honours HF_ENDPOINT (mirrors), HTTPS_PROXY and HF_TOKEN."""
    from polymodal.models import catalog

    print(catalog.download(model, revision, to))
    return 0


@command(app, "polymodal doctor", "polymodal doctor --env", panel="Begin")
def doctor(env: Annotated[bool, typer.Option("--env", help="Only the table of environment variables.")] = False, as_json: AsJson = False) -> int:
    """Look at this machine before a run: devices, versions, backends, shared memory, ports, disk, limits, clock."""
    from polymodal.tools import doctor as room

    return room.main(env, as_json)
