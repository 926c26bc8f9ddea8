"""Commands before a run: models, init, download, doctor. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path

from polymodal.cli.app import command
from polymodal.core.terminal import say, say_lines


@command("models")
def models(
    name: str | None = None, request: str | None = None, as_json: bool = False, markdown: bool = False
) -> int:
    """The models: sizes, tasks, status, parallelism. With --for: which one, and the commands."""
    from polymodal.tools import models_command

    if markdown:
        say_lines(models_command.page())
        return 0
    return models_command.main(name, request, as_json)


@command("init")
def init(
    model: str,
    task: str | None = None,
    size: str | None = None,
    devices: int | None = None,
    data: str = "data/train.json",
    device: str = "910b",
    search: bool = False,
    vram: int | None = None,
    out: Path | None = None,
    force: bool = False,
) -> int:
    """Write a commented recipe with the recommended layout."""
    from polymodal.tools import init_recipe as writer

    task = task or ("sft" if vram is None else "lora")
    return writer.main(model, task, size, devices, data, out, force, device, search, vram)


@command("download")
def download(model: str, to: Path | None = None, revision: str | None = None) -> int:
    """Fetch a checkpoint from the hub; resumes. Honours HF_ENDPOINT (mirrors), HTTPS_PROXY and HF_TOKEN."""
    from polymodal.models import catalog

    say(catalog.download(model, revision, to))
    return 0


@command("doctor")
def examine(env: bool = False, as_json: bool = False) -> int:
    """Look at this machine before a run: devices, versions, backends, memory, ports, disk, limits, clock."""
    from polymodal.tools import doctor

    return doctor.main(env, as_json)
