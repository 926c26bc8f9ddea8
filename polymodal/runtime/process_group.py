"""This process's ranks as its launcher set them, and the life of its process group.

`from_environment` reads what torchrun, SLURM, Kubernetes or a start script set; `runtime` joins the group and
leaves it again. launcher.py starts processes. torch is imported late.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from polymodal.core.errors import PolymodalError, cause
from polymodal.core.redaction import redact_all
from polymodal.recipe import Recipe
from polymodal.runtime import device, environment, host
from polymodal.runtime.objects import only_records
from polymodal.runtime.rendezvous import joined_store

DEFAULT_PORT = 29500
RENDEZVOUS_SECONDS = 900
"""How long a process waits for the other ranks to appear, unless HCCL_CONNECT_TIMEOUT is set."""
COLLECTIVE_SECONDS = 1800
"""How long one collective may take, unless HCCL_EXEC_TIMEOUT is set."""

was_started = False
"""Whether this process was in a process group at any time; polymodal/__main__.py says why that matters."""


class LostPeer(PolymodalError):
    """Another process went away. Never the cause: the launcher shows the error of the first that failed."""


@dataclass(frozen=True)
class ProcessInfo:
    """One process among `world`; all ranks count from 0."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    address: str = ""
    port: int = 0
    launcher: str = "alone"  # or a key of RANK_VARIABLES


ALONE = ProcessInfo(0, 1, 0, 1, 0, 1)


@dataclass(frozen=True)
class LaunchRequest:
    """Start `nproc` processes here, as node `node` of `nodes`; port 0 = choose a free one."""

    nproc: int
    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    port_name: str = "MASTER_PORT"


# ---- environment variables -----------------------------------------------------------------------------

RANK_VARIABLES = {
    "torchrun": {
        "rank": "RANK",
        "world": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_world": "LOCAL_WORLD_SIZE",
        "node": "GROUP_RANK",
        "nodes": "GROUP_WORLD_SIZE",
    },
    "slurm": {
        "rank": "SLURM_PROCID",
        "world": "SLURM_NTASKS",
        "local_rank": "SLURM_LOCALID",
        "node": "SLURM_NODEID",
        "nodes": "SLURM_STEP_NUM_NODES SLURM_JOB_NUM_NODES SLURM_NNODES",
    },
    "kubernetes": {"rank": "RANK", "world": "WORLD_SIZE"},  # one process a pod
}
"""What each launcher sets in a process that it starts. Of several names the first that is set counts."""


def _first(environ: Mapping[str, str], names: str) -> tuple[str, str]:
    """(name, value) of the first of the space-separated `names` that is set; ("", "") when none is."""
    return next(((name, environ[name]) for name in names.split() if environ.get(name, "").strip()), ("", ""))


def _first_number(environ: Mapping[str, str], names: str) -> tuple[str, int | None]:
    """As `_first`, for whole numbers."""
    name, text = _first(environ, names)
    try:
        return name, int(text) if text else None
    except ValueError:
        raise PolymodalError(
            f"The environment variable {name} = {text!r} is not a whole number.",
            f"Set {name} to a number, or unset it.",
        ) from None


def _number(environ: Mapping[str, str], names: str) -> int | None:
    return _first_number(environ, names)[1]


def _master_address(environ: Mapping[str, str]) -> str:
    """Address of the first node, "" when no variable has it."""
    hosts = _first(environ, "SLURM_STEP_NODELIST SLURM_JOB_NODELIST SLURM_NODELIST")[1]
    return _first(environ, "MASTER_ADDR PET_MASTER_ADDR")[1] or first_host(hosts)


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: "gpu[03-05,09],login1" -> "gpu03"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _slurm_tasks(environ: Mapping[str, str], node: int) -> int | None:
    """Tasks of node number `node`, e.g. of SLURM_TASKS_PER_NODE = "4(x2),3"; None when they are not known."""
    text = _first(environ, "SLURM_STEP_TASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_NTASKS_PER_NODE")[1]
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    return counts[node] if node < len(counts) else None


