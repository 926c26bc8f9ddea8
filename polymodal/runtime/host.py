"""Facts about this machine that decide whether a run can work: ports, shared memory, disks, limits, clock.

Standard library only; `launch` asks before a start, `doctor` on request. Nothing here prints.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import resource
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
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
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for row in Path(table).read_text().splitlines()[1:]:
                cells = row.split()
                if cells[3] == "0A" and int(cells[1].rpartition(":")[2], 16) == port:  # 0A = LISTEN
                    inodes.add(cells[9])
    return inodes


def open_ports() -> set[int]:
    """TCP ports at which processes of this user can be reached from outside of this machine."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                cells = line.split()
                address, _, port = cells[1].rpartition(":")
                # bytes of each word in reverse: 127.x, ::1 and ::ffff:127.x
                inner = address.endswith("7F") or address == "00000000000000000000000001000000"
                if cells[3] == "0A" and cells[7] == str(os.getuid()) and not inner:
                    found.add(int(port, 16))
    return found


def port_owner(port: int) -> str | None:
    """Who listens on a TCP port of this machine, "process 4242 (python train.py)"; None when nobody does."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) in sockets:
                pid = descriptor.split("/")[2]
                command = command_of(int(pid))
                return f"process {pid}" + (f" ({command})" if command else "")
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
        f"End that process, or set {named} to another port on every node.",
    )


@dataclass(frozen=True)
class Space:
    """Bytes of a file system."""

    path: str
    total: int
    free: int


def _existing(path: str | os.PathLike) -> Path:
    """`path`, or the nearest directory above it that exists."""
    path = Path(path).absolute()
    return next((parent for parent in (path, *path.parents) if parent.exists()), path)


def space(path: str | os.PathLike) -> Space:
    """Free space where `path` is, or would be made."""
    existing = _existing(path)
    usage = shutil.disk_usage(existing)
    return Space(str(existing), usage.total, usage.free)


def shared_memory() -> Space | None:
    """/dev/shm, or None on systems without it."""
    return space("/dev/shm") if os.path.isdir("/dev/shm") else None


def require_writable(
    directory: str | os.PathLike, least_free: int = 256 * MIB, key: str = "checkpoint.dir"
) -> None:
    """Raises PolymodalError when `directory` cannot be made and written, or has less than `least_free` bytes.

    Tried with a file there, or in the nearest directory above that exists; nothing stays behind.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=_existing(directory), prefix=".write-test-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise PolymodalError(
            f"The output directory {directory} cannot be written: {error.strerror or error}.",
            f"Set {key} to a directory that this user may write, on a disk with free space.",
        ) from None
    left = space(directory)
    if left.free < least_free:
        raise PolymodalError(
            f"The disk of {directory} has only {format_bytes(left.free)} free; at least "
            f"{format_bytes(least_free)} are needed to start.",
            f"Free some space, or set {key} to another disk.",
        )


def full_disk(error: OSError) -> PolymodalError | None:
    """The error of a write that failed because the disk, the quota or a limit of file sizes is full; None for
    other errors."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    what = error.filename or "A file"
    return PolymodalError(
        f"{what} could not be written: {error.strerror or 'no space left'}.",
        "Free some space, or write to another disk; the same command then goes on from what is whole.",
    )


REFUSALS = ["EACCES", "EPERM", "EROFS", "EIO", "ESTALE", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "ELOOP"]


def machine_error(error: OSError) -> PolymodalError | None:
    """The sentence for an error that is the machine's: disks, rights, limits; None where it may be ours."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return PolymodalError(
            f"{error.filename or 'A file'} could not be opened: {open_files()[0]} open files are allowed.",
            "Raise the limit (`ulimit -n 65536`), or lower data.workers.",
        )
    if error.filename and errno.errorcode.get(error.errno or 0) in REFUSALS:
        return PolymodalError(
            f"{error.filename} cannot be used: {error.strerror}.",
            "See its rights, its disk, and what lies in its place (`ls -ld`).",
        )
    return full_disk(error)


def proc_sizes(path: str) -> dict[str, int]:
    """Bytes by name of a file of /proc with lines such as "VmRSS: 1234 kB"; empty where there is none."""
    with contextlib.suppress(OSError):
        lines = re.findall(r"^(\w+):\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
        return {name: int(size) * 1024 for name, size in lines}
    return {}


def memory() -> Space | None:
    """Main memory: the machine's, or this control group's when that is less. None when unknown."""
    sizes = proc_sizes("/proc/meminfo")
    if not sizes:
        return None
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # "max": ValueError
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit < total:
            total, free = limit, min(free, limit - used)
    return Space("memory", total, free)


def interface_towards(address: str) -> str:
    """The network interface that reaches an address, "" when that is not known. Nothing is sent.

    A name that this machine gives itself on its loopback (127.0.1.1) counts as one elsewhere: others reach it
    from there.
    """

    def source(target: str) -> str:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
        return ""

    own = source(address)
    if own.startswith("127.") and not address.startswith("127.") and address != "localhost":
        own = source("203.0.113.1") or own  # of no machine (RFC 5737): by the default route
    return next((name for name, at in _interfaces() if at == own), "")


def _interfaces() -> Iterator[tuple[str, str]]:
    """(name, IPv4 address) of each interface that has one."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
                yield name, socket.inet_ntoa(answer[20:24])


def process_limit() -> int | None:
    """How many processes may run here: the user's or the control group's limit; None = no limit."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [] if soft == resource.RLIM_INFINITY else [soft]
    with contextlib.suppress(OSError, ValueError):
        limits.append(int(Path("/sys/fs/cgroup/pids.max").read_text()))
    return min(limits, default=None)


def clock_synchronised() -> bool | None:
    """Whether the kernel's clock is kept right (by NTP); None when the kernel cannot be asked."""
    import ctypes

    try:
        # struct timex of <sys/timex.h>: only the return value of a read-only call is used; 5 = TIME_ERROR
        buffer = ctypes.create_string_buffer(512)
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != 5


def open_files() -> tuple[int, int]:
    """(soft, hard) limit of open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def oom_kills() -> int:
    """Processes that the kernel killed for memory in this control group so far; 0 when it cannot be read."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in Path(path).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0
