"""The frozen encoders of a generating model, which a step needs besides the model that is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from polymodal.core.sample import Batch
from polymodal.core.tensors import to_device
from polymodal.distributed.mesh import Mesh
from polymodal.models import library, pipeline_index, pipelines
from polymodal.runtime import device as devices


def shard(model: PreTrainedModel, mesh: Mesh) -> None:
    """Shard a frozen model of transformers over the mesh's fsdp ranks, layer by layer."""
    names = tuple(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names and m is not model]
    for unit in (*layers, model):
        fully_shard(unit, mesh=mesh.fsdp, reshard_after_forward=True)
    library.keep_recording(model)


class Encoders:
    """A pipeline's VAE, text and image encoders, frozen: pixels and captions in, the denoiser's tensors out.

    family: a Generation; dtype: of the encoders and of their outputs; placement: data.encoders of the recipe
    (with `shard` and a mesh, every rank of its fsdp group makes the same calls).
    """

    def __init__(
        self,
        family: Any,
        dtype: torch.dtype,
        device: torch.device | str,
        placement: str = "replicate",
        mesh: Mesh | None = None,
    ):
        self.family, self.dtype, self.device = family, dtype, torch.device(device)
        self.placement = placement
        without = set(pipeline_index.models_of(family.source)) - set(family.encoders())
        at = device if placement == "replicate" else "cpu"  # the whole need not fit the device
        self.pipeline = pipelines.open_pipeline(family.source, without=without, dtype=dtype, device=at)
        if placement == "shard":
            for part in self.pipeline.components.values():
                if mesh is not None and mesh.fsdp_size > 1 and isinstance(part, PreTrainedModel):
                    shard(part, mesh)
                elif isinstance(part, nn.Module):
                    part.to(self.device)

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded encoders are on the device while inside; their memory is given back behind them, and
        training's blocks that are free before."""
        if self.placement != "offload":
            yield
            return
        devices.empty_cache(self.device.type)
        self.pipeline.to(self.device)
        try:
            yield
        finally:
            self.pipeline.to("cpu")
            devices.empty_cache(self.device.type)

    @torch.no_grad()
    def media(
        self, pixels: Sequence[Tensor] | Tensor, given: Sequence[Mapping[str, Tensor]] = ()
    ) -> dict[str, Tensor]:
        """uint8 [B, F, H, W, 3] -> latents and image conditions, batch-first, on the device.

        given: for each sample its conditions by role, uint8 [F, H, W, 3] or floating numbers as they are;
        then samples may differ in length and are encoded one by one.
        """
        if not self.family.given:
            normalized = self._normalized(pixels if isinstance(pixels, Tensor) else torch.stack(list(pixels)))
            encoded = self.family.encode_media(self.pipeline, normalized)
            return {name: t.to(self.dtype) for name, t in encoded.items()}
        samples = []
        for own, conditions in zip(pixels, given, strict=True):
            moved = {role: self._condition(t[None]) for role, t in conditions.items()}
            samples.append(self.family.encode_media(self.pipeline, self._normalized(own[None]), **moved))
        joined = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return {name: t if t.ndim == 1 else t.to(self.dtype) for name, t in joined.items()}

    def _condition(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device) if tensor.is_floating_point() else self._normalized(tensor)

    def _normalized(self, pixels: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] -> [B, 3, F, H, W] in -1..1 on the device."""
        return to_device(pixels, self.device).permute(0, 4, 1, 2, 3).to(self.dtype) / 127.5 - 1

    @torch.no_grad()
    def text(self, captions: list[str], pixels: Tensor | None = None) -> dict[str, Tensor]:
        """Captions -> text tensors, batch-first, on the device. pixels: for families that encode them too."""
        seen = {"pixels": self._normalized(pixels)} if self.family.sees and pixels is not None else {}
        encoded = self.family.encode_text(self.pipeline, captions, **seen)
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in encoded.items()}

    def _texts(self, captions: list[str], pixels: Tensor) -> dict[str, Tensor]:
        """text() of a batch; a caption that several have (both halves of a pair) is encoded once."""
        unique = list(dict.fromkeys(captions))
        if self.family.sees or len(unique) == len(captions):
            return self.text(captions, pixels)
        made = self.text(unique)
        place = torch.tensor([unique.index(caption) for caption in captions], device=self.device)
        return {name: tensor.index_select(0, place) for name, tensor in made.items()}

    def encode(self, batch: Batch) -> Batch:
        """A batch with `pixels` and captions -> the same with the denoiser's tensors; others unchanged."""
        if "pixels" not in batch.tensors:
            return batch
        tensors = {n: t for n, t in batch.tensors.items() if n != "pixels"}
        pixels: Any = batch["pixels"]
        given = batch.groups.get("given", ())
        if self.family.given:
            grid = self.family.grid()
            ahead = [grid.time * len(g.get("references", ())) if grid.references else 0 for g in given]
            pixels = [p[n:] for p, n in zip(pixels, ahead, strict=True)]
        tensors |= self.media(pixels, given) | self._texts(list(batch.groups["captions"]), batch["pixels"])
        axes: dict[str, Any] = {
            n: batch.axes.get(n, ("batch", *["none"] * (t.ndim - 1))) for n, t in tensors.items()
        }
        return Batch(tensors, axes, batch.samples, batch.segments, batch.groups)
