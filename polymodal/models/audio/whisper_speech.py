"""Whisper's SpeechMedia (data/speech.py): its prompt tokens, how it writes text and times, and its features.

Tokens and features are the library's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import MediaStream
from polymodal.models.understanding.media import TokenMedia

FEATURES = MediaStream("audio", "input_features", "feature_sizes", ("none", "frame"))
UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")
"""Languages without spaces between words (openai/whisper, tokenizer.py: split_to_word_tokens)."""
STEP = 0.02  # seconds between two times


class WhisperSpeech(TokenMedia):
    """directory: of the checkpoint's tokenizer and preprocessor files; config: the model's."""

    stream = FEATURES

    def __init__(self, directory: str, config: Any):
        super().__init__(directory)
        self.extractor = self.load("AutoFeatureExtractor", "feature extractor")
        self.positions = config.max_source_positions
        self.shape = (config.num_mel_bins, 2 * self.positions)
        if (self.extractor.feature_size, self.extractor.nb_max_frames) != self.shape:
            raise PolymodalError(
                f"The feature extractor of {directory} makes {self.extractor.feature_size} bands of "
                f"{self.extractor.nb_max_frames} frames, the model takes {self.shape[0]} of {self.shape[1]}.",
                "Take the preprocessor_config.json of this very model.",
            )
        self.sample_rate = self.extractor.sampling_rate
        self.seconds = float(self.extractor.chunk_length)
        self.max_tokens = config.max_target_positions
        self.end = self.token_id("<|endoftext|>")
        self.begin_times = self.token_id("<|notimestamps|>") + 1
        self.multilingual = _multilingual(Path(directory), config)
        keys = ("mask_time_prob", "mask_time_length", "mask_time_min_masks")
        keys += ("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks")
        self.masks = {key: getattr(config, key) for key in keys} if config.apply_spec_augment else {}
        self.settings = {"features": self.extractor.to_dict(), "multilingual": self.multilingual}

    def prompt(self, language: str | None, task: str, timestamps: bool) -> list[int]:
        if not self.multilingual:
            if task != "transcribe" or language not in (None, "en", "english", "English"):
                asked = f"the language {language}" if task == "transcribe" else f"the task {task}"
                raise PolymodalError(
                    f"this Whisper transcribes English alone, the row has {asked}.",
                    "Take a size without .en in its name.",
                )
            language = None
        elif language is None:
            raise PolymodalError(
                "the language is missing, which this Whisper needs.",
                "Give rows a column `language` (en, de, zh ...), or set data.speech.language.",
            )
        self.tokenizer.language = self.tokenizer.task = None
        try:
            self.tokenizer.set_prefix_tokens(
                language, task if self.multilingual else None, predict_timestamps=timestamps
            )
            return list(self.tokenizer.prefix_tokens)
        except ValueError as error:
            raise PolymodalError(
                str(error).partition(". ")[0] + ".", "Write codes such as en, de, zh."
            ) from None

    def text(self, text: str, language: str | None) -> str:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = TO_LANGUAGE_CODE.get((language or "en").lower(), language)
        return text if code in UNSPACED else f" {text}"

    def time(self, seconds: float) -> int:
        return self.begin_times + round(seconds / STEP)

    def features(self, samples: np.ndarray, augment: int | None = None) -> Tensor:
        made = self.extractor(samples, sampling_rate=self.sample_rate, return_tensors="pt")
        features = made["input_features"][0].float()
        return features if augment is None or not self.masks else self._masked(features, augment)

    def _masked(self, features: Tensor, seed: int) -> Tensor:
        """SpecAugment (arXiv:1904.08779) as transformers' Whisper masks by its config, drawn from a seed:
        spans of frames, and of bands, are zero."""
        draw = np.random.default_rng(seed)
        out = features.clone()
        for axis, name in ((1, "time"), (0, "feature")):
            share, span, least = (self.masks[f"mask_{name}_{key}"] for key in ("prob", "length", "min_masks"))
            size = features.shape[axis]
            if share <= 0:
                continue
            count = min(max(int(share * size / span + draw.random()), least), size // span)
            starts = draw.choice(size - span + 1, count, replace=False)
            places = torch.from_numpy((starts[:, None] + np.arange(span)).ravel())
            out.index_fill_(axis, places, 0.0)
        return out


def _multilingual(directory: Path, config: Any) -> bool:
    """By generation_config.json; without it by the vocabulary, which in .en models is one token smaller."""
    path = directory / "generation_config.json"
    known = read_json(path).get("is_multilingual") if path.is_file() else None
    return config.vocab_size >= 51865 if known is None else bool(known)
