"""A tiny random Whisper with its tokenizer and feature extractor, and recordings to be transcribed.

It hears two seconds at once where the published ones hear thirty. Shared by every test of speech.
"""

from __future__ import annotations

import functools
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch

RATE, SECONDS, BANDS = 16000, 2, 16
POSITIONS = SECONDS * 50  # of the encoder's output
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXT = " ".join(WORDS) + " please say the number again, thank you. Good morning 图片里有什么?"


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE as Whisper has it: languages, tasks and 1,501 times after the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT, " " + TEXT],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    state = json.loads(core.to_str())["model"]
    made = WhisperTokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES)]
    special += [
        f"<|{word}|>"
        for word in ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    ]
    made.add_special_tokens({"additional_special_tokens": special})
    made.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    made.pad_token = "<|endoftext|>"
    return made


def extractor() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=BANDS, chunk_length=SECONDS)


def config(multilingual: bool = True, **overrides: Any) -> Any:
    from transformers import WhisperConfig

    ids = tokenizer().convert_tokens_to_ids
    end = ids("<|endoftext|>")
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer()), "num_mel_bins": BANDS, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_source_positions": POSITIONS, "max_target_positions": 48, "pad_token_id": end, "bos_token_id": end,
        "eos_token_id": end, "decoder_start_token_id": ids("<|startoftranscript|>"), "suppress_tokens": [],
        "begin_suppress_tokens": [],
    }  # fmt: skip
    return WhisperConfig(**{**settings, **overrides})


def checkpoint(directory: str | Path, multilingual: bool = True, seed: int = 0, **overrides: Any) -> Path:
    """Write a random Whisper as a hub checkpoint. Returns the directory."""
    from transformers import GenerationConfig, WhisperForConditionalGeneration
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    directory = Path(directory)
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config(**overrides))
    with (
        torch.no_grad()
    ):  # the library starts biases at 0 and norms at 1: nothing would notice if they were lost
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name != "model.encoder.embed_positions.weight":
                parameter.mul_(3.0)
    ids = tokenizer().convert_tokens_to_ids
    facts: dict[str, Any] = {
        "is_multilingual": multilingual, "no_timestamps_token_id": ids("<|notimestamps|>"), "max_length": 48,
        "decoder_start_token_id": ids("<|startoftranscript|>"), "eos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"), "bos_token_id": ids("<|endoftext|>"), "prev_sot_token_id": ids("<|startofprev|>"),
        "max_initial_timestamp_index": 50, "return_timestamps": False,
    }  # fmt: skip
    if multilingual:
        facts |= {
            "lang_to_id": {f"<|{code}|>": ids(f"<|{code}|>") for code in LANGUAGES},
            "task_to_id": {task: ids(f"<|{task}|>") for task in ("translate", "transcribe")},
        }
    model.generation_config = GenerationConfig(**facts)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    extractor().save_pretrained(directory)
    return directory


def spoken(words: str, seconds: float | None = None) -> np.ndarray:
    """Samples that stand for words: two tones a word, 0.25 s each, by the word's number."""
    tones = []
    for word in words.split():
        n = WORDS.index(word) if word in WORDS else 10 + len(word)
        t = np.arange(RATE // 4) / RATE
        shape = np.hanning(len(t))
        tones.append(
            shape
            * (0.4 * np.sin(2 * np.pi * (250 + 90 * n) * t) + 0.3 * np.sin(2 * np.pi * (1500 + 240 * n) * t))
        )
    made = np.concatenate(tones) if tones else np.zeros(RATE // 4)
    if seconds is not None:
        made = np.resize(made, int(seconds * RATE))
    return made.astype(np.float32)


def heard(words: str, seconds: float | None = None) -> np.ndarray:
    """The same as a recording of 16 bits gives it back."""
    return (spoken(words, seconds) * 32767).astype("<i2").astype(np.float32) / 32768


def recording(path: Path, words: str, seconds: float | None = None) -> Path:
    """The same as a wav file of 16 kHz."""
    return write(path, spoken(words, seconds))


def write(path: Path, heard: np.ndarray) -> Path:
    """Samples in -1..1 as a wav file of 16 kHz and 16 bits."""
    samples = (heard * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    return path


def sentences(count: int, seed: int = 0, longest: int = 5) -> list[str]:
    """Sentences of one to `longest` words."""
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, longest + 1))) for _ in range(count)]
