"""A checkpoint read into every kind of sharding, on real gloo processes: whole tensors, gradients and files are those of
one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from polymodal.core.errors import PolymodalError
from polymodal.models import saving, weights
from polymodal.models.slices import boxes, extent, local_spans
from tests.models import gather, tiny
from tests.parallel.harness import run

SMALL = {"text_config__num_hidden_layers": 2, "vision_config__depth": 2}
MOE = {"text_config__moe_intermediate_size": 24}  # 2 x 24 is not the width: layouts can be distinguished


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("checkpoints")
    made = {
        "qwen2-vl tied": tiny.checkpoint("qwen2-vl", base / "a", tied=True, **SMALL),
        "qwen2.5-vl": tiny.checkpoint(
            "qwen2.5-vl", base / "b", dtype=torch.bfloat16, **SMALL, vision_config__fullatt_block_indexes=[1]
        ),
        "qwen3-vl": tiny.checkpoint(
            "qwen3-vl", base / "c", **SMALL, vision_config__deepstack_visual_indexes=[0]
        ),
        "qwen3-vl-moe": tiny.checkpoint(
            "qwen3-vl-moe", base / "d", **SMALL, **MOE, vision_config__deepstack_visual_indexes=[0]
        ),
    }
    made["qwen3-vl-moe hub"] = hub_layout(made["qwen3-vl-moe"], base / "e")
    return {name: str(path) for name, path in made.items()}


def hub_layout(source: Path, directory: Path) -> Path:
    """The same checkpoint with the experts as the hub's files have them: [experts, in, out]."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    state = load_file(directory / "model.safetensors")
    state = {k: (v.transpose(1, 2).contiguous() if ".experts." in k else v) for k, v in state.items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def on_meta(source: str) -> nn.Module:
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source)
        return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def fsdp(model: nn.Module, mesh) -> None:
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh) -> None:
    for layer in model.model.language_model.layers:
        plan = {"self_attn.q_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
        if hasattr(layer.mlp, "gate_proj"):
            plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh, plan)
        experts = getattr(layer.mlp, "experts", None)
        if (
            experts is not None
        ):  # inner dimensions of the fused experts, one of them in two interleaved groups
            for name, dim in (("gate_up_proj", 1), ("down_proj", 2)):
                old = getattr(experts, name)
                setattr(experts, name, nn.Parameter(distribute_tensor(old, mesh, [Shard(dim)])))
    head = model.lm_head.weight
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    if head is model.model.language_model.embed_tokens.weight:
        model.model.language_model.embed_tokens.weight = model.lm_head.weight


def expert_parallel(model: nn.Module, mesh) -> None:
    for layer in model.model.language_model.layers:
        for name in ("gate_up_proj", "down_proj"):
            old = getattr(layer.mlp.experts, name)
            setattr(layer.mlp.experts, name, nn.Parameter(distribute_tensor(old, mesh, [Shard(0)])))


