"""Processes: ranks from the environment, real starts, and one sentence for each way to fail."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.runtime import host, launcher, process_group
from polymodal.runtime.process_group import LaunchRequest, ProcessInfo, first_host, from_environment

PREAMBLE = """
import os, signal, sys, time
from polymodal import recipe
from polymodal.runtime import launcher, process_group
from polymodal.core.errors import PolymodalError

launcher.enter_child()
rank = int(os.environ.get("RANK", 0))

def say(*words):  # one write, so that lines of two processes never mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def joined():
    return process_group.runtime(recipe.validate({"model": {"source": "x"}}))

try:
    BODY
except PolymodalError as error:
    if launcher.record(error):
        print("error:", error, file=sys.stderr)
    sys.exit(error.code)
except Exception as error:
    if not launcher.record(error):
        sys.exit(1)
    raise
"""

PARENT = """
import sys
from polymodal.runtime import launcher, process_group
sys.exit(launcher.run([sys.argv[1]], process_group.from_environment(int(sys.argv[2]))))
"""

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NNODES",
    "NODE_RANK",
    "NPUS_PER_NODE",
)


@pytest.fixture
def processes(tmp_path, monkeypatch, capfd):
    """Runs a child's body in real processes from this one: (exit code, stdout, what the command line would print)."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(
        body: str, nproc: int = 2, seconds: float | None = None, restarts: int = 0, **environ: str
    ) -> tuple[int, str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        message = ""
        try:
            request = from_environment(nproc)
            launcher.before_start(None, request)
            command = [child(tmp_path, body)]
            code = launcher.run(command, request, rendezvous=seconds, restarts=restarts)
        except PolymodalError as error:
            code, message = error.code, f"error: {error}\n"
        except launcher.Stopped as stopped:
            code = stopped.code
        out, err = capfd.readouterr()
        return code, out, err + message

    return run


def child(directory, body: str) -> str:
    path = directory / "child.py"
    path.write_text(PREAMBLE.replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 4).strip()))
    return str(path)


def another_launcher(directory, body: str, nproc: int, **environ: str) -> subprocess.Popen:
    (directory / "parent.py").write_text(PARENT)
    command = [sys.executable, str(directory / "parent.py"), child(directory, body), str(nproc)]
    kept = {k: v for k, v in os.environ.items() if k not in NAMES}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, "OMP_NUM_THREADS": "1", **environ},
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def variables(text: str) -> dict[str, str]:
    """ "RANK=1 WORLD_SIZE=2" as an environment."""
    return dict(pair.split("=") for pair in text.split())


def later(seconds: float, action) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    return timer


# ---- ranks from the environment ------------------------------------------------------------------------


def test_alone():
    assert from_environment(environ={}) == ProcessInfo(0, 1, 0, 1, 0, 1)


