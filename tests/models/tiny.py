"""Tiny random checkpoints of the real classes, with a real tokenizer, chat template and processors, and data for them.

Shared by every test that needs a model: `checkpoint` writes one to disk as the library would, `record` makes a row of
a data file with real pictures and videos, `sample` makes a Sample without ChatProcessor.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from polymodal.core.sample import IGNORE, Media, MediaShape, Message, Record, Sample, SampleLengths, Span
from polymodal.models.nets import deepseek_vl2, deepseek_vl2_processor, minicpmv, minicpmv_processor
from polymodal.models.understanding import internvl_chat

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
INTERNVL = ("internvl", "internvl-moe", "internvl-6b", "internvl-llama")
"""InternVL with a Qwen2, a Qwen3 MoE, a Qwen2 and a Llama model; the third has a tower as InternViT-6B's."""
DEEPSEEK = ("deepseek-vl2", "deepseek-vl2-mha", "deepseek-vl2-bias")
"""As small (latent attention), tiny (plain heads) and base (a router with a bias) are."""
MINICPM = ("minicpm-v-2.6", "minicpm-v-2.5")
"""With the grids of its slices and a Qwen2 model, without and with a Llama model."""
MINICPM_SPECIALS = [
    *minicpmv_processor.TOKENS, "<image_id>", "</image_id>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
]  # fmt: skip
LLAVA_TEMPLATE = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{%- if message['role'] != 'assistant' %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}
{%- else %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""As llava-hf/llava-1.5-7b-hf has it: pictures of a turn first, a generation block, no end of an answer."""
OMNI = "qwen2.5-omni"
OMNI_TOKENS = {
    **{f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "video", "audio")},
    **{f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")},
}
OMNI_TEMPLATE = (
    TEMPLATE.replace("vision_start", "vision_bos")
    .replace("vision_end", "vision_eos")
    .replace("<|image_pad|>", "<|IMAGE|>")
    .replace("<|video_pad|>", "<|VIDEO|>")
    .replace(
        "{%- elif 'text' in part",
        "{%- elif part.type == 'audio' or 'audio' in part %}<|audio_bos|><|AUDIO|><|audio_eos|>\n{%- elif 'text' in part",
    )
)
OMNI3 = "qwen3-omni"
OMNIS = (OMNI, OMNI3)
OMNI3_TOKENS = {
    **{f"{kind}_token": f"<|{kind}_pad|>" for kind in ("image", "video", "audio")},
    **{f"{kind}_bos_token": f"<|{kind}_start|>" for kind in ("vision", "audio")},
    **{f"{kind}_eos_token": f"<|{kind}_end|>" for kind in ("vision", "audio")},
}
OMNI3_TEMPLATE = TEMPLATE.replace(
    "{%- elif 'text' in part",
    "{%- elif part.type == 'audio' or 'audio' in part %}<|audio_start|><|audio_pad|><|audio_end|>\n{%- elif 'text' in part",
)
BANDS, HEARD_SECONDS = 16, 6
"""Mel bands, and the longest sound of the tiny omni models. Windows of Qwen2.5-Omni are 8 frames, 80 ms; those of
Qwen3-Omni two chunks of a second, which its library does not allow to be shorter."""
DATA = {name: {"video": {"min_pixels": 64, "max_pixels": 4096}} for name in OMNIS}
"""data sections of models whose video limits are no part of their files."""
ASR = "qwen3-asr"
ASR_TOKENS = {name: text for name, text in OMNI3_TOKENS.items() if name.startswith("audio")}
ASR_TEMPLATE = """{% set said = messages | selectattr('role', 'equalto', 'system') | list %}
{{- '<|im_start|>system\n' }}{% for m in said %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}
{%- for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
{%- if p.type == 'audio' or 'audio' in p %}<|audio_start|><|audio_pad|><|audio_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""As the model was trained: a system turn always, that holds the context; the recording; what is said."""
GLM = ("glm4.1v", "glm4.5v")
GLM_SPECIALS = [
    "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>",
    "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>",
]  # fmt: skip
GLM_TEMPLATE = """[gMASK]<sop>{% for turn in messages %}{{ '<|' + turn.role + '|>\n' }}
{%- if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}
{%- if part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>{% elif part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>
{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
"""As zai-org/GLM-4.1V-9B-Thinking writes a conversation: the next role ends a turn, and nothing the last."""
TILE = 16  # pixels; a tile is 16 patches and 4 tokens


@functools.cache
def tokenizer(
    size: int = 700,
    internvl: bool = False,
    llava: bool = False,
    omni: str = "",
    deepseek: bool = False,
    minicpm: bool = False,
    glm: bool = False,
) -> Any:
    """A byte-level BPE with Qwen's splitting, its special tokens and a chat template in its format; or
    InternVL's, or LLaVA's, or GLM's."""
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
    core.add_special_tokens(GLM_SPECIALS if glm else SPECIALS)
    if glm:
        made = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            additional_special_tokens=GLM_SPECIALS[1:],
        )
        made.chat_template = GLM_TEMPLATE
        return made
    if internvl:
        named = dict(internvl_chat.TOKENS)
        core.add_special_tokens(list(named.values()))
        made = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens=named,
        )
        made.chat_template = internvl_chat.TEMPLATE
        return made
    if omni:
        named = {OMNI: OMNI_TOKENS, OMNI3: OMNI3_TOKENS, ASR: ASR_TOKENS}[omni]
        core.add_tokens(["<asr_text>"] if omni == ASR else [])
        core.add_special_tokens(list(named.values()))
        made = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens=named,
        )
        made.chat_template = {OMNI: OMNI_TEMPLATE, OMNI3: OMNI3_TEMPLATE, ASR: ASR_TEMPLATE}[omni]
        return made
    if deepseek:
        core.add_special_tokens([*deepseek_vl2_processor.TOKENS, deepseek_vl2_processor.PAD])
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<|endoftext|>",
            eos_token="<|im_end|>",
            pad_token=deepseek_vl2_processor.PAD,
        )
    if minicpm:
        core.add_special_tokens(MINICPM_SPECIALS)
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<|endoftext|>",
            eos_token="<|im_end|>",
            unk_token="<unk>",
            pad_token="<|endoftext|>",
        )
    if llava:
        core.add_special_tokens(["<image>"])
        made = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>"
        )
        made.chat_template = LLAVA_TEMPLATE
        return made
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[3:],
    )
    made.chat_template = TEMPLATE
    return made


