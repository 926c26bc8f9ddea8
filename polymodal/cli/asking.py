"""Commands that ask and measure a checkpoint: chat, evaluate. Everything heavy is imported inside them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polymodal.cli.app import (
    Base,
    Device,
    Dtype,
    Ema,
    MediaDir,
    Other,
    Processes,
    Revision,
    app,
    command,
    spread,
)

MAKES = "Models that generate"
# One line an option reads best.
# fmt: off


@command(app, 'polymodal chat Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --prompt "What is this?"', "polymodal chat runs/mine --json questions.jsonl --out answers.jsonl", panel="Ask and measure")
def chat(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or adapter.", show_default=False)],
    image: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Picture of the (first) question; may repeat.")] = None,
    video: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Video of the (first) question; may repeat.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="One question, one answer.", show_default="conversation")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="JSON lines to answer; - = stdin.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Where answers of --json go.", show_default="stdout")] = None,
    media_dir: MediaDir = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0 = all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 42,
    batch_size: Annotated[int, typer.Option(help="Rows of --json answered together.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ema: Ema = False,
    base: Base = None,
    revision: Revision = None,
) -> int:
    """Ask a checkpoint: one question, a conversation in the terminal, or JSON lines in and out."""
    from polymodal.generate import chat as room
    from polymodal.generate.engine import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed)
    return room.main(
        checkpoint,
        image=image or (),
        video=video or (),
        prompt=prompt,
        system=system,
        json_file=json_file,
        out=out,
        media_dir=media_dir,
        device=device,
        dtype=dtype,
        ema=ema,
        base=base,
        revision=revision,
        sampling=sampling,
        batch_size=batch_size,
    )


@command(app, "polymodal evaluate runs/mine ai2d --data AI2D_TEST.tsv", "polymodal evaluate runs/mine custom --data questions.jsonl --metric contains --nproc 8", "polymodal evaluate runs/flux generation --data prompts.jsonl --clip weights/clip --real photos --features weights/dinov2 --nproc 8", panel="Ask and measure")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or adapter.", show_default=False)],
    benchmark: Annotated[str, typer.Argument(help="ai2d, mmmu, chartqa, docvqa, custom; generation, vbench.", show_default=False)],
    data: Annotated[str, typer.Option(metavar="FILE", help="VLMEvalKit TSV, CSV, JSON or JSON lines; prompts also as .txt.", show_default=False)],
    metric: Annotated[str | None, typer.Option(help="exact, contains, anls, relaxed, choice, open or likelihood.", show_default="the benchmark's")] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Answers or samples, result and page.", show_default="evaluations/...")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    nproc: Processes = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.", show_default="the benchmark's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows taken together.", show_default="16 questions, 1 sample")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    media_dir: MediaDir = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget earlier answers in the output directory.")] = False,
    html: Annotated[int, typer.Option(help="Samples in report.html; 0 = no page.")] = 300,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ema: Ema = False,
    base: Base = None,
    revision: Revision = None,
    clip: Annotated[str | None, typer.Option(metavar="DIR", help="CLIP or SigLIP checkpoint: likeness of prompt and sample.", rich_help_panel=MAKES)] = None,
    real: Annotated[str | None, typer.Option(metavar="DIR", help="Real pictures or clips, for the Frechet distance.", rich_help_panel=MAKES)] = None,
    features: Annotated[str | None, typer.Option(metavar="DIR", help="Vision model: features of that distance, consistency of frames.", rich_help_panel=MAKES)] = None,
    classifier: Annotated[str | None, typer.Option(metavar="DIR", help="Image classifier, for rows with a label.", rich_help_panel=MAKES)] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each prompt.", show_default="the benchmark's", rich_help_panel=MAKES)] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="What not to make.", rich_help_panel=MAKES)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the pipeline's", rich_help_panel=MAKES)] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Guidance scale.", show_default="the pipeline's", rich_help_panel=MAKES)] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's", rich_help_panel=MAKES)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's", rich_help_panel=MAKES)] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip.", show_default="the pipeline's", rich_help_panel=MAKES)] = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second of the mp4.", show_default="16", rich_help_panel=MAKES)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="42", rich_help_panel=MAKES)] = None,
    other: Other = None,
) -> int:
    """Measure a checkpoint on a benchmark file, or what it generates; on any number of processes, goes on where it stopped."""
    from polymodal.core.errors import PolymodalError
    from polymodal.evaluate import benchmarks

    answers = {"--metric": metric, "--max-new-tokens": max_new_tokens, "--system": system}
    makes = {
        "--clip": clip, "--real": real, "--features": features, "--classifier": classifier, "--samples": samples, "--negative": negative,
        "--steps": steps, "--guidance": guidance, "--height": height, "--width": width, "--frames": frames, "--fps": fps, "--seed": seed, "--with": other,
    }
    facts = benchmarks.find(benchmark)
    foreign = [name for name, value in (answers if facts.samples else makes).items() if value is not None]
    if foreign:
        what = "generate" if facts.samples else "answer"
        raise PolymodalError(f"`{facts.name}` is for models that {what}, it has no {foreign[0]}.", "Leave that option out.")
    opened: dict[str, Any] = {"device": device, "dtype": dtype, "ema": ema, "base": base, "revision": revision}
    common: dict[str, Any] = {"out": out, "limit": limit, "media_dir": media_dir, "restart": restart, "html": html}

    def here() -> int:
        if facts.samples:
            from polymodal.evaluate import generation
            from polymodal.generate.pipeline import Settings

            settings = Settings(steps, guidance, height, width, frames, None, 42 if seed is None else seed, fps)
            generation.main(
                checkpoint, facts.name, data, settings=settings, samples=samples, negative=negative, fps=fps or 16.0, real=real, clip=clip,
                features=features, classifier=classifier, batch_size=batch_size or 1, how={"other": other, **opened}, **common,
            )
        else:
            from polymodal.evaluate import run

            run.main(checkpoint, benchmark, data, metric=metric, max_new_tokens=max_new_tokens, batch_size=batch_size or 16, system=system, **opened, **common)
        return 0

    return spread(nproc, None, here, device)
