"""The idle time of every pipeline schedule on four stages, measured with stages that sleep, against its formula.

    python benchmarks/pipeline_bubble.py [--micro-batches 8] [--seconds 0.02] [--json FILE]

Four gloo processes run the house's own Pipeline over a model whose blocks sleep: one unit forward, one for gradients of
inputs and one for gradients of weights in each rank's share of the layers. Idle is what a step takes beyond a rank's
own work, as a share of that work. Formulas (p ranks, v stages a rank, m micro-batches, equal forward, input and weight
units): GPipe and 1F1B (p - 1) / m; interleaved (p - 1) / (v m) (Narayanan et al. 2021); zero bubble (p - 1) / (3 m) for one
stage a rank (ZB-H1, Qi et al. 2023), none for ZB-V.
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

from polymodal.data.sample import Batch
from polymodal.models.card import Chain, Components, Family, ModelCard, Output
from polymodal.parallel import cuts
from polymodal.parallel.mesh import Mesh, ParallelSizes
from polymodal.recipe import Model, Parallel, Recipe, Train
from polymodal.train.model import LaidOut
from tests.parallel.harness import run

RANKS = 4
WIDTH = 8
CASES = {
    "GPipe": ({}, lambda p, v, m: (p - 1) / m),
    "1F1B": ({}, lambda p, v, m: (p - 1) / m),
    "Interleaved1F1B": ({"pp_virtual": 2}, lambda p, v, m: (p - 1) / (v * m)),
    "InterleavedZeroBubble": ({"pp_virtual": 1}, lambda p, v, m: (p - 1) / (3 * m)),
    "ZBVZeroBubble": ({}, lambda p, v, m: 0.0),
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

    def build(self) -> Components:
        with torch.device("meta"):
            return Components(Sleeper(self.stages, self.unit))

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
    family.stages, family.unit = RANKS * cuts.rounds(parallel), unit
    mesh = Mesh(ParallelSizes.of(parallel, RANKS), "cpu", rank)
    recipe = Recipe(model=Model(source="-"), parallel=parallel, train=Train(precision="fp32"))
    laid = LaidOut(lambda: family.build().trained, family, mesh, recipe, torch.device("cpu"))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=0.02, help="of one unit: a pass over a rank's layers"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    m, unit = asked.micro_batches, asked.seconds
    rows = []
    print(
        f"{RANKS} stages' ranks, {m} micro-batches, {unit * 1000:.0f} ms a unit; idle as a share of a rank's work"
    )
    print(f"{'schedule':24}{'stages a rank':>14}{'measured':>10}{'formula':>10}")
    for name, (options, formula) in CASES.items():
        v = cuts.rounds(Parallel(pp=RANKS, pp_schedule=name, **options))  # type: ignore[arg-type]
        seconds = run(RANKS, measured, name, options, m, unit, asked.steps)
        step = min(max(times) for times in zip(*seconds, strict=True))
        row = {
            "schedule": name,
            "stages": v,
            "measured": step / (3 * m * unit) - 1,
            "formula": formula(RANKS, v, m),
        }
        rows.append(row)
        print(f"{name:24}{v:14}{row['measured']:10.3f}{row['formula']:10.3f}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"micro_batches": m, "seconds": unit, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
