"""Rows that ask -> prompts that the model answers while it trains, with what rewards are given of the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaProcessor, Record, Sample, SampleLengths
from polymodal.data.chat import ChatProcessor
from polymodal.recipe import Data, Grpo


class PromptProcessor(ChatProcessor):
    """A ChatProcessor of prompts. Its lengths are those of all answers of a group with their prompts, each as
    long as it may be; its samples hold the prompt once, without labels."""

    def __init__(self, media: MediaProcessor, data: Data, settings: Grpo):
        super().__init__(media, data)
        self.group, self.longest = settings.group, settings.max_new_tokens

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} prompts {self.group} {self.longest}"

    def _prepare(self, record: Record, prompt: bool = True) -> Any:
        if record.plain:
            raise PolymodalError("plain text asks nothing.", "Use rows with a question.")
        return super()._prepare(record, prompt=True)

    def measure(self, records: Sequence[Record]) -> list[SampleLengths | str]:
        return [
            each
            if isinstance(each, str)
            else SampleLengths(
                self.group * (each.tokens + self.longest), self.group * self.longest, each.media
            )
            for each in super().measure(records)
        ]

    def sample(self, record: Record, id: int = -1, pixels: bool = True) -> Sample:
        made = super().sample(record, id, pixels)
        asked = next((m for m in reversed(record.messages) if m.role == "user"), record.messages[-1])
        prompt = "".join(part for part in asked.content if isinstance(part, str))
        keys = ("answers", "options", "columns")
        row = {key: record.extra[key] for key in keys if key in record.extra}
        return replace(made, row={"prompt": prompt, "media": record.media, "where": record.where, **row})

    def pieces(self, record: Record) -> list[Record]:
        raise PolymodalError(f"{record.where}: a prompt is not split.", "Drop it.")
