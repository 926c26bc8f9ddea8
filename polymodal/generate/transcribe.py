"""Speech to text: files of any length, in batches over files, with or without times.

Generation is transformers' own. A model takes a short stretch at once (30 s): longer audio is cut at its
quietest moments, so that no word is cut and no overlap has to be merged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.files import replace_file
from polymodal.core.terminal import say, say_lines
from polymodal.data import audio
from polymodal.data.files import AUDIO, VIDEO
from polymodal.generate.opening import open_model
from polymodal.models.audio.qwen3_asr_media import language_name
from polymodal.models.audio.whisper_speech import UNSPACED

FORMATS = ("txt", "srt", "vtt", "json")
FRAME = 0.05  # seconds of audio whose loudness is compared, where long audio is cut
TOKENS = 1024  # of the text of a piece, at most
LAST = 0.25  # share of a piece, at its end, in which the cut is sought


@dataclass(frozen=True)
class Speech:
    """What is to be transcribed: a file or its bytes, an excerpt of it in seconds, and what is known of
    it."""

    source: str | bytes
    start: float = 0.0
    stop: float | None = None
    language: str | None = None  # None: the model detects it at the beginning
    task: str = "transcribe"


@dataclass(frozen=True)
class Segment:
    """A sentence or so. Seconds are counted from the beginning of the excerpt."""

    start: float
    stop: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """segments: with times those that the model predicted, without them the pieces that were transcribed
    at once."""

    text: str
    seconds: float
    language: str | None
    segments: tuple[Segment, ...]


@dataclass
class _Recording:
    """A job under way. missing: pieces without their text yet; segments: of each piece."""

    position: int
    task: str
    language: str | None
    seconds: float
    missing: int
    segments: dict[float, list[Segment]] = field(default_factory=dict)
    heard: dict[float, str | None] = field(default_factory=dict)  # languages of pieces

    def transcript(self) -> Transcript:
        segments = tuple(s for start in sorted(self.segments) for s in self.segments[start])
        heard = (self.heard[start] for start in sorted(self.heard))
        language = next((each for each in heard if each is not None), self.language)
        text = ("" if language in UNSPACED else " ").join(segment.text for segment in segments)
        return Transcript(text, self.seconds, language, segments)


@dataclass(frozen=True)
class _Piece:
    """What is transcribed at once: samples from `start` seconds of a recording on."""

    recording: _Recording
    start: float
    samples: np.ndarray


class Transcriber:
    """A model that transcribes, with its processor, on one device. `transcriber_of` chooses the kind."""

    seconds: float  # that are transcribed at once
    rate: int  # samples a second

    def __init__(self, model: Any, processor: Any, name: str = "model", identity: str = ""):
        self.model, self.processor, self.name, self.identity = model, processor, name, identity
        self.extractor, self.tokenizer = processor.feature_extractor, processor.tokenizer
        self.seconds, self.rate = float(self.extractor.chunk_length), self.extractor.sampling_rate

    # -- of each kind ----------------------------------------------------------------------------------------

    def check(self, job: Speech, timestamps: bool = False) -> None:
        """Raise PolymodalError for a task or a language that the model does not know, or for times that it
        does not write."""
        raise NotImplementedError

    def code(self, job: Speech) -> str | None:
        """The code of a job's language, None where the model detects it. Raises as `check` does."""
        raise NotImplementedError

    def detected(self, samples: np.ndarray) -> str | None:
        """The language at the beginning of a recording, where it must be known before its pieces are
        transcribed."""
        return None

    def spoken(
        self, pieces: Sequence[_Piece], task: str, timestamps: bool, beams: int
    ) -> list[tuple[list[Segment], str | None]]:
        """Of each piece its segments, and the language that was heard in it, in one call of the library."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------

    def transcripts(
        self, jobs: Sequence[Speech], *, timestamps: bool = False, batch_size: int = 8, beams: int = 1
    ) -> Iterator[tuple[int, Transcript | PolymodalError]]:
        """(position in jobs, its transcript or error), each as soon as it is done.

        batch_size: pieces of at most what the model takes at once that are computed together.
        """
        waiting: list[_Piece] = []
        for position, job in enumerate(jobs):
            try:
                self.check(job, timestamps)
                waiting += self._pieces(position, job)
            except PolymodalError as error:
                yield position, error
            least = batch_size if position + 1 < len(jobs) else 1
            while len(waiting) >= least:
                batch, waiting = waiting[:batch_size], waiting[batch_size:]
                for task in dict.fromkeys(piece.recording.task for piece in batch):
                    same = [piece for piece in batch if piece.recording.task == task]
                    yield from self._transcribed(same, task, timestamps, beams)

    def _pieces(self, position: int, job: Speech) -> list[_Piece]:
        language = self.code(job)
        header = audio.audio_header(job.source)
        samples = audio.decode_audio(job.source, header, self.rate, job.start, job.stop)
        ranges = quiet_cuts(samples, self.rate, self.seconds)
        if language is None:
            language = self.detected(samples[: ranges[0][1]])
        made = _Recording(position, job.task, language, len(samples) / self.rate, len(ranges))
        return [_Piece(made, start / self.rate, samples[start:stop]) for start, stop in ranges]

    def _transcribed(
        self, pieces: Sequence[_Piece], task: str, timestamps: bool, beams: int
    ) -> Iterator[tuple[int, Transcript]]:
        """Transcripts that are whole with these pieces."""
        with torch.inference_mode(), _without_warnings():
            found = self.spoken(pieces, task, timestamps, beams)
        for piece, (segments, language) in zip(pieces, found, strict=True):
            recording = piece.recording
            recording.segments[piece.start] = [segment for segment in segments if segment.text]
            recording.heard[piece.start] = language
            recording.missing -= 1
            if not recording.missing:
                yield recording.position, recording.transcript()


class EncoderDecoderTranscriber(Transcriber):
    """Whisper: the task, the language and whether there are times are tokens of the decoder."""

    def __init__(self, model: Any, processor: Any, name: str = "model", identity: str = ""):
        super().__init__(model, processor, name, identity)
        settings = model.generation_config
        languages = getattr(settings, "lang_to_id", None) or {}  # {"<|en|>": 50259, ...}
        self.languages = {i: token[2:-2] for token, i in languages.items()}
        self.multilingual = bool(getattr(settings, "is_multilingual", self.languages))

    def check(self, job: Speech, timestamps: bool = False) -> None:
        self.code(job)

    def detected(self, samples: np.ndarray) -> str | None:
        if not self.multilingual:
            return None
        first = self._inputs([samples])["input_features"]
        return self.languages[int(self.model.detect_language(first))]

    def code(self, job: Speech) -> str | None:
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        if not self.multilingual and job.task != "transcribe":
            raise PolymodalError(
                f"{self.name} transcribes English alone, it does not {job.task}.",
                "Take a size without .en in its name.",
            )
        if job.language is None:
            return None
        code = TO_LANGUAGE_CODE.get(job.language.lower(), job.language.lower())
        if code not in (self.languages.values() if self.multilingual else ("en",)):
            raise PolymodalError(
                f"{self.name} does not know the language {job.language}.",
                "Write codes such as en, de, zh." if self.multilingual else "It transcribes English alone.",
            )
        return code

    def _inputs(self, pieces: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The encoder's features, and which frames of them are audio."""
        made = self.extractor(
            list(pieces), sampling_rate=self.rate, return_tensors="pt", return_attention_mask=True
        )
        first = next(self.model.parameters())
        features = made.input_features.to(first.device, first.dtype)
        return {"input_features": features, "attention_mask": made.attention_mask.to(first.device)}

    def spoken(
        self, pieces: Sequence[_Piece], task: str, timestamps: bool, beams: int
    ) -> list[tuple[list[Segment], str | None]]:
        """The library takes several languages in a call, but one task."""
        options: dict[str, Any] = {"return_timestamps": timestamps, "num_beams": beams}
        if self.multilingual:
            options |= {"language": [piece.recording.language for piece in pieces], "task": task}
        out = self.model.generate(**self._inputs([piece.samples for piece in pieces]), **options)
        made = []
        for piece, ids in zip(pieces, out, strict=True):
            seconds = len(piece.samples) / self.rate
            if timestamps:
                parts = self.tokenizer.decode(ids, output_offsets=True)["offsets"]
                found = [_segment(part, piece.start, seconds) for part in parts]
            else:
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                found = [Segment(piece.start, piece.start + seconds, text.strip())]
            made.append((found, piece.recording.language))
        return made


