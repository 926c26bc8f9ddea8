"""`polymodal generate`: prompts in, clips or pictures out, with a sheet of all and a JSON of how each was made.

Sees generate/pipeline.py and errors. Prompts are dealt out to ranks, or to groups of ranks that make each sample together; a
sample depends on its own seed alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from polymodal import __version__
from polymodal.core.errors import PolymodalError
from polymodal.generate.pipeline import Prompt, Settings, opened, suspicion

SHEET = 32
"""Samples on a contact sheet at most."""


def read_prompts(path: str) -> list[Prompt]:
    """A .txt of one prompt a line, or .jsonl of objects with Prompt's keys. Raises PolymodalError with the line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PolymodalError(f"The prompts {path} cannot be read: {error}.", "Check --prompts.") from None
    known = [f.name for f in fields(Prompt)]
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith((".jsonl", ".json")):
            out.append(Prompt(line.strip()))
            continue
        try:
            row = json.loads(line)
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
    path: Path, frames: np.ndarray, fps: float, sound: np.ndarray | None = None, rate: int = 0
) -> None:
    """uint8 [F, H, W, 3] as an H.264 mp4; odd sides lose their last row or column, as the format wants.

    sound: float32 [2, samples] in -1..1 at `rate` a second, as an AAC track.
    """
    from fractions import Fraction

    import av

    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "17"}
        )
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        track: Any = container.add_stream("aac", rate=rate, layout="stereo") if sound is not None else None
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound is not None:
            samples = np.ascontiguousarray(sound.clip(-1, 1), dtype=np.float32)
            heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            heard.sample_rate = rate
            container.mux(track.encode(heard))
            container.mux(track.encode())


def save(
    folder: Path, number: int, frames: np.ndarray, fps: float, sound: np.ndarray | None = None, rate: int = 0
) -> str:
    """uint8 [F, H, W, 3] as NNNN.mp4, or NNNN.png of one frame; there whole or not at all. Returns the file's name."""
    from PIL import Image

    name = f"{number:04d}.{'mp4' if len(frames) > 1 else 'png'}"
    partial = folder / f".{os.getpid()}-{name}"
    if len(frames) > 1:
        write_video(partial, frames, fps, sound, rate)
    else:
        Image.fromarray(frames[0]).save(partial)
    os.replace(partial, folder / name)
    return name


def sheet(samples: Sequence[np.ndarray], columns: int | None = None) -> np.ndarray:
    """Pictures side by side; of clips each row is one, with up to six of its frames. uint8 [H, W, 3]."""
    clips = any(len(s) > 1 for s in samples)
    if clips:
        rows = [
            [s[i] for i in np.linspace(0, len(s) - 1, min(6, len(s))).round().astype(int)] for s in samples
        ]
    else:
        columns = columns or int(np.ceil(np.sqrt(len(samples))))
        pictures = [s[0] for s in samples]
        rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    height, width = (max(p.shape[d] for row in rows for p in row) for d in (0, 1))
    out = np.full((len(rows) * (height + 2), max(map(len, rows)) * (width + 2), 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = y * (height + 2), x * (width + 2)
            out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
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
    **how: Any,
) -> int:
    """The command, in one of its processes: writes NNNN.mp4 or NNNN.png, sheet.png and samples.json. Returns the exit code.

    cp: ranks that make each sample together;
    how: of `opened`.
    """
    if not prompts:
        raise PolymodalError("There is no prompt.", "Give --prompt TEXT or --prompts FILE.")
    folder = Path(out).expanduser()
    with opened(checkpoint, cp=cp, **how) as (rt, generator):
        folder.mkdir(parents=True, exist_ok=True)
        if rt.rank == 0:
            for left in (*folder.glob(".part-*.jsonl"), *folder.glob(".sheet-*.npy")):  # of a killed run
                left.unlink()
        rt.barrier()
        mine = list(range(rt.rank // cp, len(prompts), rt.world // cp))
        writes = rt.rank % cp == 0
        part = folder / f".part-{rt.rank}.jsonl" if writes else Path(os.devnull)
        with open(part, "w", encoding="utf-8") as listing:
            for group in groups(mine, prompts, batch_size):
                chosen = [prompts[i] for i in group]
                numbered = [
                    Prompt(
                        **{
                            **asdict(p),
                            "seed": p.seed if p.seed is not None else settings.seed * 1_000_003 + i,
                        }
                    )
                    for i, p in zip(group, chosen, strict=True)
                ]
                made = generator.sample(numbered, settings)
                if not writes:
                    continue
                for place, (number, given, frames) in enumerate(zip(group, numbered, made, strict=True)):
                    wrong = suspicion(frames)
                    name = None
                    if frames.dtype == np.uint8:
                        name = save(folder, number, frames, fps, **generator.heard(place))
                        if number < SHEET:
                            np.save(folder / f".sheet-{number:04d}.npy", frames)
                    row = {
                        "number": number,
                        "file": name,
                        **asdict(given),
                    }
                    row |= {
                        "frames": len(frames),
                        "height": frames.shape[1],
                        "width": frames.shape[2],
                        "warning": wrong,
                    }
                    listing.write(json.dumps(row, ensure_ascii=False) + "\n")
                    if wrong:
                        print(f"warning: sample {number} {wrong}", file=sys.stderr, flush=True)
        rt.barrier()
        if rt.rank == 0:
            _finish(folder, generator, settings, fps, checkpoint, how.get("ema", False))
    return 0


def groups(mine: list[int], prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Batches of prompts that have the same kinds of conditions; a prompt with a picture or clip goes alone."""
    out: list[list[int]] = []
    for number in mine:
        p = prompts[number]
        alone = bool(p.image or p.last_image or p.video or p.references)
        if (
            not alone
            and out
            and len(out[-1]) < size
            and not prompts[out[-1][0]].image
            and not prompts[out[-1][0]].video
            and not prompts[out[-1][0]].references
        ):
            out[-1].append(number)
        else:
            out.append([number])
    return out


def _finish(folder: Path, generator: Any, settings: Settings, fps: float, checkpoint: str, ema: bool) -> None:
    from PIL import Image

    rows = []
    for part in sorted(folder.glob(".part-*.jsonl")):
        rows += [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
        part.unlink()
    rows.sort(key=lambda row: row["number"])
    shown = sorted(folder.glob(".sheet-*.npy"))
    if shown:
        Image.fromarray(sheet([np.load(path) for path in shown])).save(folder / "sheet.png")
    for path in shown:
        path.unlink()
    about = {
        "checkpoint": str(checkpoint), "weights": generator.identity, "ema": ema, "card": generator.family.card.name,
        "pipeline": type(generator.pipeline).__name__, "scheduler": type(generator.pipeline.scheduler).__name__,
        "settings": asdict(settings), "fps": fps, "polymodal": __version__, "samples": rows,
    }  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    wrong = sum(row["warning"] is not None for row in rows)
    print(
        f"{folder}: {len(rows)} samples, sheet.png, samples.json"
        + (f"; {wrong} look wrong" if wrong else ""),
        flush=True,
    )
