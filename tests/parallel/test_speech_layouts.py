"""Whisper and Qwen3-TTS under every layout that their cards promise: the single process's loss, gradients and
weights, in float64.

Padded batches of the real class, packed ones of the net. A few rows by default, the matrix is slow.
"""

from __future__ import annotations

import pytest

from tests.parallel.layouts import Layout
from tests.parallel.parity import BOUND, parity
from tests.parallel.parity_speech import ENDS, MATRIX, SPEAKING, SPEAKING_MATRIX


def equal(layouts: list[Layout], model: str = "whisper") -> None:
    for result in parity(model, layouts, steps=1):
        assert max(result.loss, result.gradients, result.norm, result.weights) < BOUND, result


def test_a_layout_is_the_single_process():
    equal(
        [
            Layout("FSDP2 x 2", 2),
            Layout("TP 2 + SP", 2, {"tp": 2}),
            Layout("PP 2, the head alone at the end", 2, {"pp": 2, "pp_layers": ENDS}),
            Layout("LoRA, TP 2", 2, {"tp": 2, "sp": False}, lora=True),
            Layout(
                "PP 2, ZBVZeroBubble, full recompute",
                2,
                {"pp": 2, "pp_schedule": "ZBVZeroBubble", "recompute": "full"},
            ),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("at", range(0, len(MATRIX), 8))
def test_every_layout_is_the_single_process(at: int):
    equal(MATRIX[at : at + 8])


@pytest.mark.slow
def test_a_layout_of_a_model_that_speaks_is_the_single_process():
    equal(
        [
            Layout("FSDP2 x 2, full recompute", 2, {"recompute": "full"}),
            Layout("TP 2 + SP", 2, {"tp": 2}),
            Layout("ring 2", 2, {"cp": 2, "ulysses": 1}),
            Layout("LoRA, TP 2 + SP", 2, {"tp": 2}, lora=True),
        ],
        SPEAKING[0],
    )


@pytest.mark.nightly
@pytest.mark.parametrize("at", range(0, len(SPEAKING_MATRIX), 8))
def test_every_layout_of_a_model_that_speaks_is_the_single_process(at: int):
    equal(SPEAKING_MATRIX[at : at + 8], SPEAKING[0])