class PromptedTranscriber(Transcriber):
    """Qwen3-ASR: a language model that is asked for the text by the library's transcription request, and says
    the language before it. A language that is given is written into its answer."""

    def check(self, job: Speech, timestamps: bool = False) -> None:
        if job.task != "transcribe":
            raise PolymodalError(
                f"{self.name} transcribes, it does not {job.task}.", "Take a Whisper to translate."
            )
        if timestamps:
            raise PolymodalError(
                f"{self.name} writes no times.",
                "Leave --timestamps out and take --format txt or json, or a Whisper.",
            )
        self.code(job)

    def code(self, job: Speech) -> str | None:
        return None if job.language is None else language_name(job.language)[0]

    def spoken(
        self, pieces: Sequence[_Piece], task: str, timestamps: bool, beams: int
    ) -> list[tuple[list[Segment], str | None]]:
        asked = [piece.recording.language for piece in pieces]
        samples = [piece.samples for piece in pieces]
        # a list of languages must have one for each
        prompts = [
            self.processor.apply_transcription_request(audio=[each], language=language, tokenize=False)[0]
            for each, language in zip(samples, asked, strict=True)
        ]
        first = next(self.model.parameters())
        inputs = self.processor(text=prompts, audio=samples, sampling_rate=self.rate).to(first.device)
        inputs["input_features"] = inputs["input_features"].to(first.dtype)
        out = self.model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=TOKENS)
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
        made: list[tuple[list[Segment], str | None]] = []
        for piece, ids in zip(pieces, answers, strict=True):
            said = self.processor.decode(ids, return_format="parsed")
            language = piece.recording.language
            if language is None and said["language"]:
                with contextlib.suppress(PolymodalError):  # what it writes need not be a language
                    language = language_name(said["language"])[0]
            stop = piece.start + len(piece.samples) / self.rate
            made.append(([Segment(piece.start, stop, said["transcription"])], language))
        return made


