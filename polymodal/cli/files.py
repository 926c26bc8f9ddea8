"""Commands of files: convert (weights); data convert, codes, check, show; recipe schema, show, docs.

Everything heavy is imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymodal.cli.app import command
from polymodal.core.terminal import say_lines


@command("convert")
def convert_weights(
    source: str,
    directory: Path,
    to: str,
    hf_dir: str | None = None,
    tp: int = 1,
    pp: str | None = None,
    vit_pp: str | None = None,
    audio_pp: str | None = None,
    vit_tp: int = 0,
    audio_tp: int = 0,
    ep: int = 1,
    canonical: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    workers: int = 0,
    allow_pickle: bool = False,
    force: bool = False,
) -> int:
    """Weights between the hub's layout, Megatron-style trees and DCP directories; SOURCE is any of them."""
    from polymodal.convert import recognise
    from polymodal.convert.options import Settings
    from polymodal.models import catalog

    def local(name: str) -> Path:
        return Path(name) if Path(name).exists() else catalog.resolve(name)

    settings = Settings(verify, dry_run, workers, allow_pickle, force)
    sizes = {"tp": tp, "ep": ep, "vit": vit_tp, "audio": audio_tp}
    layers = {"pp": pp, "vit": vit_pp, "audio": audio_pp}
    return recognise.run(
        local(source), directory, to, local(hf_dir) if hf_dir else None, sizes, layers, canonical, settings
    )  # type: ignore[arg-type]


@command("data convert")
def convert(
    source: str, target: str, media_dir: str | None = None, format: str = "auto", missing: str = "skip"
) -> int:
    """Rewrite a data file as MLLM JSON; text-only rows are kept, missing media counted and listed."""
    from polymodal.tools import data_convert

    options: dict[str, Any] = {"format": format, "media_dir": media_dir, "missing": missing}
    say_lines(data_convert.convert(source, target, **options), "\n")
    return 0


@command("data codes")
def codes(
    source: str,
    target: Path,
    model: str,
    media_dir: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> int:
    """Rows of speech with the codes of a speaking model's codec, which its training learns from."""
    from polymodal.tools import data_codes

    return data_codes.main(
        source, target, model=model, media_dir=media_dir, device=device, batch_size=batch_size
    )


@command("data check")
def check_data(
    paths: list[str],
    media_dir: str | None = None,
    format: str = "auto",
    limit: int = 20,
    as_json: bool = False,
) -> int:
    """Read every row and every media header; list what is broken, with its line. Needs no model."""
    from polymodal.tools import data_check

    return data_check.main(paths, media_dir=media_dir, format=format, limit=limit, as_json=as_json)


@command("data show")
def show(
    recipe: Path,
    overrides: list[str] | None = None,
    out: Path = Path("samples.html"),
    samples: int = 8,
    seed: int = 0,
) -> int:
    """Render samples as the model meets them: tokens, label mask, pictures; one HTML page."""
    from polymodal import recipe as recipes
    from polymodal.tools import preflight as checks

    return checks.show(recipes.load(recipe, overrides or []), out, samples, seed)


@command("recipe schema")
def schema() -> int:
    """The JSON schema of a recipe, for editors."""
    import json

    from polymodal import recipe as recipes

    say_lines(json.dumps(recipes.json_schema(), indent=2), "\n")
    return 0


@command("recipe show")
def show_recipe(recipe: Path, overrides: list[str] | None = None) -> int:
    """A recipe with its bases, overrides and defaults resolved."""
    from polymodal import recipe as recipes

    say_lines(recipes.dump(recipes.load(recipe, overrides or [])))
    return 0


@command("recipe docs")
def docs() -> int:
    """The reference page of every key, as Markdown."""
    from polymodal.recipe import reference

    say_lines(reference.markdown())
    return 0


@command("translate")
def translate(
    what: str,
    arguments: list[str] | None = None,
    out: Path | None = None,
    nodes: int | None = None,
    source: str | None = None,
    values: list[str] | None = None,
    force: bool = False,
    as_json: bool = False,
) -> int:
    """A start script or command line of another program as a recipe, with a row for each of its flags and
    keys."""
    from polymodal.tools.translate import command as translation

    return translation.main(what, arguments or [], out, nodes, source, values or [], force, as_json)
