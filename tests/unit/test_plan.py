"""`plan`: what is traced equals what is known exactly, timelines have the bubbles of the literature, mistakes are sentences."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.distributed.mesh import ParallelSizes
from polymodal.models.family import Family
from polymodal.parallel import pipeline_split
from polymodal.plan import accelerators, command, page, planner, search, timeline
from polymodal.plan.predict import Prediction
from polymodal.plan.tracker import Tracker
from polymodal.train import optim
from polymodal.train.parallel_model import meta_model
from tests.models import tiny

CLUSTER = accelerators.named("h100")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny model's config.json, and nothing else."""
    directory = tmp_path_factory.mktemp("plan")
    config = tiny.config("qwen2.5-vl", text_config__num_hidden_layers=2, vision_config__depth=2, vision_config__fullatt_block_indexes=[1])  # fmt: skip
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)
    return directory


def recipe(source: Path, **parallel) -> recipes.Recipe:
    return recipes.validate({
        "name": "p", "model": {"source": str(source)}, "data": {"max_length": 512}, "parallel": parallel,
        "train": {"global_batch_size": 8},
    })  # fmt: skip


def planned(source: Path, world: int, accelerator=CLUSTER, **parallel) -> Prediction:
    made = recipe(source, **parallel)
    return planner.plan(made, planner.family_of(made), planner.Question(world, accelerator, 0.25, 256))


@pytest.fixture(scope="module")
def four(source) -> Prediction:
    return planned(source, 4)


@pytest.fixture(scope="module")
def parameters(source) -> int:
    made = planner.family_of(recipe(source)).build()
    return sum(parameter.numel() for parameter in made.parameters())


def test_states_are_counted_to_the_byte(four, parameters):
    (stage,) = four.stages
    held = stage.trace.usage.end
    rotary = 128  # buffers that every rank has whole
    assert parameters * 4 / 4 <= held["parameters"] <= parameters * 4 / 4 + rotary, (
        "float32 masters, cut in four"
    )
    assert parameters * 8 / 4 <= held["optimizer"] <= parameters * 8 / 4 + 1000, (
        "two moments and step counters"
    )
    assert held["gradients"] == held["activations"] == 0, "an optimizer step leaves nothing behind"
    assert stage.trace.usage.parts["gradients"] <= parameters * 4 / 4
    assert stage.trace.usage.peak == sum(stage.trace.usage.parts.values())


def test_the_copy_that_a_background_save_makes_is_counted(four, source, parameters):
    """Parameters and two moments, and a step counter each."""
    assert four.saving == pytest.approx(parameters * 12 / 4, rel=0.01)
    assert "host, saving" in command.text(four) and four.as_dict()["saving_bytes"] == four.saving
    family = planner.family_of(recipe(source))

    def saved(**keys) -> Prediction:
        made = recipes.validate({**recipe(source).model_dump(mode="json"), "checkpoint": keys})
        return planner.plan(made, family, planner.Question(4, CLUSTER, 0.25, 256))

    assert saved(save="weights").saving == pytest.approx(parameters * 4 / 4, rel=0.01)
    waiting = saved(asynchronous=False)
    assert waiting.saving == 0 and "host, saving" not in command.text(waiting)


def test_a_replicated_tower_is_whole_on_every_rank(four, source):
    family = planner.family_of(recipe(source))
    named = family.build().named_parameters()
    vision = sum(p.numel() for name, p in named if optim.tower_of(name, family.card.towers) == "vision")
    made = planned(source, 4, replicate=["vision"])
    plain, copied = (each.stages[0].trace.usage.end for each in (four, made))
    assert copied["parameters"] - plain["parameters"] == pytest.approx(vision * 4 * 3 / 4, rel=0.01)
    assert copied["optimizer"] - plain["optimizer"] == pytest.approx(vision * 8 * 3 / 4, rel=0.01)


