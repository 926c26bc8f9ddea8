"""Files that appear under their name whole, or not at all; and what is whole of others."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    temporary.unlink(missing_ok=True)
    try:
        # made here, so that no link which somebody else put there is followed
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
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
