"""Checkpoints fit any layout, are whole when they exist, and never move under training."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint
from polymodal.distributed.checkpoint import RunState, Writer
from polymodal.recipe import Optim
from polymodal.train.optim import Optimizer
from tests.parallel import harness


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 10), nn.Linear(10, 7)])

    def forward(self, x):
        return self.layers[1](torch.relu(self.layers[0](x)))


def _start():
    torch.manual_seed(3)
    return Toy().double()


def _sharded(world, rank, tp):
    """The toy on a mesh: FSDP over all, or FSDP over TP."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = _start()
    if world == 1:
        return model, None
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("fsdp", "tp"))
    if tp > 1:
        parallelize_module(model, mesh["tp"], {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()})
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["fsdp"])
    fully_shard(model, mesh=mesh["fsdp"])
    return model, dist.new_group(backend="gloo")


def _advance(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _full(model):
    from torch.distributed.tensor import DTensor

    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in model.named_parameters()
    }


def _tensors(model, optimizer, create=False):
    return {
        **{f"model.{n}": p for n, p in model.named_parameters()},
        **{f"optim.{k}": v for k, v in optimizer.state(create).items()},
    }


def save(rank, run, tp, asynchronous):
    import torch.distributed as dist

    model, group = _sharded(dist.get_world_size(), dist.get_rank(), tp)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    _advance(model, optimizer, 0, 3)
    writer = Writer(run, keep=1, asynchronous=asynchronous, rank=dist.get_rank(), group=group)
    writer.save(_tensors(model, optimizer), RunState(step=3, recipe={"name": "x"}))
    _advance(model, optimizer, 3, 6)  # must not leak into the checkpoint under way
    writer.finish()
    dist.barrier()


def resume(rank, run, tp):
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    model, group = _sharded(world, dist.get_rank() if world > 1 else 0, tp)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load(checkpoint.newest(run), _tensors(model, optimizer, create=True), group)
    _advance(model, optimizer, 3, 6)
    return _full(model)


@pytest.fixture(scope="module")
def straight():
    model = _start()
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    _advance(model, optimizer, 0, 6)
    return _full(model)


@pytest.mark.parametrize("world, tp, asynchronous", [(2, 1, True), (4, 2, True), (2, 2, False)])
def test_saved_by_one_layout_resumed_by_others(tmp_path, straight, world, tp, asynchronous):
    harness.run(world, save, tmp_path, tp, asynchronous)
    results = [resume(0, tmp_path, 1)]
    for other, other_tp in ((2, 1), (4, 2)):
        results.append(harness.run(other, resume, tmp_path, other_tp)[0])
    for result in results:
        for name, value in straight.items():
            torch.testing.assert_close(result[name], value, rtol=1e-12, atol=1e-12)
    read = dict(checkpoint.read_model(checkpoint.newest(tmp_path)))
    assert set(read) == set(straight) and read["layers.0.weight"].shape == (10, 12)


def _one(tmp_path, step=1, keep=2):
    model = _start()
    optimizer = Optimizer(dict(model.named_parameters()), Optim(), {})
    _advance(model, optimizer, 0, 1)
    writer = Writer(tmp_path, keep=keep, asynchronous=False, rank=0, group=None)
    writer.save(_tensors(model, optimizer), RunState(step=step))
    return model, optimizer


def test_only_the_newest_are_kept_and_torn_ones_are_swept(tmp_path):
    torn = tmp_path / "checkpoints" / ".step-00000009.tmp"
    torn.mkdir(parents=True)
    (torn / "state.json").write_text("{}")
    for step in (1, 2, 10):
        _one(tmp_path, step)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000002", "step-00000010"]
    assert not torn.exists()
    assert json.loads((checkpoint.newest(tmp_path) / "state.json").read_text())["step"] == 10


def test_what_does_not_fit_is_said_and_changes_nothing(tmp_path):
    model, optimizer = _one(tmp_path)
    found = checkpoint.newest(tmp_path)
    wider = nn.Linear(3, 3)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(PolymodalError, match="lacks 2 of 2 tensors .first: model.weight."):
        checkpoint.load(found, {f"model.{n}": p for n, p in wider.named_parameters()}, None)
    with pytest.raises(
        PolymodalError, match=r"has model.layers.0.weight of shape \(10, 12\), the model \(3, 3\)"
    ):
        checkpoint.load(found, {"model.layers.0.weight": wider.weight}, None)
    assert all(torch.equal(before[k], v) for k, v in wider.state_dict().items())
    with pytest.raises(PolymodalError, match="neither a checkpoint nor a run that has one"):
        checkpoint.locate(tmp_path / "nothing")
    with pytest.raises(PolymodalError, match="That run has step-00000001 .checkpoint.keep"):
        checkpoint.locate(found.with_name("step-00000000"))
    (found / "state.json").write_text("{")
    with pytest.raises(PolymodalError, match="state.json cannot be read"):
        checkpoint.read_state(found)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    model, optimizer = _one(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, keep=1, asynchronous=False, rank=0, group=None)
    for part in ((checkpoint.dcp, "save"), (Path, "write_text")):  # the tensors, or state.json before them
        with monkeypatch.context() as patch:
            patch.setattr(*part, full)
            with pytest.raises(
                PolymodalError,
                match="could not be written .OSError: .Errno 28. No space left on device; .* GiB free there.",
            ):
                writer.save(_tensors(model, optimizer), RunState(step=2))
        assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000001"]
