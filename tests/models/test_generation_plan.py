"""Planning of models that generate: a batch without data has the shapes of real ones, frozen encoders are counted."""

from __future__ import annotations

import pytest
import torch

from polymodal import recipe as recipes
from polymodal.errors import PolymodalError
from polymodal.plan import command, devices
from polymodal.plan.job import Load
from polymodal.train.actors import Encoders
from tests.models import tiny_pipelines

SIDE, FRAMES = 64, 9


def recipe(source, encode="cached", **parallel):
    return recipes.validate({
        "name": "g", "model": {"source": str(source)}, "parallel": parallel,
        "data": {"encode": encode, "clip": {"frames": [FRAMES], "pixels": SIDE * SIDE}},
        "train": {"global_batch_size": 16, "micro_batch_size": 2},
    })  # fmt: skip


def planned(made, world=2):
    return command.plan(made, command.family_of(made), command.Question(world, devices.named("h100")))


@pytest.mark.parametrize("name", ["wan", "wan-i2v", "wan-flf2v", "flux", "flux-guided"])
def test_an_example_is_shaped_like_what_encoders_give(name, tmp_path):
    made = recipe(tiny_pipelines.pipeline(name, tmp_path / name))
    family = command.family_of(made)
    load = Load.of(made, family, 0.0, 1)
    batch = load.batch(family)
    frames = 1 if family.grid().still else FRAMES
    assert load.shape == (frames, SIDE, SIDE) and len(batch["latents"]) == load.samples == 2
    encoders = Encoders(family, torch.float32, "cpu")
    real = encoders.media(torch.zeros(2, frames, SIDE, SIDE, 3, dtype=torch.uint8)) | encoders.text(
        ["a", "red"]
    )
    assert {n: t.shape for n, t in real.items()} == {
        n: t.shape for n, t in batch.tensors.items() if n != "weight"
    }


def test_encoders_on_the_device_are_counted(tmp_path):
    source = tiny_pipelines.pipeline("wan", tmp_path / "wan")
    cached, online = planned(recipe(source)), planned(recipe(source, "online"))
    family = command.family_of(recipe(source))
    pipeline = Encoders(family, torch.float32, "cpu").pipeline
    frozen = sum(p.numel() for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    assert cached.stages[0].trace.usage.parts["encoders"] == 0
    assert online.stages[0].trace.usage.parts["encoders"] == 2 * frozen, "in bfloat16"
    assert cached.micro_batches == 4 and "2 x 9 x 64 x 64 (frames, height, width)" in command.text(cached)
    weights = sum(p.numel() for p in family.build().trained.parameters())
    assert cached.stages[0].trace.usage.end["optimizer"] == pytest.approx(weights * 8 / 2, rel=0.05)


def test_a_pipeline_of_a_denoiser_is_planned_in_half_precision(tmp_path):
    """The last stage asks modules of the first one for shapes, whose parameters are not gathered there."""
    made = planned(recipe(tiny_pipelines.pipeline("wan", tmp_path / "wan"), pp=2))
    assert [stage.trace.stage for stage in made.stages] == [0, 1] and made.timeline is not None
    assert all(any(t.axes == "pp" for t in stage.trace.traffic) for stage in made.stages)


def test_a_family_without_shapes_says_so(tmp_path):
    with pytest.raises(PolymodalError, match="sd3 cannot be planned: its family does not say"):
        planned(recipe(tiny_pipelines.pipeline("sd3", tmp_path / "sd3")))
