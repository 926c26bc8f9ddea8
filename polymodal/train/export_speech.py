"""The check of an export that transcribes or speaks: logits of one recording and its text, or of one text and
its codes, by the run's model and by the class that opens the export."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polymodal.core import padded
from polymodal.core.sample import Batch, pack
from polymodal.data.formats import CODES, RowReader
from polymodal.data.speech import SpeechProcessor
from polymodal.data.speech_codes import SpeechCodesProcessor
from polymodal.recipe import Attr

TEXT, LANGUAGE = "One two three.", "en"
SPOKEN_FRAMES = 6


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


def spoken(family: Any, data: Any) -> Batch:
    """A text and the codes of its speech as a packed batch of one, by a checkpoint's own tokenizer."""
    media = family.media_processor(data)
    count = media.groups * SPOKEN_FRAMES
    codes = (torch.arange(count) * 7 % media.entries).view(SPOKEN_FRAMES, media.groups)
    row = {"text": TEXT, CODES: codes.tolist()}
    record = RowReader("asr", Attr(), "", None).record(row, "the sample")
    return pack([SpeechCodesProcessor(media, data).sample(record)])


def spoken_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits [T, V] float32 of the talker, text ids [T]) by the class itself, whose code predictor must
    give finite numbers."""
    ids, codes = batch["input_ids"], batch["codes"]
    frames = torch.where(codes[..., 1:2] >= 0, codes, -1)
    with torch.no_grad():
        # one place more: the class gives no logits of the last one
        more = [torch.nn.functional.pad(each, (0, 1)) for each in (ids, codes[..., 0])]
        out = model(*more, torch.nn.functional.pad(frames, (0, 0, 0, 1), value=-1))
    assert bool(out.code_logits.isfinite().all())
    return out.logits[0].float(), ids[0]
