"""Opens whatever holds a generating model and samples from it: a pipeline's directory, an export, a run, a LoRA file.

The sampling loop is diffusers'; this file puts the trained weights into its pipeline and hands prompts over. Sees
models, parallel, generate/opening.py, launch and errors. Weights that are missing or too many are an error, never noise.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.data.files import VIDEO
from polymodal.distributed import checkpoint as checkpoints
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.generate import opening
from polymodal.generate.opening import DTYPES, Assembled, Locate, alike, assemble, fingerprint, kind_of
from polymodal.models import catalog, pipelines, weights
from polymodal.models.diffusion import Generation
from polymodal.models.lora import DIFFUSERS_STEM
from polymodal.runtime import process_group
from polymodal.runtime.process_group import Runtime

MARKER = "polymodal_export.json"


@dataclass
class Prompt:
    """One sample to be made. None: the pipeline's own default. image, last_image, video, mask, references: files."""

    prompt: str
    negative_prompt: str | None = None
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    mask: str | None = None
    references: list[str] | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Settings:
    """How samples are made. None: the pipeline's own default."""

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    strength: float | None = None
    seed: int = 42
    fps: float | None = None  # told to pipelines that know of it


@dataclass
class Generator:
    """A pipeline with its weights. identity: changes when the weights do."""

    pipeline: Any
    family: Any
    name: str
    identity: str
    device: torch.device
    sounds: list[np.ndarray] = field(default_factory=list)
    """Waveforms [2, samples] of the samples made last, where the pipeline makes sound."""
    _others: dict[str, Any] = field(default_factory=dict)

    def heard(self, i: int) -> dict[str, Any]:
        """The i-th of them and its rate, as `save` takes them; {} without sound."""
        if not self.sounds:
            return {}
        config = self.pipeline.vocoder.config
        return {"sound": self.sounds[i], "rate": int(config.get("output_sampling_rate", 24000))}

    def suited(self, conditions: set[str]) -> Any:
        """The pipeline that makes samples from these (`image`, `video`): the checkpoint's own, or another of the family's
        around the same parts."""
        import diffusers

        if not conditions <= set(parameters(type(self.pipeline))):
            for name in self.family.routes.values():
                cls = getattr(diffusers, name)
                if conditions <= set(parameters(cls)):
                    if name not in self._others:
                        have = {**dict(self.pipeline.config), **self.pipeline.components}
                        wanted = inspect.signature(cls.__init__).parameters
                        with pipelines.quiet():
                            self._others[name] = cls(**{k: have[k] for k in wanted if k in have})
                        self._others[name].set_progress_bar_config(disable=True)
                    return self._others[name]
        return self.pipeline

    def sample(self, prompts: Sequence[Prompt], settings: Settings, first: int = 0) -> list[np.ndarray]:
        """Samples of like prompts: each uint8 [F, H, W, 3] (pictures: F = 1), or float where it is not finite.

        A sample's noise comes from its seed, or from (settings.seed, its number): batches and ranks change nothing.
        """
        if self.family.alone and len(prompts) > 1:
            return [s for i, p in enumerate(prompts) for s in self.sample([p], settings, first + i)]
        asked: dict[str, Any] = {
            "prompt": [p.prompt for p in prompts],
            "num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "height": settings.height,
            "width": settings.width, "num_frames": settings.frames, "strength": settings.strength,
            "frame_rate": settings.fps,
        }  # fmt: skip
        if any(p.negative_prompt is not None for p in prompts):
            asked["negative_prompt"] = [p.negative_prompt or "" for p in prompts]
        for key in ("image", "last_image", "video", "mask", "references"):
            given = [getattr(p, key) for p in prompts]
            if any(given):
                asked[key] = (
                    [self._medium(key, g, settings) for g in given]
                    if len(given) > 1
                    else self._medium(key, given[0], settings)
                )
        seeds = [
            settings.seed * 1_000_003 + first + i if p.seed is None else p.seed for i, p in enumerate(prompts)
        ]
        conditions = {key for key in ("image", "video") if key in asked}
        pipeline = self.suited(conditions)
        asked = {k: v for k, v in self.family.tune(pipeline, asked).items() if v is not None}
        known = parameters(type(pipeline))
        told = (
            "frame_rate",
            *(("height", "width", "num_frames") if conditions else ()),
        )  # given media have them
        asked = {k: v for k, v in asked.items() if k in known or k not in told}
        for key in asked:
            if key not in known:
                raise PolymodalError(
                    f"{type(pipeline).__name__} takes no `{key}`.",
                    "Leave that option out for this model.",
                )
        lacking = needed(type(pipeline), self.family) - set(asked)
        if lacking:
            name = min(lacking)
            raise PolymodalError(
                f"{type(pipeline).__name__} of {self.family.card.name} needs `{name}`.",
                f"Give it with --{name.replace('_', '-')}, or in the file of prompts.",
            )
        draws = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        try:
            with torch.no_grad():
                draw = draws[0] if len(draws) == 1 else draws
                out = pipeline(**asked, generator=draw, output_type="np")
        except ValueError as error:  # what the pipeline checks: sizes, conditions
            raise PolymodalError(
                f"{type(pipeline).__name__}: {str(error).strip().splitlines()[0]}", "Change that option."
            ) from None
        heard = getattr(out, "audio", None)
        self.sounds = [] if heard is None else [one.float().cpu().numpy() for one in heard]
        made = out.frames if hasattr(out, "frames") else np.asarray(out.images)[:, None]
        return [_pixels(np.asarray(one)) for one in made]

    def _medium(self, key: str, path: Any, settings: Settings) -> Any:
        from PIL import Image

        from polymodal.data import media

        if path is None:
            raise PolymodalError(f"Not every prompt has its `{key}`.", "Give one to each.")
        if key == "references":
            return [media.image(one) for one in path]
        if key == "mask" and not path.lower().endswith(tuple(f".{e}" for e in VIDEO)):
            return media.image(path)
        if key not in ("video", "mask"):
            picture = media.image(path)
            if settings.height and settings.width:
                picture = picture.resize((settings.width, settings.height), Image.Resampling.BICUBIC)
            return picture
        header = media.video_header(path)
        size = (settings.height, settings.width) if settings.height and settings.width else None
        count = min(header.frames, settings.frames or header.frames)
        return [Image.fromarray(f) for f in media.video(path, header, range(count), size)]


def parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Arguments of a pipeline class's call, by name."""
    return dict(list(inspect.signature(cls.__call__).parameters.items())[1:])


def needed(cls: Any, family: Any) -> set[str]:
    """Arguments that a pipeline class cannot sample without."""
    known = parameters(cls).items()
    demanded = {k for k, p in known if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return demanded | set(family.asks)


def _pixels(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        return values.astype(np.float32)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def suspicion(frames: np.ndarray) -> str | None:
    """What is wrong with a sample at first sight, with its likely cause; None when nothing is."""
    if frames.dtype != np.uint8:
        return "holds values that are not numbers: the weights have diverged, or float16 overflowed (try --dtype fp32)"
    if frames.max() <= 3:
        return "is all black: the VAE overflowed (try --dtype fp32), or the training had diverged"
    if int(frames.max()) - int(frames.min()) <= 2:
        return "is of one colour: too few steps, or weights that were not trained"
    if len(frames) > 1 and (frames == frames[:1]).all():
        return "does not move: all frames are alike"
    return None


def open_generator(
    checkpoint: str | os.PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    other: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Generator:
    """Any checkpoint of a generating model: pipeline directory or hub id, export, run, one of its checkpoints, LoRA.

    dtype: auto (float32 on the CPU, else bf16), fp32, bf16, fp16. ema: a run's average. base: where a base lies now.
    other: a run of the pipeline's other denoiser (Wan2.2 A14B has two), which takes its place too. locate: `alike(rt)`
    where several ranks open one run.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise PolymodalError(f"dtype = {dtype} is not known.", f"Use auto, {', '.join(DTYPES)}.")
    if device is None:
        from polymodal.runtime import device as devices

        device = devices.find("auto", int(os.environ.get("LOCAL_RANK", "0"))).torch
    device = torch.device(device)
    chosen = DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    kind = kind_of(checkpoint)
    if ema and kind != "run":
        raise PolymodalError(
            f"{checkpoint} is no run, only runs keep an average (train.ema).", "Leave out --ema."
        )
    text = os.fspath(checkpoint).rstrip("/")
    adapter: Path | None = None
    if kind == "run":
        made = assemble(checkpoint, ema=ema, base=base, locate=locate)
        family, model, identity = (
            made.family,
            made.model,
            fingerprint(made.checkpoint) + (" ema" if ema else ""),
        )
    else:
        directory = Path(text).expanduser()
        if kind == "adapter":
            adapter = directory
            text = base or base_of(directory)
        found = catalog.family(recipes.Model(source=text, revision=revision))
        family, model = found, found.build().trained
        _only_generation(family, checkpoint)
        weights.load(model, family, device="cpu")
        identity = pipelines.fingerprint(family.source, family.part)
    _only_generation(family, checkpoint)
    parts = {family.part: model}
    if other is not None:
        second = other_denoiser(family, checkpoint, other, ema=ema, base=base, locate=locate)
        parts[second.family.part] = second.model  # type: ignore[attr-defined]
        identity += f" with {fingerprint(second.checkpoint)}"
    parts = {n: pipelines.cast(m.eval().requires_grad_(False), chosen).to(device) for n, m in parts.items()}
    pipeline = pipelines.open_pipeline(family.source, parts=parts, dtype=chosen, device=device)
    if adapter is not None:
        put_on(pipeline, family.part, adapter)
        identity += f" {adapter}"
    return Generator(pipeline, family, Path(os.fspath(checkpoint)).name, identity, device)


def cut_sequences(generator: Generator, mesh: Mesh, parallel: recipes.Parallel) -> None:
    """Let the ranks of each cp group make their samples together: the denoisers' sequences are cut over them.

    All of a group must sample alike; each gets whole samples. Collective. Raises PolymodalError for a model that cannot
    be cut so.
    """
    from polymodal.models import library
    from polymodal.parallel import apply as layout
    from polymodal.parallel import dit_context_parallel
    from polymodal.parallel.batches import context

    family = generator.family
    for reason in layout.check(family.card, family.config, mesh.sizes, parallel):
        raise reason
    group = context(mesh, family.config, parallel)
    assert group is not None
    for name in family.denoisers or (family.part,):
        model = getattr(generator.pipeline, name)
        if model is not None:
            cut = dit_context_parallel.apply(model, family.card, group)
            model.forward = cut.around(library.class_of(model).forward.__get__(model))


def other_denoiser(
    family: Any,
    checkpoint: Any,
    other: str,
    *,
    ema: bool = False,
    base: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Assembled:
    """The run of a pipeline's other denoiser, put together. Raises PolymodalError when the two do not belong together."""
    if len(family.denoisers) < 2:
        raise PolymodalError(
            f"{checkpoint} is {family.card.name}, which has one denoiser.", "Leave out --with."
        )
    if kind_of(other) != "run":
        raise PolymodalError(f"--with {other} is no run.", "Give the run of the other denoiser.")
    made = assemble(other, ema=ema, base=base, locate=locate)
    theirs: Any = made.family
    if theirs.card.name != family.card.name or theirs.part == family.part:
        what = theirs.card.name if theirs.card.name != family.card.name else f"{theirs.part} too"
        raise PolymodalError(
            f"{checkpoint} trained {family.part} of {family.card.name}, {other} trained {what}.",
            f"Give a run with model.part: {next(d for d in family.denoisers if d != family.part)}.",
        )
    for part in ("vae", "text_encoder"):
        if pipelines.fingerprint(family.source, part) != pipelines.fingerprint(theirs.source, part):
            raise PolymodalError(
                f"{checkpoint} and {other} were trained from different pipelines: their {part} differs.",
                "Give runs of one model.source.",
            )
    return made


def _only_generation(family: Any, checkpoint: Any) -> None:
    if not isinstance(family, Generation):
        raise PolymodalError(
            f"{checkpoint} is {family.card.name}, which answers and does not generate.",
            "Use `polymodal chat`.",
        )


def put_on(pipeline: Any, part: str, directory: Path) -> None:
    """An adapter onto a pipeline: diffusers' LoRA file by diffusers, peft's onto the denoiser `part` by peft.

    Raises PolymodalError when nothing of it fits.
    """
    if (directory / "adapter_config.json").is_file():
        setattr(pipeline, part, opening.put_on(getattr(pipeline, part), directory, part))
        return
    try:
        with pipelines.quiet():
            pipeline.load_lora_weights(str(directory), weight_name=f"{DIFFUSERS_STEM}.safetensors")
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise PolymodalError(
            f"The adapter {directory} does not fit {type(pipeline).__name__}: {str(error).strip().splitlines()[0]}",
            "Give the base it was trained on with --base.",
        ) from None


def base_of(directory: Path) -> str:
    """What an exported adapter says of its base. Raises PolymodalError when it says nothing."""
    try:
        base = json.loads((directory / MARKER).read_text(encoding="utf-8")).get("base")
    except (OSError, ValueError):
        base = None
    if not base:
        raise PolymodalError(
            f"{directory} does not say which base the adapter belongs to.", "Give it with --base."
        )
    return str(base)


@contextmanager
def opened(
    checkpoint: str, *, device: str = "auto", cp: int = 1, **how: Any
) -> Iterator[tuple[Runtime, Generator]]:
    """What a command that samples begins with, in one of its processes: the runtime, and the checkpoint's generator.

    cp: ranks that make each sample together, consecutive ones; how: of `open_generator`.
    """
    recipe = recipes.Recipe(model=recipes.Model(source=checkpoint), device=recipes.Device(kind=device))  # type: ignore[arg-type]
    recipe.parallel.cp = cp
    with process_group.runtime(recipe) as rt:
        sizes = ParallelSizes.of(recipe.parallel, rt.world)
        generator = open_generator(checkpoint, device=rt.device.torch, locate=alike(rt), **how)
        if cp > 1:
            cut_sequences(generator, Mesh(sizes, rt.device.torch.type, rt.rank), recipe.parallel)
        yield rt, generator
