"""`polymodal data codes`: recordings with their texts -> the same rows with the codes of a model's codec.

Rows are appended to a file beside the target as they are made, and a command that was stopped goes on behind
the last whole one; the target appears when all are there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Media, Record
from polymodal.core.terminal import Bar, say
from polymodal.data import audio
from polymodal.data.formats import CODES, REFERENCE
from polymodal.data.source import open_corpus
from polymodal.data.speech import recording
from polymodal.data.speech_codes import written
from polymodal.models import catalog
from polymodal.recipe import Dataset
from polymodal.runtime import device as devices


def main(
    source: str, target: Path, *, model: str, media_dir: str | None, device: str, batch_size: int
) -> int:
    """The command. Returns 0; raises PolymodalError for rows without a recording or a text, and where
    `target` exists."""
    if target.exists():
        raise PolymodalError(f"{target} exists already.", "Choose another name, or remove it.")
    directory = catalog.resolve(model)
    family = catalog.find(model).family
    try:
        codec = family.read_codec(directory)
    except NotImplementedError:
        raise PolymodalError(
            f"{model} has no codec: it does not speak.",
            'Give a checkpoint of a model that does (`polymodal models --for "text to speech"`).',
        ) from None
    codec = codec.to(devices.find(device, 0).torch)  # type: ignore[arg-type]
    corpus = open_corpus([Dataset(path=source, media_dir=media_dir)], None, "data")
    mark = f"{corpus.parts[0].fingerprint[:12]}-{directory.resolve().name}"
    partial = target.with_name(f".{target.name}.{mark}.partial")
    done = _whole_lines(partial)
    if done:
        say(f"{partial} has {done} of {len(corpus)} rows already: going on behind them")
    target.parent.mkdir(parents=True, exist_ok=True)
    frames = 0
    with partial.open("a", encoding="utf-8") as file, Bar("Encoding", len(corpus), done) as bar:
        for start in range(done, len(corpus), batch_size):
            records = [corpus[i] for i in range(start, min(start + batch_size, len(corpus)))]
            made = codec.encode([_heard(record, codec) for record in records])
            for record, codes in zip(records, made, strict=True):
                frames += len(codes)
                file.write(json.dumps(_row(record, codes.tolist()), ensure_ascii=False) + "\n")
            file.flush()
            bar.advance(len(records))
    os.replace(partial, target)
    seconds = frames * codec.config.encode_downsample_rate / codec.config.input_sample_rate
    say(
        f"{target}: {len(corpus)} rows, codes of {seconds:.1f} s made"
        + (f" (and {done} rows before)" if done else "")
    )
    return 0


def _whole_lines(path: Path) -> int:
    """Rows of an earlier command; what was cut off behind the last of them is removed."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")


def _heard(record: Record, codec: Any) -> torch.Tensor:
    """Samples of a record's recording. Raises PolymodalError with its place."""
    try:
        medium, _ = recording(record)
        written(record)
        header = audio.audio_header(medium.source)  # type: ignore[arg-type]
        excerpt = record.extra.get("start", 0.0), record.extra.get("end")
        rate = codec.config.input_sample_rate
        heard = audio.decode_audio(medium.source, header, rate, *excerpt)  # type: ignore[arg-type]
    except PolymodalError as error:
        raise error.at(record.where) from None
    return torch.from_numpy(heard).to(codec.device)


def _row(record: Record, codes: list[list[int]]) -> dict[str, Any]:
    """A record as a row; recordings that were inside the file are left out, their codes are there."""
    kept = {key: value for key, value in record.extra.items() if isinstance(value, (str, int, float))}
    row = {
        key: value
        for key, value in kept.items()
        if key not in ("audio", "text", "start", "end", CODES, REFERENCE)
    }
    row["text"] = written(record)
    for key, medium in (("audio", record.media[0]), (REFERENCE, record.extra.get(REFERENCE))):
        if isinstance(medium, Media) and isinstance(medium.source, str):
            row[key] = os.path.abspath(medium.source)
        elif isinstance(medium, Media) and key == REFERENCE:
            raise PolymodalError(
                f"{record.where}: the voice in `{REFERENCE}` is inside of the row.",
                "Write it to a file, and its path in the row.",
            )
    return {**row, CODES: codes}
