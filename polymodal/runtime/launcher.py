"""Starts the local processes of a run with torchrun's agent as a library, and reports how they ended.

A failure is one sentence: the error of the process that failed FIRST (its PolymodalError comes through
whole), whose exit code is the command's. Processes that only lost contact with it print nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.terminal import say
from polymodal.core.text import format_bytes
from polymodal.runtime import host
from polymodal.runtime import rendezvous as meeting
from polymodal.runtime.process_group import (
    RANK_VARIABLES,
    RENDEZVOUS_SECONDS,
    LaunchRequest,
    require_port_after,
    stop_signals,
    timeout_seconds,
    write_error_file,
)

CHILD = "POLYMODAL_LAUNCHED_BY"
"""Set in processes that `run` started: pid of the launcher, which prints their errors for them."""

KILL_ORPHANS = "POLYMODAL_NODE_GOES_ALONE"
"""Set where a node may die and the rest goes on: its processes are killed with its launcher."""

CHILD_VARIABLES = (
    *RANK_VARIABLES["torchrun"].values(),
    *(
        CHILD,
        KILL_ORPHANS,
        meeting.STORE_FILE,
        "MASTER_ADDR",
        "MASTER_PORT",
        "NPUS_PER_NODE",
        "NNODES",
        "NODE_RANK",
    ),
    *("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"),
)
"""What a launched process has in its environment for itself, not for commands that it starts."""

PATIENCE_SECONDS = 60.0
"""After a signal: how long processes may take longer to end than the first of them."""

FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torch's switch for a new store at every start: in the agent's, gloo finds addresses of dead processes."""

SHARED_MEMORY_HINT = "Start the container with --ipc=host or --shm-size=16g, or set data.workers to 0."

CAUSES = {
    signal.SIGKILL: "Somebody killed it, or the kernel did because memory ran out (see `dmesg`).",
    signal.SIGBUS: f"Shared memory ran out. {SHARED_MEMORY_HINT}",
    **dict.fromkeys(
        (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL),
        "A library crashed; the stack is above.",
    ),
}
"""What a signal that ended a process probably means."""

OUT_OF_MEMORY = (
    "The kernel ended it because memory ran out: lower data.memory_budget or data.workers, or shard the "
    "model over more processes."
)


