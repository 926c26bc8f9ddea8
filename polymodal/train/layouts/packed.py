"""The packed layout: chats and plain text, samples one after the other in a sequence [1, T] without padding.

Next-token loss, media inside the text, sequences cut over context-parallel ranks. Sees every floor below train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polymodal.core import sample
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.data.chat import ChatProcessor
from polymodal.data.index import build_index
from polymodal.data.loader import Loader, StepStats
from polymodal.data.schedule import Schedule
from polymodal.data.source import open_corpus
from polymodal.distributed.mesh import Mesh
from polymodal.objectives.language import LanguageObjective
from polymodal.parallel.batches import BatchSharding, PackedBatchSharding
from polymodal.train.layouts.base import (
    Attempt,
    DataFacts,
    Feed,
    Layout,
    Section,
    Workload,
    histogram,
    shares,
    with_workers,
)

LOOKED_AT = 200  # batches that the filling of packs is told from


class Packed(Layout):
    """Samples of a micro-batch in one sequence of up to data.pack_length tokens; with data.pack false, micro_batch_size
    samples in one sequence."""

    objective_class = LanguageObjective

    def processor(self) -> ChatProcessor:
        return ChatProcessor(self.family.media_processor(self.recipe.data), self.recipe.data)

    def datasets(self, section: Section) -> list[Any]:
        found = super().datasets(section)
        for number, dataset in enumerate(found):
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
        return found

    def feed(self, section: Section, rank: int) -> Feed:
        recipe, data = self.recipe, self.section_data(section)
        datasets, chat = self.datasets(section), self.processor()
        corpus = open_corpus(datasets, data.attr)
        index = build_index(corpus, chat, data, rank=rank)
        schedule = Schedule(index, corpus.parts, data, recipe.train, self.family.cost)

        def loader(workers: int | None = None, first: bool = True, **options: Any) -> Loader:
            plain = {"rows": chat.media.rows, "pixels": first, **options}
            return Loader(schedule, corpus, chat, with_workers(data, workers), **plain)

        return Feed(schedule, loader)

    def facts(
        self, section: Section, attempt: Attempt, progress: Any = None
    ) -> tuple[DataFacts | None, Schedule | None]:
        recipe = self.recipe
        datasets = attempt(lambda: self.datasets(section))
        if not datasets:
            return None, None
        corpus = attempt(lambda: open_corpus(datasets, recipe.data.attr, f"data.{section}"))
        chat = attempt(self.processor)
        if corpus is None or chat is None:
            return None, None
        attempt(lambda: build_index(corpus, chat, recipe.data, progress=progress))  # what train would refuse
        overlong = "drop" if recipe.data.overlong == "error" else recipe.data.overlong
        lenient = recipe.data.model_copy(update={"on_error": "skip", "overlong": overlong})
        index = attempt(lambda: build_index(corpus, chat, lenient, progress=progress))
        if index is None:
            return None, None
        usable = index.usable
        broken = {problem.row for problem in index.problems}
        known = [i for i in range(len(index)) if i not in broken] if broken else slice(None)
        facts = DataFacts(
            rows=len(corpus),
            usable=int(usable.sum()),
            parts=[],
            dropped={
                reason: {"count": len(places), "first": places[:3]}
                for reason, places in index.dropped.items()
            },
            tokens=int(index.tokens[usable].sum(dtype="int64")),
            trained=int(index.trained[usable].sum(dtype="int64")),
            media={name: int(column[usable].sum(dtype="int64")) for name, column in index.media.items()},
            longest=int(index.tokens.max()) if len(index) else 0,
            histogram=histogram(index.tokens[known], recipe.data.max_length),
        )
        schedule = attempt(lambda: Schedule(index, corpus.parts, recipe.data, recipe.train, self.family.cost))
        if schedule is None:
            return facts, None
        facts.parts = shares(schedule, corpus.parts)
        facts.steps_per_epoch = schedule.steps_in_epoch(0)
        filled = 0
        for batch in schedule.batches(epochs=1):
            facts.looked_at += 1
            facts.packs += len(batch.packs)
            filled += int(sum(index.tokens[list(pack)].sum() for pack in batch.packs))
            if facts.looked_at == LOOKED_AT:
                break
        if recipe.data.pack and facts.packs:
            facts.fill = filled / (facts.packs * schedule.pack_length)
        return facts, schedule

    def without(self, batch: Batch, gone: Sequence[bool]) -> tuple[Batch, StepStats]:
        whole, lost = sample.without(batch, gone)
        stats = StepStats(
            tokens=sum(each.measure.tokens for each in lost),
            trained=sum(each.measure.trained for each in lost),
            samples=len(lost),
            media=sum(len(s.tensors.get(stream.sizes, ())) for s in lost for stream in batch.streams),
        )
        return whole, stats

    @property
    def packs(self) -> bool:
        return self.recipe.data.pack

    def batch_sharding(self, mesh: Mesh) -> BatchSharding:
        return PackedBatchSharding(self.family, mesh, self.recipe.parallel)

    # ---------------------------------------------------------------- planning

    @property
    def tokens(self) -> int:
        """Of the longest micro-batch."""
        data = self.recipe.data
        if data.pack:
            return data.pack_length or data.max_length
        return data.max_length * self.recipe.train.micro_batch_size

    def workload(self, media: float, patches: int) -> Workload:
        if not 0 <= media < 1:
            raise PolymodalError(
                f"--media {media} is no share of tokens.", "Use a number from 0 to less than 1."
            )
        return Workload(lengths(self.family, self.tokens, media, patches))

    def describe(self, load: Workload) -> str:
        pictures = load.measure.media.get("vision", ())
        return f"{len(pictures)} pictures of {pictures[0] if pictures else 0} patches"


def lengths(family: Any, tokens: int, media: float, patches: int) -> SampleLengths:
    """A sample of `tokens` tokens with as many whole media of about `patches` units of length (of the first stream) as fit
    into the share `media` of them; every token of text is trained."""
    if not family.streams:
        return SampleLengths(tokens, tokens)
    stream = family.streams[0]
    size = family.medium(stream, patches)
    each, units = family.media_tokens(stream, size), family.media_lengths(stream, size)
    count = int(tokens * media // each)
    return SampleLengths(tokens, tokens - count * each, {stream.name: units * count})
