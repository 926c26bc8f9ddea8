"""A base in few bits over two ranks of FSDP2: bytes, loss and gradients are those of one process."""

import pytest
import torch

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, lora, quantised, weights
from polymodal.parallel.apply import apply
from polymodal.recipe import Lora, Model, Parallel, Recipe, Train
from tests.models import tiny
from tests.models.test_lora import CARD, on_meta
from tests.parallel.harness import run
from tests.parallel.test_lora_sharded import _loss, start

OPTIONS = Lora(rank=4, alpha=8, towers=["language"])


def _learn(rank: int, world: int, source: str, kind: str):
    recipe = Recipe(
        model=Model(source=source, base=kind, lora=OPTIONS),
        parallel=Parallel(dp_shard=world, recompute="full"),
        train=Train(precision="fp32"),
    )
    model = on_meta(source)
    lora.attach(model, OPTIONS, CARD)
    quantised.quantise(model, kind, CARD)
    rows = range(2) if world == 1 else [rank]
    model.forward = lambda: sum(_loss(model, row) for row in rows)
    if world > 1:
        mesh = Mesh(ParallelSizes.of(recipe.parallel, world), "cpu", rank)
        apply(model, catalog.family(recipe.model).card, mesh, recipe)
    weights.load(model, None, source)
    start(model, OPTIONS)
    model.train()
    loss = model()
    loss.backward()
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters() if p.dtype == torch.uint8)

    def whole(tensor):
        return tensor.full_tensor() if world > 1 else tensor

    low = {name: whole(layer.weight.detach()) for name, layer in quantised.layers(model).items()}
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), held, low, gradients


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_two_ranks_equal_one_process(kind, tmp_path):
    source = str(tiny.checkpoint("qwen2.5-vl", tmp_path / "base", tied=False))
    loss, held, low, gradients = _learn(0, 1, source, kind)
    ranks = run(2, _learn, 2, source, kind)
    assert sum(each[0] for each in ranks) == pytest.approx(loss, rel=1e-5)
    assert sum(each[1] for each in ranks) == held  # each holds its rows alone
    for _, _, bytes_, found in ranks:
        assert all(torch.equal(bytes_[name], low[name]) for name in low)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
