"""Export of a model that generates: a pipeline in diffusers' layout, or a LoRA file, proven by diffusers.

Called by export.py, which owns the directory and its name. The parts that were not trained are taken over from the
source (as hard links where the disk allows); then diffusers itself opens the result and predicts a sample.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.generate.opening import Assembled
from polymodal.generate.pipeline import base_of, other_denoiser, put_on
from polymodal.models import catalog, lora, pipelines, saving, weights
from polymodal.models.saving import Together
from polymodal.models.storage import Files
from polymodal.models.storage import dtype_of as stored_dtype
from polymodal.runtime import host

STEM = "diffusion_pytorch_model"
TOLERANCE = 1e-3
"""Largest difference of predictions, as a share of the largest, computed in float32."""
TOLERANCE_LOW = 6e-2
"""The same for merged weights that were rounded to a lower precision."""


def room_for(size: int) -> bool:
    """Whether so many bytes fit into this machine's free memory, with room to compute."""
    here = host.memory()
    return here is None or size * 1.3 < here.free


def dtype_of(family: Any, adapter: bool) -> torch.dtype:
    """The dtype that most of the source's denoiser is stored in; float32 for adapters and where there is none."""
    if adapter or not any(family.weights_source.glob("*.safetensors")):
        return torch.float32
    kinds = list(Files(family.weights_source).dtypes.values())
    return stored_dtype(max(set(kinds), key=kinds.count))


def second(made: Assembled, source: Any, other: str, ema: bool, base: str | None, merge: bool) -> Assembled:
    """The run of the other denoiser, to be written with this one. Raises PolymodalError."""
    found = other_denoiser(made.family, source, other, ema=ema, base=base)
    if not merge and (found.recipe.model.lora is not None or made.recipe.model.lora is not None):
        raise PolymodalError(
            "A LoRA file is of one denoiser.", "Add --merge-lora, or export each run by itself."
        )
    return found


def write(
    made: Assembled,
    dtype: torch.dtype,
    merge: bool,
    limit: int,
    together: Together,
    other: Assembled | None = None,
) -> str:
    """Write this process's share into `together`'s directory, which is empty; returns what it is.

    other: the pipeline's other denoiser, written too.
    """
    family: Any = made.family
    partial, settings = together.directory, made.recipe.model.lora
    if settings is not None and not merge:
        if together.rank == 0:
            _write_adapter(made, partial, dtype)
        return "adapter"
    both = [made] if other is None else [made, other]
    parts = [one.family.part for one in both]  # type: ignore[attr-defined]
    if together.rank == 0:
        _take_over(Path(family.source), partial, set(parts))
    for one, part in zip(both, parts, strict=True):
        (partial / part).mkdir(exist_ok=True)
        files = saving.outputs(one.model, None, dtype)
        ranks = {"rank": together.rank, "world": together.world}
        saving.write(one.merged(), one.model, files, partial / part, limit, stem=STEM, **ranks)
        if together.rank == 0:
            text = json.dumps(dict(one.family.config), indent=2) + "\n"
            (partial / part / "config.json").write_text(text, encoding="utf-8")
    return "merged" if merge else "model"


def _write_adapter(made: Assembled, partial: Path, dtype: torch.dtype) -> None:
    family: Any = made.family
    cls, settings = pipelines.pipeline_class(family.source), made.recipe.model.lora
    state = {name: made.tensors[name] for name in lora.adapters(made.model)}
    if hasattr(cls, "save_lora_weights"):
        lora.save_for_pipeline(
            state, made.model, settings, partial, pipeline=cls, part=family.part, dtype=dtype
        )
    else:  # diffusers has no format for it: peft's, which opens on the denoiser alone
        base = str(Path(family.source).resolve() / family.part)
        lora.write(state, made.model, settings, partial, base=base, dtype=dtype)


def prove(
    made: Assembled, partial: Path, what: str, dtype: torch.dtype, other: Assembled | None = None
) -> tuple[int, float, float, str]:
    """Predictions of this house's model against those of the one that diffusers opens.

    Returns (values compared, largest difference, largest value, arithmetic), or (0, 0, 0, "") when the
    pipeline and the denoiser do not fit into memory and names and shapes alone were compared. Raises
    PolymodalError when they differ.
    """
    both = [made] if other is None else [made, other]
    whole = Path(made.family.source) if what == "adapter" else partial
    count = sum(
        prod(shape)
        for path in whole.rglob("*.safetensors")
        for shape in Files(path.parent, (path.stem,)).shapes.values()
    )
    if not room_for(4 * (count + sum(p.numel() for p in made.model.parameters()))):
        for one in both if what != "adapter" else []:
            weights.read(one.family.build(), partial / one.family.part)  # type: ignore[attr-defined]
        return 0, 0.0, 0.0, ""
    proofs = [_prove(one, partial, what, dtype) for one in both]
    worst = max(proofs, key=lambda proof: proof[1] / max(1.0, proof[2]))
    return sum(proof[0] for proof in proofs), *worst[1:]