def test_torchrun():
    environ = variables(
        "RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 GROUP_RANK=1 GROUP_WORLD_SIZE=2 "
        "MASTER_ADDR=h MASTER_PORT=123"
    )
    assert from_environment(environ=environ) == ProcessInfo(9, 16, 1, 8, 1, 2, "h", 123, "torchrun")
    with pytest.raises(PolymodalError, match="--nproc has no meaning"):
        from_environment(2, environ)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu[03-05,09],login1", "gpu03"),
        ("a,b", "a"),
        ("node7", "node7"),
        ("r[1,3]n[02-04]", "r1n02"),
        ("c[001-100]-ib", "c001-ib"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_slurm():
    environ = variables(
        "SLURM_PROCID=5 SLURM_NTASKS=7 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_JOB_NUM_NODES=2 "
        "SLURM_JOB_NODELIST=gpu[3-4] SLURM_TASKS_PER_NODE=4,3 SLURM_JOB_ID=40001"
    )
    assert from_environment(environ=environ) == ProcessInfo(5, 7, 1, 3, 1, 2, "gpu3", 20001, "slurm")
    # the four variables alone are enough
    short = {k: environ[k] for k in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST")}
    assert from_environment(environ=short).address == "gpu3" and from_environment(environ=short).world == 7
    with pytest.raises(PolymodalError, match="3 tasks on this node"):
        from_environment(4, environ)


def test_slurm_one_task_a_node_starts_the_rest():
    environ = variables(
        "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_JOB_NUM_NODES=2 "
        "SLURM_JOB_NODELIST=gpu[3-4] SLURM_TASKS_PER_NODE=1(x2) MASTER_PORT=29511"
    )
    assert from_environment(8, environ) == LaunchRequest(8, 1, 2, "gpu3", 29511, "MASTER_PORT")


def test_kubernetes_one_process_a_pod():
    environ = variables("RANK=1 WORLD_SIZE=4 MASTER_ADDR=job-master-0 MASTER_PORT=23456")
    assert from_environment(environ=environ) == ProcessInfo(
        1, 4, 0, 1, 1, 4, "job-master-0", 23456, "kubernetes"
    )


def test_kubernetes_pod_with_several_devices():
    environ = variables(
        "RANK=1 WORLD_SIZE=16 PET_NPROC_PER_NODE=8 PET_NNODES=2 PET_NODE_RANK=1 "
        "MASTER_ADDR=job-master-0 MASTER_PORT=23456"
    )
    assert from_environment(environ=environ) == LaunchRequest(8, 1, 2, "job-master-0", 23456, "MASTER_PORT")
    without = {k: v for k, v in environ.items() if k not in ("PET_NNODES", "PET_NODE_RANK")}
    assert from_environment(environ=without) == LaunchRequest(8, 1, 2, "job-master-0", 23456, "MASTER_PORT")


def test_the_documents_scripts():
    environ = variables(
        "NPUS_PER_NODE=8 MASTER_ADDR=192.168.1.100 MASTER_PORT=29501 NNODES=2 NODE_RANK=1 WORLD_SIZE=16"
    )
    assert from_environment(environ=environ) == LaunchRequest(8, 1, 2, "192.168.1.100", 29501, "MASTER_PORT")
    assert from_environment(environ={**environ, "NNODES": "1", "NODE_RANK": "0"}) == LaunchRequest(
        8, 0, 1, "127.0.0.1", 29501, "MASTER_PORT"
    )


@pytest.mark.parametrize(
    "environ, message",
    [
        ("NNODES=2 NPUS_PER_NODE=8 MASTER_ADDR=h", "NODE_RANK is not set"),
        ("NNODES=2 NPUS_PER_NODE=8 NODE_RANK=0", "MASTER_ADDR is not set"),
        ("NNODES=2 NPUS_PER_NODE=8 NODE_RANK=2 MASTER_ADDR=h", r"NODE_RANK = 2 is outside 0\.\.1"),
        ("NNODES=2", "the number of processes a node is not set"),
        ("NNODES=two", "NNODES = 'two' is not a whole number"),
        ("NPUS_PER_NODE=eight", "NPUS_PER_NODE = 'eight' is not a whole number"),
        ("NPUS_PER_NODE=0", "0 processes cannot be started"),
        ("RANK=4 WORLD_SIZE=4 LOCAL_RANK=0", "rank 4 of 4"),
        ("SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1 SLURM_NTASKS_PER_NODE=1", "local rank 1 of 1"),
    ],
)
def test_contradictions(environ, message):
    with pytest.raises(PolymodalError, match=message):
        from_environment(environ=variables(environ))


def test_nproc():
    assert process_group.default_nproc(None) is None and process_group.default_nproc("3") == 3
    assert process_group.default_nproc("auto", "cpu") == 1
    with pytest.raises(PolymodalError, match="not a number of processes"):
        process_group.default_nproc("many")


# ---- real processes -----------------------------------------------------------------------------------------------


def test_two_processes_meet(processes):
    body = """
    with joined() as rt:
        import torch, torch.distributed as dist
        total = torch.tensor(rt.rank + 1.0)
        dist.all_reduce(total)
        rt.barrier()
        say(rt.rank, rt.world, rt.process.local_rank, rt.is_main, rt.device.kind, total.item())
    assert not dist.is_initialized()
    """
    code, out, err = processes(body)
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == ["0 2 0 True cpu 3.0", "1 2 1 False cpu 3.0"]


@pytest.mark.slow
def test_two_nodes_meet(processes, tmp_path):
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    body = """
    with joined() as rt:
        import torch, torch.distributed as dist
        total = torch.tensor(rt.rank + 1.0)
        dist.all_reduce(total)
        say(rt.rank, rt.world, rt.process.node, rt.process.nodes, total.item())
    """
    (tmp_path / "other").mkdir()
    other = another_launcher(tmp_path / "other", body, 1, **common, NODE_RANK="1")
    assert processes(body, 1, **common, NODE_RANK="0") == (0, "0 2 0 2 3.0\n", "")
    out, err = other.communicate(timeout=60)
    assert (other.returncode, out, err) == (0, "1 2 1 2 3.0\n", "")


def test_an_error_of_all_ranks_is_printed_once(processes):
    code, out, err = processes("raise PolymodalError('data.jsonl, line 3: no image.', 'Add it.')", nproc=3)
    assert (code, err) == (2, "error: data.jsonl, line 3: no image. Add it.\n")


def test_the_error_of_the_rank_that_failed_first_is_shown(processes):
    """Rank 0 only notices that rank 1 is gone."""
    body = """
    with joined() as rt:
        import torch, torch.distributed as dist
        if rank == 1:
            raise PolymodalError('Rank one cannot go on.', 'Do this.')
        dist.all_reduce(torch.ones(1))
    """
    assert processes(body) == (2, "", "error: Rank one cannot go on. Do this.\n")


@pytest.mark.parametrize("fails", [True, False])
def test_on_an_accelerator_an_error_ends_the_process_before_its_group(processes, monkeypatch, fails):
    """NCCL's and hccl's end of a group waits for the collective in which the other ranks are."""
    simulated = Path(__file__).parent / "simulated"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(simulated), os.environ.get("PYTHONPATH", "")]))
    body = f"""
        import atexit
        import torch.distributed as dist
        from polymodal import __main__
        atexit.register(__main__._end, [2 if {fails} else 0])  # as the command ends
        dist.destroy_process_group = lambda *_: say(rank, "leaves its group")
        with joined() as rt:
            assert rt.device.kind == "npu"
            if rank == 1 and {fails}:
                raise PolymodalError('A sample cannot be read.', 'Mend it.')
            rt.barrier()
    """
    code, out, err = processes(body)
    leavers = {line for line in out.splitlines() if "leaves" in line}
    if fails:
        assert (code, leavers) == (2, set()) and "error: A sample cannot be read. Mend it." in err
    else:
        assert code == 0 and len(leavers) == 2


