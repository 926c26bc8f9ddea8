"""The proof of an export that transcribes: one recording and its text, by this house's model and by the library.

Sees what export.py sees. The recording is made here: it must only be the same on both sides.
"""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymodal.core import padded
from polymodal.core.sample import Batch, Media, Message, Record
from polymodal.data import audio
from polymodal.data.speech import SpeechProcessor

TEXT, LANGUAGE = "One two three.", "en"


def _recording(rate: int) -> bytes:
    """A second of tones as a wav file, the same every time."""
    t = np.arange(rate) / rate
    heard = 0.4 * np.sin(2 * np.pi * 300 * t * (1 + t)) + 0.2 * np.sin(2 * np.pi * 1700 * t)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((heard * 32000).astype("<i2").tobytes())
    return buffer.getvalue()


def sample(family: Any, data: Any) -> Batch:
    """The recording and its text as a micro-batch of one, by the run's own processor."""
    media = family.media_processor(data)
    heard = Media("audio", _recording(media.sample_rate))
    record = Record(
        (Message("user", (heard,)), Message("assistant", (TEXT,))), "the sample", extra={"language": LANGUAGE}
    )
    return padded.pad([SpeechProcessor(media, data).sample(record)])


def library_logits(model: nn.Module, processor: Any) -> tuple[Tensor, Tensor]:
    """(logits [T, V] float32, decoder tokens [T]) by the library's model and processor alone."""
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    rate = extractor.sampling_rate
    source = _recording(rate)
    heard = audio.decode_audio(source, audio.audio_header(source), rate)
    features = extractor(heard, sampling_rate=rate, return_tensors="pt").input_features
    if model.generation_config.is_multilingual:
        tokenizer.set_prefix_tokens(language=LANGUAGE, task="transcribe", predict_timestamps=False)
    else:
        tokenizer.language = tokenizer.task = None
        tokenizer.set_prefix_tokens(predict_timestamps=False)
    ids = torch.tensor([tokenizer(f" {TEXT}").input_ids[:-1]])
    with torch.no_grad():
        out = model(features.to(next(model.parameters()).dtype), decoder_input_ids=ids, use_cache=False)
    return out.logits[0].float(), ids[0]