class Stopped(Exception):
    """The run ended with an exit code that is not an error of ours; `code` is the command's exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


# ---- in the child --------------------------------------------------------------------------------------


def enter_child() -> None:
    """At the start of a launched process: crash stacks on stderr, and an end when the launcher dies.

    A command that a launched process starts is not the launcher's: it runs alone.
    """
    if CHILD not in os.environ:
        return
    launcher = int(os.environ[CHILD])
    if os.getppid() != launcher and _alive(launcher):
        for name in CHILD_VARIABLES:
            os.environ.pop(name, None)
        return
    faulthandler.enable()
    # Linux sends this when the launcher is killed, so that no process is left behind. SIGTERM saves and stops
    # all ranks; but where a node may die, the ranks of other nodes must see its death and start again.
    end = signal.SIGKILL if KILL_ORPHANS in os.environ else signal.SIGTERM
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, end, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        os.kill(os.getpid(), end)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _first_to_report(error: BaseException) -> bool:
    """Whether this process is the first of its siblings (same parent) with this error."""
    text = f"{type(error).__name__}: {error}"
    # <attempt>/<local rank>/error.json, removed by the launcher
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    directory = Path(file).parent.parent if file else Path(tempfile.gettempdir())
    digest = hashlib.sha1(text.encode()).hexdigest()[:16]
    marker = directory / f".polymodal-{os.getuid()}-{os.getppid()}-{digest}"
    try:
        with contextlib.suppress(FileNotFoundError):
            if abs(time.time() - marker.lstat().st_mtime) > 60:
                marker.unlink()
        marker.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        # somebody else's, in a shared temporary directory, is not to silence an error
        return marker.lstat().st_uid != os.getuid()
    except OSError:
        return True
    return True


def record(error: BaseException) -> bool:
    """Leave `error` for the launcher. Returns whether this process should print it itself.

    Under `run` the launcher prints PolymodalErrors; under torchrun, SLURM and Kubernetes the first process
    of a node that meets an error prints it.
    """
    write_error_file(error)
    if CHILD in os.environ:
        return not isinstance(error, PolymodalError) and _first_to_report(error)
    world = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    return world == "1" or _first_to_report(error)


# ---- in the launcher -----------------------------------------------------------------------------------


def before_start(run_dir: str | os.PathLike | None, request: LaunchRequest) -> list[str]:
    """Checks what would fail later, before anything is started. Returns warnings; raises PolymodalError."""
    if request.nodes > 1 and request.node == 0:  # one node listens nowhere
        host.require_port(request.port, request.port_name)
    if request.nodes > 1:
        try:
            socket.getaddrinfo(request.address, request.port)
        except OSError as error:
            raise PolymodalError(
                f"MASTER_ADDR = {request.address} cannot be resolved: {error.strerror or error}.",
                "Set MASTER_ADDR to an address that every node can reach.",
            ) from None
    if run_dir is not None:
        host.require_writable(run_dir)
    shared = host.shared_memory()
    if shared is None or shared.free >= 64 * host.MIB * request.nproc:
        return []
    return [
        f"/dev/shm has {format_bytes(shared.free)} free for {request.nproc} processes; data workers may fall "
        f"back to slower copies. {SHARED_MEMORY_HINT}"
    ]


@contextlib.contextmanager
def _launcher_process(handler: Any, variables: dict[str, str]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP go to `handler`, `variables` are set, torchrun's own report of a failure (it
    repeats ours at length) is silent. All is restored in the end."""
    environ = dict(os.environ)
    handlers = {number: signal.signal(number, handler) for number in stop_signals()}
    os.environ.update(variables)
    if not os.environ.get("LOGLEVEL"):
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for number, old in handlers.items():
            signal.signal(number, old)
        os.environ.clear()
        os.environ.update(environ)


def run(
    command: Sequence[str],
    request: LaunchRequest,
    *,
    rendezvous: float | None = None,
    restarts: int = 0,
    min_nodes: int | None = None,
) -> int:
    """Run `python command...` in `request.nproc` processes here and wait for them.

    rendezvous: seconds to wait for the other nodes.
    restarts: times that all processes are started again after one died; never after bad input.
    min_nodes: nodes that are enough to go on with when others are gone; node 0 holds the rendezvous.

    SIGTERM, SIGINT and SIGHUP are passed on to them; a second SIGINT kills them. Returns their exit code (0
    when all succeeded). Raises PolymodalError for the one that failed first, with its exit code in
    `error.code`, and Stopped when a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    seconds = int(rendezvous or timeout_seconds("HCCL_CONNECT_TIMEOUT", RENDEZVOUS_SECONDS))
    fewest = request.nodes if min_nodes is None else min_nodes
    elastic = request.nodes > 1 and (restarts > 0 or fewest < request.nodes)
    received: list[signal.Signals] = []
    agent: Any = None

    def forward(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        workers = agent.get_worker_group().workers if agent is not None else []
        pids = [worker.id for worker in workers if isinstance(worker.id, int)]
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL if received.count(signal.SIGINT) > 1 else number)
        if not pids:
            raise Stopped(128 + number)

    kills = host.oom_kills()
    # `forward` handles the other signals
    variables = {CHILD: str(os.getpid()), "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}
    variables |= {KILL_ORPHANS: "1"} if elastic else {}
    variables |= {FRESH_STORE: "1"} if elastic else {}
    with tempfile.TemporaryDirectory(prefix="polymodal-") as directory, contextlib.ExitStack() as stack:
        variables |= {meeting.STORE_FILE: f"{directory}/store"} if request.nodes == 1 else {}
        stack.enter_context(_launcher_process(forward, variables))
        try:
            spec = _worker_spec(command, request, seconds, restarts, fewest, elastic)
            agent = _agent_class()(spec, DefaultLogsSpecs(log_dir=directory), start_method="spawn")
            agent.received = received
            result = agent.run()
            failures = result.failures if result.is_failed() else {}
        except ChildFailedError as error:
            failures = error.failures
        except (PolymodalError, Stopped):
            raise
        except Exception as error:
            raise _no_rendezvous(error, request, seconds) from error
        return _failed(failures, request, received, host.oom_kills() > kills) if failures else 0


def _worker_spec(
    command: Sequence[str], request: LaunchRequest, seconds: int, restarts: int, fewest: int, elastic: bool
) -> Any:
    """What torchrun's agent starts, and how it finds the agents of other nodes."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec

    return WorkerSpec(
        role="polymodal",
        local_world_size=request.nproc,
        entrypoint=sys.executable,
        args=tuple(command),
        rdzv_handler=_handler(request, seconds, fewest, elastic),
        max_restarts=restarts,
        monitor_interval=0.1,
    )


