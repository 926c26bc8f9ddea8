"""Checkpoints fit any layout, are whole when they exist, and never move under training."""

import contextlib
import copy
import json
import os
import pickle
import resource
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint
from polymodal.distributed.checkpoint import RunState, Writer
from polymodal.recipe import Optim
from polymodal.train.optim import Optimizer
from tests.bounds import EXACT
from tests.parallel import harness


class Toy(nn.Module):
    def __init__(self, inner=10):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, inner), nn.Linear(inner, 7)])

    def forward(self, x):
        return self.layers[1](torch.relu(self.layers[0](x)))


def _start(inner=10):
    torch.manual_seed(3)
    return Toy(inner).double()


def _sharded(world, rank, tp, inner=10):
    """The toy on a mesh: FSDP over all, or FSDP over TP."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = _start(inner)
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


def save(rank, run, tp, asynchronous, inner=10):
    import torch.distributed as dist

    model, group = _sharded(dist.get_world_size(), dist.get_rank(), tp, inner)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    _advance(model, optimizer, 0, 3)
    writer = Writer(run, keep=1, asynchronous=asynchronous, rank=dist.get_rank(), group=group)
    writer.save(_tensors(model, optimizer), RunState(step=3, recipe={"name": "x"}))
    _advance(model, optimizer, 3, 6)  # must not leak into the checkpoint under way
    writer.finish()
    dist.barrier()


def resume(rank, run, tp, inner=10):
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_initialized() else 1
    model, group = _sharded(world, dist.get_rank() if world > 1 else 0, tp, inner)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoint.load(checkpoint.newest(run), _tensors(model, optimizer, create=True), group)
    _advance(model, optimizer, 3, 6)
    return _full(model)


def _straight(inner=10):
    model = _start(inner)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(lr=1e-2, weight_decay=0.1), {})
    _advance(model, optimizer, 0, 6)
    return _full(model)


@pytest.mark.parametrize(
    "world, tp, asynchronous, inner",
    [
        (2, 1, True, 10),
        (2, 2, False, 10),
        (4, 2, True, 8),  # FSDP over TP: both cut dimension 0, and both without a remainder
        (4, 2, True, 10),  # TP gives 5 rows to each, FSDP 3 and 2 of them
        (4, 2, False, 6),
        (4, 2, False, 2),  # one row for each TP rank: half of FSDP's shards are empty
    ],
)
def test_saved_by_one_layout_resumed_by_another(tmp_path, world, tp, asynchronous, inner):
    straight = _straight(inner)
    harness.run(world, save, tmp_path, tp, asynchronous, inner)
    results = [resume(0, tmp_path, 1, inner)]
    for other, other_tp in ((2, 1), (4, 2)):
        results.append(harness.run(other, resume, tmp_path, other_tp, inner)[0])
    for result in results:
        for name, value in straight.items():
            torch.testing.assert_close(result[name], value, rtol=EXACT, atol=EXACT)
    read = dict(checkpoint.read_model(checkpoint.newest(tmp_path)))
    assert set(read) == set(straight) and read["layers.0.weight"].shape == (inner, 12)


def _gathers(rank, run, asynchronous):
    import torch.distributed as dist
    from torch.distributed.tensor.debug import CommDebugMode

    model, group = _sharded(dist.get_world_size(), dist.get_rank(), 2, 10)
    optimizer = Optimizer(dict(model.named_parameters()), Optim(), {})
    _advance(model, optimizer, 0, 1)
    strided = [
        n
        for n, p in model.named_parameters()
        if any(type(placement).__name__ == "_StridedShard" for placement in p.placements)
    ]
    with CommDebugMode() as seen:
        writer = Writer(run, keep=1, asynchronous=asynchronous, rank=dist.get_rank(), group=group)
        writer.save(_tensors(model, optimizer), RunState(step=1))
        writer.finish()
        dist.barrier()
        checkpoint.load(checkpoint.newest(run), _tensors(model, optimizer), group)
    with CommDebugMode() as one:
        next(model.parameters()).full_tensor()
    return strided, *(
        [str(op) for op in mode.get_comm_counts() if "functional" in str(op)] for mode in (seen, one)
    )


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_weight_is_gathered_to_be_saved_or_loaded(tmp_path, asynchronous):
    for strided, seen, one in harness.run(4, _gathers, tmp_path, asynchronous):
        assert strided and one, "the layout or the count is not what this test is about"
        assert seen == []


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


def test_what_does_not_fit_is_reported_and_changes_nothing(tmp_path):
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
                match="could not be written .OSError: .Errno 28. No space left on device; .* GiB are free there.",
            ):
                writer.save(_tensors(model, optimizer), RunState(step=2))
        assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000001"]


def test_a_write_that_fails_in_the_background_is_reported(tmp_path):
    """A real limit of the size of files, as a quota or a full disk sets one."""
    model, optimizer = _one(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for asynchronous in (False, True):
        writer = Writer(tmp_path, keep=1, asynchronous=asynchronous, rank=0, group=None)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            with pytest.raises(PolymodalError, match="could not be written .*File too large; .* free there"):
                writer.save(_tensors(model, optimizer), RunState(step=2))
                writer.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000001"]


# ---- what ends a run while a checkpoint is written ------------------------------------------------------------------


def test_a_checkpoint_under_way_becomes_whole_when_the_run_ends(tmp_path):
    model = _start()
    optimizer = Optimizer(dict(model.named_parameters()), Optim(), {})
    _advance(model, optimizer, 0, 1)
    writer = Writer(tmp_path, keep=2, asynchronous=True, rank=0, group=None)
    writer.save(_tensors(model, optimizer), RunState(step=1))
    writer.close()
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    read = dict(checkpoint.read_model(checkpoint.newest(tmp_path)))
    torch.testing.assert_close(read["layers.0.weight"], model.layers[0].weight.detach(), rtol=0, atol=0)


def _left_alone(rank, run, how):
    """Rank 0 saves in the background; rank 1 comes to the beginning of it and no further."""
    import torch.distributed as dist

    group = dist.new_group(backend="gloo")
    if rank == 1:
        dist.barrier(group)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while not (run / "over").exists():
            time.sleep(0.02)
        os._exit(0)
    writer = Writer(run, keep=1, asynchronous=True, rank=0, group=group)
    writer.save({"model.x": torch.ones(3)}, RunState(step=1))
    with (run / "said").open("w", buffering=1) as file, contextlib.redirect_stdout(file):
        writer.close(seconds=2.0 if how == "stuck" else 100.0)
    (run / "over").touch()
    os.kill(
        os.getpid(), signal.SIGKILL
    )  # the thread may still wait: what close left behind is not the test's


@pytest.mark.parametrize(
    "how, said", [("killed", "lost contact with another process"), ("stuck", "given up")]
)
def test_the_end_of_a_run_does_not_wait_for_ranks_that_are_gone(tmp_path, how, said):
    with pytest.raises(harness.RankError):
        harness.run(2, _left_alone, tmp_path, how, timeout=60)
    deadline = time.monotonic() + 50
    while not (tmp_path / "over").exists():
        assert time.monotonic() < deadline, "close did not return"
        time.sleep(0.05)
    assert said in (tmp_path / "said").read_text()
    assert checkpoint.found(tmp_path) == []


# ---- ranks that see different directories ---------------------------------------------------------------------------


def _choose(rank, root, choose):
    """Ranks in directories of their own: the same relative path, two disks."""
    import torch.distributed as dist

    from polymodal.runtime import device
    from polymodal.runtime.process_group import ProcessInfo, Runtime

    os.chdir(root / f"node{rank}")
    rt = Runtime(ProcessInfo(rank, 2, rank, 2, 0, 1), device.find("cpu"), 1)
    try:
        return str(checkpoint.agreed(rt, lambda: choose(Path("run"))))
    except PolymodalError as error:
        return error.message
    finally:
        dist.barrier()


def _nodes(root, steps, content=1.0):
    for rank, own in enumerate(steps):
        for step in own:
            writer = Writer(root / f"node{rank}" / "run", keep=9, asynchronous=False, rank=0, group=None)
            writer.save({"model.x": torch.ones(3) * content}, RunState(step=step))


def test_all_ranks_take_the_checkpoint_that_rank_0_chooses(tmp_path):
    _nodes(tmp_path, [(1,), (1, 2)])
    for one in {"state.json", ".metadata"}:  # two disks: the same checkpoint on both
        path = Path("run/checkpoints/step-00000001") / one
        (tmp_path / "node1" / path).write_bytes((tmp_path / "node0" / path).read_bytes())
    chosen = harness.run(2, _choose, tmp_path, checkpoint.newest)
    assert chosen == ["run/checkpoints/step-00000001"] * 2


def test_ranks_that_read_different_checkpoints_refuse(tmp_path):
    _nodes(tmp_path, [(1, 2), (1,)])
    said = harness.run(2, _choose, tmp_path, checkpoint.newest)
    assert said == ["Rank 0 found the checkpoint run/checkpoints/step-00000002, rank 1 cannot read it."] * 2
    _nodes(tmp_path, [(), (2,)])
    state = tmp_path / "node1/run/checkpoints/step-00000002/state.json"
    state.write_text(state.read_text().replace('"samples": 0', '"samples": 1'))
    said = harness.run(2, _choose, tmp_path, checkpoint.newest)
    assert (
        said
        == ["Rank 0 found the checkpoint run/checkpoints/step-00000002, rank 1 reads other content there."]
        * 2
    )


def test_what_rank_0_cannot_find_is_an_error_on_all_ranks(tmp_path):
    _nodes(tmp_path, [(), (1,)])
    (tmp_path / "node0").mkdir()
    assert harness.run(2, _choose, tmp_path, checkpoint.newest) == ["None", "None"]
    said = harness.run(2, _choose, tmp_path, checkpoint.locate)
    assert said == ["run is neither a checkpoint nor a run that has one."] * 2


# ---- checkpoints of others ------------------------------------------------------------------------------------------


class Bad:
    """Unpickled in the ordinary way, it makes a directory."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def _replace_index(found, content):
    """Whoever changes an index can leave out its checksum, as checkpoints of older versions have none."""
    (found / ".metadata").write_bytes(pickle.dumps(content))
    state = json.loads((found / "state.json").read_text())
    (found / "state.json").write_text(json.dumps({**state, "files": {}}))