def test_frozen_towers_and_adapters_make_fewer_passes(four, source):
    """MFU counts the passes that training makes, as a run's own does."""
    data = recipe(source).model_dump(mode="json")
    made = recipes.validate({**data, "model": {**data["model"], "lora": {"rank": 4}}})
    family = planner.family_of(made)
    adapters = planner.plan(made, family, planner.Question(4, CLUSTER, 0.25, 256))
    assert four.stages[0].trace.passes == pytest.approx(3.0)
    trace = adapters.stages[0].trace
    assert trace.passes == pytest.approx(
        pipeline_split.training_passes(meta_model(family, made), family, trace.load.measure)
    )
    assert 1.8 < trace.passes < 2.3
    flops = trace.passes * family.cost(trace.load.measure) * made.train.global_batch_size
    assert adapters.mfu == pytest.approx(flops / (adapters.step * 4 * CLUSTER.half_flops))


def test_arithmetic_is_what_the_family_says(four, source):
    (stage,) = four.stages
    counted = stage.trace.flops("forward") + stage.trace.flops("backward")
    said = 3 * planner.family_of(recipe(source)).cost(stage.trace.load.measure)
    assert counted == pytest.approx(said, rel=0.08)


def test_collectives_move_the_parameters_and_no_more(four, parameters, source):
    moved = {(t.kind, t.where): t for t in four.stages[0].trace.traffic if t.axes == "dp_shard"}
    family = planner.family_of(recipe(source))
    named = family.build().named_parameters()
    blocks = sum(p.numel() for n, p in named if any(part in n for part in (".blocks.", ".layers.")))
    assert moved["all_gather", "forward"].bytes == pytest.approx(parameters * 2, rel=0.01), "in bfloat16"
    assert moved["all_gather", "backward"].bytes == pytest.approx(blocks * 2, rel=0.01), (
        "the root is still whole"
    )
    assert moved["reduce_scatter", "backward"].bytes == pytest.approx(parameters * 4, rel=0.01), "in float32"
    assert all(t.ranks == (0, 1, 2, 3) for t in moved.values())


def test_recompute_and_tensor_parallelism_cut_activations(four, source):
    full = planned(source, 4, recompute="full").stages[0].trace
    assert full.usage.parts["activations"] < 0.4 * four.stages[0].trace.usage.parts["activations"]
    assert full.flops("backward") > 1.3 * four.stages[0].trace.flops("backward"), "the forward runs again"
    cut = planned(source, 4, tp=2).stages[0].trace
    assert cut.usage.parts["activations"] < 0.7 * four.stages[0].trace.usage.parts["activations"]
    assert {t.axes for t in cut.traffic} >= {"tp", "dp_shard"}


def test_a_pipeline_is_traced_stage_by_stage(source, parameters):
    made = planned(source, 4, pp=2)
    first, last = made.stages
    held = [stage.trace.usage.end["parameters"] * 2 for stage in made.stages]
    assert sum(held) == pytest.approx(parameters * 4, rel=0.01) and min(held) > 0, "each layer in one stage"
    for stage in (first, last):
        hops = [t for t in stage.trace.traffic if t.axes == "pp" and t.kind == "send"]
        assert hops and hops[0].bytes == 512 * 64 * 2, "hidden states in bfloat16, and their gradients back"
    assert made.timeline is not None and 0 < made.bubble < 1
    with pytest.raises(PolymodalError, match="micro-batches"):
        few = recipes.validate(
            {**recipe(source, pp=2).model_dump(mode="json"), "train": {"global_batch_size": 2}}
        )
        planner.plan(few, planner.family_of(few), planner.Question(4, CLUSTER))


def test_work_is_what_operators_read_write_and_multiply():
    """Of a gather and a scatter the rows that are named, of an allocation nothing, of experts their own rows."""
    table, row, ones = torch.zeros(1000, 8), torch.tensor([3]), torch.ones(1, 8)
    index = torch.ones(2, 8, dtype=torch.int64)
    tokens, weights = torch.zeros(6, 16), torch.zeros(3, 16, 16)
    with Tracker() as tracker:
        torch.empty(1000, 8)
        table.gather(0, index)
        table.index_add_(0, row, ones)
        for last in (6, 4):
            torch._grouped_mm(tokens, weights, offs=torch.tensor([1, 2, last], dtype=torch.int32))
    operators = [(flops, touched) for _, _, _, flops, touched in tracker.work]
    assert (0.0, index.nbytes + 2 * 2 * 8 * 4) in operators and (0.0, 2 * (8 + 8 * 4)) in operators
    assert max(touched for flops, touched in operators if not flops) < table.nbytes
    assert sorted(flops for flops, _ in operators if flops) == [2 * 4 * 16 * 16, 2 * 6 * 16 * 16]


