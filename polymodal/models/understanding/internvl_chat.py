"""InternVL as its authors publish it (model_type internvl_chat, code of their own that is never run): its
config.json, names of tensors, tokenizer and picture settings as transformers' InternVL has them, and back.

Facts from the published config.json files, https://huggingface.co/OpenGVLab, and from transformers'
conversion of them, https://github.com/huggingface/transformers
(models/internvl/convert_internvl_weights_to_hf.py, version 4.57).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models.family import Family

MODEL_TYPE = "internvl_chat"
TEXT_TYPES = {"internlm2": "llama", "internlm3": "llama"}  # the same architectures by other names
VISION_KEYS = {
    "qk_normalization": "use_qk_norm",
    "qkv_bias": "attention_bias",
    "dropout": "hidden_dropout_prob",
    "initializer_factor": None,
    "use_flash_attn": None,
    "drop_path_rate": None,
}
DROPPED = ("auto_map", "model_type", "architectures", "_name_or_path")
SECTIONS = {"llm_config": "text_config", "vision_config": "vision_config"}
TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SENTENCEPIECE = {
    **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
    **{"add_bos_token": True, "model_max_length": 8192},
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif part['type'] == 'video' %}{{ '<video>\\n' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""ChatML with media as the library's own InternVL checkpoints have it; published repositories have code."""


# -- config.json


def is_original(directory: str | Path) -> bool:
    path = Path(directory) / "config.json"
    return path.is_file() and read(path).get("model_type") == MODEL_TYPE


def read(path: Path) -> dict[str, Any]:
    return read_json(path)


def dump(raw: dict[str, Any], directory: Path) -> None:
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def read_config(directory: Path) -> Any:
    """A published config.json as transformers' InternVLConfig. Raises PolymodalError."""
    from transformers import CONFIG_MAPPING, InternVLConfig

    raw = read(directory / "config.json")
    text = {key: value for key, value in raw["llm_config"].items() if key not in DROPPED}
    for name in ("rope_scaling", "torch_dtype"):  # empty, as old versions wrote it
        if text.get(name, "") is None:
            del text[name]
    written = raw["llm_config"].get("model_type") or "qwen2"
    kind = TEXT_TYPES.get(written, written)
    for key, value, known in (
        ("llm_config.model_type", kind, ("qwen2", "qwen3", "qwen3_moe", "llama")),
        ("ps_version", raw.get("ps_version", "v2"), ("v2",)),
        ("select_layer", raw.get("select_layer", -1), (-1,)),
        ("llm_config.bias", bool(written != kind and text.pop("bias", False)), (False,)),
    ):
        if value not in known:
            raise PolymodalError(
                f"{directory / 'config.json'}: {key} = {value} is no InternVL that can be opened here.",
                f"Known: {', '.join(map(str, known))}.",
            )
    vision = {
        VISION_KEYS.get(key, key): value
        for key, value in raw["vision_config"].items()
        if VISION_KEYS.get(key, key) is not None and key not in DROPPED
    }
    if raw.get("force_image_size"):
        vision["image_size"] = raw["force_image_size"]
    sides = vision["image_size"] // vision["patch_size"]
    ratio = raw.get("downsample_ratio", 0.5)
    return InternVLConfig(
        text_config=CONFIG_MAPPING[kind].from_dict(text).to_dict(),
        vision_config={**vision, "use_absolute_position_embeddings": True, "use_mean_pooling": True},
        image_token_id=read_tokenizer(directory).convert_tokens_to_ids(TOKENS["context_image_token"]),
        image_seq_length=int(sides**2 * ratio**2),
        downsample_ratio=ratio,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        dtype=raw.get("dtype") or raw.get("torch_dtype") or text.get("torch_dtype"),
    )


