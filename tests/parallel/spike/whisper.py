"""A tiny Whisper of the real class, with a card that limits its layouts. Used by tests only."""

from __future__ import annotations

from typing import Any

from torch import nn

from polymodal.core.sample import Batch
from polymodal.models.card import ModelCard, Output
from polymodal.models.family import Family

MELS, FRAMES, PAD = 8, 24, 2


class WhisperFamily(Family):
    layout = "padded"

    def stage(self, model: nn.Module, carry: Any, batch: Batch) -> Output:
        # causal and padded on the right: no mask is needed, padding has no weight
        out = model.model(batch["input_features"], decoder_input_ids=batch["input_ids"], use_cache=False)
        return Output(out.last_hidden_state, model.proj_out)


CARD = ModelCard(
    name="whisper",
    family=WhisperFamily,
    architectures=("WhisperForConditionalGeneration",),
    tasks=("automatic-speech-recognition",),
    blocks=("model.encoder.layers.*", "model.decoder.layers.*"),
    towers={"audio": ("model.encoder",), "language": ("model.decoder", "proj_out")},
    head="proj_out",
    limits={"pp": "an encoder and a decoder do not form one line of blocks."},
)


def whisper() -> tuple[nn.Module, WhisperFamily]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50, num_mel_bins=MELS, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=FRAMES // 2,
        max_target_positions=20, pad_token_id=PAD, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), WhisperFamily(CARD, config, "whisper")
