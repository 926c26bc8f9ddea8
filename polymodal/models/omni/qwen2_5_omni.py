"""Qwen2.5-Omni: its thinker, which reads text, pictures, videos and sound and answers in text.

The vision tower and the language model are Qwen2.5-VL's, the audio tower is Whisper's over windows of two
seconds. Talker and token2wav, which speak, stay in the checkpoint: they are not loaded, and an export has
their tensors as they are. Longer than other cards: a config inside another, and sizes and costs of a second
tower beside those of vision.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.core.sample import MediaStream
from polymodal.core.tensors import to_device
from polymodal.distributed import attention as packed_attention
from polymodal.models.card import Chain, Size
from polymodal.models.omni.qwen_omni_media import (
    AUDIO,
    QwenOmniMedia,
    audio_tokens,
    video_size,
    windows,
)
from polymodal.models.pipelines import quiet
from polymodal.models.understanding.language import DENSE_PLAN, TEXT_PLAN
from polymodal.models.understanding.qwen2_5_vl import Qwen25VL
from polymodal.models.understanding.qwen_vl import VERIFIED, vision_plan
from polymodal.models.understanding.qwen_vl_media import VISION
from polymodal.models.understanding.vision_language import KEYWORDS, language_chain, vision_language_card
from polymodal.recipe import Data

WHOLE = "qwen2_5_omni"
"""model_type of a checkpoint that holds talker and token2wav too, with the thinker's config inside."""
BLOCKS, AUDIO_BLOCKS = "model.visual.blocks.*", "model.audio_tower.layers.*"
SMALLEST = 4
"""Mel frames of one feature."""


class StreamEnd(nn.Module):
    """Behind the last block of the audio tower: where its stream ends, cut over ranks and over stages."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class AudioBlocks(nn.ModuleList):
    """The audio tower's blocks and the end of their stream, in the order in which the library calls them.

    The library takes the first of a block's outputs; a module that stands for one of another stage has one.
    """

    def __iter__(self) -> Iterator[Any]:
        (tower,) = self.__dict__["tower"]
        for module in (*super().__iter__(), tower.avg_pooler):
            yield partial(_outputs, module)


def _changed(before: Any, now: Any) -> dict[str, Any]:
    """Values of a config's own that differ."""
    old = before.to_dict()
    own = {k: v for k, v in now.to_dict().items() if k not in ("architectures", *now.sub_configs_defaults)}
    return {key: value for key, value in own.items() if old.get(key) != value}


