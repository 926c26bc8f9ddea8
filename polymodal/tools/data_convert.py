"""Other data formats -> MLLM JSON: `polymodal data convert SRC DEST`.

Rows stream through; the output appears under its name only when it is whole, so that a conversion can be
repeated or killed at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Located, Media, Message, Record
from polymodal.core.terminal import Bar
from polymodal.data.box_columns import SCALES
from polymodal.data.files import open_rows
from polymodal.data.formats import RowReader
from polymodal.data.references import References
from polymodal.data.source import expand
from polymodal.recipe import Attr

MAGIC = {
    "image": {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"},
    "video": {b"\x1aE\xdf\xa3": ".webm"},
    "audio": {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"ID3": ".mp3", b"\xff": ".mp3"},
}


@dataclass
class Conversion:
    """What a conversion did. missing: (place of the row, medium) of every medium that is not there."""

    destination: str
    rows: int = 0
    written: int = 0
    text_only: int = 0  # of those written
    media: int = 0  # of those written
    missing: list[tuple[str, str]] = field(default_factory=list)
    report: str | None = None  # file that lists the missing media

    def __str__(self) -> str:
        text = (
            f"{self.written} of {self.rows} rows written to {self.destination} "
            f"({self.media} media, {self.text_only} rows of text only)"
        )
        if self.missing:
            text += (
                f"; {len(self.missing)} media are missing, {self.rows - self.written} rows left out for it: "
                f"see {self.report}"
            )
        return text + "."


def convert(
    source: str,
    destination: str,
    format: Literal["auto", "llava", "sharegpt", "alpaca", "openai", "mllm"] = "auto",
    media_dir: str | None = None,
    missing: Literal["skip", "keep", "fail"] = "skip",
    attr: Attr | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write `source` (file, directory or glob) as MLLM JSON: {"images": [...], "messages": [{"role",
    "content"}]}.

    destination: .json (one list) or .jsonl; replaced when it exists. media_dir: put before the rows' media
    paths as it is given; without it paths are written relative to the destination's directory. Media that
    rows have as bytes are written to <destination without ending>_media. missing: rows whose media are not
    there are left out, kept, or an error; they are listed in <destination>.missing.txt. Text-only rows are
    kept, with `images: []`. progress(done, total) replaces the bar. Raises PolymodalError for rows that
    cannot be understood; nothing is then written.
    """
    ending = os.path.splitext(destination)[1].lower()
    if ending not in (".json", ".jsonl"):
        raise PolymodalError(
            f"The destination {destination} ends in neither .json nor .jsonl.",
            "Choose one of them: .json is one list, .jsonl one row a line.",
        )
    if missing not in ("skip", "keep", "fail"):
        raise PolymodalError(f"--missing = {missing} is unknown.", "Choose skip, keep or fail.")
    if media_dir is not None and not os.path.isdir(os.path.expanduser(media_dir)):
        raise PolymodalError(f"--media-dir {media_dir}: the directory does not exist.", "Check the path.")
    paths = expand(source, "SRC")
    if any(os.path.realpath(p) == os.path.realpath(destination) for p in paths):
        raise PolymodalError(f"The destination {destination} is the source itself.", "Choose another name.")
    files = [open_rows(path) for path in paths]
    total, attr = sum(map(len, files)), attr or Attr()
    out = Conversion(destination)
    try:
        os.makedirs(os.path.dirname(destination) or ".", exist_ok=True)
        with whole_file(destination) as file, _bar(total, progress) as report:
            for rows, path in zip(files, paths, strict=True):
                reader = RowReader(format, attr, path, media_dir or "")  # "": paths as the row has them
                writer = _Writer(destination, References(attr, path, None) if media_dir is None else None)
                for i in range(len(rows)):
                    record = reader.record(rows[i], rows.where(i))
                    absent = [p for m in record.media for p in writer.files(m) if not os.path.isfile(p)]
                    out.rows += 1
                    report(out.rows, total)
                    out.missing += [(record.where, p) for p in absent]
                    if absent and missing != "keep":
                        continue
                    text = json.dumps(writer.row(record), ensure_ascii=False)
                    if ending == ".json":
                        file.write(("[\n" if out.written == 0 else ",\n") + text)
                    else:
                        file.write(text + "\n")
                    out.written += 1
                    out.text_only += not record.media
                    out.media += len(record.media)
            if ending == ".json":
                file.write("\n]\n" if out.written else "[]\n")
            _check_written(source, out, missing)
    except OSError as error:
        raise PolymodalError(
            f"{destination} cannot be written: {error.strerror or error}.",
            "Check the disk's space and the directory's permissions.",
        ) from None
    listing = destination + ".missing.txt"
    if out.missing:
        with whole_file(listing) as file:
            file.writelines(f"{where}\t{name}\n" for where, name in out.missing)
        out.report = listing
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(listing)  # of an earlier run
    return out


