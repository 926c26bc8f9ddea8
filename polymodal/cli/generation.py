"""The commands of generating models: encode and generate. Everything heavy is imported inside them."""

from __future__ import annotations

from typing import Annotated

import typer

from polymodal.cli.app import (
    Base,
    Device,
    Dtype,
    Ema,
    Other,
    Overrides,
    Processes,
    RecipeFile,
    Revision,
    app,
    command,
    spread,
)

# One line an option reads best.
# fmt: off


@command(app, "polymodal encode recipe.yaml --nproc 8", panel="Generate")
def encode(recipe: RecipeFile, overrides: Overrides = None, nproc: Processes = None) -> int:
    """Pictures, clips and captions through a generating model's frozen encoders, once; training then reads the features.

    The same command again makes only what is missing.
    """
    from polymodal import recipe as recipes
    from polymodal.runtime import environment

    read = recipes.load(recipe, overrides or [])
    environment.apply(read.device)

    def here() -> int:
        from polymodal.train import encode as room

        return room.run(read)

    return spread(nproc, read.run_dir, here, read.device.kind)


@command(app, 'polymodal generate runs/mine --prompt "a cat runs" --out samples', "polymodal generate runs/mine --prompts prompts.txt --out samples --nproc 8", panel="Generate")
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or LoRA.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="DIR", help="Where samples go.")] = "samples",
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to make; may repeat.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help=".txt of one prompt a line, or .jsonl.")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to make.")] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE", help="First frame, or picture to start from.")] = None,
    last_image: Annotated[str | None, typer.Option(metavar="FILE", help="Last frame.")] = None,
    video: Annotated[str | None, typer.Option(metavar="FILE", help="Clip to start from.")] = None,
    mask: Annotated[str | None, typer.Option(metavar="FILE", help="White where that clip is made anew: a picture or a clip.")] = None,
    reference: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Picture of what is to be seen; may repeat.")] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help="How far to go from that clip.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the pipeline's")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale.", show_default="the pipeline's")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip.", show_default="the pipeline's")] = None,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames a second of the mp4.")] = 16.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts sampled together.")] = 1,
    nproc: Processes = None,
    cp: Annotated[int, typer.Option(min=1, help="Processes that make each sample together, its sequence cut over them.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ema: Ema = False,
    base: Base = None,
    other: Other = None,
    revision: Revision = None,
) -> int:
    """Sample clips or pictures: NNNN.mp4 or .png, sheet.png, and samples.json with how each was made."""

    def here() -> int:
        from polymodal.generate import media as room
        from polymodal.generate.pipeline import Prompt, Settings

        listed = room.read_prompts(prompts) if prompts else []
        listed += [Prompt(text, None, image, last_image, video, mask, reference) for text in prompt or ()]
        for one in listed:
            one.negative_prompt = one.negative_prompt if one.negative_prompt is not None else negative
        settings = Settings(steps, guidance, height, width, frames, strength, seed, fps)
        return room.main(
            checkpoint, prompts=listed, settings=settings, out=out, fps=fps, batch_size=batch_size, device=device,
            dtype=dtype, ema=ema, base=base, other=other, revision=revision, cp=cp,
        )

    return spread(nproc, None, here, device)