def test_exit_code_is_kept(processes):
    assert processes("sys.exit(7 if rank else 0)") == (7, "", "")


def test_a_killed_process_is_named(processes):
    body = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    code, out, err = processes(body)
    assert code == 128 + 9
    assert re.fullmatch(r"error: Rank 1 of 2 \(process \d+\) was ended by SIGKILL\. .*memory.*\n", err), err


def test_too_little_shared_memory_is_guessed_from_the_signal(processes):
    code, out, err = processes("if rank == 0: os.kill(os.getpid(), signal.SIGBUS)\ntime.sleep(60)")
    assert code == 128 + 7 and "Shared memory ran out. Start the container with --ipc=host" in err


def test_a_bug_keeps_its_traceback_and_is_named(processes):
    code, out, err = processes("if rank == 1:\n    raise ZeroDivisionError('a bug')\ntime.sleep(60)")
    assert code == 1
    assert err.count("Traceback (most recent call last)") == 1
    assert re.search(
        r"error: Rank 1 of 2 \(process \d+\) stopped: ZeroDivisionError: a bug\. Its traceback is above\.\n$",
        err,
    ), err


@pytest.mark.slow
def test_a_bug_of_all_ranks_shows_one_traceback(processes):
    code, out, err = processes("raise ZeroDivisionError('a bug')", nproc=3)
    assert code == 1 and err.count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize("number, after", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_reach_the_processes_and_their_code_comes_back(processes, tmp_path, number, after):
    body = f"""
    rt = process_group.Runtime(process_group.from_environment(), None, 1)
    rt.catch_signals()
    open({str(tmp_path)!r} + f'/ready{{rank}}', 'w').close()
    while rt.signal is None:
        time.sleep(0.05)
    time.sleep(0.6 * (rank == 0))  # one that has more to save: the other's end is not to be its own
    say('saved', rt.signal.name)
    sys.exit({after})
    """

    def send():
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    later(0.1, send)
    assert processes(body) == (after, f"saved {number.name}\n" * 2, "")


def test_processes_that_do_not_catch_a_signal_end_by_it(processes, tmp_path):
    def send():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    later(0.1, send)
    assert processes(f"open({str(tmp_path)!r} + '/ready', 'w').close()\ntime.sleep(60)", 1) == (143, "", "")


def test_processes_end_with_their_launcher(tmp_path):
    launcher = another_launcher(tmp_path, "say(os.getpid())\ntime.sleep(60)", 2)
    pids = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    launcher.wait()

    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.time() + 10
    while any(map(running, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(running, pids))


def test_a_command_started_by_a_launched_process_runs_alone(processes):
    body = """
    if "inner" not in sys.argv:
        import subprocess
        out = subprocess.run([sys.executable, __file__, "inner"], capture_output=True, text=True)
        say(out.returncode, out.stdout.strip())
        sys.exit(0)
    say(process_group.from_environment().launcher, launcher.CHILD in os.environ)
    """
    assert processes(body, 1) == (0, "0 alone False\n", "")


def test_port_in_use_names_the_owner(processes):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        assert processes("pass", MASTER_PORT=str(port)) == (0, "", "")  # one node needs none
        nodes = variables(f"NNODES=2 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
        code, out, err = processes("pass", **nodes)
    assert code == 2 and out == ""
    assert err.startswith(f"error: Port {port} (MASTER_PORT) is in use by process {os.getpid()} (")


def test_the_owner_of_a_port_is_named_on_one_line():
    program = "import time\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        words = host.command_of(owner.pid)
        owner.kill()
    assert "import time print(" in words and "\n" not in words


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_missing_node_is_one_sentence(processes, restarts):
    port = free_port()
    nodes = variables(f"NNODES=2 NODE_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={port}")
    code, out, err = processes("pass", 1, 2, restarts, **nodes)
    assert code == 2
    message = err.splitlines()[-1]
    expected = f"error: Node 1 of 2 could not meet the other nodes at 127.0.0.1:{port} within 2 s ("
    assert message.startswith(expected) and "NODE_RANK" in message


def test_unresolvable_master(processes):
    code, out, err = processes("pass", 1, NNODES="2", NODE_RANK="1", MASTER_ADDR="no-such-host.invalid")
    assert code == 2 and err.startswith("error: MASTER_ADDR = no-such-host.invalid cannot be resolved")


def test_a_task_whose_peers_never_come(monkeypatch):
    here = process_group.ProcessInfo(1, 2, 0, 1, 1, 2, "127.0.0.1", free_port(), "slurm")
    for name in (*NAMES, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "0")  # put back afterwards
    with pytest.raises(
        PolymodalError, match="Rank 1 of 2 could not join the other ranks at 127.0.0.1.*srun polymodal train"
    ):
        process_group.start(recipe.validate({"model": {"source": "x"}}), rendezvous=1, process=here)


def test_little_shared_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(host, "shared_memory", lambda: host.Space("/dev/shm", 64 * host.MIB, 64 * host.MIB))
    (warning,) = launcher.before_start(None, LaunchRequest(8))
    assert warning.startswith("/dev/shm has 64.0 MiB free for 8 processes") and "--ipc=host" in warning


# ---- disks --------------------------------------------------------------------------------------------------------


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match="cannot be written.*checkpoint.dir"):
        host.require_writable(tmp_path / "file" / "run")


def test_full_output_disk(tmp_path):
    with pytest.raises(PolymodalError, match="has only .* free; at least"):
        host.require_writable(tmp_path, least_free=1 << 60)


def test_writable_leaves_nothing(tmp_path):
    host.require_writable(tmp_path / "run/deep")
    host.require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- starting again -----------------------------------------------------------------------------------------------

DIES_ONCE = """
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with joined() as rt:
    rt.barrier()
    if rank == 1 and attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rt.barrier()
say("done", rank, attempt)
"""


def test_a_killed_process_is_restarted_with_all_ranks(processes):
    code, out, err = processes(DIES_ONCE, restarts=1)
    assert code == 0 and sorted(out.splitlines()) == ["done 0 1", "done 1 1"]
    assert "starting again from the newest checkpoint: rank 1 ended with exit code -9" in err


@pytest.mark.slow
def test_bad_input_is_not_started_again(processes):
    body = 'raise PolymodalError("The key is wrong.", "Correct it.")'
    assert processes(body, restarts=3) == (2, "", "error: The key is wrong. Correct it.\n")
