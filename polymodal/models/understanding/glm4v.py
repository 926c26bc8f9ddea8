"""GLM-4.1V: facts. A tower as Qwen2.5-VL's with a resampled table of positions and a norm, a convolution and
a merger behind it; a video is its frames, each with its second in digits behind it.

All placeholders are the picture's; those between the marks of a video are a video's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import MediaPart, MediaShape, MediaStream, Span
from polymodal.core.tensors import to_device
from polymodal.models.card import ModelCard, Size
from polymodal.models.understanding.language import FUSED_PLAN
from polymodal.models.understanding.media import encoded
from polymodal.models.understanding.qwen_vl import PatchEmbedding, QwenVL, qwen_vl_card, vision_plan
from polymodal.models.understanding.qwen_vl_media import VISION, Qwen3VLMedia

PICTURE = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
VIDEO = ("<|begin_of_video|>", "<|video|>", "<|end_of_video|>")
PICTURE_FRAMES = 2  # the processor's limits of pixels count a picture as so many frames


def smart_resize(
    processor: Any, frames: int, height: int, width: int, low: int, high: int
) -> tuple[int, int]:
    """(height, width) by the library's function, within limits in pixels of all frames."""
    from transformers.models.glm4v.image_processing_glm4v import smart_resize

    factor = processor.patch_size * processor.merge_size
    return smart_resize(frames, height, width, processor.temporal_patch_size, factor, low, high)


class GlmMedia(Qwen3VLMedia):
    """MediaProcessor of GLM-4.1V and GLM-4.5V."""

    start, end = PICTURE[0], PICTURE[2]
    pads = {"image": PICTURE[1], "video": PICTURE[1]}
    reads = {"image": "".join(PICTURE), "video": "".join(VIDEO)}
    picture_frames = PICTURE_FRAMES

    def smart_resize(self, kind: str, height: int, width: int, frames: int) -> tuple[int, int]:
        frames = self.picture_frames if kind == "image" else frames
        limits = self.pixel_limits(kind, frames)
        return smart_resize(self.processors[kind], frames, height, width, *limits)

    def span(self, shape: MediaShape) -> Span:
        """As the library writes a video: each temporal patch, then the whole second of its first frame."""
        if shape.kind == "image":
            return super().span(shape)
        t, h, w = self.grid(shape.kind, shape.height, shape.width, shape.frames)
        frame = self.around("video", h * w // self.processors["video"].merge_size ** 2)
        ids = [self.token_id(VIDEO[0])]
        for first, _ in self.times(shape.frames, shape.seconds):
            ids += [*frame, *encoded(self.tokenizer, str(int(first)))]
        part = MediaPart(VISION.name, (t, h, w), (h * w,) * t)
        return Span([*ids, self.token_id(VIDEO[2])], (part,), shape)


class CalledTable:
    """Mixed into the library's module of learned positions, which reads the weight of its table: there it
    finds what a call of the table gives, whole and local where the weight is a DTensor."""

    position_embedding: nn.Embedding

    def forward(self, embeddings: Tensor, *args: Any) -> Tensor:
        """[P, D] patches and what says where they are -> [P, D] with their positions added."""
        table = self.position_embedding
        rows = table(torch.arange(table.num_embeddings, device=embeddings.device))
        self.__dict__["position_embedding"] = SimpleNamespace(weight=rows)
        try:
            return super().forward(embeddings, *args)  # type: ignore[misc]
        finally:
            del self.__dict__["position_embedding"]


class Glm4v(QwenVL):
    line = "glm"
    media = GlmMedia
    rope = "Glm4vModel"
    picture_frames = PICTURE_FRAMES

    def build(self) -> nn.Module:
        model: Any = super().build()
        visual = model.model.visual
        visual.downsample.__class__ = PatchEmbedding
        own = type(visual.embeddings)
        visual.embeddings.__class__ = type(own.__name__, (CalledTable, own), {})
        return model

    @classmethod
    def picture_size(cls, processor: Any, height: int, width: int) -> tuple[int, int]:
        pictures = processor.image_processor
        limits = pictures.size["shortest_edge"], pictures.size["longest_edge"]
        return smart_resize(pictures, PICTURE_FRAMES, height, width, *limits)

    def tower(
        self, model: nn.Module, stream: MediaStream, rows: Tensor, sizes: Tensor, device: torch.device
    ) -> Tensor:
        frames = to_device(torch.tensor(self.media_parts(stream, sizes)), device)  # of a video one by one
        return model.model.visual(rows, grid_thw=frames, **self.geometry(sizes, device)).pooler_output

    def media_ids(self, stream: MediaStream) -> tuple[int, ...]:
        return (self.config.image_token_id,)

    def tower_costs(self, stream: MediaStream, lengths: Sequence[int]) -> dict[str, float]:
        vision, costs = self.config.vision_config, super().tower_costs(stream, lengths)
        costs["model.visual.downsample"] = 2.0 * sum(lengths) * vision.hidden_size * vision.out_hidden_size
        return costs

    def vision_weights(self, vision: Any) -> tuple[float, float]:
        side, wide = vision.hidden_size, vision.out_hidden_size
        return 3 * side * wide, wide * wide + 3 * wide * vision.intermediate_size


def vision_config(kind: str) -> dict[str, Any]:
    """The tower of all published sizes."""
    facts = {"depth": 24, "hidden_size": 1536, "num_heads": 12, "image_size": 336, "patch_size": 14}
    return {**facts, "model_type": kind, "intermediate_size": 13696, "out_hidden_size": 4096}


def glm_card(tensor_plan: dict[str, str], **facts: Any) -> ModelCard:
    """A card of the line. The merger, whose rows a convolution makes of four, is whole on each rank of TP."""
    return qwen_vl_card(
        {
            **tensor_plan,
            **vision_plan(("gate_proj", "up_proj"), "down_proj"),
            "model.visual.post_layernorm": "exit",
        },
        embedders=("patch_embed", "post_conv_layernorm", "embeddings"),
        enders=("post_layernorm", "downsample"),
        **facts,
    )


ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [8, 12, 12],
}
CONFIG: dict[str, Any] = {
    "model_type": "glm4v",
    "text_config": {
        "model_type": "glm4v_text",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "vocab_size": 151552,
        "max_position_embeddings": 65536,
        "rope_parameters": ROPE,
    },
    "vision_config": vision_config("glm4v_vision"),
}
CARD = glm_card(
    FUSED_PLAN,
    name="glm4.1v",
    title="GLM-4.1V",
    family=Glm4v,
    architectures=("Glm4vForConditionalGeneration", "glm4v"),
    sizes={"9b": Size("zai-org/GLM-4.1V-9B-Thinking", 10.29, 40, 24, config=CONFIG)},
    aliases=("glm-4.1v", "glm4v", "glm"),
    seeds=("9b",),
)