def _handler(request: LaunchRequest, seconds: int, fewest: int, elastic: bool) -> Any:
    import torch.distributed as dist

    serves, patience = request.node == 0, timedelta(seconds=seconds)
    where = request.address, request.port
    if request.nodes == 1:
        return meeting.fixed("polymodal", 0, 1, "127.0.0.1", 0, dist.HashStore)
    run_id = f"polymodal-{request.port}"
    if not elastic:
        store = partial(meeting.tcp_store, *where, request.nodes, patience, serves)
        return meeting.fixed(run_id, request.node, request.nodes, *where, store)
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=f"{request.address}:{request.port}",
        run_id=run_id,
        min_nodes=fewest,
        max_nodes=request.nodes,
        local_addr=meeting.own_address(*where),
        # nodes may leave and come back; every second the agents look who is there
        read_timeout=min(60, seconds),
        join_timeout=seconds,
        last_call_timeout=5,
        keep_alive_interval=1,
        keep_alive_max_attempt=10,
    )
    deadline = time.monotonic() + (0 if serves else seconds)
    while True:  # the first node's store may not be there yet
        try:
            return meeting.elastic(parameters, *where, serves)
        except RendezvousConnectionError:
            if time.monotonic() >= deadline:
                raise


def _agent_class() -> type:
    """torchrun's agent, which does not start bad input again, prints why it starts again, and notices a node
    that died before its processes met ours (ours would wait until the collectives' timeout).

    After a signal, processes that end as asked do not end those that are still saving. Where torch's own
    `launch_agent` falls short of this: docs/dependencies.md.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    class Agent(LocalElasticAgent):
        received: Sequence[signal.Signals] = ()  # signals that were passed on to the workers
        restart_reason = ""
        next_look = 0.0
        patience_ends = 0.0

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            if self.restart_reason:
                text = f"starting again from the newest checkpoint: {self.restart_reason}"
                say(text, error=True)
            self.restart_reason = "the number of nodes changed"  # unless a failure comes
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            if self.received and self._some_still_end(worker_group):
                return RunResult(state=WorkerState.HEALTHY)
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.FAILED and result.failures:
                rank, failure = min(result.failures.items(), key=lambda item: _order(item, False))
                self.restart_reason = f"rank {rank} ended with exit code {failure.exitcode}"
                facts = [_facts(each) for each in result.failures.values()]
                if self.received or any(each.get("code") == 2 and not each.get("lost") for each in facts):
                    raise ChildFailedError("", result.failures)  # another start would not help
            elif result.state == WorkerState.HEALTHY and self._a_node_left(worker_group):
                self._restart_workers(worker_group)  # as for a node that joins: no attempt is spent
            return result

        def _some_still_end(self, worker_group: WorkerGroup) -> bool:
            """Whether some processes ended as the signal asked, and others are still running."""
            codes = [_exit_code(worker.id) for worker in worker_group.workers]
            ended = [code for code in codes if code is not None]
            if not ended or len(ended) == len(codes) or not set(ended) <= {0, 128 + self.received[-1]}:
                return False
            self.patience_ends = self.patience_ends or time.monotonic() + PATIENCE_SECONDS
            return time.monotonic() < self.patience_ends

        def _a_node_left(self, worker_group: WorkerGroup) -> bool:
            """Whether a node of this round ended or no longer sends its heartbeat. Looks once a second."""
            holder = getattr(worker_group.spec.rdzv_handler, "_state_holder", None)
            if holder is None or time.monotonic() < self.next_look:
                return False
            self.next_look = time.monotonic() + 1
            return len(holder.state.participants) < worker_group.group_world_size

    return Agent


def _exit_code(pid: int) -> int | None:
    """Exit code of a child that ended (-N: by signal N), None while it runs. It can still be waited for."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # already waited for
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _no_rendezvous(error: Exception, request: LaunchRequest, seconds: int) -> Exception:
    """The nodes did not find each other, in one sentence; other errors come back as they are."""
    expected = isinstance(error, (RuntimeError, OSError, ValueError))
    if not expected and "Rendezvous" not in type(error).__name__:
        return error
    require_port_after(error, request.port, request.port_name)
    reason = cause(error.__cause__ or error)
    if request.nodes > 1:
        return PolymodalError(
            f"Node {request.node} of {request.nodes} could not meet the other nodes at "
            f"{request.address}:{request.port} within {seconds} s ({reason[:160]}).",
            "Start the same command on every node, each with its NODE_RANK, and see that the port is open "
            "between them.",
        )
    return PolymodalError(
        f"The processes could not be started: {reason[:300]}.",
        "`polymodal doctor` looks at ports, limits and the network.",
    )


