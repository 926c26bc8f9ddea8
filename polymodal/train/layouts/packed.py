"""The packed layout: chats and plain text, samples one after the other in a sequence [1, T] without padding.

Next-token loss, media inside the text, sequences sharded over context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from polymodal.core import sample
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch, SampleLengths
from polymodal.data import boxes
from polymodal.data.chat import ChatProcessor
from polymodal.data.loader import Loader, StepStats
from polymodal.data.preference import Mismatched, PreferenceProcessor
from polymodal.data.prompts import PromptProcessor
from polymodal.data.schedule import Schedule
from polymodal.data.source import Corpus
from polymodal.distributed.mesh import Mesh
from polymodal.evaluate.rewards import Rewards
from polymodal.objectives.language import LanguageObjective
from polymodal.objectives.policy import PolicyObjective
from polymodal.objectives.preference import PreferenceObjective, needs_copy
from polymodal.parallel.batches import BatchSharding, PackedBatchSharding
from polymodal.recipe import Data, Dataset
from polymodal.train.layouts.base import SOUND_FRAMES, DataFacts, Workload
from polymodal.train.layouts.tokens import TokenLayout


class Packed(TokenLayout):
    """Samples of a micro-batch in one sequence of up to data.pack_length tokens; with data.pack false,
    micro_batch_size samples in one sequence."""

    by_tokens = True
    objective_class = LanguageObjective
    objectives = {**dict.fromkeys(("dpo", "kto"), PreferenceObjective), "grpo": PolicyObjective}

    @cached_property
    def objective(self) -> Any:
        if self.asks:
            Rewards(self.recipe.train.rewards)
        return super().objective

    def processor(self) -> ChatProcessor:
        media, data, train = self.media_processor(), self.recipe.data, self.recipe.train
        if self.asks:
            return PromptProcessor(media, data, train.grpo)
        if not self.compares:
            return ChatProcessor(media, data)
        share = self.recipe.parallel.pp == 1  # features are repeated in the stage that embeds them
        return PreferenceProcessor(media, data, train.preference, train.objective == "kto", share)

    def corpus(self, datasets: Sequence[Dataset], data: Data, key: str = "data.datasets") -> Corpus:
        opened = super().corpus(datasets, data, key)
        return Mismatched(opened) if self.recipe.train.objective == "kto" else opened

    def loader(
        self, schedule: Schedule, corpus: Any, processor: Any, data: Data, first: bool, **options: Any
    ) -> Loader:
        return Loader(schedule, corpus, processor, data, rows=processor.media.rows, pixels=first, **options)

    def notes(self, corpus: Corpus, processor: Any) -> list[str]:
        return [*boxes.notes(corpus, processor.boxes), *self.warnings(corpus, processor)]

    def warnings(self, corpus: Corpus, processor: Any) -> list[str]:
        if len(corpus) == 0 or self.asks or processor.template.ends_answers or _first_is_plain(corpus):
            return []
        return [
            "The chat template prints no special token behind an answer: the model does not learn to end "
            "one. Give a template that prints the end-of-text token there as data.chat_template."
        ]

    def filled(self, schedule: Schedule, packs: Sequence[Sequence[int]]) -> int:
        return len(packs) * schedule.pack_length

    def batching(self, schedule: Schedule, facts: DataFacts) -> str:
        return f"{schedule.pack_length:,} tokens, {facts.fill:.1%} filled" if self.packs else ""

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

    def workload(
        self, media: float, patches: int, sound: float = 0.25, frames: int = SOUND_FRAMES
    ) -> Workload:
        for name, share in (("--media", media), ("--sound", sound)):
            if not 0 <= share < 1:
                raise PolymodalError(
                    f"{name} {share} is no share of tokens.", "Use a number from 0 to less than 1."
                )
        asked = [(sound, frames) if stream.hears else (media, patches) for stream in self.family.streams]
        if sum(share for share, _ in asked) >= 1:
            raise PolymodalError(
                f"--media {media} and --sound {sound} leave no tokens for text.",
                "Let them be less than 1 together.",
            )
        return Workload(lengths(self.family, self.tokens, asked))

    def resident_encoders(self, ranks: int) -> int:
        """Of a frozen reference, which is sharded as the model is."""
        if not needs_copy(self.recipe):
            return 0
        total = sum(parameter.numel() for parameter in self.family.build().parameters())
        return -(-total // (ranks * self.recipe.parallel.tp * self.recipe.parallel.pp))

    def describe(self, load: Workload) -> str:
        parts = []
        for stream in self.family.streams:
            units = load.measure.media.get(stream.name, ())
            what, unit = ("windows of sound", "frames") if stream.hears else ("pictures", "patches")
            parts.append(f"{len(units)} {what} of {units[0] if units else 0} {unit}")
        return ", ".join(parts)


def lengths(family: Any, tokens: int, asked: Sequence[tuple[float, int]]) -> SampleLengths:
    """A sample of `tokens` tokens with media, every token of text trained. asked: of each stream the share of
    the tokens, into which as many whole media fit, and about how many units of length each has."""
    media, text = {}, tokens
    for stream, (share, length) in zip(family.streams, asked, strict=True):
        size = family.medium(stream, length)
        parts = family.media_parts(stream, torch.tensor([size]))
        each = sum(family.media_tokens(stream, part) for part in parts)
        count = int((tokens * share + 0.5) // each)
        media[stream.name] = family.media_lengths(stream, size) * count
        text -= count * each
    return SampleLengths(tokens, text, media)


def _first_is_plain(corpus: Corpus) -> bool:
    try:
        return corpus[0].plain
    except PolymodalError:  # a broken row: counted and listed elsewhere
        return False
