"""Facts about this machine that a run stands or falls with: ports, shared memory, disks, limits, clock.

Ground floor: standard library only, so that `launch` (before a start) and `doctor` (on request) share it.
Every function answers with data or raises PolymodalError with the mend; nothing here prints.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_bytes

MIB = 1 << 20
GIB = 1 << 30


def command_of(pid: int) -> str:
    """The first words of a process's command line, "" when it cannot be seen."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    text = " ".join(b" ".join(words).decode(errors="replace").split())
    return text if len(text) <= 60 else text[:57] + "..."


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            cells = row.split()
            if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:  # 0A = LISTEN
                found.add(cells[9])
    return found


def port_owner(port: int) -> str | None:
    """Who listens on a TCP port of this machine: "process 4242 (python train.py)"; None when nobody is seen."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    targets = {f"socket:[{inode}]" for inode in inodes}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in (entry / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor) in targets:
                        command = command_of(int(entry.name))
                        return f"process {entry.name}" + (f" ({command})" if command else "")
    return "a process of another user or container"


def port_free(port: int) -> bool:
    """Whether this machine can listen on the port now."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def require_port(port: int, named: str) -> None:
    """Raises PolymodalError when the port is taken. `named`: where its number came from, "MASTER_PORT"."""
    if port_free(port):
        return
    owner = port_owner(port)
    raise PolymodalError(
        f"Port {port} ({named}) is in use" + (f" by {owner}." if owner else "."),
        f"End that process, or set {named} to another port; on one machine leave it unset: a free port is chosen.",
    )


@dataclass(frozen=True)
class Space:
    """Bytes of a file system."""

    path: str
    total: int
    free: int


def space(path: str | os.PathLike) -> Space:
    """Free space where `path` is, or would be made."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    usage = shutil.disk_usage(place)
    return Space(str(place), usage.total, usage.free)


def shared_memory() -> Space | None:
    """/dev/shm, or None on systems without it."""
    return space("/dev/shm") if os.path.isdir("/dev/shm") else None


def require_writable(
    directory: str | os.PathLike, least_free: int = 256 * MIB, key: str = "checkpoint.dir"
) -> None:
    """Whether `directory` can be made and written: a file is written there (or in the nearest directory above that
    exists) and removed again; nothing stays behind.

    Raises PolymodalError when it cannot be written or has less than `least_free` bytes left.
    """
    directory = Path(directory)
    place = directory.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".write-test-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PolymodalError(
            f"The output directory {directory} cannot be written: {error.strerror or error}.",
            f"Set {key} to a directory that this user may write, on a disk with room.",
        ) from None
    left = space(directory)
    if left.free < least_free:
        raise PolymodalError(
            f"The disk of {directory} has only {format_bytes(left.free)} free; at least {format_bytes(least_free)} are needed to start.",
            f"Free some space, or set {key} to another disk.",
        )


def full_disk(error: OSError) -> PolymodalError | None:
    """What an error of writing says when its cause is a disk (or a user's share of it) without room; else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    what = error.filename or "A file"
    return PolymodalError(
        f"{what} could not be written: {error.strerror or 'no space left'}.",
        "Free some space, or write to another disk; the same command then goes on from what is whole.",
    )


def memory() -> Space | None:
    """Main memory of this process: the machine's, or its control group's when that is less. None when unknown."""
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    total, free = values.get("MemTotal", 0), values.get("MemAvailable", 0)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # "max": ValueError
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit < total:
            total, free = limit, min(free, limit - used)
    return Space("memory", total, free)


def process_limit() -> int | None:
    """How many processes may run here: the user's limit or the control group's, whichever is less; None = no limit."""
    found = []
    with contextlib.suppress(ImportError, OSError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        found += [soft] if soft != resource.RLIM_INFINITY else []
    with contextlib.suppress(OSError, ValueError):
        found.append(int(Path("/sys/fs/cgroup/pids.max").read_text()))
    return min(found) if found else None


def clock_synchronised() -> bool | None:
    """Whether the kernel says that something keeps its clock right; None when it cannot be asked."""
    import ctypes

    try:
        # struct timex of <sys/timex.h>: only the return value of a read-only call is used; 5 = TIME_ERROR
        buffer = ctypes.create_string_buffer(512)
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != 5


def open_files() -> tuple[int, int] | None:
    """(soft, hard) limit of open files of this process."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def oom_kills() -> int | None:
    """Processes that the kernel killed for memory in this control group so far; None when it does not say."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None
