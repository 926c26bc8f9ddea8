"""The padded layout: an encoder's features and a decoder's tokens [B, T], of models that transcribe.

Samples of like length are joined and padded on the right; token loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polymodal.core import padded
from polymodal.core.sample import Batch, SampleLengths
from polymodal.data.index import Index
from polymodal.data.loader import Loader, StepStats
from polymodal.data.schedule import Schedule
from polymodal.data.speech import SpeechCollator, SpeechProcessor
from polymodal.distributed.mesh import Mesh
from polymodal.parallel.batches import BatchSharding
from polymodal.recipe import Data
from polymodal.train.layouts.base import SOUND_FRAMES, DataFacts, Section, Workload
from polymodal.train.layouts.tokens import TokenLayout


class Padded(TokenLayout):
    """train.micro_batch_size samples a micro-batch. data.pack is ignored; data.max_length is at most what the
    decoder takes."""

    family: Any
    """A models.audio.encoder_decoder.EncoderDecoder."""

    def processor(self) -> SpeechProcessor:
        return SpeechProcessor(self.media_processor(), self.recipe.data)

    def training_processor(self, section: Section) -> SpeechProcessor:
        made = self.processor()
        made.augment = section == "datasets"
        return made

    def section_data(self, section: Section, **changes: Any) -> Data:
        longest = min(self.recipe.data.max_length, self.family.max_tokens)
        return super().section_data(section, pack=False, max_length=longest, **changes)

    def schedule(self, index: Index, corpus: Any, data: Data) -> Schedule:
        return Schedule(index, corpus.parts, data, self.recipe.train, self.family.cost, by_length=True)

    def loader(
        self, schedule: Schedule, corpus: Any, processor: Any, data: Data, first: bool, **options: Any
    ) -> Loader:
        make = SpeechCollator(corpus, processor, data, schedule.seed, first)
        return Loader(schedule, corpus, processor, data, make=make, **options)

    def filled(self, schedule: Schedule, packs: Sequence[Sequence[int]]) -> int:
        return sum(len(pack) * int(schedule.index.tokens[list(pack)].max()) for pack in packs)

    def batching(self, schedule: Schedule, facts: DataFacts) -> str:
        size = self.recipe.train.micro_batch_size
        return f"{size} samples, {1 - facts.fill:.1%} of their tokens are padding" if size > 1 else ""

    def without(self, batch: Batch, gone: Sequence[bool]) -> tuple[Batch, StepStats]:
        whole, lost = padded.without(batch, gone)
        stats = StepStats(
            tokens=sum(each.tokens for each in lost),
            trained=sum(each.trained for each in lost),
            samples=len(lost),
        )
        return whole, stats

    @property
    def packs(self) -> bool:
        return False

    def batch_sharding(self, mesh: Mesh) -> BatchSharding:
        return BatchSharding(mesh)

    # ---------------------------------------------------------------- planning

    def workload(
        self, media: float, patches: int, sound: float = 0.0, frames: int = SOUND_FRAMES
    ) -> Workload:
        """micro_batch_size samples of the longest text; every sample has as many positions of audio."""
        tokens = self.section_data("datasets").max_length
        positions, _ = self.family.encoded_shape()
        lengths = SampleLengths(tokens, tokens, {self.family.features.name: (positions,)})
        return Workload(lengths, self.recipe.train.micro_batch_size)

    def example(self, load: Workload) -> Batch:
        return self.family.example(load.measure, load.samples)

    def describe(self, load: Workload) -> str:
        positions = load.measure.total(self.family.features.name)
        return f"{load.samples} samples of {load.measure.tokens} tokens and {positions} positions of audio"
