"""Worker processes that make batches, and the transfer of a batch to the main process.

Own code in place of torch's DataLoader: docs/dependencies.md has what was measured. Each process has a
thread here: it sends a task, waits for the answer, and puts it into the task's Future. So a task goes to the
next idle process (pictures differ a hundredfold in cost), the caller decides when it is submitted, and a
dead process is noticed at once, with its cause and the task it was at.

A batch is sent as one anonymous file in memory (memfd), mapped here without a copy. That needs no space in
/dev/shm, which containers keep small, nor a file descriptor per tensor. Where a kernel has no memfd, bytes
go through the socket, with a warning.
"""

from __future__ import annotations

import contextlib
import io
import logging
import mmap
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
    """`count` processes, each doing one task at a time: `make(task) -> (Batch, stats)`; 0: a thread.

    make and what it holds are pickled once and sent to each process; about(task) names the task in the error
    of a dead process. device: an accelerator that batches will be copied to: their tensors are made
    page-locked.
    """

    def __init__(
        self,
        make: Make,
        count: int,
        about: Callable[[Any], str] = str,
        device: torch.device | None = None,
    ):
        self._about = about
        self._device = device if device is not None and device.type != "cpu" else None
        self._tasks: queue.SimpleQueue[tuple[Future, Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._death: PolymodalError | None = None  # of the first process that died
        self._workers: list[_Worker] = []
        self._threads: list[threading.Thread] = []
        if not count:
            self._thread(self._serve, make)
            return
        shared = memory_files_work()
        if not shared:
            log.warning(
                "This system gives no anonymous memory files: prepared samples are copied through sockets, "
                "which is slower."
            )
        content = pickle.dumps(make, protocol=5)
        try:
            with quiet_threads():
                for number in range(count):
                    self._workers.append(_start(number, shared))
        except BaseException:
            self.close()
            raise
        for worker in self._workers:
            self._thread(self._drive, worker, content)

    def submit(self, task: Any) -> Future:
        """Put a task in the queue. Its Future gives (Batch, stats), or raises: PolymodalError of the task or
        about a dead process, RuntimeError with the traceback of any other exception in a process."""
        future: Future = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End all processes at once (they only read, nothing is lost) and all threads; a thread without a
        process ends its task first. Futures that are not done stay so. May be called twice."""
        self._closed = True
        for worker in self._workers:
            worker.process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers, self._threads = [], []

    # The threads ------------------------------------------------------------

    def _thread(self, target: Callable, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name="polymodal-data", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _drive(self, worker: _Worker, content: bytes) -> None:
        with contextlib.suppress(OSError):  # it died while it started: the first task raises
            worker.pipe.send_bytes(content)
        del content
        self._serve(lambda task: self._ask(worker, task))

    def _serve(self, make: Make) -> None:
        if self._device is not None:  # the device is set per thread; its driver gives page-locked memory
            torch.accelerator.set_device_index(self._device)
        while (item := self._tasks.get()) is not None and not self._closed:
            self._complete(make, *item)
            del item

    def _complete(self, make: Make, future: Future, task: Any) -> None:
        try:
            batch, stats = make(task)
            future.set_result((batch if self._device is None else batch.pin_memory(), stats))
        except BaseException as error:
            future.set_exception(error)

    def _ask(self, worker: _Worker, task: Any) -> tuple[Batch, Any]:
        if self._death is not None:
            raise self._death
        sent = False
        try:
            worker.pipe.send_bytes(pickle.dumps(task, protocol=5))
            sent = True
            answer = receive(worker.pipe)
        except (EOFError, OSError, RuntimeError) as error:
            if self._closed:
                raise
            self._death = self._describe(worker, task if sent else None, error)
            raise self._death from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _describe(self, worker: _Worker, task: Any, error: Exception) -> PolymodalError:
        worker.process.join(5)
        code = worker.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}"
            hint = {
                "SIGKILL": "Most likely the machine or container ran out of memory: lower data.workers, "
                "data.prefetch or data.memory_budget, or the size of images and videos.",
                "SIGBUS": "A file was cut short while it was read, or memory ran out: check the data's disk "
                "and the container's memory limit.",
                "SIGSEGV": "A decoder crashed on one of these files: set data.workers to 0 to see which, and "
                "repair or remove it.",
            }.get(name, "Look for the cause in the system's log.")
        elif code is None:
            how = f"cannot be reached any more ({error or type(error).__name__})"
            hint = "Often too many files are open: raise `ulimit -n`."
        else:
            how = f"ended with exit code {code}"
            hint = "Its own message is above; data.workers = 0 prepares samples without processes."
        where = f" while it prepared {self._about(task)}" if task is not None else ""
        return PolymodalError(f"A data worker (process {worker.process.pid}) {how}{where}.", hint)


# The processes --------------------------------------------------------------


NEEDED = ("polymodal.data.chat", "polymodal.data.loader", "transformers.image_processing_utils")
"""Modules that most batches are made with, and that take seconds to import."""


def prepare() -> None:
    """Begin to start the process that workers are forked from, which imports what they need once for all of
    them, while the caller goes on. It has no threads and never touches a device."""
    from multiprocessing import forkserver

    if sys.version_info >= (3, 11):  # before, it would look for modules in the working directory first
        multiprocessing.set_forkserver_preload(list(NEEDED))
    forkserver.ensure_running()


STARTING = 12
"""Files that are open while a process starts."""


def _require_open_files() -> None:
    """Raise OSError where a start would fail half way: the process that workers are forked from then ends
    with a traceback."""
    held = list[int]()
    try:
        while len(held) < STARTING:
            held.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for each in held:
            os.close(each)


def _start(number: int, shared: bool) -> _Worker:
    _require_open_files()
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(
        target=_work, args=(theirs, shared), name=f"polymodal-data-{number}", daemon=True
    )
    process.start()
    theirs.close()  # the only other end is the process's: its death is an end of file here
    return _Worker(process, mine)


def _work(pipe: connection.Connection, shared: bool) -> None:
    """The main function of a worker, until the pipe ends. Signals for the job are handled by the trainer
    alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        make: Make = pickle.loads(pipe.recv_bytes())
        while True:
            task = pickle.loads(pipe.recv_bytes())
            answer: Any
            try:
                answer = make(task)
            except PolymodalError as error:
                answer = error
            except BaseException:
                answer = RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
            send(pipe, answer, shared)
            del answer


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


# An object with tensors through a socket ------------------------------------


def memory_files_work() -> bool:
    """Whether this kernel (or its sandbox) gives anonymous memory files."""
    try:
        os.close(os.memfd_create("polymodal"))
    except (AttributeError, OSError):
        return False
    return True


class _Pickler(pickle.Pickler):
    """Leaves the numbers of CPU tensors out of the pickle: `buffer_callback` gets them."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        if not obj.numel():
            return _empty, (tuple(obj.shape), obj.dtype)
        raw = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(raw), obj.dtype, tuple(obj.shape))


def _tensor(buffer: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def send(pipe: connection.Connection, value: Any, shared: bool) -> None:
    """Pickle an object; the numbers of its tensors go in one stretch of memory: a memory file if `shared`."""
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    parts = [b.raw() for b in buffers]
    spans: list[tuple[int, int]] = []
    end = 0
    for part in parts:
        start = -(-end // _ALIGN) * _ALIGN
        end = start + len(part)
        spans.append((start, end))
    handle = _memory_file(end) if shared and end else None
    memory = memoryview(bytearray(end) if handle is None else mmap.mmap(handle, end))
    for (start, stop), part in zip(spans, parts, strict=True):
        memory[start:stop] = part
    pipe.send_bytes(pickle.dumps((head.getvalue(), spans, handle is not None), protocol=5))
    if handle is not None:
        reduction.send_handle(pipe, handle, os.getppid())
        os.close(handle)
    elif end:
        pipe.send_bytes(memory)


def _memory_file(size: int) -> int | None:
    """Descriptor of an anonymous file of so many bytes; None where memory is too short for it."""
    handle = os.memfd_create("polymodal")
    try:
        os.posix_fallocate(handle, 0, size)  # too little memory is an error here, and a SIGBUS later
    except OSError:
        os.close(handle)
        return None
    return handle


def receive(pipe: connection.Connection) -> Any:
    """The other end of `send`: tensors are views of one buffer, which is freed with the last of them."""
    head, spans, shared = pickle.loads(pipe.recv_bytes())
    size = spans[-1][1] if spans else 0
    buffer: Any = bytearray(0 if shared else size)
    if shared:
        handle = reduction.recv_handle(pipe)
        try:
            buffer = mmap.mmap(handle, size)
        finally:
            os.close(handle)
    elif size:
        pipe.recv_bytes_into(buffer)
    memory = memoryview(buffer)
    return pickle.loads(head, buffers=[memory[start:stop] for start, stop in spans])
