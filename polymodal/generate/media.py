"""`polymodal generate`: clips or pictures of prompts, a sheet of all, a JSON of how each was made.

Prompts are dealt to ranks, or to groups of ranks that make each sample together.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from polymodal import __version__
from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.core.text import parse_json
from polymodal.data.files import read_text
from polymodal.generate.pipeline import Generator, Prompt, Settings, opened, suspicion

SHEET = 32
"""Samples on a contact sheet at most."""
SHEET_FRAMES = 6
"""Frames of a clip that it shows at most."""


def read_prompts(path: str) -> list[Prompt]:
    """A .txt of one prompt a line, or .jsonl of objects with Prompt's keys. Raises PolymodalError."""
    lines = read_text(str(Path(path).expanduser())).split("\n")
    known = [f.name for f in fields(Prompt)]
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            out.append(Prompt(line.strip()))
            continue
        try:
            row = parse_json(line)
            unknown = sorted(set(row) - set(known))
            if not isinstance(row.get("prompt"), str) or unknown:
                raise ValueError(f"`{unknown[0]}` is not known" if unknown else "there is no `prompt`")
            out.append(Prompt(**row))
        except (ValueError, AttributeError, TypeError) as error:
            raise PolymodalError(
                f"{path}, line {number}: {error}.",
                f"Each line is an object with prompt, and any of {', '.join(known[1:])}.",
            ) from None
    if not out:
        raise PolymodalError(f"{path} holds no prompt.", "Write one a line.")
    return out


def write_video(
    path: Path, frames: Iterable[np.ndarray], fps: float, sound: np.ndarray | None = None, rate: int = 0
) -> None:
    """Frames, uint8 [H, W, 3] each, as an H.264 mp4; odd sides lose their last row or column, as it wants.

    sound: float32 [2, samples] in -1..1 at `rate` a second, as an AAC track.
    """
    from fractions import Fraction

    import av

    rest = iter(frames)
    first = next(rest)
    height, width = first.shape[0] // 2 * 2, first.shape[1] // 2 * 2
    frame_rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=frame_rate, options={"crf": "17"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        track: Any = container.add_stream("aac", rate=rate, layout="stereo") if sound is not None else None
        for frame in itertools.chain([first], rest):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            samples = np.ascontiguousarray(sound.clip(-1, 1), dtype=np.float32)
            audio = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            audio.sample_rate = rate
            container.mux(track.encode(audio))
            container.mux(track.encode())


def save(
    folder: Path, number: int, frames: np.ndarray, fps: float, sound: np.ndarray | None = None, rate: int = 0
) -> str:
    """uint8 [F, H, W, 3] as NNNN.mp4, or NNNN.png of one frame, whole or not at all. Returns the name."""
    from PIL import Image

    name = f"{number:04d}.{'mp4' if len(frames) > 1 else 'png'}"
    partial = folder / f".{os.getpid()}-{name}"
    if len(frames) > 1:
        write_video(partial, frames, fps, sound, rate)
    else:
        Image.fromarray(frames[0]).save(partial)
    os.replace(partial, folder / name)
    return name


def evenly(frames: np.ndarray) -> np.ndarray:
    """The frames of a clip that a sheet shows."""
    return frames[np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)]


