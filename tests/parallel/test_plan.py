"""Predicted peaks against what an allocator counts in real processes: rows of the table of docs/plan.md.

Every way of laying out, of saving memory and of computing is in one row here; `python -m tests.parallel.calibration`
measures all of them.
"""

from __future__ import annotations

import pytest

from polymodal import recipe as recipes
from polymodal.plan import devices, estimate, planner, pretended, search
from polymodal.train.layouts import layout_of
from tests.models import tiny
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


# ---- the formulas against traces ----------------------------------------------------------------------------------------

FORMULA_BOUND = 0.15
"""Memory and time by the formulas of plan/estimate.py against traces, with a published model's widths."""

FORMULA_CASES = [
    ({}, {}),
    ({"recompute": "selective"}, {}),
    ({"recompute": "full"}, {}),
    ({"tp": 4}, {}),
    ({"tp": 4, "recompute": "full"}, {}),
    ({"cp": 2}, {}),
    ({"dp_replicate": 2, "recompute": "full"}, {}),
    ({}, {"lora": {"rank": 16, "towers": ["language"]}}),
    ({"recompute": "full"}, {"lora": {"rank": 16, "towers": ["language"]}}),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """Qwen2.5-VL with the widths of 7B and four layers of each tower, as a config alone."""
    directory = tmp_path_factory.mktemp("wide")
    text = {
        "hidden_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    }
    text |= {
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = tiny.config(
        "qwen2.5-vl", **{f"text_config__{k}": v for k, v in text.items()}, **{f"vision_config__{k}": v for k, v in vision.items()}
    )  # fmt: skip
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    "parallel, model",
    [pytest.param(*case, marks=() if i == 2 else pytest.mark.slow) for i, case in enumerate(FORMULA_CASES)],
    ids=lambda part: " ".join(f"{k}={v}" for k, v in part.items()) or "plain",
)
def test_the_formulas_are_near_the_traces(wide, parallel, model):
    made = recipes.validate({
        "model": {"source": wide, **model}, "data": {"max_length": 4096}, "parallel": parallel, "train": {"global_batch_size": 32},
    })  # fmt: skip
    family = planner.family_of(made)
    traced = planner.plan(made, family, planner.Question(8, devices.named("h100")))
    shape = estimate.shape_of(family, pretended.meta_model(family, made))
    load = layout_of(made, family).workload(0.25, 1024)
    (found,) = search.ranked(
        [(made, traced.sizes)],
        shape,
        lambda _: load,
        traced.accelerator,
        True,
    )
    assert found.memory == pytest.approx(traced.peak, rel=FORMULA_BOUND)
    assert found.seconds == pytest.approx(traced.step, rel=FORMULA_BOUND)
    assert found.mfu == pytest.approx(traced.mfu, rel=FORMULA_BOUND)
