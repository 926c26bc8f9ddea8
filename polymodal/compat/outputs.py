"""Names and lines of what inference, evaluation and extraction leave behind, as the documents have them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from polymodal.core.files import replace_file, written_whole
from polymodal.core.terminal import plain, say
from polymodal.tools.translate.ledger import read_config

if TYPE_CHECKING:
    import numpy as np

    from polymodal.tools.translate.launch import Launch


def sheet_stem(launch: Launch) -> str:
    """<model>_<dataset> of an evaluation file."""
    values = read_config(launch.open(launch.flags.values["mm-model"]))
    return f"{values.get('evaluation_model', 'model')}_{values.get('evaluation_dataset', 'data')}"


def name(launch: Launch, words: Sequence[str]) -> None:
    """After a command of ours: files of the documented names, and its last lines. words: the command's."""
    if launch.kind == "generate":
        generated(Path(_after(words, "--out", "samples")), float(_after(words, "--fps", "16")))
    elif launch.kind == "evaluate":
        answered(Path(_after(words, "--out", "")))


def _after(words: Sequence[str], flag: str, otherwise: str) -> str:
    return words[words.index(flag) + 1] if flag in words else otherwise


# ---- clips and pictures -----------------------------------------------------------------------------------


def generated(folder: Path, fps: float) -> None:
    """NNNN.mp4 become video_<index>.mp4, with video_grid.mp4 of all; pictures image_<index>.png."""
    about = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    clips = list[Path]()
    for row in about["samples"]:
        if row["file"] is None:
            continue
        old = folder / row["file"]
        row["file"] = f"{'video' if old.suffix == '.mp4' else 'image'}_{row['number']}{old.suffix}"
        os.replace(old, folder / row["file"])
        if old.suffix == ".mp4":
            clips.append(folder / row["file"])
    replace_file(folder / "samples.json", json.dumps(about, indent=1, ensure_ascii=False))
    if clips:
        _grid(clips, folder / "video_grid.mp4", fps)
    say("Inference finished.")
    say(f"Saved {len(about['samples'])} samples to {folder}")


def _grid(clips: Sequence[Path], out: Path, fps: float) -> None:
    """All clips in one, in rows of ceil(sqrt(N)), a pixel apart; frame by frame, so that many fit."""
    import numpy as np

    from polymodal.generate.media import write_video

    columns = math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)

    def frames() -> Iterator[np.ndarray]:
        with contextlib.ExitStack() as stack:
            streams = [_frames(clip, stack) for clip in clips]
            held = [next(stream) for stream in streams]
            height, width = max(each.shape[0] for each in held), max(each.shape[1] for each in held)
            while True:
                whole = np.zeros((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), np.uint8)
                for at, frame in enumerate(held):
                    top, left = at // columns * (height + 1) + 1, at % columns * (width + 1) + 1
                    whole[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
                yield whole
                following = [next(stream, None) for stream in streams]
                if all(each is None for each in following):
                    return
                held = [old if new is None else new for old, new in zip(held, following, strict=True)]

    with written_whole(out) as temporary:
        write_video(temporary, frames(), fps)


def _frames(clip: Path, stack: contextlib.ExitStack) -> Iterator[np.ndarray]:
    import av

    container = stack.enter_context(av.open(str(clip)))
    for frame in container.decode(video=0):
        yield frame.to_ndarray(format="rgb24")


# ---- answers ----------------------------------------------------------------------------------------------


def answered(folder: Path) -> None:
    """Beside our directory of an evaluation: <its name>.xlsx of the answers and <its name>_acc.xlsx."""
    samples = [json.loads(text) for text in (folder / "samples.jsonl").read_text("utf-8").splitlines()]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    letters = sorted({letter for sample in samples for letter in sample["options"]})
    groups = sorted({group for sample in samples for group in sample["groups"]})
    rows = [["index", "question", *letters, "answer", *groups, "prediction", "hit"]]
    for sample in samples:
        options = [sample["options"].get(letter) for letter in letters]
        own = [sample["groups"].get(group) for group in groups]
        answer = " | ".join(sample["expected"])
        hit = [sample["answer"], sample["score"]]
        rows.append([sample["id"], sample["question"], *options, answer, *own, *hit])
    write_sheet(folder.with_name(f"{folder.name}.xlsx"), rows)
    scores: dict[str, Any] = {"Overall": result["score"]}
    for values in result["by"].values():
        scores |= {str(value): means.get("score") for value, means in values.items()}
    file = folder.with_name(f"{folder.name}_acc.xlsx")
    write_sheet(file, [[*scores], [*scores.values()]])
    say(f"save acc file to {file}")


OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
TYPES = "application/vnd.openxmlformats-officedocument.spreadsheetml"
RELATIONS = "application/vnd.openxmlformats-package.relationships+xml"


def _relation(kind: str, target: str) -> str:
    return (
        f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r1" Type="{OFFICE}/{kind}" '
        f'Target="{target}"/></Relationships>'
    )


def write_sheet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """An .xlsx of one sheet (Office Open XML, ECMA-376): numbers are numbers, all else text, None nothing."""

    def cell(value: Any) -> str:
        if value is None:
            return "<c/>"
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return f"<c><v>{value!r}</v></c>"
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(plain(value))}</t></is></c>'

    body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    files: Mapping[str, str] = {
        "[Content_Types].xml": (
            f'<Types xmlns="{PACKAGE}/content-types"><Default Extension="rels" ContentType="{RELATIONS}"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{TYPES}.sheet.main+xml"/>'
            f'<Override PartName="/xl/sheet1.xml" ContentType="{TYPES}.worksheet+xml"/></Types>'
        ),
        "_rels/.rels": _relation("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": (
            f'<workbook xmlns="{SHEETS}" xmlns:r="{OFFICE}"><sheets><sheet name="Sheet1" sheetId="1" '
            'r:id="r1"/></sheets></workbook>'
        ),
        "xl/_rels/workbook.xml.rels": _relation("worksheet", "sheet1.xml"),
        "xl/sheet1.xml": f'<worksheet xmlns="{SHEETS}"><sheetData>{body}</sheetData></worksheet>',
    }
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for part, text in files.items():
            archive.writestr(part, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>{text}')


# ---- features ---------------------------------------------------------------------------------------------


def encoded(folder: Path) -> None:
    """The last lines of an extraction; its files have the documented names already."""
    say(f"Dataset metadata written to: {folder / 'data.jsonl'}")
    say("Feature extraction completed successfully")
