"""Error rates of a model that speaks: its speech of a file's texts, written down by a model that transcribes.

Speech is kept: a command that was stopped speaks what is missing, and another normaliser transcribes nothing
again. Rates are those of evaluate/speech.py; errors of the transcribing model are among them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polymodal.core.errors import PolymodalError
from polymodal.core.files import read_json, replace_file
from polymodal.core.terminal import Bar
from polymodal.evaluate import results, speech
from polymodal.evaluate.results import Result
from polymodal.evaluate.store import Ranks
from polymodal.evaluate.word_errors import Choice
from polymodal.generate import speak
from polymodal.generate.opening import alike, command_recipe, open_model
from polymodal.generate.transcribe import Speech, transcriber_of
from polymodal.runtime import process_group

NAME, SEED, SECONDS = "tts", 42, 60.0


def main(
    checkpoint: str,
    data: str,
    *,
    asr: str | None = None,
    out: str | None = None,
    opening: dict[str, Any],
    language: str | None = None,
    normalise: Choice = "auto",
    beams: int = 1,
    batch_size: int = 8,
    limit: int | None = None,
    media_dir: str | None = None,
    restart: bool = False,
    html: int = 300,
) -> Result | None:
    """The command in one of its processes; rank 0 gets the Result. data: as `generate --prompts` takes it,
    other columns are left out; asr: a checkpoint that transcribes. Raises PolymodalError."""
    if asr is None:
        raise PolymodalError(
            "`tts` needs a model that writes down what was said.", "Give a Whisper checkpoint with --asr."
        )
    if media_dir is not None:
        raise PolymodalError(
            "`tts` has no --media-dir: recordings of voices are relative to the file.",
            "Leave that option out.",
        )
    texts = speak.read_utterances(data, others=True)[:limit]
    where = results.directory(out, checkpoint, NAME)
    folder, device = where / "speech", opening["device"]
    rest = {key: value for key, value in opening.items() if key != "device"}
    with process_group.runtime(command_recipe(checkpoint, device)) as rt, Ranks() as world:
        opened = open_model(checkpoint, device=rt.device.torch, locate=alike(rt), **rest)
        said = hashlib.sha256(json.dumps([vars(each) for each in texts], sort_keys=True).encode()).hexdigest()
        settings = {"model": opened.identity, "texts": said, "seed": SEED, "seconds": SECONDS}
        model: Any = speak.Speaker(opened)
        with world.together():
            if world.rank == 0:
                _prepare(folder, settings, restart)
        mine = [n for n in range(rt.rank, len(texts), rt.world) if not (folder / f"{n:04d}.wav").is_file()]
        with Bar("Speaking", len(mine), hidden=rt.rank > 0) as bar:
            for number, _, made in speak.spoken(model, texts, mine, SEED, batch_size, seconds=SECONDS):
                speak.write_wav(folder / f"{number:04d}.wav", made.sound, model.rate)
                bar.advance(1)
        voice = model.voice
        name, model, opened = opened.name, None, None  # type: ignore[assignment]
        if dist.is_initialized():
            dist.barrier()
        judge = open_model(asr, device=rt.device.torch, locate=alike(rt))
        transcriber = transcriber_of(judge.model, judge.processor, name=name, identity=judge.identity)
        rows = []
        for number, text in enumerate(texts):
            spoken_in = voice.language(text.language) or language
            heard = Speech(str(folder / f"{number:04d}.wav"), language=spoken_in)
            rows.append(speech.Recording(str(number), f"{data}, text {number + 1}", heard, text.text))
        result = speech.measure(
            transcriber,
            rows,
            {**settings, "asr": judge.identity, "language": language, "beams": beams},
            out=where,
            normalise=normalise,
            beams=beams,
            batch_size=batch_size,
            restart=restart,
            html=html,
            progress=True,
            benchmark=NAME,
        )
    if result is not None:
        results.show(result, where, errors="could not be transcribed and count as wholly wrong")
    return result


def _prepare(folder: Path, settings: dict[str, Any], restart: bool) -> None:
    """The directory of speech that belongs to these settings. Raises PolymodalError where other speech is."""
    path = folder / "settings.json"
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    if path.is_file() and read_json(path) != settings:
        raise PolymodalError(
            f"{folder} holds speech of another model, or of other texts.",
            "Choose another directory with --out, or add --restart.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(settings, indent=1))
