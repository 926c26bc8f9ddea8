"""Opens whatever holds a generating model and samples from it: a pipeline's directory, an export, a run, a
LoRA file.

The sampling loop is diffusers'. Weights that are missing or too many are an error, never noise.
"""

from __future__ import annotations

import contextlib
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
from polymodal.core.tensors import require_finite
from polymodal.data.files import VIDEO
from polymodal.distributed import checkpoint as checkpoints
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.generate import opening
from polymodal.generate.opening import DTYPES, Assembled, Locate, describe, fingerprint, library_errors
from polymodal.models import adapter_files, catalog, lora, pipeline_index, pipelines, weights
from polymodal.models.diffusion import Generation
from polymodal.runtime import process_group
from polymodal.runtime.process_group import Runtime

MARKER = "polymodal_export.json"


@dataclass
class Prompt:
    """One sample to be made. None: the pipeline's own default. All from image to references: files."""

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
    fps: float | None = None  # given to pipelines that take it

    def arguments(self) -> dict[str, Any]:
        """By the pipelines' names; None for their own default."""
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "strength": self.strength,
            "frame_rate": self.fps,
        }


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
    _variants: dict[str, Any] = field(default_factory=dict)

    def sound_of(self, i: int) -> dict[str, Any]:
        """The i-th of them and its rate, as `save` takes them; {} without sound."""
        if not self.sounds:
            return {}
        config = self.pipeline.vocoder.config
        return {"sound": self.sounds[i], "rate": int(config.get("output_sampling_rate", 24000))}

    def pipeline_for(self, conditions: set[str]) -> Any:
        """The pipeline for these conditions (`image`, `video`): if need be another class around its parts."""
        if conditions <= set(parameters(type(self.pipeline))):
            return self.pipeline
        classes = {name: pipelines.named(name) for name in self.family.routes.values()}
        name = next((n for n, cls in classes.items() if conditions <= set(parameters(cls))), None)
        if name is None:
            return self.pipeline
        if name not in self._variants:
            parts = {**dict(self.pipeline.config), **self.pipeline.components}
            taken = inspect.signature(classes[name].__init__).parameters
            with pipelines.quiet():
                variant = classes[name](**{k: parts[k] for k in taken if k in parts})
            variant.set_progress_bar_config(disable=True)
            self._variants[name] = variant
        return self._variants[name]

    def sample(self, prompts: Sequence[Prompt], settings: Settings, first: int = 0) -> list[np.ndarray]:
        """Samples of like prompts: each uint8 [F, H, W, 3] (pictures: F = 1), or float if not finite.

        A sample's noise comes from its seed, else from (settings.seed, its number), whatever the batch.
        """
        if self.family.alone and len(prompts) > 1:
            return [s for i, p in enumerate(prompts) for s in self.sample([p], settings, first + i)]
        arguments: dict[str, Any] = {"prompt": [p.prompt for p in prompts], **settings.arguments()}
        if any(p.negative_prompt is not None for p in prompts):
            arguments["negative_prompt"] = [p.negative_prompt or "" for p in prompts]
        for key in ("image", "last_image", "video", "mask", "references"):
            files = [getattr(p, key) for p in prompts]
            if any(files):
                media = [self._medium(key, file, settings) for file in files]
                arguments[key] = media if len(media) > 1 else media[0]
        conditions = {"image", "video"} & set(arguments)
        pipeline = self.pipeline_for(conditions)
        arguments = {k: v for k, v in self.family.tune(pipeline, arguments).items() if v is not None}
        arguments = self._checked(pipeline, arguments, sized=bool(conditions))
        numbers = range(first, first + len(prompts))
        seeds = [
            settings.seed * 1_000_003 + n if p.seed is None else p.seed
            for n, p in zip(numbers, prompts, strict=True)
        ]
        draws = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        # what the pipeline checks itself: sizes, conditions
        with library_errors(type(pipeline).__name__, "Change that option.", (ValueError,)), torch.no_grad():
            draw = draws[0] if len(draws) == 1 else draws
            out = pipeline(**arguments, generator=draw, output_type="np")
        sounds = getattr(out, "audio", None)
        self.sounds = [] if sounds is None else [sound.float().cpu().numpy() for sound in sounds]
        made = out.frames if hasattr(out, "frames") else np.asarray(out.images)[:, None]
        return [_pixels(np.asarray(one)) for one in made]

    def _checked(self, pipeline: Any, arguments: dict[str, Any], sized: bool) -> dict[str, Any]:
        """The arguments that a pipeline takes. Raises PolymodalError for one that it lacks, or does not take.

        sized: media are given, whose size and length a pipeline may not take besides.
        """
        name, known = type(pipeline).__name__, parameters(type(pipeline))
        optional = {"frame_rate", *(("height", "width", "num_frames") if sized else ())}
        arguments = {k: v for k, v in arguments.items() if k in known or k not in optional}
        unknown = next((key for key in arguments if key not in known), None)
        if unknown is not None:
            raise PolymodalError(f"{name} takes no `{unknown}`.", "Leave that option out for this model.")
        lacking = needed(type(pipeline), self.family) - set(arguments)
        if lacking:
            option = min(lacking)
            raise PolymodalError(
                f"{name} of {self.family.card.name} needs `{option}`.",
                f"Give it with --{option.replace('_', '-')}, or in the file of prompts.",
            )
        return arguments

    def _medium(self, key: str, path: Any, settings: Settings) -> Any:
        from PIL import Image

        from polymodal.data import media

        if path is None:
            raise PolymodalError(f"Not every prompt has its `{key}`.", "Give one to each.")
        size = (settings.height, settings.width) if settings.height and settings.width else None
        if key == "references":
            return [media.image(file) for file in path]
        if key in ("image", "last_image"):
            picture = media.image(path)
            return picture.resize(size[::-1], Image.Resampling.BICUBIC) if size else picture
        if key == "mask" and not path.lower().endswith(tuple(f".{e}" for e in VIDEO)):
            return media.image(path)
        header = media.video_header(path)
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
        return (
            "holds values that are not numbers: the weights have diverged, "
            "or float16 overflowed (try --dtype fp32)"
        )
    if frames.max() <= 3:
        return "is all black: the VAE overflowed (try --dtype fp32), or the training had diverged"
    if int(frames.max()) - int(frames.min()) <= 2:
        return "is of one colour: too few steps, or weights that were not trained"
    if len(frames) > 1 and (frames == frames[:1]).all():
        return "does not move: all frames are alike"
    return None