def write_config(config: Any, origin: Path, directory: Path) -> None:
    """config.json as the source has it, with the values that differ from the source's."""
    raw, before = read(origin / "config.json"), read_config(origin)
    names = {new: old for old, new in VISION_KEYS.items() if new is not None}
    for section, part in SECTIONS.items():
        old, new = getattr(before, part).to_dict(), getattr(config, part).to_dict()
        for key, value in new.items():
            written = names.get(key, key) if section == "vision_config" else key
            if old.get(key) != value and written not in ("dtype", "architectures"):
                raw[section][written] = value[0] if written in ("image_size", "patch_size") else value
    if config.dtype is not None:
        raw["torch_dtype"] = str(config.dtype).removeprefix("torch.")
    raw["llm_config"]["tie_word_embeddings"] = config.tie_word_embeddings
    dump(raw, directory)


# -- tokenizer and pictures


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of the files, without their code; special tokens of pictures have names."""
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    if (directory / "tokenizer.model").is_file():
        return _sentencepiece_tokenizer(directory)
    kind = PreTrainedTokenizerFast if (directory / "tokenizer.json").is_file() else Qwen2Tokenizer
    tokenizer = kind.from_pretrained(directory, local_files_only=True, extra_special_tokens=dict(TOKENS))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _sentencepiece_tokenizer(directory: Path) -> Any:
    """InternLM's: a byte-pair sentencepiece model, some of whose unused pieces tokenizer_config.json renames.
    The library's own reading of such a model would give renamed pieces new ids after the last."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    model = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocabulary = {model.id_to_piece(at): at for at in range(len(model))}
    merges = generate_merges(vocabulary)
    written = read(directory / "tokenizer_config.json")
    named = {int(at): token["content"] for at, token in written.get("added_tokens_decoder", {}).items()}
    pieces = {**{at: piece for piece, at in vocabulary.items()}, **named}
    tokenizer = LlamaTokenizer(
        {piece: at for at, piece in sorted(pieces.items())},
        merges,
        **{name: written.get(name, default) for name, default in SENTENCEPIECE.items()},
        add_prefix_space=model.encode_as_pieces("a")[0] != "a",
        extra_special_tokens=dict(TOKENS),
    )
    tokenizer.add_tokens(list(named.values()), special_tokens=True)
    tokenizer.chat_template = ("{{ bos_token }}" if tokenizer.add_bos_token else "") + TEMPLATE
    return tokenizer


def read_processor(directory: Path) -> Any:
    """transformers' InternVLProcessor with the constants and settings of the published code."""
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    raw, config = read(directory / "config.json"), read_config(directory)
    tokenizer = read_tokenizer(directory)
    height, width = config.vision_config.image_size
    common = {"size": {"height": height, "width": width}, "image_mean": MEAN, "image_std": STD}
    limits = {"min_patches": raw.get("min_dynamic_patch", 1), "max_patches": raw.get("max_dynamic_patch", 12)}
    return InternVLProcessor(
        GotOcr2ImageProcessor(crop_to_patches=raw.get("dynamic_image_size", True), **limits, **common),
        tokenizer,
        InternVLVideoProcessor(**common),
        image_seq_length=config.image_seq_length,
        chat_template=tokenizer.chat_template,
    )


# -- names of tensors