def internvl_config(name: str, tied: bool, overrides: dict[str, Any]) -> Any:
    import transformers

    tokens = tokenizer(internvl=True)
    text: dict[str, Any] = {
        "model_type": {"internvl-moe": "qwen3_moe", "internvl-llama": "llama"}.get(name, "qwen2"),
        "vocab_size": -(-len(tokens) // 16) * 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": tokens.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokens.eos_token_id,
    }
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": TILE,
        "patch_size": PATCH,
        "attention_bias": True,
    }
    if name == "internvl-moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        text |= {"decoder_sparse_step": 1, "router_aux_loss_coef": 0.01}
    if name == "internvl-6b":
        vision |= {"hidden_size": 40, "num_attention_heads": 5, "attention_bias": False}
        vision |= {"use_qk_norm": True, "norm_type": "rms_norm"}
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"text_config": text, "vision_config": vision}[section][leaf] = value
    return transformers.InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )


def llava_config(tied: bool, overrides: dict[str, Any]) -> Any:
    import transformers

    tokens = tokenizer(llava=True)
    text: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": -(-len(tokens) // 16) * 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "bos_token_id": tokens.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokens.eos_token_id,
    }
    vision: dict[str, Any] = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": TILE,
        "patch_size": PATCH,
        "projection_dim": 32,
    }
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"text_config": text, "vision_config": vision}[section][leaf] = value
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
        tie_word_embeddings=tied,
    )