def transcriber_of(model: Any, processor: Any, *, name: str = "model", identity: str = "") -> Transcriber:
    """By what the library's processor can be asked. Raises PolymodalError for other models."""
    if not hasattr(getattr(processor, "feature_extractor", None), "chunk_length"):
        kind = None
    elif hasattr(processor, "apply_transcription_request"):
        kind = PromptedTranscriber
    else:
        kind = EncoderDecoderTranscriber if model.config.is_encoder_decoder else None
    if kind is None:
        raise PolymodalError(
            f"{name} does not transcribe speech.",
            'Give a checkpoint of a model that does (`polymodal models --for "transcribe speech"`).',
        )
    return kind(model, processor, name, identity)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """transformers warns of arguments that it sets itself, and of masks that Whisper does not look at."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _segment(part: Any, start: float, seconds: float) -> Segment:
    """A stretch of the library's between two times of its piece; an end that it does not have is the
    piece's."""
    begin, end = part["timestamp"]
    stop = seconds if end is None else min(end, seconds)
    return Segment(round(start + min(begin, stop), 2), round(start + stop, 2), part["text"].strip())


def quiet_cuts(samples: np.ndarray, rate: int, longest: float) -> list[tuple[int, int]]:
    """Ranges of samples, each of at most `longest` seconds, cut where the last part of a piece is
    quietest."""
    limit, frame = int(longest * rate), max(1, int(FRAME * rate))
    out, at = [], 0
    while len(samples) - at > limit:
        first = at + int(limit * (1 - LAST))
        count = (at + limit - first) // frame
        loudness = np.square(samples[first : first + count * frame].reshape(count, frame)).mean(axis=1)
        quietest = count - 1 - int(np.argmin(loudness[::-1]))  # the last of several alike
        cut = first + quietest * frame + frame // 2
        out.append((at, cut))
        at = cut
    return [*out, (at, len(samples))]


