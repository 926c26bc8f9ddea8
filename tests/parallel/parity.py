"""The parity table: every layout of every model against one process, in float64. `make parity` writes docs/parity.md.

    python -m tests.parallel.parity [--output docs/parity.md] [--models qwen3-vl ...]

Tests only; test_layouts.py runs the same matrix in CI and fails where the table would show a difference.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.models import tiny
from tests.parallel.harness import run
from tests.parallel.layouts import STEPS, Layout, Parity, compare, one_process

BOUND = 1e-9
"""Largest relative error that counts as equal: float64 rounding after five optimizer steps is far below."""

VISION = ("model.visual.",)
SPARSE = ("qwen3-vl-moe",)
MATRIX = [
    Layout("FSDP2 x 2", 2),
    Layout("FSDP2 x 3, uneven", 3),
    Layout("FSDP2 x 4", 4),
    Layout("FSDP2 x 2, parameters kept after forward", 2, {"reshard_after_forward": False}),
    Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    Layout("TP 2", 2, {"tp": 2, "sp": False}),
    Layout("TP 2 + SP", 2, {"tp": 2}),
    Layout("FSDP2 x 2, TP 2", 4, {"tp": 2, "sp": False}),
    Layout("FSDP2 x 2, TP 2 + SP", 4, {"tp": 2}),
    Layout("HSDP 2 x 1, TP 2 + SP", 4, {"tp": 2, "dp_replicate": 2}),
    Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
    Layout("FSDP2 x 2, selective recompute", 2, {"recompute": "selective"}),
    Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    Layout("TP 2 + SP, selective recompute", 2, {"tp": 2, "recompute": "selective"}),
    Layout("frozen vision tower, FSDP2 x 2", 2, frozen=VISION),
    Layout("frozen vision tower, TP 2 + SP", 2, {"tp": 2}, frozen=VISION),
    Layout("LoRA, FSDP2 x 2", 2, lora=True),
    Layout("LoRA, TP 2", 2, {"tp": 2, "sp": False}, lora=True),
    Layout("LoRA, FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}, lora=True),
    Layout("EP 2", 2, {"ep": 2}, only=SPARSE),
    Layout("EP 4", 4, {"ep": 4}, only=SPARSE),
    Layout("EP 2, expert FSDP2 x 2", 4, {"ep": 2}, only=SPARSE),
    Layout("EP 2, TP 2", 2, {"ep": 2, "tp": 2, "sp": False}, only=SPARSE),
    Layout("EP 2, TP 2 + SP, full recompute", 2, {"ep": 2, "tp": 2, "recompute": "full"}, only=SPARSE),
    Layout("EP 2, FSDP2 x 2, TP 2 + SP", 4, {"ep": 2, "tp": 2}, only=SPARSE),
    Layout("EP 4, FSDP2 x 2, TP 2", 4, {"ep": 4, "tp": 2, "sp": False}, only=SPARSE),
    Layout("EP 2, HSDP 2 x 2", 4, {"ep": 2, "dp_replicate": 2}, only=SPARSE),
    Layout("EP 2, selective recompute", 2, {"ep": 2, "recompute": "selective"}, only=SPARSE),
    Layout("LoRA, EP 2, expert FSDP2 x 2", 4, {"ep": 2}, lora=True, only=SPARSE),
]


def parity(
    name: str,
    layouts: list[Layout],
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    **overrides: Any,
) -> dict[str, Parity]:
    """Parity by layout name of one model's tiny checkpoint (qwen2-vl has a tied head), world by world.

    overrides: keys of the tiny model's config.
    """
    layouts = [layout for layout in layouts if layout.fits(name)]
    with tempfile.TemporaryDirectory(prefix="polymodal-parity-") as directory:
        source = str(tiny.checkpoint(name, directory, tied=name == "qwen2-vl", **overrides))
        (reference,) = run(1, one_process, source, layouts, dtype, steps, timeout=1200)
        found = {}
        for world in sorted({layout.world for layout in layouts}):
            group = [layout for layout in layouts if layout.world == world]
            for result in run(world, compare, source, group, reference, dtype, steps, timeout=3600)[0]:
                found[result.layout] = result
    return found


def table(found: dict[str, dict[str, Parity]], layouts: Iterable[Layout]) -> str:
    """Markdown: rows are layouts, columns are models, cells are loss / gradients / weights."""
    import transformers

    lines = [
        "# Parity",
        "",
        "Written by `make parity`; do not edit. Each cell is one run of a tiny random model of the library's own class",
        "on real processes (gloo, CPU, float64), compared with one process on the same global batch of "
        "four packs with",
        "pictures, a video and text (one pack has no picture): the largest relative L2 error of "
        "**loss / any gradient / any",
        f"weight after {STEPS} clipped AdamW steps**. Loss of every model: per token, with the routers' balance loss for experts.",
        "",
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}.",
        "",
        "| layout (processes) | " + " | ".join(found) + " |",
        "|---|" + "---|" * len(found),
    ]
    for layout in layouts:
        cells = [cell(r[layout.name]) if layout.name in r else "-" for r in found.values()]
        lines.append(f"| {layout.name} ({layout.world}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(result: Parity) -> str:
    return " / ".join(
        f"{value:.0e}" if value else "0" for value in (result.loss, result.gradients, result.weights)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/parity.md"))
    parser.add_argument("--models", nargs="+", default=list(tiny.NAMES), choices=tiny.NAMES)
    asked = parser.parse_args()
    found = {}
    for name in asked.models:
        found[name] = parity(name, MATRIX)
        worst = max(found[name].values(), key=lambda r: max(r.loss, r.gradients, r.weights))
        print(f"{name}: {len(found[name])} layouts, worst {cell(worst)} ({worst.layout})", flush=True)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    partial = asked.output.with_suffix(".partial")
    partial.write_text(table(found, MATRIX))
    os.replace(partial, asked.output)


if __name__ == "__main__":
    main()
