"""The command for other systems' weight layouts: convert. Everything heavy is imported inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polymodal.cli.app import app, command, one_of

# One line an option reads best.
# fmt: off


@command(app, "polymodal convert Qwen/Qwen2.5-VL-7B-Instruct out/mm --to mm --tp 2 --pp 14,14 --vit-pp 32,0", "polymodal convert runs/mm/iter_0001000 out/hf --to hf --hf-dir weights/qwen2.5-vl-7b", name="convert", panel="Weights of other systems")
def convert_weights(
    source: Annotated[str, typer.Argument(help="Hub checkpoint (directory, file or id), Megatron-style tree, or DCP directory.", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the new one goes.", show_default=False)],
    to: Annotated[str, typer.Option(help="hf, mm or dcp.", show_default=False)],
    hf_dir: Annotated[str | None, typer.Option(metavar="DIR|ID", help="The model's hub checkpoint, when SOURCE is none.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size.")] = 1,
    pp: Annotated[str | None, typer.Option(metavar="LIST", help="Language (or diffusion) layers on each stage: 6,10, or [[3,5],[3,5]] with virtual stages.")] = None,
    vit_pp: Annotated[str | None, typer.Option(metavar="LIST", help="Vision layers on each stage.")] = None,
    audio_pp: Annotated[str | None, typer.Option(metavar="LIST", help="Audio layers on each stage.")] = None,
    vit_tp: Annotated[int, typer.Option(help="Tensor parallel size of the vision tower.", show_default="tp")] = 0,
    audio_tp: Annotated[int, typer.Option(help="Tensor parallel size of the audio tower.", show_default="tp")] = 0,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallel size.")] = 1,
    canonical: Annotated[bool, typer.Option("--canonical", help="Keep q, k, v and gate, up apart in the tree.")] = False,
    verify: Annotated[bool, typer.Option(help="Read everything back and compare.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print files, keys, shapes and bytes; write nothing.")] = False,
    workers: Annotated[int, typer.Option(help="Threads.", show_default="one a core")] = 0,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read trees whose files hold more than tensors; the rest becomes inert.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that was not written by a conversion.")] = False,
) -> int:
    """Weights between the hub's layout, Megatron-style trees and DCP directories; what SOURCE is, is recognised."""
    from polymodal.convert import recognise
    from polymodal.convert.options import Settings
    from polymodal.models import catalog

    one_of("--to", to, ("hf", "mm", "dcp"))

    def local(name: str) -> Path:
        return Path(name) if Path(name).exists() else catalog.resolve(name)

    settings = Settings(verify, dry_run, workers, allow_pickle, force)
    sizes = {"tp": tp, "ep": ep, "vit": vit_tp, "audio": audio_tp}
    layers = {"pp": pp, "vit": vit_pp, "audio": audio_pp}
    return recognise.run(local(source), directory, to, local(hf_dir) if hf_dir else None, sizes, layers, canonical, settings)  # type: ignore[arg-type]