# -- what is written -----------------------------------------------------------------------------------------


def _clock(seconds: float, mark: str) -> str:
    whole = round(seconds * 1000)
    return f"{whole // 3600000:02}:{whole // 60000 % 60:02}:{whole // 1000 % 60:02}{mark}{whole % 1000:03}"


def written(file: Path, made: Transcript, form: str, timestamps: bool) -> str:
    """The transcript of a file as text: txt (with times a line each), srt, vtt or json."""
    if form == "json":
        return json.dumps({"file": str(file), **asdict(made)}, ensure_ascii=False, indent=1) + "\n"
    if form == "txt":
        lines = [f"[{_clock(s.start, '.')} -> {_clock(s.stop, '.')}] {s.text}" for s in made.segments]
        return "\n".join(lines if timestamps else [made.text]) + "\n"
    mark = "," if form == "srt" else "."
    blocks = [f"{_clock(s.start, mark)} --> {_clock(s.stop, mark)}\n{s.text}\n" for s in made.segments]
    if form == "vtt":
        return "WEBVTT\n\n" + "\n".join(blocks)
    return "\n".join(f"{number}\n{block}" for number, block in enumerate(blocks, 1))


def files_of(paths: Sequence[str | os.PathLike]) -> list[Path]:
    """Files, and audio and video files in directories, in order. Raises PolymodalError for what is not
    there."""
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


def _targets(files: Sequence[Path], form: str) -> list[str]:
    """A name for each file's text: its own, with its ending and a number where several would have one
    name."""
    names: list[str] = []
    for file in files:
        numbered = (f"{file.name}-{n}.{form}" for n in range(2, len(files) + 2))
        tried = (f"{file.stem}.{form}", f"{file.name}.{form}", *numbered)
        names.append(next(name for name in tried if name not in names))
    return names


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
    """The command: prints texts, or writes a file for each into `out`.

    Raises PolymodalError, after all that can be transcribed is, when some files could not be.
    """
    form = form or "txt"
    if form not in FORMATS:
        raise PolymodalError(f"--format {form} is not known.", f"Use {', '.join(FORMATS)}.")
    files = files_of(paths)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PolymodalError(f"--out {out} cannot be made: {error.strerror}.", "Name another.") from None
    elif len(files) > 1 and form in ("srt", "vtt"):
        raise PolymodalError(f"--format {form} is one file for each recording.", "Give --out DIR for them.")
    task = "translate" if translate else "transcribe"
    jobs = [Speech(str(file), language=language, task=task) for file in files]
    made = open_model(checkpoint, **options)
    transcriber = transcriber_of(made.model, made.processor, name=made.name, identity=made.identity)
    timestamps = timestamps or form in ("srt", "vtt")
    transcriber.check(jobs[0], timestamps)  # what the model does not know is no fault of the files
    targets = _targets(files, form)
    failed = 0
    done = transcriber.transcripts(jobs, timestamps=timestamps, batch_size=batch_size, beams=beams)
    for position, found in done:
        file = files[position]
        if isinstance(found, PolymodalError):
            say(f"{file}: {found}", error=True)
            failed += 1
            continue
        text = written(file, found, form, timestamps)
        if out is None:
            head = f"{file}:\n" if len(files) > 1 and form == "txt" else ""
            say_lines(head + text)
            continue
        target = out / targets[position]
        replace_file(target, text)
        say(f"{target}: {found.seconds:.1f} s, {len(found.text.split())} words")
    if failed:
        raise PolymodalError(
            f"{failed} of {len(files)} files could not be transcribed.", "The lines above say why."
        )
    return 0
