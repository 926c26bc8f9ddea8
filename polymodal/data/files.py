"""Data files as lists of rows: json, jsonl, csv, tsv, parquet, webdataset tar; any row by its number.

Opening scans a file once for the offset of every row and for the content hash; afterwards a row is read by
its offset, so that memory does not grow with the file. Each process opens its own file handles: a `Rows` can
be pickled to workers.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import open_file
from polymodal.core.text import check_characters, parse_json

CHUNK = 4 << 20  # bytes read at a time while scanning
ROW_GROUPS = 256 << 20  # bytes of decompressed parquet row groups a process keeps

# What a file may ask for; docs/data.md names these.
MAX_ROW = 256 << 20  # bytes of one row's text: a line, a record of a table, a value of a list, a tar's member
MAX_TEXT = 16 << 20  # bytes of a caption in a file of its own, or of a list of folders
MAX_COLUMNS = 10_000
MAX_GROUP = 4 << 30  # decompressed bytes of one parquet row group
MAX_ROWS_A_BYTE = 16  # rows of a parquet file for each of its bytes: more are copies of a few
AGAIN = "Copy the file again: it is damaged, or was not made by the usual programs."

IMAGE = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "ppm"})
VIDEO = frozenset({"mp4", "webm", "mkv", "mov", "avi", "m4v"})
AUDIO = frozenset({"wav", "flac", "mp3", "ogg", "m4a", "opus", "aac", "oga", "wma"})
_COLUMNS = {
    **dict.fromkeys(IMAGE, "images"),
    **dict.fromkeys(VIDEO, "videos"),
    **dict.fromkeys(AUDIO, "audios"),
}
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
_SPACES = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder(strict=False).raw_decode
csv.field_size_limit(MAX_ROW)  # benchmarks keep whole pictures in a field


class Rows:
    """Rows of one file. `path` is as the user gave it; `fingerprint` is a hash of the content."""

    unit = "row"

    def __init__(self, path: str):
        self.path = path
        self.fingerprint = ""
        self._handle: Any = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i as a mapping. Raises PolymodalError with the file and the line when it cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        try:
            row = self._row(i)
        except PolymodalError:
            raise
        except Exception as error:  # parsers raise errors of every type
            reason = f"{self.where(i)}: the row cannot be read: {cause(error)}."
            raise PolymodalError(reason, AGAIN) from error
        if len(row) > MAX_COLUMNS:
            raise PolymodalError(
                f"{self.where(i)}: a row of {len(row):,} columns, more than {MAX_COLUMNS:,}.",
                "Write what belongs together as one column, a list.",
            )
        return row

    def _row(self, i: int) -> dict[str, Any]:
        """Row i. What it raises becomes a PolymodalError in `__getitem__`."""
        raise NotImplementedError

    def where(self, i: int) -> str:
        """ "file.jsonl, line 12": the place of row i, counted from 1."""
        return f"{self.path}, {self.unit} {i + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the file, by pread: safe in threads and after fork."""
        if self._handle is None:
            try:
                self._handle = open_file(self.path)  # kept open for the life of the process
            except OSError as error:
                raise PolymodalError(
                    f"{self.path} cannot be opened any more: {cause(error)}.",
                    "It was removed or its disk is gone: put it back and start again; training resumes.",
                ) from None
        return os.pread(self._handle.fileno(), stop - start, start)

    def _object(self, i: int, data: bytes) -> dict[str, Any]:
        try:
            row = parse_json(data.removeprefix(_MARK).decode())
        except UnicodeDecodeError as error:
            raise PolymodalError(
                f"{self.where(i)}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8."
            ) from None
        except ValueError as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
                reason = f"more follows the row's object: {error.doc[error.pos :][:20]!r}"
            raise PolymodalError(
                f"{self.where(i)}: not valid JSON: {reason}.",
                "Correct the row; training may leave it out (data.on_error: skip).",
            ) from None
        if b"\\ud" in data or b"\\uD" in data:  # escapes of surrogates: in pairs they are one character
            check_characters(row, self.where(i))
        if not isinstance(row, dict):
            raise PolymodalError(
                f"{self.where(i)}: a row is an object with keys, this one is a {_kind(row)}.",
                'Write rows as {"messages": [...]}.',
            )
        return row


