"""How the plan of a run grows with the data: 100 thousand, 1 million and 10 million samples of text and pictures.

For each size: the time to the first global batch, the memory that planning takes beside the index itself, and the
time a sample (CPU time of this one process); then, for one window, packing and the balance between eight ranks. The ratios to the smallest size are
what is promised: all near one. Run `python benchmarks/schedule_growth.py [--json FILE]`; it needs no accelerator.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np

from polymodal.core.sample import SampleLengths
from polymodal.data.packing import first_fit_decreasing
from polymodal.data.schedule import Schedule
from polymodal.recipe import Data, Train

LONGEST = 4096
SIZES = (100_000, 1_000_000, 10_000_000)
WINDOWS = 5  # planned of each size; the quickest counts


def spread(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths as a mix of text and pictures has them: (tokens, patches), int32 [count].

    Text: log-normal, median 250, up to 4,096. Two samples in three have a picture of 256 to 4,900 patches, four of
    which make a token; what would be longer than 4,096 tokens is cut to that.
    """
    rng = np.random.default_rng(0)
    tokens, patches = np.empty(count, dtype=np.int32), np.empty(count, dtype=np.int32)
    for start in range(0, count, 1 << 20):
        size = min(1 << 20, count - start)
        picture = np.where(
            rng.random(size) < 2 / 3, np.clip(rng.lognormal(np.log(1200), 0.7, size), 256, 4900), 0
        )
        patches[start : start + size] = picture
        text = np.clip(rng.lognormal(np.log(250), 1.0, size), 16, LONGEST)
        tokens[start : start + size] = np.minimum(text + picture // 4, LONGEST)
    return tokens, patches


def cost(measure: Any) -> float:
    """Forward FLOPs: 3 billion parameters, 36 layers of width 2048; a tower of 0.6 billion, 4 of 32 layers global."""
    text = 6e9 * measure.tokens + 2 * 36 * 2048 * measure.tokens**2
    patches = measure.total("vision")
    return text + 1.2e9 * patches + 4 * 1280 * patches * (4 * patches + 28 * 64)


def index_of(tokens: np.ndarray, patches: np.ndarray) -> Any:
    return SimpleNamespace(
        tokens=tokens,
        usable=np.ones(len(tokens), dtype=bool),
        record=None,
        media={"vision": patches},
        measure=lambda i: SampleLengths(int(tokens[i]), 0, {"vision": (int(patches[i]),)}),
    )


def schedule(index: Any, batch: int = 64) -> Schedule:
    part = SimpleNamespace(
        name="lengths", start=0, stop=len(index.tokens), weight=None, repeat=1.0, fingerprint="synthetic"
    )
    return Schedule(index, [part], Data(max_length=LONGEST), Train(global_batch_size=batch), cost)


def growth(count: int) -> dict[str, float]:
    """First batch (of five tries the quickest), steady state and peak memory of one size."""
    index = index_of(*spread(count))
    first = []
    for _ in range(5):
        began = time.process_time()
        next(schedule(index).batches())
        first.append(time.process_time() - began)
    plan = schedule(index)
    windows = [[0, 0.0] for _ in range(min(plan.windows, WINDOWS))]  # samples, seconds
    began = time.process_time()
    for batch in plan.batches(epochs=1):
        if batch.position.window == WINDOWS:
            break
        now = time.process_time()
        windows[batch.position.window][0] += sum(map(len, batch.packs))
        windows[batch.position.window][1] += now - began
        began = now
    tracemalloc.start()
    next(schedule(index).batches())
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "samples": count,
        "first_batch_seconds": min(first),
        "memory_mib": memory / 2**20,
        "microseconds_a_sample": min(1e6 * seconds / samples for samples, seconds in windows),
        "window": windows[0][0],
    }


def packing(count: int = 65_536) -> dict[str, float]:
    """One window: seconds to pack, tokens over capacity, and imbalance (max / mean cost) of eight ranks."""
    tokens, patches = spread(count)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        first_fit_decreasing(tokens, LONGEST)
        seconds.append(time.process_time() - began)
    plan = schedule(index_of(tokens, patches))
    packs = sum(len(batch.packs) for batch in plan.batches(epochs=1))
    out = {
        "pack_seconds": min(seconds),
        "pack_fullness": float(tokens.sum(dtype=np.int64)) / LONGEST / packs,
    }
    index = index_of(tokens, patches)
    for batch_size in (8, 64, 256):
        plan = schedule(index, batch_size)
        totals, waits = [], []
        for batch in itertools.islice(plan.batches(epochs=1), 40):
            costs = dict(zip(batch.packs, batch.cost, strict=True))
            table = np.array([[costs.get(p, 0.0) for p in batch.for_rank(r, 8)] for r in range(8)])
            totals.append(table.sum(1).max() / table.sum(1).mean())
            waits.append(table.max(0).sum() / table.sum() * 8)
        out[f"imbalance_total_batch_{batch_size}"] = float(np.mean(totals))
        out[f"imbalance_micro_steps_batch_{batch_size}"] = float(np.mean(waits))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures here")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of samples")
    options = parser.parse_args()
    rows = [growth(size) for size in options.sizes]
    base = rows[0]
    print(f"{'samples':>12} {'a window':>9} {'first batch':>18} {'memory':>18} {'a sample':>18}")
    for row in rows:
        cells = [
            f"{row['first_batch_seconds'] * 1e3:7.0f} ms ({row['first_batch_seconds'] / base['first_batch_seconds']:.2f} x)",
            f"{row['memory_mib']:6.1f} MiB ({row['memory_mib'] / base['memory_mib']:.2f} x)",
            f"{row['microseconds_a_sample']:7.2f} us ({row['microseconds_a_sample'] / base['microseconds_a_sample']:.2f} x)",
        ]
        print(f"{row['samples']:>12,} {row['window']:>9,} " + " ".join(f"{c:>18}" for c in cells))
    window = packing()
    print(
        f"\none window of 65,536: packed in {window['pack_seconds'] * 1e3:.0f} ms, packs {window['pack_fullness']:.2%} full"
    )
    for size in (8, 64, 256):
        total, wait = (window[f"imbalance_{kind}_batch_{size}"] for kind in ("total", "micro_steps"))
        print(
            f"8 ranks, {size:>3} packs a step: max / mean cost of a rank {total:.3f}; with a wait in every micro-step {wait:.3f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"growth": rows, "window": window}, file, indent=2)


if __name__ == "__main__":
    main()
