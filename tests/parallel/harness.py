"""Real gloo process groups for tests: `run(world, fn, *args)` and nothing else to learn.

Workers are forked from a server process that has already imported torch and transformers, so a world costs well
under a second after the first one; every call gets fresh processes, one thread each. Tests only.
"""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts: its children inherit it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "transformers",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
    "transformers.models.whisper.modeling_whisper",
    "diffusers.models.transformers.transformer_wan",
    "peft",
    "polymodal.recipe",
]


class RankError(AssertionError):
    """A rank failed or hung; the message is its traceback."""


def _rank(rank: int, world: int, store: str, seconds: float, connection: Any, stacks: str, job: bytes):
    stack_file = open(stacks, "w")  # noqa: SIM115 - must stay open for the signal
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
        )
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        fn, args = torch.load(io.BytesIO(job), weights_only=False)
        value = fn(rank, *args)
        buffer = io.BytesIO()
        torch.save(value, buffer)  # bytes, not shared memory: this process is gone before they are read
        dist.barrier()  # nobody leaves while a peer may still need it
        connection.send((True, buffer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        connection.send((False, traceback.format_exc()))
        connection.close()
        os._exit(1)  # a peer may hang in a collective: do not wait for it in destructors


def run(world: int, fn: Callable, *args: Any, timeout: float = 180.0) -> list[Any]:
    """Call `fn(rank, *args)` in `world` processes that share a gloo group; return their results by rank.

    fn must be importable (a module's top level); args and results are sent as bytes (tensors are copied). Raises
    RankError with the first failing rank's traceback, or with every rank's Python stack after `timeout` seconds.
    """
    import torch

    job = io.BytesIO()
    torch.save((fn, args), job)  # bytes: tensors in arguments would be sent as shared memory
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="polymodal-ranks-") as directory:
        store = str(Path(directory, "store"))
        stacks = [str(Path(directory, f"stack-{rank}")) for rank in range(world)]
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(
                target=_rank,
                args=(r, world, store, timeout, pipes[r][1], stacks[r], job.getvalue()),
                daemon=True,
            )
            for r in range(world)
        ]
        try:
            for process in processes:
                process.start()
            for _, writer in pipes:
                writer.close()  # so that a rank that dies is seen as the end of its pipe
            return _collect(processes, [reader for reader, _ in pipes], stacks, timeout, torch)
        finally:
            for process in (p for p in processes if p.pid is not None):
                if process.is_alive():
                    process.join(0.5)
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(processes: list, readers: list, stacks: list[str], timeout: float, torch: Any) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(readers):
        waiting = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
            dump = "\n".join(
                f"--- rank {rank}\n{Path(stacks[rank]).read_text()}" for rank in waiting.values()
            )
            raise RankError(f"ranks {sorted(waiting.values())} did not finish in {timeout:.0f} s\n{dump}")
        for reader in ready:
            rank = waiting[reader]
            try:
                good, value = reader.recv()
            except EOFError:
                processes[rank].join(5)
                raise RankError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not good:
                raise RankError(f"rank {rank} of {len(readers)} failed:\n{value}")
            results[rank] = torch.load(io.BytesIO(value), weights_only=False)
    return [results[rank] for rank in range(len(readers))]