def _kind(value: Any) -> str:
    """JSON's name of a value's type."""
    names = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _too_long(where: str, what: str) -> tuple[str, str]:
    """(message, hint) for a row of more than MAX_ROW bytes."""
    hint = "Write one row a line, and name large media by their paths in place of their bytes."
    return f"{where}: {what} is longer than {MAX_ROW >> 20} MiB, which one row may have.", hint


class Spans(Rows):
    """Rows that are JSON objects at known byte ranges of the file: int64 arrays, 16 bytes a row."""

    _starts: np.ndarray
    _ends: np.ndarray

    def __len__(self) -> int:
        return len(self._starts)

    def _row(self, i: int) -> dict[str, Any]:
        return self._object(i, self._bytes(int(self._starts[i]), int(self._ends[i])))


class JsonLines(Spans):
    """One JSON object a line; blank lines are passed over."""

    def __init__(self, path: str):
        super().__init__(path)
        digest = hashlib.blake2b(digest_size=16)
        breaks = []
        size = 0
        with open_file(path) as file:
            skip = 3 if file.read(3) == _MARK else 0
            file.seek(0)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                breaks.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + size)
                size += len(chunk)
        ends = np.concatenate([*breaks, [size]]) if breaks else np.zeros(0, np.int64)
        starts = np.concatenate([[skip], ends[:-1] + 1]) if len(ends) else ends
        keep = ends > starts
        for i in np.flatnonzero(keep & (ends - starts < 64)):  # a short line may be blank
            keep[i] = bool(self._bytes(int(starts[i]), int(ends[i])).strip())
        self._starts, self._ends = starts[keep].astype(np.int64), ends[keep].astype(np.int64)
        lines = np.flatnonzero(keep)
        if (longest := np.flatnonzero(ends - starts > MAX_ROW)).size:
            raise PolymodalError(*_too_long(f"{path}, line {longest[0] + 1}", "the line"))
        self._lines = None if len(lines) == 0 or lines[-1] == len(lines) - 1 else lines
        self.fingerprint = digest.hexdigest()

    def where(self, i: int) -> str:
        return f"{self.path}, line {(i if self._lines is None else int(self._lines[i])) + 1}"


