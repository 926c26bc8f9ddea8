"""The dry pass: every refusal at once, and figures that a real layout and a real index give."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from polymodal import recipe
from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models import catalog
from polymodal.plan import estimate, pretended
from polymodal.plan.shape import shape_of
from polymodal.tools import preflight, preflight_report
from polymodal.train.layouts import layout_of
from polymodal.train.layouts.base import histogram
from polymodal.train.parallel_model import meta_model
from tests.models import tiny


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A tiny checkpoint, and 40 rows of which one names a picture that is not there and some are long."""
    root = tmp_path_factory.mktemp("check")
    tiny.checkpoint("qwen2.5-vl", root / "model")
    (root / "images").mkdir()
    rows = []
    for i in range(40):
        row = {
            "messages": [
                {"role": "user", "content": f"number {i}"},
                {"role": "assistant", "content": "It is. " * (1 + i % 5) * (20 if i % 10 == 9 else 1)},
            ]
        }
        if i % 4 == 1:
            tiny.picture(24, 24 + 8 * (i % 3), i).save(root / "images" / f"{i}.png")
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
            row["images"] = [f"images/{i}.png"]
        rows.append(row)
    rows[6]["messages"][0]["content"] = "<image>what is it?"
    rows[6]["images"] = ["images/absent.png"]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def make(ground, tmp_path):
    def made(*overrides: str) -> recipe.Recipe:
        data = {
            "model": {"source": str(ground / "model")},
            "data": {
                "datasets": [{"path": str(ground / "train.jsonl")}],
                "max_length": 128,
                "cache_dir": str(ground / "cache"),
                "on_error": "skip",
            },
            "train": {"global_batch_size": 4, "epochs": 2.5},
            "checkpoint": {"dir": str(tmp_path / "run")},
            "monitor": {"trackers": []},
        }
        for text in overrides:
            recipe.file.override(data, {}, text)
        return recipe.validate(data)

    return made


def test_the_data_are_counted_as_training_would(make):
    from polymodal.data.chat import ChatProcessor
    from polymodal.data.index import build_index
    from polymodal.data.source import open_corpus

    r = make()
    report = preflight.check(r, 2)
    assert report.problems == [] and report.data is not None
    facts = report.data
    family = catalog.family(r.model)
    corpus = open_corpus(r.data.datasets, r.data.attr)
    index = build_index(corpus, ChatProcessor(family.media_processor(r.data), r.data), r.data)
    assert facts.rows == 40 and facts.usable == int(index.usable.sum()) < 40
    assert (
        facts.tokens == int(index.tokens[index.usable].sum())
        and facts.media["vision"] == int(index.media["vision"][index.usable].sum()) > 0
    )
    assert sum(found["count"] for found in facts.dropped.values()) == 40 - facts.usable
    broken = next(found for reason, found in facts.dropped.items() if "absent.png" in reason)
    assert broken == {"count": 1, "first": [corpus.where(6)]}
    assert sum(n for _, _, n in facts.histogram) == 39 and facts.histogram[-1][0] == 129
    assert 0.5 < facts.fill <= 1 and report.steps == facts.steps_per_epoch * 2 + -(
        -facts.steps_per_epoch // 2
    )


def test_broken_and_long_records_are_problems_when_the_recipe_makes_them(make):
    report = preflight.check(make("data.on_error=fail"), 1)
    (problem,) = report.problems
    assert "train.jsonl, line 7" in problem and "absent.png" in problem
    assert report.data is not None and report.data.usable > 0, "the rest is still measured"
    problems = preflight.check(make("data.overlong=error"), 1).problems
    assert len(problems) == 1 and "more than data.max_length = 128" in problems[0]


