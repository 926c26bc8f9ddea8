"""Pictures that the untrained model draws itself, for datasets with `generate`: DreamBooth's class pictures, made once.

Sees generate and the data room's names. Ruiz et al. 2022 (arXiv:2208.12242): a model that learns a subject keeps its
class by learning, beside the subject, what it drew of the class before.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.data.captions import Folder
from polymodal.data.clips import Clips
from polymodal.data.features import differences, write_json
from polymodal.recipe import Dataset, Recipe

MADE = "made"
"""Directory of drawn pictures inside the dataset's."""
ABOUT = "made.json"
BATCH = 4


def lacking(dataset: Dataset) -> list[int]:
    """Numbers of the drawn pictures that a dataset's directory lacks; its own pictures count first."""
    root = Path(dataset.path).expanduser()
    own = [f for f in Folder(str(root)).files if not f.startswith(MADE + os.sep)] if root.is_dir() else []
    return [i for i in range(dataset.generate - len(own)) if not (root / MADE / f"{i:04d}.png").is_file()]


def require(recipe: Recipe, section: Literal["datasets", "validation"]) -> None:
    """Raise PolymodalError for a directory whose pictures are not drawn yet."""
    for number, dataset in enumerate(getattr(recipe.data, section)):
        missing = len(lacking(dataset))
        if missing:
            raise PolymodalError(
                f"data.{section}.{number}.path = {dataset.path} lacks {missing} of the {dataset.generate} pictures of `generate`.",
                "`polymodal encode` and `polymodal train` draw them before anything else.",
            )


def make(recipe: Recipe, family: Any, device: torch.device) -> int:
    """Draw what the datasets lack, shared out over the ranks; returns how many this rank drew. Collective.

    Each rank holds the whole pipeline meanwhile. Raises PolymodalError for datasets that cannot be drawn.
    """
    joined = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    generator: Any = None
    drawn = 0
    for section in ("datasets", "validation"):
        for number, dataset in enumerate(getattr(recipe.data, section)):
            if not dataset.generate:
                continue
            _check(recipe, family, dataset, f"data.{section}.{number}")
            mine = lacking(dataset)[rank::world]
            _belong(recipe, dataset, f"data.{section}.{number}")
            if joined:
                dist.barrier()  # all have looked before any writes
            if mine and generator is None:
                from polymodal.generate.pipeline import open_generator

                generator = open_generator(recipe.model.source, revision=recipe.model.revision, device=device)
            _draw(recipe, family, dataset, mine, generator)
            drawn += len(mine)
    del generator
    if joined:
        dist.barrier()
    return drawn


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


def _about(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """What drawn pictures depend on."""
    return {"caption": dataset.caption, "model": recipe.model.source, "seed": recipe.train.seed}


def _belong(recipe: Recipe, dataset: Dataset, key: str) -> None:
    """Refuse pictures that were drawn from another caption or model."""
    file = Path(dataset.path).expanduser() / MADE / ABOUT
    if not file.is_file():
        return
    other = differences(json.loads(file.read_text(encoding="utf-8")), _about(recipe, dataset))
    if other:
        raise PolymodalError(
            f"{key}.path: the pictures in {file.parent} were drawn otherwise: {'; '.join(other)}.",
            "Remove that directory to draw them anew, or set these keys as they were.",
        )


def _draw(recipe: Recipe, family: Any, dataset: Dataset, numbers: list[int], generator: Any) -> None:
    from polymodal.generate.media import save
    from polymodal.generate.pipeline import Prompt, Settings, suspicion

    if not numbers:
        return
    folder = Path(dataset.path).expanduser() / MADE
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ABOUT, _about(recipe, dataset))
    height, width = min(
        Clips(recipe.data.clip, family.grid()).sizes, key=lambda s: abs(math.log(s[0] / s[1]))
    )
    for at in range(0, len(numbers), BATCH):
        group = numbers[at : at + BATCH]
        prompts = [Prompt(str(dataset.caption), seed=recipe.train.seed * 1_000_003 + i) for i in group]
        made = generator.sample(prompts, Settings(height=height, width=width))
        for number, frames in zip(group, made, strict=True):
            wrong = suspicion(frames)
            if wrong is not None:
                raise PolymodalError(
                    f"A picture of `{dataset.caption}` that {recipe.model.source} drew {wrong}.",
                    "Give pictures of the class in place of generate.",
                )
            save(folder, number, frames, 1.0)
