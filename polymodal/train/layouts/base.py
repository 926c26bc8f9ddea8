"""Layout: what a family's batches are like, from measuring samples to the loss, as one object.

Trainer, `check` and `plan` know this interface only; every subclass has a file of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.core.user_code import load_object
from polymodal.data.loader import Loader, StepStats
from polymodal.data.schedule import Schedule
from polymodal.distributed.mesh import Mesh
from polymodal.models.family import Family
from polymodal.parallel.apply import COMPUTE_DTYPE
from polymodal.parallel.batches import BatchSharding
from polymodal.recipe import PREFERENCE, Data, Dataset, Grpo, Preference, Recipe

Section = Literal["datasets", "validation"]
Attempt = Callable[..., Any]
"""attempt(action) returns the result, or None when the action raises PolymodalError: `check` collects
errors."""
SOUND_FRAMES = 1000
"""Mel frames of a sound without data: ten seconds."""
OBJECTIVE = ("term", "parts", "aux_weight", "weights", "prepare", "loss", "validation")
"""Attributes of an objective that the trainer uses."""


@dataclass
class Feed:
    """A planned section of data. loader(dp_rank=, dp_size=, start=, stop_after=, workers=None, first=True)

    first: whether a pipeline stage is here that reads media (ParallelModel.first), which alone decodes them
    (all stages need those that diffusion targets are made of).
    """

    schedule: Schedule
    loader: Callable[..., Loader]


@dataclass(frozen=True)
class Workload:
    """A micro-batch for planning: `samples` samples of these lengths."""

    measure: SampleLengths
    samples: int = 1


@dataclass
class DataFacts:
    """What `check` reports of one section of data."""

    rows: int
    usable: int
    parts: list[dict[str, Any]]
    dropped: dict[str, dict[str, Any]]  # reason -> {"count", "first": the first rows}
    tokens: int  # of usable rows, each once
    trained: int
    media: dict[str, int]  # stream -> sum of its lengths
    longest: int
    histogram: list[tuple[int, int, int]]  # (from, to, rows)
    steps_per_epoch: int = 0
    packs: int = 0  # of the batches that were looked at
    fill: float = 0.0  # share of the packs' tokens that are samples
    looked_at: int = 0  # batches
    unit: str = "packs"  # what samples are joined in: packs, micro-batches
    batching: str = ""  # describes them, "4,096 tokens, 93% filled"
    max_length: int = 0  # of a sample that is used, in tokens; 0 without such a limit
    buckets: list[tuple[str, int]] = field(default_factory=list)  # (frames x height x width, rows)
    notes: list[str] = field(default_factory=list)


def histogram(tokens: Any, longest: int, bins: int = 10) -> list[tuple[int, int, int]]:
    """Rows by length in equal bins from 1 to `longest` tokens: (from, to, rows); longer rows in one more."""
    edges = np.unique(np.linspace(0, longest, bins + 1).round().astype(int))
    counts, _ = np.histogram(np.minimum(tokens, longest), edges + 0.5)
    out = [(int(a) + 1, int(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]
    above = int((np.asarray(tokens) > longest).sum())
    if above:
        first, last, count = out[-1]
        out[-1] = (first, last, count - above)
        out.append((longest + 1, int(np.max(tokens)), above))
    return out


class Layout(ABC):
    """One instance a run, made by `layout_of`. Making one opens no file and takes no memory."""

    objective_class: type
    """The objective where the recipe names none."""
    objectives: Mapping[str, type] = {}
    """Others that a recipe names without a module: dpo, kto, diffusion_dpo, grpo."""
    by_tokens = False  # whether micro-batches are filled up to a number of tokens

    def __init__(self, recipe: Recipe, family: Family):
        self.recipe, self.family = recipe, family
        self.actors: Any = None
        """Frozen models that the objective's `prepare` uses (train/actors.py), or None."""

    @cached_property
    def objective(self) -> Any:
        """The recipe's train.objective, or the layout's own. Raises PolymodalError for unfit settings."""
        chosen, reference = self.objective_class, self.recipe.train.objective
        if self.recipe.train.preference != Preference() and reference not in PREFERENCE:
            raise PolymodalError(
                "train.preference is for train.objective dpo, kto and diffusion_dpo.",
                "Set train.objective, or leave it out.",
            )
        asks = self.recipe.train.grpo != Grpo() or self.recipe.train.rewards
        if asks and not self.asks:
            raise PolymodalError(
                "train.grpo and train.rewards are for train.objective grpo.",
                "Set train.objective, or leave them out.",
            )
        if reference in self.objectives:
            chosen = self.objectives[reference]
        elif reference in (*PREFERENCE, "grpo"):
            does = "generate" if reference == "diffusion_dpo" else "answer in chats"
            own = [name for name in self.objectives if name in PREFERENCE]
            raise PolymodalError(
                f"train.objective = {reference} is for models that {does}, {self.family.card.name} is none.",
                f"Leave it out, or set {own[0]}." if own else "Leave it out.",
            )
        elif reference is not None:
            chosen = load_object(reference, "train.objective")
            missing = next((name for name in (*OBJECTIVE, "from_recipe") if not hasattr(chosen, name)), None)
            if missing is not None:
                raise PolymodalError(
                    f"train.objective = {reference} has no `{missing}`, which the trainer uses of an "
                    "objective.",
                    f"Derive it from {self.objective_class.__module__}.{self.objective_class.__name__}.",
                )
        return chosen.from_recipe(self.recipe, self.family)

    # ---------------------------------------------------------------- data

    @property
    def compares(self) -> bool:
        """Whether answers are compared: samples are then pairs or rankings."""
        return self.recipe.train.objective in PREFERENCE

    @property
    def asks(self) -> bool:
        """Whether the model learns from its own answers: samples are then prompts."""
        return self.recipe.train.objective == "grpo"

    @abstractmethod
    def feed(self, section: Section, rank: int) -> Feed:
        """Measure and plan a section of the recipe's data. Raises PolymodalError."""

    @abstractmethod
    def facts(
        self, section: Section, attempt: Attempt, progress: Any = None
    ) -> tuple[DataFacts | None, Schedule | None]:
        """`check`'s report of a section, and its plan; None for what is refused. progress(done, total)."""

    def processor(self) -> Any:
        """Makes tokens of a record, for `polymodal data show`. Raises PolymodalError without one."""
        raise NotImplementedError

    def without(self, batch: Batch, gone: Sequence[bool]) -> tuple[Batch, StepStats]:
        """(a micro-batch in which the samples that are `gone` have no weight, the counts that this lost).

        A sample that is broken already (batch.groups["broken"]) is not counted as lost. The result depends on
        the samples that are left alone, not on which of the `gone` ones this rank could read.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- ranks

    @property
    @abstractmethod
    def packs(self) -> bool:
        """Whether a micro-batch is one pack of samples: global_batch_size then counts packs."""

    @property
    def samples_per_micro_batch(self) -> int:
        """How many of the units of train.global_batch_size make a micro-batch."""
        return 1 if self.packs else self.recipe.train.micro_batch_size

    @abstractmethod
    def batch_sharding(self, mesh: Mesh) -> BatchSharding:
        """Shards the micro-batches of a step over the ranks that share them. Collective."""

    def same_samples_group(self, mesh: Mesh) -> dist.ProcessGroup | None:
        """Ranks that read the same samples and must agree on which are broken; None where none can be, or
        only one rank reads them. Collective."""
        if self.recipe.data.on_error == "fail" or mesh.sizes.dp == mesh.sizes.world:
            return None
        return mesh.same_samples_group

    # ---------------------------------------------------------------- training

    def start(self, device: torch.device, mesh: Mesh) -> None:
        """Build what data planning needs besides the model: frozen encoders. Collective."""
        return

    def sampler(self, model: Any, mesh: Mesh, device: torch.device) -> Any:
        """What samples while it trains (train/samples.py), or None. Raises PolymodalError."""
        return None

    # ---------------------------------------------------------------- planning

    @abstractmethod
    def workload(
        self, media: float, patches: int, sound: float = 0.25, frames: int = SOUND_FRAMES
    ) -> Workload:
        """The largest micro-batch that the recipe allows. media, sound: shares of tokens that stand for
        pictures of so many patches each, and for sounds of so many frames, where the model takes them and
        they are mixed. Raises PolymodalError for sizes that training refuses."""

    def example(self, load: Workload) -> Batch:
        """A micro-batch of such samples, without data. Raises PolymodalError where the family cannot tell."""
        try:
            return self.family.example(load.measure)
        except NotImplementedError:
            raise PolymodalError(
                f"{self.family.card.name} cannot be planned: its family has no example batch.",
                "`polymodal check` estimates the memory of every model.",
            ) from None

    def describe(self, load: Workload) -> str:
        """The contents of a micro-batch besides tokens, for `polymodal plan`."""
        raise NotImplementedError

    def resident_encoders(self, ranks: int) -> int:
        """Parameters of frozen encoders that are on a device during the passes of a step."""
        return 0

    # ---------------------------------------------------------------- for subclasses

    def datasets(self, section: Section) -> list[Dataset]:
        """The section's datasets. Raises PolymodalError when there are none, and no features either."""
        datasets = list(getattr(self.recipe.data, section))
        if not datasets and self.recipe.data.features is None:
            raise PolymodalError(
                f"The recipe has no data.{section}.",
                "Add at least one, e.g. data.datasets: [{path: train.json}].",
            )
        return datasets

    def section_data(self, section: Section, **changes: Any) -> Data:
        """The recipe's data keys for a section: validation keeps the order of its files."""
        if section == "validation":
            changes["shuffle"] = False
        return self.recipe.data.model_copy(update=changes) if changes else self.recipe.data

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen encoders and of the features that are stored."""
        return COMPUTE_DTYPE[self.recipe.train.precision] or torch.float32


def with_workers(data: Data, workers: int | None) -> Data:
    """Data keys with another number of workers; None: as they are."""
    return data if workers is None else data.model_copy(update={"workers": workers})


def shares(schedule: Schedule, parts: Sequence[Any]) -> list[dict[str, Any]]:
    """Each dataset's samples of an epoch, for DataFacts. parts: with weight and repeat."""
    return [
        {"name": s.name, "usable": s.usable, "draws": s.draws, "weight": p.weight, "repeat": p.repeat}
        for s, p in zip(schedule.shares, parts, strict=True)
    ]
