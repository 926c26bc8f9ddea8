"""The corpus: all datasets of a recipe's section joined into one numbered list of records.

Decodes no media and knows no tokens.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Record
from polymodal.core.text import nearest
from polymodal.core.user_code import load_object
from polymodal.data.captions import Captioned, Folder, listing
from polymodal.data.files import OPENERS, Rows, open_rows
from polymodal.data.formats import RowReader
from polymodal.data.own_reader import OwnRows
from polymodal.recipe import Attr, Dataset

LATER = (
    "objects",
    "bbox_format",
    "bbox_type",
    "chosen",
    "rejected",
    "label",
)  # keys of Attr that fingerprints hold only where they are set


@dataclass(frozen=True)
class Part:
    """One dataset inside a corpus: records start..stop, and how the schedule is to use them.

    fingerprint: hash of the files' content, of the format, field names and media_dir; the files' own paths
    do not enter, so that moved data keeps its index. Media beside the files are not hashed.
    """

    name: str
    start: int
    stop: int
    weight: float | None = None
    repeat: float = 1.0
    fingerprint: str = ""

    def __len__(self) -> int:
        return self.stop - self.start


class Corpus(Sequence):
    """All datasets of a section, by number. Picklable; opens files again where it is used.

    `corpus[i]` raises PolymodalError with the file and the line of a row that cannot be understood.
    """

    def __init__(self, parts: list[Part], files: list[tuple[int, Rows, RowReader]]):
        self.parts = parts
        self._files = [(rows, reader) for _, rows, reader in files]
        self._starts = [start for start, _, _ in files]
        self._length = parts[-1].stop if parts else 0
        self._states = {rows.path: _state(rows.path) for rows, _ in self._files}

    def __len__(self) -> int:
        return self._length

    def _place(self, i: int) -> tuple[Rows, RowReader, int]:
        if i < 0:
            i += self._length
        if not 0 <= i < self._length:
            raise IndexError(i)
        k = bisect_right(self._starts, i) - 1
        rows, reader = self._files[k]
        return rows, reader, i - self._starts[k]

    def changed(self) -> dict[str, str]:
        """Files that are not as they were when this was opened: "removed", "replaced" or "changed"."""
        found = {}
        for path, before in self._states.items():
            if before is not None and (now := _state(path)) != before:
                found[path] = "removed" if now is None else "changed" if now[0] == before[0] else "replaced"
        return found

    def __getitem__(self, i: int) -> Record:  # type: ignore[override]
        rows, reader, local = self._place(int(i))
        return reader.record(rows[local], rows.where(local))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(self._length))

    def where(self, i: int) -> str:
        """ "file.jsonl, line 12": the place of record i, also when the record itself is broken."""
        rows, _, local = self._place(int(i))
        return rows.where(local)

    def row(self, i: int) -> dict:
        """The row as the file holds it, before any format is applied."""
        rows, _, local = self._place(int(i))
        return rows[local]


def _state(path: str) -> tuple[int, int, int] | None:
    """Number, size and time of a file; None where there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_ino, info.st_size, info.st_mtime_ns


def expand(path: str, key: str = "data.datasets.path") -> list[str]:
    """A file, a directory (the data files directly in it) or a glob (`**` allowed) -> sorted files.

    Raises PolymodalError when there is nothing, with the nearest name that is there.
    """
    text = os.path.expanduser(path)
    if "://" in text:
        raise PolymodalError(
            f"{key} = {path}: data is read from local files.",
            "Download it first, for example with `hf download --repo-type dataset ID --local-dir DIR`.",
        )
    if os.path.isdir(text):
        files = sorted(os.path.join(text, f) for f in os.listdir(text) if _is_data(f))
        if not files:
            raise PolymodalError(
                f"{key} = {path}: the directory holds no data file ({', '.join(OPENERS)}), "
                "and no media with a .txt of the same name beside.",
                f"Name a file, or a glob such as {os.path.join(path, '**', '*.jsonl')}; "
                "write what a medium shows or says beside it, or one caption for all as `caption`.",
            )
        return files
    if os.path.exists(text):
        return [text]
    if glob.has_magic(text):
        files = sorted(f for f in glob.glob(text, recursive=True) if os.path.isfile(f))
        if not files:
            raise PolymodalError(
                f"{key} = {path}: no file matches.", "Check the pattern; ** goes through sub-directories."
            )
        return files
    folder = os.path.dirname(text) or "."
    if not os.path.isdir(folder):
        raise PolymodalError(
            f"{key} = {path}: the directory {folder} does not exist.",
            f"Paths start from the working directory, {os.getcwd()}.",
        )
    if os.path.islink(text):
        raise PolymodalError(
            f"{key} = {path}: it is a link to {os.readlink(text)}, which is not there.",
            "Correct the link, or name the file itself.",
        )
    near = nearest(os.path.basename(text), os.listdir(folder))
    raise PolymodalError(
        f"{key} = {path}: the file does not exist.",
        f"Did you mean {os.path.join(folder, near[0])}?" if near else "Check the path.",
    )


