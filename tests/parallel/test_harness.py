"""The harness itself: results by rank, a failing rank's traceback, a hang with its stacks."""

import pytest
import torch
import torch.distributed as dist

from tests.parallel.harness import RankError, run


def _sum(rank: int, scale: float):
    total = torch.tensor([rank * scale])
    dist.all_reduce(total)
    return rank, total


def _fail(rank: int):
    if rank == 1:
        raise ValueError("the cause")
    dist.barrier()


def _hang(rank: int):
    if rank == 0:
        dist.barrier()
    import time

    time.sleep(60)


def test_results_come_back_by_rank():
    results = run(2, _sum, 3.0)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 3.0 for _, total in results)


def test_a_failing_rank_is_reported_with_its_traceback():
    with pytest.raises(RankError, match="rank 1 of 2 failed(.|\n)*the cause"):
        run(2, _fail)


def test_a_hang_ends_with_the_stacks():
    with pytest.raises(RankError, match="did not finish(.|\n)*in _hang"):
        run(2, _hang, timeout=3)
