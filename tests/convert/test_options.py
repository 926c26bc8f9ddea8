"""Options of the documented commands, each by what it changes; and that every one of them is explained."""

import inspect
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.convert.converters import CONVERTERS
from tests.convert import layouts
from tests.convert.commands import ok
from tests.convert.hubs import HUBS, understanding
from tests.convert.layouts import tensors

QWEN = "mm-convert Qwen2_5_VLConverter {} --cfg.mm_dir {} --cfg.hf_config.hf_dir hf"


def test_an_iteration_of_a_training_run(here):
    source = understanding("qwen2.5-vl")(here / "hf")
    ok(QWEN.format("hf_to_mm", "mm"))
    (here / "mm/release").rename(here / "mm/iter_0000100")
    (here / "mm/latest_checkpointed_iteration.txt").write_text("100")
    for place in ("mm", "mm/iter_0000100"):  # by its tracker, and by itself
        ok(QWEN.format("mm_to_hf", place) + f" --cfg.save_hf_dir out-{len(place)}")
        layouts.same(tensors(source), tensors(here / f"out-{len(place)}"))


def test_lists_of_layers_are_flat_or_nested_in_every_direction(here):
    source = HUBS["qwen2.5-omni"].make(here / "hf")

    def lists(prefix, llm, vit, audio):
        at = f"--cfg.{prefix}"
        return (
            f"{at}.llm_pp_layers {llm} {at}.vit_pp_layers {vit} {at}.audio_pp_layers {audio} {at}.tp_size 2"
        )

    omni = QWEN.replace("Qwen2_5_VLConverter", "Qwen2_5_OmniConverter")
    flat, nested = ("[1,2]", "[4,0]", "[2,1]"), ("[[1,1],[0,1]]", "[[2,1],[1,0]]", "[[1,0],[1,1]]")
    ok(f"{omni.format('hf_to_mm', 'flat')} {lists('parallel_config', *flat)}")
    ok(f"{omni.format('hf_to_mm', 'nested')} {lists('parallel_config', *nested)}")
    held = torch.load(here / "nested/release/mp_rank_01_001/model_optim_rng.pt", weights_only=True)
    assert "audio_encoder.encoder.blocks.layers.0.input_layernorm.weight" in held["model1"]
    for name, given in (("flat", flat), ("nested", nested)):
        line = (
            f"{omni.format('mm_to_hf', name)} --cfg.save_hf_dir out-{name} {lists('parallel_config', *given)}"
        )
        ok(line)
        layouts.same(tensors(source), tensors(here / f"out-{name}"))
    line = "mm-convert Qwen2_5_OmniConverter resplit --cfg.source_dir nested --cfg.target_dir again --cfg.hf_config.hf_dir hf"
    both = lists("source_parallel_config", *nested), lists("target_parallel_config", *flat)
    ok(f"{line} {' '.join(both)}")
    layouts.same(layouts.tree(here / "flat"), layouts.tree(here / "again"))


def test_the_vision_tower_by_itself(here):
    understanding("qwen2.5-vl")(here / "hf")
    ok(QWEN.format("hf_to_mm", "all"))
    ok(QWEN.format("hf_to_mm", "vit") + " --cfg.save_vit_only true")
    everything = layouts.tree(here / "all")
    vision = {key: value for key, value in everything.items() if ":image_encoder." in key}
    assert 0 < len(vision) < len(everything)
    layouts.same(layouts.tree(here / "vit"), vision)


def test_a_language_model_from_elsewhere(here):
    source = understanding("qwen2.5-vl")(here / "hf")
    (here / "llm").mkdir()
    state = tensors(source)
    language = {key: value + 1 for key, value in state.items() if not key.startswith("visual.")}
    save_file(language, here / "llm/model.safetensors")
    (here / "llm/config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    ok(QWEN.format("hf_to_mm", "mm") + " --cfg.llm_hf_config.hf_dir llm")
    ok(QWEN.format("mm_to_hf", "mm") + " --cfg.save_hf_dir out")
    layouts.same({**state, **language}, tensors(here / "out"))


def test_towers_with_a_tp_size_of_their_own_come_back(here):
    source = understanding("qwen2.5-vl")(here / "hf")
    sizes = "--cfg.parallel_config.tp_size 2 --cfg.parallel_config.vit_tp_size 1"
    ok(f"{QWEN.format('hf_to_mm', 'mm')} {sizes}")
    ok(f"{QWEN.format('mm_to_hf', 'mm')} --cfg.save_hf_dir out {sizes}")
    layouts.same(tensors(source), tensors(here / "out"))


def test_values_may_be_rounded_on_the_way_to_the_hub(here):
    source = understanding("qwen3-vl")(here / "hf")
    for path in source.glob("*.safetensors"):
        save_file(
            {key: value.float() * 1.001 for key, value in load_file(path).items()}, path, {"format": "pt"}
        )
    ok("mm-convert Qwen3VLConverter hf_to_dcp --hf_dir hf --dcp_dir dcp")
    line = "mm-convert Qwen3VLConverter dcp_to_hf --load_dir dcp --save_dir out --model_assets_dir hf --to_bf16 true"
    ok(line)
    rounded = {key: value.to(torch.bfloat16) for key, value in tensors(source).items()}
    layouts.same(rounded, tensors(here / "out"))


METHODS = [
    (f"{title} {name}", method)
    for title, converter in CONVERTERS.items()
    for name, method in (inspect.getmembers(converter, inspect.isfunction) or [("", converter)])
    if not name.startswith("_")
]


@pytest.mark.parametrize(("name", "method"), METHODS, ids=[name for name, _ in METHODS])
def test_every_method_documents_itself_and_each_option(name, method):
    text = method.__doc__
    assert re.match(r"[A-Z].*\.", text), name
    for one in inspect.signature(method).parameters:
        if one != "self":
            assert re.search(rf"^\s+{one}: \S", text, re.M), f"{name}: {one}"