class _Window:
    """A file's text read in pieces, one Latin-1 character per byte, so that places are byte offsets.

    JSON's marks are ASCII, and in UTF-8 no other character holds such a byte.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.blake2b(digest_size=16)
        self.text, self.at, self.base = "", 0, 0  # base: offset of text[0] in the file
        if self.more() and self.text.startswith("\xef\xbb\xbf"):
            self.at = 3

    def more(self, size: int = 0) -> bool:
        """Drop what lies before `at` and read on; False at the end of the file."""
        chunk = self.file.read(size or CHUNK)
        self.digest.update(chunk)
        self.base += self.at
        self.text, self.at = self.text[self.at :] + chunk.decode("latin-1"), 0
        return bool(chunk)

    def mark(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def values(self) -> Iterator[tuple[int, int]]:
        """(first byte, byte after the last) of each value of a list. Raises JSONDecodeError."""
        if not self.mark():
            raise json.JSONDecodeError("the file is empty", "", 0)
        self.at += 1
        empty = self.mark() == "]"
        while not empty and self.mark():
            start = self.base + self.at
            self.skip_value()
            yield start, self.base + self.at
            if self.mark() != ",":
                break
            self.at += 1
        if self.mark() != "]":
            cause = "a comma is missing" if self.mark() else "the list is not closed"
            raise json.JSONDecodeError(cause, "", self.base + self.at)
        self.at += 1
        if self.mark():
            raise json.JSONDecodeError("something follows the list", "", self.base + self.at)

    def skip_value(self) -> None:
        """Go behind the JSON value that begins here. Raises JSONDecodeError and RecursionError."""
        size = CHUNK
        while True:
            try:
                _, stop = _decode(self.text, self.at)
                if stop < len(self.text) or self.text[stop - 1] in '}]"' or not self.more(size):
                    self.at = min(stop, len(self.text))  # at the file's end `more` has dropped what is before
                    return
            except json.JSONDecodeError as error:
                inside = error.pos < len(self.text) - 16 and not error.msg.startswith("Unterminated")
                place = self.base + error.pos
                if inside or not self.more(size):
                    raise json.JSONDecodeError(error.msg, "", place) from None
            if len(self.text) - self.at > MAX_ROW:
                place = self.base + self.at
                raise json.JSONDecodeError(f"a row is longer than {MAX_ROW >> 20} MiB", "", place)
            size = min(size * 2, MAX_ROW)


class JsonArray(Spans):
    """A JSON list of objects, scanned once in pieces and then read row by row."""

    def __init__(self, path: str):
        super().__init__(path)
        starts, ends = array("q"), array("q")
        with open_file(path) as file:
            text = _Window(file)
            if text.mark() not in ("", "["):
                raise PolymodalError(
                    f"{path}: a .json file holds a list of rows, this one begins with {text.mark()!r}.",
                    "Write [{...}, {...}], or one object a line in a .jsonl file.",
                )
            try:
                for start, stop in text.values():
                    starts.append(start)
                    ends.append(stop)
            except (ValueError, RecursionError) as error:
                known = isinstance(error, json.JSONDecodeError)
                reason, place = (error.msg, error.pos) if known else (cause(error), text.base + text.at)
                file.seek(0)
                line = 1 + sum(
                    file.read(min(CHUNK, place - at)).count(b"\n") for at in range(0, place, CHUNK)
                )
                raise PolymodalError(
                    f"{path}, line {line}: not valid JSON: {reason} (after row {len(starts)}).",
                    "Correct the file; `python -m json.tool FILE` points to the same place.",
                ) from None
        self._starts, self._ends = np.array(starts, np.int64), np.array(ends, np.int64)
        self.fingerprint = text.digest.hexdigest()


class Delimited(Rows):
    """csv or tsv with a header line; quoted fields may hold line breaks. Values are text or None."""

    unit = "line"

    def __init__(self, path: str, delimiter: str):
        super().__init__(path)
        self._delimiter = delimiter
        digest = hashlib.blake2b(digest_size=16)
        offset = line = start = 0

        def lines(file: BinaryIO) -> Iterator[str]:
            nonlocal offset, line
            while raw := file.readline(MAX_ROW + 1):
                digest.update(raw)
                offset += len(raw)
                line += 1
                if offset - start > MAX_ROW:
                    raise PolymodalError(*_too_long(f"{path}, line {line}", "the record that ends here"))
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")

        places = []  # first byte, byte after the last, line
        try:
            with open_file(path) as file:
                reader = csv.reader(lines(file), delimiter=delimiter)
                self.columns = next(reader, [])
                start, first = offset, line
                for row in reader:
                    if row:
                        places.append((start, offset, first + 1))
                    start, first = offset, line
        except csv.Error as error:
            kind = "csv" if delimiter == "," else "tsv"
            reason, hint = cause(error), "Quote what holds the separator, quotes or line breaks."
            if "new-line" in reason:
                reason, hint = "a line ends in a lone carriage return", "Save it with line ends of \\n."
            raise PolymodalError(f"{path}, line {line}: not valid {kind}: {reason}.", hint) from None
        except UnicodeDecodeError as error:
            raise PolymodalError(
                f"{path}, line {line}: not UTF-8 text ({error.reason}).", "Save the file as UTF-8."
            ) from None
        if len(self.columns) > MAX_COLUMNS:
            raise PolymodalError(
                f"{path}, line 1: {len(self.columns):,} columns, more than {MAX_COLUMNS:,}.",
                "The first line names the columns: it seems to hold something else.",
            )
        twice = sorted(c for c, count in Counter(self.columns).items() if count > 1)
        if twice:
            raise PolymodalError(
                f"{path}, line 1: the column {twice[0]!r} is there twice.", "Rename one of them."
            )
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def where(self, i: int) -> str:
        return f"{self.path}, line {self._places[i, 2]}"

    def _row(self, i: int) -> dict[str, Any]:
        start, stop, _ = self._places[i].tolist()
        text = self._bytes(start, stop).decode("utf-8")
        values = next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter))
        if len(values) != len(self.columns):
            raise PolymodalError(
                f"{self.where(i)}: {len(values)} fields, but the header has {len(self.columns)}.",
                "Put fields that hold the separator or line breaks in double quotes.",
            )
        return {c: v or None for c, v in zip(self.columns, values, strict=True)}


class Parquet(Rows):
    """Parquet, by row groups: a process keeps the groups it used last, up to 256 MiB.

    Shuffled reading is fast when a row group fits there; write files with a few hundred rows a group.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self._shared: list[str] = []
        self.fingerprint = hash_file(path)
        meta = self._file().metadata
        groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
        sizes = [group.num_rows for group in groups]
        if min(sizes, default=0) < 0 or sum(sizes) != meta.num_rows:
            raise PolymodalError(f"{path}: not a readable parquet file: its row counts are wrong.", AGAIN)
        if meta.num_rows > max(100_000, MAX_ROWS_A_BYTE * os.path.getsize(path)):
            raise PolymodalError(
                f"{path}: {meta.num_rows:,} rows in {os.path.getsize(path):,} bytes are copies of a few.",
                "Write each row once; a dataset's `repeat` says how often it is used.",
            )
        if meta.num_columns > MAX_COLUMNS:
            raise PolymodalError(
                f"{path}: {meta.num_columns:,} columns, more than {MAX_COLUMNS:,}.",
                "Write what belongs together as one column, a list.",
            )
        self._shared = sorted({name for n in range(len(groups)) for name in self._repeated(n, meta.schema)})
        self._starts = np.append(0, np.cumsum(sizes, dtype=np.int64))
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._handle = None  # opened again with the columns above

    def _repeated(self, at: int, schema: Any) -> Iterator[str]:
        """Text columns of a row group whose equal values are kept once: written once too, a few bytes could
        fill the memory. Raises PolymodalError for a group that is too large anyway.

        pyarrow (as of 26.0) ends the process when it shows a column whose statistics are damaged, but raises
        an error when it reads from it: a row is read first, and small groups without lists are not looked at.
        """
        group = self._file().metadata.row_group(at)
        large = group.total_byte_size > MAX_GROUP
        for number in range(group.num_columns):
            size = max(schema.column(number).length or 0, 4)
            flat = schema.column(number).max_repetition_level == 0
            if flat and group.num_rows * max(size, group.total_byte_size) <= MAX_GROUP:
                continue
            next(self._file().iter_batches(1, [at], [schema.column(number).path]), None)
            column = group.column(number)
            text = column.physical_type == "BYTE_ARRAY"
            large |= max(column.total_uncompressed_size, size * column.num_values) > MAX_GROUP
            if text and column.num_values * column.total_uncompressed_size > MAX_GROUP:
                if column.has_dictionary_page or "DELTA_BYTE_ARRAY" in column.encodings:
                    yield column.path_in_schema
        if large:
            raise PolymodalError(
                f"{self.path}: a row group unpacks to more than {MAX_GROUP >> 30} GiB.",
                "Write it with smaller row groups, a few hundred rows each.",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_groups": OrderedDict()}

    def _file(self) -> Any:
        if self._handle is None:
            import pyarrow.parquet as pq

            try:  # not mapped: a file that is cut while it is mapped kills its readers
                self._handle = pq.ParquetFile(self.path, read_dictionary=self._shared)
            except Exception as error:
                raise PolymodalError(
                    f"{self.path}: not a readable parquet file: {cause(error)}.",
                    "Copy it again; the file may be cut short.",
                ) from None
        return self._handle

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _row(self, i: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, i, "right")) - 1
        table = self._groups.pop(group, None)
        if table is None:
            try:
                table = self._file().read_row_group(group)
                if table.num_rows != self._starts[group + 1] - self._starts[group]:
                    raise ValueError(f"it has {table.num_rows} rows, not those of the file's footer")
            except Exception as error:
                raise PolymodalError(
                    f"{self.where(i)}: this part of the parquet file cannot be read: {cause(error)}.",
                    "Copy the file again.",
                ) from None
            while self._groups and sum(t.nbytes for t in self._groups.values()) + table.nbytes > ROW_GROUPS:
                self._groups.popitem(last=False)
        self._groups[group] = table
        return table.slice(i - int(self._starts[group]), 1).to_pylist()[0]


