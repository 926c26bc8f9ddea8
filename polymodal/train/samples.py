"""Samples drawn while a generating model trains: a diffusers pipeline around the model as it is sharded.

All ranks of the model take part in each of its calls, so each rank samples equally many prompts, ranks of one
cp or tp group the same ones. The frozen parts of the pipeline are on the CPU between samples.
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
from polymodal.core.terminal import say
from polymodal.distributed.mesh import Mesh
from polymodal.evaluate import run_page
from polymodal.generate.media import save, sheet
from polymodal.generate.pipeline import Generator, Prompt, Settings, needed, suspicion
from polymodal.models import pipelines
from polymodal.recipe import Recipe
from polymodal.train.actors import Encoders

NOT_CAST = frozenset(
    [
        "timestep",
        "guidance",
        "time_ids",
        "img_ids",
        "txt_ids",
        "image_rotary_emb",
        "video_coords",
        "audio_coords",
    ]
)
"""Arguments of denoisers that keep their dtype."""


class Denoiser:
    """A sharded model as a pipeline's denoiser: the class's own forward, inputs cast to the compute dtype."""

    def __init__(self, model: nn.Module, family: Any, dtype: torch.dtype):
        self._model, self._family, self.dtype = model, family, dtype
        self.config = model.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        positional = [self._cast("", a) for a in args]
        named = {k: self._cast(k, v) for k, v in kwargs.items()}
        # not by the model's own call, which is training's and ends in the loss
        return self._model(lambda model: self._family.forward(model)(*positional, **named))

    def _cast(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._cast(k, v) for k, v in value.items()}
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        return value.to(self.dtype) if floating and name not in NOT_CAST else value

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Sampler:
    """Samples evaluate.samples.prompts. Collective over all ranks."""

    def __init__(
        self,
        recipe: Recipe,
        family: Any,
        model: nn.Module,
        mesh: Mesh,
        device: torch.device,
        dtype: torch.dtype,
        encoders: Encoders | None,
    ):
        self.settings, self.recipe = recipe.evaluate.samples, recipe
        self.family, self.model, self.mesh = family, model, mesh
        self.device, self.dtype, self.encoders = device, dtype, encoders
        self.conditions = {"image": self.settings.images, "last_image": self.settings.last_images}
        if mesh.sizes.pp > 1:
            raise PolymodalError(
                f"evaluate.samples: a model in parallel.pp = {mesh.sizes.pp} stages is not sampled while it "
                "trains.",
                "Leave evaluate.samples.prompts out and use `polymodal generate` on a checkpoint.",
            )
        self._check_conditions()

    def _check_conditions(self) -> None:
        required = needed(pipelines.pipeline_class(self.family.source), self.family)
        prompts = len(self.settings.prompts)
        for name, files in self.conditions.items():
            if files and len(files) != prompts:
                raise PolymodalError(
                    f"evaluate.samples has {prompts} prompts and {len(files)} {name}s.",
                    f"Give one {name} a prompt, or none.",
                )
            if not files and name in required:
                raise PolymodalError(
                    f"evaluate.samples.{name}s is empty, {self.family.card.name} makes no sample without.",
                    "Name one picture a prompt there.",
                )
            missing = next((f for f in files if not Path(f).expanduser().is_file()), None)
            if missing is not None:
                raise PolymodalError(
                    f"evaluate.samples.{name}s: {missing} does not exist.", "Check the path."
                )

    def sample(self, step: int, metrics: Any = None) -> Path:
        """Write NNNN.mp4 or .png and sheet.png to <run>/samples/step-..., and the page <run>/report.html.

        metrics (of rank 0): shows the sheet too.
        """
        folder = self.recipe.run_dir / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        if self.encoders is None:
            self.encoders = Encoders(self.family, self.dtype, self.device, "offload")
        vae = getattr(self.encoders.pipeline, "vae", None)
        if self.device.type != "cpu" and hasattr(vae, "enable_tiling"):
            vae.enable_tiling()  # a clip decoded whole takes tens of GB beside the training state
        with self.encoders.on_device():
            self._sample(self.encoders.pipeline, folder)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        self._sheet(folder, step, metrics)
        return folder

    def _sample(self, pipeline: Any, folder: Path) -> None:
        """Sample all prompts; this rank writes its own."""
        setattr(pipeline, self.family.part, Denoiser(self.model, self.family, self.dtype))
        generator = Generator(pipeline, self.family, "", "", self.device)
        s, ranks, rank = self.settings, self.mesh.sizes.dp, self.mesh.dp_rank
        seed = self.recipe.train.seed
        settings = Settings(s.steps, s.guidance, s.height, s.width, s.frames, None, seed, s.fps)
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(s.prompts), ranks):
                number = start + rank
                chosen = number % len(s.prompts)  # all ranks call the model equally often
                given: dict[str, Any] = {n: f[chosen] for n, f in self.conditions.items() if f}
                prompt = Prompt(s.prompts[chosen], s.negative, **given)
                (frames,) = generator.sample([prompt], settings, chosen)
                if number < len(s.prompts) and self.mesh.at["cp"] == self.mesh.at["tp"] == 0:
                    self._write(folder, number, frames, generator.sound_of(0))
        finally:
            self.model.train(training)
            setattr(pipeline, self.family.part, None)

    def _write(self, folder: Path, number: int, frames: np.ndarray, sound: dict[str, Any]) -> None:
        if wrong := suspicion(frames):
            say(f"warning: sample {number} {wrong}")
        if frames.dtype == np.uint8:
            save(folder, number, frames, self.settings.fps, **sound)
            np.save(folder / f".{number:04d}.npy", frames)

    def _sheet(self, folder: Path, step: int, metrics: Any) -> None:
        from PIL import Image

        if dist.is_initialized() and dist.get_rank() > 0:
            return
        files = sorted(folder.glob(".*.npy"))
        if files:
            pixels = sheet([np.load(path) for path in files])
            Image.fromarray(pixels).save(folder / "sheet.png")
            if metrics is not None:
                metrics.picture(step, "samples", pixels)
        for path in files:
            path.unlink()
        run = self.recipe.run_dir
        if (run / "metrics.jsonl").is_file():
            pages.write(run / "report.html", run_page.of_generation(run, self.settings.prompts))