def _opened(dataset: Dataset, names: Attr, key: str) -> Iterator[tuple[Rows, str | None]]:
    """(rows, folder of their media or None) of a dataset's files, or of a directory of media with their
    texts."""
    prefix, suffix = dataset.caption_prefix, dataset.caption_suffix
    for rows, folder in _files(dataset, key):
        if dataset.caption is not None or prefix or suffix:
            rows = Captioned(rows, dataset.caption, names, prefix, suffix)
        yield rows, folder


def _files(dataset: Dataset, key: str) -> Iterator[tuple[Rows, str | None]]:
    if dataset.reader is not None:
        reader_key = f"{key.rpartition('.')[0]}.reader"
        yield OwnRows(os.path.expanduser(dataset.path), dataset.reader, reader_key), None
    elif (media := _media_folder(dataset)) is not None:
        yield media, media.path
    else:
        for path in expand(dataset.path, key):  # a .txt lists `folder,annotation file`
            for file, folder in listing(path) if path.endswith(".txt") else [(path, None)]:
                yield open_rows(file), folder


def _media_folder(dataset: Dataset) -> Folder | None:
    """The directory of media that a dataset names: no data file lies in it; there is a text of some, or one
    for all."""
    root = os.path.expanduser(dataset.path)
    if not os.path.isdir(root) or any(map(_is_data, os.listdir(root))):
        return None
    folder = Folder(root)
    return folder if folder.texts or dataset.caption is not None else None


def check_path(dataset: Dataset, key: str) -> None:
    """Raise PolymodalError when a dataset's path cannot be opened, or its reader not be found; nothing is
    read.

    The path of a dataset that is generated first may be missing, and a reader's may be no path.
    """
    root = os.path.expanduser(dataset.path)
    if dataset.reader is not None:
        load_object(dataset.reader, f"{key.rpartition('.')[0]}.reader")
        return
    if dataset.generate and (os.path.isdir(root) or not os.path.exists(root)):
        return
    folder = _media_folder(dataset)
    if folder is None:
        expand(dataset.path, key)
    elif not len(folder):
        raise PolymodalError(
            f"{key} = {dataset.path}: the directory holds neither data files nor pictures, clips or "
            "recordings.",
            "Check the path.",
        )


def _is_data(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in OPENERS and not name.startswith(".")


def _merged(own: Attr | None, common: Attr) -> Attr:
    if own is None:
        return common
    return Attr(**{**common.model_dump(exclude_none=True), **own.model_dump(exclude_none=True)})


def open_corpus(datasets: Sequence[Dataset], attr: Attr | None = None, key: str = "data.datasets") -> Corpus:
    """Open every dataset of a section; `attr` holds the field names for those that have no own.

    Scans the files (their row offsets and content hash) but reads no media. `key` names the section in
    errors. Raises PolymodalError for a missing or unreadable file and for one without rows.
    """
    parts: list[Part] = []
    files: list[tuple[int, Rows, RowReader]] = []
    start = 0
    for number, dataset in enumerate(datasets):
        at = f"{key}.{number}"
        if dataset.media_dir is not None and not os.path.isdir(os.path.expanduser(dataset.media_dir)):
            raise PolymodalError(
                f"{at}.media_dir = {dataset.media_dir}: the directory does not exist.",
                "Check the path, or leave it out when media lie beside the data file.",
            )
        names = _merged(dataset.attr, attr or Attr())
        digest = hashlib.blake2b(digest_size=16)
        unset = {key for key in LATER if getattr(names, key) is None}
        settings = [dataset.format, names.model_dump(exclude=unset), dataset.media_dir]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        stop, limit = start, dataset.max_samples or 1 << 62
        for rows, folder in _opened(dataset, names, f"{at}.path"):
            take = min(len(rows), start + limit - stop)
            if take > 0:
                reader = RowReader(dataset.format, names, rows.path, folder or dataset.media_dir)
                files.append((stop, rows, reader))
                digest.update(f"{rows.fingerprint}:{take}".encode())
                stop += take
            if stop - start >= limit:
                break
        if stop == start:
            raise PolymodalError(
                f"{at}.path = {dataset.path}: there is not a single row.",
                "Check the file, or remove the dataset.",
            )
        name = dataset.name or os.path.basename(dataset.path.rstrip("/")) or dataset.path
        taken = {p.name for p in parts}
        numbered = [name, *(f"{name} ({k})" for k in range(2, len(parts) + 3))]
        unique = next(n for n in numbered if n not in taken)
        parts.append(Part(unique, start, stop, dataset.weight, dataset.repeat, digest.hexdigest()))
        start = stop
    return Corpus(parts, files)