def test_what_does_not_fit_is_reported_with_what_to_change(source):
    small = replace(CLUSTER, memory=four_bytes(planned(source, 1)))
    made = planned(source, 1, small)
    assert not made.fits
    said = " ".join(made.advice)
    assert "more than the device can give" in said and "parallel.recompute: full" in said
    assert "does NOT fit" in command.text(made)


def four_bytes(made: Prediction) -> float:
    return made.peak * 0.9


def test_json_holds_every_figure(four):
    read = json.loads(json.dumps(four.as_dict()))
    assert read["fits"] is True and read["stages"][0]["collectives"] and read["step_seconds"] > 0
    assert 0 < read["mfu"] < 1 and read["peak_bytes"] == four.peak


@pytest.mark.parametrize("micro", [4, 12])
def test_gpipe_and_1f1b_have_the_known_bubble(micro):
    """(p - 1) / (m + p - 1), Narayanan et al. 2021, section 2.2."""
    for schedule in ("GPipe", "1F1B"):
        made = timeline.play(schedule, 4, micro, [1.0] * 4, [2.0] * 4)
        assert made.bubble == pytest.approx(3 / (micro + 3))
        assert made.seconds == pytest.approx(3.0 * (micro + 3))


def test_virtual_stages_and_parted_backwards_shrink_the_bubble():
    plain = timeline.play("1F1B", 4, 8, [1.0] * 4, [2.0] * 4)
    virtual = timeline.play("Interleaved1F1B", 4, 8, [0.5] * 8, [1.0] * 8)
    parted = timeline.play("ZBVZeroBubble", 4, 8, [0.5] * 8, [1.0] * 8)
    assert virtual.bubble == pytest.approx(3 / (2 * 8 + 3)), "(p - 1) / (v m + p - 1)"
    assert parted.bubble < virtual.bubble < plain.bubble
    for made in (virtual, parted):
        assert sum(slot.end - slot.start for slot in made.slots) == pytest.approx(4 * 8 * 3.0)
        by_rank = {}
        for slot in sorted(made.slots, key=lambda slot: slot.start):
            assert slot.start >= by_rank.get(slot.rank, 0.0) - 1e-9, "a rank does one thing at a time"
            by_rank[slot.rank] = slot.end


def test_an_uneven_stage_delays_the_other_stages():
    assert timeline.play("1F1B", 2, 8, [1.0, 3.0], [2.0, 6.0]).bubble > 0.3


def test_collectives_cost_their_ring():
    within, across = tuple(range(8)), tuple(range(0, 64, 8))
    speed = CLUSTER.link * CLUSTER.wire
    assert accelerators.transfer(CLUSTER, "all_gather", within, 8e9) == pytest.approx(
        7 / 8 * 8e9 / speed, rel=1e-2
    )
    assert accelerators.transfer(CLUSTER, "all_reduce", within, 8e9) == pytest.approx(
        14 / 8 * 8e9 / speed, rel=1e-2
    )
    slow = accelerators.transfer(CLUSTER, "all_gather", across, 8e9)
    assert slow == pytest.approx(7 / 8 * 8e9 / (CLUSTER.network * CLUSTER.wire), rel=1e-2)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rank": 4}, "--rank 4 is outside 0..3"),
        ({"stage": 1}, "--stage 1 is outside 0..0 (parallel.pp = 1)"),
        ({"media": 1.5}, "--media 1.5 is no share of tokens"),
        ({"world": 3, "tp": 2}, "3 processes cannot be divided by"),
        ({"tp": 4, "world": 4}, "parallel.tp = 4 does not divide"),
    ],
)
def test_mistakes_are_one_sentence(source, change, said):
    parallel = {"tp": change.pop("tp")} if "tp" in change else {}
    made = recipe(source, **parallel)
    asked = replace(planner.Question(4, CLUSTER, 0.25, 256), **change)
    with pytest.raises(PolymodalError) as caught:
        planner.plan(made, planner.family_of(made), asked)
    assert said in str(caught.value)


