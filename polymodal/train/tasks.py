"""What a family's layout means for training: its objective, its data and how batches of it are made.

`packed` is language: chats, lengths, next-token loss. `uniform` is generation: features or clips, buckets, diffusion.
The trainer asks here and knows neither. Sees every room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from polymodal.core.errors import PolymodalError
from polymodal.data.chat import ChatProcessor
from polymodal.data.clips import Clips
from polymodal.data.features import Features
from polymodal.data.index import build_index
from polymodal.data.latents import ClipCollator, FeatureCollator
from polymodal.data.loader import Loader
from polymodal.data.schedule import Schedule
from polymodal.data.source import open_corpus
from polymodal.distributed.mesh import Mesh
from polymodal.models.family import Family
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.objectives.language import LanguageObjective
from polymodal.parallel.apply import COMPUTE_DTYPE
from polymodal.recipe import Data, Dataset, Recipe
from polymodal.train import prior

Section = Literal["datasets", "validation"]


@dataclass
class Feed:
    """A section of data, planned. loader(dp_rank=, dp_size=, start=, stop_after=, workers=None, first=True) opens it.

    first: whether the first stage of a pipeline is here, which alone looks at pictures; targets of diffusion are
    made of them, and so needed on all.
    """

    schedule: Schedule
    loader: Callable[..., Loader]


class Language:
    """Chats and plain text, packed."""

    def __init__(self, recipe: Recipe, family: Family):
        self.recipe, self.family = recipe, family
        self.objective = LanguageObjective(recipe.train.loss, **family.balance(recipe.train.router_aux_loss))
        self.actors: Any = None

    def start(self, device: torch.device, mesh: Mesh) -> None:
        """Nothing besides the model."""

    def sampler(self, model: Any, mesh: Any, device: torch.device) -> Any:
        """Nothing is drawn while it trains."""
        return None

    def feed(self, section: Section, rank: int) -> Feed:
        """Index and plan a section. Raises PolymodalError."""
        recipe = self.recipe
        for number, dataset in enumerate(getattr(recipe.data, section)):
            used = {
                "caption": dataset.caption,
                "generate": dataset.generate,
                "loss_weight": dataset.loss_weight != 1,
            }
            key = next((k for k, v in used.items() if v), None)
            if key is not None:
                raise PolymodalError(
                    f"data.{section}.{number}.{key} is for models that generate, {self.family.card.name} answers.",
                    "Leave it out.",
                )
        data = _section_data(recipe, section)
        chat = ChatProcessor(self.family.media_processor(recipe.data), recipe.data)
        corpus = open_corpus(_datasets(recipe, section), data.attr)
        index = build_index(corpus, chat, data, rank=rank)
        schedule = Schedule(index, corpus.parts, data, recipe.train, self.family.cost)

        def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
            plain = {"rows": chat.media.rows, "pixels": first, **options}
            return Loader(schedule, corpus, chat, _workers(data, workers), **plain)

        return Feed(schedule, loader)


class Diffusion:
    """Pictures and clips with captions, in buckets: encoded before (data.encode: cached), or on the device (online)."""

    def __init__(self, recipe: Recipe, family: Any):
        self.recipe, self.family = recipe, family
        self.objective = DiffusionObjective(family.process(), recipe.train.diffusion)
        self.actors: Any = None

    def start(self, device: torch.device, mesh: Mesh) -> None:
        """The frozen encoders, when they are needed while training; and the empty caption, for guidance."""
        if self.recipe.data.encode == "online":
            from polymodal.train.actors import Encoders

            prior.make(self.recipe, self.family, device)
            self.actors = Encoders(
                self.family, dtype_of(self.recipe), device, self.recipe.data.encoders, mesh
            )
            if self.recipe.train.diffusion.drop:
                with self.actors.at_hand():
                    self.objective.unconditional = {n: t.cpu() for n, t in self.actors.text([""]).items()}
        elif self.recipe.data.encoders != "replicate":
            raise PolymodalError(
                f"data.encoders = {self.recipe.data.encoders}: training from features holds no encoders.",
                "Leave it out, or set data.encode to online.",
            )

    def sampler(self, model: Any, mesh: Any, device: torch.device) -> Any:
        """What samples evaluate.samples.prompts; None without prompts. Raises PolymodalError."""
        if not self.recipe.evaluate.samples.prompts:
            return None
        from polymodal.train.samples import Sampler

        return Sampler(self.recipe, self.family, model, mesh, device, dtype_of(self.recipe), self.actors)

    def feed(self, section: Section, rank: int) -> Feed:
        """Plan a section of features, or measure and plan one of clips. Raises PolymodalError."""
        return self._online(section, rank) if self.recipe.data.encode == "online" else self._cached(section)

    def _cached(self, section: Section) -> Feed:
        recipe, family = self.recipe, self.family
        shares = [(d.weight, d.repeat) for d in _datasets(recipe, section)]
        directory = features_directory(recipe, section)
        wanted = [n for n in (*family.text, *family.media) if n in family.documented]
        features = Features(
            directory, family.documented, family.grid(), wanted_settings(recipe, family), shares, wanted
        )
        if section == "datasets" and recipe.train.diffusion.drop:
            self.objective.unconditional = features.empty()
            if not self.objective.unconditional:
                raise PolymodalError(
                    f"{directory} has no empty caption's embedding, which train.diffusion.drop = {recipe.train.diffusion.drop} needs.",
                    "Set train.diffusion.drop to 0, or encode the data with `polymodal encode`.",
                )
        data = _section_data(recipe, section)
        schedule = Schedule(features, features.parts, data, recipe.train, family.cost)
        make = FeatureCollator(features, recipe.train.seed, family.text, _factors(recipe, section))

        def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
            return Loader(schedule, features, None, _workers(data, workers), make=make, **options)

        return Feed(schedule, loader)

    def _online(self, section: Section, rank: int) -> Feed:
        recipe, family = self.recipe, self.family
        data = _section_data(recipe, section).model_copy(update={"max_length": 1 << 30, "overlong": "drop"})
        clips = Clips(data.clip, family.grid(), family.given, family.needed)
        prior.require(recipe, section)
        corpus = open_corpus(captioned(_datasets(recipe, section)), data.attr)
        index: Any = build_index(corpus, clips, data, rank=rank)
        _, bucket = _buckets(index.shapes())
        index.bucket = bucket
        schedule = Schedule(index, corpus.parts, data, recipe.train, family.cost)
        make = ClipCollator(corpus, clips, data, recipe.train.seed, _factors(recipe, section))

        def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
            return Loader(schedule, corpus, clips, _workers(data, workers), make=make, **options)

        return Feed(schedule, loader)


TASKS: dict[str, Any] = {"packed": Language, "uniform": Diffusion}


def task_of(recipe: Recipe, family: Family) -> Any:
    """The task of a family, by its layout."""
    return TASKS[family.layout](recipe, family)


def _buckets(shapes: Any) -> Any:
    import numpy as np

    buckets, which = np.unique(shapes, axis=0, return_inverse=True)
    return buckets, which.reshape(-1).astype(np.int32)


def _datasets(recipe: Recipe, section: Section) -> list[Dataset]:
    found = list(getattr(recipe.data, section))
    if not found and recipe.data.features is None:
        raise PolymodalError(
            f"The recipe has no data.{section}.",
            "Add at least one, e.g. data.datasets: [{path: train.json}].",
        )
    return found


def captioned(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Datasets of a model that generates: rows of a medium and its caption, whatever else their columns look like."""
    return [d.model_copy(update={"format": "caption"}) if d.format == "auto" else d for d in datasets]