def _facts(failure: Any) -> dict:
    """What `write_error_file` wrote in a process that failed."""
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _order(item: tuple[int, Any], stopped: bool) -> tuple:
    """Sorts failures: first the processes with an error of their own, the earliest of them first."""
    rank, failure = item
    extra = _facts(failure)
    own = bool(extra) and not extra.get("lost")
    ended = failure.exitcode == -signal.SIGTERM and not stopped  # by the agent, because of another
    return not own and ended, bool(extra.get("lost")), float(extra.get("time", failure.timestamp)), rank


def _failed(
    failures: dict, request: LaunchRequest, received: list[signal.Signals], out_of_memory: bool
) -> int:
    """Raises the error of the process that failed first; returns its exit code when it left none."""
    rank, failure = min(failures.items(), key=lambda item: _order(item, bool(received)))
    extra, code = _facts(failure), failure.exitcode
    if received and (code < 0 or code == 128 + received[-1]):
        raise Stopped(128 + received[-1])
    node = f" (node {request.node})" if request.nodes > 1 else ""
    who = f"Rank {rank} of {request.nproc * request.nodes}{node} (process {failure.pid})"
    if "message" in extra and "hint" in extra:
        error = PolymodalError(extra["message"], extra["hint"])
        error.code = extra.get("code", 2)
    elif extra:  # an exception that is not ours: its traceback is already on the terminal
        text = failure.error_file_data["message"]["message"]
        error = PolymodalError(f"{who} stopped: {text}.", "Its traceback is above.")
        error.code = code if code > 0 else 1
    elif code < 0:
        killed = out_of_memory and -code == signal.SIGKILL
        why = OUT_OF_MEMORY if killed else CAUSES.get(-code, "Somebody sent it that signal.")
        error = PolymodalError(f"{who} was ended by {signal.Signals(-code).name}.", why)
        error.code = 128 - code
    else:
        return code
    raise error