@pytest.mark.parametrize("one", [{"stage": 1}, {"rank": 3}], ids=str)
def test_one_rank_of_a_pipeline_can_be_asked_alone(source, one):
    made = recipe(source, pp=2)
    family = planner.family_of(made)
    asked = planner.Question(4, CLUSTER, 0.25, 256)
    both, alone = planner.plan(made, family, asked), planner.plan(made, family, replace(asked, **one))
    (stage,) = alone.stages
    assert stage.trace.stage == 1 and stage.trace.usage.peak == both.stages[1].trace.usage.peak
    assert alone.step > 0 and "the times take the others to be like it" in command.text(alone)
    assert not any("to be like it" in sentence for sentence in both.advice)
    assert "svg" in page.page(alone)


def test_the_host_holds_what_is_offloaded(four, source):
    """Bytes leave the device and are found on the host; what moves takes time."""
    plain = four.stages[0].trace.usage
    assert four.host == 0 and not any("host" in stage.forward.exposed for stage in four.stages)
    kept = planned(source, 4, offload=["parameters"])
    on_host, on_device = kept.stages[0].trace.usage.host_parts, kept.stages[0].trace.usage.parts
    for kind in ("parameters", "optimizer", "gradients"):
        assert on_device[kind] == 0 and on_host[kind] >= plain.end[kind] * 0.99, kind
    assert kept.peak < four.peak and kept.step > four.step
    away = planned(source, 4, offload=["activations"])
    usage = away.stages[0].trace.usage
    assert usage.parts["activations"] < 0.5 * plain.parts["activations"] < usage.host
    assert away.stages[0].forward.exposed["host"] > 0 and away.stages[0].backward.exposed["host"] > 0
    states = planned(source, 4, offload=["optimizer"]).stages[0].trace.usage
    assert states.parts["optimizer"] == 0 and states.host_parts["optimizer"] == plain.end["optimizer"]
    said = command.text(away)
    assert "on the host" in said and "ranks of a node" in said


def test_what_cannot_be_planned_is_reported(source, monkeypatch):
    family = planner.family_of(recipe(source))
    monkeypatch.setattr(type(family), "example", Family.example)
    with pytest.raises(PolymodalError, match="cannot be planned: its family has no example batch"):
        planner.plan(recipe(source), family, planner.Question(4, CLUSTER))


def test_options_that_exclude_each_other_and_unknown_devices(source):
    made, asked = recipe(source), planner.Question(2, CLUSTER)
    with pytest.raises(PolymodalError, match="--search traces all stages of a layout. Leave out --rank"):
        command.main(made, replace(asked, rank=1), search=True)
    with pytest.raises(PolymodalError, match="-o names the recipe that --search writes"):
        command.main(made, asked, out=Path("best.yaml"))
    with pytest.raises(PolymodalError, match="--rank and --stage"):
        planner.Question(4, CLUSTER, rank=0, stage=0)
    with pytest.raises(PolymodalError, match="Did you mean h100"):
        accelerators.named("h10")


def test_only_layouts_that_training_takes_are_searched(source):
    made = recipe(source)
    found = list(search.candidates(made, planner.family_of(made), planner.Question(8, CLUSTER)))
    sizes = {found_sizes for _, found_sizes in found}
    assert all(s.world == 8 and s.tp in (1, 2) and s.dp <= 8 for s in sizes), "two key/value heads: tp 1 or 2"
    assert {s.cp for s in sizes} >= {1, 2} and {s.ep for s in sizes} == {1}
    assert {one.parallel.recompute for one, _ in found} == {"none", "selective", "full"}
    few = recipes.validate({**made.model_dump(mode="json"), "train": {"global_batch_size": 2}})
    assert all(
        s.dp <= 2 for _, s in search.candidates(few, planner.family_of(few), planner.Question(8, CLUSTER))
    )


