"""Sampling from the Qwen VL line, by the library's own `generate`.

Sees the ground floor and the card's types; a part of the family in qwen_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.sample import Sample
from polymodal.models.family import Family


class Sampling(Family):
    """generate, and the library's arguments for it."""

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: Sequence[Sample], **options: Any) -> list[list[int]]:
        """New tokens of each prompt by the library's own `generate` (its options are taken), prompts filled up left.

        A prompt's tensors are a Sample's: input_ids [T], position_ids [4, T], pixel_values, grid_thw. The end token
        is the last one returned when the answer ended by itself.
        """
        inputs = self.generation_inputs(prompts, next(model.parameters()).device)
        chosen = self.generation_config()
        chosen.update(use_cache=True, **options)
        bound, training = (
            model.__dict__.pop("forward", None),
            model.training,
        )  # training binds its own forward
        model.eval()
        try:
            out = model.generate(**inputs, generation_config=chosen)
        finally:
            model.train(training)
            if bound is not None:
                model.forward = bound
        ends = set(_listed(chosen.eos_token_id))
        return [_until(row[inputs["input_ids"].shape[1] :].tolist(), ends) for row in out]

    def generation_config(self) -> Any:
        """The checkpoint's generation_config.json, or the config's end tokens."""
        from pathlib import Path

        from transformers import GenerationConfig

        if (Path(self.source) / "generation_config.json").is_file():
            chosen = GenerationConfig.from_pretrained(self.source)
        else:
            chosen = GenerationConfig.from_model_config(self.config)
        if chosen.pad_token_id is None:
            chosen.pad_token_id = next(iter(_listed(chosen.eos_token_id)), 0)
        return chosen

    def generation_inputs(self, prompts: Sequence[Sample], device: torch.device) -> dict[str, Tensor]:
        """Padded arguments of the library's generate; media parted again into images and videos."""
        longest = max(prompt.tensors["input_ids"].shape[0] for prompt in prompts)
        pad = self.generation_config().pad_token_id

        def left(tensor: Tensor, value: int) -> Tensor:
            return nn.functional.pad(tensor, (longest - tensor.shape[-1], 0), value=value)

        ids = [prompt.tensors["input_ids"] for prompt in prompts]
        inputs = {
            "input_ids": torch.stack([left(row, pad) for row in ids]),
            "attention_mask": torch.stack([left(torch.ones_like(row), 0) for row in ids]),
            "position_ids": torch.stack(
                [left(prompt.tensors["position_ids"], 0) for prompt in prompts], dim=1
            ),
        }
        media: dict[str, list[tuple[Tensor, Tensor]]] = {"image": [], "video": []}
        for prompt in prompts:
            for kind, pixels, grid in self.media_of(prompt):
                media[kind].append((pixels, grid))
        names = {
            "image": ("pixel_values", "image_grid_thw"),
            "video": ("pixel_values_videos", "video_grid_thw"),
        }
        for kind, found in media.items():
            if found:
                inputs[names[kind][0]] = torch.cat([pixels for pixels, _ in found])
                inputs[names[kind][1]] = torch.stack([grid for _, grid in found])
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def media_of(self, sample: Sample) -> list[tuple[str, Tensor, Tensor]]:
        """(kind, pixel_values [P, D], grid [3]) of each medium in reading order; the kind is read off its tokens."""
        if "grid_thw" not in sample.tensors:
            return []
        ids, merge = sample.tensors["input_ids"], self.config.vision_config.spatial_merge_size**2
        ids = ids[(ids == self.config.image_token_id) | (ids == self.config.video_token_id)]
        found, token, patch = [], 0, 0
        for grid in sample.tensors["grid_thw"]:
            patches = int(grid.prod())
            kind = "image" if int(ids[token]) == self.config.image_token_id else "video"
            found.append((kind, sample.tensors["pixel_values"][patch : patch + patches], grid))
            token, patch = token + patches // merge, patch + patches
        return found


def _listed(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """ids up to and with the first end token."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)