# --- opening --------------------------------------------------------------------------------------


def open_generator(
    checkpoint: str | os.PathLike,
    *,
    revision: str | None = None,
    device: torch.device | str = "auto",
    dtype: str = "auto",
    ema: bool = False,
    base: str | None = None,
    other: str | None = None,
    locate: Locate = checkpoints.locate,
) -> Generator:
    """Any checkpoint of a generating model: pipeline, hub id, export, run, one of its checkpoints, LoRA.

    dtype: auto (float32 on the CPU, else bf16), fp32, bf16, fp16. other: a run of the pipeline's other
    denoiser (Wan2.2 A14B has two), which takes its place too. The rest as for `open_model`.
    """
    kind, device = opening.check_options(checkpoint, device, dtype, ema)
    chosen = DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    directory = Path(os.fspath(checkpoint)).expanduser()
    if kind == "run":
        made = describe(checkpoint, ema=ema, base=base, locate=locate)
        family: Any = made.family
        _check_generates(family, checkpoint)
        model = made.fill().model
        identity = fingerprint(made.checkpoint) + (" ema" if ema else "")
    else:
        source = os.fspath(checkpoint) if kind == "hub" else base or base_of(directory)
        family = catalog.family(recipes.Model(source=source.rstrip("/"), revision=revision))
        _check_generates(family, checkpoint)
        model = family.build()
        weights.load(model, family, device="cpu")
        identity = pipeline_index.fingerprint(family.source, family.part)
    parts = {family.part: model}
    if other is not None:
        second = other_denoiser(family, checkpoint, other, ema=ema, base=base, locate=locate)
        parts[second.family.part] = second.model  # type: ignore[attr-defined]
        identity += f" with {fingerprint(second.checkpoint)}"
    parts = {n: pipelines.cast(m.eval().requires_grad_(False), chosen).to(device) for n, m in parts.items()}
    pipeline = pipelines.open_pipeline(family.source, parts=parts, dtype=chosen, device=device)
    if kind == "adapter":
        put_on(pipeline, family, directory)
        identity += f" {directory}"
    return Generator(pipeline, family, directory.name, identity, device)


def cut_sequences(generator: Generator, mesh: Mesh, parallel: recipes.Parallel) -> None:
    """Let the ranks of each cp group make their samples together: the denoisers' sequences are cut over them.

    All of a group must sample alike; each gets whole samples. Collective. Raises PolymodalError.
    """
    from polymodal.models import library
    from polymodal.parallel import apply as layout
    from polymodal.parallel import dit_context_parallel
    from polymodal.parallel.batches import context_of

    family = generator.family
    for reason in layout.check(family.card, family.config, mesh.sizes, parallel):
        raise reason
    group = context_of(mesh, family.config, parallel)
    assert group is not None
    for name in family.denoisers or (family.part,):
        model = getattr(generator.pipeline, name)
        if model is not None:
            cut = dit_context_parallel.apply(model, family.card, group)
            model.forward = cut.around(library.class_of(model).forward.__get__(model))


