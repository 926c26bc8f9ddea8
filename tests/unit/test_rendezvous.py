"""The stores of a run: what listens where, and that nothing which others put there runs code."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters

from polymodal.core.errors import PolymodalError
from polymodal.runtime import host, rendezvous
from tests.unit.test_launch import another_launcher, free_port

SHOWS = """
with joined():
    say(os.getpid())
    time.sleep(60)
"""


def listeners(pids: list[int]) -> set[tuple[str, int]]:
    """(hexadecimal address, pid) of the TCP sockets on which processes listen."""
    found = set()
    held = {}
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                held[os.readlink(descriptor)] = pid
            except OSError:
                continue
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            cells = line.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in held:
                found.add((cells[1].partition(":")[0], held[f"socket:[{cells[9]}]"]))
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def stop(launcher: subprocess.Popen) -> None:
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)


def test_on_one_node_the_launcher_listens_nowhere_and_its_processes_on_the_loopback(tmp_path):
    launcher = another_launcher(tmp_path, SHOWS, 2)
    try:
        pids = [int(launcher.stdout.readline()) for _ in range(2)]
        assert not listeners([launcher.pid])
        assert {address for address, _ in listeners(pids)} <= LOOPBACK
        (store,) = Path(f"/proc/{pids[0]}/environ").read_bytes().split(b"POLYMODAL_STORE_FILE=")[1:]
        directory = Path(os.fsdecode(store.split(b"\0")[0])).parent
        assert directory.stat().st_mode & 0o777 == 0o700 and directory.stat().st_uid == os.getuid()
    finally:
        stop(launcher)
    assert not directory.exists()


@pytest.mark.slow
def test_between_nodes_the_store_listens_on_the_address_that_was_chosen(tmp_path):
    environ = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    folders = [tmp_path / str(node) for node in range(2)]
    started = []
    try:
        for node, folder in enumerate(folders):
            folder.mkdir()
            started.append(another_launcher(folder, SHOWS, 1, NODE_RANK=str(node), **environ))
        pids = [int(launcher.stdout.readline()) for launcher in started]
        found = listeners([started[0].pid])
        assert {address for address, _ in found} == {"0100007F"}
        assert not listeners([started[1].pid]) and pids
    finally:
        for launcher in started:
            stop(launcher)


@pytest.mark.parametrize(
    ("name", "own"), [("127.0.0.1", "127.0.0.1"), ("localhost", None), ("192.0.2.1", "any")]
)
def test_addresses_to_listen_on(name, own, monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with rendezvous.listening(name, 0) as server:
        address = server.getsockname()[0]
    if own == "any":  # of another machine: a service or NAT in front of this one
        assert address in ("::", "0.0.0.0")
    else:
        assert address in ("127.0.0.1", "::1")


def test_gloo_is_given_the_interface_that_reaches_the_first_node():
    """Also where the name of the first node is one of its own loopback, as 0x7f000101 (127.0.1.1) is here."""
    interfaces = dict(host._interfaces())
    outside = [name for name, address in interfaces.items() if not address.startswith("127.")]
    assert host.interface_towards("127.0.0.1") == host.interface_towards("localhost") == "lo"
    assert host.interface_towards("0x7f000101") in (outside or ["lo"])
    for name in outside:
        assert host.interface_towards(interfaces[name]) == name
    assert host.interface_towards("no.such.name.invalid") == ""


def test_localhost_in_a_pod_is_not_the_loopback(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with rendezvous.listening("localhost", 0) as server:
        assert server.getsockname()[0] in ("::", "0.0.0.0")


class Bad:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def handler(port: int, serves: bool = True, nodes: int = 1):
    parameters = RendezvousParameters(
        "c10d",
        f"127.0.0.1:{port}",
        "t",
        1,
        nodes,
        local_addr="127.0.0.1",
        join_timeout=20,
        last_call_timeout=1,
    )
    return rendezvous.elastic(parameters, "127.0.0.1", port, serves)


@pytest.mark.parametrize("signed", [False, True])
def test_a_pickle_in_the_store_is_not_opened(tmp_path, monkeypatch, signed):
    """Also one that is signed: a process with the secret still cannot run code in another."""
    port, mark = free_port(), tmp_path / "ran"
    monkeypatch.setenv(rendezvous.SECRET, "known")
    meets = handler(port)
    other = TCPStore("127.0.0.1", port, None, False, timedelta(seconds=20))
    (key,) = [key for key in other.list_keys() if "rendezvous" in key]
    text = pickle.dumps(Bad(mark))
    text = rendezvous._signature(text).encode() + text if signed else text
    other.set(key.lstrip("/"), base64.b64encode(text))
    with pytest.raises(PolymodalError, match="keep in their store"):
        meets.next_rendezvous()
    assert not mark.exists()


def test_nodes_with_another_secret_do_not_meet(monkeypatch):
    port = free_port()
    monkeypatch.setenv(rendezvous.SECRET, "one")
    first = handler(port, nodes=2)
    assert not first.is_closed()
    first.set_closed()
    second = handler(port, serves=False, nodes=2)
    assert second.is_closed()
    monkeypatch.setenv(rendezvous.SECRET, "another")
    with pytest.raises(PolymodalError, match="does not know its POLYMODAL_SECRET"):
        handler(port, serves=False, nodes=2).is_closed()


def test_python_files_of_the_working_directory_are_not_imported(tmp_path):
    """By no process of a command: launched ones, and those of multiprocessing, which are modules' clients too."""
    for name in ("typer", "yaml", "logging", "multiprocessing", "wandb", "torch", "polymodal"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\nraise SystemExit(9)"
        )
    code = """
import sys
sys.path.insert(0, "")  # as `python -m` and an empty entry of PYTHONPATH have it
sys.path.insert(0, {root!r})
from polymodal.core.search_path import leave_working_directory
leave_working_directory()
import logging, multiprocessing, subprocess, typer, yaml
process = multiprocessing.get_context("spawn").Process(target=print, args=("spawned",))
process.start(); process.join()
sys.exit(process.exitcode or subprocess.call([sys.executable, "-c", "import typer, yaml"]))
"""
    root = str(Path(rendezvous.__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": os.pathsep + root + os.pathsep}
    command = [sys.executable, "-c", code.format(root=root)]
    if sys.version_info >= (3, 11):
        command.insert(1, "-P")  # the interpreter's own start is not what is looked at here
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert not (tmp_path / "ran").exists() and done.returncode == 0, done.stderr
    assert "spawned" in done.stdout


def test_what_pythonpath_names_stays(tmp_path):
    code = "import sys\nfrom polymodal.core.search_path import leave_working_directory as l\nl()\nimport mine"
    (tmp_path / "mine.py").write_text("")
    root = str(Path(rendezvous.__file__).parents[2])
    for entry, found in ((str(tmp_path), True), ("", False)):
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([root, entry])}
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True)
        assert (done.returncode == 0) == found, done.stderr
