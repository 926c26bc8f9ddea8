"""Every layout gives the single process's loss, gradients, gradient norm and weights: float64, tiny real models.

The default run holds one or two dense mixtures a model; the full matrix is marked slow and writes docs/parity.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.parallel.harness import run
from tests.parallel.layouts import Layout, Parity, compare, one_process

BOUND = 1e-9
VISION = ("model.visual.",)
QUICK = {
    "qwen2-vl": [
        Layout("TP2 + SP", 2, {"tp": 2}),
        Layout("frozen vision, FSDP2 x 2, ZeRO-2", 2, {"reshard_after_forward": False}, frozen=VISION),
    ],
    "qwen2.5-vl": [
        Layout("FSDP2 x 2, selective recompute", 2, {"recompute": "selective"}),
        Layout("LoRA, TP2 + SP", 2, {"tp": 2}, lora=True),
        Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
    ],
    "qwen3-vl": [
        Layout("TP2", 2, {"tp": 2, "sp": False}),
        Layout("LoRA, FSDP2 x 2", 2, {}, lora=True),
        Layout("FSDP2 x TP2 + SP, recompute", 4, {"tp": 2, "recompute": "full"}),
    ],
    "qwen3-vl-moe": [Layout("FSDP2 x TP2 + SP, recompute", 4, {"tp": 2, "recompute": "full"})],
}


def parity(directory: Path, name: str, layouts: list[Layout], steps: int) -> list[Parity]:
    """Parity of layouts of one model, world by world."""
    source = str(tiny.checkpoint(name, directory, tied=name == "qwen2-vl"))
    (reference,) = run(1, one_process, source, layouts, torch.float64, steps, timeout=600)
    found = []
    for world in sorted({layout.world for layout in layouts}):
        group = [layout for layout in layouts if layout.world == world]
        found += run(world, compare, source, group, reference, torch.float64, steps, timeout=900)[0]
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_layout_is_the_single_process(name: str, tmp_path: Path):
    for result in parity(tmp_path, name, QUICK[name], steps=2):
        assert max(result.loss, result.gradients, result.norm) < BOUND, result
        assert result.weights < BOUND, result
