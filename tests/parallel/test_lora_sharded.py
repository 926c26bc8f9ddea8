"""Adapters under FSDP2, TP and EP: values, gradients, files and merged weights are those of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, lora, weights
from polymodal.parallel.apply import apply
from polymodal.recipe import Lora, Model, Parallel, Recipe, Train
from tests.models import gather, tiny
from tests.models.test_lora import CARD, on_meta
from tests.parallel.harness import run

KINDS = {
    "qwen2-vl": Lora(rank=5, alpha=10, towers=["language", "vision"]),  # rank 5: uneven over 2
    "qwen3-vl-moe": Lora(rank=3, alpha=10, targets=["q_proj", "gate_up_proj", "experts.down_proj"]),
}


@pytest.fixture(scope="module", params=KINDS)
def setting(request, tmp_path_factory) -> tuple[str, Lora]:
    source = tiny.checkpoint(
        request.param,
        tmp_path_factory.mktemp("lora") / "base",
        tied=request.param == "qwen2-vl",
        text_config__num_hidden_layers=2,
        vision_config__depth=1,
        **({"vision_config__deepstack_visual_indexes": [0]} if "moe" in request.param else {}),
    )
    return str(source), KINDS[request.param]


def _loss(model: nn.Module, row: int) -> torch.Tensor:
    ids = torch.randint(0, 400, (2, 12), generator=torch.Generator().manual_seed(3))[row : row + 1]
    out = model.model.language_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(out).log_softmax(-1)[..., 5].sum()


def build(source: str, options: Lora, shard: bool) -> nn.Module:
    model = on_meta(source)
    lora.attach(model, options, CARD)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        blocks = [*model.model.visual.blocks, *model.model.language_model.layers]
        for module in [*blocks, model]:
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    weights.load(model, None, source)
    start(model, options)
    return model


@torch.no_grad()
def start(model: nn.Module, options: Lora) -> None:
    """Adapters with a B that is not zero, elementwise and so alike in every layout."""
    lora.initialise(model, options, 3)
    for name, parameter in lora.adapters(model).items():
        if ".lora_B." in name:
            parameter.add_(0.01)


def _train(rank: int, source: str, options: Lora, directory: str):
    model = build(source, options, True)
    values = gather.adapters(model)
    model.forward = lambda: _loss(model, rank)
    model().backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        gather.save_adapter(values, model, options, directory, base=source)
    torch.distributed.barrier()
    lora.initialise(model, options, 77)
    lora.load(model, options, directory)
    again = gather.adapters(model)
    merged = gather.merged(model)
    return values, gradients, again, merged if rank == 0 else {}


def _spread(rank: int, source: str, options: Lora, directory: str, layouts: list[dict[str, int]]):
    """Of each layout: adapters as they start, as they are read back from the files, and merged weights."""
    found = []
    for number, parallel in enumerate(layouts):
        recipe = Recipe(
            model=Model(source=source), parallel=Parallel(**parallel), train=Train(precision="fp32")
        )
        model = on_meta(source)
        lora.attach(model, options, CARD)
        mesh = Mesh(ParallelSizes.of(recipe.parallel, 2), "cpu", rank)
        apply(model, catalog.family(recipe.model).card, mesh, recipe)
        weights.load(model, None, source)
        start(model, options)
        values = gather.adapters(model)
        if rank == 0:
            gather.save_adapter(values, model, options, f"{directory}/{number}", base=source)
        torch.distributed.barrier()
        lora.initialise(model, options, 77)
        lora.load(model, options, f"{directory}/{number}")
        again, merged = gather.adapters(model), gather.merged(model)
        found.append((values, again, merged if rank == 0 else {}))
    return found


def test_two_ranks_equal_one_process(setting, tmp_path):
    source, options = setting
    model = build(source, options, False)
    ours = gather.adapters(model)
    (_loss(model, 0) + _loss(model, 1)).backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert want.keys() == {n for n in ours if "language_model" in n}
    whole = gather.merged(model)
    for values, gradients, again, merged in run(2, _train, source, options, str(tmp_path / "adapter")):
        assert values.keys() == ours.keys()
        assert all(torch.equal(values[n], ours[n]) and torch.equal(again[n], ours[n]) for n in ours)
        assert gradients.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(gradients[name], want[name], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(merged[n], whole[n]) for n in merged)
        assert not merged or merged.keys() == whole.keys()


def test_adapters_on_spread_experts_have_one_processs_files(tmp_path):
    source = str(tiny.checkpoint("qwen3-vl-moe", tmp_path / "base"))
    options = KINDS["qwen3-vl-moe"]
    model = on_meta(source)
    lora.attach(model, options, CARD)
    weights.load(model, None, source)
    start(model, options)
    ours, whole = gather.adapters(model), gather.merged(model)
    wanted = gather.save_adapter(ours, model, options, tmp_path / "one", base=source)
    layouts = [{"ep": 2}, {"tp": 2}, {"ep": 2, "tp": 2}]
    first, _ = run(2, _spread, source, options, str(tmp_path), layouts)
    for number, (values, again, merged) in enumerate(first):
        assert values.keys() == again.keys() == ours.keys() and merged.keys() == whole.keys()
        assert all(torch.equal(values[n], ours[n]) and torch.equal(again[n], ours[n]) for n in ours)
        assert all(torch.equal(merged[n], whole[n]) for n in whole)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / str(number) / file).read_bytes() == (wanted / file).read_bytes()
