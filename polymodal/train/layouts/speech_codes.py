"""The layout of models that speak: packed samples of a channel of text and one of a codec's tokens."""

from __future__ import annotations

from typing import Any

from polymodal.data.source import Corpus
from polymodal.data.speech_codes import SpeechCodesProcessor
from polymodal.objectives.speech_codes import SpeechCodesObjective
from polymodal.train.layouts.base import Workload
from polymodal.train.layouts.packed import Packed


class SpeechCodes(Packed):
    """As Packed; rows are of text, audio_codes and, for the voice, ref_audio or speaker."""

    objective_class = SpeechCodesObjective
    objectives = {}

    def media_processor(self) -> Any:
        return self.family.media_processor(self.recipe.data)

    def processor(self) -> SpeechCodesProcessor:  # type: ignore[override]
        return SpeechCodesProcessor(self.media_processor(), self.recipe.data)

    def notes(self, corpus: Corpus, processor: Any) -> list[str]:
        return self.warnings(corpus, processor)

    def warnings(self, corpus: Corpus, processor: Any) -> list[str]:
        return []

    def describe(self, load: Workload) -> str:
        return f"{max(0, load.measure.trained - 1)} frames of codes"
