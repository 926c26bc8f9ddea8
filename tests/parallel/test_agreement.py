"""What ranks do together at the end of a step: stop at the same one, trace the same ones. Real processes."""

import signal
import time
from pathlib import Path

import torch.distributed as dist

from polymodal.runtime import device
from polymodal.runtime.process_group import ProcessInfo, Runtime
from polymodal.tools import profile_request
from polymodal.train.monitor import Profiler
from tests.parallel.harness import run


def _runtime(rank: int) -> Runtime:
    world = dist.get_world_size()
    return Runtime(ProcessInfo(rank, world, rank, world, 0, 1), device.find("cpu"), 1)


def _stop(rank: int) -> list[bool]:
    rt = _runtime(rank)
    if rank == 1:
        rt.signal = signal.SIGTERM
    return rt.any_rank(rt.signal is not None, False)


def test_a_signal_that_reached_one_rank_stops_all():
    assert run(2, _stop) == [[True, False], [True, False]]


def _trace(rank: int, directory: str) -> list[str]:
    """Six steps; the request comes in the third, when rank 0 has already looked at its start and rank 2 is late."""
    rt = _runtime(rank)
    profiler = Profiler(root := Path(directory), None, rank, rt.device)
    profiler.POLL = 0.0
    for step in range(1, 7):
        profiler.before(step)
        if step == 3 and rank == 0:
            profile_request.request_profile(root, 2, "0,2")
        if rank == 2:
            time.sleep(0.02)
        if rt.any_rank(profiler.asked())[0]:
            profiler.take(rt.share)
        profiler.after(step)
    dist.barrier()
    return sorted(path.name for path in (root / "traces").iterdir())


def test_a_trace_asked_for_in_a_live_run_covers_the_same_steps_of_every_chosen_rank(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (found, *_) = run(3, _trace, str(tmp_path))
    assert found == ["steps-4-5-rank-0.json", "steps-4-5-rank-2.json"]
    assert not (tmp_path / Profiler.REQUEST).exists()
