"""diffusion_dpo under layouts, float64: loss and gradients are those of one process."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog, weights
from polymodal.recipe import Recipe
from polymodal.train import reference
from polymodal.train.layouts import layout_of
from polymodal.train.parallel_model import ParallelModel
from polymodal.train.step import StepMetrics, forward_backward, inverse_weights
from tests.bounds import EXACT
from tests.parallel import dits
from tests.parallel.exact import float64
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, build, draw_adapters, error, whole


@dataclass(frozen=True)
class Case:
    name: str
    world: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    joined: bool = False
    """Micro-batches of two pairs in place of one."""


def pairs(directory: str, joined: bool) -> list[Batch]:
    """The first and the second sample of every micro-batch as a pair."""
    made = []
    for number, (tensors, tokens, shape) in enumerate(dits._features(directory)):
        axes: dict[str, Any] = {n: ("batch", *["none"] * (t.ndim - 1)) for n, t in tensors.items()}
        groups = {"seeds": (number,) * 2, "tokens": (tokens,) * 2, "kind": "video", "shape": shape}
        made.append(Batch(dict(tensors), axes, (number,) * 2, groups=groups))
    if not joined:
        return made
    out = []
    for a, b in ((made[0], made[2]), (made[1], made[3])):
        tensors = {n: torch.cat([a[n], b[n]]) for n in a.tensors}
        groups = {n: v + b.groups[n] if n in ("seeds", "tokens") else v for n, v in a.groups.items()}
        out.append(replace(a, tensors=tensors, samples=a.samples + b.samples, groups=groups))
    return out


def measure(rank: int, directory: str, case: Case) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    recipe = Recipe.model_validate(
        {
            "model": {"source": directory, "lora": {} if case.lora else None},
            "parallel": case.parallel,
            "train": {
                "objective": "diffusion_dpo",
                "precision": "fp32",
                "preference": {
                    "beta": 20.0,
                    "label_smoothing": 0.1,
                    "loss": {"sigmoid": 1, "sft": 0.5},
                    "reference": None if case.lora else f"{directory}-other",
                },
            },
        }
    )
    family = catalog.family(recipe.model)
    layout = layout_of(recipe, family)
    plain, adapted = Layout("", 1), Layout("", 1, lora=case.lora)
    mesh = Mesh(ParallelSizes.of(recipe.parallel, case.world), "cpu", rank)
    model = ParallelModel(
        lambda: build(family, adapted, torch.float64), family, mesh, recipe, torch.device("cpu")
    )
    data = pairs(directory, case.joined)
    mine = data[mesh.dp_rank :: mesh.sizes.dp]
    sharding = layout.batch_sharding(mesh)

    def fill(part: torch.nn.Module) -> None:
        weights.load(part, family)
        draw_adapters(part)

    model.load_all(fill)
    objective = layout.objective
    made, reference.meta_model = reference.meta_model, lambda f, r: build(f, plain, torch.float64)
    noised = type(objective)._noised
    type(objective)._noised = lambda self, b, q: dits._typed(noised(self, b, q), torch.float64)
    try:
        with float64():
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
        reference.meta_model, type(objective)._noised = made, noised
    gradients = {n: whole(p.grad) for n, p in model.owned.items() if p.grad is not None}
    return total["loss"], gradients, objective.shown(total)


def measures(rank: int, directory: str, cases: list[Case]) -> list[Any]:
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    return [measure(rank, directory, case) for case in cases]


def pipelines(root: Path, name: str) -> str:
    """A tiny pipeline with features, and another with other weights of its denoiser beside it."""

    made = dits.pipeline(name, root / name)
    import shutil

    from safetensors.torch import load_file, save_file

    other = Path(f"{made}-other")
    shutil.copytree(made, other)
    (file,) = (other / "transformer").glob("*.safetensors")
    draw = torch.Generator().manual_seed(2)
    moved = {n: t + 0.05 * torch.randn(t.shape, generator=draw) for n, t in load_file(file).items()}
    save_file(moved, file, {"format": "pt"})
    return str(made)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pipelines(tmp_path_factory.mktemp("diffusion-preference"), "flux")


def agree(directory: str, others: list[Case], world: int) -> None:
    (wanted,) = run(1, measures, directory, [Case("one"), Case("LoRA", lora=True)])
    found = run(world, measures, directory, others, timeout=600)[0]
    for case, (loss, gradients, shown) in zip(others, found, strict=True):
        want = wanted[case.lora]
        assert want[2]["error/chosen"] != pytest.approx(want[2]["error/chosen_reference"], rel=1e-4)
        assert loss == pytest.approx(want[0], rel=EXACT), case.name
        apart, where = error(gradients, want[1])
        assert apart < EXACT, (case.name, where, apart)
        assert shown == pytest.approx(want[2], rel=1e-8), case.name


def test_two_ranks_and_other_cuts_equal_one(flux):
    agree(flux, [Case("LoRA, FSDP2", 2, lora=True), Case("FSDP2, joined", 2, joined=True)], 2)


@pytest.mark.slow
def test_other_layouts_equal_one(flux):
    agree(flux, [Case("joined", joined=True), Case("LoRA, joined", lora=True, joined=True)], 1)
    two = [
        Case("TP 2", 2, {"tp": 2}),
        Case("LoRA, TP 2", 2, {"tp": 2}, lora=True),
        Case("CP 2", 2, {"cp": 2}),
        Case("HSDP", 2, {"dp_replicate": 2}),
    ]
    agree(flux, two, 2)


@pytest.mark.slow
def test_clips_over_ranks_equal_one(tmp_path):
    wan = pipelines(tmp_path, "wan")
    agree(wan, [Case("FSDP2", 2), Case("LoRA, TP 2", 2, {"tp": 2}, lora=True)], 2)
