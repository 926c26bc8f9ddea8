"""Commands that ask and measure a checkpoint. Everything heavy is imported inside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymodal.cli.app import Opening, command, flag, spread


@command("chat")
def ask(
    checkpoint: str,
    image: list[str] | None = None,
    video: list[str] | None = None,
    audio: list[str] | None = None,
    prompt: str | None = None,
    system: str | None = None,
    json_file: str | None = None,
    out: str | None = None,
    media_dir: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    batch_size: int = 16,
    opening: Opening = Opening(),
) -> int:
    """Ask a checkpoint: one question, a conversation in the terminal, or JSON lines in and out."""
    from polymodal.generate import chat
    from polymodal.generate.sampling import Sampling

    return chat.main(
        checkpoint,
        image=image or (),
        video=video or (),
        audio=audio or (),
        prompt=prompt,
        system=system,
        json_file=json_file,
        out=out,
        media_dir=media_dir,
        sampling=Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed),
        batch_size=batch_size,
        **asdict(opening),
    )


@command("transcribe")
def transcribe(
    checkpoint: str,
    files: list[str],
    language: str | None = None,
    translate: bool = False,
    timestamps: bool = False,
    form: str | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    beams: int = 1,
    opening: Opening = Opening(),
) -> int:
    """Write down what is said in recordings, with times as subtitles if asked."""
    from polymodal.generate import transcribe as speech

    return speech.main(
        checkpoint,
        files,
        language=language,
        translate=translate,
        timestamps=timestamps,
        form=form,
        out=out,
        batch_size=batch_size,
        beams=beams,
        **asdict(opening),
    )


@dataclass(frozen=True)
class Answering:
    """Options of evaluate for models that answer. None here and below: not given."""

    metric: str | None = None
    max_new_tokens: int | None = None
    system: str | None = None


@dataclass(frozen=True)
class Generating:
    """Options of evaluate for models that generate."""

    clip: str | None = None
    real: str | None = None
    features: str | None = None
    classifier: str | None = None
    samples: int | None = None
    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    other: str | None = None


@dataclass(frozen=True)
class Transcribing:
    """Options of evaluate for models that transcribe."""

    language: str | None = None
    normalise: str | None = None
    beams: int | None = None


@dataclass(frozen=True)
class Judging:
    """Options of evaluate for models that speak, besides those of Transcribing for the model that writes
    their speech down."""

    asr: str | None = None


@command("evaluate")
def evaluate(
    checkpoint: str,
    benchmark: str,
    data: str,
    out: str | None = None,
    limit: int | None = None,
    nproc: str | None = None,
    batch_size: int | None = None,
    media_dir: str | None = None,
    restart: bool = False,
    html: int = 300,
    opening: Opening = Opening(),
    answering: Answering = Answering(),
    generating: Generating = Generating(),
    transcribing: Transcribing = Transcribing(),
    judging: Judging = Judging(),
) -> int:
    """Measure a checkpoint on a benchmark file, or what it generates; goes on where it stopped."""
    from polymodal.core.errors import PolymodalError
    from polymodal.evaluate import benchmarks

    facts = benchmarks.find(benchmark)
    groups = {"answer": answering, "generate": generating, "transcribe": transcribing, "speak": judging}
    given = {
        kind: {name: value for name, value in asdict(group).items() if value is not None}
        for kind, group in groups.items()
    }
    own: dict[str, Any] = given.pop(facts.kind)
    if facts.kind == "speak":
        own |= given.pop("transcribe")
    foreign = [name for options in given.values() for name in options]
    if foreign:
        raise PolymodalError(
            f"`{facts.name}` is for models that {facts.kind}, it has no {flag('evaluate', foreign[0])}.",
            "Leave that option out.",
        )
    own |= {"out": out, "limit": limit, "media_dir": media_dir, "restart": restart, "html": html}
    if batch_size is not None:
        own["batch_size"] = batch_size

    opened = asdict(opening)

    def here() -> int:
        from polymodal.evaluate import generation, run, speech, spoken
        from polymodal.generate.pipeline import Settings

        if facts.kind == "generate":
            sampled = [n for n in ("steps", "guidance", "height", "width", "frames", "seed") if n in own]
            settings = Settings(**{name: own.pop(name) for name in sampled}, fps=generating.fps)
            opened["other"] = own.pop("other", None)
            generation.main(checkpoint, facts.name, data, settings=settings, opening=opened, **own)
        elif facts.kind == "transcribe":
            speech.main(checkpoint, data, opening=opened, **own)
        elif facts.kind == "speak":
            spoken.main(checkpoint, data, opening=opened, **own)
        else:
            run.main(checkpoint, facts.name, data, opening=opened, **own)
        return 0

    return spread(nproc, None, here, opening.device)
