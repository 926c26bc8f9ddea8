"""Experts spread over ranks: uneven and absent tokens, each rank's own slices on disk and in memory, any other layout
from the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from polymodal.core.errors import PolymodalError
from polymodal.distributed import checkpoint
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.models.card import ModelCard
from polymodal.models.family import Family
from polymodal.parallel import expert, memory
from polymodal.parallel.apply import apply
from polymodal.recipe import Model, Optim, Parallel, Recipe, Train
from polymodal.train.optim import Optimizer
from polymodal.train.step import bind
from tests.models import tiny
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, build, whole
from tests.parallel.test_memory import Operators
from tests.parallel.test_weights_sharded import hub_layout

EXPERTS, CHOSEN = 4, 2
TOKENS = [[0, 1], [], [3, 3, 0], [0, 0, 0, 0]]
"""By rank: the first expert of each of its tokens; the second is the next one. Nobody chooses expert 2 first."""
CARD = ModelCard("toy", Family, (), (), (), {}, expert_plan={"mlp.experts": "dispatch"})


def _model(dtype: torch.dtype) -> nn.Module:
    import transformers
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = transformers.Qwen3VLMoeTextConfig(hidden_size=8, moe_intermediate_size=8, num_experts=EXPERTS)
    config._experts_implementation = "eager" if dtype == torch.float64 else "grouped_mm"
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = Qwen3VLMoeTextExperts(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.to(dtype)


def _tokens(rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank + 1)
    first = torch.tensor(TOKENS[rank], dtype=torch.int64)
    index = torch.stack([first, (first + 1) % EXPERTS], dim=1)
    hidden = torch.randn(len(first), 8, generator=generator).to(dtype).requires_grad_()
    shares = torch.rand(len(first), CHOSEN, generator=generator).to(dtype).requires_grad_()
    return hidden, index, shares


def _exchanged(rank: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(this rank's output and gradients of its tokens, whole gradients of the experts over all ranks)."""
    model = _model(dtype)
    mesh = Mesh(ParallelSizes(1, 1, 4, 1, 1, ep=4), "cpu", rank)
    ep = mesh.view("ep")
    assert ep is not None
    (experts,) = expert.apply(model, expert.resolve(model, CARD), ep)
    hidden, index, shares = _tokens(rank, dtype)
    out = experts(hidden, index, shares)
    out.square().sum().backward()
    assert out.shape == hidden.shape and experts.gate_up_proj.to_local().shape[0] == 1
    return [out.detach(), hidden.grad, shares.grad], [whole(p.grad) for p in experts.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_rank_without_tokens_and_an_expert_without_tokens(dtype: torch.dtype):
    found = run(4, _exchanged, dtype)
    model, parts = _model(dtype), [_tokens(rank, dtype) for rank in range(4)]
    joined = [torch.cat([part[i].detach() for part in parts]) for i in range(3)]
    hidden, shares = joined[0].requires_grad_(), joined[2].requires_grad_()
    out = model.mlp.experts(hidden, joined[1], shares)
    out.square().sum().backward()
    for i, expected in enumerate((out.detach(), hidden.grad, shares.grad)):
        torch.testing.assert_close(torch.cat([own[i] for own, _ in found]), expected)
    for _, gradients in found:
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def _again(rank: int) -> tuple[int, int]:
    """All-to-alls of tokens in the backward pass under selective recompute that keeps them, and that does not."""
    mesh = Mesh(ParallelSizes(1, 1, 2, 1, 1, ep=2), "cpu", rank)
    ep = mesh.view("ep")
    assert ep is not None
    counts = []
    for keep in (["matmul", "attention", "experts", "exchange"], ["matmul", "attention", "experts"]):
        model = _model(torch.float32).train()
        (experts,) = expert.apply(model, expert.resolve(model, CARD), ep)
        memory.recompute([experts], "selective", keep)
        out = experts(*_tokens(0, torch.float32))
        with Operators() as operators:
            out.square().sum().backward()
        counts.append(operators.seen["all_to_all_single"])
    return counts[0], counts[1]


def test_kept_tokens_are_not_sent_again():
    kept, sent_again = run(2, _again)[0]
    assert sent_again == kept + 2  # to the experts and back


def test_experts_that_are_no_whole_stacks_are_refused():
    model = _model(torch.float32)
    model.mlp.experts.extra = nn.Parameter(torch.zeros(3, 8))
    with pytest.raises(PolymodalError, match="`mlp.experts` cannot be cut over ranks"):
        expert.apply(model, expert.resolve(model, CARD), _two())


def _two() -> Any:
    class Two:
        def size(self) -> int:
            return 2

    return Two()


def test_a_card_with_a_wrong_style_is_refused():
    card = ModelCard("toy", Family, (), (), (), {}, expert_plan={"mlp.experts": "sideways"})
    with pytest.raises(PolymodalError, match="expert-parallel style `sideways`"):
        expert.resolve(_model(torch.float32), card)


# A whole model, its files and its checkpoints


def _laid_out(rank: int, source: str, parallel: dict[str, Any]) -> tuple[nn.Module, Any]:
    recipe = Recipe(model=Model(source=source), parallel=Parallel(**parallel), train=Train(precision="fp32"))
    family = catalog.family(recipe.model)
    model = build(family, Layout("", 1), torch.float32)
    bind(model, family)
    apply(
        model,
        family.card,
        Mesh(ParallelSizes.of(recipe.parallel, dist.get_world_size()), "cpu", rank),
        recipe,
    )
    return model, family


def _tensors(model: nn.Module, create: bool) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    optimizer = Optimizer(named, Optim(), {})
    state = optimizer.state(create=create)
    return {**{f"model.{n}": p for n, p in named.items()}, **{f"optim.{k}": v for k, v in state.items()}}


def _written(rank: int, source: str, directory: str) -> tuple[int, int, int]:
    """Load the hub's layout, write a checkpoint; (bytes held, bytes read, bytes of this rank's experts)."""
    model, family = _laid_out(rank, source, {"ep": 2})
    report = weights.load(model, family)
    group = dist.new_group(backend="gloo")
    tensors = _tensors(model, create=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("optim.exp_avg."):
                tensor.copy_(tensors["model." + name.removeprefix("optim.exp_avg.")])
    writer = checkpoint.Writer(Path(directory), 1, True, rank, group)
    writer.save(tensors, checkpoint.RunState(step=1))
    writer.finish()
    held = sum(p.to_local().numel() * 4 for n, p in model.named_parameters() if ".experts." in n)
    return report.bytes_held, report.bytes_read, held


def _resumed(rank: int, directory: str, source: str, parallel: dict[str, Any]) -> dict[str, Tensor]:
    model, family = _laid_out(rank, source, parallel)
    weights.materialise(model)
    tensors = _tensors(model, create=True)
    found = checkpoint.newest(Path(directory))
    assert found is not None
    checkpoint.load(found, tensors, dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None)
    return {name: whole(tensor) for name, tensor in tensors.items() if "exp_avg_sq" not in name}


@pytest.mark.slow
def test_files_and_checkpoints_know_no_layout(tmp_path):
    plain = tiny.checkpoint("qwen3-vl-moe", tmp_path / "plain", text_config__moe_intermediate_size=24)
    source = str(hub_layout(plain, tmp_path / "hub"))
    run_dir = str(tmp_path / "run")
    held = run(4, _written, source, run_dir)
    (expected,) = run(1, _resumed, run_dir, source, {})
    experts = sum(t.numel() * 4 for n, t in expected.items() if n.startswith("model.") and ".experts." in n)
    for bytes_held, bytes_read, own in held:
        assert own == experts / 4 and bytes_read == bytes_held  # its slices, and nothing else
    reference = dict(weights.read(catalog.family(Model(source=source)).build(), source))
    for name, tensor in reference.items():
        assert torch.equal(expected[f"model.{name}"], tensor)
        assert torch.equal(expected[f"optim.exp_avg.{name}"], tensor)
    for world, parallel in ((2, {"ep": 2, "tp": 2}), (4, {"ep": 4}), (2, {})):
        for found in run(world, _resumed, run_dir, source, parallel):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), parallel


def _placements(rank: int, source: str) -> set[str]:
    model, _ = _laid_out(rank, source, {"ep": 2})
    return {
        str(p.placements) for n, p in model.named_parameters() if ".experts." in n and isinstance(p, DTensor)
    }


def test_expert_shards_are_plain_pieces(tmp_path):
    """Not strided: a checkpoint writes them as they are."""
    source = str(tiny.checkpoint("qwen3-vl-moe", tmp_path))
    assert run(4, _placements, source)[0] == {"(Shard(dim=1), Shard(dim=0))"}
