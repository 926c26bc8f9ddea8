"""Commands that ask and measure a checkpoint: chat, evaluate. Everything heavy is imported inside them."""

from __future__ import annotations

from pathlib import Path
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
HEARS = "Models that transcribe"
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


@command(app, "polymodal transcribe openai/whisper-small talk.mp3 --timestamps", "polymodal transcribe runs/mine recordings/ --format srt --out subtitles", panel="Ask and measure")
def transcribe(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or adapter.", show_default=False)],
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Audio or video files, or directories of them; any length.", show_default=False)],
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Language that is spoken, e.g. en.", show_default="told by the model")] = None,
    translate: Annotated[bool, typer.Option("--translate", help="Write English, whatever is spoken.")] = False,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Tell when what is said.")] = False,
    form: Annotated[str | None, typer.Option("--format", metavar="FORM", help="txt, srt, vtt or json.", show_default="txt")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where a file for each goes.", show_default="stdout")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces of 30 s computed together.")] = 8,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 = the likeliest token.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ema: Ema = False,
    base: Base = None,
    revision: Revision = None,
) -> int:
    """Write down what is said in recordings, with times as subtitles if asked."""
    from polymodal.generate import transcribe as room
    from polymodal.runtime import device as devices

    place = devices.find(device, 0).torch
    return room.main(checkpoint, files, language=language, translate=translate, timestamps=timestamps, form=form, out=out, batch_size=batch_size, beams=beams, device=place, dtype=dtype, ema=ema, base=base, revision=revision)


@command(app, "polymodal evaluate runs/mine ai2d --data AI2D_TEST.tsv", "polymodal evaluate runs/mine custom --data questions.jsonl --metric contains --nproc 8", "polymodal evaluate runs/flux generation --data prompts.jsonl --clip weights/clip --real photos --features weights/dinov2 --nproc 8", panel="Ask and measure")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="Hub id, directory, run, checkpoint of a run, or adapter.", show_default=False)],
    benchmark: Annotated[str, typer.Argument(help="ai2d, mmmu, chartqa, docvqa, custom; generation, vbench; speech.", show_default=False)],
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
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Language of rows that name none.", show_default="told by the model", rich_help_panel=HEARS)] = None,
    normalise: Annotated[str | None, typer.Option(help="What of spelling does not count: auto, english, basic or none.", show_default="auto", rich_help_panel=HEARS)] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="Beams of the search.", show_default="1", rich_help_panel=HEARS)] = None,
) -> int:
    """Measure a checkpoint on a benchmark file, or what it generates; on any number of processes, goes on where it stopped."""
    from polymodal.core.errors import PolymodalError
    from polymodal.evaluate import benchmarks

    options: dict[str, dict[str, Any]] = {
        "answer": {"--metric": metric, "--max-new-tokens": max_new_tokens, "--system": system},
        "generate": {
            "--clip": clip, "--real": real, "--features": features, "--classifier": classifier, "--samples": samples, "--negative": negative,
            "--steps": steps, "--guidance": guidance, "--height": height, "--width": width, "--frames": frames, "--fps": fps, "--seed": seed, "--with": other,
        },
        "transcribe": {"--language": language, "--normalise": normalise, "--beams": beams},
    }
    facts = benchmarks.find(benchmark)
    for kind, own in options.items():
        foreign = [name for name, value in own.items() if value is not None and kind != facts.kind]
        if foreign:
            raise PolymodalError(f"`{facts.name}` is for models that {facts.kind}, it has no {foreign[0]}.", "Leave that option out.")
    opened: dict[str, Any] = {"device": device, "dtype": dtype, "ema": ema, "base": base, "revision": revision}
    common: dict[str, Any] = {"out": out, "limit": limit, "media_dir": media_dir, "restart": restart, "html": html}

    def here() -> int:
        if facts.kind == "generate":
            from polymodal.evaluate import generation
            from polymodal.generate.pipeline import Settings

            settings = Settings(steps, guidance, height, width, frames, None, 42 if seed is None else seed, fps)
            generation.main(
                checkpoint, facts.name, data, settings=settings, samples=samples, negative=negative, fps=fps or 16.0, real=real, clip=clip,
                features=features, classifier=classifier, batch_size=batch_size or 1, how={"other": other, **opened}, **common,
            )
        elif facts.kind == "transcribe":
            from polymodal.evaluate import speech

            how = {k: v for k, v in opened.items() if k != "device"}
            speech.main(checkpoint, data, device=device, how=how, language=language, normalise=normalise or "auto", beams=beams or 1, batch_size=batch_size or 16, **common)
        else:
            from polymodal.evaluate import run

            run.main(checkpoint, benchmark, data, metric=metric, max_new_tokens=max_new_tokens, batch_size=batch_size or 16, system=system, **opened, **common)
        return 0

    return spread(nproc, None, here, device)
