"""Qwen3-TTS's VoiceMedia (data/speech_codes.py): its two channels of ids, and the spectrogram of a voice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import MediaStream
from polymodal.models.nets import qwen3_tts
from polymodal.models.nets.log_mel import SPEAKER, log_mel
from polymodal.models.understanding.media import TokenMedia, encoded

SPEAKER_MEL = MediaStream("speaker", "speaker_mels", "speaker_sizes", ("frame", "none"))
ROLE = "<|im_start|>assistant\n"
NAMES = {
    "zh": "chinese",
    "en": "english",
    "de": "german",
    "it": "italian",
    "pt": "portuguese",
    "es": "spanish",
    "ja": "japanese",
    "ko": "korean",
    "fr": "french",
    "ru": "russian",
}
"""Codes of languages, and what the config calls them."""


class Qwen3TTSVoice(TokenMedia):
    """directory: of the checkpoint's tokenizer; config: the model's."""

    stream = SPEAKER_MEL
    streams = (SPEAKER_MEL,)
    sample_rate = SPEAKER.rate
    frame_rate = 12.5

    def __init__(self, directory: str, config: Any):
        super().__init__(directory)
        self.config = config
        talker = config.talker_config
        self.groups = talker.num_code_groups
        self.entries = talker.code_predictor_config.vocab_size
        last = max(self.tokenizer.get_vocab().values(), default=0)
        if last >= talker.text_vocab_size:
            raise PolymodalError(
                f"{directory}: the tokenizer has {last + 1} tokens, the model's text embedding has "
                f"{talker.text_vocab_size} rows.",
                "Copy this very model's tokenizer files.",
            )
        self.role = list(encoded(self.tokenizer, ROLE))
        if len(self.role) != 3 or self.role[0] != config.im_start_token_id:
            raise PolymodalError(
                f"{directory}: the tokenizer writes {ROLE!r} as the tokens {self.role}, not as the three of "
                "Qwen3-TTS.",
                "Copy this very model's tokenizer files.",
            )
        self.settings = {"config": config.to_dict(), "mel": SPEAKER._asdict()}

    def words(self, text: str) -> list[int]:
        """The role's three ids and those of a text, in which special tokens are words."""
        return self.role + self.tokenizer.backend_tokenizer.encode(text.strip(), add_special_tokens=False).ids

    def language(self, name: str | None) -> str | None:
        """As the config names it; None where the model is to hear it from the text."""
        return None if name in (None, "", "auto", "Auto") else NAMES.get(str(name).lower(), str(name).lower())

    def row(
        self, text: str, codes: Tensor, speaker: str | None, reference: bool, language: str | None
    ) -> tuple[Tensor, Tensor]:
        """Ids of the text channel [T], and the codec's [T, K] (column 0 the codec's id or `SPEAKER`, the
        others codes 1..K-1 at frames), of a text and its codes [n, K].

        speaker: one that the config names; reference: the voice is a vector. Raises PolymodalError.
        """
        config, mark = self.config, qwen3_tts.NONE
        if speaker is not None:
            mark = qwen3_tts._id("speaker", config.talker_config.spk_id, speaker)
        elif reference:
            if config.tts_model_type != "base":
                raise PolymodalError(
                    "`ref_audio` is for a Base checkpoint: this one has no speaker encoder.",
                    "Name one of its speakers in the column `speaker`, or take a size that ends in Base.",
                )
            mark = qwen3_tts.SPEAKER
        made = qwen3_tts.training_row(config, self.words(text), codes, mark, self.language(language))
        rows = made["codes"]
        return made["text_ids"], torch.cat([made["codec_ids"][:, None], rows[:, 1:]], 1)

    @property
    def end(self) -> int:
        """Id that ends the frames."""
        return self.config.talker_config.codec_eos_token_id

    def frames(self, samples: int) -> int:
        """Of the spectrogram of so many samples."""
        return (samples + SPEAKER.window - SPEAKER.hop - SPEAKER.window) // SPEAKER.hop + 1

    def features(self, samples: np.ndarray) -> Tensor:
        """Samples [n] of a voice at 24 kHz in -1..1 -> its log-mel spectrogram [frames, 128]."""
        return log_mel(torch.from_numpy(samples), SPEAKER)
