"""Whisper (Radford et al. 2022): 30 s of speech -> its text, in 99 languages or English alone, with or
without times.

The net is transformers' WhisperForConditionalGeneration. The encoder always takes 3,000 frames (30 s, silence
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
        # self-attention, queries and output of cross attention
        decoder = 2.0 * tokens * (6 * d * d + 2 * d * c.decoder_ffn_dim)
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


def _size(
    name: str,
    parameters: float,
    width: int,
    layers: int,
    *,
    decoder: int = 0,
    bands: int = 80,
    devices: int = 1,
) -> Size:
    """A published size. decoder: its layers, where they are not as many as the encoder's."""
    config = {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": decoder or layers,
        "encoder_attention_heads": width // 64,
        "decoder_attention_heads": width // 64,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "num_mel_bins": bands,
        "vocab_size": 51864 if name.endswith(".en") else 51866 if bands == 128 else 51865,
    }
    return Size(
        f"openai/whisper-{name}",
        parameters,
        decoder or layers,
        devices=devices,
        layout={"dp_shard": -1} if devices > 1 else {},
        config=config,
    )


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
        "cp": "its sequences are short, 1,500 positions of audio and at most 448 tokens. "
        "Use dp_shard, tp or pp.",
        "ep": "it has no experts.",
    },
    sizes={
        "tiny": _size("tiny", 0.038, 384, 4),
        "tiny.en": _size("tiny.en", 0.038, 384, 4),
        "base": _size("base", 0.073, 512, 6),
        "base.en": _size("base.en", 0.073, 512, 6),
        "small": _size("small", 0.242, 768, 12),
        "small.en": _size("small.en", 0.242, 768, 12),
        "medium": _size("medium", 0.764, 1024, 24),
        "medium.en": _size("medium.en", 0.764, 1024, 24),
        "large": _size("large", 1.543, 1280, 32, devices=2),
        "large-v2": _size("large-v2", 1.543, 1280, 32, devices=2),
        "large-v3": _size("large-v3", 1.544, 1280, 32, bands=128, devices=2),
        "turbo": _size("large-v3-turbo", 0.809, 1280, 32, decoder=4, bands=128),
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
