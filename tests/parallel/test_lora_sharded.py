"""Adapters under FSDP2: values, gradients, files and merged weights are those of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polymodal.models import lora, weights
from polymodal.recipe import Lora
from tests.models import tiny
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
    lora.initialise(model, options, 3)
    with torch.no_grad():  # a B that is not zero, elementwise and so alike in every layout
        for name, parameter in lora.adapters(model).items():
            if ".lora_B." in name:
                parameter.add_(0.01)
    return model


def _train(rank: int, source: str, options: Lora, directory: str):
    model = build(source, options, True)
    start = lora.gather(model)
    model.forward = lambda: _loss(model, rank)
    model().backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    lora.save(start, model, options, directory, base=source)
    torch.distributed.barrier()
    lora.initialise(model, options, 77)
    lora.load(model, options, directory)
    again = lora.gather(model)
    merged = dict(lora.merged_state(model))
    return start, gradients, again, merged if rank == 0 else {}


def test_two_ranks_equal_one_process(setting, tmp_path):
    source, options = setting
    model = build(source, options, False)
    start = lora.gather(model)
    (_loss(model, 0) + _loss(model, 1)).backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert want.keys() == {n for n in start if "language_model" in n}
    whole = dict(lora.merged_state(model))
    for values, gradients, again, merged in run(2, _train, source, options, str(tmp_path / "adapter")):
        assert values.keys() == start.keys()
        assert all(torch.equal(values[n], start[n]) and torch.equal(again[n], start[n]) for n in start)
        assert gradients.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(gradients[name], want[name], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(merged[n], whole[n]) for n in merged)
        assert not merged or merged.keys() == whole.keys()
