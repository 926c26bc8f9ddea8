"""Processes that make batches, and the way of a batch from there to here.

Sees core/sample.py only; what is made is the business of the callable it is given. Own code in place of torch's
DataLoader or a ProcessPoolExecutor, for four things a trainer needs: a task goes to whoever is idle (pictures differ
a hundredfold in cost), the caller decides when it goes (byte budget), a dead process is known at once with its cause,
and none outlives its parent: each has a socket of its own, whose end the other side sees.

A batch travels as one anonymous file in memory (memfd), mapped here without a copy. That neither needs room in
/dev/shm, which containers keep small, nor holds a file descriptor a tensor. Where a kernel has no memfd, bytes go
through the socket, with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, reduction
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch

log = logging.getLogger("polymodal.data")
Make = Callable[[Any], tuple[Batch, Any]]
_ALIGN = 64


class _Worker(NamedTuple):
    process: Any
    pipe: connection.Connection


class Pool:
    """`count` spawned processes, each doing one task at a time: `make(payload) -> (Batch, notes)`.

    make and what it holds are pickled once a process; about(payload) names the task in the error of a dead process.
    """

    def __init__(self, make: Make, count: int, about: Callable[[Any], str] = str):
        self._about = about
        self._doing: dict[connection.Connection, tuple[int, Any]] = {}
        shared = memory_files_work()
        if not shared:
            log.warning(
                "This system gives no anonymous memory files: prepared samples are copied through sockets, which is slower."
            )
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        # What a process knows goes by a file: through its pipe, each would be waited for while it imports torch.
        with quiet_threads(), tempfile.TemporaryFile() as baggage:
            pickle.dump(make, baggage, protocol=5)
            baggage.flush()
            for number in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(theirs, _Baggage(baggage.fileno()), shared),
                    name=f"polymodal-data-{number}",
                    daemon=True,
                )
                try:
                    process.start()
                except BaseException:
                    self.close()
                    raise
                theirs.close()  # the only other end is the process's: its death is an end of file here
                self._workers.append(_Worker(process, mine))

    @property
    def idle(self) -> bool:
        return len(self._doing) < len(self._workers)

    def submit(self, number: int, payload: Any) -> None:
        """Hand a task to an idle process."""
        worker = next(w for w in self._workers if w.pipe not in self._doing)
        self._doing[worker.pipe] = number, payload
        try:
            worker.pipe.send_bytes(pickle.dumps(payload, protocol=5))
        except OSError as error:
            raise self._death(worker, error) from None

    def wait(self, wake: connection.Connection) -> list[tuple[int, Batch, Any]]:
        """Sleep until something is made, a process dies or `wake` is written to: (number, batch, notes) of the made.

        Raises PolymodalError of a task, or about a dead process; RuntimeError with the traceback of a fault of ours.
        """
        made = []
        for ready in connection.wait([w.pipe for w in self._workers] + [wake]):
            if ready is wake:
                drain(wake)
                continue
            worker = next(w for w in self._workers if w.pipe is ready)
            try:
                kind, body = pickle.loads(worker.pipe.recv_bytes())
                batch = receive(worker.pipe, *body[0]) if kind == "made" else None
            except (EOFError, OSError, RuntimeError) as error:
                raise self._death(worker, error) from None
            number, _ = self._doing.pop(worker.pipe)
            if kind == "failed":
                raise body
            if batch is None:
                raise RuntimeError(f"a data worker failed:\n{body}")
            made.append((number, batch, body[1]))
        return made

    def _death(self, worker: _Worker, error: Exception) -> PolymodalError:
        worker.process.join(5)
        code, task = worker.process.exitcode, self._doing.get(worker.pipe)
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}"
            hint = {
                "SIGKILL": "Most likely the machine or container ran out of memory: lower data.workers, data.prefetch or data.memory_budget, or the size of images and videos.",
                "SIGBUS": "A file was cut short while it was read, or memory ran out: check the data's disk and the container's memory limit.",
                "SIGSEGV": "A decoder crashed on one of these files: set data.workers to 0 to see which, and mend or remove it.",
            }.get(name, "Someone or something ended it: look at the system's log.")
        elif code is None:
            how, hint = (
                f"cannot be heard any more ({error or type(error).__name__})",
                "Often too many files are open: raise `ulimit -n`.",
            )
        else:
            how = f"ended with exit code {code}"
            hint = "Its own message stands above; data.workers = 0 prepares samples without processes."
        where = f" while it prepared {self._about(task[1])}" if task else ""
        return PolymodalError(f"A data worker (process {worker.process.pid}) {how}{where}.", hint)

    def close(self) -> None:
        """End all processes at once; they only read, nothing is lost. May be called twice."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers = []
        self._doing = {}


