"""What Qwen3-ASR makes of recordings and texts: mel frames, and `language English<asr_text>Good morning.`

A row {"audio", "text", "language"} becomes the conversation that the model was trained on (QwenLM/Qwen3-ASR:
finetuning/qwen3_asr_sft.py): the recording alone is the user's turn, a row's `prompt` (context, hot words)
the system's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Control, MediaShape, Message, Record, Span
from polymodal.data.speech import TIMES, recording
from polymodal.models.omni.qwen_omni_media import SoundMedia
from polymodal.models.omni.qwen_sound import AUDIO
from polymodal.recipe import Data

MARK, SILENT = "<asr_text>", "None"
"""Between the language and the text; the language of what is no speech, or is not known."""
SECONDS = 1200.0  # that the model takes at once (QwenLM/Qwen3-ASR: qwen_asr/inference/utils.py)


def language_name(language: str) -> tuple[str, str]:
    """(code, name as the model writes it) of a language's code or name. Raises PolymodalError."""
    from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME as NAMES

    asked = language.strip().lower()
    for code, name in NAMES.items():
        if asked in (code, name.lower()):
            return code, name
    raise PolymodalError(
        f"Qwen3-ASR does not know the language {language}.", f"It knows {', '.join(NAMES)}, or their names."
    )


def written(text: str, language: str | None) -> tuple[str, str]:
    """(what the model writes before a text, the text); a text that has it already keeps its own."""
    head, mark, rest = text.partition(MARK)
    if mark and head.strip().lower().startswith("language "):
        return head + mark, rest
    text = " ".join(TIMES.sub(" ", text).split())
    name = language_name(language)[1] if language and text else SILENT
    return f"language {name}{MARK}", text


class Qwen3ASRMedia(SoundMedia):
    """directory: a checkpoint with its tokenizer and feature extractor; config: the model's."""

    streams = (AUDIO,)
    reads = {"audio": SoundMedia.hear + SoundMedia.pad + SoundMedia.heard}
    longest = SECONDS

    def __init__(self, directory: str, config: Any, data: Data):
        super().__init__(directory)
        self.open_sound(config.audio_config)
        self.speech = data.speech

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.sound_settings, "speech": self.speech.model_dump()}

    def conversation(self, record: Record) -> Record:
        """The record with the language before its text. Raises PolymodalError."""
        if any(message.role == "assistant" for message in record.messages):
            recording(record)
        if (record.extra.get("task") or self.speech.task) != "transcribe":
            raise PolymodalError(
                "Qwen3-ASR transcribes, it does not translate.", "Set data.speech.task: transcribe."
            )
        language = record.extra.get("language") or self.speech.language
        messages = []
        for message in record.messages:
            if message.role == "assistant":
                text = "".join(part for part in message.content if isinstance(part, str))
                before, said = written(text, language)
                message = replace(message, content=(Control(before), said))
            messages.append(message)
        prompt = record.extra.get("prompt")
        if isinstance(prompt, str) and messages[0].role != "system":
            messages = [Message("system", (prompt,)), *messages]
        return replace(record, messages=tuple(messages))

    def span(self, shape: MediaShape) -> Span:
        part, tokens = self.sound_part(shape)
        return Span(self.around_sound(tokens), (part,), shape)

    def sound_frames(self, samples: int) -> int:
        """The library fills a shorter sound up with silence."""
        return super().sound_frames(max(samples, self.extractor.min_length))

    def features(self, shape: MediaShape, decoded: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Samples float32 [n] -> mel frames [F, bands] and their number [1, 1]."""
        return {AUDIO.name: self.mel(decoded)}

    def mel(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        options = {
            "sampling_rate": self.sample_rate,
            "padding": True,
            "n_window": 0,
        }  # 0: no filled-up chunks
        rows = self.extractor(samples, **options)["input_features"][0].T.float().contiguous()
        return rows, torch.tensor([[len(rows)]])