def _take_over(source: Path, target: Path, parts: set[str]) -> None:
    """All of a pipeline but what was trained."""

    def put(origin: str, copy: str) -> None:
        try:
            os.link(os.path.realpath(origin), copy)
        except OSError:
            shutil.copyfile(origin, copy)

    for entry in sorted(source.iterdir()):
        if entry.is_dir() and entry.name not in parts and not entry.name.startswith("."):
            shutil.copytree(entry, target / entry.name, copy_function=put)
        elif entry.is_file() and entry.suffix != ".safetensors" and entry.name != "polymodal_export.json":
            put(str(entry), str(target / entry.name))


@torch.no_grad()
def _prove(made: Assembled, partial: Path, what: str, dtype: torch.dtype) -> tuple[int, float, float, str]:
    """Compare one prediction: this house's model against the one that diffusers opens. Raises PolymodalError."""
    made.fill()
    family, model = made.family, made.model
    for name, parameter in model.named_parameters():
        if what == "model" or (what == "adapter" and ".lora_" in name):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    cls = pipelines.pipeline_class(family.source)
    with pipelines.quiet():
        opened = cls.from_pretrained(str(family.source if what == "adapter" else partial))
        if what == "adapter":
            opened = cls.from_pretrained(str(family.source), **{family.part: _fresh(made)})
            put_on(opened, family.part, partial)
    for part in opened.components.values():
        if isinstance(part, nn.Module):
            part.float().eval()
    batch = example(family, opened)
    theirs = family.stage(getattr(opened, family.part), None, batch).hidden_states.float()
    ours = family.stage(model.float(), None, batch).hidden_states.float()
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    low = what == "merged" and dtype != torch.float32
    if not difference <= (TOLERANCE_LOW if low else TOLERANCE) * max(1.0, largest):
        raise PolymodalError(
            f"The export of {made.checkpoint} predicts differently: by {difference:.2e} (largest {largest:.2e}); nothing was kept.",
            "This is a defect of the model's card or of the merge: report it with the model's name.",
        )
    return ours.numel(), difference, largest, "float32"


def _fresh(made: Assembled) -> nn.Module:
    """The run's base without adapters, for the library to put them on."""
    base = replace(made, model=made.family.build())
    base.fill()
    return base.model


def example(family: Any, pipeline: Any) -> Batch:
    """A small sample with structure through the pipeline's own encoders, half noised: what predictions are compared on."""
    grid = family.grid()
    frames = 1 if grid.still else 1 + grid.time * max(1, 2 * grid.patch[0] - 1)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, frames, 2 * grid.side, 2 * grid.side, generator=draw) * 2 - 1
    tensors: dict[str, Tensor] = {
        **family.encode_text(pipeline, ["a red circle"], **({"pixels": pixels} if family.sees else {})),
        **family.encode_media(
            pipeline, pixels, **dict.fromkeys(family.needed, pixels), **family.trial(frames)
        ),
    }
    latents = tensors.pop("latents").float()
    for name in family.process().streams:
        if f"{name}_latents" in tensors:
            tensors[f"{name}_noisy"] = tensors.pop(f"{name}_latents").float()
    tensors["noisy"] = 0.5 * latents + 0.5 * torch.randn(latents.shape, generator=draw)
    process = family.process()
    tensors["timestep"] = torch.tensor([0.5 * process.scale if process.kind == "flow" else 500.0])
    tensors["weight"] = torch.ones(1)
    return Batch(tensors, {}, (0,), groups={"shape": (frames, 2 * grid.side, 2 * grid.side)})


def open_adapter(directory: Path, base: str | None) -> Assembled:
    """An adapter of a denoiser on its base, by the house's path. Raises PolymodalError."""
    place = base or base_of(directory)
    rank = lora.read_settings(directory)
    recipe = recipes.Recipe(model=recipes.Model(source=place, lora=rank))
    family = catalog.family(recipe.model)
    model = family.build()
    lora.attach(model, rank, family.card)
    held = weights.read(model, weights.directory_of(None, family)) | lora.read(model, directory)
    return Assembled(model, family, recipe, directory, held)