def sheet(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures side by side; of clips each row is one, with some of its frames. uint8 [H, W, 3]."""
    if any(len(sample) > 1 for sample in samples):
        rows = [list(evenly(sample)) for sample in samples]
    else:
        columns = int(np.ceil(np.sqrt(len(samples))))
        pictures = [sample[0] for sample in samples]
        rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    height, width = (max(p.shape[d] for row in rows for p in row) for d in (0, 1))
    out = np.full((len(rows) * (height + 2), max(map(len, rows)) * (width + 2), 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = y * (height + 2), x * (width + 2)
            out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return out


# --- many prompts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """prompt: with the seed that was used; file: its name, None where values are not finite."""

    number: int
    prompt: Prompt
    frames: np.ndarray
    file: str | None
    warning: str | None
    seconds: float


def make(
    generator: Generator,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    settings: Settings,
    batch_size: int,
    folder: Path,
    fps: float,
    write: bool = True,
) -> Iterator[Sample]:
    """Samples of the prompts with these numbers, written to `folder` as they are made, in batches.

    A prompt without a seed gets one from the settings' seed and its number. write: False on a rank that helps
    another one to make its samples; nothing comes of it.
    """
    for group in batches(numbers, prompts, batch_size):
        began = time.perf_counter()
        seeds = [settings.seed * 1_000_003 + i if prompts[i].seed is None else prompts[i].seed for i in group]
        seeded = [replace(prompts[i], seed=seed) for i, seed in zip(group, seeds, strict=True)]
        made = generator.sample(seeded, settings)
        seconds = (time.perf_counter() - began) / len(group)
        for position, (number, prompt, frames) in enumerate(zip(group, seeded, made, strict=True)):
            if write:
                finite = frames.dtype == np.uint8
                file = save(folder, number, frames, fps, **generator.sound_of(position)) if finite else None
                yield Sample(number, prompt, frames, file, suspicion(frames), seconds)


def batches(numbers: Sequence[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Groups of prompts to sample together; a prompt with a picture or clip goes alone."""
    out: list[list[int]] = []
    joins = False
    for number in numbers:
        p = prompts[number]
        alone = bool(p.image or p.last_image or p.video or p.references)
        if joins and not alone and len(out[-1]) < size:
            out[-1].append(number)
        else:
            out.append([number])
        joins = not alone
    return out


def main(
    checkpoint: str,
    *,
    prompts: Sequence[Prompt],
    settings: Settings,
    out: str,
    fps: float = 16.0,
    batch_size: int = 1,
    cp: int = 1,
    **opening: Any,
) -> int:
    """The command in one of its processes: NNNN.mp4 or NNNN.png, sheet.png, samples.json. Returns 0.

    cp: ranks that make each sample together. opening: options of `opened`.
    """
    if not prompts:
        raise PolymodalError("There is no prompt.", "Give --prompt TEXT or --prompts FILE.")
    folder = Path(out).expanduser()
    rows: list[dict[str, Any]] = []
    shown: dict[int, np.ndarray] = {}
    with opened(checkpoint, cp=cp, **opening) as (rt, generator):
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(rt.rank // cp, len(prompts), rt.world // cp)
        made = make(generator, prompts, mine, settings, batch_size, folder, fps, write=rt.rank % cp == 0)
        for sample in made:
            frames, height, width, _ = sample.frames.shape
            size = {"frames": frames, "height": height, "width": width, "warning": sample.warning}
            rows.append({"number": sample.number, "file": sample.file, **asdict(sample.prompt), **size})
            if sample.file is not None and sample.number < SHEET:
                shown[sample.number] = evenly(sample.frames)
            if sample.warning:
                say(f"warning: sample {sample.number} {sample.warning}", error=True)
        parts: list[Any] | None = [None] * rt.world if rt.rank == 0 else None
        dist.gather_object((rows, shown), parts)
        if parts is None:
            return 0
        about = {
            "checkpoint": str(checkpoint),
            "weights": generator.identity,
            "ema": opening.get("ema", False),
            "card": generator.family.card.name,
            "pipeline": type(generator.pipeline).__name__,
            "scheduler": type(generator.pipeline.scheduler).__name__,
            "settings": asdict(settings),
            "fps": fps,
            "polymodal": __version__,
        }
    _finish(folder, about, parts)
    return 0


def _finish(folder: Path, about: dict[str, Any], parts: list[Any]) -> None:
    """samples.json and sheet.png of all ranks' (rows, frames by number)."""
    from PIL import Image

    rows = sorted((row for part in parts for row in part[0]), key=lambda row: row["number"])
    shown = {number: frames for part in parts for number, frames in part[1].items()}
    if shown:
        Image.fromarray(sheet([shown[number] for number in sorted(shown)])).save(folder / "sheet.png")
    text = json.dumps({**about, "samples": rows}, indent=1, ensure_ascii=False)
    (folder / "samples.json").write_text(text, encoding="utf-8")
    wrong = sum(row["warning"] is not None for row in rows)
    note = f"; {wrong} look wrong" if wrong else ""
    say(f"{folder}: {len(rows)} samples, sheet.png, samples.json{note}")
