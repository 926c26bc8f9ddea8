"""DeepSeek-OCR: SAM and CLIP over each view, one linear projector, DeepSeek-VL2's language model.

Formulas and names of tensors: https://github.com/deepseek-ai/DeepSeek-OCR (e4ac34e), deepencoder, and the
published checkpoint's modeling_deepseekocr.py. The towers are transformers' (Unlimited-OCR, the same
architecture).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.conversion_mapping import (
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrVisionConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrVisionModel

from polymodal.models.nets import deepseek_vl2 as vl2

CLIP, SAM = "clip-l-14-224", "sam_vit_b"


class DeepseekOcrConfig(PreTrainedConfig):
    """vision_config: transformers' (sam_config, encoder_config), or as published: `width` with CLIP's and
    SAM's."""

    model_type = "deepseek_ocr"
    sub_configs_defaults = {
        "vision_config": UnlimitedOcrVisionConfig,
        "language_config": vl2.DeepseekVL2TextConfig,
    }
    vision_config: dict | PreTrainedConfig | None = None
    language_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 128815
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict) and isinstance(self.vision_config.get("width"), dict):
            self.vision_config = _sections(self.vision_config["width"])
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        return self.language_config


def _sections(published: dict[str, Any]) -> dict[str, Any]:
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    clip, sam = ({names.get(k, k): v for k, v in published[name].items()} for name in (CLIP, SAM))
    for section in (clip, sam):
        if "hidden_size" in section:
            section["intermediate_size" if section is clip else "mlp_dim"] = 4 * section["hidden_size"]
    return {"encoder_config": clip, "sam_config": sam}


class DeepseekOcrVisionModel(UnlimitedOcrVisionModel):
    """With CLIP's own patch embedding, which is stored and never used: SAM's map takes its place."""

    def __init__(self, config: UnlimitedOcrVisionConfig):
        super().__init__(config)
        clip = config.encoder_config
        size = clip.patch_size
        unused = nn.Conv2d(clip.num_channels, clip.hidden_size, size, size, bias=False)
        self.vision_encoder.embeddings.patch_embedding = unused.requires_grad_(False)


class DeepseekOcrModel(vl2.DeepseekVL2PreTrainedModel):
    config: DeepseekOcrConfig

    def __init__(self, config: DeepseekOcrConfig):
        super().__init__(config)
        vision, width = config.vision_config, config.language_config.hidden_size
        both = vision.sam_config.downsample_channels[-1] + vision.encoder_config.hidden_size
        self.vision_tower = DeepseekOcrVisionModel(vision)
        self.multi_modal_projector = nn.Linear(both, width)
        self.language_model = vl2.DeepseekVL2TextModel(config.language_config)
        self.image_newline, self.view_seperator = vl2.Row(width), vl2.Row(width)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def lines(self, views: Tensor, columns: int) -> Tensor:
        """Views [n, S * S, D] side by side in so many columns -> lines with a newline behind each: [rows,
        D]."""
        side = int(views.shape[1] ** 0.5)
        grid = (
            views.unflatten(0, (-1, columns))
            .unflatten(2, (side, side))
            .transpose(1, 2)
            .flatten(2, 3)
            .flatten(0, 1)
        )
        newline = self.image_newline(grid).expand(len(grid), 1, -1)
        return torch.cat([grid, newline], dim=1).flatten(0, 1)

    def get_image_features(
        self, pixel_values: Tensor, pixel_values_local: Tensor | None, images_spatial_crop: Tensor
    ) -> Tensor:
        """Whole views [M, 3, B, B], tiles [n, 3, C, C] of pictures of (width, height) tiles [M, 2], (1, 1):
        none -> all rows [n, D]: of a picture its tiles, the whole, the separator."""
        whole = self.multi_modal_projector(self.vision_tower(pixel_values).last_hidden_state)
        crops, tiles = images_spatial_crop.tolist(), None
        if pixel_values_local is not None and len(pixel_values_local):
            tiles = self.multi_modal_projector(self.vision_tower(pixel_values_local).last_hidden_state)
        rows, at = [], 0
        for number, (width, height) in enumerate(crops):
            if width * height > 1:
                assert tiles is not None
                rows.append(self.lines(tiles[at : at + width * height], width))
                at += width * height
            rows += [self.lines(whole[number : number + 1], 1), self.view_seperator(whole)[None]]
        return torch.cat(rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        images_spatial_crop: Tensor | None = None,
        images_seq_mask: Tensor | None = None,
        pixel_values_local: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """images_seq_mask: bool [B, T], the places of pictures' rows; None: those of the config's
        image_token_id."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and images_spatial_crop is not None:
            if images_seq_mask is None:
                images_seq_mask = input_ids == self.config.image_token_id
            rows = self.get_image_features(pixel_values, pixel_values_local, images_spatial_crop)
            inputs_embeds = inputs_embeds.masked_scatter(images_seq_mask[..., None], rows.to(inputs_embeds))
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)


class DeepseekOcrForConditionalGeneration(vl2.DeepseekVL2ForConditionalGeneration):
    config: DeepseekOcrConfig

    def __init__(self, config: DeepseekOcrConfig):
        vl2.DeepseekVL2PreTrainedModel.__init__(self, config)
        self.model = DeepseekOcrModel(config)
        text = config.language_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


RULES = [
    *(
        WeightRenaming(rf"^model\.{theirs}", f"model.{ours}")
        for theirs, ours in {
            "sam_model": "vision_tower.sam_encoder",
            "vision_model": "vision_tower.vision_encoder",
            r"projector\.layers": "multi_modal_projector",
            "image_newline": "image_newline.weight",
            "view_seperator": "view_seperator.weight",
            r"embed_tokens\.": "language_model.embed_tokens.",
            r"layers\.": "language_model.layers.",
            r"norm\.": "language_model.norm.",
        }.items()
    ),
    *vl2.EXPERT_RULES,
]
register_checkpoint_conversion_mapping(DeepseekOcrConfig.model_type, RULES, overwrite=True)