def test_every_problem_is_listed_not_only_the_first(make, tmp_path):
    r = make(
        "parallel.tp=3", "data.datasets.0.path=nowhere.json", "data.datasets.0.media_dir=/no/such", "data.chat_template=/no/such.jinja",
        "model.lora.towers=[visionn]", "monitor.trackers=[mlflow]", "device.env={TASK_QUEUE_ENABLED: 1}", "data.pack_length=64",
        "checkpoint.resume=/no/such/run", "checkpoint.init_from=/no/such/weights",
    )  # fmt: skip
    with pytest.raises(PolymodalError) as caught:
        preflight.refuse(r, 3)
    said = str(caught.value)
    for words in (
        "parallel.tp = 3 does not divide text_config.num_attention_heads = 4", "data.datasets.0.path = nowhere.json", "data.datasets.0.media_dir = /no/such",
        "data.chat_template = /no/such.jinja", "no tower `visionn`", "mlflow, which is not installed", "Did you mean TASK_QUEUE_ENABLE?",
        "data.pack_length = 64 is smaller", "/no/such/run is neither a checkpoint", "/no/such/weights is neither a checkpoint",
    ):  # fmt: skip
        assert words in said, words
    lines = said.splitlines()
    assert lines[0] == f"{len(lines) - 1} problems:" and [line.split(".")[0] for line in lines[1:]] == [
        str(i) for i in range(1, len(lines))
    ]


def test_a_step_of_a_run_is_no_foreign_checkpoint(make, tmp_path, monkeypatch):
    from polymodal.convert import recognise
    from polymodal.models import storage

    step = tmp_path / "other" / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    (step / ".metadata").touch()  # a DCP directory, as those of other systems are
    monkeypatch.setattr(storage, "READERS", [recognise.reader])
    assert preflight.refuse(make(f"checkpoint.init_from={step}"), 1) is None


@pytest.mark.parametrize(
    "override, world, words",
    [
        ("parallel.tp=2", 3, "3 processes cannot be divided by"),
        ("parallel.pp=4 train.global_batch_size=3", 4, "1F1B needs at least 4 micro-batches a rank"),
        (
            "parallel.pp=2 parallel.pp_schedule=ZBVZeroBubble parallel.compile=true",
            2,
            "which compiled blocks give only together",
        ),
        (
            "parallel.pp=2 parallel.pp_schedule=Interleaved1F1B parallel.reshard_after_forward=true",
            2,
            "reshard_after_forward = true is not for it",
        ),
        ("parallel.cp=4 parallel.ulysses=3", 4, "parallel.ulysses = 3 does not divide parallel.cp = 4"),
        ("parallel.cp=8 parallel.ulysses=8", 8, "is more than the 4 attention heads of a rank"),
        ("parallel.ulysses=2", 2, "parallel.ulysses = 2 does not divide parallel.cp = 1"),
        ("parallel.replicate=[visoin]", 2, "has no tower `visoin`"),
        ("parallel.cp=2 model.attention=sdpa", 2, "which model.attention = sdpa cannot follow"),
        ("model.source=/no/such/model", 1, "neither a directory nor a hub id nor a known model"),
        ("monitor.profile.ranks=[0,2]", 2, "monitor.profile.ranks names 2, and there are ranks 0 to 1."),
        ("data.datasets=[]", 1, "The recipe has no data.datasets."),
        ("model.config.text_config.num_hidden_layer=2", 1, "Did you mean `text_config.num_hidden_layers`?"),
    ],
)
def test_one_problem_is_itself(make, override, world, words):
    with pytest.raises(PolymodalError) as caught:
        preflight.refuse(make(*override.split()), world)
    assert words in str(caught.value) and "problems:" not in str(caught.value)


def test_an_output_that_cannot_be_written(make, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match="cannot be written"):
        preflight.refuse(make(f"checkpoint.dir={tmp_path}/file/run"), 1)


def test_problems_of_the_model_itself(make):
    assert (
        "train.freeze: `visoin` is neither a tower"
        in preflight.check(make("train.freeze=[visoin]"), 1, measure_data=False).problems[0]
    )
    assert (
        "leaves nothing to train"
        in preflight.check(
            make("train.freeze=[vision, projector, language]"), 1, measure_data=False
        ).problems[0]
    )
    report = preflight.check(make("optim.groups=[{match: visoin, lr: 1e-5}]"), 1, measure_data=False)
    assert report.problems == [] and "optim.groups.0.match = visoin is neither a tower" in report.notes[0]
    report = preflight.check(
        make("optim.groups=[{match: vision, lr: 1e-5}]", "train.freeze=[vision]"), 1, measure_data=False
    )
    assert "matches only frozen parameters" in report.notes[0]


