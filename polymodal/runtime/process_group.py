"""Where a process stands among the others, and the life of its process group.

`place` reads what torchrun, SLURM, Kubernetes or a start script left in the environment; `runtime` joins the
group and leaves it again. Starting processes is the work of launcher.py. Imports torch late.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from polymodal.core.errors import PolymodalError
from polymodal.recipe import Recipe
from polymodal.runtime import device, environment, host

DEFAULT_PORT = 29500
RENDEZVOUS_SECONDS = 900
"""How long a process waits for the others to appear; HCCL_CONNECT_TIMEOUT, when set, takes its place."""
COLLECTIVE_SECONDS = 1800
"""How long one collective may take; HCCL_EXEC_TIMEOUT, when set, takes its place."""


was_started = False
"""Whether this process was in a process group at any time; polymodal/__main__.py says why that matters."""


class LostPeer(PolymodalError):
    """Another process went away. Never the cause: the launcher shows the error of the one that went first."""


@dataclass(frozen=True)
class Place:
    """One process among `world`. Ranks count from 0; `how` says who set it: alone, torchrun, slurm, kubernetes."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    address: str = ""
    port: int = 0
    how: str = "alone"


@dataclass(frozen=True)
class Start:
    """A wish to start `nproc` processes here, as node `node` of `nodes`; port 0 = choose a free one."""

    nproc: int
    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    port_name: str = "MASTER_PORT"


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise PolymodalError(
            f"The environment variable {name} = {text!r} is not a whole number.",
            f"Set {name} to a number, or unset it.",
        ) from None


def _first(environ: Mapping[str, str], *names: str) -> tuple[str, int] | None:
    for name in names:
        value = _number(environ, name)
        if value is not None:
            return name, value
    return None


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: "gpu[03-05,09],login1" -> "gpu03"."""
    depth, end = 0, len(nodelist)
    for i, letter in enumerate(nodelist):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", nodelist[:end])


def _tasks_of_node(text: str, node: int) -> int | None:
    """SLURM_TASKS_PER_NODE, e.g. "4(x2),3": how many of them node number `node` has."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


