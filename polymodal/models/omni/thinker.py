"""Omni models of Qwen: the thinker, which reads text, pictures, videos and sound and answers in text.

What speaks (the talker and its vocoder) stays in the checkpoint: it is not loaded, and an export has its
tensors as they are. The thinker's config is inside of the whole model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json
from polymodal.models.omni.qwen_omni_media import QwenOmniMedia
from polymodal.models.omni.qwen_sound import AUDIO, QwenSound
from polymodal.models.pipelines import quiet
from polymodal.models.understanding.qwen_vl_media import VISION
from polymodal.models.understanding.vision_language import KEYWORDS
from polymodal.recipe import Data

TASKS = ("image-text-to-text", "video-text-to-text", "audio-text-to-text", "any-to-text")
OMNI_KEYWORDS = (*KEYWORDS, "omni", "audio", "sound", "speech and vision", "listen", "hear")


def changed_values(before: Any, now: Any) -> dict[str, Any]:
    """Values of a config's own that differ."""
    old = before.to_dict()
    own = {k: v for k, v in now.to_dict().items() if k not in ("architectures", *now.sub_configs_defaults)}
    return {key: value for key, value in own.items() if old.get(key) != value}


class Thinker(QwenSound):
    """whole: model_type of a checkpoint that holds the talker too, with the thinker's config inside;
    settings: transformers' class of the thinker's config; sounds: the media processor."""

    line = "qwen-omni"
    streams = (VISION, AUDIO)
    whole: str
    settings: str
    sounds: type[QwenOmniMedia]

    @classmethod
    def read_config(cls, directory: Path, trust: bool = False) -> Any:
        """The thinker's config."""
        raw = read_json(directory / "config.json")
        if raw.get("model_type") != cls.whole:
            return super().read_config(directory, trust)
        import transformers

        config = getattr(transformers, cls.settings).from_dict(raw["thinker_config"])
        config.dtype = config.dtype or raw.get("dtype") or raw.get("torch_dtype")
        return config

    @classmethod
    def write_config(cls, config: Any, origin: Path, directory: Path) -> None:
        raw = read_json(origin / "config.json")
        if raw.get("model_type") != cls.whole:
            return super().write_config(config, origin, directory)
        before, section = cls.read_config(origin), raw["thinker_config"]
        for name in ("text_config", "vision_config", "audio_config"):
            section[name] |= changed_values(getattr(before, name), getattr(config, name))
        section |= changed_values(before, config)
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
        size, video = self.sounds.video_size(), data.video
        low, high = video.min_pixels or size["shortest_edge"], video.max_pixels or size["longest_edge"]
        limits = {"size": {"shortest_edge": low, "longest_edge": high}}
        processor.videos_kwargs = {**processor.videos_kwargs, **limits}
        return False

    def media_processor(self, data: Data) -> QwenOmniMedia:  # type: ignore[override]
        media = self.sounds(self.source, self.config, data)
        media.boxes = self.card.boxes
        return media

    def check(self) -> None:
        super().check()
        audio, text = self.config.audio_config, self.config.text_config
        if audio.output_dim != text.hidden_size:
            raise PolymodalError(
                f"model.config: the audio tower gives features of {audio.output_dim}, the language model "
                f"takes {text.hidden_size}.",
                "Set text_config.hidden_size and audio_config.output_dim alike.",
            )
