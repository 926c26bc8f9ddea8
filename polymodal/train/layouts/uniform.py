"""The uniform layout: pictures and clips to be generated, every micro-batch of samples of one shape.

Features that were encoded before (data.encode: cached), or frames that are encoded on the device (online), in
buckets; diffusion objectives; sampling while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, Record, SampleLengths
from polymodal.data import latents
from polymodal.data.clips import Clips
from polymodal.data.features import Features
from polymodal.data.freshness import Comparison
from polymodal.data.index import build_index
from polymodal.data.loader import Loader, StepStats
from polymodal.data.media_pairs import PairClips
from polymodal.data.schedule import Schedule
from polymodal.data.source import open_corpus
from polymodal.distributed.mesh import Mesh
from polymodal.models import pipeline_index, pipelines
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.objectives.diffusion_preference import DiffusionPreference
from polymodal.objectives.preference import needs_copy
from polymodal.parallel.batches import BatchSharding
from polymodal.recipe import PREFERENCE, Data, Dataset, Recipe
from polymodal.train import prior
from polymodal.train.layouts.base import (
    SOUND_FRAMES,
    Attempt,
    DataFacts,
    Feed,
    Layout,
    Section,
    Workload,
    histogram,
    with_workers,
)

PER_SAMPLE = ("seeds", "tokens")
"""Groups of a batch that have an entry a sample."""


class Uniform(Layout):
    """micro_batch_size samples of one shape (frames, height, width), joined along the batch dimension."""

    objective_class = DiffusionObjective
    objectives = {"diffusion_dpo": DiffusionPreference}
    family: Any
    """A models.diffusion.Generation."""

    def start(self, device: torch.device, mesh: Mesh) -> None:
        """The frozen encoders, when they are needed while training; and the empty caption, for guidance."""
        data = self.recipe.data
        if data.encode == "online":
            from polymodal.train.actors import Encoders

            prior.draw(self.recipe, self.family, device)
            self.actors = Encoders(self.family, self.dtype, device, data.encoders, mesh)
            if self.recipe.train.diffusion.drop:
                with self.actors.on_device():
                    self.objective.unconditional = {n: t.cpu() for n, t in self.actors.text([""]).items()}
        elif data.encoders != "replicate":
            raise PolymodalError(
                f"data.encoders = {data.encoders}: training from features holds no encoders.",
                "Leave it out, or set data.encode to online.",
            )

    def sampler(self, model: Any, mesh: Mesh, device: torch.device) -> Any:
        if not self.recipe.evaluate.samples.prompts:
            return None
        from polymodal.train.samples import Sampler

        return Sampler(self.recipe, self.family, model, mesh, device, self.dtype, self.actors)

    def processor(self) -> Any:
        raise PolymodalError(
            f"{self.family.card.name} generates: it is trained on pictures and clips, not on tokens.",
            "`polymodal data check` looks at every row and file, `polymodal check` counts sizes and lengths.",
        )

    # ---------------------------------------------------------------- data

    def feed(self, section: Section, rank: int) -> Feed:
        return self._online(section, rank) if self.recipe.data.encode == "online" else self._cached(section)

    def _cached(self, section: Section) -> Feed:
        recipe, family = self.recipe, self.family
        weights = [(d.weight, d.repeat) for d in self.datasets(section)]
        directory = features_directory(recipe, section)
        names = [n for n in (*family.text, *family.media) if n in family.documented]
        settings = feature_settings(recipe, family)
        features = Features(
            directory,
            family.documented,
            family.grid(),
            settings,
            weights,
            names,
            pairs=self.compares,
            min_gap=recipe.train.preference.min_gap,
        )
        self._compare(features, section)
        if section == "datasets" and recipe.train.diffusion.drop:
            self.objective.unconditional = features.empty()
            if not self.objective.unconditional:
                raise PolymodalError(
                    f"{directory} has no empty caption's embedding, which train.diffusion.drop = "
                    f"{recipe.train.diffusion.drop} needs.",
                    "Set train.diffusion.drop to 0, or encode the data with `polymodal encode`.",
                )
        data = self.section_data(section)
        schedule = Schedule(features, features.parts, data, recipe.train, self._cost)
        make = latents.FeatureCollator(features, recipe.train.seed, family.text, self._loss_weights(section))
        return _feed(schedule, features, None, data, make)

    def _compare(self, features: Features, section: Section) -> None:
        """Refuse features that are older than the section's data; each rank sees its share. Collective."""
        recipe, family = self.recipe, self.family
        datasets = captioned(getattr(recipe.data, section), recipe)
        if features.manifest is None or not datasets:
            return
        clips = clips_of(recipe, family)
        otherwise = f"leave data.{section} out, to learn from the features in data.features as they are."
        try:
            corpus = open_corpus(datasets, recipe.data.attr, f"data.{section}")
        except PolymodalError as error:
            raise PolymodalError(error.message, f"{error.hint} Or {otherwise}".strip()) from None

        def usable(record: Record) -> bool:
            (measured,) = clips.measure([record])
            return not isinstance(measured, str) and measured.tokens > 0

        comparison = Comparison(features, corpus, family.given, usable)
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        shares: list[Any] = [comparison.differing(range(rank, comparison.numbers, world))] * world
        if distributed:
            dist.all_gather_object(shares, shares[rank])
        records, rows = (sorted(number for share in shares for number in share[k]) for k in (0, 1))
        if records or rows:
            if other := comparison.report(records, rows):
                raise PolymodalError(
                    f"The features in {features.directory} are not of the present data.{section}: {other}.",
                    "Run `polymodal encode` with this recipe again: it makes what is missing. Or "
                    f"{otherwise}",
                )

    def _online(self, section: Section, rank: int) -> Feed:
        recipe, family = self.recipe, self.family
        data = self.section_data(section, max_length=1 << 30, overlong="drop")
        clips = clips_of(recipe, family)
        prior.require(recipe, section)
        corpus = open_corpus(captioned(self.datasets(section), recipe), data.attr)
        index: Any = build_index(corpus, clips, data, rank=rank)
        _, bucket = np.unique(index.shapes(), axis=0, return_inverse=True)
        index.bucket = bucket.reshape(-1).astype(np.int32)
        schedule = Schedule(index, corpus.parts, data, recipe.train, self._cost)
        make = latents.ClipCollator(corpus, clips, data, recipe.train.seed, self._loss_weights(section))
        return _feed(schedule, corpus, clips, data, make)

    @property
    def members(self) -> int:
        """Items of a sample: 2 where it is a pair."""
        return 2 if self.compares else 1

    def _cost(self, measure: SampleLengths) -> float:
        return self.members * self.family.cost(measure)

    def _loss_weights(self, section: Section) -> tuple[float, ...]:
        """Of each dataset; () where all are 1."""
        weights = tuple(d.loss_weight for d in getattr(self.recipe.data, section))
        return weights if any(weight != 1 for weight in weights) else ()

    def facts(
        self, section: Section, attempt: Attempt, progress: Any = None
    ) -> tuple[DataFacts | None, Schedule | None]:
        feed = attempt(lambda: self.feed(section, 0))
        if feed is None:
            return None, None
        schedule, index = feed.schedule, feed.schedule.index
        usable, tokens = np.asarray(index.usable), np.asarray(index.tokens)
        longest, total = int(tokens.max()) if len(tokens) else 0, int(tokens[usable].sum(dtype="int64"))
        shapes = index.shapes() if callable(index.shapes) else index.shapes
        buckets, counts = np.unique(shapes[usable], axis=0, return_counts=True)
        facts = DataFacts(
            rows=len(usable),
            usable=int(usable.sum()),
            parts=[
                {"name": s.name, "usable": s.usable, "draws": s.draws, "weight": None, "repeat": 1.0}
                for s in schedule.shares
            ],
            dropped={},
            tokens=total,
            trained=total,
            media={},
            longest=longest,
            histogram=histogram(tokens[usable], longest or 1),
            steps_per_epoch=schedule.steps_in_epoch(0),
            buckets=[("x".join(map(str, shape)), int(n)) for shape, n in zip(buckets, counts, strict=True)],
        )
        return facts, schedule

    def without(self, batch: Batch, gone: Sequence[bool]) -> tuple[Batch, StepStats]:
        return latents.without(batch, gone, self.family.grid().side)

    @property
    def packs(self) -> bool:
        return False

    def batch_sharding(self, mesh: Mesh) -> BatchSharding:
        return BatchSharding(mesh)

    # ---------------------------------------------------------------- planning

    def workload(
        self, media: float, patches: int, sound: float = 0.0, frames: int = SOUND_FRAMES
    ) -> Workload:
        """micro_batch_size samples of the largest shape of data.clip; there is no text to share with."""
        clip, grid = self.recipe.data.clip, self.family.grid()
        Clips(clip, grid)
        count = 1 if grid.still else max(clip.frames)
        side = int(clip.pixels**0.5) // grid.side * grid.side
        height, width = max(clip.sizes, key=lambda s: s[0] * s[1], default=(side, side))
        tokens = grid.tokens(count, height, width)
        return Workload(
            SampleLengths(tokens, tokens, shape=(count, height, width)),
            self.recipe.train.micro_batch_size * self.members,
        )

    def example(self, load: Workload) -> Batch:
        one, n = super().example(load), load.samples
        if n == 1:
            return one
        tensors = {name: t.repeat(n, *[1] * (t.ndim - 1)) for name, t in one.tensors.items()}
        groups = {
            name: value * n if isinstance(value, tuple) and name in PER_SAMPLE else value
            for name, value in one.groups.items()
        }
        return replace(one, tensors=tensors, samples=tuple(range(n)), groups=groups)

    def describe(self, load: Workload) -> str:
        return f"{load.samples} x {' x '.join(map(str, load.measure.shape))} (frames, height, width)"

    def resident_encoders(self, ranks: int) -> int:
        data, total = self.recipe.data, 0
        if needs_copy(self.recipe):  # a frozen reference, sharded as the model is
            count = sum(parameter.numel() for parameter in self.family.build().parameters())
            total += -(-count // (ranks * self.recipe.parallel.tp))
        if data.encode != "online" or data.encoders == "offload":
            return total
        libraries = pipeline_index.models_of(self.family.source)
        for name, count in pipelines.sizes(self.family.source, self.family.encoders()).items():
            sharded = data.encoders == "shard" and libraries.get(name, ("", ""))[0] == "transformers"
            total += -(-count // ranks) if sharded else count
        return total


def _feed(schedule: Schedule, corpus: Any, clips: Any, data: Data, make: Any) -> Feed:
    def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
        return Loader(schedule, corpus, clips, with_workers(data, workers), make=make, **options)

    return Feed(schedule, loader)


# ---- features ------------------------------------------------------------------------------------


def captioned(datasets: Sequence[Dataset], recipe: Recipe) -> list[Dataset]:
    """Datasets of a model that generates: records of a medium and its caption, or of two media of one
    caption that are compared, whatever other columns."""
    format = "preference" if recipe.train.objective in PREFERENCE else "caption"
    return [d.model_copy(update={"format": format}) if d.format == "auto" else d for d in datasets]


def clips_of(recipe: Recipe, family: Any) -> Clips:
    """What measures and decodes the records. Raises PolymodalError for sizes that the latents do not
    divide."""
    about = recipe.data.clip, family.grid(), family.given, family.needed
    if recipe.train.objective in PREFERENCE:
        return PairClips(*about, min_gap=recipe.train.preference.min_gap)
    return Clips(*about)


def features_directory(recipe: Recipe, section: Section = "datasets") -> Path:
    """A section's directory of features: data.features or <run>/features, with validation inside."""
    root = Path(recipe.data.features).expanduser() if recipe.data.features else recipe.run_dir / "features"
    return root if section == "datasets" else root / "validation"


def feature_settings(recipe: Recipe, family: Any) -> dict[str, Any]:
    """What features depend on besides the data; training compares it with the manifest's."""
    grid = family.grid()
    clip = recipe.data.clip.model_dump(mode="json")
    if "sound" not in family.given:
        del clip["sound"]
    return {
        **{f"data.clip.{k}": v for k, v in clip.items()},
        "latents": [grid.channels, grid.time, grid.space],
        "tensors": sorted([*family.text, *family.media]),
        **{name: pipeline_index.fingerprint(family.source, name) for name in family.encoders()},
    }