def lay_out(model: nn.Module, kind: str) -> nn.Module:
    world = dist.get_world_size()
    if kind == "fsdp":
        fsdp(model, init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)))
    elif kind == "hsdp":
        fsdp(model, init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "dp")))
    elif kind == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))
    elif kind == "ep":
        expert_parallel(model, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    else:
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        (tensor_parallel if kind == "fsdp x tp" else expert_parallel)(model, mesh["tp"])
        fsdp(model, mesh["dp"])
    return model


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {n: gather.tensor(t) for n, t in state.items()}


def _differences(got: dict, reference: nn.Module) -> list[str]:
    want = dict(reference.named_parameters(remove_duplicate=False)) | dict(reference.named_buffers())
    assert got.keys() == want.keys()
    return [n for n in want if not torch.equal(got[n], want[n])]


def _loads(rank: int, cases: list[tuple[str, str]]):
    wrong, shares = [], []
    for source, kind in cases:
        model = lay_out(on_meta(source), kind)
        report = weights.load(model, None, source)
        got = whole(model)
        if model.config.tie_word_embeddings:
            assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        if rank == 0:
            reference = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
            wrong += [(source, kind, n) for n in _differences(got, reference)]
        shares.append((kind, report.bytes_held, sum(p.numel() * 4 for p in model.parameters())))
    return wrong, shares


def test_every_layout_holds_what_from_pretrained_reads(checkpoints):
    """Bit for bit, on 4 processes: 1-D and 2-D FSDP, columns and rows, strided shards, experts in both file layouts."""
    cases = [
        (checkpoints[name], kind)
        for name, kinds in {
            "qwen2-vl tied": ("fsdp", "fsdp x tp"),
            "qwen2.5-vl": ("hsdp", "tp"),
            "qwen3-vl": ("fsdp x tp",),
            "qwen3-vl-moe": ("fsdp", "fsdp x tp", "ep"),
            "qwen3-vl-moe hub": ("tp", "fsdp x tp", "fsdp x ep"),
        }.items()
        for kind in kinds
    ]
    for wrong, shares in run(4, _loads, cases):
        assert wrong == []
        for kind, held, total in shares:
            limit = {"fsdp": 0.27, "hsdp": 0.53, "fsdp x tp": 0.5}.get(kind, 0.95)
            assert held <= limit * total, (kind, held / total)


def test_uneven_shards(checkpoints):
    """Three ranks: nothing divides, some shards are empty."""
    for wrong, shares in run(
        3, _loads, [(checkpoints["qwen2-vl tied"], "fsdp"), (checkpoints["qwen3-vl-moe hub"], "fsdp")]
    ):
        assert wrong == []
        assert all(held < 0.4 * total for _, held, total in shares)


def _own_bytes(rank: int, *sources: str):
    from safetensors import safe_open

    found = []
    for source in sources:
        report = weights.load(lay_out(on_meta(source), "fsdp x tp"), None, source)
        size = safe_open(source + "/model.safetensors", "pt").get_slice("lm_head.weight").get_dtype()
        found.append((report.bytes_held, report.bytes_read, size))
    return found


def test_only_the_own_slices_are_read(checkpoints):
    """As many bytes as are held in float32, half as many from a file in bfloat16; also of experts."""
    for dense, experts in run(4, _own_bytes, checkpoints["qwen2.5-vl"], checkpoints["qwen3-vl-moe"]):
        held, read, dtype = dense
        assert dtype == "BF16" and read * 2 == held
        held, read, dtype = experts
        assert dtype == "F32" and read == held


def _spans(rank: int):
    """Own arithmetic against torch's: placements of distribute_tensor, and FSDP2 over them."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    plain = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(1)), (Replicate(), Shard(1))]
    strided = [
        (_StridedShard(0, split_factor=2), Shard(0)),
        (_StridedShard(1, split_factor=2), Shard(1)),
        (Replicate(), _StridedShard(0, split_factor=3)),
    ]  # torch itself distributes these evenly only
    cases = [(shape, p) for shape in ((8, 8), (7, 5), (3, 2), (1, 9)) for p in plain]
    cases += [(shape, p) for shape in ((12, 24), (24, 12)) for p in strided]
    for shape, placement in cases:
        full = torch.arange(shape[0] * shape[1]).view(shape)
        shard = distribute_tensor(full, mesh, placement)
        spans = local_spans(shard)
        for box, view in boxes(spans, shard.to_local()):
            assert torch.equal(full[tuple(slice(*b) for b in box)], view), (shape, placement)
        assert extent(spans) == tuple(shard.to_local().shape)
    for out in (16, 12, 10, 6):
        linear = nn.Linear(5, out, bias=False)
        full = linear.weight.detach().clone()
        dist.broadcast(full, 0)
        linear.weight.data.copy_(full)
        parallelize_module(linear, mesh["b"], ColwiseParallel())
        fully_shard(linear, mesh=mesh["a"])
        local = linear.weight.to_local()
        for box, view in boxes(local_spans(linear.weight), local):
            assert torch.equal(full[slice(*box[0]), slice(*box[1])], view), out
        assert torch.equal(linear.weight.full_tensor(), full)


def test_shards_are_where_torch_puts_them():
    run(4, _spans)


def _one_bad_rank(rank: int, source: str):
    model = lay_out(on_meta(source), "fsdp")
    try:
        weights.load(model, None, source)
    except PolymodalError as error:
        return str(error)
    return ""


def test_a_fault_in_one_ranks_slice_is_raised_on_all(checkpoints, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoints["qwen3-vl"], tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"][-1, -1] = float("nan")  # in the last rank's rows only
    save_file(state, path)
    said = run(2, _one_bad_rank, str(tmp_path / "nan"))
    assert said[0] == said[1]
    assert "lm_head.weight" in said[0] and "NaN" in said[0]


def _initialised(rank: int, source: str, kinds: list[str], reference: dict):
    for kind in kinds:
        model = lay_out(on_meta(source), kind)
        weights.initialise(model, None, seed=11)
        got = whole(model)
        assert got.keys() == reference.keys()
        assert [n for n in got if not torch.equal(got[n], reference[n])] == [], kind


def test_random_weights_do_not_depend_on_the_layout(checkpoints):
    for name, kinds in (
        ("qwen2-vl tied", ["fsdp", "fsdp x tp"]),
        ("qwen3-vl-moe", ["fsdp x tp", "fsdp x ep", "tp"]),
    ):
        model = on_meta(checkpoints[name])
        weights.initialise(model, None, seed=11)
        run(4, _initialised, checkpoints[name], kinds, whole(model))


def _saved(rank: int, source: str, directory: str):
    """Each rank writes its files of a model that is laid out, from whole tensors."""
    model = lay_out(on_meta(source), "fsdp x tp")
    weights.load(model, None, source)
    state = gather.weights(model)
    files = saving.outputs(model, Path(source), None)
    with saving.Together(Path(directory), dist.group.WORLD) as together:
        place = {"rank": rank, "world": together.world}
        saving.write(state, model, files, together.directory, 200_000, **place)
        if rank == 0:
            together.wait()


def test_a_sharded_model_is_saved_as_it_was_read(checkpoints, tmp_path):
    for name in ("qwen2.5-vl", "qwen3-vl-moe hub"):
        out = tmp_path / name.replace(" ", "-")
        run(4, _saved, checkpoints[name], str(out))
        index = json.loads((out / "model.safetensors.index.json").read_text())
        from safetensors.torch import load_file

        want = load_file(Path(checkpoints[name]) / "model.safetensors")
        got = {
            k: v
            for shard in sorted(set(index["weight_map"].values()))
            for k, v in load_file(out / shard).items()
        }
        assert got.keys() == want.keys() == index["weight_map"].keys()
        assert all(torch.equal(got[k], want[k].float()) for k in want)
        assert len(set(index["weight_map"].values())) >= 4  # a file for each rank, at least
        assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))


def _failing(rank: int, directory: str):
    try:
        with saving.Together(Path(directory), dist.group.WORLD) as together:
            if rank == 1:
                raise PolymodalError("the disk is full", "free some")
            if rank == 0:
                together.wait()
    except PolymodalError as error:
        return str(error)
    return ""


def test_what_fails_on_one_rank_leaves_nothing(tmp_path):
    """Rank 0 hears of it without a collective; what lay there before stays."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("before")
    said = run(3, _failing, str(out))
    assert "Rank 1: the disk is full" in said[0] and "the disk is full" in said[1] and said[2] == ""
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_text() == "before"


def _tied_gradients(rank: int, source: str):
    model = lay_out(on_meta(source), "fsdp")
    weights.load(model, None, source)
    for module in [model, *model.model.visual.blocks, *model.model.language_model.layers]:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.forward = lambda: _loss(model, rank)
    model().backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def _loss(model: nn.Module, row: int) -> torch.Tensor:
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(3))[row : row + 1]
    out = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(out).log_softmax(-1)[..., 5].sum()


def test_tied_heads_train_as_one_after_loading(checkpoints):
    source = checkpoints["qwen2-vl tied"]
    reference = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    sum(_loss(reference, row) for row in range(2)).backward()
    want = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    got = run(2, _tied_gradients, source)[0]
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