def _readers(found):
    target = {"model.layers.0.weight": torch.zeros(10, 12, dtype=torch.float64)}
    return (
        lambda: checkpoint.names(found),
        lambda: checkpoint.load(found, dict(target), None),
        lambda: dict(checkpoint.read_model(found)),
    )


def test_files_of_tensors_that_are_something_else_are_refused_and_not_run(tmp_path):
    _one(tmp_path)
    found, mark = checkpoint.newest(tmp_path), tmp_path / "ran"
    for file in found.glob("*.distcp"):
        content, size = pickle.dumps(Bad(mark), protocol=2), file.stat().st_size
        file.write_bytes(content.ljust(size, b"\0"))
    state = json.loads((found / "state.json").read_text())
    (found / "state.json").write_text(json.dumps({**state, "files": {}}))  # whoever forges one forges both
    for read in _readers(found)[1:]:
        with pytest.raises(
            PolymodalError, match="cannot be read .a file of it holds other things than tensors"
        ):
            for tensor in (read() or {}).values():
                assert tensor is not None
        assert not mark.exists()


def test_an_index_that_is_something_else_is_refused_and_not_run(tmp_path):
    _one(tmp_path)
    found, mark = checkpoint.newest(tmp_path), tmp_path / "ran"
    whole = pickle.loads((found / ".metadata").read_bytes())
    whole.state_dict_metadata["model.layers.0.weight"].size = Bad(mark)
    far = pickle.loads((found / ".metadata").read_bytes())
    for info in far.storage_data.values():
        info.relative_path = "../../elsewhere"
    for content in (Bad(mark), [Bad(mark)], whole, far, {"state_dict_metadata": {}}):
        _replace_index(found, content)
        (found / "__0.metadata").write_bytes(pickle.dumps(content))  # torch falls back to a rank's own
        for read in _readers(found):
            with pytest.raises(
                PolymodalError, match="step-00000001.* cannot be read: .*is not the index of a DCP"
            ):
                read()
            assert not mark.exists()
    (found / ".metadata").unlink()
    for read in _readers(found):
        with pytest.raises(PolymodalError, match="cannot be read: .*metadata cannot be read: No such file"):
            read()
    assert not mark.exists()