class _TarHeaders(io.FileIO):
    """A tar as its headers are read: a header that claims more than 64 MiB of itself is refused, and a
    negative size not taken for all that follows."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= 64 << 20:
            raise tarfile.ReadError("a header's size is wrong")
        return super().read(size)


class Tar(Rows):
    """A webdataset shard: members with the same stem (up to the first dot of the name) make one row.

    json gives the row's columns, txt the column `text`, cls the column `cls`; pictures, videos and sounds
    come as bytes under `__media__`, each with its member name; `__key__` is the stem. The fingerprint covers
    all headers, all text members and the first 4 KiB of every medium (its own header): opening does not read
    the whole shard.
    """

    def __init__(self, path: str):
        super().__init__(path)
        digest = hashlib.blake2b(digest_size=16)
        rows: dict[str, list[tuple[int, int, int]]] = {}
        kinds: dict[str, int] = {}  # what follows a stem -> its number
        size = os.path.getsize(path)
        try:
            with open_file(path) as file, _TarHeaders(path) as headers:
                # names that are no UTF-8 are kept apart, as \xff
                tar = tarfile.open(fileobj=headers, mode="r:", errors="backslashreplace")  # noqa: SIM115
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if member.size < 0 or member.issparse() or len(member.name) > 4096:
                        name = member.name[:200]
                        raise tarfile.ReadError(f"the member {name} has no size, a long name, or is sparse")
                    if not member.isfile() or not stem or "__MACOSX" in folder:
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"the member {member.name} goes beyond the end of the file")
                    text = kind.rpartition(".")[2].lower() in ("json", "txt", "cls")
                    if text and member.size > MAX_ROW:
                        raise PolymodalError(*_too_long(path, f"the member {member.name}"))
                    file.seek(member.offset_data)
                    digest.update(f"{member.name}\0{member.size}\0{member.mtime}\0".encode())
                    digest.update(file.read(member.size if text else min(member.size, 4096)))
                    place = kinds.setdefault(kind, len(kinds)), member.offset_data, member.size
                    rows.setdefault(f"{folder}/{stem}" if folder else stem, []).append(place)
        except PolymodalError:
            raise
        except Exception as error:
            raise PolymodalError(
                f"{path}: not a readable tar file: {cause(error)}.",
                "Copy it again; compressed tars (.tar.gz) have no random access: unpack them to .tar.",
            ) from None
        self._kinds = list(kinds)
        self._members = np.array([m for members in rows.values() for m in members], np.int64).reshape(-1, 3)
        self._starts = np.append(0, np.cumsum([len(m) for m in rows.values()], dtype=np.int64))
        self._keys = np.array([key.encode() for key in rows], bytes)  # a list would take ten times the memory
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def _key(self, i: int) -> str:
        return self._keys[i].decode()

    def where(self, i: int) -> str:
        return f"{self.path}, row {i + 1} ({self._key(i)})"

    def _row(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        media: dict[str, list[tuple[str, bytes]]] = {}
        key = self._key(i)
        for number, offset, size in self._members[self._starts[i] : self._starts[i + 1]].tolist():
            name = f"{key}.{self._kinds[number]}"
            kind = name.rpartition(".")[2].lower()
            data = self._bytes(offset, offset + size)
            if kind in _COLUMNS:
                media.setdefault(_COLUMNS[kind], []).append((name, data))
            elif kind == "json":
                row.update(self._object(i, data))
            elif kind in ("txt", "cls"):
                try:
                    row["text" if kind == "txt" else "cls"] = data.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise PolymodalError(
                        f"{self.where(i)}: the member {name} is not UTF-8 text ({error.reason}).",
                        "Save the member as UTF-8 and pack the tar again.",
                    ) from None
        row["__key__"] = key
        if media:
            row["__media__"] = media
        return row


def read_text(path: str) -> str:
    """A small text that is a whole file. Raises PolymodalError."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise ValueError(f"it is longer than {MAX_TEXT >> 20} MiB")
        return data.removeprefix(_MARK).decode()
    except Exception as error:
        raise PolymodalError(f"{path} cannot be read: {cause(error)}.", "Save it as UTF-8 text.") from None


