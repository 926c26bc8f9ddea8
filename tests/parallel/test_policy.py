"""grpo under every layout that it takes, float64: answers, loss and gradients are those of one process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polymodal.core.sample import IGNORE, pack, padding_sample
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.recipe import Recipe, load
from polymodal.train import reference
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.rollout import PolicyActors
from polymodal.train.step import StepMetrics, forward_backward, inverse_weights
from tests.bounds import EXACT
from tests.parallel.exact import float64
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, build, draw_adapters, error, whole
from tests.parallel.policies import make

COUNT = 6


@dataclass(frozen=True)
class Case:
    """A layout and keys of train.grpo; each: prompts of a pack."""

    name: str
    world: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    grpo: dict[str, Any] = field(default_factory=dict)
    each: int = 2

    @property
    def kind(self) -> tuple[Any, ...]:
        return self.lora, tuple((k, v) for k, v in self.grpo.items() if k != "rollout_rows")


def measure(rank: int, root: Path, case: Case) -> dict[str, Any]:
    raw = load(root / "grpo.yaml").model_dump()
    raw["train"]["grpo"] |= case.grpo
    if raw["train"]["grpo"]["kl"] and not case.lora:
        raw["train"]["grpo"]["reference"] = str(root / "other")
    raw["parallel"], raw["model"]["lora"] = case.parallel, {} if case.lora else None
    recipe = Recipe.model_validate(raw)
    family = catalog.family(recipe.model)
    layout = layout_of(recipe, family)
    plain, adapted = Layout("", 1), Layout("", 1, lora=case.lora)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, case.world), "cpu", rank)
    device = torch.device("cpu")
    model = ParallelModel(lambda: build(family, adapted, torch.float64), family, mesh, recipe, device)
    processor, corpus = layout.processor(), layout.corpus(layout.datasets("datasets"), recipe.data)
    samples = [processor.sample(corpus[i], i) for i in range(COUNT)]
    data = [pack(samples[i : i + case.each]) for i in range(0, COUNT, case.each)]
    floats = {"weights"} | {s.tensor for s in family.streams}
    for batch in data:
        batch.tensors |= {n: t.double() for n, t in batch.tensors.items() if n in floats}
    mine = data[mesh.dp_rank :: mesh.sizes.dp]
    mine += [padding(family)] * (-(-len(data) // mesh.sizes.dp) - len(mine))
    sharding = layout.batch_sharding(mesh)

    def fill(part: torch.nn.Module) -> None:
        weights.load(part, family)
        draw_adapters(part)

    model.load_all(fill)
    objective = layout.objective
    made, reference.meta_model = reference.meta_model, lambda f, r: build(f, plain, torch.float64)
    try:
        with float64():
            actors = PolicyActors(model, recipe, mesh, device, sharding, layout)
            actors.step = 1
            if objective.needs_reference and not case.lora:
                actors.copy = actors._frozen(None, None)  # type: ignore[arg-type]
            mine = objective.prepare(actors, mine)
            group = sharding.weights_group if dist.is_initialized() else None
            inverse = inverse_weights(objective, mine, group)
            tally = StepMetrics((), objective.keys)
            forward_backward(model.runner, objective, sharding(mine), inverse, tally)
            total = tally.total(mesh.log_group)
            model.gradients()
    finally:
        reference.meta_model = made
    for p in model.owned.values():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    said = {}
    for batch in mine:
        parts = batch["labels"][0].split([sum(own) for own in batch.groups.get("sequences", ((2,),))])
        said |= {id: part[part != IGNORE].tolist() for id, part in zip(batch.samples, parts, strict=True)}
    everyone: list[Any] = [said]
    if case.world > 1:
        everyone = [None] * case.world
        dist.all_gather_object(everyone, said)
    return {
        "loss": total["loss"],
        "gradients": {name: whole(p.grad) for name, p in model.owned.items()},
        "shown": objective.shown(total),
        "said": {id: ids for each in everyone for id, ids in each.items() if id >= 0},
    }


def padding(family: Any) -> Any:
    """What a rank has that has no prompt."""
    batch = pack([padding_sample(2, family.position_rows)])
    batch.tensors["weights"] = batch["weights"].double()
    return batch


def measures(rank: int, root: Path, cases: list[Case]) -> list[Any]:
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    return [measure(rank, root, case) for case in cases]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("policy"))


def agree(root: Path, one: list[Case], others: list[Case], world: int) -> None:
    (wanted,) = run(1, measures, root, one)
    by = {case.kind: result for case, result in zip(one, wanted, strict=True)}
    found = run(world, measures, root, others, timeout=600)[0]
    for case, got in zip(others, found, strict=True):
        want = by[case.kind]
        assert len(want["said"]) == COUNT and got["said"] == want["said"], case.name
        assert got["loss"] == pytest.approx(want["loss"], rel=EXACT, abs=EXACT), case.name
        apart, where = error(got["gradients"], want["gradients"])
        assert apart < EXACT, (case.name, where, apart)
        assert got["shown"] == pytest.approx(want["shown"], rel=1e-7, abs=1e-9), case.name
        assert want["shown"]["logp_difference"] < 1e-9 and any(g.any() for g in want["gradients"].values())


KL = {"kl": 0.2, "temperature": 0.7, "aggregate": "sequence"}
ONE = [Case("one"), Case("LoRA", lora=True, grpo=KL), Case("KL", grpo={**KL, "updates": 2})]


@pytest.mark.slow
def test_two_ranks_equal_one(root):
    """One of them has one micro-batch without a prompt; pictures are dealt out; LoRA with adapters off."""
    others = [
        Case("FSDP2", 2, {"balance_media": True}),
        Case("LoRA, FSDP2", 2, lora=True, grpo=KL),
    ]
    agree(root, ONE[:2], others, 2)


@pytest.mark.slow
def test_cuts_of_a_step_change_nothing(root):
    others = [
        Case("one a pack", each=1),
        Case("one pack, generated singly", each=COUNT, grpo={"rollout_rows": 1}),
        Case("KL, one pack", each=COUNT, grpo={**KL, "updates": 2}),
    ]
    agree(root, ONE, others, 1)


@pytest.mark.slow
def test_other_layouts_equal_one(root):
    agree(root, ONE, [Case("KL, FSDP2", 2, grpo={**KL, "updates": 2})], 2)
    others = [
        Case("HSDP", 4, {"dp_replicate": 2}),
        Case("ZeRO 2, recompute", 4, {"zero": 2, "recompute": "full"}),
    ]
    agree(root, ONE[:1], others, 4)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "card", ["qwen2-vl", "qwen3-vl", "qwen3-vl-moe", "internvl", "llava", "deepseek-vl2", "qwen2.5-omni"]
)
def test_every_card_answers_as_it_trains(card, tmp_path):
    """The log-probabilities of tokens as they are drawn are those of the training forward."""
    root = make(tmp_path, card)
    (found,) = run(1, measures, root, [Case("one")])
    assert found[0]["shown"]["logp_difference"] < 1e-9 and found[0]["shown"]["lengths/answers"] > 1
