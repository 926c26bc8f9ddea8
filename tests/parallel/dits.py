"""Diffusion transformers under layouts: tiny pipelines, features by their own encoders, and what is trained on them.

layouts.py measures them as it measures language models. Tests only.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from polymodal.core.sample import Batch
from polymodal.models import catalog, pipelines
from polymodal.models.family import Family
from polymodal.objectives.diffusion import DiffusionObjective
from polymodal.recipe import Diffusion, Model
from tests.models import tiny_pipelines

DEEPER: dict[str, dict[str, Any]] = {
    "wan": {"num_layers": 4, "num_attention_heads": 4},
    "flux": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4},
    "hunyuan-video": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4},
    "cogvideox1.5": {"num_layers": 4, "num_attention_heads": 4, "sample_height": 16, "sample_width": 16},
    "sd3.5": {"num_layers": 4, "num_attention_heads": 4, "caption_projection_dim": 32},
    "open-sora-plan": {"num_layers": 4, "num_attention_heads": 4},
    "open-sora-plan-1.5": {"num_attention_heads": 4},
    "step-video": {"num_layers": 4, "num_attention_heads": 4},
    "open-sora-2": {"depth": 2, "depth_single_blocks": 2, "num_heads": 4, "hidden_size": 40},
}
"""Models of the table of layouts, with more layers and heads than the pipelines of other tests have."""

CAPTIONS = ("a red square moving left", "blue", "the digit seven of nine", "video of a green circle")
ROWS = 7
"""Rows of text, where the model does not ask for a fixed number: odd, and more than some captions have."""
FIXED = ("wan", "cogvideox", "lumina", "hidream", "hunyuan-dit")
"""Beginnings of names of models that are given all rows of their text, but for those in DEEPER that can do with fewer."""


def pipeline(name: str, directory: str | Path) -> Path:
    """The tiny pipeline of this name, deeper where DEEPER says so, every weight of its denoiser moved from where it
    starts (norms and biases too); returns the directory."""
    torch.manual_seed(3)
    made = tiny_pipelines.MAKERS[name]()
    for part in ("transformer", "transformer_2", "unet"):
        model = made.components.get(part)
        if model is None:
            continue
        if name in DEEPER:
            model = type(model).from_config({**model.config, **DEEPER[name]})
            made.register_modules(**{part: model})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(str(directory), safe_serialization=True)
    encode(name, str(directory))
    return Path(directory)


@torch.no_grad()
def encode(name: str, directory: str) -> None:
    """Four micro-batches of two samples in two shapes, encoded by the pipeline's own parts, beside it on disk."""
    family: Any = catalog.family(Model(source=directory))
    pipe = pipelines.open_pipeline(directory, without=family.denoisers or (family.part,))
    grid = family.grid()
    sizes = [tiny_pipelines.SIZES.get(family.card.name, (32, 32))] * 2
    if name in DEEPER:  # odd numbers of rows
        sizes = [(grid.side, 5 * grid.side), (3 * grid.side, 5 * grid.side)]
    frames = 1 if grid.still else tiny_pipelines.FRAMES.get(family.config.get("patch_size_t"), 9)
    draw = torch.Generator().manual_seed(7)
    made = []
    for number in range(4):
        height, width = sizes[number % 2]
        pixels = torch.rand(2, 3, frames, height, width, generator=draw) * 2 - 1
        rows = [
            family.encode_text(pipe, [CAPTIONS[(number + at) % 4]], **{"pixels": pixels[at : at + 1]} if family.sees else {})
            for at in range(2)
        ]  # fmt: skip
        text = {n: pad_sequence([row[n][0] for row in rows], batch_first=True) for n in rows[0]}
        if name in DEEPER or not name.startswith(FIXED):
            text = {n: t[:, :ROWS] if t.ndim > 2 or "mask" in n else t for n, t in text.items()}
        for mask in (t for n, t in text.items() if "mask" in n and name in DEEPER):
            mask[0, -1:] = mask[1, -3:] = 0
        shown = [
            {"source": pixels[at : at + 1].flip(-1)} if "source" in family.given else {} for at in range(2)
        ]
        each = [family.encode_media(pipe, pixels[at : at + 1], **shown[at]) for at in range(2)]
        media = {n: torch.cat([one[n] for one in each]) for n in each[0]}
        tensors = {**text, **media, "weight": torch.tensor([1.0, 1.0])}
        made.append((tensors, grid.tokens(frames, height, width), (frames, height, width)))
    torch.save(made, Path(directory, "features.pt"))


@functools.cache
def _features(directory: str) -> list[tuple[dict[str, Tensor], int, tuple[int, int, int]]]:
    return torch.load(Path(directory, "features.pt"))


def objective(family: Any) -> DiffusionObjective:
    process = family.process()
    return DiffusionObjective(process, Diffusion(first_frame=float(process.frame_input)))


def batches(directory: str, family: Family, dtype: torch.dtype) -> list[Batch]:
    """The global batch, noise mixed in; activations in `dtype`, timesteps as they are."""
    made = []
    for number, (tensors, tokens, shape) in enumerate(_features(directory)):
        axes: dict[str, Any] = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
        groups = {"seeds": (10 * number, 10 * number + 1), "tokens": (tokens, tokens), "kind": "video"}
        groups["shape"] = shape
        made.append(Batch(dict(tensors), axes, (2 * number, 2 * number + 1), groups=groups))
    return [_typed(batch, dtype) for batch in objective(family).prepare(None, made)]


def _typed(batch: Batch, dtype: torch.dtype) -> Batch:
    kept = {
        n: t.to(dtype) if t.is_floating_point() and n not in ("timestep", "weight") else t
        for n, t in batch.tensors.items()
    }
    return replace(batch, tensors=kept)


def filler(batch: Batch) -> Batch:
    """A micro-batch that counts nothing."""
    return replace(batch, tensors={**batch.tensors, "weight": torch.zeros(len(batch["weight"]))})
