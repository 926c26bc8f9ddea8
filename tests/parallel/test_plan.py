"""Predicted peaks against what an allocator counts in real processes: rows of the table of docs/plan.md.

Every way of laying out, of saving memory and of computing is in one row here; `python -m tests.parallel.calibration`
measures all of them.
"""

from __future__ import annotations

import pytest

from tests.parallel.calibration import BOUND, CASES, compare

QUICK = ("FSDP2 x 2",)
ROWS = (
    "one process, bf16",
    "full recompute",
    "FSDP2 x 2",
    "FSDP2 x 2, LoRA",
    "FSDP2 x 2, selective recompute, kept on the host",
    "FSDP2 x 2, optimizer on the host, bf16",
    "TP 2 + SP, bf16",
    "Ulysses 2 x ring 2",
    "HSDP 2 x 2, full recompute",
    "Qwen3-VL MoE, FSDP2 x 2, EP 2, TP 2 + SP",
    "PP 2 x VPP 2 (interleaved)",
    "PP 2, FSDP2 x 2, gradients kept sharded",
    "PP 2, FSDP2 x 2, TP 2 + SP, bf16",
)
TESTED = [case for case in CASES if case.name in ROWS]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in TESTED],
    ids=lambda case: case.name,
)
def test_predicted_peak_is_within_five_percent(case):
    predicted, measured, error = compare(case)
    assert error <= BOUND, f"predicted {predicted}, measured {measured}"


def test_enough_layouts_are_compared():
    assert len(TESTED) == len(ROWS) >= 12 and {case.world for case in TESTED} == {1, 2, 4, 8}