@pytest.mark.slow
def test_the_best_layout_fits_and_is_written_as_a_recipe(source, tmp_path, capfd):
    file = tmp_path / "r.yaml"
    file.write_text(recipes.dump(recipe(source)))
    made = recipes.load(file)
    asked = planner.Question(2, CLUSTER, 0.25, 256)
    out = tmp_path / "best.yaml"
    page = tmp_path / "best.html"
    assert command.main(made, asked, search=True, html=page, out=out, base=file) == 0
    assert "2 x h100" in page.read_text()
    best, said = recipes.load(out), capfd.readouterr().out
    assert best.model == made.model and best.parallel.dp_shard == -1
    again = planner.plan(best, planner.family_of(best), asked)
    assert again.fits
    first = said.splitlines()[1].split()[-3:]
    assert first == [f"{again.step:.2f}", f"{again.peak / 2**30:.1f}", f"{again.mfu:.1%}"]
    assert "layouts fit" in said and len(out.read_text().splitlines()) < 15


AWKWARD = [
    {"pp": 2, "pp_layers": {"language": [1, 1]}, "zero": 2},
    {"cp": 2, "ulysses": 2, "recompute": "full", "recompute_first": 1},
    {"pp": 2, "pp_schedule": "ZBVZeroBubble", "dp_replicate": 2},
    {"compile": True, "tp": 2, "sp": False},
    {"pp": 2, "pp_virtual": 3, "pp_schedule": "Interleaved1F1B"},
]


@pytest.mark.parametrize("parallel", AWKWARD, ids=lambda parallel: " ".join(parallel))
@pytest.mark.parametrize("whole", [False, True], ids=["on its base", "whole"])
def test_the_written_recipe_is_the_layout_that_was_planned(source, tmp_path, parallel, whole):
    """Whatever the recipe said before: what a candidate does not have is taken back."""
    file = tmp_path / "r.yaml"
    file.write_text(recipes.dump(recipe(source, **parallel)))
    made = recipes.load(file)
    found = list(search.candidates(made, planner.family_of(made), planner.Question(8, CLUSTER)))
    out = tmp_path / "best.yaml"
    for one, sizes in found[:: max(1, len(found) // 12)]:
        best = search.Candidate(one, sizes, 0.0, 0.0, False)
        out.write_text(search.written(best, made, None if whole else file, tmp_path))
        read = recipes.load(out)
        assert ParallelSizes.of(read.parallel, 8) == sizes
        shard = {"dp_shard": one.parallel.dp_shard}
        assert read.parallel.model_copy(update=shard) == one.parallel and read.train == one.train


def test_layouts_with_options_that_exclude_each_other_are_no_candidates(source):
    made = recipe(source, recompute="full", recompute_first=1)
    found = list(search.candidates(made, planner.family_of(made), planner.Question(2, CLUSTER)))
    assert {one.parallel.recompute for one, _ in found} == {"selective", "full"}, "first of none says nothing"


@pytest.mark.slow
def test_when_nothing_fits_it_says_how_much_is_missing(source):
    made = recipe(source)
    asked = planner.Question(2, replace(CLUSTER, memory=2**20), 0.25, 256)
    with pytest.raises(PolymodalError, match="No layout of 2 x h100 holds this run"):
        search.rank(made, planner.family_of(made), asked)


def test_the_page_needs_no_other_file(four):
    text = page.page(four)
    assert "It fits." in text and text.count("<svg") == 2
    assert not re.search(r"(src|href)=|<script|https?://", text), "nothing from elsewhere"
    for kind in ("parameters", "optimizer", "activations"):
        assert kind in text
    staged = replace(four, timeline=timeline.play("1F1B", 4, 8, [1.0] * 4, [2.0] * 4))
    drawn = page.page(staged)
    assert drawn.count("micro-batch 7, backward") == 4 and "pipeline bubble" in drawn
