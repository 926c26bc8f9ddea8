"""Every layout gives the single process's loss, gradients, gradient norm and weights: float64, tiny real models.

The default run holds one or two dense mixtures a model; every layout of parity.py's matrix, on one model each, is marked slow.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from tests.models import tiny
from tests.parallel.layouts import Layout
from tests.parallel.parity import BOUND, MATRIX, VIRTUAL_CUT, VISION, VISION_CUT, parity, read, row, table

QUICK = {
    "qwen2-vl": [
        Layout("PP 2 x 2 virtual, ZBVZeroBubble", 2, {"pp": 2, "pp_schedule": "ZBVZeroBubble"}),
        Layout("ring 2, selective recompute", 2, {"cp": 2, "ulysses": 1, "recompute": "selective"}),
        Layout("frozen vision tower, FSDP2 x 2", 2, {"reshard_after_forward": False}, frozen=VISION),
    ],
    "qwen2.5-vl": [
        Layout("ZeRO-1 x 2, selective recompute", 2, {"zero": 1, "recompute": "selective"}),
        Layout("FSDP2 x 2, Ulysses 2, pictures dealt out", 4, {"cp": 2, "balance_media": True}),
        Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
        Layout("PP 2 x 2 virtual, vision tower over three stages", 2, {"pp": 2, **VIRTUAL_CUT}),
        Layout("HSDP 2 x 2", 4, {"dp_replicate": 2}),
        Layout("PP 2, ZeRO-3 x 2, full recompute", 4, {"pp": 2, "zero": 3, "recompute": "full"}),
    ],
    "qwen3-vl": [
        Layout("TP 2", 2, {"tp": 2, "sp": False}),
        Layout("LoRA, FSDP2 x 2", 2, {}, lora=True),
        Layout("Ulysses 2 x ring 2", 4, {"cp": 4, "ulysses": 2}),
        Layout("PP 2, TP 2 + SP, vision tower 3 + 1", 4, {"pp": 2, "tp": 2, "pp_layers": VISION_CUT}),
        Layout(
            "ZeRO-2 x 2, parameters and activations on the host",
            2,
            {"zero": 2, "offload": ["parameters", "activations"]},
        ),
        Layout("FSDP2 x 2, TP 2 + SP, full recompute", 4, {"tp": 2, "recompute": "full"}),
    ],
    "qwen3-vl-moe": [
        Layout("TP 2 + SP, full recompute", 2, {"tp": 2, "recompute": "full"}),
        Layout("EP 2, selective recompute", 2, {"ep": 2, "recompute": "selective"}),
        Layout("EP 2, FSDP2 x 2, TP 2 + SP", 4, {"ep": 2, "tp": 2}),
        Layout("PP 2, FSDP2 x 2", 4, {"pp": 2}),
        Layout("ring 2, TP 2", 4, {"cp": 2, "ulysses": 1, "tp": 2, "sp": False}),
    ],
    "internvl": [
        Layout("FSDP2 x 2, pictures dealt out", 2, {"balance_media": True}),
        Layout("PP 2, TP 2 + SP, vision tower 3 + 1", 4, {"pp": 2, "tp": 2, "pp_layers": VISION_CUT}),
    ],
    "internvl-moe": [Layout("Ulysses 2, EP 2", 2, {"cp": 2, "ep": 2})],
    "internvl-6b": [
        Layout("TP 2", 2, {"tp": 2, "sp": False}),
        Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
        Layout("TP 2 + SP, selective recompute", 2, {"tp": 2, "recompute": "selective"}),
    ],
    tiny.OMNI: [
        Layout("TP 2 + SP", 2, {"tp": 2}),
        Layout("PP 2, audio tower 1 + 3", 2, {"pp": 2, "pp_layers": {"audio": [1, 3], "language": [0, 3]}}),
    ],
    tiny.OMNI3: [Layout("EP 2, TP 2 + SP", 2, {"ep": 2, "tp": 2})],
}


def _equal(name: str, layouts: list[Layout], steps: int, **overrides: Any) -> None:
    for result in parity(name, layouts, steps, **overrides):
        assert max(result.loss, result.gradients, result.norm, result.weights) < BOUND, result


LATER = tiny.OMNIS
"""Models whose layouts are measured with the slow tests alone."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LATER)) for n in QUICK])
def test_a_layout_is_the_single_process(name: str):
    _equal(name, QUICK[name], steps=1)


