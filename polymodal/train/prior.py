"""Pictures that the untrained model draws, once, for datasets with `generate`: DreamBooth's class pictures.

A model that learns a subject keeps its class by training, beside the subject, on what it drew of the class
before (Ruiz et al. 2022, arXiv:2208.12242).
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.data.captions import Folder
from polymodal.data.clips import Clips
from polymodal.data.features import differences, write_json
from polymodal.recipe import Dataset, Recipe
from polymodal.train.layouts.base import Section

DRAWN = "made"
"""Directory of the drawn pictures inside the dataset's."""
SETTINGS = "made.json"
BATCH = 4


def missing(dataset: Dataset) -> list[int]:
    """Numbers of the pictures that are still to be drawn; pictures of the user's own count first."""
    root = Path(dataset.path).expanduser()
    own = [f for f in Folder(str(root)).files if not f.startswith(DRAWN + os.sep)] if root.is_dir() else []
    return [i for i in range(dataset.generate - len(own)) if not (root / DRAWN / f"{i:04d}.png").is_file()]


def require(recipe: Recipe, section: Section) -> None:
    """Raise PolymodalError for a directory whose pictures are not drawn yet."""
    for number, dataset in enumerate(getattr(recipe.data, section)):
        if lacking := len(missing(dataset)):
            raise PolymodalError(
                f"data.{section}.{number}.path = {dataset.path} lacks {lacking} of the {dataset.generate} "
                "pictures of `generate`.",
                "`polymodal encode` and `polymodal train` draw them before anything else.",
            )


def draw(recipe: Recipe, family: Any, device: torch.device) -> None:
    """Draw what the datasets lack, shared out over ranks that each hold the whole pipeline. Collective.

    Raises PolymodalError for datasets that cannot be drawn.
    """
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    generator: Any = None
    for section in ("datasets", "validation"):
        for number, dataset in enumerate(getattr(recipe.data, section)):
            if not dataset.generate:
                continue
            _check(recipe, family, dataset, f"data.{section}.{number}")
            own = missing(dataset)[rank::world]
            _check_drawn(recipe, dataset, f"data.{section}.{number}")
            if distributed:
                dist.barrier()  # all have looked before any writes
            if own and generator is None:
                from polymodal.generate.pipeline import open_generator

                generator = open_generator(recipe.model.source, revision=recipe.model.revision, device=device)
            if own:
                _draw(recipe, family, dataset, own, generator)
    del generator
    if distributed:
        dist.barrier()


def _check(recipe: Recipe, family: Any, dataset: Dataset, key: str) -> None:
    root = Path(dataset.path).expanduser()
    if dataset.caption is None:
        raise PolymodalError(f"{key}.generate needs a caption to draw from.", f"Set {key}.caption.")
    if root.exists() and not root.is_dir():
        raise PolymodalError(
            f"{key}.generate: {dataset.path} is a file.", "Name a directory; it may be missing yet."
        )
    if not family.grid().still:
        raise PolymodalError(
            f"{key}.generate draws pictures, {family.card.name} makes clips.", "Give clips of the class."
        )
    if recipe.model.init == "random":
        raise PolymodalError(
            f"{key}.generate: a model of random weights (model.init) has nothing to draw.",
            "Give pictures, or a trained model.source.",
        )


def _settings(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What drawn pictures depend on."""
    return {"caption": dataset.caption, "model": recipe.model.source, "seed": recipe.train.seed}


def _check_drawn(recipe: Recipe, dataset: Dataset, key: str) -> None:
    """Refuse pictures that were drawn from another caption, model or seed."""
    file = Path(dataset.path).expanduser() / DRAWN / SETTINGS
    if not file.is_file():
        return
    if other := differences(json.loads(file.read_text(encoding="utf-8")), _settings(recipe, dataset)):
        raise PolymodalError(
            f"{key}.path: the pictures in {file.parent} were drawn otherwise: {'; '.join(other)}.",
            "Remove that directory to draw them anew, or set these keys as they were.",
        )


def _draw(recipe: Recipe, family: Any, dataset: Dataset, numbers: list[int], generator: Any) -> None:
    from polymodal.generate.media import save
    from polymodal.generate.pipeline import Prompt, Settings, suspicion

    folder = Path(dataset.path).expanduser() / DRAWN
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, _settings(recipe, dataset))
    sizes = Clips(recipe.data.clip, family.grid()).sizes
    height, width = min(sizes, key=lambda size: abs(math.log(size[0] / size[1])))  # the most square
    for at in range(0, len(numbers), BATCH):
        group = numbers[at : at + BATCH]
        prompts = [Prompt(str(dataset.caption), seed=recipe.train.seed * 1_000_003 + i) for i in group]
        pictures = generator.sample(prompts, Settings(height=height, width=width))
        for number, frames in zip(group, pictures, strict=True):
            if wrong := suspicion(frames):
                raise PolymodalError(
                    f"A picture of `{dataset.caption}` that {recipe.model.source} drew {wrong}.",
                    "Give pictures of the class in place of generate.",
                )
            save(folder, number, frames, 1.0)
