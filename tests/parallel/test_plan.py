"""Predicted peaks against what an allocator counts in real processes: the table of docs/plan.md, row by row."""

from __future__ import annotations

import pytest

from tests.parallel.calibration import BOUND, CASES, compare

QUICK = ("FSDP2 x 2",)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_predicted_peak_is_within_five_percent(case):
    predicted, measured, error = compare(case)
    assert error <= BOUND, f"predicted {predicted}, measured {measured}"


def test_enough_layouts_are_compared():
    assert len(CASES) >= 12 and {case.world for case in CASES} == {1, 2, 4, 8}
