"""Each collective against the same arithmetic in one process, forward and backward; uneven lengths included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from polymodal.distributed import collectives
from polymodal.distributed.mesh import Mesh, ParallelSizes
from tests.bounds import EXACT
from tests.parallel.harness import run


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _regions(rank: int, length: int) -> None:
    """A two-layer perceptron cut by columns and rows, on a whole and on a cut stream, is the whole one."""
    group, size = dist.group.WORLD, dist.get_world_size()
    x, up, down, target = (
        _draw(1, length, 6, seed=1), _draw(6, 12, seed=2), _draw(12, 6, seed=3), _draw(1, length, 6, seed=4)
    )  # fmt: skip
    leaves = [x.clone().requires_grad_(), up.clone().requires_grad_(), down.clone().requires_grad_()]
    (((leaves[0] @ leaves[1]).tanh() @ leaves[2]) * target).sum().backward()
    width = 12 // size
    mine = slice(width * rank, width * (rank + 1))
    for cut in (False, True):
        whole = x.clone().requires_grad_()
        own_up, own_down = up[:, mine].clone().requires_grad_(), down[mine].clone().requires_grad_()
        if cut:
            stream = collectives.cut_sequence(whole, group)
            assert stream.shape[1] == collectives.rows_per_rank(length, size)
            inner = collectives.gather_sequence(stream, length, group, partial=True)
            out = collectives.reduce_scatter_sequence((inner @ own_up).tanh() @ own_down, group)
            out = collectives.gather_sequence(out, length, group, partial=False)
        else:
            inner = collectives.copy_to_region(whole, group)
            out = collectives.reduce_from_region((inner @ own_up).tanh() @ own_down, group)
        (out * target).sum().backward()
        torch.testing.assert_close(whole.grad, leaves[0].grad)
        torch.testing.assert_close(own_up.grad, leaves[1].grad[:, mine])
        torch.testing.assert_close(own_down.grad, leaves[2].grad[mine])


def _vocabulary(rank: int, padding: int | None) -> None:
    group, size = dist.group.WORLD, dist.get_world_size()
    rows = 6 * size
    table, ids, target = (
        _draw(rows, 5),
        torch.tensor([[0, 3, rows - 1, 3, 6, 7]]),
        _draw(1, 6, rows, seed=9),
    )
    whole = table.clone().requires_grad_()
    hidden = nn.functional.embedding(ids, whole, padding)
    ((hidden @ whole.t()) * target).sum().backward()
    mine = slice(6 * rank, 6 * (rank + 1))
    own = table[mine].clone().requires_grad_()
    found = collectives.embed(ids, own, rows, padding, group)
    torch.testing.assert_close(found, hidden)
    logits = collectives.gather_last(collectives.copy_to_region(found, group) @ own.t(), group)
    (logits * target).sum().backward()
    torch.testing.assert_close(own.grad, whole.grad[mine])


def _exchange(rank: int) -> None:
    group, size = dist.group.WORLD, dist.get_world_size()
    rows, parts = 12 * size, 3
    weight = _draw(rows, 4)
    held = rows // size
    own = weight[held * rank : held * (rank + 1)].clone().requires_grad_()
    order, sent, received = collectives.fused_exchange([rows // parts] * parts, size, rank)
    got = collectives.exchange_rows(own, torch.tensor(order), sent, received, group)
    share = rows // parts // size
    wanted = weight.view(parts, size, share, 4)[:, rank].reshape(-1, 4)
    torch.testing.assert_close(got, wanted)
    (got * got.detach()).sum().backward()
    torch.testing.assert_close(own.grad, own.detach())  # each row's gradient came home


def _collectives(rank: int) -> None:
    _regions(rank, 7)
    _regions(rank, 1)  # shorter than the group: some ranks hold padding only
    _vocabulary(rank, None)
    _vocabulary(rank, 3)
    _exchange(rank)


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_are_the_single_process(world: int):
    run(world, _collectives)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_fused_row_is_sent_once_and_received_in_order(shares: list[int], size: int):
    parts = [share * size for share in shares]
    plans = [collectives.fused_exchange(parts, size, rank) for rank in range(size)]
    held = sum(parts) // size
    for target in range(size):
        got = []
        for source, (order, sent, _) in enumerate(plans):
            start = sum(sent[:target])
            got += [source * held + i for i in order[start : start + sent[target]]]
            assert sent[target] == plans[target][2][source]
        starts = [sum(parts[:at]) for at in range(len(parts))]
        wanted = zip(starts, shares, strict=True)
        assert got == [start + target * share + i for start, share in wanted for i in range(share)]


def _mixed(rank: int) -> tuple[float, float, float, float]:
    """Norm and clipping over parameters on several meshes, one without a gradient here, one that only replicas hold."""
    mesh = Mesh(ParallelSizes(1, 1, 2, 1, 2), "cpu", rank)
    tp = mesh.view("tp")
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 1)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    for key, placement in (("weight", Shard(0)), ("bias", Replicate())):
        value = distribute_tensor(getattr(model[0], key).data, tp, [placement], src_data_rank=None)
        setattr(model[0], key, nn.Parameter(value))
    for layer in model:
        fully_shard(layer, mesh=mesh.fsdp)
    extra = nn.Parameter(
        torch.randn(5, generator=generator, dtype=torch.float64)
    )  # a plain copy on every rank
    parameters = [*model.parameters(), extra]
    expected = 0.0
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(
                gradient, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            if parameter.grad.to_local().numel() == 0:  # a rank that holds nothing of it may have no gradient
                parameter.grad = None
        else:
            parameter.grad = gradient
        expected += float(gradient.square().sum())
    norm = collectives.grad_norm(parameters, mesh)
    collectives.clip_(parameters, norm, 0.5)
    after = collectives.grad_norm(parameters, mesh)
    collectives.clip_(parameters, after, 100.0)  # below the limit: nothing happens
    return float(norm), expected**0.5, float(after), float(collectives.grad_norm(parameters, mesh))


def test_norm_and_clipping_over_mixed_meshes():
    for norm, expected, clipped, untouched in run(4, _mixed):
        assert norm == pytest.approx(expected, rel=EXACT)
        assert clipped == pytest.approx(0.5, rel=EXACT)
        assert untouched == clipped
