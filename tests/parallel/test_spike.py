"""The contracts together, on toy sizes of the real classes, each case equal to one process in loss and gradients.

Qwen3-VL with LoRA on PP 2 x FSDP 2, a tied Qwen2-VL on PP 2, and a DPO step with two kinds of reference. Errors are
relative: of the loss, and the L2 norm of the worst parameter's gradient. 1e-9 in float64, 1e-4 in float32.
"""

from typing import Any

import pytest
import torch

from tests.bounds import EXACT
from tests.parallel.harness import run
from tests.parallel.spike import pipelines, worlds

SINGLE = 1e-4


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run(4, worlds.four)


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run(2, worlds.two)


@pytest.mark.parametrize("adapters", ["language", "both"])
def test_qwen3_vl_with_lora_on_pipeline_and_fsdp(four, adapters):
    ranks = [results[f"qwen3_{adapters}"] for results in four]
    for result in ranks:
        assert max(result["loss"]) < SINGLE, result["loss"]
        for error, name in result["grad"]:
            assert error < SINGLE, f"{name}: {error}"
    assert ranks[0]["carry"] == {
        "hidden_states": ((1, 19, 32), "torch.float32"),
        "deepstack": ((2, 4, 32), "torch.float32"),
        "position_ids": ((4, 1, 19), "torch.int64"),
    }
    assert len(set(ranks[0]["lengths"])) == 3, "packs of a step differ in length"
    trained = {name for result in ranks for name in result["trained"]}
    assert trained and all("lora_" in name for name in trained), "the base is frozen"
    assert any("visual" in name for name in trained) == (adapters == "both")
    assert not ranks[0]["unmoved"], "every adapter has a gradient, so that each is compared"


def test_a_stage_keeps_the_names_of_the_whole_model(four):
    ranks = [results["qwen3_language"] for results in four]
    assert all(set(result["names"]) < set(result["all"]) for result in ranks)
    assert set().union(*(result["names"] for result in ranks)) == set(ranks[0]["all"])
    first, last = set(ranks[0]["names"]), set(ranks[-1]["names"])
    assert not first & last
    assert "lm_head.weight" in last and any(name.startswith("model.visual.") for name in first)


def _check_tied(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["loss"] < EXACT
        assert result["grad"] < EXACT
    assert max(result["before"] for result in ranks) > 0.1, "each copy alone has a part of the gradient"
    copies = [copy for result in ranks for copy in result["copies"]]
    assert len(copies) == 2
    assert torch.equal(*copies), "the copies stay equal after a step"
    assert float((copies[0] - ranks[0]["start"]).abs().max()) > 0.05, "and the step moved them"
    assert [name for result in ranks for name in result["unowned"]] == ["lm_head.weight"]


def test_tied_qwen2_vl_on_a_pipeline(two):
    ranks = [results["qwen2"] for results in two]
    _check_tied(ranks)
    assert [result["layers"] for result in ranks] == [[0, 1], [2]]


@pytest.mark.parametrize("reference", ["adapters_off", "frozen"])
def test_dpo_with_a_reference_on_fsdp(two, reference):
    ranks = [results["dpo"] for results in two]
    for result in ranks:
        error, name = result[reference]["grad"]
        assert result[reference]["loss"] < EXACT
        assert error < EXACT, f"{name}: {error}"
    assert [pair for result in ranks for pairs in result["pairs"] for pair in pairs] == [(0, 1)] * 3
    assert ranks[0]["neutral"] == pytest.approx(0.6931471805599453)
    assert abs(ranks[0]["value"] - ranks[0]["neutral"]) > 1e-3, "the policy differs from its reference"


@pytest.mark.nightly
@pytest.mark.parametrize(
    "schedule, stages",
    [("GPipe", 2), ("Interleaved1F1B", 4), ("InterleavedZeroBubble", 4), ("ZBVZeroBubble", 4)],
)
def test_tied_qwen2_vl_under_every_schedule(schedule, stages):
    _check_tied(run(2, pipelines.qwen2_tied_pp, schedule, stages))
