"""Wan2.2 A14B has two denoisers, each trained by a run of its own: sampling and export take both runs."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from polymodal import recipe as recipes
from polymodal.core.errors import PolymodalError
from polymodal.generate.pipeline import Prompt, Settings, open_generator
from polymodal.train import encode, trainer
from polymodal.train.export import export
from tests.bounds import assert_one_picture
from tests.models import clips, tiny_pipelines

SETTINGS = Settings(4, 1.0, 32, 32, 5)  # levels on both sides of the boundary


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the denoiser above the boundary and of the one below: all weights, and LoRA."""
    root = tmp_path_factory.mktemp("runs")
    source = tiny_pipelines.pipeline("wan2.2-a14b", root / "pipeline")
    data = clips.data(root / "clips", clips=2, length=5)
    for name, model in {
        "high": {"part": "transformer"},
        "low": {"part": "transformer_2"},
        "low-lora": {"part": "transformer_2", "lora": {"rank": 2, "alpha": 4}},
    }.items():
        made = recipes.validate(
            {
                "model": {"source": str(source), **model},
                "data": {"datasets": [{"path": str(data)}], "workers": 0, "features": str(root / "features"), "clip": {"frames": [5], "sizes": [[32, 32]]}},
                "train": {"steps": 2, "global_batch_size": 2, "precision": "fp32"},
                "optim": {"lr": 0.05, "schedule": {"name": "constant", "warmup": 0}},
                "checkpoint": {"dir": str(root / name), "asynchronous": False},
                "monitor": {"trackers": []},
            }
        )  # fmt: skip
        if name == "high":
            encode.run(made)
        trainer.run(made)
    return root


def drawn(checkpoint, **options):
    return open_generator(checkpoint, **options).sample([Prompt("a red square")], SETTINGS)[0]


def test_both_runs_sample_and_export_as_one_pipeline(runs, tmp_path):
    alone = drawn(runs / "high")
    both = drawn(runs / "high", other=str(runs / "low"))
    assert not np.array_equal(alone, both)
    assert_one_picture(drawn(runs / "low", other=str(runs / "high")), both)  # in either order
    done = export(runs / "high", tmp_path / "out", other=str(runs / "low"))
    assert done.what == "model" and done.difference <= 1e-3 * max(1, done.largest)
    written, base = (DiffusionPipeline.from_pretrained(p) for p in (tmp_path / "out", runs / "pipeline"))
    for part in ("transformer", "transformer_2"):
        new, old = getattr(written, part).state_dict(), getattr(base, part).state_dict()
        assert new.keys() == old.keys() and any(not torch.equal(new[k], old[k]) for k in old)
    assert_one_picture(drawn(tmp_path / "out"), both)


def test_what_does_not_belong_together_is_refused(runs, tmp_path):
    with pytest.raises(
        PolymodalError, match="trained transformer of wan2.2, .* trained transformer too"
    ) as caught:
        drawn(runs / "high", other=str(runs / "high"))
    assert caught.value.hint == "Give a run with model.part: transformer_2."
    with pytest.raises(PolymodalError, match="--with .*pipeline is no run"):
        drawn(runs / "high", other=str(runs / "pipeline"))
    with pytest.raises(PolymodalError, match="A LoRA file is of one denoiser"):
        export(runs / "high", tmp_path / "o", other=str(runs / "low-lora"))
    merged = export(runs / "low-lora", tmp_path / "m", other=str(runs / "high"), merge_lora=True)
    assert merged.what == "merged"
    assert np.allclose(drawn(tmp_path / "m"), drawn(runs / "high", other=str(runs / "low-lora")), atol=2)
    flux = tiny_pipelines.pipeline("flux", tmp_path / "flux")
    with pytest.raises(PolymodalError, match="is flux.1, which has one denoiser"):
        drawn(flux, other=str(runs / "low"))
