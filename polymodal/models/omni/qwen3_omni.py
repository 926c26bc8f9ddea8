"""Qwen3-Omni: facts. The vision tower (with deepstack) and the language model with experts are Qwen3-VL's,
the audio tower has chunks of a second.

Positions are floating: the time of a frame is a fraction where its rate is no divisor of the 13 positions of
a second, and the library does not round it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.tensors import to_device
from polymodal.models.card import Chain, Size
from polymodal.models.omni.qwen_omni_media import Qwen3OmniMedia
from polymodal.models.omni.qwen_sound import (
    BLOCKS as AUDIO_BLOCKS,
)
from polymodal.models.omni.qwen_sound import (
    BLOCKS_PLAN,
    QWEN3_FRONT,
    TOWER,
    Qwen3Sound,
    iterate_blocks,
)
from polymodal.models.omni.thinker import OMNI_KEYWORDS, TASKS, Thinker
from polymodal.models.understanding.language import EXPERTS_PLAN, SPREAD_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen3_vl_moe import Qwen3VLMoe
from polymodal.models.understanding.qwen_vl import RELATIVE, VERIFIED, vision_plan
from polymodal.models.understanding.vision_language import language_chain, vision_language_card

BLOCKS = "model.visual.blocks.*"
EMBEDDERS = ("model.visual.patch_embed", "model.visual.pos_embed")
PROJECTOR = (f"{TOWER}.proj1", f"{TOWER}.proj2")


class Qwen3Omni(Thinker, Qwen3Sound, Qwen3VLMoe):
    beside = ("talker.", "code2wav.")
    whole, settings = "qwen3_omni_moe", "Qwen3OmniMoeThinkerConfig"
    sounds = Qwen3OmniMedia
    deep_mergers = "merger_list"
    projector = PROJECTOR

    def build(self) -> nn.Module:
        model: Any = super().build()
        iterate_blocks(model.model.audio_tower)
        return model

    def check(self) -> None:
        super().check()
        self.check_windows()

    def sound(self, model: nn.Module, rows: Tensor, frames: Tensor, device: torch.device) -> Tensor:
        from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe as library

        tower: Any = model.model.audio_tower  # type: ignore[union-attr]
        padded, lengths = self.chunks(rows, frames)
        chunks = torch.tensor([*lengths, 2 * tower.n_window])  # indices of a whole chunk's rows
        valid = library.get_valid_indices(chunks, tower.n_window)[: -self.sound_tokens(2 * tower.n_window)]
        return tower(
            feature_lens=frames,
            padded_feature=padded,
            chunk_lengths=chunks[:-1],
            valid_indices=to_device(valid, device),
            **self.attended(frames, device),
        ).last_hidden_state


TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 65536,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
CONFIG = {
    "model_type": "qwen3_omni_moe_thinker",
    "text_config": TEXT,
    "vision_config": {"out_hidden_size": 2048},
    "audio_config": {"output_dim": 2048},
    "position_id_per_seconds": 13,
}


def _size(kind: str) -> Size:
    hub = f"Qwen/Qwen3-Omni-30B-A3B-{kind}"
    return Size(hub, 31.72, 48, 27, active=3.3, devices=16, config=CONFIG)


CARD = vision_language_card(
    name="qwen3-omni",
    title="Qwen3-Omni",
    family=Qwen3Omni,
    kind="omni",
    architectures=(
        "Qwen3OmniMoeForConditionalGeneration",
        Qwen3Omni.whole,
        "Qwen3OmniMoeThinkerForConditionalGeneration",
    ),
    tasks=TASKS,
    keywords=(*OMNI_KEYWORDS, "mixture of experts", "moe"),
    boxes=RELATIVE,
    blocks=(BLOCKS, AUDIO_BLOCKS, "model.language_model.layers.*"),
    towers={
        "vision": (*EMBEDDERS, "model.visual.blocks"),
        "projector": ("model.visual.merger", "model.visual.merger_list"),
        "audio": (*QWEN3_FRONT, f"{TOWER}.layers", f"{TOWER}.ln_post"),
        "audio_projector": PROJECTOR,
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(BLOCKS, first=EMBEDDERS, last=("model.visual.merger",)),
        "audio": Chain(
            AUDIO_BLOCKS,
            first=QWEN3_FRONT,
            last=(f"{TOWER}.ln_post", *PROJECTOR, "model.language_model.embed_tokens"),
        ),
        "language": language_chain(),
    },
    masked_rows={"visual_pos_masks": "deepstack_visual_embeds"},
    tensor_plan={
        **TEXT_PLAN,
        **EXPERTS_PLAN,
        **vision_plan(("linear_fc1",), "linear_fc2", ("mlp.0", "mlp.2"), "merger", "merger_list.*"),
        **BLOCKS_PLAN,
        f"{TOWER}.ln_post": "exit",
    },
    expert_plan=SPREAD_PLAN,
    sizes={
        "30b-a3b": _size("Instruct"),
        "thinking": _size("Thinking"),
        "captioner": _size("Captioner"),
    },
    aliases=("qwen3omni", "qwen3_omni", "qwen3-omni-moe"),
    verified=VERIFIED,
    seeds=("30b-a3b",),
)
