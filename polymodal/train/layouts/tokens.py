"""What the layouts `packed` and `padded` share: how samples of tokens are measured, planned and reported."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.data.index import Index, build_index
from polymodal.data.loader import Loader
from polymodal.data.schedule import Schedule
from polymodal.data.source import Corpus, open_corpus
from polymodal.models import agreement
from polymodal.objectives.language import LanguageObjective
from polymodal.recipe import Data, Dataset
from polymodal.train.layouts.base import (
    Attempt,
    DataFacts,
    Feed,
    Layout,
    Section,
    histogram,
    shares,
    with_workers,
)

LOOKED_AT = 200  # batches from which `check` counts how full micro-batches are


class TokenLayout(Layout):
    """Records become samples by a processor with the methods of data/chat.py's ChatProcessor."""

    objective_class = LanguageObjective

    @abstractmethod
    def loader(
        self, schedule: Schedule, corpus: Any, processor: Any, data: Data, first: bool, **options: Any
    ) -> Loader:
        """The loader of a rank; first: whether it decodes media."""

    @abstractmethod
    def filled(self, schedule: Schedule, packs: Sequence[Sequence[int]]) -> int:
        """Tokens that these micro-batches, lists of samples in the index, have room for."""

    @abstractmethod
    def batching(self, schedule: Schedule, facts: DataFacts) -> str:
        """How samples are joined, as `check` prints it; "" where each is a micro-batch."""

    def media_processor(self) -> Any:
        """The family's. Raises PolymodalError when the checkpoint's files do not belong together."""
        media = self.family.media_processor(self.recipe.data)
        agreement.require(media, self.family.config)
        return media

    def notes(self, corpus: Corpus, processor: Any) -> list[str]:
        """What `check` says of the records."""
        return []

    def warnings(self, corpus: Corpus, processor: Any) -> list[str]:
        """What `train` says of the records, and `check`."""
        return []

    def training_processor(self, section: Section) -> Any:
        """The processor of a section of data: training may change samples at random."""
        return self.processor()

    def schedule(self, index: Index, corpus: Any, data: Data) -> Schedule:
        return Schedule(index, corpus.parts, data, self.recipe.train, self.family.cost)

    @property
    def format(self) -> str | None:
        """The only format of rows that the objective learns from; None: every one."""
        return "preference" if self.compares else "prompt" if self.asks else None

    def datasets(self, section: Section) -> list[Dataset]:
        found = super().datasets(section)
        for number, dataset in enumerate(found):
            used = {
                "caption": dataset.caption,
                "caption_prefix": dataset.caption_prefix,
                "caption_suffix": dataset.caption_suffix,
                "generate": dataset.generate,
                "loss_weight": dataset.loss_weight != 1,
            }
            key = next((k for k, v in used.items() if v), None)
            if key is not None:
                raise PolymodalError(
                    f"data.{section}.{number}.{key} is for models that generate, "
                    f"{self.family.card.name} answers.",
                    "Leave it out.",
                )
            if self.format and dataset.format not in ("auto", self.format):
                rows = "compare answers" if self.compares else "ask"
                raise PolymodalError(
                    f"data.{section}.{number}.format = {dataset.format}, train.objective = "
                    f"{self.recipe.train.objective} learns from rows that {rows}.",
                    "Leave it out.",
                )
            if dataset.format in ("preference", "prompt") and not self.format:
                of = "dpo and kto" if dataset.format == "preference" else "grpo"
                raise PolymodalError(
                    f"data.{section}.{number}.format = {dataset.format} is for train.objective {of}.",
                    "Set train.objective, or leave it out.",
                )
        form = {"format": self.format} if self.format else {}
        return [dataset.model_copy(update=form) for dataset in found]

    def corpus(self, datasets: Sequence[Dataset], data: Data, key: str = "data.datasets") -> Corpus:
        """The records of a section."""
        return open_corpus(datasets, data.attr, key)

    def feed(self, section: Section, rank: int, once: bool = False) -> Feed:
        """once: every usable sample once an epoch, whatever the recipe's mix."""
        data = self.section_data(section, **({"shuffle": False} if once else {}))
        datasets, processor = self.datasets(section), self.training_processor(section)
        if once:
            datasets = [d.model_copy(update={"weight": None, "repeat": 1.0}) for d in datasets]
        corpus = self.corpus(datasets, data)
        index = build_index(corpus, processor, data, rank=rank)
        if rank == 0 and section == "datasets":
            for warning in self.warnings(corpus, processor):
                say(f"warning: {warning}", error=True)
        schedule = self.schedule(index, corpus, data)

        def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
            return self.loader(schedule, corpus, processor, with_workers(data, workers), first, **options)

        return Feed(schedule, loader)

    def facts(
        self, section: Section, attempt: Attempt, progress: Any = None
    ) -> tuple[DataFacts | None, Schedule | None]:
        data = self.section_data(section)
        datasets = attempt(lambda: self.datasets(section))
        if not datasets:
            return None, None
        corpus = attempt(lambda: self.corpus(datasets, data, f"data.{section}"))
        processor = attempt(self.processor)
        if corpus is None or processor is None:
            return None, None
        attempt(lambda: build_index(corpus, processor, data, progress=progress))  # what train would refuse
        overlong = "drop" if data.overlong == "error" else data.overlong
        lenient = data.model_copy(update={"on_error": "skip", "overlong": overlong})
        index = attempt(lambda: build_index(corpus, processor, lenient, progress=progress))
        if index is None:
            return None, None
        facts = _counts(index, len(corpus), data)
        facts.notes = self.notes(corpus, processor)
        schedule = attempt(lambda: self.schedule(index, corpus, data))
        if schedule is not None:
            facts.parts = shares(schedule, corpus.parts)
            self._add_batches(facts, schedule)
        return facts, schedule

    def _add_batches(self, facts: DataFacts, schedule: Schedule) -> None:
        """What the first batches of an epoch are like."""
        lengths = schedule.index.tokens
        tokens = room = 0
        for batch in itertools.islice(schedule.batches(epochs=1), LOOKED_AT):
            facts.looked_at += 1
            facts.packs += len(batch.packs)
            tokens += int(sum(lengths[list(pack)].sum() for pack in batch.packs))
            room += self.filled(schedule, batch.packs)
        facts.steps_per_epoch = schedule.steps_in_epoch(0)
        facts.fill = tokens / room if room else 0.0
        facts.unit = "packs" if self.packs else "micro-batches"
        facts.batching = self.batching(schedule, facts)


def _counts(index: Index, rows: int, data: Data) -> DataFacts:
    """Records, tokens and media of an index, and what was dropped of it."""
    usable = index.usable
    broken = {problem.row for problem in index.problems}
    known = [i for i in range(len(index)) if i not in broken] if broken else slice(None)
    return DataFacts(
        rows=rows,
        usable=int(usable.sum()),
        parts=[],
        dropped={
            reason: {"count": len(places), "first": places[:3]} for reason, places in index.dropped.items()
        },
        tokens=int(index.tokens[usable].sum(dtype="int64")),
        trained=int(index.trained[usable].sum(dtype="int64")),
        media={name: int(column[usable].sum(dtype="int64")) for name, column in index.media.items()},
        longest=int(index.tokens.max()) if len(index) else 0,
        histogram=histogram(index.tokens[known], data.max_length),
        max_length=data.max_length,
    )
