"""Model FLOP/s of the training step over the machine's own best matrix product, both measured here; and what is lost.

    python benchmarks/flops.py [--steps 10] [--precision fp32|bf16] [--json FILE]

Model FLOPs are the card's formula (forward, times three), compared with what torch's FlopCounterMode counts in one
step. Both sides run on one core and are timed in CPU seconds of the process, so that other work on the machine counts
little. The best rate is that of the quickest of several matrix products. Then one step is profiled: the time of each
kind of work less what its FLOPs would take at the best rate; the largest three are named. Wanted: 0.6 in bf16.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import ground

WANTED = {"fp32": None, "bf16": 0.6}
SKIPPED = 2
SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (3072, 2048, 2048), (4096, 1024, 4096))
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear")
COPIES = ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::clone", "aten::index", "aten::_index_put_impl_")  # fmt: skip


def best_rate(dtype: Any) -> float:
    """FLOP/s of the quickest matrix product."""
    import torch

    best = 0.0
    for m, k, n in SIZES:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(8):
            began = time.process_time()
            a @ b
            best = max(best, 2 * m * k * n / (time.process_time() - began))
    return best


def kind(event: Any) -> str:
    """What a profiled operation is part of."""
    head, up = False, event
    while up is not None:
        head = head or up.name in ("_HeadLoss", "_HeadLossBackward")
        up = up.cpu_parent
    if event.name in PRODUCTS:
        return "matrix products of the head" if head else "matrix products of the layers"
    if "scaled_dot_product" in event.name:
        return "attention kernels"
    if "adam" in event.name.lower() or event.name.startswith("Optimizer") or "norm" in event.name:
        return "optimizer and clipping"
    if head:
        return "softmax of the head, element by element"
    if event.name in COPIES:
        return "copies and casts"
    return "other element-wise work, dispatch and memory"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with ground.trainer(args) as (trainer, batches):
        import torch
        from torch.profiler import ProfilerActivity, profile
        from torch.utils.flop_counter import FlopCounterMode

        def run(step: Any) -> float:
            began = time.process_time()
            trainer._step(trainer.state.step + 1, step, time.perf_counter())
            return time.process_time() - began

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        peak = best_rate(dtype)
        seconds = [run(step) for step in batches][SKIPPED:]
        peak = max(peak, best_rate(dtype))  # before and after: the machine may not be alone
        flops = [3 * step.stats.flops for step in batches][SKIPPED:]
        last = batches[-1]
        with FlopCounterMode(display=False) as counter:
            run(last)
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
            profiled_seconds = run(last)
    spent: dict[str, float] = {}
    for event in profiled.events():
        spent[kind(event)] = (
            spent.get(kind(event), 0.0) + event.self_cpu_time_total / 1e6 - (event.flops or 0) / peak
        )
    total = sum(spent.values())
    lost = sorted(((name, value / total) for name, value in spent.items()), key=lambda pair: -pair[1])
    return {
        "best_gflops": peak / 1e9,
        "model_gflops": sum(flops) / sum(seconds) / 1e9,
        "ratio": sum(flops) / sum(seconds) / peak,
        "best_step": max(f / s for f, s in zip(flops, seconds, strict=True)) / peak,
        "counted_over_formula": counter.get_total_flops() / (3 * last.stats.flops),
        "wanted": WANTED[args.precision],
        "losses": lost,
        "profiled_seconds": profiled_seconds,
    }


def main() -> None:
    args = ground.one_rank("flops.py", __doc__)
    out = measure(args)
    wanted = f" (wanted >= {out['wanted']})" if out["wanted"] else ""
    print(
        f"{args.precision}: {out['model_gflops']:.0f} of {out['best_gflops']:.0f} GFLOP/s = {out['ratio']:.2f}{wanted}; best step {out['best_step']:.2f}; "
        f"torch counts {out['counted_over_formula']:.2f} x the formula"
    )
    for name, share in out["losses"]:
        print(f"  {share:6.1%} of what is lost: {name}")
    if args.json:
        ground.add_to(args.json, {"precision": {args.precision: out}})


if __name__ == "__main__":
    main()
