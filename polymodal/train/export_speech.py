"""The check of an export that transcribes: logits of one recording and its text, by the run's model and by
transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymodal.core import padded
from polymodal.core.sample import Batch
from polymodal.data.formats import RowReader
from polymodal.data.speech import SpeechProcessor
from polymodal.recipe import Attr

TEXT, LANGUAGE = "One two three.", "en"


def _tones(rate: int) -> np.ndarray:
    """A second of sound, the same every time."""
    t = np.arange(rate) / rate
    tones = 0.4 * np.sin(2 * np.pi * 300 * t * (1 + t)) + 0.2 * np.sin(2 * np.pi * 1700 * t)
    return tones.astype(np.float32)


def sound(rate: int) -> dict[str, Any]:
    """The same as a row has it."""
    return {"array": _tones(rate), "sampling_rate": rate}


def sample(family: Any, data: Any) -> Batch:
    """The recording and its text as a micro-batch of one, by the run's own processor."""
    media = family.media_processor(data)
    row = {"audio": sound(media.sample_rate), "text": TEXT, "language": LANGUAGE}
    record = RowReader("asr", Attr(), "", None).record(row, "the sample")
    return padded.pad([SpeechProcessor(media, data).sample(record)])


def library_logits(model: nn.Module, processor: Any) -> tuple[Tensor, Tensor]:
    """(logits [T, V] float32, decoder tokens [T]) by the library's model and processor alone."""
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    rate = extractor.sampling_rate
    features = extractor(_tones(rate), sampling_rate=rate, return_tensors="pt").input_features
    tokenizer.language = tokenizer.task = None
    multilingual = model.generation_config.is_multilingual
    prompt = {"language": LANGUAGE, "task": "transcribe"} if multilingual else {}
    tokenizer.set_prefix_tokens(**prompt, predict_timestamps=False)
    ids = torch.tensor([tokenizer(f" {TEXT}").input_ids[:-1]])
    with torch.no_grad():
        out = model(features.to(next(model.parameters()).dtype), decoder_input_ids=ids, use_cache=False)
    return out.logits[0].float(), ids[0]