class SplitGroups:
    """InternLM2's wqkv [K (G + 2) D, in], by groups: G heads of queries, one of keys, one of values."""

    supports_many_to_many = False  # as the library's ConversionOps, which it need not descend from

    def __init__(self, inverse: bool = False):
        self.inverse = inverse

    def convert(
        self,
        inputs: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        config: Any,
        **_: Any,
    ) -> dict[str, Tensor]:
        text = config.get_text_config()
        groups, heads = text.num_key_value_heads, text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        sizes = [heads // groups * size, size, size]
        given = [inputs[name] for name in source_patterns]
        parts = [value[0] if isinstance(value, list) else value for value in given]
        if self.inverse:
            split = [part.split(rows, dim=0) for part, rows in zip(parts, sizes, strict=True)]
            return {target_patterns[0]: torch.cat([split[at % 3][at // 3] for at in range(3 * groups)])}
        pieces = parts[0].split(sizes * groups, dim=0)
        return {name: torch.cat(pieces[at::3]) for at, name in enumerate(target_patterns)}

    @property
    def reverse_op(self) -> SplitGroups:
        return SplitGroups(not self.inverse)


def internlm2_rules() -> list[Any]:
    """Names of InternLM2's layers -> those of Llama's."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    names = {
        r"\.tok_embeddings": ".embed_tokens",
        r"\.attention\.wo\.": ".self_attn.o_proj.",
        r"\.feed_forward\.w1": ".mlp.gate_proj",
        r"\.feed_forward\.w3": ".mlp.up_proj",
        r"\.feed_forward\.w2": ".mlp.down_proj",
        r"\.attention_norm": ".input_layernorm",
        r"\.ffn_norm": ".post_attention_layernorm",
    }
    targets = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    split = WeightConverter("attention.wqkv.weight", targets, operations=[SplitGroups()])
    return [*(WeightRenaming(*pair) for pair in names.items()), split]


def rules(directory: Path) -> list[Any]:
    """Names of the files' tensors -> the library's, as transformers applies and reverts such rules."""
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    embeddings = r"vision_model\.embeddings"
    renames = [
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model", "model.language_model"),
        (r"^mlp1\.0", "model.multi_modal_projector.layer_norm"),
        (r"^mlp1\.1", "model.multi_modal_projector.linear_1"),
        (r"^mlp1\.3", "model.multi_modal_projector.linear_2"),
        (rf"^{embeddings}\.class_embedding", "model.vision_tower.embeddings.cls_token"),
        (rf"^{embeddings}\.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        (rf"^{embeddings}\.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
        (r"^vision_model\.encoder\.layers", "model.vision_tower.encoder.layer"),
        (r"\.ls1", ".lambda_1"),
        (r"\.ls2", ".lambda_2"),
        (r"\.attn\.proj\.", ".attention.projection_layer."),
        (r"\.attn\.q_norm", ".attention.q_norm"),
        (r"\.attn\.k_norm", ".attention.k_norm"),
        (r"\.norm1", ".layernorm_before"),
        (r"\.norm2", ".layernorm_after"),
    ]
    converters = [
        WeightConverter(
            f"attn.qkv.{what}", [f"attention.{x}_proj.{what}" for x in "qkv"], operations=[Chunk(dim=0)]
        )
        for what in ("weight", "bias")
    ]
    if read(directory / "config.json")["llm_config"].get("model_type") == "internlm2":
        renames = [(r"^language_model\.output", "lm_head"), *renames[1:]]
        converters = [*internlm2_rules(), *converters]
    return [WeightRenaming(*pair) for pair in renames] + converters


class InternVLFiles(Family):
    """Family's calls that read and write a checkpoint's directory, for both layouts."""

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        return read_config(directory) if is_original(directory) else super().read_config(directory, trust)

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        if is_original(origin):
            write_config(config, origin, directory)
        else:
            super().write_config(config, origin, directory)

    @classmethod
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        if is_original(directory):
            return read_processor(directory)
        return super().read_processor(directory, trust)

    @classmethod
    def write_processor(cls, processor: Any, directory: Path) -> None:
        if not is_original(directory):
            super().write_processor(processor, directory)
        elif processor.chat_template == read_processor(directory).chat_template:
            tiles = processor.image_processor  # their numbers are where the published code reads them
            numbers = {"min_dynamic_patch": tiles.min_patches, "max_dynamic_patch": tiles.max_patches}
            dump(read(directory / "config.json") | numbers, directory)
        else:
            raise PolymodalError(
                "data.chat_template cannot be kept in the authors' layout, who have it in their code.",
                "Export in the library's layout: --format transformers.",
            )

    @classmethod
    def tensor_names(cls, directory: Path) -> list[Any] | None:
        return rules(directory) if is_original(directory) else None