def test_too_few_batches_for_the_ranks_is_a_note(make):
    assert "some idle in every step" in preflight.check(make(), 8, measure_data=False).notes[0]


# ---- memory -------------------------------------------------------------------------------------------------------


def held(r: recipe.Recipe, world: int, patches: float = 0.5) -> estimate.Estimate:
    family = catalog.family(r.model)
    shape = shape_of(family, meta_model(family, r))
    load = estimate.workload(layout_of(r, family), {"vision": patches})
    return estimate.Formula(shape, r, ParallelSizes.of(r.parallel, world), load, True).memory()


def test_one_process_holds_the_whole_model(make):
    r = make("train.precision=fp32")
    found = held(r, 1)
    count = sum(p.numel() for p in catalog.family(r.model).build().parameters())
    assert found.total == found.trained == count == sum(total for total, _ in found.towers.values())
    assert (found.parameters, found.gradients, found.optimizer, found.gathered) == (
        4 * count,
        4 * count,
        8 * count,
        0,
    )
    assert found.checkpoint == 12 * count


@pytest.mark.parametrize(
    "override, world", [("parallel.tp=1", 4), ("parallel.dp_replicate=2", 4), ("parallel.tp=2", 4)]
)
def test_ranks_share_what_is_sharded(make, override, world):
    r = make("train.precision=fp32", override)
    whole, part = held(make("train.precision=fp32"), 1), held(r, world)
    shares = world // r.parallel.dp_replicate
    assert whole.total == part.total
    uncut = 0.02 if r.parallel.tp > 1 else 1e-6  # norms are whole on every rank of a tp group
    assert part.parameters == pytest.approx(whole.parameters / shares, rel=uncut)
    assert part.optimizer == pytest.approx(2 * part.parameters, rel=1e-6) and part.gathered > 0


def test_a_replicated_tower_is_not_shared(make):
    plain, copied = (
        held(make("train.precision=fp32"), 4),
        held(make("train.precision=fp32", "parallel.replicate=[vision]"), 4),
    )
    vision = plain.towers["vision"][0]
    assert copied.parameters - plain.parameters == pytest.approx(vision * 4 * 3 / 4, abs=2)
    assert copied.optimizer - plain.optimizer == pytest.approx(vision * 8 * 3 / 4, abs=2)


def test_the_fullest_stage_is_estimated(make):
    whole, cut = held(make("train.precision=fp32"), 1), held(make("train.precision=fp32", "parallel.pp=2"), 2)
    assert whole.total == cut.total and whole.checkpoint == cut.checkpoint
    assert 0.4 * whole.parameters < cut.parameters < 0.7 * whole.parameters
    long = ("data.max_length=100000", "parallel.pp=2")
    one, two = held(make(long[0]), 1), held(make(*long), 2)
    assert two.activations == pytest.approx(one.activations, rel=0.1), "two micro-batches of half the layers"
    assert "2 x 100000 tokens" in two.assumed


def test_frozen_parameters_have_no_gradients_and_half_the_width(make):
    found = held(make("train.freeze=[vision, language]", "train.precision=bf16"), 1)
    assert found.towers["vision"][1] == 0 and found.towers["projector"][0] == found.trained
    frozen = found.total - found.trained
    assert found.gradients == 4 * found.trained and found.parameters == 4 * found.trained + 2 * frozen


def test_an_average_and_muon_are_counted(make):
    plain = held(make("train.precision=fp32"), 1)
    muon = held(make("train.precision=fp32", "optim.name=muon", "train.ema=0.99"), 1)
    assert muon.average == 4 * muon.total and plain.average == 0
    assert plain.optimizer / 2 < muon.optimizer < plain.optimizer