def hash_file(path: str) -> str:
    """Hash of a file's bytes, about a second a gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    with open_file(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _json(path: str) -> Rows:
    """JSON by its content, whatever its ending: a list of rows, or one object a line."""
    with open_file(path) as file:
        head = file.read(CHUNK).removeprefix(_MARK).lstrip()
    if head.startswith(b"[") or not (head.startswith(b"{") or path.lower().endswith((".jsonl", ".ndjson"))):
        return JsonArray(path)
    line, _, rest = head.partition(b"\n")
    if rest.strip() and not rest.lstrip().startswith(b"{"):
        with contextlib.suppress(ValueError):
            parse_json(line.decode())
            return JsonLines(path)
        raise PolymodalError(
            f"{path}, line 1: the file holds JSON objects over several lines.",
            "Write one object a line (`jq -c . FILE > rows.jsonl`), or a list [{...}, {...}].",
        )
    return JsonLines(path)


_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
OPENERS = {
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": lambda path: Delimited(path, ","),
    ".tsv": lambda path: Delimited(path, "\t"),
    ".parquet": Parquet,
    ".tar": Tar,
}


def open_rows(path: str) -> Rows:
    """The rows of one file, by its ending. Raises PolymodalError for an unknown kind and for an unreadable
    file."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in OPENERS:
        packed = ending in (".gz", ".zst", ".xz", ".bz2", ".zip", ".tgz")
        hint = "Unpack it first." if packed else f"Known endings: {', '.join(OPENERS)}."
        raise PolymodalError(f"{path}: files ending in {ending or 'nothing'} cannot be read as data.", hint)
    try:
        with open_file(path) as file:
            head = file.read(4)
        if ending not in (".parquet", ".tar") and (head[:2] in _UTF16 or b"\0" in head):
            raise PolymodalError(
                f"{path}: the text is UTF-16 or UTF-32, not UTF-8.",
                "Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8 FILE > NEW`).",
            )
        return OPENERS[ending](path)
    except PolymodalError:
        raise
    except OSError as error:
        raise PolymodalError(
            f"{path} cannot be read: {cause(error)}.",
            "Check that this user may read it, and that its disk answers.",
        ) from None
    except Exception as error:  # parsers raise errors of every type
        raise PolymodalError(f"{path} cannot be read as {ending[1:]}: {cause(error)}.", AGAIN) from error
