"""Qwen3-ASR: speech in 30 languages -> its language and its text. Qwen3-Omni's audio tower
before a Qwen3 language model.

The net is transformers' Qwen3ASRForConditionalGeneration. Repositories whose name ends in -hf have its
layout; those without have the authors' own (`thinker.` before every tensor, its config inside another), read
and written here by rules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models import partial
from polymodal.models.audio.qwen3_asr_media import Qwen3ASRMedia
from polymodal.models.card import Chain, Size
from polymodal.models.omni.qwen_sound import (
    AUDIO,
    BLOCKS,
    BLOCKS_PLAN,
    QWEN3_FRONT,
    TOWER,
    Qwen3Sound,
    iterate_blocks,
)
from polymodal.models.omni.thinker import changed_values
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.vision_language import language_chain, vision_language_card
from polymodal.recipe import Data

PROJECTOR = "model.multi_modal_projector"
LAYERS = (f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2")
SECTIONS = ("text_config", "audio_config")
RULES = (
    (r"^thinker\.lm_head", "lm_head"),
    (r"^thinker\.model", "model.language_model"),
    (r"^thinker\.audio_tower\.proj1", LAYERS[0]),
    (r"^thinker\.audio_tower\.proj2", LAYERS[1]),
    (r"^thinker\.audio_tower", TOWER),
)
"""Names of the authors' tensors -> the library's (huggingface/transformers: convert_qwen3_asr_to_hf.py)."""


def is_original(directory: Path) -> bool:
    return "thinker_config" in read_json(directory / "config.json")


class Qwen3ASR(Qwen3Sound):
    line = "qwen3-asr"
    auto = "AutoModelForMultimodalLM"
    streams = (AUDIO,)
    projector = LAYERS

    # -- the authors' layout

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        if not is_original(directory):
            return super().read_config(directory, trust)
        from transformers import Qwen3ASRConfig

        raw = read_json(directory / "config.json")
        inner = dict(raw["thinker_config"])
        text = {
            k: v for k, v in inner.pop("text_config").items() if k not in ("rope_scaling", "rope_parameters")
        }
        rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 1e6)}
        sound = {k: v for k, v in inner.pop("audio_config").items() if k != "max_source_positions"}
        return Qwen3ASRConfig(
            text_config={**text, "model_type": "qwen3", "rope_parameters": rope},
            audio_config={**sound, "model_type": "qwen3_asr_encoder"},
            audio_token_id=inner["audio_token_id"],
            tie_word_embeddings=text.get("tie_word_embeddings", True),
            dtype=inner.get("dtype") or raw.get("torch_dtype"),
            architectures=raw.get("architectures"),
        )

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        if not is_original(origin):
            return super().write_config(config, origin, directory)
        raw, before = read_json(origin / "config.json"), cls.read_config(origin)
        inner = raw["thinker_config"]
        for name in SECTIONS:
            inner[name] |= changed_values(getattr(before, name), getattr(config, name))
        inner |= changed_values(before, config)
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    def tensor_names(cls, directory: Path) -> list[Any] | None:
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(*pair) for pair in RULES] if is_original(directory) else None

    # -- the model

    def build(self) -> nn.Module:
        model: Any = super().build()
        tower = model.model.audio_tower
        iterate_blocks(tower)
        setattr(tower.conv_out, partial.WRITTEN, True)  # positions are added in place
        return model

    def media_processor(self, data: Data) -> Qwen3ASRMedia:  # type: ignore[override]
        return Qwen3ASRMedia(self.source, self.config, data)

    def check(self) -> None:
        super().check()
        self.check_windows()
        audio, text = self.config.audio_config, self.config.text_config
        if audio.output_dim != text.hidden_size:
            raise PolymodalError(
                f"model.config: the projector gives features of {audio.output_dim}, the language model "
                f"takes {text.hidden_size}.",
                "Set text_config.hidden_size and audio_config.output_dim alike.",
            )

    def sound(self, model: nn.Module, rows: Tensor, frames: Tensor, device: torch.device) -> Tensor:
        inner: Any = model.model
        padded, lengths = self.chunks(rows, frames)
        mask = torch.arange(padded.shape[-1]) < torch.tensor(lengths)[:, None]
        tower = inner.audio_tower
        heard = tower(
            input_features=padded.to(tower.conv2d1.weight.dtype),
            input_features_mask=mask.to(device),
            **self.attended(frames, device),
        ).last_hidden_state
        return inner.multi_modal_projector(heard)


def _size(name: str, parameters: float, text: tuple[int, int], audio: tuple[int, int, int]) -> Size:
    """text: width, width of the MLP; audio: width, layers, heads."""
    config = {
        "model_type": "qwen3_asr",
        "text_config": {
            "model_type": "qwen3",
            "hidden_size": text[0],
            "intermediate_size": text[1],
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 65536,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "audio_config": {
            "model_type": "qwen3_asr_encoder",
            "d_model": audio[0],
            "encoder_layers": audio[1],
            "encoder_attention_heads": audio[2],
            "encoder_ffn_dim": 4 * audio[0],
            "output_dim": text[0],
        },
    }
    hub = f"Qwen/Qwen3-ASR-{name}-hf"
    return Size(hub, parameters, 28, devices=1, layout={}, config=config)


CARD = vision_language_card(
    name="qwen3-asr",
    title="Qwen3-ASR",
    family=Qwen3ASR,
    kind="audio",
    architectures=("Qwen3ASRForConditionalGeneration", "qwen3_asr"),
    tasks=("speech-recognition",),
    keywords=("qwen asr", "hot words", "chinese dialects", "speech recognition by a language model"),
    blocks=(BLOCKS, "model.language_model.layers.*"),
    towers={
        "audio": (*QWEN3_FRONT, f"{TOWER}.layers", f"{TOWER}.ln_post"),
        "projector": (PROJECTOR,),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "audio": Chain(
            BLOCKS,
            first=QWEN3_FRONT,
            last=(f"{TOWER}.ln_post", PROJECTOR, "model.language_model.embed_tokens"),
        ),
        "language": language_chain(),
    },
    tensor_plan={**TEXT_PLAN, **DENSE_PLAN, **BLOCKS_PLAN, f"{TOWER}.ln_post": "exit"},
    sizes={
        "0.6b": _size("0.6B", 0.78, (1024, 3072), (896, 18, 14)),
        "1.7b": _size("1.7B", 2.04, (2048, 6144), (1024, 24, 16)),
    },
    aliases=("qwen3asr", "qwen3_asr", "qwen-asr"),
    verified="tiny models of the class: logits and every gradient equal the library's; "
    "packed equals separate",
    seeds=("0.6b", "1.7b"),
)
