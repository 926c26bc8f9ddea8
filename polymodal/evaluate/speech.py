"""Word and character error rates of a model that transcribes, over a file of recordings with their texts.

Recordings are spread over ranks by length. A rank appends each text to its own file at once: a run that was
killed continues. Rates are computed at the end: another normaliser transcribes nothing again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.data import audio
from polymodal.data.source import open_corpus
from polymodal.data.speech import TIMES, recording
from polymodal.evaluate import results
from polymodal.evaluate.results import Judged, Result
from polymodal.evaluate.store import Ranks, complete, store_in
from polymodal.evaluate.word_errors import (
    CHOICES,
    Choice,
    Errors,
    Normaliser,
    character_errors,
    normaliser,
    word_errors,
)
from polymodal.generate.transcribe import Speech, Transcriber, transcriber_of
from polymodal.recipe import Dataset

NAME = "speech"


@dataclass(frozen=True)
class Recording:
    """A record: what is to be transcribed, and the text that is right."""

    id: str
    where: str
    speech: Speech
    expected: str


def recordings(
    data: str, media_dir: str | None = None, language: str | None = None
) -> tuple[list[Recording], str]:
    """(rows of {audio, text, language?, task?, start?, end?}, fingerprint of the file)."""
    corpus = open_corpus([Dataset(path=data, media_dir=media_dir)], None, "--data")
    out: list[Recording] = []
    for i in range(len(corpus)):
        record = corpus[i]
        try:
            medium, text = recording(record)
        except PolymodalError as error:
            raise error.at(record.where) from None
        extra = record.extra
        speech = Speech(
            medium.source,  # type: ignore[arg-type]
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
    """Transcribe every row and count errors. Collective in a process group; rank 0 gets the Result.

    language: of rows that name none; None lets the model detect it. normalise: what of spelling does not
    count, see word_errors.normaliser. Result.measures: wer, cer. Raises PolymodalError.
    """
    rows, digest = recordings(data, media_dir, language)
    rows = rows[:limit] if limit else rows
    settings = {"model": transcriber.identity, "data": digest, "language": language, "beams": beams}
    options = {
        "beams": beams,
        "batch_size": batch_size,
        "restart": restart,
        "html": html,
        "progress": progress,
    }
    return measure(transcriber, rows, settings, out=out, normalise=normalise, **options)


def measure(
    transcriber: Transcriber,
    rows: Sequence[Recording],
    settings: dict[str, Any],
    *,
    out: str | Path | None,
    normalise: Choice,
    beams: int,
    batch_size: int,
    restart: bool,
    html: int,
    progress: bool,
    benchmark: str = NAME,
) -> Result | None:
    """`evaluate` of rows that are known. settings: what the transcriptions belong to."""
    if normalise not in CHOICES:
        raise PolymodalError(f"--normalise {normalise} is not known.", f"Use {', '.join(CHOICES)}.")
    began = time.perf_counter()

    def answer(mine: list[int]) -> Iterator[dict[str, Any]]:
        jobs = [rows[i].speech for i in mine]
        for position, made in transcriber.transcripts(jobs, batch_size=batch_size, beams=beams):
            entry: dict[str, Any] = {"id": rows[mine[position]].id}
            if isinstance(made, PolymodalError):
                yield {**entry, "answer": "", "error": str(made)}
            else:
                yield {**entry, "answer": made.text, "language": made.language, "seconds": made.seconds}

    with Ranks() as world, store_in(out, settings, world) as store:
        alone = world.size == 1
        entries, resumed = complete(
            store,
            world,
            [row.id for row in rows],
            answer,
            cost=lambda i: 1.0 if alone else _seconds(rows[i]),
            restart=restart,
            title=transcriber.name if progress else None,
        )
        if world.rank != 0:
            return None
    result = replace(_judged(transcriber, rows, entries, normalise, settings), benchmark=benchmark)
    return results.finish(result, out, began, resumed, html, "transcribed", lambda i: ())


def _judged(
    transcriber: Transcriber,
    rows: Sequence[Recording],
    entries: dict[str, Any],
    normalise: Choice,
    settings: dict[str, Any],
) -> Result:
    from polymodal.models.audio.whisper_speech import UNSPACED

    spelling = getattr(transcriber.tokenizer, "english_spelling_normalizer", None)
    judged: list[Judged] = []
    counts: dict[str, tuple[Errors, Errors, int]] = {}
    cleaners: dict[str, Normaliser] = {}
    for i, row in enumerate(rows):
        entry = entries[row.id]
        spoken = entry.get("language") or row.speech.language or "en"
        written = "en" if row.speech.task == "translate" else spoken
        if written not in cleaners:
            cleaners[written] = normaliser(normalise, written, spelling, written in UNSPACED)
        clean = cleaners[written]
        said, expected = clean(entry["answer"]), clean(row.expected)
        words, letters = word_errors(said, expected), character_errors(said, expected)
        had = counts.get(written, (Errors(), Errors(), 0))
        counts[written] = had[0] + words, had[1] + letters, had[2] + 1
        measures = {"wer": words.rate, "cer": letters.rate}
        about = ("", (row.expected,), {}, {"language": written}, entry["answer"], said)
        score = float(not words.edits and not entry.get("error"))
        judged.append(
            Judged(i, row.id, row.where, *about, score=score, error=entry.get("error"), measures=measures)
        )
    words = sum((t[0] for t in counts.values()), Errors())
    letters = sum((t[1] for t in counts.values()), Errors())
    by = {
        "language": {
            code: {"wer": w.rate, "cer": c.rate, "n": n} for code, (w, c, n) in sorted(counts.items())
        }
    }
    settings = {**settings, "normaliser": normalise, "words": asdict(words), "characters": asdict(letters)}
    totals = {"wer": words.rate, "cer": letters.rate}
    return Result(transcriber.name, NAME, "wer, cer", None, judged, settings, by, totals)


def main(
    checkpoint: str, data: str, *, out: str | None = None, opening: dict[str, Any], **options: Any
) -> Result | None:
    """The command in one of its processes. opening: of `opened_model`; options: those of `evaluate`."""
    from polymodal.generate.opening import opened_model

    where = results.directory(out, checkpoint, NAME)
    with opened_model(checkpoint, **opening) as made:
        transcriber = transcriber_of(made.model, made.processor, name=made.name, identity=made.identity)
        result = evaluate(transcriber, data, out=where, progress=True, **options)
    if result is not None:
        results.show(result, where, errors="could not be transcribed and count as wholly wrong")
    return result
