"""The commands of generating models: encode and generate. Everything heavy is imported inside them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.cli.app import Opening, command, spread

if TYPE_CHECKING:
    from polymodal.recipe import Recipe


@command("encode")
def encode(recipe: Path, overrides: list[str] | None = None, nproc: str | None = None) -> int:
    """Run pictures, clips and captions through the frozen encoders of a generating model, once.

    Training reads the features. The same command again makes only what is missing.
    """
    from polymodal import recipe as recipes

    return start_encoding(recipes.load(recipe, overrides or []), nproc)


def start_encoding(read: Recipe, nproc: str | None = None) -> int:
    """Encode the data of a recipe that was read, in processes that are started here or in the launcher's."""
    from polymodal.runtime import environment

    environment.apply(read.device)

    def here() -> int:
        from polymodal.train import encode as encoding

        return encoding.run(read)

    return spread(nproc, read.run_dir, here, read.device.kind)


@command("generate")
def generate(
    checkpoint: str,
    out: str = "samples",
    prompt: list[str] | None = None,
    prompts: str | None = None,
    negative: str | None = None,
    image: str | None = None,
    last_image: str | None = None,
    video: str | None = None,
    mask: str | None = None,
    reference: list[str] | None = None,
    strength: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float = 16.0,
    seed: int = 42,
    batch_size: int = 1,
    nproc: str | None = None,
    cp: int = 1,
    other: str | None = None,
    opening: Opening = Opening(),
) -> int:
    """Sample clips or pictures: NNNN.mp4 or .png, sheet.png, and samples.json with how each was made."""

    def here() -> int:
        from polymodal.generate import media
        from polymodal.generate.pipeline import Prompt, Settings

        listed = media.read_prompts(prompts) if prompts else []
        listed += [Prompt(text, None, image, last_image, video, mask, reference) for text in prompt or ()]
        listed = [
            p if p.negative_prompt is not None else replace(p, negative_prompt=negative) for p in listed
        ]
        settings = Settings(steps, guidance, height, width, frames, strength, seed, fps)
        options = {"fps": fps, "batch_size": batch_size, "other": other, "cp": cp, **asdict(opening)}
        return media.main(checkpoint, prompts=listed, settings=settings, out=out, **options)

    return spread(nproc, None, here, opening.device)