def _factors(recipe: Recipe, section: Section) -> tuple[float, ...]:
    """Factor of each dataset's loss; () where all are 1."""
    found = tuple(d.loss_weight for d in getattr(recipe.data, section))
    return found if any(f != 1 for f in found) else ()


def _section_data(recipe: Recipe, section: Section) -> Data:
    return recipe.data if section == "datasets" else recipe.data.model_copy(update={"shuffle": False})


def _workers(data: Data, workers: int | None) -> Data:
    return data if workers is None else data.model_copy(update={"workers": workers})


# ---- features -------------------------------------------------------------------------------------------------------


def dtype_of(recipe: Recipe) -> torch.dtype:
    """What encoders compute in and features are stored in."""
    return COMPUTE_DTYPE[recipe.train.precision] or torch.float32


def features_directory(recipe: Recipe, section: Section = "datasets") -> Any:
    """Where a section's features lie: data.features, or <run>/features; validation in a directory inside."""
    from pathlib import Path

    root = Path(recipe.data.features).expanduser() if recipe.data.features else recipe.run_dir / "features"
    return root if section == "datasets" else root / "validation"


def wanted_settings(recipe: Recipe, family: Any) -> dict[str, Any]:
    """What features depend on besides the data: the manifest holds it, training compares it."""
    from polymodal.models import pipelines

    grid = family.grid()
    clip = recipe.data.clip.model_dump(mode="json")
    if "sound" not in family.given:
        del clip["sound"]
    return {
        **{f"data.clip.{k}": v for k, v in clip.items()},
        "latents": [grid.channels, grid.time, grid.space],
        "tensors": sorted([*family.text, *family.media]),
        **{name: pipelines.fingerprint(family.source, name) for name in family.encoders()},
    }
