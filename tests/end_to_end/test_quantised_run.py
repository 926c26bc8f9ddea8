"""Runs on a base in few bits, whole: a denoiser and a language model, resumed, asked and exported."""

import json

import pytest
import torch

from polymodal import recipe as recipes
from polymodal.generate.opening import describe
from polymodal.models import quantised
from polymodal.train import encode, trainer
from polymodal.train.export import MARKER, export
from tests.end_to_end.test_generation import losses, recipe
from tests.models import clips, tiny_pipelines
from tests.parallel import training

CHANGES = {"model__lora": {"rank": 4, "alpha": 8}, "model__base": "nf4"}


def lines(directory):
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_denoiser_learns_on_nf4_as_on_its_own_weights(tmp_path):
    torch.manual_seed(3)
    source = tmp_path / "pipeline"
    tiny_pipelines.wan(attention_head_dim=32, ffn_dim=128).save_pretrained(str(source))
    data = clips.data(tmp_path / "clips", clips=4, pictures=2)
    made = recipe(source, data, tmp_path, **CHANGES, checkpoint__every=2)
    encode.run(made)
    assert trainer.run(made) == 0
    whole = recipe(
        source,
        data,
        tmp_path,
        **{**CHANGES, "model__base": "bf16"},
        checkpoint__dir=str(tmp_path / "plain" / "run"),
    )
    assert trainer.run(whole) == 0
    low, plain = losses(tmp_path), losses(tmp_path / "plain")
    assert low == pytest.approx(plain, rel=0.05) and low != plain
    merged = export(tmp_path / "run", tmp_path / "merged", merge_lora=True)
    assert merged.what == "merged" and 0.05 < merged.rounding < 0.15
    adapter = export(tmp_path / "run", tmp_path / "adapter")
    assert adapter.what == "adapter" and adapter.rounding is None and adapter.model_base == "nf4"


@pytest.mark.slow
def test_a_language_model_resumes_and_is_opened_as_it_was_trained(tmp_path):
    root = training.make(tmp_path, "qwen2.5-vl")
    settings = ["model.lora.rank=4", "model.base=nf4", f"checkpoint.dir={root}/run", "checkpoint.every=2"]
    made = recipes.load(root / "recipe.yaml", settings)
    at_once = recipes.load(root / "recipe.yaml", [*settings[:2], f"checkpoint.dir={root}/once"])
    for one in (recipes.load(root / "recipe.yaml", [*settings, "train.steps=2"]), made, at_once):
        assert trainer.run(one) == 0
    assert lines(root / "run") == lines(root / "once")
    merged = export(root / "run", root / "merged", merge_lora=True)
    assert 0.05 < merged.rounding < 0.15 and merged.difference < 1e-4
    marker = json.loads((root / "merged" / MARKER).read_text())
    assert marker["model_base"] == "nf4" and marker["rounding"] == merged.rounding
    assert export(root / "run", root / "adapter").difference < 1e-4  # on the source's own weights
    opened, exact = describe(root / "run"), describe(root / "run", quantise=False)
    low = quantised.choose(opened.model, opened.family.card)
    name = f"{next(iter(low))}.weight"
    rounded = quantised.pack(exact.tensors[name], "nf4")
    width = exact.tensors[name].shape[1]
    assert torch.equal(opened.tensors[name], quantised.unpack(rounded, "nf4", width, torch.float32))
