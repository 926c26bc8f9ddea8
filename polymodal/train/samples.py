"""Samples while a generating model trains: the pipeline of diffusers around the model as it stands, laid out as it is.

Sees every room. All ranks of the sharded model take part in every call of it, so each samples equally many prompts, ranks
of one cp or tp group the same ones; the frozen parts wait on the CPU between samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import Mesh
from polymodal.evaluate import run_page
from polymodal.generate.media import save, sheet
from polymodal.generate.pipeline import Generator, Prompt, Settings, needed, suspicion
from polymodal.models import pipelines
from polymodal.recipe import Recipe
from polymodal.train.actors import Encoders


class Denoiser:
    """A laid-out model in a pipeline's place of its denoiser: the class's own forward, inputs in the compute dtype.

    Timesteps and guidance scales stay as they come.
    """

    def __init__(self, model: nn.Module, family: Any, dtype: torch.dtype):
        self._model, self._family, self.dtype = model, family, dtype
        self.config = model.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def cast(name: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {k: cast(k, v) for k, v in value.items()}
            kept = name in (
                "timestep",
                "guidance",
                "time_ids",
                "img_ids",
                "txt_ids",
                "image_rotary_emb",
                "video_coords",
                "audio_coords",
            )
            floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
            return value.to(self.dtype) if floating and not kept else value

        positional = [cast("", a) for a in args]
        named = {k: cast(k, v) for k, v in kwargs.items()}
        # not by the model's own call, which is training's and ends in the loss
        return self._model(lambda model: self._family.forward(model)(*positional, **named))

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Sampler:
    """Samples evaluate.samples.prompts after the steps that are due. Collective over all ranks."""

    def __init__(
        self, recipe: Recipe, family: Any, model: nn.Module, mesh: Mesh, device: torch.device, dtype: torch.dtype, encoders: Encoders | None
    ):  # fmt: skip
        self.asked = recipe.evaluate.samples
        self.recipe, self.family, self.model, self.mesh, self.device, self.dtype = (
            recipe,
            family,
            model,
            mesh,
            device,
            dtype,
        )
        self.encoders = encoders
        if mesh.sizes.pp > 1:
            raise PolymodalError(
                f"evaluate.samples: a model in parallel.pp = {mesh.sizes.pp} stages is not sampled while it trains.",
                "Leave evaluate.samples.prompts out and use `polymodal generate` on a checkpoint.",
            )
        self.conditions = {"image": self.asked.images, "last_image": self.asked.last_images}
        lacking = needed(pipelines.pipeline_class(family.source), family)
        for name, files in self.conditions.items():
            if files and len(files) != len(self.asked.prompts):
                raise PolymodalError(
                    f"evaluate.samples has {len(self.asked.prompts)} prompts and {len(files)} {name}s.",
                    f"Give one {name} a prompt, or none.",
                )
            if not files and name in lacking:
                raise PolymodalError(
                    f"evaluate.samples.{name}s is empty, {family.card.name} makes no sample without.",
                    "Name one picture a prompt there.",
                )
            gone = next((f for f in files if not Path(f).expanduser().is_file()), None)
            if gone is not None:
                raise PolymodalError(f"evaluate.samples.{name}s: {gone} does not exist.", "Check the path.")

    def due(self, step: int, last: bool) -> bool:
        return last or bool(self.asked.every and step % self.asked.every == 0)

    def after(self, step: int, metrics: Any = None) -> Path:
        """Sample, and write NNNN.mp4 or .png and sheet.png under <run>/samples, and the page <run>/report.html; metrics (rank 0) shows
        the sheet."""
        folder = self.recipe.run_dir / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.encoders is None:
            self.encoders = Encoders(self.family, self.dtype, self.device, "offload")
        with self.encoders.at_hand():
            self._sample(self.encoders.pipeline, folder)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        self._sheet(folder, step, metrics)
        return folder

    def _sample(self, pipeline: Any, folder: Path) -> None:
        """All prompts, those of this rank kept."""
        setattr(pipeline, self.family.part, Denoiser(self.model, self.family, self.dtype))
        generator = Generator(pipeline, self.family, "", "", self.device)
        a, ranks, rank = self.asked, self.mesh.sizes.dp, self.mesh.dp_rank
        settings = Settings(
            a.steps, a.guidance, a.height, a.width, a.frames, None, self.recipe.train.seed, a.fps
        )
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(a.prompts), ranks):
                number = start + rank
                chosen = number % len(a.prompts)  # all ranks call the model equally often
                given: dict[str, Any] = {n: f[chosen] for n, f in self.conditions.items() if f}
                prompt = Prompt(a.prompts[chosen], a.negative, **given)
                (made,) = generator.sample([prompt], settings, chosen)
                if number < len(a.prompts) and self.mesh.at["cp"] == self.mesh.at["tp"] == 0:
                    self._keep(folder, number, made, generator.sound_of(0))
        finally:
            self.model.train(training)
            setattr(pipeline, self.family.part, None)

    def _keep(self, folder: Path, number: int, made: np.ndarray, heard: dict[str, Any]) -> None:
        wrong = suspicion(made)
        if wrong:
            print(f"warning: sample {number} {wrong}", flush=True)
        if made.dtype != np.uint8:
            return
        save(folder, number, made, self.asked.fps, **heard)
        np.save(folder / f".{number:04d}.npy", made)

    def _sheet(self, folder: Path, step: int, metrics: Any) -> None:
        from PIL import Image

        if dist.is_initialized() and dist.get_rank() > 0:
            return
        shown = sorted(folder.glob(".*.npy"))
        if shown:
            pixels = sheet([np.load(path) for path in shown])
            Image.fromarray(pixels).save(folder / "sheet.png")
            if metrics is not None:
                metrics.picture(step, "samples", pixels)
        for path in shown:
            path.unlink()
        run = self.recipe.run_dir
        if (run / "metrics.jsonl").is_file():
            pages.write(run / "report.html", run_page.of_generation(run, self.asked.prompts))
