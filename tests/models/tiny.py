"""Tiny random checkpoints of the real classes, with a real tokenizer, chat template and processors, and data for them.

Shared by every test that needs a model: `checkpoint` writes one to disk as the library would, `record` makes a row of
a data file with real pictures and videos, `sample` makes a Sample without the chat room.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from polymodal.core.sample import IGNORE, Media, MediaShape, Message, Record, Sample, SampleLengths, Span

PATCH = 4  # pixels; two by two patches are one token, so a picture's sides are multiples of 8 pixels
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = """What is in this picture? Describe the video. The first image shows the digit seven, the second a nine.
You are a helpful assistant. user assistant system seconds tool which number is written here? It is a three. yes no
图片里有什么? 这是一个数字。 How many red squares are there between the blue circle and the green line? Answer with a number."""

TEMPLATE = """{%- macro body(content) -%}
{%- if content is string %}{{ content }}{% else %}{% for part in content %}
{%- if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
{%- endmacro -%}
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ body(messages[0].content) }}{{ '\n\n' }}{% endif %}
{{- '# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' }}{{ body(messages[0].content) }}{{ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' }}{{ body(message.content) }}{{ '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{{ body(message.content or '') }}
{%- for call in message.tool_calls or [] %}{% set call = call.function or call %}
{{- '\n<tool_call>\n' }}{{ {'name': call.name, 'arguments': call.arguments} | tojson }}{{ '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' }}{{ body(message.content) }}{{ '\n</tool_response><|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

NAMES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")


@functools.cache
def tokenizer(size: int = 700) -> Any:
    """A byte-level BPE with Qwen's splitting, its special tokens and a chat template in its format."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    core.add_special_tokens(SPECIALS)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[3:],
    )
    made.chat_template = TEMPLATE
    return made


def config(name: str, tied: bool = False, **overrides: Any) -> Any:
    """The transformers config of a card's tiny model; overrides by dotted name (dots may be written as `__`)."""
    import transformers

    tokens = tokenizer()
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokens) // 16) * 16, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": tied,
        "bos_token_id": tokens.convert_tokens_to_ids("<|endoftext|>"), "eos_token_id": tokens.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "intermediate_size": 48, "out_hidden_size": 64,
    }  # fmt: skip
    kind = {
        "qwen2-vl": "Qwen2VL",
        "qwen2.5-vl": "Qwen2_5_VL",
        "qwen3-vl": "Qwen3VL",
        "qwen3-vl-moe": "Qwen3VLMoe",
    }[name]
    if name == "qwen2-vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        del vision["intermediate_size"], vision["out_hidden_size"]
    if name == "qwen2.5-vl":
        vision |= {"fullatt_block_indexes": [1, 3], "window_size": 4 * PATCH, "tokens_per_second": 2}
    if name.startswith("qwen3"):
        vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
        text |= {"head_dim": 16}
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        }
        del text["bos_token_id"], text["eos_token_id"]
    if name == "qwen3-vl-moe":
        text |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.01,
        }
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"text_config": text, "vision_config": vision}[section][leaf] = value
    ids = {
        f"{word}_token_id": tokens.convert_tokens_to_ids(f"<|{word}|>")
        for word in ("vision_start", "vision_end")
    }
    ids |= {
        f"{word}_token_id": tokens.convert_tokens_to_ids(f"<|{word}_pad|>") for word in ("image", "video")
    }
    return getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
    )


