"""Whole training runs under a pipeline: the trainer, its data and its guards do what they do in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bounds import CURVE
from tests.parallel.harness import run
from tests.parallel.training import Job, Said, lines, make, runs, same


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("ground"), "qwen2.5-vl")


def test_only_the_first_stage_decodes_and_all_know_what_is_broken(ground):
    jobs = [Job("plain")]
    ((one,),) = run(1, runs, 1, ground, jobs)
    (first,), (second,) = run(2, runs, 2, ground, jobs)
    assert first == one and first.decoded > 0 and not first.error
    assert second.decoded == 0
    found = same(ground, "plain")
    assert found[-1]["samples"] % 16 != 0, "the broken sample was met, and not counted"


# ---- the rest of a run ----------------------------------------------------------------------------------------------

LORA = ("model.lora={rank: 2, targets: [q_proj, down_proj]}", "optim.lr=0.01")


@pytest.fixture(scope="module")
def done(ground) -> dict[str, tuple[list[Said], list[Said]]]:
    """Jobs in one process and on two stages, each world made once: name -> what its ranks said."""
    validation = f"data.validation=[{{path: {ground / 'validation.json'}}}]"
    jobs = [
        Job("per_sample", ("train.loss=per_sample",)),
        Job("per_micro_batch", ("train.loss=per_micro_batch",)),
        Job("evaluated", ("evaluate.every=2", validation)),
        Job("spikes", ("train.guard.spike=1.01", "train.steps=8", "optim.lr=1e-6")),
        Job("half", ("train.precision=fp16", "train.steps=6"), scale=2.0**17),
        Job("diverging", ("optim.lr=1e30",)),
        Job("lora", (*LORA, "train.steps=6")),
    ]
    one, two = run(1, runs, 1, ground, jobs), run(2, runs, 2, ground, jobs)
    return {job.name: ([of[at] for of in one], [of[at] for of in two]) for at, job in enumerate(jobs)}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["per_sample", "per_micro_batch"])
def test_weightings_of_the_loss(done, ground, loss):
    found = same(ground, loss)
    assert found[0]["loss"] != pytest.approx(lines(ground, "evaluated-2")[0]["loss"], rel=CURVE), (
        "not per token"
    )


@pytest.mark.slow
def test_validation_while_it_trains(done, ground):
    found = same(ground, "evaluated")
    assert [line["step"] for line in found if "validation/loss" in line] == [2, 4]


@pytest.mark.slow
def test_spikes_are_skipped_on_every_stage_alike(done, ground):
    skipped = [line["skipped"] for line in same(ground, "spikes")]
    assert True in skipped and False in skipped


@pytest.mark.slow
def test_a_scaled_loss_overflows_and_comes_down_alike(done, ground):
    found = same(ground, "half", rel=0.02, keys=("loss_scale",))
    assert found[0]["skipped"] and not found[-1]["skipped"] and found[-1]["loss_scale"] < 2.0**17


@pytest.mark.slow
def test_what_is_no_number_stops_every_stage(done):
    (one,), stages = done["diverging"]
    assert one.error.startswith("Step ") and "nan" in one.error
    assert [said.error for said in stages] == [one.error] * 2


@pytest.mark.slow
def test_adapters_resume_across_pipelines_and_their_run_is_used_like_any(done, ground):
    """PP 2, then one process, then a V of stages: one curve; exported, asked and evaluated as a run of one process is."""
    from polymodal.core.sample import Message
    from polymodal.evaluate.run import evaluate
    from polymodal.generate.engine import Sampling
    from polymodal.generate.opening import open_engine
    from polymodal.train.export import export

    place = f"checkpoint.dir={ground / 'resumed'}"
    v = ("parallel.pp=2", "parallel.pp_schedule=ZBVZeroBubble")
    for world, steps, more in ((2, 2, ()), (1, 4, ()), (2, 6, v)):
        said = run(
            world, runs, world, ground, [Job("resumed", (*LORA, f"train.steps={steps}", place, *more))]
        )
        assert not any(of[0].error for of in said)
    straight, resumed = lines(ground, "lora-1"), lines(ground, "resumed")
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in straight], rel=CURVE)
    same(ground, "lora")
    adapter = export(str(ground / "resumed"), str(ground / "adapter"))
    merged = export(str(ground / "lora-2"), str(ground / "merged"), merge_lora=True)
    assert (adapter.what, merged.what) == ("adapter", "merged")
    asked, short = (Message("user", ("Say number 3.",)),), Sampling(max_new_tokens=6)
    engines = [
        open_engine(ground / name, device="cpu") for name in ("resumed", "adapter", "merged", "lora-1")
    ]
    (answer,) = {engine.answer(asked, short).text for engine in engines}
    assert open_engine(ground / "model", device="cpu").answer(asked, short).text != answer
    row = {"id": "a", "question": "Say number 3.", "answer": answer}
    assert evaluate(engines[0], [row], "exact", max_new_tokens=6).score == 1
