"""The commands of generating models: encode and generate. Everything heavy is imported inside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli.app import Opening, command, flag, spread

if TYPE_CHECKING:
    from polymodal.recipe import Recipe


@dataclass(frozen=True)
class Drawing:
    """Options of generate for models of pictures and clips. None here and below: not given."""

    negative: str | None = None
    image: str | None = None
    last_image: str | None = None
    video: str | None = None
    mask: str | None = None
    strength: float | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    cp: int | None = None
    other: str | None = None


@dataclass(frozen=True)
class Speaking:
    """Options of generate for models that speak."""

    speaker: str | None = None
    language: str | None = None
    seconds: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


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
    reference: list[str] | None = None,
    seed: int = 42,
    batch_size: int | None = None,
    nproc: str | None = None,
    opening: Opening = Opening(),
    drawing: Drawing = Drawing(),
    speaking: Speaking = Speaking(),
) -> int:
    """Sample clips, pictures or speech: NNNN.mp4, .png or .wav, and samples.json with how each was made."""

    def here() -> int:
        from polymodal.generate.opening import card_at

        card = card_at(checkpoint, opening.base)
        speaks = card is not None and card.speaks
        _only(drawing if speaks else speaking, checkpoint, "speaks" if speaks else "makes pictures or clips")
        if speaks:
            from polymodal.generate import speak

            own = {name: value for name, value in asdict(speaking).items() if value is not None}
            asked = {"texts": prompt or (), "file": prompts, "references": reference or (), "out": out}
            return speak.main(
                checkpoint, **asked, seed=seed, batch_size=batch_size or 8, **own, **asdict(opening)
            )
        return _draw()

    def _draw() -> int:
        from polymodal.generate import media
        from polymodal.generate.pipeline import Prompt, Settings

        d, fps = drawing, drawing.fps or 16.0
        listed = media.read_prompts(prompts) if prompts else []
        listed += [
            Prompt(text, None, d.image, d.last_image, d.video, d.mask, reference) for text in prompt or ()
        ]
        listed = [
            p if p.negative_prompt is not None else replace(p, negative_prompt=d.negative) for p in listed
        ]
        settings = Settings(d.steps, d.guidance, d.height, d.width, d.frames, d.strength, seed, fps)
        options: dict[str, Any] = {
            "fps": fps,
            "batch_size": batch_size or 1,
            "other": d.other,
            "cp": d.cp or 1,
        }
        return media.main(
            checkpoint, prompts=listed, settings=settings, out=out, **options, **asdict(opening)
        )

    return spread(nproc, None, here, opening.device)


def _only(foreign: Drawing | Speaking, checkpoint: str, does: str) -> None:
    """Raises PolymodalError for an option of another kind of model."""
    from polymodal.core.errors import PolymodalError

    given = next((name for name, value in asdict(foreign).items() if value is not None), None)
    if given is not None:
        raise PolymodalError(
            f"{flag('generate', given)} is not for {checkpoint}, which {does}.", "Leave that option out."
        )
