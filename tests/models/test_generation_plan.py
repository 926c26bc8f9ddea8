"""Planning of models that generate: a batch without data has the shapes of real ones, frozen encoders are counted."""

from __future__ import annotations

import pytest
import torch

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.core.sample import Batch
from polymodal.plan import accelerators, command, planner, predict
from polymodal.train.actors import Encoders
from polymodal.train.layouts import layout_of
from tests.models import tiny_pipelines

SIDE, FRAMES = 64, 9


def recipe(source, encode="cached", **parallel):
    return recipes.validate({
        "name": "g", "model": {"source": str(source)}, "parallel": parallel,
        "data": {"encode": encode, "clip": {"frames": [FRAMES], "pixels": SIDE * SIDE}},
        "train": {"global_batch_size": 16, "micro_batch_size": 2},
    })  # fmt: skip


def planned(made, world=2):
    return planner.plan(made, planner.family_of(made), planner.Question(world, accelerators.named("h100")))


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "wan-flf2v", "flux", "flux-guided"])
def test_an_example_is_shaped_like_what_encoders_give(name, tmp_path):
    made = recipe(tiny_pipelines.pipeline(name, tmp_path / name))
    family = planner.family_of(made)
    layout = layout_of(made, family)
    load = layout.workload(0.0, 1)
    batch = layout.example(load)
    frames = 1 if family.grid().still else FRAMES
    assert load.measure.shape == (frames, SIDE, SIDE) and len(batch["latents"]) == load.samples == 2
    encoders = Encoders(family, torch.float32, "cpu")
    real = encoders.media(torch.zeros(2, frames, SIDE, SIDE, 3, dtype=torch.uint8)) | encoders.text(
        ["a", "red"]
    )
    assert {n: t.shape for n, t in real.items()} == {
        n: t.shape for n, t in batch.tensors.items() if n != "weight"
    }


def test_sizes_that_training_refuses_are_not_planned(tmp_path):
    made = recipe(tiny_pipelines.pipeline("wan", tmp_path / "wan"))
    clip = made.data.clip.model_copy(update={"sizes": [(16, 40)]})
    made = made.model_copy(update={"data": made.data.model_copy(update={"clip": clip})})
    with pytest.raises(PolymodalError, match="16 x 40 is not a multiple of 16 pixels"):
        planned(made)


def test_rows_of_a_cut_sequence_are_sent_between_stages(tmp_path):
    """Of the bytes that a stage sends, what belongs to the stream halves with cp 2, wherever the family was planned before."""
    source = tiny_pipelines.pipeline("wan", tmp_path / "wan")
    family = planner.family_of(recipe(source))

    def sent(**parallel) -> int:
        made = planner.plan(
            recipe(source, pp=2, **parallel), family, planner.Question(4, accelerators.named("h100"))
        )
        traces = [stage.trace for stage in made.stages]
        (traffic,) = [t for t in traces[0].traffic if t.kind == "send" and t.axes == "pp"]
        assert traffic.count == 4, "the stream, two embeddings of the time, one of the text"
        seconds = accelerators.transfer(made.accelerator, "send", traffic.ranks, traffic.bytes, traffic.count)
        assert predict.slowest_hop(traces, made.accelerator, [[0], [1]]) == seconds, (
            "all of them wait for one another"
        )
        return traffic.bytes

    whole, cut, again = sent(), sent(cp=2), sent()
    load = layout_of(recipe(source), family).workload(0.0, 1)
    stream = load.samples * load.measure.tokens * family.width() * 2  # bfloat16
    assert whole == again and whole - cut == stream / 2


def test_encoders_on_the_device_are_counted(tmp_path):
    source = tiny_pipelines.pipeline("wan", tmp_path / "wan")
    cached, online = planned(recipe(source)), planned(recipe(source, "online"))
    family = planner.family_of(recipe(source))
    pipeline = Encoders(family, torch.float32, "cpu").pipeline
    frozen = sum(p.numel() for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    assert cached.stages[0].trace.usage.parts["encoders"] == 0
    assert online.stages[0].trace.usage.parts["encoders"] == 2 * frozen, "in bfloat16"
    text = sum(p.numel() for p in pipeline.text_encoder.parameters())
    for placement, held in (("shard", frozen - text / 2), ("offload", 0)):
        made = recipe(source, "online")
        made.data.encoders = placement
        assert planned(made).stages[0].trace.usage.parts["encoders"] == pytest.approx(2 * held, rel=0.01)
    assert cached.micro_batches == 4 and "2 x 9 x 64 x 64 (frames, height, width)" in command.text(cached)
    weights = sum(p.numel() for p in family.build().parameters())
    assert cached.stages[0].trace.usage.end["optimizer"] == pytest.approx(weights * 8 / 2, rel=0.05)


def test_a_pipeline_of_a_denoiser_is_planned_in_half_precision(tmp_path):
    """The last stage asks modules of the first one for shapes, whose parameters are not gathered there."""
    made = planned(recipe(tiny_pipelines.pipeline("wan", tmp_path / "wan"), pp=2))
    assert [stage.trace.stage for stage in made.stages] == [0, 1] and made.timeline is not None
    assert all(any(t.axes == "pp" for t in stage.trace.traffic) for stage in made.stages)


def test_a_family_without_shapes_says_so(tmp_path):
    with pytest.raises(PolymodalError, match="sd3 cannot be planned: its family has no example batch"):
        planned(recipe(tiny_pipelines.pipeline("sd3", tmp_path / "sd3")))


def test_a_mask_that_hides_nothing_is_not_handed_on(tmp_path):
    """Any mask keeps attention from the devices' fastest kernels."""
    family = planner.family_of(recipe(tiny_pipelines.pipeline("qwen-image", tmp_path / "qwen")))
    model, name = family.build(), "encoder_hidden_states_mask"
    for kept, given in ((3, False), (2, True)):
        mask = torch.arange(3)[None] < torch.tensor([[3], [kept]])
        text = torch.zeros(2, 3, 16)
        batch = Batch({name: mask.long(), "encoder_hidden_states": text}, {})
        found = family.inputs(model, torch.zeros(2, 16, 4, 4), batch)[name]
        assert (found is not None) == given