class Inline:
    """The same without processes: a task is done in wait(), by the caller's thread."""

    def __init__(self, make: Make):
        self._make = make
        self._tasks: list[tuple[int, Any]] = []

    @property
    def idle(self) -> bool:
        return not self._tasks

    def submit(self, number: int, payload: Any) -> None:
        self._tasks.append((number, payload))

    def wait(self, wake: connection.Connection) -> list[tuple[int, Batch, Any]]:
        if not self._tasks:
            wake.poll(None)
        drain(wake)
        if not self._tasks:
            return []
        number, payload = self._tasks.pop()
        return [(number, *self._make(payload))]

    def close(self) -> None:
        self._tasks.clear()


def drain(wake: connection.Connection) -> None:
    """Read what has been written to a pipe that is only a bell."""
    while wake.poll():
        wake.recv_bytes()


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Environment of processes that are one of many: one thread each. Restored when they are started."""
    names = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Baggage:
    """An open file of one pickled object, which a process inherits and reads by itself."""

    def __init__(self, handle: int):
        self.handle = handle

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.handle)

    def __setstate__(self, duplicate: Any) -> None:
        self.handle = duplicate.detach()

    def unpack(self) -> Any:
        with (
            os.fdopen(self.handle, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return pickle.loads(content)


def _serve(pipe: connection.Connection, baggage: _Baggage, shared: bool) -> None:
    """A worker's life: until the pipe ends. Signals for the job are the trainer's to answer, not its workers'."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    make: Make = baggage.unpack()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            payload = pickle.loads(pipe.recv_bytes())
            try:
                batch, notes = make(payload)
            except PolymodalError as error:
                pipe.send_bytes(pickle.dumps(("failed", error)))
            except BaseException:
                pipe.send_bytes(pickle.dumps(("bug", traceback.format_exc())))
            else:
                send(pipe, batch, notes, shared)
                del batch


# A batch through a socket --------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A batch without its numbers: (name, dtype, shape, offset in bytes) of each tensor, and the rest of its fields."""

    tensors: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    segments: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    rest: tuple[dict, tuple[int, ...], dict]  # axes, samples, groups


def memory_files_work() -> bool:
    """Whether this kernel (or its sandbox) gives anonymous memory files."""
    try:
        handle = os.memfd_create("polymodal")
    except (AttributeError, OSError):
        return False
    os.close(handle)
    return True


def send(pipe: connection.Connection, batch: Batch, notes: Any, shared: bool) -> None:
    """Write a batch into one stretch of memory and hand that over, as a memory file if `shared`."""
    end = 0
    parts: list[tuple[int, Tensor]] = []
    layout = Layout([], [], (batch.axes, batch.samples, batch.groups))
    for found, tensors in ((layout.tensors, batch.tensors), (layout.segments, batch.segments)):
        for name, tensor in tensors.items():
            end = -(-end // _ALIGN) * _ALIGN
            found.append((name, tensor.dtype, tuple(tensor.shape), end))
            parts.append((end, tensor))
            end += tensor.numel() * tensor.element_size()
    size = max(end, 1)
    handle = None
    if shared:
        handle = os.memfd_create("polymodal")
        try:
            os.posix_fallocate(handle, 0, size)  # too little memory is an error here, and a SIGBUS later
        except OSError:
            os.close(handle)
            handle = None
    memory = mmap.mmap(-1 if handle is None else handle, size)
    into = torch.frombuffer(memory, dtype=torch.uint8)
    for start, tensor in parts:
        if tensor.numel():
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            into[start : start + len(raw)].copy_(raw)
    pipe.send_bytes(pickle.dumps(("made", ((layout, size, handle is not None), notes)), protocol=5))
    if handle is None:
        pipe.send_bytes(memory)
    else:
        reduction.send_handle(pipe, handle, os.getppid())
        os.close(handle)


def receive(pipe: connection.Connection, layout: Layout, size: int, shared: bool) -> Batch:
    """The other end of `send`, after its header: tensors are views of one buffer, which is freed with the last."""
    buffer: Any
    if shared:
        handle = reduction.recv_handle(pipe)
        try:
            buffer = mmap.mmap(handle, size)
        finally:
            os.close(handle)
    else:
        buffer = bytearray(size)
        pipe.recv_bytes_into(buffer)
    memory = torch.frombuffer(buffer, dtype=torch.uint8)

    def views(places: Sequence[tuple[str, torch.dtype, tuple[int, ...], int]]) -> dict[str, Tensor]:
        out = {}
        for name, dtype, shape, start in places:
            count = torch.Size(shape).numel() * dtype.itemsize
            out[name] = memory[start : start + count].view(dtype).view(shape)
        return out

    axes, samples, groups = layout.rest
    return Batch(views(layout.tensors), axes, samples, views(layout.segments), groups)
