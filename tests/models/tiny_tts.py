"""A tiny random Qwen3-TTS with its tokenizer and codec, and rows of speech to be learned. Shared by every test of
models that speak.

Its codec has the published rates: 24 kHz, 1,920 samples a frame; 4 codebooks of 32 in place of 16 of 2,048.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.core.sample import Batch, pack, padding_sample
from polymodal.data.speech_codes import SpeechCodesProcessor
from polymodal.recipe import Data
from tests.models import tiny

NAME = "qwen3-tts"
RATE, GROUPS, ENTRIES, FRAME = 24000, 4, 32, 1920
SPOKEN = ("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>")
TEXTS = (
    "yes",
    "The first image shows the digit seven.",
    "How many red squares are there?",
    "no",
    "Answer with a number",
)


def tokenizer() -> Any:
    made = tiny.tokenizer.__wrapped__()  # type: ignore[attr-defined]
    made.add_tokens(["assistant"])  # one token, as in the published vocabulary
    made.add_special_tokens({"additional_special_tokens": [*tiny.SPECIALS[3:], *SPOKEN]})
    return made


def config(**overrides: Any) -> dict[str, Any]:
    """config.json as published, small. overrides: of the talker."""
    ids = tokenizer().convert_tokens_to_ids
    blocks = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    }  # fmt: skip
    talker = {
        "vocab_size": ENTRIES + 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **blocks,
        "rope_scaling": {"interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default"},
        "num_code_groups": GROUPS, "text_hidden_size": 24, "text_vocab_size": len(tokenizer()),
        "codec_pad_id": 32, "codec_bos_id": 33, "codec_eos_token_id": 34, "codec_think_id": 35, "codec_nothink_id": 36,
        "codec_think_bos_id": 37, "codec_think_eos_id": 38, "codec_language_id": {"english": 39, "chinese": 40},
        "spk_id": {"ann": 41}, "spk_is_dialect": {"ann": False},
        "code_predictor_config": {
            "vocab_size": ENTRIES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, **blocks,
            "num_code_groups": GROUPS,
        },
        **overrides,
    }  # fmt: skip
    speaker = {
        "mel_dim": 128, "enc_dim": 32, "enc_channels": [16, 16, 16, 16, 48], "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_dilations": [1, 2, 3, 4, 1], "enc_attention_channels": 8, "enc_res2net_scale": 4, "enc_se_channels": 8,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3TTSForConditionalGeneration"], "model_type": "qwen3_tts", "tts_model_type": "base",
        "tts_model_size": "0b6", "tokenizer_type": "qwen3_tts_tokenizer_12hz",
        "im_start_token_id": ids("<|im_start|>"), "im_end_token_id": ids("<|im_end|>"),
        "tts_pad_token_id": ids(SPOKEN[0]), "tts_bos_token_id": ids(SPOKEN[1]), "tts_eos_token_id": ids(SPOKEN[2]),
        "talker_config": talker, "speaker_encoder_config": speaker,
    }  # fmt: skip


def codec_config() -> Any:
    from polymodal.models.nets.qwen3_tts_codec import Qwen3TTSCodecConfig

    encoder = {
        "hidden_size": 16, "num_filters": 2, "codebook_size": ENTRIES, "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8, "num_quantizers": GROUPS + 1, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "head_dim": 8, "sliding_window": 4,
        "upsample_groups": 16, "sampling_rate": RATE, "frame_rate": 12.5,
    }  # fmt: skip
    decoder = {
        "codebook_size": ENTRIES, "codebook_dim": 12, "hidden_size": 16, "latent_dim": 16, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_quantizers": GROUPS, "upsample_rates": [8, 5, 4, 3], "upsampling_ratios": [2, 2], "decoder_dim": 32,
    }  # fmt: skip
    return Qwen3TTSCodecConfig(
        encoder_config=encoder, decoder_config=decoder, encoder_valid_num_quantizers=GROUPS
    )


def checkpoint(
    directory: str | Path, seed: int = 0, codec: bool = True, kind: str = "base", **overrides: Any
) -> Path:
    """Write a random Qwen3-TTS as a hub checkpoint, its codec in speech_tokenizer/. Returns the directory."""
    from polymodal.models.nets import qwen3_tts
    from polymodal.models.nets.qwen3_tts_codec import Qwen3TTSCodec

    directory = Path(directory)
    torch.manual_seed(seed)
    values = config(**overrides) | {"tts_model_type": kind}
    model = qwen3_tts.build(values)
    with (
        torch.no_grad()
    ):  # the library starts biases at 0 and norms at 1: nothing would notice if they were lost
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    tokenizer().save_pretrained(directory)
    if codec:
        made = Qwen3TTSCodec._from_config(codec_config())
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith("embedding_sum"):
                    parameter.normal_()
            for name, table in made.named_buffers():
                if name.endswith("embed_sum"):
                    table.normal_()
        made.save_pretrained(directory / "speech_tokenizer")
    return directory


def voice(path: Path, seconds: float = 1.2, seed: int = 0) -> Path:
    """A wav file of 24 kHz."""
    draw = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    heard = 0.3 * np.sin(2 * np.pi * (180 + 40 * seed) * t) + 0.02 * draw.standard_normal(len(t))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((heard * 32767).astype("<i2").tobytes())
    return path


def codes(frames: int, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, ENTRIES, (frames, GROUPS)).tolist()


def rows(directory: Path, count: int = 5, coded: bool = True, reference: bool = True) -> Path:
    """rows.jsonl of texts, with codes (else recordings alone) and one voice."""
    voice(directory / "voice.wav")
    made = []
    for i in range(count):
        row: dict[str, Any] = {"text": TEXTS[i % len(TEXTS)], "language": ("English", "auto")[i % 2]}
        row |= {"ref_audio": "voice.wav"} if reference else {}
        if coded:
            row["audio_codes"] = codes(3 + 2 * (i % 4), i)
        else:
            voice(directory / f"{i}.wav", 0.6 + 0.1 * i, i)
            row["audio"] = f"{i}.wav"
        made.append(row)
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def batches(family: Any, dtype: torch.dtype) -> list[Batch]:
    """Four packs of different lengths; the second has no voice, one sample has no weight."""
    from polymodal.core.sample import Media, Message, Record

    processor = SpeechCodesProcessor(family.media_processor(Data()), Data())
    out, number = [], 0
    for lengths in ((5, 11), (3,), (16, 7, 4), (9, 2)):
        samples = []
        for length in lengths:
            extra: dict[str, Any] = {
                "audio_codes": codes(length, number),
                "language": "english" if number % 2 else None,
            }
            if number == 1:
                extra["speaker"] = "ann"
            elif number != 2:
                extra["ref_audio"] = Media("audio", wav(0.6 + 0.1 * number, number))
            weight = 0.0 if number == 5 else 1.0 + number
            said = Message("assistant", (TEXTS[number % len(TEXTS)],), weight)
            samples.append(processor.sample(Record((Message("user", ()), said), "row", extra=extra), number))
            number += 1
        batch = pack(samples)
        if "speaker_mels" in batch.tensors:
            batch.tensors["speaker_mels"] = batch["speaker_mels"].to(dtype)
        out.append(batch)
    return out


def wav(seconds: float, seed: int) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return voice(Path(directory) / "voice.wav", seconds, seed).read_bytes()


def filler() -> Batch:
    return pack([padding_sample()])