def omni_config(tied: bool, overrides: dict[str, Any]) -> Any:
    """The thinker's."""
    import transformers

    tokens = tokenizer(omni=OMNI)
    ids = {name: tokens.convert_tokens_to_ids(text) for name, text in OMNI_TOKENS.items()}
    parts: dict[str, dict[str, Any]] = {
        "text_config": {
            "vocab_size": -(-len(tokens) // 16) * 16, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            "depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3], "window_size": 4 * PATCH,
        },
        "audio_config": {
            "num_mel_bins": BANDS, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "d_model": 32, "max_source_positions": 100, "n_window": 4, "output_dim": 64,
        },
    }  # fmt: skip
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        parts[section][leaf] = value
    return transformers.Qwen2_5OmniThinkerConfig(
        **parts,
        **{f"{kind}_token_index": ids[f"{kind}_token"] for kind in ("image", "video", "audio")},
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=0,
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        tie_word_embeddings=tied,
    )


def omni3_config(tied: bool, overrides: dict[str, Any]) -> Any:
    """The thinker's."""
    import transformers

    tokens = tokenizer(omni=OMNI3)
    ids = {name: tokens.convert_tokens_to_ids(text) for name, text in OMNI3_TOKENS.items()}
    parts: dict[str, dict[str, Any]] = {
        "text_config": {
            "vocab_size": -(-len(tokens) // 16) * 16, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 4096, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
            "router_aux_loss_coef": 0.01,
        },
        "vision_config": {
            "depth": 4, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        "audio_config": {
            "num_mel_bins": BANDS, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "d_model": 32, "max_source_positions": 100, "n_window": 50, "n_window_infer": 200, "output_dim": 64,
            "downsample_hidden_size": 4,
        },
    }  # fmt: skip
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        parts[section][leaf] = value
    return transformers.Qwen3OmniMoeThinkerConfig(
        **parts,
        **{f"{kind}_token_id": ids[f"{kind}_token"] for kind in ("image", "video", "audio")},
        audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
        user_token_id=0,
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
        position_id_per_seconds=13,
        tie_word_embeddings=tied,
    )


def asr_config(overrides: dict[str, Any]) -> Any:
    """With a tied head, as both published sizes have."""
    import transformers

    tokens = tokenizer(omni=ASR)
    parts: dict[str, dict[str, Any]] = {
        "text_config": {
            "model_type": "qwen3", "vocab_size": -(-len(tokens) // 16) * 16, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 4096, "tie_word_embeddings": True,
        },
        "audio_config": {
            "model_type": "qwen3_asr_encoder", "num_mel_bins": BANDS, "encoder_layers": 4,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32, "n_window_infer": 200,
            "output_dim": 64, "downsample_hidden_size": 4,
        },
    }  # fmt: skip
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        parts[section][leaf] = value
    ids = {"audio_token_id": tokens.audio_token_id, "pad_token_id": tokens.pad_token_id}
    ids["timestamp_token_id"] = tokens.pad_token_id  # of the aligner
    return transformers.Qwen3ASRConfig(**parts, **ids, eos_token_id=tokens.eos_token_id)


def deepseek_config(name: str, overrides: dict[str, Any]) -> Any:
    """With tiles of 5 x 5 patches, so that the projector fills them up."""
    tokens = tokenizer(deepseek=True)
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokens) // 16) * 16,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "aux_loss_alpha": 0.01,
        "max_position_embeddings": 4096,
        "use_mla": name != "deepseek-vl2-mha",
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    if name == "deepseek-vl2-mha":
        text |= {"kv_lora_rank": None, "qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0}
    if name == "deepseek-vl2-bias":
        text |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
        text |= {"routed_scaling_factor": 2.0}
    vision: dict[str, Any] = {
        "image_size": 5 * PATCH,
        "patch_size": PATCH,
        "width": 32,
        "layers": 4,
        "heads": 2,
    }
    vision |= {"mlp_ratio": 1.5, "model_name": "siglip"}
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"language_config": text, "vision_config": vision}[section][leaf] = value
    side = 5 * PATCH
    return deepseek_vl2.DeepseekVL2Config(
        language_config=text,
        vision_config=vision,
        projector_config={"input_dim": 32, "n_embed": 64},
        candidate_resolutions=[[side * n, side * m] for n in (1, 2, 3) for m in (1, 2, 3) if n * m <= 4],
    )


def minicpm_config(name: str, overrides: dict[str, Any]) -> Any:
    """With slices of about 4 x 4 patches, and rows as wide as a head of the resampler is."""
    tokens = tokenizer(minicpm=True)
    whole: dict[str, Any] = {
        "vocab_size": -(-len(tokens) // 16) * 16,
        "hidden_size": 256,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "query_num": 3,
        "drop_vision_last_layer": False,
        "batch_vision_input": False,
        "slice_config": {"max_slice_nums": 4, "scale_resolution": 4 * PATCH},
    }
    vision: dict[str, Any] = {
        "model_type": "siglip_vision_model" if name.endswith("2.6") else "idefics2",
        "image_size": 6 * PATCH,
        "patch_size": PATCH,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"text_config": whole, "": whole, "vision_config": vision}[section][leaf] = value
    return minicpmv.MiniCPMVConfig(**whole, vision_config=vision)


def config(name: str, tied: bool = False, **overrides: Any) -> Any:
    """The transformers config of a card's tiny model; overrides by dotted name (dots may be written as `__`)."""
    import transformers

    if name in INTERNVL:
        return internvl_config(name, tied, overrides)
    if name == "llava":
        return llava_config(tied, overrides)
    if name == OMNI:
        return omni_config(tied, overrides)
    if name == OMNI3:
        return omni3_config(tied, overrides)
    if name == ASR:
        return asr_config(overrides)
    if name in DEEPSEEK:
        return deepseek_config(name, overrides)
    if name in MINICPM:
        return minicpm_config(name, overrides)
    tokens = tokenizer(glm=name in GLM)
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
        "glm4.1v": "Glm4v",
        "glm4.5v": "Glm4vMoe",
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
    if name in GLM:
        text["rope_parameters"] |= {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        vision |= {"image_size": 6 * PATCH, "out_hidden_size": 64}
        text["pad_token_id"] = tokens.pad_token_id
    if name == "glm4.5v":
        text |= {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "router_aux_loss_coef": 0.01}
    for key, value in overrides.items():
        section, _, leaf = key.replace("__", ".").rpartition(".")
        {"text_config": text, "vision_config": vision}[section][leaf] = value
    if name in GLM:
        words = {"image": "image", "video": "video"}
        words |= {f"{kind}_start": f"begin_of_{kind}" for kind in ("image", "video")}
        words |= {f"{kind}_end": f"end_of_{kind}" for kind in ("image", "video")}
        ids = {f"{key}_token_id": tokens.convert_tokens_to_ids(f"<|{word}|>") for key, word in words.items()}
        return getattr(transformers, f"{kind}Config")(
            text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids
        )
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
    if name in OMNIS:
        model = omni_model(settings) if name == OMNI else omni3_model(settings)
    elif name == ASR:
        model = transformers.Qwen3ASRForConditionalGeneration(settings)
    else:
        model = transformers.AutoModelForImageTextToText.from_config(settings, dtype=torch.float32)
    with (
        torch.no_grad()
    ):  # the library starts biases at 0 and norms at 1: nothing would notice if they were lost
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3.0)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    model.to(dtype).save_pretrained(directory)
    kinds = {"internvl": name in INTERNVL, "deepseek": name in DEEPSEEK, "glm": name in GLM}
    kinds["minicpm"] = name in MINICPM
    tokens = tokenizer(llava=name == "llava", omni=name if name in (*OMNIS, ASR) else "", **kinds)
    if name == OMNI:
        torch.save({"Chelsie": {"bos_token": 1}}, directory / "spk_dict.pt")
    if name in DEEPSEEK:
        tokens.save_pretrained(directory)
        (directory / "processor_config.json").write_text(json.dumps({"sft_format": "deepseek"}))
    elif name in MINICPM:
        tokens.save_pretrained(directory)
    elif name in (*INTERNVL, "llava", *OMNIS, ASR, *GLM):
        processor(name).save_pretrained(directory)
    else:
        tokens.save_pretrained(directory)
        processors(name)[0].save_pretrained(directory)
        processors(name)[1].save_pretrained(directory)
    ends = ["<|user|>", "<|endoftext|>"] if name in GLM else ["<|im_end|>", "<|endoftext|>"]
    eos = tokens.convert_tokens_to_ids(ends)
    made = {
        "eos_token_id": eos,
        "pad_token_id": eos[1],
        "do_sample": False,
        "transformers_version": transformers.__version__,
    }
    (directory / "generation_config.json").write_text(json.dumps(made, indent=1))
    return directory


def omni_model(thinker: Any) -> Any:
    """The whole model, with a talker and a token2wav as small as they can be."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    talker = {
        "vocab_size": 64, "embedding_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tts_codec_start_token_id": 60,
        "tts_codec_end_token_id": 61, "tts_codec_pad_token_id": 62, "tts_codec_mask_token_id": 63,
        "rope_parameters": rope,
    }  # fmt: skip
    diffusion = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1, "emb_dim": 16,
        "head_dim": 16, "look_ahead_layers": [0], "look_backward_layers": [0], "num_embeds": 65, "mel_dim": 16,
        "enc_emb_dim": 16, "enc_dim": 16, "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 4,
        "enc_res2net_scale": 2, "enc_se_channels": 4,
    }  # fmt: skip
    vocoder = {
        "mel_dim": 16, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3, 5]], "upsample_rates": [2], "upsample_kernel_sizes": [4],
    }  # fmt: skip
    whole = transformers.Qwen2_5OmniConfig(
        thinker_config=thinker.to_dict(),
        talker_config=talker,
        token2wav_config={"dit_config": diffusion, "bigvgan_config": vocoder},
    )
    return transformers.Qwen2_5OmniForConditionalGeneration(whole)


def omni3_model(thinker: Any) -> Any:
    """The whole model, with a talker and a code2wav as small as they can be."""
    import transformers

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    sparse = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    sparse |= {"shared_expert_intermediate_size": 16, "rope_parameters": rope}
    talker = {
        "text_config": small | sparse,
        "code_predictor_config": small | {"num_code_groups": 2},
        "num_code_groups": 2,
        "thinker_hidden_size": 64,
        "accept_hidden_layer": 1,
        "spatial_merge_size": 2,
    }
    code2wav = {
        "codebook_size": 16, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_quantizers": 2, "upsample_rates": [2],
        "upsampling_ratios": [2], "decoder_dim": 16,
    }  # fmt: skip
    whole = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker.to_dict(), talker_config=talker, code2wav_config=code2wav
    )
    made = transformers.Qwen3OmniMoeForConditionalGeneration(whole)
    for name, parameter in made.talker.named_parameters():
        if ".experts." in name:  # the library leaves them as memory has them
            torch.nn.init.normal_(parameter, std=0.02)
    return made


def original_internvl(name: str, source: Path, directory: str | Path) -> Path:
    """A tiny InternVL (`checkpoint`) as its authors would publish it: their keys, config.json and tokenizer
    files.

    Written from the published repositories' files, not by the rules that are tested. internvl-llama becomes
    InternLM2.
    """
    from safetensors.torch import load_file, save_file

    directory = Path(directory)
    directory.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    internlm = name == "internvl-llama"
    state = {}
    held = load_file(source / "model.safetensors")
    for key, tensor in held.items():
        key = key.removeprefix("model.")
        if key.endswith("lm_head.weight"):
            key = f"language_model.{'output' if internlm else 'lm_head'}.weight"
        elif key.startswith("language_model."):
            key = key.removeprefix("language_model.").removeprefix("model.")
            for ours, theirs in (
                (
                    ("embed_tokens", "tok_embeddings"),
                    ("self_attn.o_proj", "attention.wo"),
                    ("mlp.gate_proj", "feed_forward.w1"),
                    ("mlp.up_proj", "feed_forward.w3"),
                    ("mlp.down_proj", "feed_forward.w2"),
                    ("input_layernorm", "attention_norm"),
                    ("post_attention_layernorm", "ffn_norm"),
                )
                if internlm
                else ()
            ):
                key = key.replace(ours, theirs)
            key = f"language_model.model.{key}"
        elif key.startswith("multi_modal_projector."):
            parts = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
            _, part, leaf = key.split(".")
            key = f"mlp1.{parts[part]}.{leaf}"
        else:
            key = key.replace("vision_tower.", "vision_model.", 1)
            for ours, theirs in (
                ("cls_token", "class_embedding"),
                ("position_embeddings", "position_embedding"),
                ("patch_embeddings.projection", "patch_embedding"),
                ("encoder.layer.", "encoder.layers."),
                ("lambda_", "ls"),
                ("attention.projection_layer", "attn.proj"),
                ("attention.", "attn."),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
            ):
                key = key.replace(ours, theirs)
        state[key] = tensor
    for key in [key for key in state if ".q_proj." in key]:
        q, k, v = (
            (state.pop(key.replace("q_proj", f"{x}_proj")) for x in "qkv")
            if ".attn." in key or internlm
            else (None,) * 3
        )
        if q is None:
            continue
        if ".attn." in key:
            state[key.replace("q_proj", "qkv")] = torch.cat([q, k, v])
            continue
        rows = []  # of one head of keys after the other: its queries, the keys, the values
        size, heads = 16, text["num_key_value_heads"]
        for head in range(heads):
            rows += [
                q.chunk(heads)[head],
                k[size * head : size * (head + 1)],
                v[size * head : size * (head + 1)],
            ]
        state[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, directory / "model.safetensors")
    llm = {key: value for key, value in text.items() if key not in ("dtype", "rope_parameters")}
    llm |= {"rope_theta": text["rope_parameters"]["rope_theta"], "torch_dtype": "float32", "use_cache": False}
    llm |= {
        "_name_or_path": "elsewhere",
        "attn_implementation": "flash_attention_2",
        "return_dict": True,
        "top_k": 50,
    }
    if internlm:
        llm |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
        llm |= {"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "rope_scaling": None}
    for ours, theirs in (("use_qk_norm", "qk_normalization"), ("attention_bias", "qkv_bias")):
        vision[theirs] = vision.pop(ours)
    for key in ("image_size", "patch_size"):
        vision[key] = vision[key][0] if isinstance(vision[key], list) else vision[key]
    kept = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "qkv_bias",
        "qk_normalization",
        "norm_type",
        "layer_norm_eps",
        "num_channels",
        "hidden_act",
        "initializer_range",
    )
    vision = {key: value for key, value in vision.items() if key in kept}
    vision |= {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "drop_path_rate": 0.1,
        "dropout": 0.0,
    }
    made = {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": llm,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": vision,
    }
    (directory / "config.json").write_text(json.dumps(made, indent=2))
    shutil.copyfile(source / "generation_config.json", directory / "generation_config.json")
    (directory / "modeling_internvl_chat.py").write_text(
        "raise RuntimeError('code of a repository was run')\n"
    )
    if internlm:
        _internlm_tokenizer(directory, text["vocab_size"])
        return directory
    tokens = tokenizer(internvl=True)
    core = json.loads(tokens.backend_tokenizer.to_str())
    (directory / "vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    added = {token["content"]: token["id"] for token in core["added_tokens"] if token["content"] != "<video>"}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    about = {
        "added_tokens_decoder": {
            str(at): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for t, at in added.items()
        },
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "chat_template": "{{ messages }}",
        "model_max_length": 16384,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


def _internlm_tokenizer(directory: Path, size: int) -> None:
    """A sentencepiece model without a space before the first piece, whose last pieces are named in
    tokenizer_config.json."""
    import sentencepiece

    pieces = 420
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT * 4).splitlines()),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=pieces,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
        minloglevel=2,
        hard_vocab_limit=True,
    )
    (directory / "tokenizer.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    unused = [model.piece_to_id(f"[UNUSED_TOKEN_{at}]") for at in (1, 2)]
    ids = dict(zip(("<|im_start|>", "<|im_end|>"), unused, strict=True))
    ids |= {token: pieces + at for at, token in enumerate(("<img>", "</img>", "<IMG_CONTEXT>"))}
    about = {
        "added_tokens_decoder": {str(at): {"content": token, "special": True} for token, at in ids.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about))


def processors(name: str) -> tuple[Any, Any]:
    """(image processor, video processor) for tiny pictures: 64 to 4096 pixels, up to 6 tiles, or a square."""
    import transformers

    if name == "llava":
        square = {"height": TILE, "width": TILE}
        return transformers.CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=square), None
    if name in INTERNVL:
        tiles = {
            "size": {"height": TILE, "width": TILE},
            "image_mean": internvl_chat.MEAN,
            "image_std": internvl_chat.STD,
        }
        return (
            transformers.GotOcr2ImageProcessor(max_patches=6, **tiles),
            transformers.InternVLVideoProcessor(**tiles),
        )
    size = {"shortest_edge": 64, "longest_edge": 4096}
    common = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    if name in GLM:
        limits = {"shortest_edge": 128, "longest_edge": 8192}
        return (
            transformers.Glm4vImageProcessor(size=limits, **common),
            transformers.Glm4vVideoProcessor(size={"shortest_edge": 256, "longest_edge": 16384}, **common),
        )
    image = transformers.Qwen2VLImageProcessor(size=size, **common)
    if name.startswith("qwen3-vl"):
        volume = {"shortest_edge": 256, "longest_edge": 16384}
        return image, transformers.Qwen3VLVideoProcessor(size=volume, **common)
    return image, transformers.Qwen2VLVideoProcessor(size=size, **common)


def processor(name: str) -> Any:
    """The library's own processor of the card, as a reference."""
    import transformers

    if name in INTERNVL:
        image, video = processors(name)
        tokens = tokenizer(internvl=True)
        return transformers.InternVLProcessor(
            image, tokens, video, image_seq_length=4, chat_template=internvl_chat.TEMPLATE
        )
    if name == ASR:
        hear = transformers.Qwen3ASRFeatureExtractor(feature_size=BANDS, chunk_length=HEARD_SECONDS)
        return transformers.Qwen3ASRProcessor(hear, tokenizer(omni=ASR), chat_template=ASR_TEMPLATE)
    if name in OMNIS:
        image, video = processors(name)
        hear = transformers.WhisperFeatureExtractor(
            feature_size=BANDS, chunk_length=HEARD_SECONDS, return_attention_mask=True
        )
        kind = transformers.Qwen2_5OmniProcessor if name == OMNI else transformers.Qwen3OmniMoeProcessor
        template = OMNI_TEMPLATE if name == OMNI else OMNI3_TEMPLATE
        return kind(image, video, hear, tokenizer(omni=name), chat_template=template)
    if name in DEEPSEEK:
        images = deepseek_vl2_processor.DeepseekVL2ImageProcessor(
            config(name).candidate_resolutions, image_size=5 * PATCH
        )
        return deepseek_vl2_processor.DeepseekVL2Processor(
            images, tokenizer(deepseek=True), 3, chat_template=deepseek_vl2_processor.TEMPLATE
        )
    if name == "llava":
        return transformers.LlavaProcessor(
            processors(name)[0],
            tokenizer(llava=True),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=LLAVA_TEMPLATE,
        )
    kind = {"qwen2-vl": "Qwen2VL", "qwen2.5-vl": "Qwen2_5_VL"}.get(name, "Qwen3VL")
    image, video = processors(name)
    if name in GLM:
        return transformers.Glm4vProcessor(image, tokenizer(glm=True), video, chat_template=GLM_TEMPLATE)
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


def sound(seconds: float = 0.5, seed: int = 0) -> np.ndarray:
    """Two tones and noise, float32 [n] at 16 kHz."""
    t = np.arange(round(16000 * seconds)) / 16000
    tones = 0.3 * np.sin(2 * np.pi * (300 + 90 * seed) * t) + 0.2 * np.sin(2 * np.pi * (2100 - 70 * seed) * t)
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (tones * (t % 0.4 < 0.3) + noise).astype(np.float32)


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


def sample(media: Any, parts: Sequence[Any], id: int = 0, seconds: float = 0.5) -> Sample:
    """A Sample of texts, pictures, videos (uint8 [F, H, W, 3], frames `seconds` apart), sounds (float32 [n]) and
    videos with sound (a pair of both), loss on every text token."""
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
                own = [tuple(part.size) for part in span.parts if part.stream == stream]
                assert list(map(tuple, size.tolist())) == own
                assert rows.shape[0] == sum(map(math.prod, own))
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
    """What a header says of a part of `sample`."""
    if isinstance(part, tuple):
        return replace(shape_of(part[0], seconds), samples=len(part[1]))
    if isinstance(part, np.ndarray) and part.ndim == 1:
        return MediaShape("audio", samples=len(part))
    if isinstance(part, np.ndarray):
        frames = len(part)
        times = tuple(seconds * i for i in range(frames))
        return MediaShape("video", part.shape[1], part.shape[2], frames, times, 2 * seconds)
    return MediaShape("image", part.height, part.width)
