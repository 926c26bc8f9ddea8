"""Whisper (Radford et al. 2022): 30 s of speech -> its text, in 99 languages or in English, with or without times.

The net is transformers' WhisperForConditionalGeneration. The encoder always hears 3,000 frames (30 s, silence
included), so its batches have one shape; the decoder's are padded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from polymodal.core.sample import Batch, SampleLengths
from polymodal.models.audio.encoder_decoder import EncoderDecoder
from polymodal.models.audio.whisper_speech import FEATURES, WhisperSpeech
from polymodal.models.card import Chain, ModelCard, Size

ENCODER, DECODER = "model.encoder.layers.*", "model.decoder.layers.*"


class Whisper(EncoderDecoder):
    line = "whisper"
    features = FEATURES

    def media_processor(self, data: Any) -> WhisperSpeech:  # type: ignore[override]
        return WhisperSpeech(self.source, self.config)

    def features_shape(self) -> tuple[int, int]:
        return self.config.num_mel_bins, 2 * self.config.max_source_positions

    def encoded_shape(self) -> tuple[int, int]:
        return self.config.max_source_positions, self.config.d_model

    def encode(self, model: Any, features: Tensor) -> Tensor:
        return model.model.encoder(features).last_hidden_state

    def decode(self, model: Any, batch: Batch, encoded: Tensor) -> Tensor:
        ids = batch["input_ids"]
        return model.model.decoder(
            input_ids=ids, encoder_hidden_states=encoded, use_cache=False
        ).last_hidden_state

    def costs(self, measure: SampleLengths) -> dict[str, float]:
        """Forward FLOPs: two a weight and row, and attention; the encoder's rows are always the same."""
        c, tokens, rows = self.config, measure.tokens, self.config.max_source_positions
        d, mel = c.d_model, c.num_mel_bins
        encoder = 2.0 * rows * (4 * d * d + 2 * d * c.encoder_ffn_dim) + 4.0 * d * rows * rows
        decoder = (
            2.0 * tokens * (6 * d * d + 2 * d * c.decoder_ffn_dim)
        )  # self-attention, queries and output of cross
        decoder += 2.0 * rows * 2 * d * d  # keys and values of the encoder's output
        decoder += 2.0 * d * tokens * tokens + 4.0 * d * tokens * rows  # causal: half
        return {
            "model.encoder.conv1": 2.0 * 2 * rows * 3 * mel * d,
            "model.encoder.conv2": 2.0 * rows * 3 * d * d,
            ENCODER: c.encoder_layers * encoder,
            DECODER: c.decoder_layers * decoder,
            self.card.head: 2.0 * measure.trained * d * c.vocab_size,
        }


def _attention(name: str) -> dict[str, str]:
    parts = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
    return {name: "attention", **{f"{name}.{part}": style for part, style in parts.items()}}


def _mlp(block: str) -> dict[str, str]:
    return {f"{block}.fc1": "entering_colwise", f"{block}.fc2": "leaving_rowwise"}


CARD = ModelCard(
    name="whisper",
    title="Whisper",
    family=Whisper,
    architectures=("WhisperForConditionalGeneration",),
    tasks=("speech-recognition",),
    blocks=(ENCODER, DECODER),
    towers={"audio": ("model.encoder",), "language": ("model.decoder", "proj_out")},
    pipeline={
        "encoder": Chain(
            ENCODER,
            first=tuple(f"model.encoder.{name}" for name in ("conv1", "conv2", "embed_positions")),
            last=("model.encoder.layer_norm",),
        ),
        "decoder": Chain(
            DECODER,
            first=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
            last=("model.decoder.layer_norm", "proj_out"),
        ),
    },
    # the vocabulary is whole on every rank: its rows are an odd number in most sizes
    tensor_plan={
        "model.encoder": "stream",
        **_attention(f"{ENCODER}.self_attn"),
        **_mlp(ENCODER),
        "model.encoder.layer_norm": "exit",
        "model.decoder": "stream",
        **_attention(f"{DECODER}.self_attn"),
        **_attention(f"{DECODER}.encoder_attn"),
        **_mlp(DECODER),
        "model.decoder.layer_norm": "exit",
    },
    head="proj_out",
    embedding="model.decoder.embed_tokens",
    limits={
        "cp": "its sequences are short: 1,500 positions of sound and at most 448 tokens. Use dp_shard, tp or pp.",
        "ep": "it has no experts.",
    },
    sizes={
        "tiny": Size("openai/whisper-tiny", 0.038, 4, devices=1),
        "tiny.en": Size("openai/whisper-tiny.en", 0.038, 4, devices=1),
        "base": Size("openai/whisper-base", 0.073, 6, devices=1),
        "base.en": Size("openai/whisper-base.en", 0.073, 6, devices=1),
        "small": Size("openai/whisper-small", 0.242, 12, devices=1),
        "small.en": Size("openai/whisper-small.en", 0.242, 12, devices=1),
        "medium": Size("openai/whisper-medium", 0.764, 24, devices=1),
        "medium.en": Size("openai/whisper-medium.en", 0.764, 24, devices=1),
        "large": Size("openai/whisper-large", 1.543, 32, devices=2, layout={"dp_shard": -1}),
        "large-v2": Size("openai/whisper-large-v2", 1.543, 32, devices=2, layout={"dp_shard": -1}),
        "large-v3": Size("openai/whisper-large-v3", 1.544, 32, devices=2, layout={"dp_shard": -1}),
        "turbo": Size("openai/whisper-large-v3-turbo", 0.809, 4, devices=1),
    },
    keywords=(
        "speech recognition",
        "asr",
        "transcribe",
        "transcription",
        "subtitles",
        "dictation",
        "speech to text",
    ),
    kind="audio",
    verified="logits, loss, gradients and keys on tiny models of the class",
    seeds=("large-v3",),
)
