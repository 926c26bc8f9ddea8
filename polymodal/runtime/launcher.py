"""Starts the local processes of a run with torchrun's agent as a library, and tells how they ended.

One sentence a failure: the process that failed FIRST speaks (its PolymodalError
comes through whole), those that only lost contact with it stay silent, and its exit code is the command's.
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
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polymodal.core.errors import PolymodalError
from polymodal.core.text import format_bytes
from polymodal.runtime import host
from polymodal.runtime.process_group import RENDEZVOUS_SECONDS, Start, _number, leave_note

CHILD = "POLYMODAL_LAUNCHED_BY"
"""Set in processes that `run` started: pid of the launcher, which prints their errors for them."""


GOES_ALONE = "POLYMODAL_NODE_GOES_ALONE"
"""Set where a node may die and the others go on: its processes end with its launcher, at once and without a
word."""


OURS = (
    CHILD, GOES_ALONE, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "NPUS_PER_NODE", "NNODES", "NODE_RANK",
)  # fmt: skip
"""What a launched process has in its environment for itself alone."""


PATIENCE_SECONDS = 60.0
"""After a signal: how long processes may take longer to end than the first of them."""


FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""torch's switch for a store of its own at every start: in the agent's, gloo finds the addresses of those who
died."""


class Stopped(Exception):
    """The run ended with an exit code that is not an error of ours; `code` is the command's exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


# ---- in the child -------------------------------------------------------------------------------------------------


def enter_child() -> None:
    """At the start of a launched process: crash stacks on stderr, and an end when the launcher dies.

    A command that a launched process starts itself is none of the launcher's: it stands alone.
    """
    if CHILD not in os.environ:
        return
    launcher = int(os.environ[CHILD])
    if os.getppid() != launcher and _alive(launcher):
        for name in OURS:
            os.environ.pop(name, None)
        return
    faulthandler.enable()
    # Linux sends this when the launcher is killed, so that nobody is left behind. SIGTERM saves and stops, which every
    # rank agrees on; but where a node may die, the ranks of the others must see that it died, and start again.
    end = signal.SIGKILL if GOES_ALONE in os.environ else signal.SIGTERM
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, end, 0, 0, 0)
    if os.getppid() != launcher:
        os.kill(os.getpid(), end)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _first_here(text: str) -> bool:
    """Whether this process is the first of its siblings to say this text (same parent, same words)."""
    digest = hashlib.sha1(text.encode()).hexdigest()[:16]
    file = os.environ.get(
        "TORCHELASTIC_ERROR_FILE"
    )  # <attempt>/<local rank>/error.json, removed by the launcher
    directory = Path(file).parent.parent if file else Path(tempfile.gettempdir())
    marker = directory / f".polymodal-{os.getuid()}-{os.getppid()}-{digest}"
    with contextlib.suppress(OSError):
        if time.time() - marker.stat().st_mtime > 60:
            marker.unlink()
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def record(error: BaseException) -> bool:
    """Leave `error` for the launcher. Returns whether this process should print it itself.

    Under `run` the launcher prints PolymodalErrors; under torchrun, SLURM and Kubernetes the first process
    of a node that meets an error prints it.
    """
    leave_note(error)
    ours = isinstance(error, PolymodalError)
    if CHILD in os.environ:
        return not ours and _first_here(f"{type(error).__name__}: {error}")
    world = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
    return world == "1" or _first_here(f"{type(error).__name__}: {error}")


# ---- in the launcher ----------------------------------------------------------------------------------------------


def before_start(run_dir: str | os.PathLike | None, start: Start) -> list[str]:
    """What would fail later, said before anything is started. Returns warnings; raises PolymodalError."""
    warnings = []
    if start.port and start.node == 0:
        host.require_port(start.port, start.port_name)
    if start.nodes > 1:
        try:
            socket.getaddrinfo(start.address, start.port)
        except OSError as error:
            raise PolymodalError(
                f"MASTER_ADDR = {start.address} cannot be resolved: {error.strerror or error}.",
                "Set MASTER_ADDR to an address that every node can reach.",
            ) from None
    if run_dir is not None:
        host.require_writable(run_dir)
    shared = host.shared_memory()
    if shared is not None and shared.free < 64 * host.MIB * start.nproc:
        warnings.append(
            f"/dev/shm has {format_bytes(shared.free)} free for {start.nproc} processes; data workers may fall back to slower copies. "
            "Start the container with --ipc=host or --shm-size=16g, or set data.workers to 0."
        )
    return warnings


@contextlib.contextmanager
def _while_running(handler: Any, variables: dict[str, str]) -> Iterator[None]:
    """SIGTERM and SIGINT go to `handler`, `variables` are set for what is started; torchrun's own report of a
    failure, which repeats ours at length, is silent. All is put back in the end."""
    environ = dict(os.environ)
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    os.environ.update(variables)
    if not os.environ.get("LOGLEVEL"):
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        for number, old in before.items():
            signal.signal(number, old)
        os.environ.clear()
        os.environ.update(environ)


def run(
    command: Sequence[str],
    start: Start,
    *,
    rendezvous: float | None = None,
    restarts: int = 0,
    min_nodes: int | None = None,
) -> int:
    """Run `python command...` in `start.nproc` processes here (part of `start.nodes` nodes) and wait for
    them.

    restarts: times that all processes are started anew after one died, of itself or by a signal; bad input is
    no such death. min_nodes: nodes that are enough to go on with when others are gone; node 0 keeps the
    meeting place and must live.

    SIGTERM and SIGINT are passed on to them; a second SIGINT ends them at once. Returns their exit code (0
    when all succeeded). Raises PolymodalError for the one that failed first, with its code in `error.code` if
    it has another than 2; Stopped when a signal ended them.
    """
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    seconds = int(rendezvous or _number(os.environ, "HCCL_CONNECT_TIMEOUT") or RENDEZVOUS_SECONDS)
    fixed = start.nodes > 1 or start.port > 0
    fewest = start.nodes if min_nodes is None else min_nodes
    elastic = start.nodes > 1 and (restarts > 0 or fewest < start.nodes)
    settings: dict[str, object] = {"timeout": seconds}
    if elastic:  # nodes may leave and come back; who is still there is asked every second
        settings |= {
            "is_host": start.node == 0,
            "join_timeout": seconds,
            "last_call_timeout": 5,
            "keep_alive_interval": 1,
            "keep_alive_max_attempt": 10,
        }
    elif fixed:
        settings["rank"] = start.node
    parameters = RendezvousParameters(
        backend="static" if fixed and not elastic else "c10d",
        endpoint=f"{start.address}:{start.port}"
        if fixed
        else "localhost:0",  # 0: the store takes a free port itself
        run_id=f"polymodal-{start.port}" if fixed else uuid.uuid4().hex,
        min_nodes=fewest,
        max_nodes=start.nodes,
        local_addr=None if start.nodes > 1 else "127.0.0.1",
        **settings,
    )
    asked: list[signal.Signals] = []
    agent: Any = None

    def forward(number: int, frame: object) -> None:
        asked.append(signal.Signals(number))
        harder = signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.Signals(number)
        for worker in agent.get_worker_group().workers if agent is not None else []:
            if isinstance(worker.id, int):
                with contextlib.suppress(OSError):
                    os.kill(worker.id, harder)
        if agent is None or not any(isinstance(w.id, int) for w in agent.get_worker_group().workers):
            raise Stopped(128 + number)

    kills = host.oom_kills()
    variables = {
        CHILD: str(os.getpid()),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT",
    }  # the others: forward
    variables |= {GOES_ALONE: "1"} if elastic else {}
    variables |= {FRESH_STORE: "1"} if restarts or elastic else {}
    with _while_running(forward, variables), tempfile.TemporaryDirectory(prefix="polymodal-") as directory:
        spec = WorkerSpec(
            role="polymodal",
            local_world_size=start.nproc,
            entrypoint=sys.executable,
            args=tuple(command),
            rdzv_handler=registry.get_rendezvous_handler(parameters),
            max_restarts=restarts,
            monitor_interval=0.1,
            master_addr=start.address if fixed and not elastic else None,
            master_port=start.port if fixed and not elastic else None,
            local_addr=None if start.nodes > 1 else "127.0.0.1",
        )
        agent = _agent(asked)(spec, DefaultLogsSpecs(log_dir=directory), start_method="spawn")
        try:
            result = agent.run()
            failures = result.failures if result.is_failed() else {}
        except ChildFailedError as error:
            failures = error.failures
        except (PolymodalError, Stopped):
            raise
        except Exception as error:
            raise _no_rendezvous(error, start, seconds) from error
        return _failed(failures, start, asked, kills) if failures else 0


def _agent(asked: Sequence[signal.Signals]) -> type:
    """torchrun's agent, which does not start again what bad input ended, says why it starts again, and
    notices a node that died before its processes ever met ours (these would wait for it until the
    collectives' timeout).

    asked: the signals that were passed on. After one, processes that end as asked are no failure that ends
    the others. What torch offers for the same (`launch_agent`) falls short of it: docs/dependencies.md says
    where.
    """
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    class Agent(LocalElasticAgent):
        why = ""
        look = 0.0
        patience = 0.0

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            if self.why:
                print(f"starting again from the newest checkpoint: {self.why}", file=sys.stderr, flush=True)
            self.why = "the number of nodes changed"  # unless a failure says otherwise
            return super()._start_workers(worker_group)

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            if asked and self._some_still_end(worker_group):
                return RunResult(state=WorkerState.HEALTHY)
            result = super()._monitor_workers(worker_group)
            if result.state == WorkerState.FAILED and result.failures:
                rank, failure = min(result.failures.items(), key=lambda item: _order(item, False))
                self.why = f"rank {rank} ended with exit code {failure.exitcode}"
                facts = [_facts(each) for each in result.failures.values()]
                if asked or any(each.get("code") == 2 and not each.get("lost") for each in facts):
                    raise ChildFailedError("", result.failures)  # no start again mends it
            elif result.state == WorkerState.HEALTHY and self._a_node_left(worker_group):
                self._restart_workers(worker_group)  # as for one that comes: no attempt is spent
            return result

        def _some_still_end(self, worker_group: WorkerGroup) -> bool:
            """Whether some processes ended as they were asked to, and others are still at it."""
            codes = [_exit_code(worker.id) for worker in worker_group.workers]
            ended = [code for code in codes if code is not None]
            if not ended or len(ended) == len(codes) or not set(ended) <= {0, 128 + asked[-1]}:
                return False
            self.patience = self.patience or time.monotonic() + PATIENCE_SECONDS
            return time.monotonic() < self.patience

        def _a_node_left(self, worker_group: WorkerGroup) -> bool:
            """Whether a node of this round ended or no longer sends its heartbeat. Looks once a second."""
            holder = getattr(worker_group.spec.rdzv_handler, "_state_holder", None)
            if holder is None or time.monotonic() < self.look:
                return False
            self.look = time.monotonic() + 1
            return len(holder.state.participants) < worker_group.group_world_size

    return Agent


def _exit_code(pid: int) -> int | None:
    """Exit code of a child that ended (-N: by signal N), None while it runs; who waits for it later still
    can."""
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody did
        return 0
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _no_rendezvous(error: Exception, start: Start, seconds: int) -> Exception:
    """The nodes did not find each other, in one sentence; other errors come back as they are."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if (
        not isinstance(error, (RuntimeError, OSError, ValueError))
        and "Rendezvous" not in type(error).__name__
    ):
        return error
    if "EADDRINUSE" in str(error) or "in use" in str(error).lower():
        with contextlib.suppress(OSError):
            host.require_port(start.port, start.port_name)
    if start.nodes > 1:
        return PolymodalError(
            f"Node {start.node} of {start.nodes} could not meet the others at {start.address}:{start.port} within {seconds} s ({text[:160]}).",
            "Start the same command on every node, each with its NODE_RANK, and see that the port is open between them.",
        )
    return PolymodalError(
        f"The processes could not be started: {text[:300]}.",
        "`polymodal doctor` looks at ports, limits and the network.",
    )