def _check_written(source: str, out: Conversion, missing: str) -> None:
    """Raise PolymodalError, before the output gets its name, where it is not what was asked for."""
    if out.missing and missing == "fail":
        where, name = out.missing[0]
        raise PolymodalError(
            f"{where}: {name} is not there, and {len(out.missing) - 1} more media of {out.rows} rows.",
            "Check --media-dir, or use --missing skip or keep. Nothing was written.",
        )
    if not out.rows:
        raise PolymodalError(f"{source} holds no row.", "Check the file; nothing was written.")
    if not out.written:
        raise PolymodalError(
            f"{source}: not one of {out.rows} rows has all its media.",
            "Check --media-dir; nothing was written.",
        )


class _Writer:
    """Records as rows of MLLM JSON, with paths that hold from the destination."""

    def __init__(self, destination: str, places: References | None):
        self.folder = os.path.dirname(destination) or "."
        self.media = os.path.splitext(destination)[0] + "_media"
        self.places = places  # where the rows' relative paths start; None: they are written as they are

    def files(self, medium: Media) -> list[str]:
        """The files of a medium, as they are found from here."""
        if isinstance(medium.source, bytes):
            return []
        names = medium.source if isinstance(medium.source, tuple) else (medium.source,)
        return [self.places.path(n, "") if self.places else n for n in names]

    def row(self, record: Record) -> dict[str, Any]:
        if record.plain:
            raise PolymodalError(
                f"{record.where}: the row is plain text.",
                "It needs no conversion: use format: text in the recipe.",
            )
        out: dict[str, Any] = {
            f"{k}s": [self._name(m) for m in record.media if m.kind == k] for k in ("image", "video", "audio")
        }
        out = {k: v for k, v in out.items() if v or k == "images"}
        out["messages"] = [self._message(m, record.where) for m in record.messages]
        out |= self._objects(record)
        if record.tools:
            out["tools"] = list(record.tools)
        return out

    def _message(self, message: Message, where: str) -> dict[str, Any]:
        for part in message.content:
            mark = next(
                (m for m in ("<image>", "<video>", "<audio>") if isinstance(part, str) and m in part), None
            )
            if mark:
                raise PolymodalError(
                    f"{where}: the text itself holds {mark}, which marks a medium in MLLM JSON.",
                    "Change that text, or train from the original with format: openai.",
                )
        content = "".join(p if isinstance(p, str) else f"<{p.kind}>" for p in message.content)
        out: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning is not None:
            out["reasoning_content"] = message.reasoning
        if message.tool_calls:
            out["tool_calls"] = list(message.tool_calls)
        if message.weight is not None:
            out["weight"] = message.weight
        return out

    def _objects(self, record: Record) -> dict[str, Any]:
        """The column of boxes, for the marks that the messages have in their place."""
        located = [p for m in record.messages for p in m.content if isinstance(p, Located)]
        pictures = [m for m in record.media if m.kind == "image"]
        found = [box for part in located for box in part.boxes]
        labels = [p.label for p in located if p.kind == "ref-object"] or [b.label for b in found if b.label]
        if not located:
            return {}
        names = {scale: name for name, scale in SCALES.items()}
        objects = {
            "ref": labels,
            "bbox": [list(box.values) for box in found],
            "bbox_type": [names[box.scale] for box in found],
            "image_id": [pictures.index(box.picture) for box in found],
        }
        return {"objects": objects}

    def _name(self, medium: Media) -> str | list[str]:
        if not isinstance(medium.source, bytes):
            own = medium.source if isinstance(medium.source, tuple) else (medium.source,)
            names = [
                n if self.places is None or os.path.isabs(n) else os.path.relpath(f, self.folder)
                for n, f in zip(own, self.files(medium), strict=True)
            ]
            return names if isinstance(medium.source, tuple) else names[0]
        data = medium.source
        ending = next(
            (e for magic, e in MAGIC[medium.kind].items() if data.startswith(magic)),
            {"image": ".bin", "video": ".mp4", "audio": ".m4a"}[medium.kind],
        )
        os.makedirs(self.media, exist_ok=True)
        path = os.path.join(self.media, hashlib.blake2b(data, digest_size=12).hexdigest() + ending)
        if not os.path.exists(path):
            with whole_file(path, "wb") as file:
                file.write(data)
        return os.path.relpath(path, self.folder)


@contextlib.contextmanager
def whole_file(path: str, mode: str = "w") -> Iterator[Any]:
    """A file that appears under its name when all of it is written; nothing stays behind after a fault."""
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=os.path.dirname(path) or ".")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's file is for its owner only
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def _bar(total: int, progress: Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    if progress is not None:
        yield progress
        return
    with Bar("Converting", total) as bar:
        yield bar.update
