"""The file of an index of lengths: where it lies, how it is read, written and locked.

One Arrow file, named by the hash of all that the lengths depend on, written under a temporary name and
renamed; readers map it, so the ranks of a node share one copy in memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.files import private_directory, written_whole
from polymodal.recipe import Data

log = logging.getLogger("polymodal.data")
Progress = Callable[[int, int], None]
_REMOTE = re.compile(
    "nfs|lustre|gpfs|cifs|smb|beegfs|ceph|gluster|9p|afs|panfs|wekafs|pvfs|orangefs|fuse(?!blk)"
)
"""Begins the types of network file systems; fuseblk is a local disk (ntfs, exfat)."""


class Problem(NamedTuple):
    """A record that cannot be read or measured."""

    row: int
    where: str  # "file.jsonl, line 12"
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def cache_places(data: Data) -> list[Path]:
    """Where an index may lie: data.cache_dir alone, or beside the data, the user's cache, the temporary
    directory (unless somebody else has made that of this user's name there)."""
    if data.cache_dir:
        return [Path(data.cache_dir)]
    places = []
    for dataset in [*data.datasets, *data.validation][:1]:
        place = Path(dataset.path).absolute()
        while not place.is_dir():  # a file or a pattern: the directory that is there
            place = place.parent
        places.append(place / ".polymodal")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    places.append(cache / "polymodal" / "index")
    shared = _shared_place()
    with contextlib.suppress(OSError):
        if os.path.lexists(shared):
            private_directory(shared)
        places.append(shared)
    return places


def _shared_place() -> Path:
    return Path(tempfile.gettempdir()) / f"polymodal-{os.getuid()}"


def cache_directory(data: Data, mounts: str = "/proc/mounts") -> Path:
    """Where a new index goes: the first place that can be written and is not on a network mount; it is
    created."""
    reason = ""
    for place in cache_places(data):
        if not data.cache_dir and is_remote(place, mounts):
            continue
        try:
            if place == _shared_place():
                private_directory(place)
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):  # os.access does not see read-only mounts and full quotas
                return place
        except OSError as error:
            reason = cause(error)
    if data.cache_dir:
        raise PolymodalError(
            f"data.cache_dir = {data.cache_dir} cannot be written: {reason}.",
            "Name a directory that this user may write, or remove the key.",
        )
    raise PolymodalError(
        "No directory for the index of lengths: the data's own, the user's cache and the temporary "
        "directory are all read-only, remote, full, or another user's.",
        "Set data.cache_dir to a directory that can be written.",
    )


def is_remote(path: Path, mounts: str = "/proc/mounts") -> bool:
    """Whether the path lies on a network file system, by the type of the deepest mount above it."""
    try:
        lines = Path(mounts).read_text(errors="replace").splitlines()
    except OSError:
        return False
    real = os.path.realpath(path)
    best, kind = "", ""
    for fields in (line.split() for line in lines):
        if len(fields) < 3:
            continue
        point = fields[1].encode().decode("unicode_escape")  # spaces are written \040
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return bool(_REMOTE.match(kind.lower()))


def checksum(columns: dict[str, np.ndarray]) -> int:
    value = 0
    for name in sorted(columns):
        value = zlib.crc32(np.ascontiguousarray(columns[name]).data.cast("B"), value)
    return value


def write(path: Path, key: str, columns: dict[str, np.ndarray], problems: list[Problem]) -> None:
    """One Arrow file, each column a list of one value: columns of any length, all mapped without a copy."""
    import pyarrow as pa

    arrays = [
        pa.LargeListArray.from_arrays(pa.array([0, len(c)], pa.int64()), pa.array(c))
        for c in columns.values()
    ]
    about = {"key": key, "checksum": str(checksum(columns)), "problems": json.dumps(problems)}
    batch = pa.record_batch(arrays, names=list(columns)).replace_schema_metadata(about)
    try:
        with written_whole(path) as temporary, pa.ipc.new_file(str(temporary), batch.schema) as writer:
            writer.write_batch(batch)
    except OSError as error:  # a full disk must not stop a run: the lengths are in memory
        message = "The index of lengths could not be kept at %s (%s); it will be measured again."
        log.warning(message, path, error.strerror)


def _mapped(values: Any) -> np.ndarray:
    """A pyarrow array of numbers without a copy. Not its to_numpy, which imports pandas: half a second."""
    dtype = np.dtype(values.type.to_pandas_dtype())
    if not len(values):
        return np.empty(0, dtype)
    return np.frombuffer(values.buffers()[1], dtype, len(values), values.offset * dtype.itemsize)


def read(path: Path, key: str) -> tuple[dict[str, np.ndarray], list[Problem]] | None:
    """(columns, problems) of the cache file, mapped; None when there is none or it is not whole."""
    import pyarrow as pa

    if not path.is_file():
        return None
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        about = {k.decode(): v.decode() for k, v in (batch.schema.metadata or {}).items()}
        names = batch.schema.names
        columns = {name: _mapped(batch.column(name).values) for name in names}
        if about["key"] == key and int(about["checksum"]) == checksum(columns):
            return columns, [Problem(*p) for p in json.loads(about["problems"])]
    except Exception:  # parsers raise errors of every type
        pass
    log.warning("The cached index %s is not whole: lengths are measured again.", path)
    return None


@contextlib.contextmanager
def lock(path: Path, report: Progress) -> Iterator[Progress]:
    """One measuring process a directory; the others wait and show its progress, which it writes into the
    lock file."""
    handle = _acquire(path, report)
    written = 0.0

    def publish(done: int, total: int) -> None:
        nonlocal written
        report(done, total)
        if time.monotonic() - written > 0.5:
            written = time.monotonic()
            state = {"done": done, "total": total, "pid": os.getpid(), "host": socket.gethostname()}
            os.pwrite(handle, json.dumps(state).ljust(200).encode(), 0)

    try:
        yield publish
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _acquire(path: Path, report: Progress) -> int:
    """The lock file's descriptor, once it is locked by this process."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            about = os.fstat(handle)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
                os.close(handle)
                raise OSError(errno.ELOOP, "it is a link, or not a file")
        except OSError as error:
            raise PolymodalError(
                f"The lock file {path} cannot be taken: {cause(error)}.",
                "Remove it, or set data.cache_dir to a directory that only you may write.",
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError, KeyError):
                state = json.loads(os.pread(handle, 1000, 0))
                report(state["done"], state["total"])
            time.sleep(0.2)
        except (
            OSError
        ):  # a file system without locks: measuring twice is harmless, the file is replaced whole
            return handle
        else:
            with contextlib.suppress(FileNotFoundError):  # its last holder may have removed it meanwhile
                if os.fstat(handle).st_ino == os.stat(path).st_ino:
                    return handle
        os.close(handle)