def _facts(failure: Any) -> dict:
    """What a process that failed left about its error."""
    message = failure.error_file_data.get("message")
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _order(item: tuple[int, Any], asked: bool) -> tuple:
    """Sorts failures: first the one that has something of its own to say, and said it first."""
    rank, failure = item
    extra = _facts(failure)
    own = bool(extra) and not extra.get("lost")
    ended = failure.exitcode == -signal.SIGTERM and not asked  # by the agent, because of another
    return not own and ended, bool(extra.get("lost")), float(extra.get("time", failure.timestamp)), rank


def _failed(failures: dict, start: Start, asked: list[signal.Signals], kills: int | None) -> int:
    """Raises the one sentence of the process that failed first; returns its code when it had nothing to
    say."""

    rank, failure = min(failures.items(), key=lambda item: _order(item, bool(asked)))
    extra, code = _facts(failure), failure.exitcode
    world = f"Rank {rank} of {start.nproc * start.nodes}" + (
        f" (node {start.node})" if start.nodes > 1 else ""
    )
    if asked and (code < 0 or code == 128 + asked[-1]):
        raise Stopped(128 + asked[-1])
    if "message" in extra and "hint" in extra:
        error = PolymodalError(extra["message"], extra["hint"])
        error.code = extra.get("code", 2)
        raise error
    if code < 0 and not extra:
        name = signal.Signals(-code).name
        error = PolymodalError(f"{world} (process {failure.pid}) was ended by {name}.", _why(-code, kills))
        error.code = 128 - code
        raise error
    if extra:  # an exception that is not ours: its traceback is already on the terminal
        error = PolymodalError(
            f"{world} (process {failure.pid}) stopped: {failure.error_file_data['message']['message']}.",
            "Its traceback is above.",
        )
        error.code = code if code > 0 else 1
        raise error
    return code


def _why(number: int, kills: int | None) -> str:
    now = host.oom_kills()
    if number == signal.SIGKILL:
        if kills is not None and now is not None and now > kills:
            return "The kernel ended it because memory ran out: lower data.memory_budget or data.workers, or shard the model over more processes."
        return "Somebody killed it, or the kernel did because memory ran out (see `dmesg`)."
    if number == signal.SIGBUS:
        return "Shared memory ran out: start the container with --ipc=host or --shm-size=16g, or set data.workers to 0."
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        return "A library crashed; the stack is above."
    return "Somebody sent it that signal."
