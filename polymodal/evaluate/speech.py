"""Evaluation of models that transcribe: word and character error rates of a file of recordings with their texts.

Recordings are dealt out to ranks by their length; every text is a line in the rank's own file as soon as it is there,
so a run that was killed goes on. Rates are counted at the end: another normaliser transcribes nothing again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.data import audio
from polymodal.data.source import open_corpus
from polymodal.data.speech import TIMES
from polymodal.evaluate import results
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.run import deal, opened
from polymodal.evaluate.store import Memory, Progress, Ranks, Store
from polymodal.evaluate.word_errors import (
    CHOICES,
    Choice,
    Errors,
    Normaliser,
    character_errors,
    normaliser,
    word_errors,
)
from polymodal.generate.transcribe import Speech, Transcriber
from polymodal.recipe import Dataset

NAME = "speech"


@dataclass(frozen=True)
class Recording:
    """A row: what is heard, and the text that is right."""

    id: str
    where: str
    speech: Speech
    expected: str


def recordings(
    data: str, media_dir: str | None = None, language: str | None = None
) -> tuple[list[Recording], str]:
    """(rows of {audio, text, language?, task?, start?, end?}, fingerprint of the file). Raises PolymodalError."""
    corpus = open_corpus([Dataset(path=data, media_dir=media_dir)], None, "--data")
    out: list[Recording] = []
    for i in range(len(corpus)):
        record = corpus[i]
        heard = [m for m in record.media if m.kind == "audio"]
        if len(heard) != 1:
            raise PolymodalError(
                f"{record.where}: {len(heard) or 'no'} recordings in a row, one is wanted.",
                'Write rows {"audio": "a.wav", "text": "..."}.',
            )
        text = "".join(
            p for m in record.messages if m.role == "assistant" for p in m.content if isinstance(p, str)
        )
        extra = record.extra
        speech = Speech(
            heard[0].source,  # type: ignore[arg-type]
            extra.get("start", 0.0),
            extra.get("end"),
            extra.get("language") or language,
            extra.get("task", "transcribe"),
        )
        key = str(extra.get("id", i))
        out.append(Recording(key, record.where, speech, " ".join(TIMES.sub(" ", text).split())))
    if len({r.id for r in out}) < len(out):  # ids that are not one a row
        out = [replace(r, id=str(i)) for i, r in enumerate(out)]
    return out, corpus.parts[0].fingerprint


def _seconds(recording: Recording) -> float:
    """Length for the deal; of what cannot be opened none, its error is told when its turn comes."""
    speech = recording.speech
    try:
        stop = audio.audio_header(speech.source).seconds if speech.stop is None else speech.stop
    except PolymodalError:
        return 0.0
    return max(0.0, stop - speech.start)


def evaluate(
    transcriber: Transcriber,
    data: str,
    *,
    out: str | Path | None = None,
    language: str | None = None,
    normalise: Choice = "auto",
    beams: int = 1,
    batch_size: int = 16,
    limit: int | None = None,
    media_dir: str | None = None,
    restart: bool = False,
    html: int = 300,
    progress: bool = False,
) -> Result | None:
    """Transcribe every row and count errors. Under a process group every rank calls this; rank 0 gets the Result.

    language: of rows that name none; without it the model tells. normalise: what of spelling does not count, see
    word_errors.normaliser. Result.measures: wer, cer. Raises PolymodalError.
    """
    if normalise not in CHOICES:
        raise PolymodalError(f"--normalise {normalise} is not known.", f"Use {', '.join(CHOICES)}.")
    world = Ranks(alone=False)
    try:
        rows, digest = recordings(data, media_dir, language)
        rows = rows[:limit] if limit else rows
        settings = {"model": transcriber.identity, "data": digest, "language": language, "beams": beams}
        if out is None and world.size > 1:
            raise PolymodalError("An evaluation with several processes needs a directory.", "Give `out`.")
        store = Store(Path(out), settings) if out is not None else Memory()
        began = time.perf_counter()
        done = opened(store, world, restart)
        todo = [i for i, row in enumerate(rows) if row.id not in done]
        costs = [_seconds(rows[i]) for i in todo] if world.size > 1 else [1.0] * len(todo)
        mine = [todo[i] for i in deal(costs, world.size)[world.rank]]
        write = store.writer(world.rank) if mine else None
        with Progress(progress and world.rank == 0, len(rows), len(done), store, transcriber.name) as bar:
            jobs = [rows[i].speech for i in mine]
            for position, found in transcriber.transcripts(jobs, batch_size=batch_size, beams=beams):
                assert write is not None
                entry: dict[str, Any] = {"id": rows[mine[position]].id, "rank": world.rank}
                if isinstance(found, PolymodalError):
                    entry |= {"answer": "", "error": str(found)}
                else:
                    entry |= {"answer": found.text, "language": found.language, "seconds": found.seconds}
                write(entry)
                bar.update()
        world.barrier()
        if world.rank != 0:
            return None
        result = _judged(transcriber, rows, store.answers(), normalise, settings)
        result = replace(result, seconds=round(time.perf_counter() - began, 2), resumed=len(rows) - len(todo))
        if out is not None:
            result = replace(result, out=str(out))
            results.write(Path(out), result, lambda i: (), html, "heard")
        return result
    finally:
        world.close()


def _judged(
    transcriber: Transcriber, rows: Sequence[Recording], entries: dict[str, Any], normalise: Choice, settings: dict[str, Any]
) -> Result:  # fmt: skip
    from polymodal.models.audio.whisper_speech import UNSPACED

    spelling = getattr(transcriber.tokenizer, "english_spelling_normalizer", None)
    judged: list[Judged] = []
    totals: dict[str, tuple[Errors, Errors, int]] = {}
    cleaners: dict[str, Normaliser] = {}
    for i, row in enumerate(rows):
        entry = entries.get(row.id)
        if entry is None:
            raise PolymodalError(
                f"{row.where}: the text of recording {row.id} is missing in the parts.",
                "Start the same command again; it transcribes what is missing.",
            )
        spoken = entry.get("language") or row.speech.language or "en"
        written = "en" if row.speech.task == "translate" else spoken
        if written not in cleaners:
            cleaners[written] = normaliser(normalise, written, spelling, written in UNSPACED)
        clean = cleaners[written]
        said, expected = clean(entry["answer"]), clean(row.expected)
        words, letters = word_errors(said, expected), character_errors(said, expected)
        had = totals.get(written, (Errors(), Errors(), 0))
        totals[written] = had[0] + words, had[1] + letters, had[2] + 1
        measures = {"wer": words.rate, "cer": letters.rate}
        about = ("", (row.expected,), {}, {"language": written}, entry["answer"], said)
        score = float(not words.edits and not entry.get("error"))
        judged.append(
            Judged(i, row.id, row.where, *about, score=score, error=entry.get("error"), measures=measures)
        )
    words = sum((t[0] for t in totals.values()), Errors())
    letters = sum((t[1] for t in totals.values()), Errors())
    by = {
        "language": {
            code: {"wer": w.rate, "cer": c.rate, "n": n} for code, (w, c, n) in sorted(totals.items())
        }
    }
    settings = {**settings, "normaliser": normalise, "words": asdict(words), "characters": asdict(letters)}
    return Result(
        transcriber.name, NAME, "wer, cer", None, len(judged), len(judged), sum(s.error is not None for s in judged),
        0, 0, by, 0.0, 0, settings, judged, measures={"wer": words.rate, "cer": letters.rate},
    )  # fmt: skip


def main(checkpoint: str, data: str, *, device: str = "auto", out: str | None = None, how: dict[str, Any], **options: Any) -> Result | None:  # fmt: skip
    """The command in one of its processes. how: of `open_model`; options: of `evaluate`."""
    from rich.console import Console

    from polymodal import recipe as recipes
    from polymodal.generate.opening import alike, open_model
    from polymodal.runtime import process_group

    where = Path(out) if out else Path("evaluations") / f"{Path(checkpoint.rstrip('/')).name}-{NAME}"
    recipe = recipes.Recipe(model=recipes.Model(source=checkpoint), device=recipes.Device(kind=device))  # type: ignore[arg-type]
    with process_group.runtime(recipe) as rt:
        made = open_model(checkpoint, device=rt.device.torch, locate=alike(rt), **how)
        transcriber = Transcriber(made.model, made.processor, name=made.name, identity=made.identity)
        result = evaluate(transcriber, data, out=where, progress=True, **options)
    if result is not None:
        console = Console()
        console.print(results.table(result))
        notes = [(result.errors, "could not be heard and count as wholly wrong"), (result.resumed, "taken over from an earlier start")]  # fmt: skip
        for count, what in notes:
            if count:
                console.print(f"{count} {what}")
        console.print(f"{where}/result.json, samples.jsonl, report.html", markup=False, soft_wrap=True)
    return result