def _shares() -> dict[str, list[Layout]]:
    """Every layout on one of the models that have it, in turns; `make parity` measures all of them."""
    shares: dict[str, list[Layout]] = {name: [] for name in QUICK}
    for number, layout in enumerate(MATRIX):
        able = [name for name in QUICK if layout.fits(name)]
        shares[able[number % len(able)]].append(layout)
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_every_layout_is_the_single_process(name: str):
    _equal(name, _shares()[name], steps=1)


@pytest.mark.slow
def test_a_model_that_hears_and_does_not_see():
    cut = {"pp": 2, "pp_layers": {"audio": [1, 3], "language": [0, 3]}}
    _equal(tiny.ASR, [Layout("TP 2 + SP", 2, {"tp": 2}), Layout("PP 2, audio tower 1 + 3", 2, cut)], steps=1)


@pytest.mark.slow
def test_six_processes_with_uneven_pieces():
    _equal("qwen3-vl", [Layout("FSDP2 x 3, TP 2 + SP", 6, {"tp": 2})], steps=2)


@pytest.mark.slow
def test_dense_layers_among_sparse_ones():
    layouts = [Layout("TP 2", 2, {"tp": 2}), Layout("EP 2, TP 2", 2, {"ep": 2, "tp": 2})]
    _equal("qwen3-vl-moe", layouts, steps=1, text_config__mlp_only_layers=[1])


@pytest.mark.slow
def test_experts_over_eight_processes():
    layouts = [
        Layout("EP 4, HSDP 2 x 2, TP 2 + SP", 8, {"ep": 4, "tp": 2, "dp_replicate": 2}),
        Layout(
            "EP 2, expert FSDP2 x 4, TP 2 + SP, full recompute", 8, {"ep": 2, "tp": 2, "recompute": "full"}
        ),
    ]
    _equal("qwen3-vl-moe", layouts, steps=2)


COMPILED = {
    "qwen2.5-vl": [
        Layout(
            "ring 2, compiled, full recompute",
            2,
            {"cp": 2, "ulysses": 1, "recompute": "full", "compile": True},
        ),
        Layout("PP 2, compiled", 2, {"pp": 2, "compile": True}),
    ],
    "qwen3-vl-moe": [Layout("EP 2, TP 2, compiled", 2, {"ep": 2, "tp": 2, "compile": True})],
}
"""Few, since each takes a compiler's time; FSDP2, TP, Ulysses, PP with TP, PP with ZeRO-3 and EP alone are equal too."""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "qwen2.5-vl" else pytest.mark.nightly) for n in COMPILED],
)
def test_compiled_blocks(name: str):
    for result in parity(name, COMPILED[name], steps=1, dtype=torch.float32):
        assert max(result.loss, result.gradients) < 1e-5, result


def test_the_table_is_merged_row_by_row():
    cells = {
        (row(Layout("TP 2", 2)), "qwen2-vl"): "0 / 1e-16 / 2e-16",
        (row(Layout("TP 2", 2)), "qwen3-vl"): "**1e-03 / 0 / 0**",
        (row(Layout("FSDP2 x 2", 2)), "qwen3-vl"): "0 / 0 / 0",
        ("a layout that is gone (2)", "qwen3-vl"): "0 / 0 / 0",
        (row(Layout("TP 2", 2)), "flux"): "0 / 0 / 3e-16",
        (row(Layout("FSDP2 x 2", 2)), "sana"): "0 / 1e-16 / 0",
    }
    text = table(cells)
    assert (
        "| layout (processes) | qwen2-vl | qwen3-vl |" in text and "| FSDP2 x 2 (2) |  | 0 / 0 / 0 |" in text
    )
    assert "| layout (processes) | flux |" in text and "| sana | 0 / 1e-16 / 0 |  |" in text
    del cells["a layout that is gone (2)", "qwen3-vl"]
    assert read(text) == cells and table(read(text)) == text
