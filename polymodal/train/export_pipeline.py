"""Export of a model that generates: a pipeline in diffusers' layout, or a LoRA file, proven by diffusers.

Called by export.py, which owns the directory and its name. Parts that were not trained are copied from the
source (as hard links where the disk allows); then diffusers itself opens the result and predicts a sample.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.generate.opening import Assembled
from polymodal.generate.pipeline import base_of, other_denoiser, put_on
from polymodal.models import catalog, lora, pipelines, saving, weights
from polymodal.models.saving import Together
from polymodal.models.storage import Files, dtype_of, to_publish
from polymodal.runtime import host

STEM = "diffusion_pytorch_model"
TOLERANCE = 1e-3
"""Largest difference of outputs, as a share of the largest output, computed in float32."""
TOLERANCE_LOW = 6e-2
"""The same for arithmetic in bf16 or fp16, and for merged weights that were rounded to one of them."""


class Proof(NamedTuple):
    """How the outputs of an export differ from those of the model that was trained.

    tokens: how many of them (or values) were compared; largest: output; computed: the arithmetic, "" where
    the model did not fit into memory and names and shapes alone were compared.
    """

    tokens: int = 0
    difference: float = 0.0
    largest: float = 0.0
    computed: str = ""


def compare(ours: Tensor, theirs: Tensor, low: bool, what: str, outputs: str) -> tuple[float, float]:
    """(largest difference, largest output). Raises PolymodalError about `what` when they differ."""
    difference, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not difference <= (TOLERANCE_LOW if low else TOLERANCE) * max(1.0, largest):
        raise PolymodalError(
            f"The export of {what} differently: {outputs} differ by {difference:.2e} "
            f"(largest {largest:.2e}); nothing was kept.",
            "This is a defect of the model's card or of the merge: report it with the model's name.",
        )
    return difference, largest


def room_for(size: int) -> bool:
    """Whether so many bytes fit into this machine's free memory, with room to compute."""
    here = host.memory()
    return here is None or size * 1.3 < here.free


def stored_dtype(family: Any) -> torch.dtype:
    """The dtype that most of the source's denoiser is stored in; float32 without files."""
    if not any(family.weights_source.glob("*.safetensors")):
        return torch.float32
    dtypes = list(Files(family.weights_source).dtypes.values())
    return dtype_of(max(set(dtypes), key=dtypes.count))


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
        _copy_parts(Path(family.source), partial, set(parts))
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
) -> Proof:
    """Compare predictions of the model that was trained and of the pipeline that diffusers opens.

    Raises PolymodalError when they differ.
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
        return Proof()
    proofs = [_prove(one, partial, what, dtype) for one in both]
    worst = max(proofs, key=lambda proof: proof.difference / max(1.0, proof.largest))
    return worst._replace(tokens=sum(proof.tokens for proof in proofs))


def _copy_parts(source: Path, target: Path, parts: set[str]) -> None:
    """All of a pipeline but what was trained."""

    def put(origin: str, copy: str) -> None:
        file = to_publish(source, Path(origin))
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    def around(folder: str, names: list[str]) -> list[str]:  # links to a directory above
        here = Path(folder).resolve()
        return [
            n
            for n in names
            if os.path.isdir(f"{folder}/{n}") and here.is_relative_to(Path(folder, n).resolve())
        ]

    for entry in sorted(source.iterdir()):
        if entry.is_dir() and entry.name not in parts and not entry.name.startswith("."):
            shutil.copytree(entry, target / entry.name, copy_function=put, ignore=around)
        elif entry.is_file() and entry.suffix != ".safetensors" and entry.name != "polymodal_export.json":
            put(str(entry), str(target / entry.name))


@torch.no_grad()
def _prove(made: Assembled, partial: Path, what: str, dtype: torch.dtype) -> Proof:
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
            put_on(opened, family, partial)
    for part in opened.components.values():
        if isinstance(part, nn.Module):
            part.float().eval()
    batch = example(family, opened)
    theirs = family.stage(getattr(opened, family.part), None, batch).hidden_states.float()
    ours = family.stage(model.float(), None, batch).hidden_states.float()
    low = what == "merged" and dtype != torch.float32
    difference, largest = compare(ours, theirs, low, f"{made.checkpoint} predicts", "values")
    return Proof(ours.numel(), difference, largest, "float32")


def _fresh(made: Assembled) -> nn.Module:
    """The run's base without adapters, for the library to put them on."""
    base = replace(made, model=made.family.build())
    base.fill()
    return base.model


def example(family: Any, pipeline: Any) -> Batch:
    """A small sample through the pipeline's own encoders, half noised: what predictions are compared on."""
    grid = family.grid()
    frames = 1 if grid.still else 1 + grid.time * max(1, 2 * grid.patch[0] - 1)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, frames, 2 * grid.side, 2 * grid.side, generator=draw) * 2 - 1
    conditions = dict.fromkeys(family.needed, pixels) | family.trial(frames)
    tensors: dict[str, Tensor] = {
        **family.encode_text(pipeline, ["a red circle"], **({"pixels": pixels} if family.sees else {})),
        **family.encode_media(pipeline, pixels, **conditions),
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
    """An adapter of a denoiser on its base, as training attaches it. Raises PolymodalError."""
    family: Any = catalog.family(recipes.Model(source=base or base_of(directory)))
    settings = lora.read_settings(directory, family)
    recipe = recipes.Recipe(model=recipes.Model(source=family.source, lora=settings))
    model = family.build()
    lora.attach(model, settings, family.card)
    tensors = weights.read(model, weights.directory_of(None, family)) | lora.read(model, directory, family)
    return Assembled(model, family, recipe, directory, tensors)
