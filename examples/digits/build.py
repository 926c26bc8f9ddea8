"""Builds what the demonstration starts from: a small Qwen2.5-VL with random weights, and data of real scans.

The model is the library's own class, made from a config; the tokenizer is a byte-level BPE trained here, with the
Qwen specials and chat template. The pictures are scikit-learn's 1,797 handwritten digits (8 x 8 scans of real
handwriting), several questions a picture, mixed with text-only rows.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTION = "Which digit is written here? Answer with one digit."


def text_rows() -> list[dict]:
    """Rows without a picture: sums, spellings, neighbours."""
    rows = []
    for a in range(10):
        rows.append(_row(f"How do you write {a} as a word?", WORDS[a]))
        rows.append(_row(f"Write {WORDS[a]} as a digit.", str(a)))
        for b in range(10 - a):
            rows.append(_row(f"What is {a} plus {b}?", str(a + b)))
    return rows


def picture_rows(image: str, digit: int) -> list[dict]:
    """Several questions about one scan."""
    return [
        _row(f"<image>{QUESTION}", str(digit), image),
        _row("<image>Is the digit in the picture even or odd?", "even" if digit % 2 == 0 else "odd", image),
        _row("<image>Name the digit in the picture as a word.", WORDS[digit], image),
    ]


def _row(question: str, answer: str, image: str | None = None) -> dict:
    row: dict = {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }
    if image:
        row["images"] = [image]
    return row


def data(directory: Path, held_out: int = 297, seed: int = 0) -> tuple[Path, Path]:
    """Writes pictures, train.json (MLLM JSON) and held_out.jsonl; returns the two files' paths."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    order = list(range(len(digits.target)))
    random.Random(seed).shuffle(order)
    train: list[dict] = []
    test: list[dict] = []
    for place, i in enumerate(order):
        name = f"images/{i:04d}.png"
        pixels = (255 - digits.images[i] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).resize((56, 56), Image.Resampling.BICUBIC).convert("RGB").save(
            directory / name
        )
        digit = int(digits.target[i])
        if place < held_out:
            test.append(
                {**_row(f"<image>{QUESTION}", str(digit), name), "options": [str(d) for d in range(10)]}
            )
        else:
            train += picture_rows(name, digit)
    train += text_rows() * 4
    random.Random(seed).shuffle(train)
    (directory / "train.json").write_text(json.dumps(train, indent=0))
    (directory / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return directory / "train.json", directory / "held_out.jsonl"


def tokenizer(texts: list[str], vocabulary: int = 640):
    """A byte-level BPE as Qwen's: NFC, Qwen's split pattern, specials after the vocabulary of so many words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    turns = [f"system\nYou are a helpful assistant.\nuser\n{text}\nassistant\n" for text in texts]
    bpe.train_from_iterator(
        turns, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.add_special_tokens(SPECIALS)
    fast = Qwen2TokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIALS[1:], model_max_length=32768
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def model(directory: Path, texts: list[str], seed: int = 0) -> Path:
    """Writes a hub-format checkpoint of a small Qwen2.5-VL with random weights."""
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    fast = tokenizer(texts)
    ids = {name: fast.convert_tokens_to_ids(name) for name in SPECIALS}
    width = 160
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(fast), "hidden_size": width, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 8, 8]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 4, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": width, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    net = Qwen2_5_VLForConditionalGeneration(config)
    net.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=False,
    )
    net.save_pretrained(directory)
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=fast,
        video_processor=Qwen2VLVideoProcessor(size=size),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(directory)
    return directory
