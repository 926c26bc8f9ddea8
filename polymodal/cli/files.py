"""Commands of data files and recipes: data convert, check, show; recipe schema, show, docs.

Everything heavy is imported inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polymodal.cli.app import AsJson, MediaDir, Overrides, RecipeFile, command, data_app, one_of, recipe_app

FORMATS = ("auto", "mllm", "llava", "sharegpt", "alpaca", "openai", "text", "caption", "asr")
DataFormat = Annotated[str, typer.Option(help="auto, mllm, llava, sharegpt, alpaca or openai.")]

# One line an option reads best.
# fmt: off


@command(data_app, "polymodal data convert data/llava_instruct_150k.json data/train.json --media-dir COCO2017/train2017")
def convert(
    source: Annotated[str, typer.Argument(help="LLaVA, ShareGPT, Alpaca or OpenAI file, directory or glob.", show_default=False)],
    target: Annotated[str, typer.Argument(help="MLLM file to write, .json or .jsonl.", show_default=False)],
    media_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Put before the rows' media paths.")] = None,
    format: DataFormat = "auto",
    missing: Annotated[str, typer.Option(help="Rows whose media are not there: skip, keep or fail.")] = "skip",
) -> int:
    """Rewrite a data file as MLLM JSON; text-only rows are kept, missing media counted and listed."""
    from polymodal.tools import data_convert as room

    one_of("--format", format, FORMATS)
    one_of("--missing", missing, ("skip", "keep", "fail"))
    print(room.convert(source, target, format=format, media_dir=media_dir, missing=missing))  # type: ignore[arg-type]
    return 0


@command(data_app, "polymodal data check train.json --media-dir images", name="check")
def check_data(
    paths: Annotated[list[str], typer.Argument(metavar="FILE", help="Data files, directories or globs.", show_default=False)],
    media_dir: MediaDir = None,
    format: DataFormat = "auto",
    limit: Annotated[int, typer.Option(help="Problems listed.")] = 20,
    as_json: AsJson = False,
) -> int:
    """Read every row and every media header; list what is broken, with its line. Needs no model."""
    from polymodal.tools import data_check as room

    one_of("--format", format, FORMATS)
    return room.main(paths, media_dir=media_dir, format=format, limit=limit, as_json=as_json)


@command(data_app, "polymodal data show recipe.yaml -o samples.html --samples 20")
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Page to write.")] = Path("samples.html"),
    samples: Annotated[int, typer.Option(min=1, help="Samples shown.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
) -> int:
    """Render samples as the model meets them: tokens, label mask, pictures; one HTML page."""
    from polymodal import recipe as recipes
    from polymodal.tools import preflight as checks

    return checks.show(recipes.load(recipe, overrides or []), out, samples, seed)


@command(recipe_app, "polymodal recipe schema > recipe.schema.json")
def schema() -> int:
    """The JSON schema of a recipe, for editors."""
    import json

    from polymodal import recipe as recipes

    print(json.dumps(recipes.json_schema(), indent=2))
    return 0


@command(recipe_app, "polymodal recipe show recipe.yaml train.steps=10", name="show")
def show_recipe(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """A recipe with its bases, overrides and defaults resolved."""
    from polymodal import recipe as recipes

    print(recipes.dump(recipes.load(recipe, overrides or [])), end="")
    return 0


@command(recipe_app, "polymodal recipe docs > docs/recipe.md")
def docs() -> int:
    """The reference page of every key, as Markdown."""
    from polymodal.recipe import reference

    print(reference.markdown(), end="")
    return 0
