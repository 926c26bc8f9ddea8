"""PLLaVA: LLaVA whose projector averages the patches of a clip's frames over time and space.

Formulas and names of tensors: https://github.com/magic-research/PLLaVA (6f49fd2), models/pllava. Tower,
projector's layers and language model are transformers' LLaVA, and so are the names in the files (its older
ones).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class PllavaConfig(LlavaConfig):
    """LLaVA's, and: frames of a clip, patches of a frame (lines, columns), rows of a clip (frames, lines,
    columns)."""

    model_type = "pllava"
    num_frames: int = 16
    frame_shape: list | tuple = (24, 24)
    pooling_shape: list | tuple = (16, 12, 12)


class PllavaProjector(LlavaMultiModalProjector):
    def __init__(self, config: PllavaConfig):
        super().__init__(config)
        self.frames, self.shape, self.pooled = config.num_frames, config.frame_shape, config.pooling_shape

    def forward(self, image_features: Tensor, media_type: str = "video") -> Tensor:
        """Features [frames, patches, C] of clips, each of num_frames (a single clip may be shorter), or of
        one picture -> [clips, rows of a clip, D]. Several pictures in one call are mixed, as in the published
        code."""
        hidden = super().forward(image_features)
        if media_type == "image":
            hidden = hidden.repeat(self.frames, 1, 1)
        elif len(hidden) < self.frames:
            hidden = hidden.repeat_interleave(self.frames // len(hidden) + 1, dim=0)[: self.frames]
        clips = hidden.unflatten(0, (-1, self.frames)).unflatten(2, tuple(self.shape))
        pooled = F.adaptive_avg_pool3d(clips.movedim(-1, 1), tuple(self.pooled))
        return pooled.flatten(2).transpose(1, 2)


class PllavaModel(LlavaModel):
    config: PllavaConfig

    def __init__(self, config: PllavaConfig):
        super().__init__(config)
        self.multi_modal_projector = PllavaProjector(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Frames [clips * num_frames, 3, H, W] -> pooler_output: the rows [n, D] of each clip."""
        out = self.vision_tower(pixel_values, output_hidden_states=True)
        hidden = out.hidden_states[self.config.vision_feature_layer][:, 1:]
        return BaseModelOutputWithPooling(pooler_output=list(self.multi_modal_projector(hidden)))


class PllavaForConditionalGeneration(LlavaForConditionalGeneration):
    config: PllavaConfig

    def __init__(self, config: PllavaConfig):
        super().__init__(config)
        self.model = PllavaModel(config)
        self.post_init()


RULES = get_checkpoint_conversion_mapping("llava")
RULES[2] = WeightRenaming(r"^vision_tower\.vision_model", "model.vision_tower")
register_checkpoint_conversion_mapping(PllavaConfig.model_type, RULES, overwrite=True)
AutoConfig.register(PllavaConfig.model_type, PllavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(PllavaConfig, PllavaForConditionalGeneration, exist_ok=True)