def test_the_copy_that_a_background_save_makes_is_counted(make):
    plain = held(make("train.precision=fp32", "train.ema=0.99"), 1)
    assert plain.saving == plain.checkpoint == 16 * plain.total, "parameters, two moments, average"
    assert held(make("train.precision=fp32", "checkpoint.save=weights"), 1).saving == 4 * plain.total
    assert held(make("checkpoint.asynchronous=false"), 1).saving == 0
    part = held(make("train.precision=fp32", "train.ema=0.99", "parallel.tp=2"), 4)
    assert part.saving == part.parameters + part.optimizer + part.average < 0.4 * plain.saving
    adapters = held(make("model.lora.rank=2"), 1)
    assert adapters.saving == 12 * adapters.trained < plain.saving / 4


def test_recompute_and_cutting_lower_the_activations(make):
    def kept(*overrides: str) -> int:
        return held(
            make("data.max_length=100000", *overrides), 2 if "parallel.tp=2" in overrides else 1
        ).activations

    assert kept("parallel.recompute=full") < kept("parallel.recompute=selective") < kept()
    assert kept("parallel.tp=2") < kept() and kept() > 5 * kept("data.max_length=10000")


def test_a_layout_is_tried_on_meta_and_refused_like_in_training(make):
    r = make("parallel.recompute=full", "parallel.recompute_blocks=[model.nothing.*]")
    family = catalog.family(r.model)
    with pytest.raises(PolymodalError, match=r"no module of this model fits `model.nothing.\*`"):
        pretended.try_layout(family, r, 2)
    assert not torch.distributed.is_initialized()


def test_the_estimate_leaves_no_group_behind(make):
    r = make()
    family = catalog.family(r.model)
    pretended.try_layout(family, r, 4)
    assert not torch.distributed.is_initialized()
    with pytest.raises(ZeroDivisionError), pretended.pretended_group(4):
        assert torch.distributed.get_world_size() == 4
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()


def test_a_disk_that_is_too_small_for_the_checkpoints(make, monkeypatch):
    from polymodal.runtime import host

    monkeypatch.setattr(host, "space", lambda path: host.Space(str(path), 1 << 40, 1 << 20))
    monkeypatch.setattr(host, "require_writable", lambda *_: None)
    (problem,) = preflight.check(make(), 1, measure_data=False).problems
    assert (
        problem.startswith("Checkpoints of this run take up to ")
        and "2 kept and one being written" in problem
    )


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_page_fits_80_columns(make, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert preflight_report.main(make(), 2) == 0
    out = capsys.readouterr().out
    for words in (
        "parameters",
        "dp_shard 2",
        "40, ",
        "left out",
        "absent.png",
        "(for 128 tokens",
        "one checkpoint",
        "train would start.",
    ):
        assert words in out, words
    assert max(len(line) for line in out.splitlines() if os.sep not in line) <= 80


def test_refusals_end_the_command_with_all_of_them(make, capsys):
    with pytest.raises(PolymodalError) as caught:
        preflight_report.main(make("data.on_error=fail", "parallel.pp=2", "train.global_batch_size=1"), 2)
    lines = str(caught.value).splitlines()
    assert (
        lines[0] == "this recipe would not train, for 2 reasons:"
        and lines[1].startswith("1. ")
        and lines[2].startswith("2. ")
    )
    assert "left out" in capsys.readouterr().out, "what can be said is said all the same"


def test_json(make, capsys):
    assert preflight_report.main(make(), 2, measure=False, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert (
        said["ok"]
        and said["sizes"]["dp_shard"] == 2
        and said["estimate"]["memory"] > 0
        and said["data"] is None
    )
    assert (
        preflight_report.main(
            make("parallel.pp=2", "parallel.pp_layers={language: [1, 3]}"), 2, measure=False, as_json=True
        )
        == 2
    )
    assert "adds up to 4" in json.loads(capsys.readouterr().out)["problems"][0]


def test_histogram():
    assert histogram([1, 5, 10, 11, 50, 100, 101, 300], 100) == [
        (1, 10, 3), (11, 20, 1), (21, 30, 0), (31, 40, 0), (41, 50, 1), (51, 60, 0), (61, 70, 0), (71, 80, 0), (81, 90, 0), (91, 100, 1), (101, 300, 2),
    ]  # fmt: skip