def _joined(environ: Mapping[str, str], launcher: str) -> ProcessInfo:
    """This process as `launcher` started it. Raises PolymodalError when its ranks contradict one another."""
    facts = {fact: _number(environ, names) for fact, names in RANK_VARIABLES[launcher].items()}
    rank, world, local_rank = facts["rank"] or 0, facts["world"] or 1, facts.get("local_rank") or 0
    local_world = facts.get("local_world")
    port = DEFAULT_PORT
    if launcher == "kubernetes":
        local_world = 1
    elif launcher == "slurm":
        local_world = _slurm_tasks(environ, facts["node"] or 0)
        # the same on every node, and not that of another job
        port = 20000 + (_number(environ, "SLURM_JOB_ID") or 0) % 20000
    local_world = local_world or max(1, world // (facts.get("nodes") or 1))
    node = facts.get("node")
    if not 0 <= rank < world or not 0 <= local_rank < local_world:
        raise PolymodalError(
            f"The environment sets rank {rank} of {world} and local rank {local_rank} of {local_world} "
            f"({launcher}), which cannot be.",
            "Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or let one launcher set them all.",
        )
    return ProcessInfo(
        rank,
        world,
        local_rank,
        local_world,
        rank // local_world if node is None else node,
        facts.get("nodes") or -(-world // local_world),
        _master_address(environ) or "127.0.0.1",
        _number(environ, "MASTER_PORT") or port,
        launcher,
    )


def _pod_processes(environ: Mapping[str, str]) -> int | None:
    """PET_NPROC_PER_NODE where it is a number: operators also set words such as auto."""
    text = environ.get("PET_NPROC_PER_NODE", "")
    return int(text) if text.isdigit() else None


def _request(environ: Mapping[str, str], nproc: int) -> LaunchRequest:
    """This node among the nodes of the run, for `nproc` processes to be started here."""
    nodes_name, nodes = _first_number(environ, "NNODES PET_NNODES")
    node_name, node = _first_number(environ, "NODE_RANK PET_NODE_RANK GROUP_RANK")
    if nodes is None and "RANK" in environ and "WORLD_SIZE" in environ:  # PyTorchJob: RANK counts the pods
        nodes_name, nodes = "WORLD_SIZE", (_number(environ, "WORLD_SIZE") or 1)
        nodes = max(1, nodes // (_pod_processes(environ) or 1))
        node_name, node = "RANK", _number(environ, "RANK") or 0
    elif nodes is None:
        nodes_name, nodes = _first_number(environ, RANK_VARIABLES["slurm"]["nodes"])
        if node is None:
            node_name, node = "SLURM_NODEID", _number(environ, "SLURM_NODEID") or 0
    port_name, port = _first_number(environ, "MASTER_PORT PET_MASTER_PORT")
    if nodes is None or nodes < 2:
        return LaunchRequest(nproc, port=port or 0, port_name=port_name or "MASTER_PORT")
    if node is None:
        raise PolymodalError(
            f"{nodes_name} = {nodes}, but NODE_RANK is not set.",
            "Set NODE_RANK to 0 on the first node, 1 on the second, and so on.",
        )
    if not 0 <= node < nodes:
        raise PolymodalError(
            f"{node_name} = {node} is outside 0..{nodes - 1} ({nodes_name} = {nodes}).",
            "Number the nodes from 0.",
        )
    address = _master_address(environ)
    if not address:
        raise PolymodalError(
            f"{nodes_name} = {nodes}, but MASTER_ADDR is not set.",
            "Set MASTER_ADDR to the first node's address, the same on every node.",
        )
    port_name = port_name or "the default MASTER_PORT"
    return LaunchRequest(nproc, node, nodes, address, port or DEFAULT_PORT, port_name)


def from_environment(
    nproc: int | None = None, environ: Mapping[str, str] | None = None
) -> ProcessInfo | LaunchRequest:
    """What the environment (default: os.environ) asks for: join as `ProcessInfo`, or start processes here.

    nproc: processes a node asked for on the command line; else NPUS_PER_NODE or PET_NPROC_PER_NODE.
    Order: a launcher's process (RANK, WORLD_SIZE, LOCAL_RANK); processes to start here; a SLURM task; a
    Kubernetes pod (RANK, WORLD_SIZE alone); else one process. Raises PolymodalError for contradictions.
    """
    environ = os.environ if environ is None else environ
    if all(environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        if nproc is not None:
            raise PolymodalError(
                "This process was already started by a launcher (RANK, WORLD_SIZE and LOCAL_RANK are set), "
                "so --nproc has no meaning.",
                "Leave out --nproc, or start without torchrun.",
            )
        return _joined(environ, "torchrun")
    is_task = _number(environ, "SLURM_PROCID") is not None and (_number(environ, "SLURM_NTASKS") or 1) > 1
    slurm = _joined(environ, "slurm") if is_task else None
    tasks_here = slurm.local_world if slurm else 1
    if nproc is not None and tasks_here > 1:
        raise PolymodalError(
            f"SLURM started {tasks_here} tasks on this node and --nproc asks each of them for {nproc} more.",
            "Leave out --nproc, or use --ntasks-per-node=1.",
        )
    if nproc is None and tasks_here == 1:
        nproc = _number(environ, "NPUS_PER_NODE")
        nproc = _pod_processes(environ) if nproc is None else nproc
    if nproc is not None:
        if nproc < 1:
            raise PolymodalError(f"{nproc} processes cannot be started.", "Use --nproc 1 or more.")
        return _request(environ, nproc)
    if slurm:
        return slurm
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return _joined(environ, "kubernetes")
    if (_number(environ, "NNODES") or 1) > 1:
        raise PolymodalError(
            f"NNODES = {environ['NNODES']}, but the number of processes a node is not set.",
            "Add --nproc N, or set NPUS_PER_NODE.",
        )
    return ALONE


def default_nproc(asked: str | None, kind: str = "auto") -> int | None:
    """`--nproc`: a number, or "auto" for every accelerator of this node (1 without any). None stays None."""
    if asked is None:
        return None
    if asked == "auto":
        return device.count(kind)
    if not asked.isdigit() or int(asked) < 1:
        raise PolymodalError(
            f"--nproc {asked} is not a number of processes.",
            "Use a whole number from 1, or auto for every device of this node.",
        )
    return int(asked)


# ---- the process group ---------------------------------------------------------------------------------


@dataclass
class Runtime:
    """This process, in its group, with its device. Made by `start`, closed by `stop`; `runtime` does both."""

    process: ProcessInfo
    device: device.DeviceInfo
    threads: int
    signal: signal.Signals | None = None  # what asked this process to stop, once `catch_signals` was called
    _old: dict[int, object] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.process.rank

    @property
    def world(self) -> int:
        return self.process.world

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process (on the CPU group). Raises LostPeer when one went away."""
        with lost_peers(self.process):
            self.any_rank(False)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Which of the flags some process set, the same on every process. Collective (one CPU all-reduce)."""
        if self.world == 1:
            return list(flags)
        import torch
        import torch.distributed as dist

        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts)
        return [bool(count) for count in counts]

    def share(self, value: object) -> object:
        """Rank 0's value (picklable) on every process. Collective."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def catch_signals(self) -> None:
        """What asks to stop (`stop_signals`) then only sets `signal`, to be polled between steps; a second
        one stops."""

        def note(number: int, frame: object) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        def once_more(unraisable: sys.UnraisableHookArgs) -> None:
            """KeyboardInterrupt in a callback of the interpreter, which would be lost."""
            if issubclass(unraisable.exc_type, KeyboardInterrupt):
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            else:
                sys.__unraisablehook__(unraisable)

        for number in stop_signals():
            self._old.setdefault(number, signal.signal(number, note))
        sys.unraisablehook = once_more


def stop_signals() -> list[signal.Signals]:
    """Those that ask a run to save and stop; under nohup a closing terminal does not."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangs_up else [])]


LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|connection refused|socket closed|remote process exited|"
    "timed out waiting|read error|peer closed",
    re.IGNORECASE,
)


def lost(text: str) -> bool:
    """Whether an error's text is a backend's way to say that another process is gone."""
    return LOST.search(text) is not None


def require_port_after(error: Exception, port: int, name: str) -> None:
    """Raises PolymodalError with the owner of the port when `error` came from a port in use."""
    if "address already in use" in str(error).lower():
        host.require_port(port, name)


@contextlib.contextmanager
def lost_peers(process: ProcessInfo) -> Iterator[None]:
    """Turns the backends' many ways to say that another process is gone into LostPeer."""
    try:
        yield
    except PolymodalError:
        raise
    except RuntimeError as error:
        if process.world < 2 or not lost(str(error)):
            raise
        raise LostPeer(
            f"Rank {process.rank} of {process.world} lost contact with another process "
            f"({cause(error)[:200]}).",
            "Look for the first error of another rank or node; this one only noticed.",
        ) from error


def timeout_seconds(variable: str, default: int) -> int:
    return _number(os.environ, variable) or default


JOIN_HINTS = {
    "slurm": "Start every task with `srun polymodal train ...`, and see that all nodes reach the first one's "
    "port.",
    "kubernetes": "See that all pods run and that MASTER_ADDR resolves inside them.",
}


def _join(process: ProcessInfo, backend: str, patience: timedelta, collective: timedelta) -> None:
    """init_process_group, with what can go wrong in one sentence."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    # what groups of a mesh are made with: else theirs would be torch's, whatever was asked for
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = collective
    if process.world == 1:  # a store without a socket: no port can be in use
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=collective)
        return
    only_records()
    where = f"{process.address}:{process.port}"
    for fact in ("rank", "world", "local_rank", "local_world"):
        os.environ[RANK_VARIABLES["torchrun"][fact]] = str(getattr(process, fact))
    os.environ.update(MASTER_ADDR=process.address, MASTER_PORT=str(process.port))
    if process.nodes == 1 and os.path.isdir("/sys/class/net/lo"):
        # nobody on a network reaches them; and gloo would resolve the host's name, which containers lack
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    elif name := host.interface_towards(process.address):
        # gloo would listen where the host's own name points: often 127.0.1.1, or a network of the node alone
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    try:
        store = joined_store(process.rank, process.world, process.address, process.port, patience)
        dist.init_process_group(
            backend, store=store, rank=process.rank, world_size=process.world, timeout=collective
        )
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        require_port_after(error, process.port, "MASTER_PORT")
        hint = (
            f"See that all {process.world} processes were started and that {where} can be reached from here."
        )
        raise LostPeer(
            f"Rank {process.rank} of {process.world} could not join the other ranks at {where} "
            f"within {patience.total_seconds():.0f} s ({cause(error)[:200]}).",
            JOIN_HINTS.get(process.launcher, hint),
        ) from error


def start(recipe: Recipe, *, rendezvous: float | None = None, process: ProcessInfo | None = None) -> Runtime:
    """Environment, threads, device and process group of this process.

    rendezvous: seconds to wait for the other ranks. process: its ranks (default: from the environment).
    Raises PolymodalError when the port is taken, the other ranks do not come, or the device is not there.
    """
    environment.apply(recipe.device)
    target = process or from_environment()
    if isinstance(target, LaunchRequest):
        if target.nproc * target.nodes > 1:
            raise PolymodalError(
                f"{target.nproc} processes are asked for and none was started.",
                "Start with `polymodal train RECIPE --nproc N`.",
            )
        target = ALONE
    threads = device.set_threads(recipe.device.threads, target.local_world)
    info = device.find(recipe.device.kind, target.local_rank, shown_alone=target.launcher == "slurm")
    wait = rendezvous or timeout_seconds("HCCL_CONNECT_TIMEOUT", RENDEZVOUS_SECONDS)
    collective = timeout_seconds("HCCL_EXEC_TIMEOUT", COLLECTIVE_SECONDS)
    global was_started
    was_started = True
    _join(target, info.backend, timedelta(seconds=wait), timedelta(seconds=collective))
    return Runtime(target, info, threads)


def stop(rt: Runtime, failed: bool = False) -> None:
    """Leave the process group and restore the signal handlers. Never waits for another process.

    failed: this process ends with an error. On an accelerator it stays in its group then, and its end is what
    the others notice: NCCL and hccl wait for collectives in which the others still are.
    """
    import torch.distributed as dist

    for number, old in rt._old.items():
        signal.signal(number, old)  # type: ignore[arg-type]
    rt._old.clear()
    sys.unraisablehook = sys.__unraisablehook__
    if dist.is_initialized() and not (failed and rt.device.kind != "cpu" and rt.world > 1):
        dist.destroy_process_group()


def write_error_file(error: BaseException) -> None:
    """Write `error` where the launcher of this process (ours, torchrun) looks for it, if there is one."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    extra = {
        "timestamp": str(int(time.time())),
        "time": time.time(),
        "lost": isinstance(error, LostPeer),
        "py_callstack": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, PolymodalError):
        extra |= {"message": error.message, "hint": error.hint, "code": error.code}
    body = {"message": {"message": f"{type(error).__name__}: {cause(error)}", "extraInfo": extra}}
    with contextlib.suppress(OSError):
        temporary = f"{file}.{os.getpid()}"
        Path(temporary).write_text(json.dumps(redact_all(body)))
        os.replace(temporary, file)


@contextlib.contextmanager
def runtime(recipe: Recipe, *, rendezvous: float | None = None) -> Iterator[Runtime]:
    """`with runtime(recipe) as rt:` the group is up inside and gone after, whatever happens inside.

    A backend's error that another process went away leaves as LostPeer. An error is written for the launcher
    BEFORE the group goes: the other ranks notice only then, so the first error is on record when they fail.
    """
    rt = start(recipe, rendezvous=rendezvous)
    failed = True
    try:
        with lost_peers(rt.process):
            yield rt
        failed = False
    except Exception as error:
        write_error_file(error)
        raise
    finally:
        stop(rt, failed)
