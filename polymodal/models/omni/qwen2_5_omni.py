"""Qwen2.5-Omni: facts. The vision tower and the language model are Qwen2.5-VL's, the audio tower is Whisper's
over windows of two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.tensors import to_device
from polymodal.distributed import attention as packed_attention
from polymodal.models.card import Chain, Size
from polymodal.models.omni.qwen_omni_media import QwenOmniMedia
from polymodal.models.omni.qwen_sound import (
    BLOCKS as AUDIO_BLOCKS,
)
from polymodal.models.omni.qwen_sound import (
    BLOCKS_PLAN,
    TOWER,
    AudioBlocks,
    iterate_blocks,
    pair_tokens,
)
from polymodal.models.omni.thinker import OMNI_KEYWORDS, TASKS, Thinker
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen2_5_vl import Qwen25VL
from polymodal.models.understanding.qwen_vl import VERIFIED, vision_plan
from polymodal.models.understanding.vision_language import language_chain, vision_language_card

BLOCKS = "model.visual.blocks.*"


class StreamEnd(nn.Module):
    """Behind the last block of the audio tower: where its stream ends, cut over ranks and over stages."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class PooledBlocks(AudioBlocks):
    behind = ("avg_pooler",)


class Qwen25Omni(Thinker, Qwen25VL):
    beside = ("talker.", "token2wav.")
    beside_files = ("spk_dict.pt",)
    whole, settings = "qwen2_5_omni", "Qwen2_5OmniThinkerConfig"
    sounds = QwenOmniMedia

    def build(self) -> nn.Module:
        """The library's model; the parameter that no feature comes from is frozen."""
        model: Any = super().build()
        tower = model.model.audio_tower
        tower.audio_bos_eos_token.requires_grad_(False)
        tower.avg_pooler = StreamEnd()  # the library pools by indices
        iterate_blocks(tower, PooledBlocks)
        return model

    def check(self) -> None:
        super().check()
        audio = self.config.audio_config
        if audio.n_window % 2 or audio.n_window > audio.max_source_positions:
            raise PolymodalError(
                f"model.config: audio_config.n_window = {audio.n_window} is odd, or more than "
                f"max_source_positions = {audio.max_source_positions}.",
                "Keep the checkpoint's.",
            )

    def sound(self, model: nn.Module, rows: Tensor, frames: Tensor, device: torch.device) -> Tensor:
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as library

        tower: Any = model.model.audio_tower  # type: ignore[union-attr]
        padded, chunks = library.chunk_and_pad_features(rows.T, frames, tower.n_window)
        states = [(length + 1) // 2 for length in chunks.tolist()]
        return tower(
            feature_lens=frames,
            padded_feature=padded,
            chunk_lengths=to_device(chunks, device),
            valid_indices=to_device(library.get_valid_indices(chunks), device),
            pool_indices=to_device(library.get_pool_indices(frames), device),
            cu_seqlens=packed_attention.cumulative(states, device),
            max_seqlen=max(states),
        ).last_hidden_state

    @property
    def window(self) -> int:
        return 2 * self.config.audio_config.n_window

    def sound_tokens(self, frames: int) -> int:
        return pair_tokens(frames)

    def sound_states(self, frames: int) -> int:
        return (frames + 1) // 2

    def sound_costs(self, lengths: Sequence[int]) -> dict[str, float]:
        audio = self.config.audio_config
        side, states = audio.d_model, [self.sound_states(frames) for frames in lengths]
        return {
            "model.audio_tower.conv1": 2.0 * sum(lengths) * 3 * audio.num_mel_bins * side,
            "model.audio_tower.conv2": 2.0 * sum(states) * 3 * side**2,
            AUDIO_BLOCKS: self.block_costs(states),
            "model.audio_tower.proj": 2.0 * sum(map(pair_tokens, lengths)) * side * audio.output_dim,
        }


VISION_PLAN = vision_plan(("gate_proj", "up_proj"), "down_proj", ("mlp.0", "mlp.2"))
AUDIO_PLAN = {**BLOCKS_PLAN, f"{TOWER}.avg_pooler": "exit"}
FRONT = ("model.audio_tower.conv1", "model.audio_tower.conv2")
BACK = tuple(f"model.audio_tower.{name}" for name in ("avg_pooler", "ln_post", "audio_bos_eos_token"))
PROJECTOR = "model.audio_tower.proj"


def _size(
    name: str, parameters: float, layers: int, width: int, inner: int, heads: int, kv: int, vocabulary: int
) -> Size:
    """A published size with its config. The towers of all sizes are alike but for their output."""
    text = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    config = {
        "model_type": "qwen2_5_omni_thinker",
        "text_config": text,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": width},
        "audio_config": {"output_dim": width},
    }
    return Size(f"Qwen/Qwen2.5-Omni-{name}", parameters, layers, 32, config=config)


CARD = vision_language_card(
    name="qwen2.5-omni",
    title="Qwen2.5-Omni",
    family=Qwen25Omni,
    kind="omni",
    architectures=(
        "Qwen2_5OmniModel",
        "Qwen2_5OmniForConditionalGeneration",
        Qwen25Omni.whole,
        "Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    tasks=TASKS,
    keywords=OMNI_KEYWORDS,
    blocks=(BLOCKS, AUDIO_BLOCKS, "model.language_model.layers.*"),
    towers={
        "vision": ("model.visual.patch_embed", "model.visual.blocks"),
        "projector": ("model.visual.merger",),
        "audio": (*FRONT, "model.audio_tower.layers", *BACK[1:]),
        "audio_projector": (PROJECTOR,),
        "language": ("model.language_model", "lm_head"),
    },
    pipeline={
        "vision": Chain(BLOCKS, first=("model.visual.patch_embed",), last=("model.visual.merger",)),
        "audio": Chain(
            AUDIO_BLOCKS, first=FRONT, last=(*BACK, PROJECTOR, "model.language_model.embed_tokens")
        ),
        "language": language_chain(),
    },
    tensor_plan={
        **TEXT_PLAN,
        **DENSE_PLAN,
        **{name: style for name, style in VISION_PLAN.items() if style != "fused_colwise"},
        **{f"{BLOCKS}.attn.{name}": "colwise" for name in "qkv"},
        **AUDIO_PLAN,
    },
    sizes={
        "3b": _size("3B", 4.70, 36, 2048, 11008, 16, 2, 151936),
        "7b": _size("7B", 8.93, 28, 3584, 18944, 28, 4, 152064),
    },
    aliases=("qwen2.5omni", "qwen2_5_omni", "qwen25omni", "qwen-omni"),
    verified=VERIFIED,
    seeds=("7b",),
)
