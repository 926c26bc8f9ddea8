"""dpo and kto under every layout, float64: loss and gradients are those of one process, and of plain autograd."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polymodal.core.sample import Batch, pack
from polymodal.data.preference import Mismatched
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.recipe import Recipe, load
from polymodal.train import reference
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import StepMetrics, forward_backward, inverse_weights
from tests.bounds import EXACT
from tests.parallel.exact import float64
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, build, draw_adapters, error, whole
from tests.parallel.preferences import make

COUNT = 8


@dataclass(frozen=True)
class Case:
    """A layout and keys of train.preference; each: samples of a pack."""

    name: str
    world: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    objective: str = "dpo"
    preference: dict[str, Any] = field(default_factory=dict)
    each: int = 2
    share: bool = True


def batches(recipe: Recipe, family: Any, layout: Any, each: int, share: bool) -> list[Batch]:
    """The first rows in packs of `each`."""
    processor = layout.processor()
    processor.share = processor.share and share
    corpus = layout.corpus(layout.datasets("datasets"), recipe.data)
    assert isinstance(corpus, Mismatched) == (recipe.train.objective == "kto")
    samples = [processor.sample(corpus[i], i) for i in range(COUNT)]
    packs = [pack(samples[i : i + each]) for i in range(0, COUNT, each)]
    floats = {"weights"} | {s.tensor for s in family.streams}
    for batch in packs:
        batch.tensors |= {n: t.double() for n, t in batch.tensors.items() if n in floats}
    return packs


def measure(rank: int, root: Path, case: Case) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    recipe = load(root / f"{case.objective}.yaml")
    settings = recipe.train.preference.model_copy(update=case.preference)
    if not case.lora and settings.loss not in ("simpo", "orpo"):
        settings = settings.model_copy(update={"reference": str(root / "other")})
    raw = recipe.model_dump()
    raw["train"]["preference"], raw["parallel"] = settings.model_dump(), case.parallel
    raw["model"]["lora"] = {} if case.lora else None
    recipe = Recipe.model_validate(raw)
    family = catalog.family(recipe.model)
    layout = layout_of(recipe, family)
    plain, adapted = Layout("", 1), Layout("", 1, lora=case.lora)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, case.world), "cpu", rank)
    model = ParallelModel(
        lambda: build(family, adapted, torch.float64), family, mesh, recipe, torch.device("cpu")
    )
    data = batches(recipe, family, layout, case.each, case.share)
    mine = data[mesh.dp_rank :: mesh.sizes.dp]
    sharding = layout.batch_sharding(mesh)

    def fill(part: torch.nn.Module) -> None:
        weights.load(part, family)
        draw_adapters(part)

    model.load_all(fill)
    objective = layout.objective
    made, reference.meta_model = reference.meta_model, lambda f, r: build(f, plain, torch.float64)
    try:
        with float64():
            if objective.needs_reference:
                actors = reference.Actors(model, recipe, mesh, torch.device("cpu"), sharding, layout)
                if not case.lora:
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
    for p in model.owned.values():  # what is computed for nothing: zeros where shards are reduced
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = {name: whole(p.grad) for name, p in model.owned.items()}
    if case.parallel.get("pp", 1) > 1:
        found: list[Any] = [None] * 2
        dist.all_gather_object(found, gradients, group=mesh.world["pp"].get_group())
        gradients = found[0] | found[1]
    return total["loss"], gradients, objective.shown(total)


def measures(rank: int, root: Path, cases: list[Case]) -> list[Any]:
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    return [measure(rank, root, case) for case in cases]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("preference"))


def agree(root: Path, one: list[Case], others: list[Case], world: int) -> None:
    """Each of `others` in its world against its kind among `one`."""
    (wanted,) = run(1, measures, root, one)
    by = {(c.objective, c.lora, str(c.preference)): result for c, result in zip(one, wanted, strict=True)}
    found = run(world, measures, root, others, timeout=600)[0]
    for case, (loss, gradients, shown) in zip(others, found, strict=True):
        want = by[case.objective, case.lora, str(case.preference)]
        assert loss == pytest.approx(want[0], rel=EXACT), case.name
        apart, where = error(gradients, want[1])
        assert apart < EXACT, (case.name, where, apart)
        assert shown == pytest.approx(want[2], rel=1e-8), case.name


ONE = [
    Case("one process"),
    Case("kto", objective="kto"),
    Case("LoRA", lora=True, preference={"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}),
]


@pytest.mark.slow
def test_cuts_of_a_step_change_nothing(root):
    """One pair a pack, all in one, pictures computed for each answer: as two pairs a pack with shared pictures."""
    others = [
        Case("one a pack", each=1),
        Case("one pack", each=COUNT),
        Case("pictures twice", share=False),
        Case("kto, one pack", objective="kto", each=COUNT),
    ]
    agree(root, ONE[:2], others, 1)


def test_two_ranks_equal_one(root):
    others = [
        Case("ring 2", 2, {"cp": 2, "ulysses": 1}),
        Case("LoRA, FSDP2", 2, lora=True, preference=ONE[2].preference),
    ]
    agree(root, [ONE[0], ONE[2]], others, 2)


@pytest.mark.slow
def test_other_layouts_of_two_ranks_equal_one(root):
    others = [
        Case("FSDP2", 2),
        Case("TP 2 + SP", 2, {"tp": 2}),
        Case("pictures dealt out", 2, {"balance_media": True}),
        Case("kto, FSDP2", 2, objective="kto"),
        Case("LoRA, TP 2", 2, {"tp": 2}, lora=True, preference=ONE[2].preference),
    ]
    agree(root, ONE, others, 2)


@pytest.mark.slow
def test_four_ranks_equal_one(root):
    others = [
        Case("HSDP", 4, {"dp_replicate": 2}),
        Case("FSDP2, Ulysses 2", 4, {"cp": 2}),
        Case("FSDP2, TP 2 + SP, recompute", 4, {"tp": 2, "recompute": "full"}),
        Case("kto, ring 2, TP 2", 4, {"cp": 2, "ulysses": 1, "tp": 2, "sp": False}, objective="kto"),
        Case("ring 4, pictures twice", 4, {"cp": 4, "ulysses": 1}, share=False),
    ]
    agree(root, ONE, others, 4)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["qwen2-vl", "qwen3-vl", "qwen3-vl-moe", "internvl", "llava"])
def test_every_card_shares_pictures_between_answers(card, tmp_path):
    """Their features are computed once, and are the same as computed for each answer; over ranks too."""
    root = make(tmp_path, card)
    agree(root, [Case("twice", share=False)], [Case("dealt out", 2, {"balance_media": True})], 2)


@pytest.mark.slow
def test_a_loss_without_reference_in_a_pipeline(root):
    one = [Case("one", preference={"loss": "simpo"}), Case("one", preference={"loss": "orpo"})]
    pipelines = [
        Case("PP 2, simpo", 2, {"pp": 2}, preference={"loss": "simpo"}),
        Case("PP 2, orpo", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}, preference={"loss": "orpo"}),
    ]
    agree(root, one, pipelines, 2)
