"""One process at a time writes into a directory: `DirectoryLock`, a file `.lock` that says who holds it.

Where the file system has locks (flock), the kernel frees this one when its holder ends, kill -9 included. A
flock may be seen by one machine alone (Lustre without `-o flock`, FUSE) or not exist at all, so the file
also holds who locked it, and the holder sets the file's time every few seconds. A holder on this machine is
dead when no process has its id and start time; one of another machine (or container) when the file's time,
whatever the clocks say, stays as it is for three such beats.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any
from uuid import uuid4
from weakref import WeakSet

from polymodal.core.errors import PolymodalError
from polymodal.core.terminal import say
from polymodal.runtime.host import full_disk

NAME = ".lock"
BEAT = 10.0
"""Seconds between two signs of life of a holder."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_held: WeakSet[DirectoryLock] = WeakSet()


class DirectoryLock:
    """An exclusive lock of a directory, which is made when it is not there; a context manager.

    what: what the holder does, for the others' message ("training"); hint: what they are advised to do.
    Raises PolymodalError when another process holds it, with its host, process, start and command, and when
    the directory cannot be written. May wait for three beats, to see whether a holder elsewhere lives. Not
    inherited by forked children.
    """

    def __init__(self, directory: str | os.PathLike, what: str, hint: str = "", beat: float = BEAT):
        self.directory, self.what, self.beat = Path(directory), what, beat
        self.hint = hint or "Wait until it ends, or write into another directory."
        self.path = self.directory / NAME
        self.holder = _this_process(what)
        self._descriptor = -1
        self._ended = threading.Event()

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except OSError as error:
            raise full_disk(error) or PolymodalError(
                f"{self.directory} cannot be written or locked: {error.strerror or error} ({self.path}).",
                "Choose a directory that this user may write; a lock that a process of another user left is "
                "removed by that user.",
            ) from None
        _held.add(self)
        threading.Thread(target=self._sign_life, name="lock", daemon=True).start()

    def release(self) -> None:
        """Remove the file and let others in; nothing when it is not held."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        self._ended.set()
        _held.discard(self)
        with contextlib.suppress(OSError):
            if _same_file(descriptor, self.path):
                os.unlink(self.path)
        os.close(descriptor)

    def check(self) -> None:
        """Raises PolymodalError when the lock was lost: the directory was removed or replaced, or another
        machine took it because this process was stopped for longer than three beats."""
        if self._descriptor >= 0 and _same_file(self._descriptor, self.path):
            return
        by = _read(self.path)
        taken = f"is now in use by {describe(by)}" if by else "was removed or replaced"
        raise PolymodalError(
            f"{self.directory} {taken} while this process was {self.what}.",
            "Start the command again: it goes on from what is whole.",
        )

    # ------------------------------------------------------------------------

    def _try(self) -> bool:
        """Whether the lock is held now; False asks for another try."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o644)
        try:
            sure = True  # that no other process of this machine holds it
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._refusal(_read(self.path)) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                sure = False
            if not _same_file(descriptor, self.path):  # its last holder has just removed it
                return False
            holder = _read(self.path)
            if os.fstat(descriptor).st_size and self._lives(holder, sure):
                raise self._refusal(holder)
            if sure:
                self._write(descriptor)
            else:
                os.close(descriptor)
                descriptor = self._replace()
            self._descriptor, descriptor = descriptor, -1
            return True
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _lives(self, holder: dict[str, Any] | None, sure: bool) -> bool:
        """Whether the process that wrote the file still runs. sure: the kernel says none of this machine
        has it locked."""
        here = holder is not None and all(holder.get(k) == self.holder[k] for k in ("boot", "space"))
        if here and holder is not None:
            return not sure and _started(holder.get("pid")) == holder.get("started")
        before, until = _time_of(self.path), time.monotonic() + 3 * self.beat
        if holder is not None and before is not None:
            say(f"{self.path} is of {describe(holder)}: waiting for a sign of life.", error=True)
        while time.monotonic() < until:
            time.sleep(min(1.0, self.beat / 4))
            now = _time_of(self.path)
            if now is None:  # released
                return False
            if now != before:
                return True
        return False

    def _write(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(self.holder).encode(), 0)

    def _replace(self) -> int:
        """Without flock: of several that take a lock at once, the last to replace the file has it."""
        temporary = self.path.with_name(f"{NAME}.{self.holder['token']}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            self._write(descriptor)
            os.replace(temporary, self.path)
            time.sleep(min(1.0, self.beat / 4))
            if _same_file(descriptor, self.path):
                return descriptor
            raise self._refusal(_read(self.path))
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _refusal(self, holder: dict[str, Any] | None) -> PolymodalError:
        return PolymodalError(f"{self.directory} is in use by {describe(holder)}.", self.hint)

    def _sign_life(self) -> None:
        while not self._ended.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def describe(holder: dict[str, Any] | None) -> str:
    """Who holds a lock, in words; holder: what its file says."""
    if holder is None:
        return "another process"
    pid, host, what, since, command = (
        str(holder.get(key))[:200] for key in ("pid", "host", "what", "since", "command")
    )
    return f"process {pid} on host {host}, {what} since {since} ({command})"


def _this_process(what: str) -> dict[str, Any]:
    # settings on the command line may be secrets: the command's name and its file alone
    program = Path(sys.argv[0]).name.replace("__main__.py", "polymodal")
    words = [word for word in sys.argv[1:3] if "=" not in word and not word.startswith("-")]
    return {
        "what": what,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join([program, *words])[:200],
        "started": _started(os.getpid()),
        "boot": _text("/proc/sys/kernel/random/boot_id") or socket.gethostname(),
        "space": _link("/proc/self/ns/pid"),
        "token": uuid4().hex,
    }


def _started(pid: Any) -> str | None:
    """When a process of this machine started, in ticks since the machine did; None when it is gone."""
    if not isinstance(pid, int):
        return None
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock's file says, None when it says nothing that can be read."""
    try:
        with open(path, "rb") as file:
            holder = json.loads(file.read(10_000))
    except (OSError, ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _time_of(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opened, so that a network file system asks its server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def _forget() -> None:
    """In a forked child, whose descriptors would hold the parent's locks after its end."""
    for lock in list(_held):
        descriptor, lock._descriptor = lock._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
