"""A directory is held by one process: others are told by whom, and a holder that died is recognised."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from polymodal.core.errors import PolymodalError
from polymodal.runtime.lock import NAME, DirectoryLock

HOLD = """
import os, sys, time
from polymodal.runtime.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1], "training", beat=0.2)
lock.acquire()
child = os.fork() if sys.argv[2] == "fork" else 1
if sys.argv[2] != "fork" or child == 0:  # the child runs: it has let go of the lock
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def holder(directory: Path, how: str = "alone") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def written(directory: Path, **other: object) -> None:
    """A lock's file as a process elsewhere would leave it."""
    lock = DirectoryLock(directory, "training")
    directory.mkdir(exist_ok=True)
    (directory / NAME).write_text(json.dumps({**lock.holder, "host": "node-7", **other}))


@pytest.fixture
def without_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_the_second_is_told_who_holds_it_and_a_killed_holder_is_none(tmp_path):
    process = holder(tmp_path / "run")
    try:
        with pytest.raises(PolymodalError) as error:
            DirectoryLock(tmp_path / "run", "training", "Choose another.").acquire()
        assert f"process {process.pid} on host" in str(error.value) and "since 20" in str(error.value)
        assert error.value.hint == "Choose another."
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "run" / NAME).exists()
    with DirectoryLock(tmp_path / "run", "training") as lock:
        lock.check()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_child_that_outlives_its_killed_parent_holds_nothing(tmp_path):
    process = holder(tmp_path, "fork")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    try:
        with DirectoryLock(tmp_path, "training"):
            pass
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_one_process_takes_a_directory_once_and_a_copy_of_it_is_free(tmp_path):
    with DirectoryLock(tmp_path / "a", "training"):
        with pytest.raises(PolymodalError, match=f"process {os.getpid()}"):
            DirectoryLock(tmp_path / "a", "training").acquire()
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        with DirectoryLock(tmp_path / "b", "training"):
            pass


@pytest.mark.parametrize("elsewhere", [{"boot": "another machine"}, {"space": "pid:[1]"}])
def test_a_holder_elsewhere_lives_while_it_sets_the_time_of_its_file(tmp_path, elsewhere):
    written(tmp_path, **elsewhere)
    ended = threading.Event()

    def beat():
        moment = 10**9  # a clock that is far off, and goes back
        while not ended.wait(0.05):
            moment -= 1
            os.utime(tmp_path / NAME, (moment, moment))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(PolymodalError, match="node-7"):
            DirectoryLock(tmp_path, "training", beat=0.3).acquire()
    finally:
        ended.set()
        thread.join()
    with DirectoryLock(tmp_path, "training", beat=0.05) as lock:
        assert json.loads((tmp_path / NAME).read_text())["token"] == lock.holder["token"]


def test_a_holder_shows_its_life(tmp_path):
    with DirectoryLock(tmp_path, "training", beat=0.02):
        first = os.stat(tmp_path / NAME).st_mtime_ns
        for _ in range(500):
            if os.stat(tmp_path / NAME).st_mtime_ns != first:
                return
            time.sleep(0.02)
    raise AssertionError("the file's time did not change")


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1]", b"{", b'{"pid": "x"}', b"9" * 5000])
def test_a_file_that_says_nothing_is_no_holder(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with DirectoryLock(tmp_path, "training", beat=0.05):
        pass


def test_without_locks_of_the_file_system_process_and_start_decide(tmp_path, without_flock):
    with DirectoryLock(tmp_path, "training", beat=0.1):
        with pytest.raises(PolymodalError, match=f"process {os.getpid()}"):
            DirectoryLock(tmp_path, "training", beat=0.1).acquire()
    process = holder(tmp_path / "dead")
    process.kill()
    process.wait()
    with DirectoryLock(tmp_path / "dead", "training", beat=0.1) as lock:
        lock.check()
    written(tmp_path / "reused", started="1")  # another process has this id since
    with DirectoryLock(tmp_path / "reused", "training", beat=0.1):
        pass
    assert sorted(p.name for p in (tmp_path / "dead").iterdir()) == []


def test_without_locks_of_the_file_system_one_of_many_has_it(tmp_path, without_flock):
    written(tmp_path, started="1")
    locks = [DirectoryLock(tmp_path, "training", beat=4.0) for _ in range(6)]
    failures = []

    def acquire(lock):
        try:
            lock.acquire()
        except PolymodalError as error:
            failures.append(error)

    threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 5
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lost_lock_is_noticed(tmp_path):
    lock = DirectoryLock(tmp_path / "run", "training")
    lock.acquire()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(PolymodalError, match="removed or replaced while this process was training"):
        lock.check()
    written(tmp_path / "run")
    with pytest.raises(PolymodalError, match="node-7"):
        lock.check()
    lock.release()
    assert (tmp_path / "run" / NAME).exists()


def test_what_cannot_be_locked_is_one_sentence(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / NAME).symlink_to(target)
    for directory in (tmp_path, target):
        with pytest.raises(PolymodalError, match="cannot be written or locked"):
            DirectoryLock(directory, "training").acquire()
    assert target.read_text() == "kept"
    with pytest.raises(PolymodalError, match="cannot be written or locked"):
        DirectoryLock("/proc/nothing", "training").acquire()


def test_settings_on_the_command_line_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/polymodal", "train", "token=secret", "--hosts=a", "more=secret"])
    with DirectoryLock(tmp_path, "training") as lock:
        assert lock.holder["command"] == "polymodal train"
        assert "secret" not in (tmp_path / NAME).read_text()
