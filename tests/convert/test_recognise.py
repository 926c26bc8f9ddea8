"""`polymodal convert` and training: what lies in a directory is recognised, whatever it was cut at."""

import pytest
import torch

from polymodal.convert import engine, output, recognise
from polymodal.convert.family import family
from polymodal.convert.tree import Parallel
from polymodal.models import storage, weights
from tests.convert import layouts
from tests.convert.commands import ok, polymodal
from tests.convert.hubs import HUBS, understanding
from tests.convert.layouts import SETTINGS, tensors

CUTS = {
    "qwen2.5-vl": "--tp 2 --pp 1,3 --vit-pp 4,0",
    "qwen3-vl experts": "--tp 2 --pp 1,2 --vit-pp 4,0 --ep 2",
    "wan t2v": "--pp 2,3",
    "hunyuan-video diffusers": "--tp 2",
    "vace diffusers": "",
}


@pytest.mark.parametrize("name", CUTS)
def test_there_and_back_through_every_layout(here, name):
    source, cut = HUBS[name].make(here / "hf"), CUTS[name]
    for line in (
        f"convert hf mm --to mm {cut}",
        "convert mm again --to mm --hf-dir hf",  # cut otherwise
        "convert again dcp --to dcp --hf-dir hf",
        "convert dcp out --to hf --hf-dir hf",
        "convert mm direct --to hf --hf-dir hf",
    ):
        code, text = polymodal(line)
        assert code == 0, text
    layouts.same(tensors(source), tensors(here / "out"))
    layouts.same(tensors(source), tensors(here / "direct"))


@pytest.mark.parametrize("name", HUBS)
def test_every_model_goes_to_dcp_and_comes_back(here, name):
    """HF -> DCP -> HF is bit-exact; without a config, by the converter that takes any model."""
    source = HUBS[name].make(here / "hf")
    back, dcp = here / "out", here / "dcp"
    if (source / "config.json").is_file():
        sizes = {"tp": 1, "ep": 1}
        recognise.run(source, dcp, "dcp", None, sizes, {}, False, SETTINGS)
        recognise.run(dcp, back, "hf", source, sizes, {}, False, SETTINGS)
    else:
        line = "mm-convert GenericDCPConverter"
        ok(f"{line} hf_to_dcp --hf_dir hf --dcp_dir dcp")
        ok(f"{line} dcp_to_hf --load_dir dcp --save_dir out --model_assets_dir hf")
    layouts.same(tensors(source), tensors(back))


def test_canonical_trees_are_recognised(here):
    source = HUBS["qwen2.5-vl"].make(here / "hf")
    assert polymodal("convert hf mm --to mm --canonical")[0] == 0
    assert any("self_attention.q_proj" in key for key in layouts.tree(here / "mm"))
    assert polymodal("convert mm out --to hf --hf-dir hf")[0] == 0
    layouts.same(tensors(source), tensors(here / "out"))


def test_a_dry_run_writes_nothing(here):
    HUBS["qwen2.5-vl"].make(here / "hf")
    code, text = polymodal("convert hf mm --to mm --tp 2 --dry-run")
    assert code == 0 and "mp_rank_01" in text and not (here / "mm").exists()


def test_unknown_directories_are_refused(here):
    (here / "empty").mkdir()
    code, text = polymodal("convert empty out --to hf")
    assert code == 2 and "neither a hub checkpoint" in text
    HUBS["qwen2.5-vl"].make(here / "hf")
    assert polymodal("convert hf mm --to mm")[0] == 0
    code, text = polymodal("convert mm out --to hf")
    assert code == 2 and "--hf-dir" in text


@pytest.mark.parametrize("layout", ["tree", "dcp"])
def test_models_load_from_trees_and_dcp_directories(tmp_path, monkeypatch, layout):
    """Whatever TP and PP a tree was cut at: the reader hands models the hub's tensors."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    monkeypatch.setattr(storage, "READERS", [])
    recognise.register()
    source = understanding("qwen2.5-vl", text_config__num_hidden_layers=4)(tmp_path / "hf")
    opened = engine.hub(family("qwen2.5-vl"), "", source)
    if layout == "tree":
        output.to_tree(
            opened, Parallel(2, 1, {"llm": ((1, 3),), "vit": ((4, 0),)}), tmp_path / "other", SETTINGS
        )
    else:
        output.to_dcp(engine.reading.hub_files(source), tmp_path / "other", SETTINGS)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(source), dtype=torch.float32
        )
    weights.load(model, source=source, device="cpu", files=storage.foreign(tmp_path / "other", source))
    want = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).state_dict()
    have = model.state_dict()
    assert have.keys() == want.keys() and all(torch.equal(have[key], want[key]) for key in want)
    assert storage.foreign(source, source) is None  # a hub checkpoint is nobody's business here


@pytest.mark.slow
def test_a_run_starts_from_a_tree(here, monkeypatch):
    """checkpoint.init_from: the first loss is that of the tree's weights, not of model.source."""
    import json

    import yaml
    from PIL import Image

    monkeypatch.setattr(storage, "READERS", [])
    understanding("qwen2.5-vl")(here / "hf")
    understanding("qwen2.5-vl", text_config__initializer_range=0.3)(here / "trained")
    Image.new("RGB", (16, 16), "red").save(here / "a.png")
    row = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}],
        "images": ["a.png"],
    }
    (here / "data.json").write_text(json.dumps([row] * 4))
    assert polymodal("convert trained mm --to mm --tp 2")[0] == 0

    def first_loss(run, *overrides):
        recipe = {
            "model": {"source": "hf"}, "data": {"datasets": [{"path": "data.json"}], "max_length": 128, "pack_length": 128, "workers": 0},
            "train": {"steps": 1, "global_batch_size": 2, "precision": "fp32"}, "checkpoint": {"dir": run, "every": 1}, "monitor": {"trackers": []},
        }  # fmt: skip
        (here / "r.yaml").write_text(yaml.safe_dump(recipe))
        code, text = polymodal(" ".join(["train r.yaml", *overrides]))
        assert code == 0, text
        return next(
            json.loads(line)["loss"]
            for line in (here / run / "metrics.jsonl").read_text().splitlines()
            if "loss" in line
        )

    tree = first_loss("one", "checkpoint.init_from=mm")
    assert tree == pytest.approx(first_loss("two", "checkpoint.init_from=trained"))
    assert tree != pytest.approx(first_loss("three"))
