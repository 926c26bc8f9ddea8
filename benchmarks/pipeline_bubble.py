"""The idle time of every pipeline schedule on four stages, measured with stages that sleep, against its formula.

    python benchmarks/pipeline_bubble.py [--micro-batches 8] [--seconds 0.02 0.1] [--json FILE]

Four gloo processes run polymodal's own Pipeline over a model whose blocks sleep: one unit forward, one for gradients of
inputs and one for gradients of weights in each rank's share of the layers. A step is timed from a barrier to its end on
the last rank; idle is what it takes beyond a rank's own work, as a share of that work. Every action (a stage's pass over
a micro-batch) also costs Python, autograd and a message, whatever it sleeps: with two lengths of the unit, the idle share
is what a longer unit adds, and the rest is that cost, given in milliseconds an action.

Formulas, of one step on its own (p ranks, v stages a rank, m micro-batches, equal forward, input and weight units): GPipe
and 1F1B (p - 1) / m; interleaved (p - 1) / (v m) (Narayanan et al. 2021); ZB-H1, zero bubble with one stage a rank,
(p - 1) / (3 m); ZB-V (p - 1) / (6 m): no rank waits between its first and its last action, but the last rank begins
p - 1 forwards of half a unit after the first, which only a step that follows at once can hide (Qi et al. 2023).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from polymodal.core.sample import Batch
from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models.card import Chain, ModelCard, Output
from polymodal.models.family import Family
from polymodal.parallel import pipeline_split
from polymodal.recipe import Model, Parallel, Recipe, Train
from polymodal.train.parallel_model import ParallelModel
from tests.parallel.harness import run

RANKS = 4
WIDTH = 8
CASES = {
    "GPipe": ({}, lambda p, v, m: (p - 1) / m),
    "1F1B": ({}, lambda p, v, m: (p - 1) / m),
    "Interleaved1F1B": ({"pp_virtual": 2}, lambda p, v, m: (p - 1) / (v * m)),
    "InterleavedZeroBubble": ({"pp_virtual": 1}, lambda p, v, m: (p - 1) / (3 * m)),
    "ZBVZeroBubble": ({}, lambda p, v, m: (p - 1) / (6 * m)),
}


class _Sleep(torch.autograd.Function):
    """Hands its input through; sleeps in the forward pass if asked, and when its gradient is computed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ahead: float, back: float) -> Tensor:
        ctx.back = back
        time.sleep(ahead)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.back)
        return grad, None, None


class Block(nn.Module):
    """y = x w; sleeps `unit` forward, for the gradient of x, and for that of w."""

    def __init__(self, unit: float):
        super().__init__()
        self.weight, self.unit = nn.Parameter(torch.ones(WIDTH)), unit

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _Sleep.apply(hidden_states, self.unit, self.unit) * _Sleep.apply(self.weight, 0.0, self.unit)


class Sleeper(nn.Module):
    """As many blocks as there are stages; together one unit a rank for each pass."""

    def __init__(self, stages: int, unit: float):
        super().__init__()
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(unit * RANKS / stages) for _ in range(stages)])
        self.leave = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave(hidden)


class SleeperFamily(Family):
    stages, unit = 4, 0.0

    def build(self) -> nn.Module:
        with torch.device("meta"):
            return Sleeper(self.stages, self.unit)

    def whole(self, model: nn.Module, batch: Batch) -> Output:
        return Output(type(model).forward(model, batch["x"]))


CARD = ModelCard(
    name="sleeper",
    family=SleeperFamily,
    architectures=(),
    tasks=(),
    blocks=("blocks.*",),
    towers={"all": ("",)},
    pipeline={"all": Chain("blocks.*", first=("enter",), last=("leave",))},
)


def measured(
    rank: int, schedule: str, options: dict[str, Any], count: int, unit: float, steps: int
) -> list[float]:
    """Seconds of each step, on this rank."""
    parallel = Parallel(pp=RANKS, pp_schedule=schedule, **options)  # type: ignore[arg-type]
    family = SleeperFamily(CARD, None, "sleeper")
    family.stages, family.unit = RANKS * pipeline_split.stages_per_rank(parallel), unit
    mesh = Mesh(ParallelSizes.of(parallel, RANKS), "cpu", rank)
    recipe = Recipe(model=Model(source="-"), parallel=parallel, train=Train(precision="fp32"))
    laid = ParallelModel(lambda: family.build(), family, mesh, recipe, torch.device("cpu"))
    for model in laid.models:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.ones_(parameter)
    batches = [Batch({"x": torch.ones(1, WIDTH)}, {"x": ("batch", "none")}, (i,)) for i in range(count)]
    out = []
    for _ in range(steps + 1):
        torch.distributed.barrier()
        began = time.perf_counter()
        laid.runner.step(batches, lambda output, batch: (output.hidden_states.sum(), {}))
        out.append(time.perf_counter() - began)
    return out[1:]


def row(name: str, m: int, units: list[float], steps: int) -> dict[str, Any]:
    """The shortest of some steps for each length of the unit, and what a line through them says."""
    options, formula = CASES[name]
    parallel = Parallel(pp=RANKS, pp_schedule=name, **options)  # type: ignore[arg-type]
    v = pipeline_split.stages_per_rank(parallel)
    taken = []
    for unit in units:
        seconds = run(RANKS, measured, name, options, m, unit, steps)
        taken.append(min(max(times) for times in zip(*seconds, strict=True)))
    short, long = units[0], units[-1]
    slope = (taken[-1] - taken[0]) / (long - short)
    actions = m * v * (3 if pipeline_split.SCHEDULES[name].split_backward else 2)
    return {
        "schedule": name, "stages": v, "formula": formula(RANKS, v, m), "idle": slope / (3 * m) - 1,
        "measured": [step / (3 * m * unit) - 1 for step, unit in zip(taken, units, strict=True)],
        "milliseconds_an_action": 1000 * (taken[0] - slope * short) / actions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[0.02, 0.1], help="of a unit: a pass over a rank's layers"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    m, units = asked.micro_batches, sorted(asked.seconds)
    if units[0] == units[1]:
        parser.error("--seconds needs two lengths of a unit that differ")
    rows = []
    print(f"{RANKS} ranks, {m} micro-batches; idle as a share of a rank's work")
    at = "".join(f"{f'at {unit * 1000:.0f} ms':>11}" for unit in units)
    print(f"{'schedule':24}{'stages a rank':>14}{at}{'idle':>8}{'formula':>9}{'ms an action':>14}")
    for name in CASES:
        found = row(name, m, units, asked.steps)
        rows.append(found)
        each = "".join(f"{share:11.3f}" for share in found["measured"])
        print(
            f"{name:24}{found['stages']:14}{each}{found['idle']:8.3f}{found['formula']:9.3f}{found['milliseconds_an_action']:14.2f}",
            flush=True,
        )
    if asked.json:
        asked.json.write_text(json.dumps({"micro_batches": m, "seconds": units, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
