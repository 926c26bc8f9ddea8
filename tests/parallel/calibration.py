"""Predicted against measured memory: the same step traced with shapes and run for real, by an allocator's own count.

    python -m tests.parallel.calibration [--output docs/plan.md]

writes the table between the marks of docs/plan.md. Tests only; test_plan.py holds rows of every kind to the bound.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function

from polymodal.distributed.mesh import Mesh, ParallelSizes
from polymodal.models import catalog
from polymodal.plan.job import Job
from polymodal.plan.trace import trace
from polymodal.recipe import Recipe, validate
from polymodal.train.layouts import Workload
from polymodal.train.layouts.packed import lengths
from tests.models import tiny
from tests.parallel.harness import run

BOUND = 0.05
MARKS = ("<!-- calibration -->", "<!-- end of calibration -->")
TOKENS, MEDIA, PATCHES = 1024, 0.25, 256  # of a micro-batch: tokens, share of pictures, patches of one
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Case:
    """A layout of a tiny model on so many processes; `recipe` holds other keys by dotted name."""

    name: str
    world: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "qwen2.5-vl"
    recipe: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("one process", 1),
    Case("one process, bf16", 1, recipe={"train.precision": "bf16"}),
    Case("full recompute", 1, {"recompute": "full"}),
    Case("selective recompute", 1, {"recompute": "selective"}),
    Case("FSDP2 x 2", 2),
    Case("FSDP2 x 2, bf16, full recompute", 2, {"recompute": "full"}, recipe={"train.precision": "bf16"}),
    Case("FSDP2 x 2, parameters kept after forward", 2, {"reshard_after_forward": False}),
    Case("FSDP2 x 2, LoRA", 2, recipe={"model.lora": {"rank": 4}}),
    Case("FSDP2 x 2, frozen vision tower, moving average", 2, recipe={"train.freeze": ["vision"], "train.ema": 0.9}),
    Case("FSDP2 x 2, activations on the host", 2, {"offload": ["activations"]}),
    Case("FSDP2 x 2, selective recompute, kept on the host", 2, {"offload": ["activations"], "recompute": "selective"}),
    Case("FSDP2 x 2, parameters on the host", 2, {"offload": ["parameters"]}),
    Case("FSDP2 x 2, optimizer on the host, bf16", 2, {"offload": ["optimizer"]}, recipe={"train.precision": "bf16"}),
    Case("TP 2", 2, {"tp": 2, "sp": False}),
    Case("TP 2 + SP, bf16", 2, {"tp": 2}, recipe={"train.precision": "bf16"}),
    Case("Qwen3-VL, FSDP2 x 2, TP 2 + SP", 4, {"tp": 2}, "qwen3-vl"),
    Case("Qwen3-VL MoE, FSDP2 x 4", 4, {}, "qwen3-vl-moe"),
    Case("HSDP 2 x 2, full recompute", 4, {"dp_replicate": 2, "recompute": "full"}),
    Case("Ulysses 2", 2, {"cp": 2}),
    Case("Ulysses 2 x ring 2", 4, {"cp": 4, "ulysses": 2}),
    Case("Qwen3-VL MoE, FSDP2 x 4, EP 2", 4, {"ep": 2}, "qwen3-vl-moe"),
    Case("Qwen3-VL MoE, FSDP2 x 2, EP 2, TP 2 + SP", 4, {"ep": 2, "tp": 2}, "qwen3-vl-moe"),
    Case("PP 2 (1F1B)", 2, {"pp": 2}),
    Case("PP 2 (GPipe), bf16", 2, {"pp": 2, "pp_schedule": "GPipe"}, recipe={"train.precision": "bf16"}),
    Case("PP 2 x VPP 2 (interleaved)", 2, {"pp": 2, "pp_virtual": 2, "pp_schedule": "Interleaved1F1B"}),
    Case("PP 2 (zero bubble in a V), full recompute", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble", "recompute": "full"}),
    Case("PP 2, FSDP2 x 2", 4, {"pp": 2}),
    Case("PP 2, FSDP2 x 2, gradients kept sharded", 4, {"pp": 2, "zero": 2}),
    Case("Qwen3-VL, PP 2, TP 2 + SP", 4, {"pp": 2, "tp": 2}, "qwen3-vl"),
    Case("PP 2, FSDP2 x 2, TP 2 + SP, bf16", 8, {"pp": 2, "tp": 2}, recipe={"train.precision": "bf16"}),
    Case("FSDP2 x 4, TP 2 + SP, bf16", 8, {"tp": 2}, recipe={"train.precision": "bf16"}),
    Case("HSDP 2 x 4, bf16", 8, {"dp_replicate": 2}, recipe={"train.precision": "bf16"}),
]  # fmt: skip


def recipe_of(case: Case, source: str) -> Recipe:
    data: dict[str, Any] = {"model": {"source": source, "init": "random"}, "parallel": dict(case.parallel)}
    data["train"] = {"precision": "fp32"}
    data["data"] = {"max_length": TOKENS}
    for key, value in case.recipe.items():
        section, _, leaf = key.partition(".")
        data.setdefault(section, {})[leaf] = value
    return validate(data)


def allocated(rank: int, case: Case, source: str) -> int:
    """Peak bytes of the CPU allocator in a step of a real rank, by torch's own record of every allocation.

    gloo's threads sometimes let go of a tensor last, which this thread's record does not see: every wait lasts a
    moment longer, what the record has too much at a step's begin is taken off, and the least of three steps counts.
    """
    wait = dist.Work.wait

    def patient(work: Any, *args: Any) -> Any:
        out = wait(work, *args)
        time.sleep(0.001)
        return out

    dist.Work.wait = patient  # this process ends with the measurement
    recipe = recipe_of(case, source)
    family = catalog.family(recipe.model)
    measure = lengths(family, TOKENS, [(MEDIA, PATCHES)])
    held = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        mesh = Mesh(ParallelSizes.of(recipe.parallel, case.world), "cpu", rank)
        job = Job(recipe, family, mesh, measure)
        job.load_all(seed=0)
        job.step(lambda: [family.example(measure)])
        for _ in range(3):
            held.append(living())
            with record_function("measured step"):
                job.step(lambda: [family.example(measure) for _ in range(MICRO_BATCHES)])
    events = profiler.profiler.kineto_results.events()
    steps = sorted(
        (e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == "measured step"
    )
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks = []
    for (begin, end), real in zip(steps, held, strict=True):
        total = sum(change for at, change in changes if at < begin)
        unseen, highest = total - real, total
        for at, change in changes:
            if begin <= at <= end:
                total += change
                highest = max(highest, total)
        peaks.append(highest - unseen)
    return min(peaks)


def living() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and not isinstance(thing, DTensor) and not thing.is_meta:
            storages[thing.untyped_storage()._cdata] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def compare(case: Case) -> tuple[int, int, float]:
    """(predicted, measured) peak bytes of rank 0, and the error of the worst rank relative to the measured."""
    with tempfile.TemporaryDirectory(prefix="polymodal-plan-") as directory:
        source = str(tiny.checkpoint(case.model, directory))
        measured = run(case.world, allocated, case, source, timeout=600)
        recipe = recipe_of(case, source)
        family = catalog.family(recipe.model)
        load = Workload(lengths(family, TOKENS, [(MEDIA, PATCHES)]))
        predicted = [
            trace(recipe, family, case.world, rank, load, micro_batches=MICRO_BATCHES).usage.both
            for rank in {0, case.world - 1}
        ]
    errors = [abs(p - measured[r]) / measured[r] for p, r in zip(predicted, {0, case.world - 1}, strict=True)]
    return predicted[0], measured[0], max(errors)


def table(cases: list[Case]) -> str:
    """The cases as Markdown."""
    lines = [
        "| layout | model | processes | predicted MiB | measured MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        predicted, measured, error = compare(case)
        lines.append(
            f"| {case.name} | {case.model} | {case.world} | {predicted / 2**20:.2f} | {measured / 2**20:.2f} | {error:.1%} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    made = table([case for case in CASES if asked.only in case.name])
    if asked.output is not None:
        before, _, rest = asked.output.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        partial = asked.output.with_suffix(".partial")
        partial.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}")
        os.replace(partial, asked.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