def test_what_is_around_the_tensors_of_an_index_is_inert(tmp_path):
    model, _ = _one(tmp_path)
    found, mark = checkpoint.newest(tmp_path), tmp_path / "ran"
    index = pickle.loads((found / ".metadata").read_bytes())
    index.planner_data, index.storage_meta.modules = Bad(mark), [Bad(mark)]
    _replace_index(found, index)
    read = dict(checkpoint.read_model(found))
    torch.testing.assert_close(read["layers.0.weight"], model.layers[0].weight.detach(), rtol=0, atol=0)
    assert not mark.exists()


def test_bytes_under_the_name_of_a_tensor_are_not_unpickled(tmp_path):
    """torch's planner calls torch.load(weights_only=False) on what the index calls bytes."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    _one(tmp_path)
    found, mark = checkpoint.newest(tmp_path), tmp_path / "ran"
    index = pickle.loads((found / ".metadata").read_bytes())
    name = "model.layers.0.weight"
    index.state_dict_metadata[name] = BytesStorageMetadata()
    old = next(key for key in index.storage_data if key.fqn == name)
    info = index.storage_data.pop(old)
    torch.save(Bad(mark), found / "bad.distcp")
    info.relative_path, info.offset, info.length = "bad.distcp", 0, (found / "bad.distcp").stat().st_size
    index.storage_data[MetadataIndex(name)] = info
    _replace_index(found, index)
    with pytest.raises(PolymodalError, match=f"lacks 1 of 1 tensors .first: {name}"):
        checkpoint.load(found, {name: torch.zeros(10, 12, dtype=torch.float64)}, None)
    checkpoint.load(found, {name: torch.zeros(10, 12, dtype=torch.float64)}, None, required=lambda key: False)
    assert name.removeprefix("model.") not in dict(checkpoint.read_model(found))
    assert not mark.exists()


def _cut(path):
    os.truncate(path, 100)


def _random(path):
    path.write_bytes(os.urandom(path.stat().st_size))


@pytest.mark.parametrize("damage", [Path.unlink, _cut, _random])
def test_files_that_are_gone_or_truncated_are_reported_with_the_checkpoint_before(tmp_path, damage):
    for step in (1, 2):
        _one(tmp_path, step)
    found = checkpoint.newest(tmp_path)
    damage(next(found.glob("*.distcp")))
    for read in _readers(found)[1:]:
        with pytest.raises(PolymodalError, match="step-00000002 cannot be read .*__0_0.distcp") as error:
            read()
        assert "Give the one before it, " in error.value.hint and "step-00000001" in error.value.hint


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"step": "abc"}, "step: "), ({"step": -3}, "step: "), ({"position": []}, "position: "), ({"recipe": []}, "recipe: "),
        ({"position": {"epoch": -5}}, "position.epoch: "), ({"norm_mean": "x"}, "norm_mean: "), ({"samples": 1.5}, "samples: "),
        ({"position": {"epoch": 0, "window": 10**9, "step": 3}}, "position.window: 1000000000 after 1 steps"), ({"tokens": 10**30}, "tokens: "),
        ({"step": 2}, "step: 2, the directory says 1"), ({"norm_mean": -1.0}, "norm_mean: "), ({"scaler": {"scale": 1e999}}, "scaler.scale: "),
        ({"files": {"x": 5}}, "files.x: "),
    ],
)  # fmt: skip
def test_a_state_of_other_types_is_reported(tmp_path, change, reason):
    _one(tmp_path)
    path = checkpoint.newest(tmp_path) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PolymodalError, match=f"state.json cannot be read .{reason}"):
        checkpoint.read_state(path.parent)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["state.json", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [Path.unlink, _cut])
def test_the_newest_whole_checkpoint_is_taken_with_a_word(tmp_path, capsys, damage, file, known):
    """known: sizes and checksums, which older versions did not write."""
    for step in (1, 2):
        _one(tmp_path, step)
    whole, found = checkpoint.found(tmp_path)
    if not known:
        _replace_index(found, pickle.loads((found / ".metadata").read_bytes()))
    damage(found / file)
    assert checkpoint.newest_whole(tmp_path) == whole
    said = capsys.readouterr().err
    assert str(found / file) in said and "The checkpoint before it is taken." in said
    for path in (tmp_path, found):
        with pytest.raises(checkpoint.Damaged, match=f"step-00000002/{file}") as error:
            checkpoint.locate(path)
        assert f"Give the one before it, {whole}, or remove" in error.value.hint
    damage(whole / file)
    with pytest.raises(PolymodalError, match="None of the 2 checkpoints of .* is whole"):
        checkpoint.newest_whole(tmp_path)


def test_bytes_that_changed_are_found_wherever_they_are_read(tmp_path):
    """One bit of one piece: the others can be read, and sizes tell nothing."""
    model, optimizer = _one(tmp_path)
    _advance(model, optimizer, 1, 2)
    Writer(tmp_path, 2, False, 0, None).save(_tensors(model, optimizer), RunState(step=2))
    found = checkpoint.newest(tmp_path)
    file = found / "__0_0.distcp"
    index = pickle.loads((found / ".metadata").read_bytes())
    piece = next(v for k, v in index.storage_data.items() if k.fqn == "model.layers.0.weight")
    content = bytearray(file.read_bytes())
    content[piece.offset + piece.length // 2] ^= 4
    file.write_bytes(content)
    checkpoint.check(found)
    for read in _readers(found)[1:]:
        with pytest.raises(checkpoint.Damaged, match="__0_0.distcp has changed since it was written"):
            read()
    assert len(checkpoint.read_model(found)["layers.1.weight"]) == 7
    file.write_bytes((found.with_name("step-00000001") / file.name).read_bytes())  # of another checkpoint
    with pytest.raises(checkpoint.Damaged, match="has changed since it was written"):
        dict(checkpoint.read_model(found))
    (found / ".metadata").write_bytes((found / ".metadata").read_bytes()[:-9] + b"123456789")
    with pytest.raises(checkpoint.Damaged, match=".metadata has changed since it was written"):
        checkpoint.names(found)


def _sums(rank, run):
    import torch.distributed as dist

    model, group = _sharded(2, rank, 1)
    writer = Writer(run, 1, True, rank, group)
    writer.save({f"model.{n}": p for n, p in model.named_parameters()}, RunState(step=3))
    writer.finish()
    dist.barrier()


def test_every_rank_gives_the_checksums_of_what_it_wrote(tmp_path):
    harness.run(2, _sums, tmp_path)
    found = checkpoint.newest(tmp_path)
    files = checkpoint.read_state(found).files
    assert sorted(files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    for name, known in files.items():
        content = (found / name).read_bytes()
        assert known.size == len(content)
        starts = sorted(map(int, known.crc32))
        pieces = zip(starts, [*starts[1:], len(content)], strict=True)
        assert known.crc32 == {str(a): zlib.crc32(content[a:b]) for a, b in pieces}
    from torch.distributed.checkpoint import FileSystemReader

    plain = FileSystemReader(found).read_metadata()  # as torch itself wrote it
    assert not any("crc32" in vars(info) for info in plain.storage_data.values())


def test_whatever_lies_where_checkpoints_are_written_gives_way(tmp_path):
    base, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    _one(elsewhere, 1)
    base.mkdir()
    (base / "step-00000003").write_text("a file")
    (base / ".step-00000003.tmp").write_text("a file")
    (base / "step-00000002").symlink_to(elsewhere / "checkpoints/step-00000001")
    (base / "step-00000001").symlink_to("nowhere")
    for odd in ("step-1", "step-", "step-00000009.bak", "step-000000\u0661\u0662", "best"):
        (base / odd).mkdir()
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000002"]
    for step in (2, 3):
        _one(tmp_path, step, keep=1)
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000003"]
    assert checkpoint.newest_whole(elsewhere) is not None, "what a link led to is untouched"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").write_text("a file")
    with pytest.raises(PolymodalError, match="other/checkpoints could not be written .FileExists"):
        Writer(tmp_path / "other", 1, False, 0, None)


def test_damaged_checkpoints_of_later_steps_do_not_push_out_whole_ones(tmp_path):
    for step in (2, 4, 6):
        _one(tmp_path, step, keep=9)
    for path in checkpoint.found(tmp_path)[1:]:
        (path / "__0_0.distcp").unlink()
    _one(tmp_path, 3, keep=1)
    assert checkpoint.newest_whole(tmp_path).name == "step-00000003"


def test_rows_that_torch_would_take_for_others_are_not_stored(tmp_path):
    """7 rows, TP 2, FSDP 3: the last rank of both holds row 6; torch, which cuts by FSDP first, believes it has none."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    from polymodal.plan.pretended import pretended_group

    with pretended_group(6, rank=5):
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("fsdp", "tp"))
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        for rows, held, right in ((12, 2, True), (10, 1, True), (7, 1, False)):
            value = DTensor.from_local(
                torch.ones(held, 4), mesh, placements, run_check=False, shape=torch.Size((rows, 4)), stride=(4, 1)
            )  # fmt: skip
            if right:
                checkpoint._check_strided({"model.x": value})
            else:
                with pytest.raises(
                    PolymodalError, match="cannot store the rows of model.x that FSDP over TP gives"
                ):
                    checkpoint._check_strided({"model.x": value})