def other_denoiser(
    family: Any, checkpoint: Any, other: str, *, ema: bool = False, base: str | None = None, **locating: Any
) -> Assembled:
    """The filled run of a pipeline's other denoiser. Raises PolymodalError when the two do not fit."""
    if len(family.denoisers) < 2:
        raise PolymodalError(
            f"{checkpoint} is {family.card.name}, which has one denoiser.", "Leave out --with."
        )
    if opening.kind_of(other) != "run":
        raise PolymodalError(f"--with {other} is no run.", "Give the run of the other denoiser.")
    made = describe(other, ema=ema, base=base, **locating)
    theirs: Any = made.family
    if theirs.card.name != family.card.name or theirs.part == family.part:
        what = theirs.card.name if theirs.card.name != family.card.name else f"{theirs.part} too"
        raise PolymodalError(
            f"{checkpoint} trained {family.part} of {family.card.name}, {other} trained {what}.",
            f"Give a run with model.part: {next(d for d in family.denoisers if d != family.part)}.",
        )
    for part in ("vae", "text_encoder"):
        if pipeline_index.fingerprint(family.source, part) != pipeline_index.fingerprint(theirs.source, part):
            raise PolymodalError(
                f"{checkpoint} and {other} were trained from different pipelines: their {part} differs.",
                "Give runs of one model.source.",
            )
    return made.fill()


def _check_generates(family: Any, checkpoint: Any) -> None:
    if not isinstance(family, Generation):
        raise PolymodalError(
            f"{checkpoint} is {family.card.name}, which answers and does not generate.",
            "Use `polymodal chat`.",
        )


def put_on(pipeline: Any, family: Any, path: Path) -> None:
    """An adapter of any trainer onto a pipeline's denoiser and text encoders, by diffusers.

    Raises PolymodalError when a tensor of the file is not in place afterwards.
    """
    name, denoiser = type(pipeline).__name__, getattr(pipeline, family.part)
    models = {k: part for k, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    parted = adapter_files.of_denoiser(path, family, models)
    for state in parted.values():
        require_finite(state.items(), path)
    hint = "Give the base it was trained on with --base."
    if not hasattr(denoiser, "load_lora_adapter"):
        if adapter_files.require(path).config is None:
            what = type(denoiser).__name__
            raise PolymodalError(f"diffusers puts no LoRA file on {what}.", "Give peft's directory of it.")
        setattr(pipeline, family.part, opening.put_on(denoiser, path, family.part))
        return
    with library_errors(f"The adapter {path} does not fit {name}", hint), pipelines.quiet():
        for component, state in parted.items():
            if component == family.part:
                denoiser.load_lora_adapter(dict(state), prefix=None, adapter_name=lora.NAME)
                continue
            named = {f"{component}.{key}": value for key, value in state.items()}
            options = {"prefix": component, "adapter_name": lora.NAME, "text_encoder": models[component]}
            pipeline.load_lora_into_text_encoder(named, network_alphas=None, **options)
    for component, state in parted.items():
        placed = {adapter_files.unnamed(k): p for k, p in models[component].named_parameters()}
        lost = [
            k
            for k, v in state.items()
            if k not in placed or not torch.equal(placed[k].cpu(), v.to(placed[k].dtype))
        ]
        if lost:
            raise PolymodalError(
                f"{name} applies {len(state) - len(lost)} of the {len(state)} tensors of {path} "
                f"(not {component}.{lost[0]}).",
                hint,
            )


def base_of(path: Path) -> str:
    """The base that an exported adapter names. Raises PolymodalError when it names none."""
    base, directory = None, path if path.is_dir() else path.parent
    with contextlib.suppress(OSError, ValueError):
        base = json.loads((directory / MARKER).read_text(encoding="utf-8")).get("base")
    if not base:
        raise PolymodalError(f"{path} does not name the adapter's base.", "Give it with --base.")
    return str(base)


@contextmanager
def opened(
    checkpoint: str, *, device: str = "auto", cp: int = 1, **options: Any
) -> Iterator[tuple[Runtime, Generator]]:
    """A command's runtime, in one of its processes, and the checkpoint's generator.

    cp: ranks that make each sample together, consecutive ones. options: those of `open_generator`.
    """
    recipe = opening.command_recipe(checkpoint, device)
    recipe.parallel.cp = cp
    with process_group.runtime(recipe) as rt:
        sizes = ParallelSizes.of(recipe.parallel, rt.world)
        locate = opening.alike(rt)
        generator = open_generator(checkpoint, device=rt.device.torch, locate=locate, **options)
        if cp > 1:
            cut_sequences(generator, Mesh(sizes, rt.device.torch.type, rt.rank), recipe.parallel)
        yield rt, generator