def checkpoint(
    name: str,
    directory: str | Path,
    tied: bool = False,
    seed: int = 0,
    dtype: Any = torch.float32,
    **overrides: Any,
) -> Path:
    """Write a random model of the card's class as a hub checkpoint: weights, config, tokenizer, processors.

    overrides: config keys, e.g. text_config__num_hidden_layers=2. Returns the directory.
    """
    import transformers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    settings = config(name, tied, **overrides)
    model = transformers.AutoModelForImageTextToText.from_config(settings, dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # the library starts biases at 0 and norms at 1: nothing would notice if they were lost
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
    model.to(dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    processors(name)[0].save_pretrained(directory)
    processors(name)[1].save_pretrained(directory)
    eos = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    made = {
        "eos_token_id": eos,
        "pad_token_id": eos[1],
        "do_sample": False,
        "transformers_version": transformers.__version__,
    }
    (directory / "generation_config.json").write_text(json.dumps(made, indent=1))
    return directory


def processors(name: str) -> tuple[Any, Any]:
    """(image processor, video processor) for tiny pictures: 64 to 4096 pixels."""
    import transformers

    size = {"shortest_edge": 64, "longest_edge": 4096}
    common = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    image = transformers.Qwen2VLImageProcessor(size=size, **common)
    if name.startswith("qwen3"):
        volume = {"shortest_edge": 256, "longest_edge": 16384}
        return image, transformers.Qwen3VLVideoProcessor(size=volume, **common)
    return image, transformers.Qwen2VLVideoProcessor(size=size, **common)


def processor(name: str) -> Any:
    """The library's own processor of the card, as a reference."""
    import transformers

    kind = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL"}.get(name, "Qwen3VL")
    image, video = processors(name)
    return getattr(transformers, f"{kind}Processor")(image, tokenizer(), video, chat_template=TEMPLATE)


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """A picture with structure: a gradient, a bar and noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack(
        [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y + seed) % 64 * 4], -1
    )
    pixels[:, (seed * 5) % width] = 255
    return Image.fromarray((pixels + generator.integers(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8))


def clip(frames: int = 5, width: int = 24, height: int = 16, seed: int = 0) -> np.ndarray:
    """A video, uint8 [F, H, W, 3]."""
    return np.stack([np.asarray(picture(width, height, seed + frame)) for frame in range(frames)])


def record(directory: str | Path, images: int = 1, videos: int = 0, question: str = "What is in this picture?",
           answer: str = "It is a three.", seed: int = 0) -> Record:  # fmt: skip
    """A row with real files in `directory`: PNG pictures of several sizes, videos as lists of frame files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parts: list[str | Media] = []
    for index in range(images):
        path = directory / f"picture-{seed}-{index}.png"
        picture(16 + 8 * ((seed + index) % 4), 16 + 8 * (index % 3), seed + index).save(path)
        parts.append(Media("image", str(path)))
    for index in range(videos):
        paths = []
        for number, frame in enumerate(clip(4 + index, seed=seed + index)):
            paths.append(directory / f"frame-{seed}-{index}-{number}.png")
            Image.fromarray(frame).save(paths[-1])
        parts.append(Media("video", tuple(str(path) for path in paths)))
    messages = (Message("user", (*parts, question)), Message("assistant", (answer,)))
    return Record(messages, f"tiny.jsonl, line {seed + 1}")


def sample(
    media: Any, parts: Sequence[str | Image.Image | np.ndarray], id: int = 0, seconds: float = 0.5
) -> Sample:
    """A Sample of texts, pictures and videos (uint8 [F, H, W, 3], frames `seconds` apart), loss on every text token."""
    ids: list[int] = []
    trained: list[bool] = []
    spans: list[Span] = []
    features: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        if isinstance(part, str):
            new = media.tokenizer.encode(part, add_special_tokens=False)
            trained += [True] * len(new)
        else:
            span = media.span(shape_of(part, seconds))
            for stream, (rows, size) in media.features(span.shape, part).items():
                assert tuple(size[0].tolist()) == tuple(span.parts[0].size)
                assert rows.shape[0] == math.prod(span.parts[0].size)
                features.setdefault(stream, []).append(rows)
            new = list(span.ids)
            trained += [False] * len(new)
            spans.append(span)
        ids += new
    input_ids = torch.tensor(ids)
    keep = torch.tensor([*trained[1:], False])
    labels = torch.where(keep, torch.roll(input_ids, -1), IGNORE)
    tensors = {
        "input_ids": input_ids,
        "labels": labels,
        "weights": keep.float(),
        "position_ids": media.position_ids(input_ids, spans),
    }
    lengths: dict[str, tuple[int, ...]] = {}
    for stream in media.streams:
        own = [part for span in spans for part in span.parts if part.stream == stream.name]
        if own:
            tensors |= {
                stream.tensor: torch.cat(features[stream.name]),
                stream.sizes: torch.tensor([part.size for part in own]),
            }
            lengths[stream.name] = tuple(n for part in own for n in part.lengths)
    measure = SampleLengths(len(ids), int(keep.sum()), lengths)
    return Sample(id, tensors, measure, streams=media.streams)


def shape_of(part, seconds: float = 0.5) -> MediaShape:
    """What a header says of a PIL image or of frames uint8 [F, H, W, 3] that are `seconds` apart."""
    if isinstance(part, np.ndarray):
        frames = len(part)
        times = tuple(seconds * i for i in range(frames))
        return MediaShape("video", part.shape[1], part.shape[2], frames, times, 2 * seconds)
    return MediaShape("image", part.height, part.width)
