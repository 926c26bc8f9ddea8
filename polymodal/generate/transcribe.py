"""Speech to text: files of any length, in batches over files, with or without times.

Sees opening.py, the data room's audio and errors. Generation is transformers' own. What a model hears at once is
short (30 s): longer audio is cut at its quietest moments, so that no word is cut and no overlap has to be merged.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.data import audio
from polymodal.data.files import AUDIO, VIDEO
from polymodal.generate.opening import open_model

FORMATS = ("txt", "srt", "vtt", "json")
QUIET = 0.05  # seconds of sound whose loudness is compared, where long audio is cut
LAST = 0.25  # share of a piece, at its end, in which the cut is sought


@dataclass(frozen=True)
class Speech:
    """What is to be transcribed: a file or its bytes, an excerpt of it in seconds, and what is known of it."""

    source: str | bytes
    start: float = 0.0
    stop: float | None = None
    language: str | None = None  # None: the model tells it from the beginning
    task: str = "transcribe"


@dataclass(frozen=True)
class Segment:
    """A sentence or so. Seconds are counted from the beginning of the excerpt."""

    start: float
    stop: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """segments: with times those that the model told, without them the pieces that were heard at once."""

    text: str
    seconds: float
    language: str | None
    segments: tuple[Segment, ...]


@dataclass
class _Job:
    """A file under way. missing: pieces without their text yet."""

    seconds: float
    language: str | None
    missing: int
    found: dict[int, list[Segment]]


class _Piece(NamedTuple):
    """What is heard at once: piece `number` of the job at `position`, from `start` seconds of it."""

    position: int
    number: int
    start: float
    heard: np.ndarray
    job: Speech


class Transcriber:
    """A model that transcribes, with its processor, on one device. Raises PolymodalError for other models."""

    def __init__(self, model: Any, processor: Any, *, name: str = "model", identity: str = ""):
        self.extractor = getattr(processor, "feature_extractor", None)
        self.tokenizer = getattr(processor, "tokenizer", None)
        if self.extractor is None or not hasattr(self.extractor, "chunk_length"):
            raise PolymodalError(
                f"{name} does not transcribe speech.",
                'Give a checkpoint of a model that does (`polymodal models --for "transcribe speech"`).',
            )
        self.model, self.name, self.identity = model, name, identity
        self.seconds, self.rate = float(self.extractor.chunk_length), self.extractor.sampling_rate
        facts = model.generation_config
        self.languages = {i: token[2:-2] for token, i in (getattr(facts, "lang_to_id", None) or {}).items()}
        self.multilingual = bool(getattr(facts, "is_multilingual", self.languages))

    # -- the service ----------------------------------------------------------------------------------------------

    def transcripts(
        self, jobs: Sequence[Speech], *, timestamps: bool = False, batch_size: int = 8, beams: int = 1
    ) -> Iterator[tuple[int, Transcript | PolymodalError]]:
        """(position in jobs, its text or what is wrong with it), each as soon as it is done.

        batch_size: pieces of at most what the model hears at once that are computed together.
        """
        under_way: dict[int, _Job] = {}
        waiting: list[_Piece] = []
        for position, job in enumerate(jobs):
            try:
                pieces, made = self._opened(job)
            except PolymodalError as error:
                yield position, error
                continue
            under_way[position] = made
            waiting += [_Piece(position, n, start, heard, job) for n, (start, heard) in enumerate(pieces)]
            while len(waiting) >= batch_size:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
                yield from self._batches(batch, under_way, timestamps, beams)
        while waiting:
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            yield from self._batches(batch, under_way, timestamps, beams)

    def _opened(self, job: Speech) -> tuple[list[tuple[float, np.ndarray]], _Job]:
        """(pieces with their start in seconds, what is kept of the file)."""
        language = self.code(job)
        header = audio.audio_header(job.source)
        heard = audio.decode_audio(job.source, header, self.rate, job.start, job.stop)
        ranges = quiet_cuts(heard, self.rate, self.seconds)
        pieces = [(a / self.rate, heard[a:b]) for a, b in ranges]
        if self.multilingual and language is None:
            (told,) = self.model.detect_language(self._inputs([pieces[0][1]])["input_features"]).tolist()
            language = self.languages[told]
        return pieces, _Job(len(heard) / self.rate, language, len(pieces), {})

    def code(self, job: Speech) -> str | None:
        """The code of a job's language, None where it is not said. Raises PolymodalError for one, or a task, that the model does not know."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        if job.language is None and (self.multilingual or job.task == "transcribe"):
            return None
        asked = (job.language or "en").lower()
        code = TO_LANGUAGE_CODE.get(asked, asked)
        known = self.languages.values() if self.multilingual else ("en",)
        if code not in known or (job.task != "transcribe" and not self.multilingual):
            wish = f"language {job.language}" if code not in known else f"task {job.task}"
            raise PolymodalError(
                f"{self.name} does not know the {wish}.",
                "It writes English down." if not self.multilingual else "Write codes such as en, de, zh.",
            )
        return code

    def _inputs(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The encoder's features, and which frames of them are sound."""
        made = self.extractor(
            list(pieces), sampling_rate=self.rate, return_tensors="pt", return_attention_mask=True
        )
        first = next(self.model.parameters())
        features = made.input_features.to(first.device, first.dtype)
        return {"input_features": features, "attention_mask": made.attention_mask.to(first.device)}

    def _batches(
        self, pieces: Sequence[_Piece], under_way: dict[int, _Job], timestamps: bool, beams: int
    ) -> Iterator[tuple[int, Transcript | PolymodalError]]:
        """One call of the library for each task among the pieces: it takes several languages, but one task."""
        for task in dict.fromkeys(piece.job.task for piece in pieces):
            own = [piece for piece in pieces if piece.job.task == task]
            yield from self._batch(own, task, under_way, timestamps, beams)

    def _batch(
        self, pieces: Sequence[_Piece], task: str, under_way: dict[int, _Job], timestamps: bool, beams: int
    ) -> Iterator[tuple[int, Transcript | PolymodalError]]:
        told: dict[str, Any] = {}
        if self.multilingual:
            told = {"language": [under_way[p.position].language for p in pieces], "task": task}
        with torch.inference_mode(), _without_warnings():
            given = self._inputs([piece.heard for piece in pieces])
            out = self.model.generate(**given, return_timestamps=timestamps, num_beams=beams, **told)
        for piece, ids in zip(pieces, out, strict=True):
            job, length = under_way[piece.position], len(piece.heard) / self.rate
            if timestamps:
                offsets = self.tokenizer.decode(ids, output_offsets=True)["offsets"]
                found = [_segment(part, piece.start, length) for part in offsets]
            else:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                found = [Segment(piece.start, piece.start + length, text.strip())]
            job.found[piece.number] = [segment for segment in found if segment.text]
            job.missing -= 1
            if not job.missing:
                del under_way[piece.position]
                segments = tuple(s for n in sorted(job.found) for s in job.found[n])
                text = _joined(segments, job.language)
                yield piece.position, Transcript(text, job.seconds, job.language, segments)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers warns of arguments that it gives itself, and of masks that Whisper does not look at."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _segment(part: Any, start: float, length: float) -> Segment:
    """A stretch of the library's between two times, which are those of its piece; an end that is not told is the piece's."""
    begin, end = part["timestamp"]
    stop = length if end is None else min(end, length)
    return Segment(round(start + min(begin, stop), 2), round(start + stop, 2), part["text"].strip())


def _joined(segments: Iterable[Segment], language: str | None) -> str:
    from polymodal.models.audio.whisper_speech import UNSPACED

    return ("" if language in UNSPACED else " ").join(segment.text for segment in segments)


def quiet_cuts(samples: np.ndarray, rate: int, longest: float) -> list[tuple[int, int]]:
    """Ranges of samples, each of at most `longest` seconds, cut where the last part of a piece is quietest."""
    limit, frame = int(longest * rate), max(1, int(QUIET * rate))
    out, at = [], 0
    while len(samples) - at > limit:
        first = at + int(limit * (1 - LAST))
        count = (at + limit - first) // frame
        loud = np.square(samples[first : first + count * frame].reshape(count, frame)).mean(axis=1)
        quietest = count - 1 - int(np.argmin(loud[::-1]))  # the last of several alike
        cut = first + quietest * frame + frame // 2
        out.append((at, cut))
        at = cut
    return [*out, (at, len(samples))]


# -- what is written ----------------------------------------------------------------------------------------------


def _clock(seconds: float, mark: str) -> str:
    whole = round(seconds * 1000)
    return f"{whole // 3600000:02}:{whole // 60000 % 60:02}:{whole // 1000 % 60:02}{mark}{whole % 1000:03}"


def written(made: Transcript, form: str, timestamps: bool) -> str:
    """A transcript as a file's text: txt (with times a line each), srt, vtt or json."""
    if form == "json":
        return json.dumps(asdict(made), ensure_ascii=False, indent=1) + "\n"
    if form == "txt":
        lines = [f"[{_clock(s.start, '.')} -> {_clock(s.stop, '.')}] {s.text}" for s in made.segments]
        return "\n".join(lines if timestamps else [made.text]) + "\n"
    mark = "," if form == "srt" else "."
    blocks = [
        (f"{n}\n" if form == "srt" else "")
        + f"{_clock(s.start, mark)} --> {_clock(s.stop, mark)}\n{s.text}\n"
        for n, s in enumerate(made.segments, 1)
    ]
    return ("WEBVTT\n\n" if form == "vtt" else "") + "\n".join(blocks)


def files_of(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files, and those with sound in directories, in order. Raises PolymodalError for what is not there."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.suffix.lower().removeprefix(".") in AUDIO | VIDEO)
            if not inside:
                raise PolymodalError(f"The directory {path} holds no audio or video file.", "Check the path.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise PolymodalError(
                f"{path} does not exist.", "Name audio or video files, or directories of them."
            )
    return found


def main(
    checkpoint: str,
    paths: Sequence[str],
    *,
    language: str | None = None,
    translate: bool = False,
    timestamps: bool = False,
    form: str | None = None,
    out: Path | None = None,
    batch_size: int = 8,
    beams: int = 1,
    **options: Any,
) -> int:
    """The command: prints texts, or writes a file for each into `out`. Raises PolymodalError, after all others are done,
    when files could not be transcribed."""
    if form is not None and form not in FORMATS:
        raise PolymodalError(f"--format {form} is not known.", f"Use {', '.join(FORMATS)}.")
    form, files = form or "txt", files_of(paths)
    timestamps = timestamps or form in ("srt", "vtt")
    if out is not None:
        targets = _targets(files, form)
        out.mkdir(parents=True, exist_ok=True)
    made = open_model(checkpoint, **options)
    transcriber = Transcriber(made.model, made.processor, name=made.name, identity=made.identity)
    task = "translate" if translate else "transcribe"
    jobs = [Speech(str(file), language=language, task=task) for file in files]
    wrong: list[PolymodalError] = []
    for position, found in transcriber.transcripts(
        jobs, timestamps=timestamps, batch_size=batch_size, beams=beams
    ):
        if isinstance(found, PolymodalError):
            print(f"{files[position]}: {found}", file=sys.stderr, flush=True)
            wrong.append(found)
            continue
        text = written(found, form, timestamps)
        if out is not None:
            replace_file(out / targets[position], text)
            print(
                f"{out / targets[position]}: {found.seconds:.1f} s, {len(found.text.split())} words",
                flush=True,
            )
        else:
            head = f"{files[position]}:\n" if len(files) > 1 and form == "txt" else ""
            print(head + text, end="", flush=True)
    if wrong:
        raise PolymodalError(
            f"{len(wrong)} of {len(files)} files could not be transcribed (first: {wrong[0]})"
        )
    return 0


def _targets(files: Sequence[Path], form: str) -> list[str]:
    """A name for each file's text: its own, with its ending and a number where several would have one name."""
    names: list[str] = []
    for file in files:
        tried = [
            f"{file.stem}.{form}",
            f"{file.name}.{form}",
            *(f"{file.name}-{n}.{form}" for n in range(2, len(files) + 2)),
        ]
        names.append(next(name for name in tried if name not in names))
    return names
