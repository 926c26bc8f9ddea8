"""Files that appear under their name whole, or not at all; and the ways to open one that others may have
made."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from polymodal.core.errors import PolymodalError, cause

JSON_FILE = 64 << 20  # bytes of a file of settings, an index or a manifest


def open_file(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """A regular file opened for reading. Raises OSError; also for a directory, a pipe or a device, at which
    reading would wait or never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "it is a directory")
        if not stat.S_ISREG(mode):
            raise OSError(22, "it is a pipe, a socket or a device, not a file")
        return open(handle, "rb", buffering=buffering)
    except BaseException:
        os.close(handle)
        raise


def read_json(path: Path, hint: str = "Copy the file again from its origin.") -> dict[str, Any]:
    """A JSON object that is a whole file. Raises PolymodalError."""
    try:
        with open_file(path) as file:
            text = file.read(JSON_FILE + 1)
        if len(text) > JSON_FILE:
            raise ValueError(f"it is longer than {JSON_FILE >> 20} MiB")
        data = json.loads(text)
    except Exception as error:
        raise PolymodalError(f"{path} cannot be read: {cause(error)}.", hint) from None
    if not isinstance(data, dict):
        raise PolymodalError(f"{path}: expected a JSON object, this is a {type(data).__name__}.", hint)
    return data


def private_directory(path: Path) -> None:
    """Make a directory of a name that others can foresee where they may write, or take the one that is there.
    Raises OSError for a link and for another user's."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
        raise PermissionError(1, "it is a link or belongs to another user")
    if about.st_mode & 0o077:
        path.chmod(0o700)


def file_stem(name: str, most: int = 80) -> str:
    """`name` as part of a file's name: its last `most` bytes (a file system counts bytes, not letters),
    without separators, line breaks and other control characters, dots and dashes in front."""
    text = "".join("_" if c in "/\\" or not c.isprintable() else c for c in name)
    cut = text.encode("utf-8", "replace")[-most:].decode("utf-8", "ignore")
    return cut.lstrip(".- ") or "sample"


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to, which is renamed to `file` at the end; removed after an exception,
    and what was there before is then untouched."""
    temporary = file.with_name(f".{file_stem(file.name, 200)}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of an earlier process of this number, or a link that somebody laid
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(file: Path, text: str) -> None:
    """Write a text file (UTF-8). Raises OSError."""
    with written_whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def metric_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of a metrics.jsonl that are an object with a step, as they are and parsed; what a full disk, lost
    power or an editor left of others is passed over. Raises OSError."""
    for line in file.read_bytes().splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            yield line, values