def _slurm(environ: Mapping[str, str]) -> Place | None:
    rank, world = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    if rank is None or world is None or world < 2:
        return None
    local_rank = _number(environ, "SLURM_LOCALID") or 0
    node = _number(environ, "SLURM_NODEID") or 0
    found = _first(environ, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    nodes = found[1] if found else 1
    tasks = (
        environ.get("SLURM_STEP_TASKS_PER_NODE")
        or environ.get("SLURM_TASKS_PER_NODE")
        or environ.get("SLURM_NTASKS_PER_NODE")
    )
    local_world = (_tasks_of_node(tasks, node) if tasks else None) or max(1, world // nodes)
    address = environ.get("MASTER_ADDR") or first_host(
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
        or environ.get("SLURM_NODELIST")
        or "127.0.0.1"
    )
    job = _number(environ, "SLURM_JOB_ID") or 0
    port = (
        _number(environ, "MASTER_PORT") or 20000 + job % 20000
    )  # alike on every node, different for two jobs
    return Place(rank, world, local_rank, local_world, node, nodes, address, port, "slurm")


def _node_start(environ: Mapping[str, str], nproc: int) -> Start:
    """This node among the nodes, for `nproc` processes to be started here."""
    nodes = _first(environ, "NNODES", "PET_NNODES")
    node = _first(environ, "NODE_RANK", "PET_NODE_RANK", "GROUP_RANK")
    if nodes is None and "RANK" in environ and "WORLD_SIZE" in environ:  # PyTorchJob: RANK counts the pods
        world = _number(environ, "WORLD_SIZE") or 1
        named = (
            _number(environ, "PET_NPROC_PER_NODE")
            if environ.get("PET_NPROC_PER_NODE", "").isdigit()
            else None
        )
        nodes, node = (
            ("WORLD_SIZE", max(1, world // named) if named else world),
            ("RANK", _number(environ, "RANK") or 0),
        )
    if nodes is None and (slurm := _first(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")) and slurm[1] > 1:
        nodes, node = slurm, node or ("SLURM_NODEID", _number(environ, "SLURM_NODEID") or 0)
    count, number = nodes[1] if nodes else 1, node[1] if node else 0
    address = environ.get("MASTER_ADDR") or environ.get("PET_MASTER_ADDR")
    port = _first(environ, "MASTER_PORT", "PET_MASTER_PORT")
    if count > 1:
        if node is None:
            raise PolymodalError(
                f"{nodes[0]} = {count}, but NODE_RANK is not set." if nodes else "NODE_RANK is not set.",
                "Set NODE_RANK to 0 on the first node, 1 on the second, and so on.",
            )
        if not address and environ.get("SLURM_JOB_NODELIST"):
            address = first_host(environ["SLURM_JOB_NODELIST"])
        if not address:
            raise PolymodalError(
                f"{nodes[0] if nodes else 'NNODES'} = {count}, but MASTER_ADDR is not set.",
                "Set MASTER_ADDR to the first node's address, alike on every node.",
            )
        if not 0 <= number < count:
            raise PolymodalError(
                f"{node[0]} = {number} is outside 0..{count - 1} ({nodes[0] if nodes else 'NNODES'} = {count}).",
                "Number the nodes from 0.",
            )
        return Start(
            nproc,
            number,
            count,
            address,
            port[1] if port else DEFAULT_PORT,
            port[0] if port else "the default MASTER_PORT",
        )
    return Start(nproc, 0, 1, "127.0.0.1", port[1] if port else 0, port[0] if port else "MASTER_PORT")


def place(nproc: int | None = None, environ: Mapping[str, str] | None = None) -> Place | Start:
    """What the environment (default: os.environ) says: join as `Place`, or start processes here (`Start`).

    nproc: processes a node asked for on the command line; else NPUS_PER_NODE or PET_NPROC_PER_NODE.
    Order: a launcher's process (RANK, WORLD_SIZE, LOCAL_RANK); processes to start here; a SLURM task; a Kubernetes
    pod (RANK, WORLD_SIZE alone); else one process. Raises PolymodalError when they contradict one another.
    """
    environ = os.environ if environ is None else environ
    joined = all(environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    slurm = _slurm(environ)
    if joined:
        if nproc is not None:
            raise PolymodalError(
                "This process was already started by a launcher (RANK, WORLD_SIZE and LOCAL_RANK are set), so --nproc has no meaning.",
                "Leave out --nproc, or start without torchrun.",
            )
        rank, world, local_rank = (
            _number(environ, name) or 0 for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        local_world = _number(environ, "LOCAL_WORLD_SIZE") or world
        return _checked(
            Place(
                rank, world, local_rank, local_world,
                _number(environ, "GROUP_RANK") or rank // local_world,
                _number(environ, "GROUP_WORLD_SIZE") or -(-world // local_world),
                environ.get("MASTER_ADDR") or "127.0.0.1", _number(environ, "MASTER_PORT") or DEFAULT_PORT, "torchrun",
            )
        )  # fmt: skip
    if slurm and nproc is not None and slurm.local_world > 1:
        raise PolymodalError(
            f"SLURM started {slurm.local_world} tasks on this node and --nproc asks each of them for {nproc} more.",
            "Leave out --nproc, or use --ntasks-per-node=1.",
        )
    if nproc is None and not (slurm and slurm.local_world > 1):
        found = _first(
            {k: v for k, v in environ.items() if v.isdigit()}, "NPUS_PER_NODE", "PET_NPROC_PER_NODE"
        )
        nproc = found[1] if found else None
    if nproc is not None:
        if nproc < 1:
            raise PolymodalError(f"{nproc} processes cannot be started.", "Use --nproc 1 or more.")
        return _node_start(environ, nproc)
    if slurm:
        return _checked(slurm)
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        rank, world = _number(environ, "RANK") or 0, _number(environ, "WORLD_SIZE") or 1
        return _checked(
            Place(
                rank,
                world,
                0,
                1,
                rank,
                world,
                environ.get("MASTER_ADDR") or "127.0.0.1",
                _number(environ, "MASTER_PORT") or DEFAULT_PORT,
                "kubernetes",
            )
        )
    if (_number(environ, "NNODES") or 1) > 1:
        raise PolymodalError(
            f"NNODES = {environ['NNODES']}, but nothing says how many processes a node has.",
            "Add --nproc N, or set NPUS_PER_NODE.",
        )
    return Place(0, 1, 0, 1, 0, 1)


def _checked(place: Place) -> Place:
    if not 0 <= place.rank < place.world or not 0 <= place.local_rank < place.local_world:
        raise PolymodalError(
            f"The environment says rank {place.rank} of {place.world} and local rank {place.local_rank} of {place.local_world} ({place.how}), which cannot be.",
            "Unset RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, or let one launcher set them all.",
        )
    return place


@dataclass
class Runtime:
    """This process, in its group, with its device. Made by `start`, closed by `stop`; `runtime` does both."""

    place: Place
    device: device.DeviceInfo
    threads: int
    signal: signal.Signals | None = None  # what asked this process to stop, once `catch_signals` was called
    _old: dict[int, object] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def local_rank(self) -> int:
        return self.place.local_rank

    @property
    def local_world(self) -> int:
        return self.place.local_world

    @property
    def is_main(self) -> bool:
        """The one process that prints and writes shared files."""
        return self.place.rank == 0

    def barrier(self) -> None:
        """Wait for every process (on the CPU group). Raises LostPeer when one went away."""
        if self.world > 1:
            import torch
            import torch.distributed as dist

            with lost_peers(self.place):
                dist.all_reduce(torch.zeros(1))

    def any_rank(self, *flags: bool) -> list[bool]:
        """Which of the flags some process set: alike on every process. Collective (one small sum on the CPU group)."""
        if self.world == 1:
            return list(flags)
        import torch
        import torch.distributed as dist

        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found)
        return [bool(x) for x in found]

    def share(self, value: object) -> object:
        """Rank 0's value (picklable) on every process. Collective."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def catch_signals(self, names: tuple[str, ...] = ("SIGTERM", "SIGINT")) -> None:
        """From now on the first such signal only sets `signal`, to be polled between steps; a second one stops at once."""

        def note(number: int, frame: object) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signal.Signals(number)

        for name in names:
            number = getattr(signal, name)
            self._old.setdefault(number, signal.signal(number, note))


LOST = (
    "closed by peer", "reset by peer", "broken pipe", "connection refused", "socket closed", "remote process exited",
    "timed out waiting", "read error", "peer closed",
)  # fmt: skip


def lost(text: str) -> bool:
    """Whether an error's text is a backend's way to say that another process is gone."""
    return any(sign in text.lower() for sign in LOST)


@contextlib.contextmanager
def lost_peers(place: Place) -> Iterator[None]:
    """Turns the backends' many ways to say that another process is gone into LostPeer."""
    try:
        yield
    except PolymodalError:
        raise
    except RuntimeError as error:
        text = str(error)
        if place.world < 2 or not lost(text):
            raise
        line = next((s.strip() for s in text.splitlines() if s.strip()), text)
        raise LostPeer(
            f"Rank {place.rank} of {place.world} lost contact with another process ({line[:200]}).",
            "Look for the first error of another rank or node; this one only noticed.",
        ) from error


def _seconds(name: str, default: int) -> timedelta:
    return timedelta(seconds=_number(os.environ, name) or default)


def _join(place: Place, info: device.DeviceInfo, rendezvous: timedelta, collective: timedelta) -> None:
    """init_process_group, with what can go wrong in one sentence."""
    import torch.distributed as dist

    if place.world == 1:  # no sockets: nothing to collide with
        dist.init_process_group(
            info.backend, store=dist.HashStore(), rank=0, world_size=1, timeout=collective
        )
        return
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world), LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world), MASTER_ADDR=place.address, MASTER_PORT=str(place.port),
    )  # fmt: skip
    if place.nodes == 1 and os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # gloo else resolves the host's name, which containers lack
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        host.require_port(place.port, "MASTER_PORT")
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", place.rank, place.world, timeout=rendezvous)))
        dist.init_process_group(
            info.backend, store=store, rank=place.rank, world_size=place.world, timeout=collective
        )
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        text = next((s.strip() for s in str(error).splitlines() if s.strip()), type(error).__name__)
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            host.require_port(place.port, "MASTER_PORT")
        who = f"Rank {place.rank} of {place.world} could not join the others at {place.address}:{place.port} within {rendezvous.total_seconds():.0f} s"
        hints = {
            "slurm": "Start every task with `srun polymodal train ...`, and see that the nodes reach the first one's port.",
            "kubernetes": "See that all pods run and that MASTER_ADDR resolves inside them.",
        }
        raise LostPeer(
            f"{who} ({text[:200]}).",
            hints.get(
                place.how,
                f"See that all {place.world} processes were started and that {place.address}:{place.port} can be reached from here.",
            ),
        ) from error


def start(recipe: Recipe, *, rendezvous: float | None = None, here: Place | None = None) -> Runtime:
    """Environment, threads, device and process group of this process.

    rendezvous: seconds to wait for the others. here: this process's place (default: from the environment).
    Raises PolymodalError when the port is taken, the others do not come, or the device is not there.
    """
    environment.apply(recipe.device)
    found = here or place()
    if isinstance(found, Start) and found.nproc * found.nodes == 1:
        found = Place(0, 1, 0, 1, 0, 1)
    if isinstance(found, Start):
        raise PolymodalError(
            f"{found.nproc} processes are asked for and none was started.",
            "Start with `polymodal train RECIPE --nproc N`.",
        )
    threads = device.set_threads(recipe.device.threads, found.local_world)
    info = device.find(recipe.device.kind, found.local_rank)
    wait = (
        timedelta(seconds=rendezvous) if rendezvous else _seconds("HCCL_CONNECT_TIMEOUT", RENDEZVOUS_SECONDS)
    )
    global was_started
    was_started = True
    _join(found, info, wait, _seconds("HCCL_EXEC_TIMEOUT", COLLECTIVE_SECONDS))
    return Runtime(found, info, threads)


def stop(rt: Runtime) -> None:
    """Leave the process group and restore the signal handlers. Never waits for another process."""
    import torch.distributed as dist

    for number, old in rt._old.items():
        signal.signal(number, old)  # type: ignore[arg-type]
    rt._old.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_note(error: BaseException) -> None:
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
    first = (str(error) or type(error).__name__).splitlines()[0]
    body = {"message": {"message": f"{type(error).__name__}: {first}", "extraInfo": extra}}
    with contextlib.suppress(OSError):
        temporary = f"{file}.{os.getpid()}"
        Path(temporary).write_text(json.dumps(body))
        os.replace(temporary, file)


@contextlib.contextmanager
def runtime(recipe: Recipe, *, rendezvous: float | None = None) -> Iterator[Runtime]:
    """`with launch.runtime(recipe) as rt:` the group is up inside and gone after, whatever happens inside.

    A backend's complaint that another process went away leaves as LostPeer. The error is noted for the launcher
    BEFORE the group goes: the others notice only then, so the first error is always on record when they fail.
    """
    rt = start(recipe, rendezvous=rendezvous)
    try:
        with lost_peers(rt.place):
            yield rt
    except Exception as error:
        leave_note(error)
        raise
    finally:
        stop(rt)


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