def _outputs(module: nn.Module, hidden: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    out = module(hidden, **arguments)
    return out if isinstance(out, tuple) else (out,)


class Qwen25Omni(Qwen25VL):
    line = "qwen-omni"
    streams = (VISION, AUDIO)
    beside = ("talker.", "token2wav.")
    beside_files = ("spk_dict.pt",)

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        """The thinker's config."""
        raw = read_json(directory / "config.json")
        if raw.get("model_type") != WHOLE:
            return super().read_config(directory, trust)
        from transformers import Qwen2_5OmniThinkerConfig

        config = Qwen2_5OmniThinkerConfig.from_dict(raw["thinker_config"])
        config.dtype = config.dtype or raw.get("dtype") or raw.get("torch_dtype")
        return config

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        raw = read_json(origin / "config.json")
        if raw.get("model_type") != WHOLE:
            return super().write_config(config, origin, directory)
        before, section = cls.read_config(origin), raw["thinker_config"]
        for name in ("text_config", "vision_config", "audio_config"):
            section[name] |= _changed(getattr(before, name), getattr(config, name))
        section |= _changed(before, config)
        if config.dtype is not None:
            raw["torch_dtype" if "torch_dtype" in raw else "dtype"] = str(config.dtype).removeprefix("torch.")
        text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    @classmethod
    @quiet()
    def read_processor(cls, directory: Path, trust: bool = False) -> Any:
        return super().read_processor(directory, trust)

    def limit_media(self, processor: Any, data: Data) -> bool:
        """The library's processor gives its own limits of videos to its video processor."""
        size, video = video_size(), data.video
        low, high = video.min_pixels or size["shortest_edge"], video.max_pixels or size["longest_edge"]
        limits = {"size": {"shortest_edge": low, "longest_edge": high}}
        processor.videos_kwargs = {**processor.videos_kwargs, **limits}
        return False

    def build(self) -> nn.Module:
        """The library's model; the parameter that no feature comes from is frozen."""
        model: Any = super().build()
        tower = model.model.audio_tower
        tower.audio_bos_eos_token.requires_grad_(False)
        tower.avg_pooler = StreamEnd()  # the library pools by indices
        tower.layers.__class__ = AudioBlocks
        tower.layers.__dict__["tower"] = (tower,)
        return model

    def media_processor(self, data: Data) -> QwenOmniMedia:
        return QwenOmniMedia(self.source, self.config, data)

    def check(self) -> None:
        super().check()
        audio, text = self.config.audio_config, self.config.text_config
        if audio.output_dim != text.hidden_size:
            raise PolymodalError(
                f"model.config: the audio tower gives features of {audio.output_dim}, the language model "
                f"takes {text.hidden_size}.",
                "Set text_config.hidden_size and audio_config.output_dim alike.",
            )
        if audio.n_window % 2 or audio.n_window > audio.max_source_positions:
            raise PolymodalError(
                f"model.config: audio_config.n_window = {audio.n_window} is odd, or more than "
                f"max_source_positions = {audio.max_source_positions}.",
                "Keep the checkpoint's.",
            )

    # -- sound, as mel frames in windows

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        if stream.name != AUDIO.name:
            return super().tower(model, stream, rows, sizes, device)
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as library

        tower: Any = model.model.audio_tower  # type: ignore[union-attr]
        frames = sizes[:, 0]
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
        """Mel frames of a window."""
        return 2 * self.config.audio_config.n_window

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().media_ids(stream)
        return (self.config.audio_token_id,)

    def media_parts(self, stream: MediaStream, sizes: Tensor) -> list[tuple[int, ...]]:
        if stream.name != AUDIO.name:
            return super().media_parts(stream, sizes)
        return [(part,) for (frames,) in sizes.tolist() for part in windows(frames, self.window)]

    def media_tokens(self, stream: MediaStream, part: tuple[int, ...]) -> int:
        return audio_tokens(*part) if stream.name == AUDIO.name else super().media_tokens(stream, part)

    def media_lengths(self, stream: MediaStream, part: tuple[int, ...]) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().media_lengths(stream, part)
        return windows(*part, self.window)

    def medium(self, stream: MediaStream, length: int) -> tuple[int, ...]:
        return (max(SMALLEST, length),) if stream.name == AUDIO.name else super().medium(stream, length)

    def row_shape(self, stream: MediaStream) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().row_shape(stream)
        return (self.config.audio_config.num_mel_bins,)

    def tower_state(self, stream: MediaStream, sizes: Tensor) -> tuple[int, ...]:
        if stream.name != AUDIO.name:
            return super().tower_state(stream, sizes)
        states = sum((part + 1) // 2 for (part,) in self.media_parts(stream, sizes))
        return states, self.config.audio_config.d_model

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        if stream.name != AUDIO.name:
            return super().tower_costs(stream, lengths)
        audio = self.config.audio_config
        side, states = audio.d_model, [(frames + 1) // 2 for frames in lengths]
        rows = sum(states)
        block = 2.0 * rows * (4 * side**2 + 2 * side * audio.encoder_ffn_dim)
        block += 4.0 * side * sum(n * n for n in states)
        return {
            "model.audio_tower.conv1": 2.0 * sum(lengths) * 3 * audio.num_mel_bins * side,
            "model.audio_tower.conv2": 2.0 * rows * 3 * side**2,
            AUDIO_BLOCKS: audio.encoder_layers * block,
            "model.audio_tower.proj": 2.0 * sum(map(audio_tokens, lengths)) * side * audio.output_dim,
        }


VISION_PLAN = vision_plan(("gate_proj", "up_proj"), "down_proj", ("mlp.0", "mlp.2"))
AUDIO_PLAN = {
    "model.audio_tower": "stream",
    f"{AUDIO_BLOCKS}.self_attn": "attention",
    **{f"{AUDIO_BLOCKS}.self_attn.{name}_proj": "colwise" for name in "qkv"},
    f"{AUDIO_BLOCKS}.self_attn.out_proj": "rowwise",
    f"{AUDIO_BLOCKS}.fc1": "entering_colwise",
    f"{AUDIO_BLOCKS}.fc2": "leaving_rowwise",
    "model.audio_tower.avg_pooler": "exit",
}
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
        WHOLE,
        "Qwen2_5OmniThinkerForConditionalGeneration",
    ),
    tasks=("image-text-to-text", "video-text-to-text", "audio-text-to-text", "any-to-text"),
    keywords=(*KEYWORDS, "omni", "audio", "sound", "speech and vision", "listen", "hear"),
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
